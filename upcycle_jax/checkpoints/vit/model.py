"""The vision transformer that a checkpoint holds, for those who write it in another form."""

import dataclasses
from collections.abc import Mapping

from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.models import registry
from upcycle_jax.models.base import ModelConfig
from upcycle_jax.models.vit.config import VitConfig
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec, Role

_FIRST = f"{TARGET}embedding/kernel"


def is_vision(reader: CheckpointReader) -> bool:
    """Whether the leaves are those of a vision transformer."""
    return _FIRST in reader.specs()


def dense_model(reader: CheckpointReader, given: ModelConfig | None = None) -> VitConfig:
    """The model without its experts, as far as leaves and the checkpoint itself tell.

    Args:
      reader: the checkpoint.
      given: the model; None: what the checkpoint states.

    Raises:
      ValueError: it is no vision transformer, nothing says how many heads it has, or `given` is of
        another family or says otherwise than the checkpoint.
    """
    if given is not None and not isinstance(given, VitConfig):
        raise ValueError(
            f"{reader.path} holds a vision transformer, the model given is a"
            f" {type(given).__name__}: name its own model file"
        )
    stated = dict(reader.model_settings())
    settings = stated or (given.forward_settings if given is not None else {})
    found = registry.infer_dense(_dense_specs(reader.specs()), settings)
    if not isinstance(found, VitConfig):
        raise ValueError(f"{reader.path} holds no vision transformer")
    if given is not None:
        _compare(reader, found, given)
    return found


def _dense_specs(specs: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
    """The leaves that the dense model has: those of experts are one expert's."""
    out = {}
    for path, spec in specs.items():
        if spec.role is Role.DENSE:
            out[path] = spec
        elif spec.role is Role.EXPERT:
            out.setdefault(spec.twin, LeafSpec(spec.shape[1:], spec.dtype))
    return out


def _compare(reader: CheckpointReader, found: VitConfig, given: VitConfig) -> None:
    dense = dataclasses.replace(
        given.dense,
        dtype=found.dtype,
        dropout_rate=found.dropout_rate,
        head_bias_init=found.head_bias_init,
        remat_policy=found.remat_policy,
        scan_layers=found.scan_layers,
    )
    for field in dataclasses.fields(found):
        one, other = getattr(found, field.name), getattr(dense, field.name)
        if one != other:
            raise ValueError(
                f"{reader.path} has {field.name} {one!r}, the model given {other!r}: name the model"
                " file of this checkpoint"
            )
