"""The settings of a model's forward pass that its arrays do not show, as checkpoints record them.

Known are those that the families of models name (`ModelConfig.forward_settings`). A Hugging Face
folder states them in its config.json; conversions and training runs hand them on in the record of
an Orbax checkpoint. A checkpoint of T5X states none.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from upcycle_jax.models import registry
from upcycle_jax.models.base import ModelConfig
from upcycle_jax.models.config_json import to_json
from upcycle_jax.printing import printable

RECORD_KEY = "model_settings"
"""Where they lie in a checkpoint's record (`CheckpointReader.metadata`)."""

MODEL_KEY = "model"
"""Where the whole configuration lies there, of families whose checkpoints state it
(`Family.states_model`); conversions record it for every family.
"""


def stated_by(reader: Any) -> Mapping[str, Any]:
    """What a reader says of its checkpoint; nothing where it cannot say."""
    return getattr(reader, "model_settings", dict)()


def recorded(record: Mapping[str, Any], *, where: object) -> dict[str, Any]:
    """The settings in a checkpoint's record; empty where it has none.

    Raises:
      ValueError: they are damaged, or of a version that knows others; `where` is named.
    """
    found = record.get(RECORD_KEY, {})
    known = registry.known_settings()
    if not isinstance(found, dict) or found.keys() - known.keys():
        raise ValueError(
            f"{printable(where)}: the {RECORD_KEY} of its record are not all among"
            f" {', '.join(known)}: the record is damaged, or was written by a later version"
        )
    for name, value in found.items():
        if not known[name](value):
            raise ValueError(
                f"{printable(where)}: the {name} of its record is no such setting: the record is"
                " damaged"
            )
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def record(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint's record that states `settings`; empty where there are none."""
    if not settings:
        return {}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
    return {RECORD_KEY: plain}


def recorded_config(record: Mapping[str, Any], *, where: object) -> ModelConfig | None:
    """The model in a checkpoint's record; None where it states none.

    Raises:
      ValueError: it is damaged, or of a version that knows others; `where` is named.
    """
    found = record.get(MODEL_KEY)
    if found is None:
        return None
    try:
        config = registry.config_from_json(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(where)}: {printable(error)}") from None
    return config if registry.states_model(config) else None


def record_config(config: ModelConfig | None) -> dict[str, Any]:
    """The part of a checkpoint's record that states its model; empty where there is none, or its
    family's checkpoints do not state it.
    """
    if config is None or not registry.states_model(config):
        return {}
    return {MODEL_KEY: to_json(config)}


def check_model(reader: Any, config: ModelConfig) -> None:
    """Compares what a checkpoint states with the model that is to run on its parameters.

    Args:
      reader: the checkpoint.
      config: of the model.

    Raises:
      ValueError: they contradict each other: the result would be another function.
    """
    ours = config.forward_settings
    for name, value in stated_by(reader).items():
        if ours.get(name) != value:
            raise ValueError(
                f"{reader.path} states {name} {value!r}, the model of this run has"
                f" {ours.get(name)!r}: with it the parameters compute something else. Set"
                f" {type(config).__name__}.{name} = {value!r} in the model file, or choose the"
                " checkpoint of this model"
            )


def common(readers: Iterable[Any]) -> dict[str, Any]:
    """What several checkpoints state together.

    Raises:
      ValueError: two of them contradict each other.
    """
    out: dict[str, Any] = {}
    by: dict[str, Any] = {}
    for reader in readers:
        for name, value in stated_by(reader).items():
            if out.setdefault(name, value) != value:
                raise ValueError(
                    f"{by[name]} states {name} {out[name]!r}, {reader.path} {value!r}: parents of"
                    " one model must compute alike"
                )
            by.setdefault(name, reader.path)
    return out
