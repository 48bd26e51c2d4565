"""What a model is made of, as text: one line per array as T5X prints it. The content of
`model-info.txt`.
"""

from collections.abc import Mapping

from upcycle_jax.models import accounting, step_cost
from upcycle_jax.models.step_cost import StepShape
from upcycle_jax.models.t5.config import T5Config
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.trees import LeafSpec


def total_parameters(specs: Mapping[str, LeafSpec]) -> int:
    """Number of elements of all arrays."""
    return sum(spec.size for spec in specs.values())


def _shape(spec: LeafSpec) -> str:
    parts = [
        str(size) if axis is None else f"{axis}={size}"
        for axis, size in zip(spec.axes, spec.shape, strict=True)
    ]
    return f"({', '.join(parts)})"


def _partition(spec: LeafSpec, partitioner: Partitioner | None) -> str:
    if partitioner is None:
        return "-"
    entries = [repr(entry) for entry in partitioner.spec(spec.axes)]
    return f"({', '.join(entries)}{',' if len(entries) == 1 else ''})"


def array_lines(specs: Mapping[str, LeafSpec], partitioner: Partitioner | None = None) -> list[str]:
    """One line per array, sorted by path: name, number of elements, shape with logical axes, mesh
    axes.

    Args:
      specs: flat tree of specs with logical axes.
      partitioner: decides the mesh axes; only its rules are used, no device.
    """
    name_width = max((len(name) for name in specs), default=0)
    shape_width = max((len(_shape(spec)) for spec in specs.values()), default=0)
    return [
        f"Variable    {name:<{name_width}} size {spec.size:<12} shape {_shape(spec):<{shape_width}}"
        f" partition spec {_partition(spec, partitioner)}"
        for name, spec in sorted(specs.items())
    ]


REFERENCE_ROWS, REFERENCE_LENGTHS = 64, {"inputs": 512, "targets": 128}
"""The batch of which `cost_lines` tells the cost where none is given."""


def cost_lines(
    config: T5Config,
    params: Mapping[str, LeafSpec],
    *,
    batch_size: int | None = None,
    lengths: Mapping[str, int] | None = None,
) -> list[str]:
    """What a model costs, from `accounting`: parameters that a token meets, bytes, FLOPs per token
    forward and in training.

    Args:
      config: the model.
      params: its `param_specs()`.
      batch_size: rows, or None for `REFERENCE_ROWS`; it decides the routing groups.
      lengths: of 'inputs' and 'targets', or None for `REFERENCE_LENGTHS`.

    Raises:
      ValueError: the tokens do not divide into routing groups.
    """
    rows, lengths = batch_size or REFERENCE_ROWS, lengths or REFERENCE_LENGTHS
    counts = accounting.count_parameters(config, params)
    flops = accounting.forward_flops(
        config, batch_size=rows, inputs_length=lengths["inputs"], targets_length=lengths["targets"]
    )
    tokens = rows * (lengths["inputs"] + lengths["targets"])
    shape = f"{rows} rows of {lengths['inputs']} + {lengths['targets']} tokens"
    lines = [
        f"Active parameters per token: {counts.active}",
        f"Parameters of experts: {counts.experts}, of routers: {counts.routers}",
        f"Bytes of parameters: {sum(spec.nbytes for spec in params.values())}",
        (
            f"FLOPs per token: {flops.total / tokens:.4g} forward, {flops.train_step / tokens:.4g}"
            f" in training (matrix products; {shape})"
        ),
    ]
    again = step_cost.recomputed_flops(
        config,
        StepShape(
            batch_size=rows, inputs_length=lengths["inputs"], targets_length=lengths["targets"]
        ),
    )
    if again:
        lines.append(
            f"FLOPs per token computed again under remat_policy {config.remat_policy!r}:"
            f" {again / tokens:.4g}"
        )
    return lines


def model_info(
    params: Mapping[str, LeafSpec],
    *,
    partitioner: Partitioner | None = None,
    state: Mapping[str, LeafSpec] | None = None,
) -> str:
    """The text of `model-info.txt`.

    Args:
      params: specs of the parameters by path, without the prefix `target/`.
      partitioner: adds the partition specs.
      state: specs of the rest of the train state (step, optimizer slots) by full path, listed after
        the total.

    Returns:
      Lines that end with a newline; the line `Total number of parameters: N` counts `params` only.
    """
    lines = [
        *array_lines(params, partitioner),
        f"Total number of parameters: {total_parameters(params)}",
    ]
    if state:
        lines += [
            "",
            *array_lines(state, partitioner),
            f"Total number of elements of the optimizer state: {total_parameters(state)}",
        ]
    return "\n".join(lines) + "\n"
