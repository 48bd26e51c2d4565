"""Looks for everything that would stop a run, without computing or writing anything, and does not
stop at the first finding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from upcycle_jax.config import registry
from upcycle_jax.config.build import Config
from upcycle_jax.config.parse import ConfigError
from upcycle_jax.costs import parameters
from upcycle_jax.data import DatasetConfig
from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.state_tree import PARAM_STATES, TARGET
from upcycle_jax.text import size
from upcycle_jax.training import holding, prepare
from upcycle_jax.training.train import Train
from upcycle_jax.training.train_state import state_specs
from upcycle_jax.training.trainer import Trainer
from upcycle_jax.types import Batch, PyTree

GIB = 2**30


@dataclasses.dataclass
class Findings:
    """What the check found.

    Attributes:
      problems: what would stop the run.
      warnings: what is probably a mistake.
      facts: what was looked at and is fine, with its numbers.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    facts: list[str] = dataclasses.field(default_factory=list)

    def attempt(self, what: str, step: Callable[[], str | None], *, stops: bool = True) -> bool:
        """Runs one step of the check; its error becomes a problem, or a warning where it would not
        stop the run. Returns whether it went through.
        """
        kept = self.problems if stops else self.warnings
        try:
            fact = step()
        except ConfigError as error:
            kept += [f"{what}: {problem}" for problem in error.problems]
            return False
        except (ValueError, FileNotFoundError, TypeError) as error:
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            kept.append(f"{what}: {error}{notes}")
            return False
        if fact:
            self.facts.append(f"{what}: {fact}")
        return True

    def text(self) -> str:
        """One line per finding and a verdict."""
        lines = [f"ok       {fact}" for fact in self.facts]
        lines += [f"warning  {warning}" for warning in self.warnings]
        lines += [f"PROBLEM  {problem}" for problem in self.problems]
        count = len(self.problems)
        lines.append(
            f"{count} problem{'' if count == 1 else 's'}: the run would stop"
            if count
            else "the run can start"
        )
        return "\n".join(lines) + "\n"


def check_run(
    loaded: Config,
    *,
    function: str = "train",
    device_memory: float | None = None,
    read_data: bool = True,
    elsewhere: bool = False,
) -> Findings:
    """Checks a configuration as far as it goes.

    Args:
      loaded: a configuration whose names are already checked.
      function: the root that the run calls.
      device_memory: GiB of one device, or None for what the devices say of themselves; CPUs say
        nothing, and are not compared.
      read_data: build the data set and take one batch (imports TensorFlow).
      elsewhere: the run is for other machines, which may have another MODEL_DIR by that name.
    """
    found = Findings()
    built: list[Any] = []

    def build() -> str:
        call = loaded.build(function)
        built.append(call() if function in registry.FUNCTIONS else call)
        return "everything is set and can be built"

    if found.attempt("configuration", build):
        (run,) = built
        if isinstance(run, Train):
            _check_training(found, run, device_memory=device_memory, read_data=read_data)
            found.attempt("MODEL_DIR", lambda: _model_dir(run), stops=not elsewhere)
        elif function in ("evaluate", "infer", "few_shot"):
            found.attempt("plan of the run", lambda: _plan(run))
        found.warnings += [f"{line} is not used by {function}" for line in loaded.unused()]
    return found


def _check_training(
    found: Findings, run: Train, *, device_memory: float | None, read_data: bool
) -> None:
    model, partitioner, trainer = run.model, run.partitioner, run.trainer
    shaped = found.attempt(
        "mesh",
        lambda: " x ".join(f"{name} {size}" for name, size in partitioner.mesh.shape.items()),
    )
    shaped = shaped and found.attempt("divisibility", lambda: _divides(model, partitioner, trainer))
    if shaped:
        found.attempt("memory", lambda: _memory(model, partitioner, trainer, device_memory))
    found.attempt("model on a batch", lambda: _trace(run))
    for config in (run.train_dataset_cfg, run.train_eval_dataset_cfg):
        if config is not None and read_data:
            found.attempt(
                f"data ({config.mixture_or_task_name}, {config.split})",
                functools.partial(_data, model, config),
            )
    if shaped:
        found.attempt("plan of the run", lambda: _plan(run))


def _plan(run: Any) -> None:
    """Prints it, as `--dry_run` does: where the run starts from, its steps, its conversion."""
    run.run(dry_run=True)


def _model_dir(run: Train) -> str:
    specs = state_specs(run.model, run.trainer.optimizer, run.trainer.parameter_groups)
    saves = run.checkpoint_cfg.save is not None
    size = sum(leaf.nbytes for leaf in specs.values()) if saves else 0
    found = prepare.check_model_dir(run.folder, checkpoint_bytes=size)
    earlier = holding.training_in(run.folder)
    return f"{found}; {earlier}" if earlier else found


def _divides(model: Model, partitioner: Partitioner, trainer: Trainer) -> str:
    specs = state_specs(model, trainer.optimizer, trainer.parameter_groups)
    partitioner.shardings(specs)
    return f"{len(specs)} arrays fit the mesh"


def memory_of(device: jax.Device) -> float | None:
    """GiB that a device gives to programs; None where it does not say, as a CPU."""
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except RuntimeError:
        limit = None
    return limit / GIB if limit else None


def _memory(
    model: Model, partitioner: Partitioner, trainer: Trainer, device_memory: float | None
) -> str:
    specs = state_specs(model, trainer.optimizer, trainer.parameter_groups)
    params = parameters.nbytes(
        {path: spec for path, spec in specs.items() if path.startswith(TARGET)}, partitioner
    ).per_device
    slots = parameters.nbytes(
        {path: spec for path, spec in specs.items() if path.startswith(PARAM_STATES)}, partitioner
    ).per_device
    needed = (2 * params + slots) / GIB
    parts = f"parameters {params / GIB:.2f}, gradients as much, optimizer {slots / GIB:.2f}"
    if device_memory is None:
        device_memory = memory_of(partitioner.mesh.devices.flat[0])
    text = f"{needed:.2f} GiB on each device before activations ({parts})"
    if device_memory is not None and needed > device_memory:
        raise ValueError(
            f"{text}, but a device has {device_memory:g} GiB: raise NUM_EXPERT_PARTITIONS or"
            " NUM_MODEL_PARTITIONS, or set Partitioner.fsdp"
        )
    return text


def _trace(run: Train) -> str:
    """Shapes of the loss on one microbatch: what the model refuses, it refuses here."""
    model, dataset = run.model, run.train_dataset_cfg
    rows = dataset.batch_size // (run.trainer.num_microbatches or 1)
    lengths = dict(dataset.task_feature_lengths)
    batch = model.input_specs(rows, lengths, packed=dataset.pack)
    params = jax.eval_shape(model.init_params, jax.random.key(0))

    def loss(params: PyTree, batch: Batch, key: jax.Array) -> jax.Array:
        return model.loss_fn(params, batch, key, denominator=model.loss_denominator(batch))[0]

    with run.partitioner.activate():
        jax.eval_shape(loss, params, batch, jax.random.key(0))
    return f"{rows} rows of {', '.join(f'{name} {length}' for name, length in lengths.items())}"


def _data(model: Model, config: DatasetConfig) -> str:
    dataset = prepare.open_data(model, config)
    cached = dataset.verify()
    next(dataset.train_iterator())
    found = [f"{size(cached)} of cache are as written"] if cached else []
    found.append(f"a batch of {config.batch_size} rows can be read")
    if model.vocab_size is not None:
        found.append(f"{dataset.vocabulary_size()} token ids of the model's {model.vocab_size}")
    return "; ".join(found)
