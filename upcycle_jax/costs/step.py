"""What one training step costs, for any model: FLOPs as the model needs them, as they are computed
again, and as one device executes them; activations; all-to-alls.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from upcycle_jax.costs import activations, exchange, flops, loss_program, parameters, splits
from upcycle_jax.costs.flops import Value
from upcycle_jax.costs.loss_program import LossProgram
from upcycle_jax.costs.shapes import StepShape
from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.trees import LeafSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCosts:
    """One training step. FLOPs are those of matrix products unless said otherwise; experts count
    with every slot, whether a token sits in it or not, and dropless ones with every choice.

    Attributes:
      forward_flops: of a forward pass, over all devices.
      model_flops: of a forward and a backward pass, over all devices: what utilisation (MFU)
        divides.
      recomputed_flops: products that the backward pass repeats, over all devices.
      device_flops: everything that one device executes but for the optimizer: elementwise
        operations too, and what every device repeats because it is not divided.
      activation_bytes: what one device keeps for the backward pass of a microbatch where a
        compiler computes cheap elementwise results again, as those of accelerators do.
      all_activation_bytes: the same where it does not, as on CPUs.
      exchange_bytes: all-to-alls of one device, at even load.
    """

    forward_flops: int
    model_flops: int
    recomputed_flops: int
    device_flops: float
    activation_bytes: int
    all_activation_bytes: int
    exchange_bytes: int

    @property
    def hardware_flops(self) -> int:
        """Matrix products that are executed, over all devices."""
        return self.model_flops + self.recomputed_flops


def of_step(
    model: Model,
    shape: StepShape,
    partitioner: Partitioner,
    *,
    tile: tuple[int, int] | None = None,
) -> StepCosts:
    """Counts a step of a model on a mesh.

    Args:
      model: the model.
      shape: the batch.
      partitioner: the mesh.
      tile: what arrays are padded to in an accelerator's memory, see `Accelerator.tile`.

    Raises:
      ValueError: the tokens do not divide into routing groups.
    """
    lengths = tuple(sorted(shape.lengths.items()))
    program = _traced(model, shape.rows, lengths, shape.packed)  # type: ignore[arg-type]
    counted = loss_program.count(program, partitioner)
    parts, forward, backward = shape.num_microbatches, counted.forward, counted.backward
    device = parts * (forward.device + backward.device)
    if parts > 1:  # gradients of a microbatch are added to those before
        held = parameters.nbytes(program.params, partitioner).per_device
        device += parts * held / 4
    reserved = exchange.reserved_bytes(model, shape, partitioner, recomputes=program.recomputes)
    every, cheap = (
        activations.kept_bytes(
            program,
            counted,
            partitioner,
            elementwise=elementwise,
            in_layer=0 if elementwise else reserved,
            tile=None if elementwise else tile,
        )
        for elementwise in (True, False)
    )
    return StepCosts(
        forward_flops=parts * forward.products,
        model_flops=parts * (forward.products + backward.gradient_products),
        recomputed_flops=parts * backward.products,
        device_flops=device,
        activation_bytes=cheap,
        all_activation_bytes=every,
        exchange_bytes=exchange.exchange_bytes(
            model, shape, partitioner, recomputes=program.recomputes
        ),
    )


@functools.lru_cache(maxsize=8)
def _traced(
    model: Model, rows: int, lengths: tuple[tuple[str, int], ...], packed: bool
) -> LossProgram:
    """A dense and an upcycled model, on a few meshes, are what a command asks about."""
    return loss_program.trace(model, rows, dict(lengths), packed=packed)


def device_flops(
    function: Callable[..., Any], partitioner: Partitioner, *arguments: Mapping[str, LeafSpec]
) -> float:
    """FLOPs that one device executes of a function of flat trees of arrays."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments, is_leaf=_is_spec
    )
    values = [
        Value(splits.of_spec(partitioner.spec(leaf.axes), len(leaf.shape)))
        for leaf in jax.tree.leaves(arguments, is_leaf=_is_spec)
    ]
    traced = jax.make_jaxpr(function)(*shapes)
    return flops.count(traced.jaxpr, values, dict(partitioner.mesh.shape))[0].device


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, LeafSpec)
