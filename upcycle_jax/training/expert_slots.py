"""The second moments of experts in checkpoints of other programs: how they are factored, and what
their gradients were multiplied by.

T5X factors expert kernels at every size and lays `v_row` over `embed`
(`Adafactor.expert_factoring`), and its MoeTrainer multiplies their gradients by the number of
expert partitions, whose square is then in their second moments (`Optimizer.expert_gradient_scale`).
"""

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np
from etils import epath

from upcycle_jax.checkpoints import CheckpointReader, open_checkpoint
from upcycle_jax.checkpoints.steps import step_folders
from upcycle_jax.models import layer_names
from upcycle_jax.state_tree import PARAM_STATES, without_slots
from upcycle_jax.training import manifest
from upcycle_jax.training.config import CheckpointConfig, OptimizerState
from upcycle_jax.training.optimizers import Adafactor, Optimizer, is_expert
from upcycle_jax.training.restore import Source, Start
from upcycle_jax.trees import LeafSpec

_log = logging.getLogger(__name__)

LARGEST_LOOKED_AT = 2**26
"""Bytes of a slot that is read to compare second moments: factored ones are far below."""

Specs = Mapping[str, LeafSpec]


def settle(
    optimizer: Optimizer, param_specs: Specs, model_dir: epath.Path, config: CheckpointConfig
) -> Optimizer:
    """The optimizer with the form of state that the checkpoint has which the run starts from:
    MODEL_DIR's latest, or the one that `config` restores with its optimizer state. Reads no arrays.

    Args:
      optimizer: as configured.
      param_specs: flat specs of the parameters that are trained.
      model_dir: the run's folder; it need not exist.
      config: what the run restores.

    Raises:
      ValueError: the setting contradicts the checkpoint, or only a setting can tell which form it
        has.
    """
    experts = {path: spec for path, spec in param_specs.items() if is_expert(spec)}
    if not experts or not isinstance(optimizer, Adafactor):
        return optimizer.forms[0]
    reader = _restored(model_dir, config)
    if reader is None:
        return optimizer.forms[0]
    found = reader.specs()
    experts = {path: experts[path] for path in experts.keys() - without_slots(found)}
    if not experts:
        return optimizer.forms[0]

    def fits(form: Optimizer) -> bool:
        return all(
            (there := found.get(f"{PARAM_STATES}{path}")) is not None and there.shape == spec.shape
            for path, spec in form.state_specs(experts).items()
        )

    fitting = [form for form in optimizer.forms if fits(form)]
    if len(fitting) > 1 and _is_foreign(reader) and _differ_in_meaning(fitting, experts):
        raise ValueError(
            f"{reader.path} was not written here, and d_model equals the experts' width: the shapes"
            " do not tell whether v_row is over embed, as T5X has it. Set"
            " Adafactor.expert_factoring = 't5x' if T5X wrote it, 'by_size' if this library did,"
            " and leave it set"
        )
    if fitting:
        return fitting[0]
    for other in dataclasses.replace(optimizer, expert_factoring=None).forms:
        if isinstance(other, Adafactor) and fits(other):
            raise ValueError(
                f"{reader.path} holds second moments of experts in the form"
                f" {other.expert_factoring!r}, and Adafactor.expert_factoring is"
                f" {optimizer.expert_factoring!r}: set it to {other.expert_factoring!r}, or to"
                " None, which takes what the checkpoint has"
            )
    return optimizer.forms[0]  # What differs beside the experts is for the comparison of trees.


def _restored(model_dir: epath.Path, config: CheckpointConfig) -> CheckpointReader | None:
    """A checkpoint of MODEL_DIR, of which all have one form, or else the one to be continued; None
    where no optimizer state is restored. What cannot be read is reported by `restore.find_source`.
    """
    places: list[str] = [str(path) for path in reversed(step_folders(model_dir).values())]
    source = config.restore
    if not places and source is not None and source.recipe is None:
        places = [] if source.optimizer_state == OptimizerState.RESET else [str(source.paths[0])]
    for place in places:
        try:
            reader = open_checkpoint(place)
            if any(path.startswith(PARAM_STATES) for path in reader.specs()):
                return reader
        except (ValueError, OSError):
            continue
    return None


def _is_foreign(reader: CheckpointReader) -> bool:
    """Whether nothing shows that this library wrote a checkpoint: neither a record in it nor the
    manifest of a run beside it.
    """
    folder = epath.Path(reader.path).parent
    return not reader.metadata() and not (folder / manifest.MANIFEST_FILE).exists()


def _differ_in_meaning(forms: list[Optimizer], experts: Specs) -> bool:
    """Whether slots of equal shapes are of other axes."""
    first, *others = ({p: s.axes for p, s in f.state_specs(experts).items()} for f in forms)
    return any(other != first for other in others)


def warn_of_scaled_gradients(source: Source, optimizer: Optimizer, param_specs: Specs) -> None:
    """Logs a warning where a run goes on with a state of experts that T5X's MoeTrainer may have
    written, and `expert_gradient_scale` is not set.

    The mean squared gradient of the first expert kernel is compared with that of a dense MLP of
    the same stack: an expert sees few of the tokens and its output is scaled by a gate, so its own
    is smaller, and a factor on its gradients is what makes it larger.
    """
    if source.start != Start.CONTINUE or source.fresh_optimizer or source.reader is None:
        return
    has_experts = any(is_expert(spec) for spec in param_specs.values())
    scaled = optimizer.expert_gradient_scale is not None
    if not has_experts or scaled or not _is_foreign(source.reader):
        return
    _log.warning(
        "%s was not written here. If T5X's MoeTrainer wrote it, gradients of experts were"
        " multiplied by its num_expert_partitions, and their second moments hold that squared:"
        " experts would move that much too slowly until the averages forget it. Set"
        " Adafactor.expert_gradient_scale to that number to go on as T5X does, or"
        " RestoreCheckpointConfig.optimizer_state = 'reset' (docs/t5x.md). %s",
        source.path,
        _comparison(source.reader, param_specs),
    )


def _comparison(reader: CheckpointReader, param_specs: Specs) -> str:
    for path, spec in param_specs.items():
        place = layer_names.split(spec.twin) if is_expert(spec) else None
        if place is None:
            continue
        # The same kernel of another layer of the stack, which has a dense MLP.
        others = [
            other
            for other in param_specs
            if (found := layer_names.split(other)) is not None
            and (found.stack, found.rest) == (place.stack, place.rest)
        ]
        mine = _mean_square(reader, path)
        theirs = _mean_square(reader, others[0]) if others else None
        if mine is not None and theirs:
            ratio = mine / theirs
            looks = "as with such a factor" if ratio > 1 else "which does not look like it"
            return (
                f"Compared: the mean squared gradient of {path} is {ratio:.3g} times that of"
                f" {others[0]}, {looks}."
            )
    return "No dense MLP of the same stack is there to compare with."


def _mean_square(reader: CheckpointReader, path: str) -> float | None:
    """The mean of a parameter's second moments, or None where they are too large to look at."""
    specs = reader.specs()
    for slot in ("v_row", "v"):
        name = f"{PARAM_STATES}{path}/{slot}"
        if name in specs and specs[name].shape != (1,) and specs[name].nbytes <= LARGEST_LOOKED_AT:
            return float(np.mean(reader.read(name), dtype=np.float64))
    return None
