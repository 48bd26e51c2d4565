"""Finds this project's runs in a results folder and says which of the paper's experiments each of
them is.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.papers import vision_runs
from upcycle_jax.papers.exhibits import Method, Point
from upcycle_jax.studies.run_list import model_dirs
from upcycle_jax.studies.run_results import METRICS, Run, read_rows

START_STEP = 1_000_000
"""Step of the dense checkpoints that the paper's language experiments start from (T5 1.1's public
ones).
"""
VOCABULARY = 32128
NUM_EXPERTS = 32
FINE_TUNING = "super_glue"
"""Part of the name of every fine-tuning mixture of the paper."""

CONFIG = "config.gin"
NO_SETTINGS = frozenset(
    {
        *(
            "MODEL_DIR",
            "RANDOM_SEED",
            "INITIAL_CHECKPOINT_PATH",
            "TRAIN_STEPS",
            "EVAL_PERIOD",
            "STATS_PERIOD",
            "SAVING_PERIOD",
        ),
        *(
            "KEEP_CHECKPOINTS",
            "TRACKER",
            "NUM_EXPERT_PARTITIONS",
            "NUM_MODEL_PARTITIONS",
            "Recipe.seed",
        ),
    }
)
"""Lines of a run's `config.gin` that say where, how long and how often, not what."""

DEFAULTS = {
    "C": "2",
    "router": "experts_choose",
    "renormalize": "no",
    "init": "copy",
    "moe_layers": "half",
}
"""The paper's upcycled language model, in the words of `Point.setting`."""

SHAPES = {
    "Base": (768, 2048, 12, 64, 12),
    "Large": (1024, 2816, 16, 64, 24),
    "XL": (2048, 5120, 32, 64, 24),
}
"""emb_dim, mlp_dim, num_heads, head_dim, layers per stack."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A run and what it is.

    Attributes:
      folder: its MODEL_DIR.
      run: what it left there.
      method: dense continuation, upcycled, from scratch, ...; None for dense pre-training, which
        the paper does not show.
      size: the paper's size whose width, heads and vocabulary it has, or None.
      setting: how it differs from the paper's upcycled model, in the words of `Point.setting`;
        empty for dense models.
      num_experts: E, 0 for dense models.
      fine_tuned: it was fine-tuned, not pre-trained.
      on_c4: every task that it was evaluated on is C4's, of vision JFT-300M's.
      family: equal for runs whose numbers may be subtracted: shape of the dense model, batch and
        tasks.
      identity: equal for runs that differ in their seed and their length only, whose numbers may be
        averaged.
      modality: 'language' or 'vision'.
    """

    folder: Path
    run: Run
    method: Method | None
    size: str | None
    setting: Mapping[str, str]
    num_experts: int
    fine_tuned: bool
    on_c4: bool
    family: tuple
    identity: str
    modality: str = "language"

    @property
    def at_paper_scale(self) -> bool:
        """Whether its numbers stand beside the paper's: same model, same number of experts (of
        vision, figures have several), same data.
        """
        return (
            self.size is not None
            and (self.modality == "vision" or self.num_experts in (0, NUM_EXPERTS))
            and (self.on_c4 or self.fine_tuned)
        )

    @property
    def seed(self) -> int:
        """Seed of parameters, dropout and, in the shipped files, of the order of the data."""
        return int(self.run.manifest.get("seed", 0))


def find_runs(folder: str | Path) -> list[Found]:
    """All evaluated runs at or below a folder, by path.

    Raises:
      FileNotFoundError: the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a folder: --results takes a folder with MODEL_DIRs in it"
        )
    return [
        identify(path, Run.load(path.relative_to(root).as_posix(), path))
        for path in model_dirs(root)
        if any((path / "training_eval").glob(f"*/{METRICS}"))
    ]


def identify(folder: Path, run: Run) -> Found:
    """Says what a run is, from its manifest."""
    manifest = run.manifest
    recorded = manifest.get("model")
    model: Mapping[str, Any] = recorded if isinstance(recorded, Mapping) else {}
    moe = model.get("moe") or {}
    num_experts = int(moe.get("num_experts", 0))
    if vision_runs.is_vision(model):
        return _identify_vision(folder, run, model, num_experts)
    widths = tuple(
        model.get(name) for name in ("emb_dim", "mlp_dim", "num_heads", "head_dim", "vocab_size")
    )
    batch = manifest.get("batch_size")
    tasks = run.tasks
    data = manifest.get("data")
    mixture = str(data.get("mixture_or_task", "")) if isinstance(data, Mapping) else ""
    return Found(
        folder=folder,
        run=run,
        method=_method(manifest, bool(moe)),
        size=_size(model, _method(manifest, bool(moe))),
        setting=_setting(model, manifest) if moe else {},
        num_experts=num_experts,
        fine_tuned=FINE_TUNING in mixture or any(FINE_TUNING in task for task in tasks),
        on_c4=all("c4" in task for task in tasks),
        family=(*widths, batch, tuple(tasks)),
        identity=_identity(folder, manifest),
    )


def _identify_vision(folder: Path, run: Run, model: Mapping[str, Any], num_experts: int) -> Found:
    manifest, tasks = run.manifest, run.tasks
    method = _method(manifest, bool(num_experts))
    named = [task.lower() for task in tasks]
    converted = manifest.get("converted_by") or manifest.get("recipe") or {}
    return Found(
        folder=folder,
        run=run,
        method=method,
        size=vision_runs.size(model),
        setting=(
            vision_runs.setting(model, converted, new=method == Method.SCRATCH)
            if num_experts
            else {}
        ),
        num_experts=num_experts,
        fine_tuned=any(vision_runs.FINE_TUNING in task for task in named),
        on_c4=all(vision_runs.PRETRAINING in task for task in named),
        family=(*vision_runs.shape(model), manifest.get("batch_size"), tuple(tasks)),
        identity=_identity(folder, manifest),
        modality="vision",
    )


def _identity(folder: Path, manifest: Mapping[str, Any]) -> str:
    """What two runs of different seeds have in common: the manifest's description, and all settings
    where the run wrote them.
    """
    described = {
        name: _without_seeds(manifest.get(name))
        for name in ("start_step", "model", "batch_size", "optimizer", "recipe", "converted_by")
    }
    path = folder / CONFIG
    lines = path.read_text().splitlines() if path.is_file() else []
    settings = [
        line
        for line in lines
        if line and line[0] != "#" and line.partition(" =")[0] not in NO_SETTINGS
    ]
    return json.dumps([described, settings], sort_keys=True)


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_seeds(part) for key, part in value.items() if key != "seed"}
    return [_without_seeds(part) for part in value] if isinstance(value, list) else value


def _method(manifest: Mapping[str, Any], has_experts: bool) -> Method | None:
    converted = manifest.get("converted_by") or manifest.get("recipe") or {}
    started = (manifest.get("restored_from") or {}).get("start", "scratch")
    is_new = started == "scratch" and not manifest.get("start_step")
    if has_experts:
        return Method.SCRATCH if is_new else Method.UPCYCLED
    if converted.get("depth"):
        return Method.DEPTH_TILED
    return None if is_new else Method.DENSE


def _size(model: Mapping[str, Any], method: Method | None) -> str | None:
    names = ("emb_dim", "mlp_dim", "num_heads", "head_dim")
    layers = (model.get("num_encoder_layers"), model.get("num_decoder_layers"))
    for size, (*widths, depth) in SHAPES.items():
        has_depth = layers == (depth, depth) or method == Method.DEPTH_TILED
        if (
            [model.get(name) for name in names] == widths
            and model.get("vocab_size") == VOCABULARY
            and has_depth
        ):
            return size
    return None


def _setting(model: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Differences from `DEFAULTS`."""
    moe = model["moe"]
    router = moe.get("encoder_router") or {}
    name = str(router.get("type", ""))
    if name == "ExpertsChoose":
        name = "experts_choose"
    elif name == "SwitchTop1":
        name = "switch"
    elif name == "TokensChoose":
        chosen = router["num_selected_experts"]
        name = (
            "switch"
            if chosen == 1
            else f"top_{chosen}{'_bpr' if router['batch_prioritized'] else ''}"
        )
    converted = manifest.get("converted_by") or manifest.get("recipe") or {}
    init = (converted.get("expert_init") or {}).get("type", "CopyExperts")
    here = {
        "C": f"{moe['train_expert_capacity_factor']:g}",
        "router": name,
        "renormalize": "yes" if router.get("renormalize") else "no",
        "init": "copy" if init == "CopyExperts" else init,
        "moe_layers": _moe_layers(model),
    }
    return {key: value for key, value in here.items() if value != DEFAULTS[key]}


def _moe_layers(model: Mapping[str, Any]) -> str:
    """'half' for every second layer of both stacks, else what the manifest says."""
    moe, parts = model["moe"], []
    for stack in ("encoder", "decoder"):
        if f"num_{stack}_layers" not in model:
            continue
        layers, count, where = (
            model[f"num_{stack}_layers"],
            moe[f"num_{stack}_sparse_layers"],
            moe[f"{stack}_sparse_layout"],
        )
        half = where == "MIXED" and count in (None, layers // 2)
        parts.append(
            "half" if half else f"{stack}:{where if count is None else f'{count}_{where}'}"
        )
    return (
        "half" if set(parts) == {"half"} else "_".join(str(part).replace(" ", "") for part in parts)
    )


def paper_setting(point: Point) -> dict[str, str]:
    """A setting of the paper as a difference from `DEFAULTS`, those of its modality."""
    setting = point.setting
    if point.modality == "vision":
        return vision_runs.differences(point.size, setting)
    return {key: value for key, value in setting.items() if DEFAULTS.get(key) != value}


def superglue(found: Found) -> float | None:
    """The average SuperGLUE score of a fine-tuned run's last evaluated checkpoint; None where
    `upcycle_jax.eval` has not written one.
    """
    for path in sorted((found.folder / "inference_eval").glob(f"*{FINE_TUNING}*/{METRICS}")):
        rows = [row for row in read_rows(path) if "average" in row]
        if rows:
            return float(rows[-1]["average"])
    return None


def extra_steps_before(found: Found, others: list[Found]) -> int:
    """Extra pre-training steps of the checkpoint that a fine-tuned run started from.

    They count from the start of the run that wrote the checkpoint where that run is among the
    others, else from the paper's step.
    """
    source = found.run.manifest.get("restored_from") or {}
    step = int(source.get("step") or found.run.start_step)
    other = source_of(found, others)
    return max(step - START_STEP, 0) if other is None else step - other.run.start_step


def source_of(found: Found, others: list[Found]) -> Found | None:
    """The run that wrote the checkpoint that a run started from, where it is among the others."""
    source = found.run.manifest.get("restored_from") or {}
    folder = Path(str(source.get("path", ""))).parent
    for other in others:
        if other is not found and (
            other.folder.resolve() == folder.resolve() or other.folder.name == folder.name
        ):
            return other
    return None
