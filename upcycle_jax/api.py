"""The library from Python: build a model from gin files, plan, convert, prove and load.

    import upcycle_jax as uj

    model = uj.build_model("models/t5_1_1_base_upcycled.gin", NUM_EXPERTS=8)
    conversion = uj.convert_checkpoint(
        "/data/dense/checkpoint_1000000", "/data/moe/checkpoint_1000000", model
    )
    assert conversion.proof.ok
    params = uj.load_params("/data/moe/checkpoint_1000000", model)

These are thin: each calls what a command calls, and raises where the command prints an error.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax import state_tree, trees
from upcycle_jax.checkpoints import CheckpointReader, create_checkpoint, loading, open_checkpoint
from upcycle_jax.config import load
from upcycle_jax.models import registry
from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.surgery import MergeRecipe, Plan, Proof, Recipe, make_plan
from upcycle_jax.surgery.conversion_settings import Optimizer
from upcycle_jax.surgery.convert_and_prove import Conversion, open_sources
from upcycle_jax.surgery.plan_text import plan_text
from upcycle_jax.surgery.upcycle import Upcycle
from upcycle_jax.surgery.verify import Verify
from upcycle_jax.types import PyTree

__all__ = [
    "CheckpointReader",
    "Conversion",
    "Model",
    "Plan",
    "Proof",
    "Recipe",
    "build_model",
    "convert_checkpoint",
    "load_params",
    "open_checkpoint",
    "plan_conversion",
    "plan_text",
    "prove_conversion",
    "save_params",
]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def build_model(*gin_files: str, **macros: Any) -> Model:
    """The model that gin files describe as their macro MODEL, or that a checkpoint states.

    Args:
      *gin_files: paths, or names of shipped files such as 'models/t5_1_1_base_upcycled.gin', read
        in order. Or one folder of Hugging Face, one GGUF file or one dense checkpoint alone: its
        own model, MoE layers included.
      **macros: values of macros, e.g. `NUM_EXPERTS=8`; they win over the files.

    Raises:
      FileNotFoundError: a file is nowhere.
      ConfigError: a name does not exist, or something is missing; all problems at once.
      ValueError: the checkpoint does not state its model, or macros stand beside it.
    """
    if len(gin_files) == 1 and (Path(gin_files[0]).is_dir() or gin_files[0].endswith(".gguf")):
        if macros:
            raise ValueError(
                f"{gin_files[0]} is a checkpoint, which knows no macros (got {', '.join(macros)});"
                " change its model with dataclasses.replace(model.config, ...)"
            )
        reader = open_checkpoint(gin_files[0])
        config = reader.model_config()
        if config is None:
            config = registry.infer_dense(reader.specs(), reader.model_settings())
        return registry.build(config)
    bindings = [f"{name}={value!r}" for name, value in macros.items()]
    model: Model = load(gin_files, bindings).macro("MODEL")
    return model


def plan_conversion(
    source: Paths,
    model: Model,
    recipe: Recipe | MergeRecipe | None = None,
    *,
    optimizer: Optimizer | None = None,
) -> Plan:
    """What a conversion would do, leaf by leaf. Reads shapes only; `plan_text` shows it.

    Args:
      source: a checkpoint of any readable format, a MODEL_DIR, or several dense parents.
      model: the target.
      recipe: the choices; None: the paper's for language.
      optimizer: whose state the result holds; None: no optimizer state.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the source does not fit the model.
    """
    parameters = model.param_specs()
    slots = optimizer.state_specs(parameters) if optimizer is not None else {}
    specs = open_sources(source).specs()
    return make_plan(specs, state_tree.specs(parameters, slots), recipe or Recipe())


def convert_checkpoint(
    source: Paths,
    output: str | os.PathLike[str],
    model: Model | None = None,
    recipe: Recipe | MergeRecipe | None = None,
    *,
    optimizer: Optimizer | None = None,
    report: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Conversion:
    """Converts a checkpoint and proves the result, as `upcycle-jax upcycle` does.

    Args:
      source: a checkpoint of any readable format, a MODEL_DIR, or several dense parents.
      output: folder of the new checkpoint.
      model: the target; None: the shape of the source's own model with the paper's MoE layers.
      recipe: the choices; None: the paper's for language.
      optimizer: whose state the result holds, e.g. `training.optimizers.Adafactor()`; None: no
        optimizer state.
      report: is given every line that the command prints.
      **settings: other attributes of `surgery.upcycle.Upcycle`, e.g. `function_check='off'`.

    Returns:
      Plan, path and proof; `ok` says whether the proof holds.

    Raises:
      FileNotFoundError: there is no checkpoint at the source path.
      ValueError: the source does not fit the target, or the output exists.
    """
    job = Upcycle(
        initial_checkpoint_path=_texts(source),
        output_checkpoint_path=os.fspath(output),
        model=model,
        recipe=recipe,
        optimizer=optimizer,
        **settings,
    )
    return job.run(report=report)


def prove_conversion(
    output: str | os.PathLike[str],
    source: Paths | None = None,
    *,
    report: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Proof:
    """Proves a conversion from what is on disk, as `upcycle-jax verify` does.

    Args:
      output: the result of a conversion.
      source: what it was converted from; None: what the result records.
      report: is given every line that the command prints.
      **settings: other attributes of `surgery.verify.Verify`.

    Raises:
      FileNotFoundError: a checkpoint is not there.
      ValueError: the source does not fit, or nothing is recorded that would be needed.
    """
    job = Verify(
        output_checkpoint_path=os.fspath(output),
        initial_checkpoint_path=None if source is None else _texts(source),
        **settings,
    )
    return job.run(report=report)


def load_params(
    checkpoint: str | os.PathLike[str], model: Model, partitioner: Partitioner | None = None
) -> PyTree:
    """The parameters of a checkpoint as nested dicts of float32 arrays, for `model.loss_fn`,
    `model.eval_fn` and the rest of `models.base.Model`.

    Args:
      checkpoint: of any readable format, or a MODEL_DIR, whose latest is taken.
      model: the model of the checkpoint.
      partitioner: the mesh that they are split over; None: all devices, data parallel.

    Raises:
      FileNotFoundError: there is no checkpoint.
      DamagedCheckpointError: a parameter is not what was saved.
      ValueError: the checkpoint is not one of this model.
    """
    return loading.load_params(open_checkpoint(checkpoint), model, partitioner or Partitioner())


def save_params(path: str | os.PathLike[str], params: PyTree, model: Model, *, step: int) -> None:
    """Writes parameters as a checkpoint without optimizer state, which every command reads.

    Args:
      path: folder of the checkpoint, `.../checkpoint_<step>`.
      params: nested dicts of arrays.
      model: their model.
      step: the training step.

    Raises:
      FileExistsError: there is something at `path`.
      ValueError: the parameters are not those of the model.
    """
    specs, values = model.param_specs(), trees.flatten(params)
    if difference := trees.diff(specs, values, compare_dtype=True):
        raise ValueError(f"these are not the parameters of the model:\n{difference}")
    full = state_tree.specs(specs, {})
    with create_checkpoint(path, full, step=step, metadata={}) as writer:
        for name, value in values.items():
            writer.write(f"{state_tree.TARGET}{name}", None, np.asarray(value))
        writer.finalize()


def _texts(paths: Paths) -> str | list[str]:
    if isinstance(paths, str | os.PathLike):
        return os.fspath(paths)
    return [os.fspath(path) for path in paths]
