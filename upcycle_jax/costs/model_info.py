"""What a model is made of, as text: one line per array as T5X prints it. The content of
`model-info.txt`.
"""

from collections.abc import Mapping

from upcycle_jax.costs import capacities, parameters, step
from upcycle_jax.costs.shapes import StepShape
from upcycle_jax.models.base import Model, stack_lengths
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


REFERENCE_ROWS = 64
"""Rows of the batch of which `cost_lines` tells the cost where none is given."""


def cost_lines(
    model: Model,
    partitioner: Partitioner,
    *,
    batch_size: int | None = None,
    lengths: Mapping[str, int] | None = None,
) -> list[str]:
    """What a model costs: parameters that process a token, bytes, FLOPs per token forward and in
    training; and what the capacity factor of its MoE layers comes to.

    Args:
      model: the model.
      partitioner: a mesh; what is told does not depend on it.
      batch_size: rows, or None for `REFERENCE_ROWS`; it decides the routing groups.
      lengths: of the task features, or None for the `usual_lengths` of the model's features.

    Raises:
      ValueError: the tokens do not divide into routing groups.
    """
    lengths = lengths or model.features.usual_lengths
    rows, counts = batch_size or REFERENCE_ROWS, parameters.count(model)
    shape = StepShape(batch_size=rows, lengths=lengths)
    costs, tokens = step.of_step(model, shape, partitioner), shape.num_tokens(model)
    sizes = " + ".join(map(str, stack_lengths(model, lengths).values()))
    lines = [
        f"Active parameters per token: {counts.active}",
        f"Parameters of experts: {counts.experts}, of routers: {counts.routers}",
        f"Bytes of parameters: {sum(spec.nbytes for spec in model.param_specs().values())}",
        (
            f"FLOPs per token: {costs.forward_flops / tokens:.4g} forward,"
            f" {costs.model_flops / tokens:.4g} in training (matrix products; {rows} rows of"
            f" {sizes} tokens)"
        ),
    ]
    texts = capacities.capacity_texts(model, batch_size=rows, lengths=lengths)
    lines += [f"Capacity of the {text}" for text in texts]
    if costs.recomputed_flops:
        lines.append(
            f"FLOPs per token computed again under remat_policy {model.config.remat_policy!r}:"
            f" {costs.recomputed_flops / tokens:.4g}"
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
