"""The model that a checkpoint holds, or becomes, for runs without a model file."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

from etils import epath

from upcycle_jax import checks
from upcycle_jax.checkpoints import CheckpointReader, open_checkpoint
from upcycle_jax.models import registry
from upcycle_jax.models.base import Model
from upcycle_jax.models.shared import LossNormalizer
from upcycle_jax.models.stacking import RematPolicy
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.surgery import source_model
from upcycle_jax.surgery.model_record import model_from_json
from upcycle_jax.surgery.recipe import MergeRecipe, Recipe
from upcycle_jax.training import manifest
from upcycle_jax.trees import Role

PathOrPaths = checks.PathText | os.PathLike | Sequence[checks.PathText | os.PathLike]


def model_of_checkpoint(
    path: PathOrPaths,
    *,
    recipe: Recipe | MergeRecipe | None = None,
    moe: MoeSettings | None = None,
    features: Any = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    remat_policy: RematPolicy | None = None,
    scan_layers: bool | None = None,
    dropout_rate: checks.BelowOne | None = None,
    label_smoothing: checks.BelowOne = 0.0,
    z_loss: checks.NotNegative = 0.0,
    loss_normalizing_factor: LossNormalizer = "NUM_REAL_TARGET_TOKENS",
) -> Model:
    """The model of a checkpoint: of its config.json (Hugging Face), its record, the manifest of the
    run that saved it, or, for a dense one, its shapes and what it states. Reads no arrays.

    Args:
      path: the checkpoint in any readable format, or a MODEL_DIR; of several parents the first
        counts.
      recipe: what becomes of it: with a `Recipe` a dense model gets MoE layers (or a sparse one
        more experts), with a `MergeRecipe` a sparse one loses them; None: it stays as it is.
      moe: the MoE layers that it gets, or in place of its own; None: its own, or what the recipe
        makes of it.
      features: what its batches hold; None: what the family has.
      dtype: of activations; None: what the checkpoint says, or the family's default. So are
        `remat_policy`, `scan_layers` and `dropout_rate`.
      remat_policy: what the backward pass computes again.
      scan_layers: compile a block of layers that repeats once.
      dropout_rate: of dense layers, and of experts that have no other.
      label_smoothing: see the family's model.
      z_loss: likewise.
      loss_normalizing_factor: likewise.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it is of no known family, damaged, or has experts and nothing says how it routes.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not paths:
        raise ValueError("model_of_checkpoint.path names no checkpoint (INITIAL_CHECKPOINT_PATH)")
    reader = open_checkpoint(paths[0])
    found: Any
    if recipe is not None:
        found = source_model.inferred_model(reader, recipe, moe).config
    else:
        found = _own_config(reader)
        if moe is not None:
            found = dataclasses.replace(found, moe=moe)
    given = {
        "dtype": dtype,
        "remat_policy": remat_policy,
        "scan_layers": scan_layers,
        "dropout_rate": dropout_rate,
    }
    found = dataclasses.replace(found, **{n: v for n, v in given.items() if v is not None})
    kind: Any = type(registry.build(found))
    settings = {} if features is None else {"features": features}
    model: Model = kind(
        found,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        loss_normalizing_factor=loss_normalizing_factor,
        **settings,
    )
    return model


def _own_config(reader: CheckpointReader) -> Any:
    """The configuration of the model that a checkpoint holds."""
    stated = source_model.stated_config(reader)
    if stated is not None:
        return stated
    specs, recorded = reader.specs(), _recorded_by_run(reader)
    if recorded is not None:
        return model_from_json(recorded, max_layers=len(specs)).config
    if any(spec.role is Role.EXPERT for spec in specs.values()):
        raise ValueError(
            f"{reader.path} has experts, and neither a record in it nor a {manifest.MANIFEST_FILE}"
            " beside it says how they are chosen: name a model file, --gin_file=models/<name>.gin"
        )
    return registry.infer_dense(specs, reader.model_settings())


def _recorded_by_run(reader: CheckpointReader) -> Any:
    """The model in the manifest of the run that saved a checkpoint; None where there is none."""
    return manifest.read(epath.Path(reader.path).parent).get("model")
