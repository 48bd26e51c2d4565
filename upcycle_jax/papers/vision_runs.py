"""Which of the paper's vision experiments a run of a vision transformer is, and its 10-shot
accuracies.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.studies.run_results import METRICS, read_rows

MODEL = "VitConfig"
"""What manifests call a vision transformer."""

PRETRAINING, FINE_TUNING = "jft", "imagenet"
"""Parts of the names of the paper's tasks: JFT-300M, and ImageNet for 10-shot and fine-tuning."""
SHOTS = 10

DEFAULTS = {
    "C": "2",
    "router": "experts_choose",
    "renormalize": "yes",
    "init": "copy",
    "moe_layers": "half",
    "experts": "32",
    "state": "loaded",
}
"""The paper's upcycled vision transformer, in the words of `Point.setting`."""

SHAPES = {
    "B/32": (768, 3072, 12, 12, 32),
    "B/16": (768, 3072, 12, 12, 16),
    "L/32": (1024, 4096, 16, 24, 32),
    "L/16": (1024, 4096, 16, 24, 16),
}
"""emb_dim, mlp_dim, num_heads, num_layers, patch_size."""
_ACCURACY = "teacher_forced/accuracy"
_FIELDS = ("emb_dim", "mlp_dim", "num_heads", "num_layers", "patch_size")
_RESULT = re.compile(rf".*{FINE_TUNING}.*-{SHOTS}_shots-(\d+)\.json", re.IGNORECASE)


def is_vision(model: Mapping[str, Any]) -> bool:
    """Whether a manifest's model is a vision transformer."""
    return model.get("type") == MODEL


def size(model: Mapping[str, Any]) -> str | None:
    """The paper's size whose shape it has, or None."""
    shape = tuple(model.get(name) for name in _FIELDS)
    return next((name for name, known in SHAPES.items() if known == shape), None)


def shape(model: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for models whose numbers may be subtracted."""
    return tuple(model.get(name) for name in (*_FIELDS, "image_size", "num_classes"))


def setting(model: Mapping[str, Any], converted: Mapping[str, Any], *, new: bool) -> dict[str, str]:
    """Differences from `DEFAULTS`.

    Args:
      model: of the manifest, with MoE layers.
      converted: the recipe that made it; empty where it was not converted.
      new: it is trained from scratch, so that there is no optimizer state to load.
    """
    moe = model["moe"]
    router = moe.get("router") or {}
    name, capacity = str(router.get("type", "")), moe["train_expert_capacity_factor"]
    renormalized = bool(router.get("renormalize"))
    if name == "ExpertsChoose":
        name = "experts_choose"
    elif name == "TokensChoose":
        # The paper's column for Top-K is K.
        capacity = router["num_selected_experts"]
        renormalized |= capacity == 1  # One weight: divided by itself the router would not learn.
        name = "top_k" if router["batch_prioritized"] else "top_k_unprioritized"
    init = (converted.get("expert_init") or {}).get("type", "CopyExperts")
    named = {"CopyExperts": "copy", "FreshExperts": "random"}
    state = "loaded" if new or converted.get("optimizer_state") == "tiled" else "fresh"
    here = {
        "C": f"{capacity:g}",
        "router": name,
        "renormalize": "yes" if renormalized else "no",
        "init": named.get(init, init),
        "moe_layers": _moe_layers(model),
        "experts": str(moe["num_experts"]),
        "state": state,
    }
    return {key: value for key, value in here.items() if value != DEFAULTS[key]}


def _moe_layers(model: Mapping[str, Any]) -> str:
    """'half' for the last half of the blocks, 'last_5' for another number of them, else what the
    manifest says.
    """
    moe, layers = model["moe"], model["num_layers"]
    count, where = moe["num_sparse_layers"], moe["sparse_layout"]
    count = layers // 2 if count is None else count
    if isinstance(where, list | tuple):
        count = len(where)
        if sorted(where) == list(range(layers - count, layers)):
            where = "TOP"
    if where != "TOP":
        return f"{count}_{where}".replace(" ", "")
    return "half" if count == layers // 2 else f"last_{count}"


def differences(size_name: str, point_setting: Mapping[str, str]) -> dict[str, str]:
    """A setting of the paper as a difference from `DEFAULTS`."""
    half = f"last_{SHAPES[size_name][3] // 2}"
    return {
        key: value
        for key, value in point_setting.items()
        if DEFAULTS.get(key) != value and (key, value) != ("moe_layers", half)
    }


def of_pre_training(tuned: Mapping[str, str]) -> dict[str, str]:
    """A setting of a fine-tuned run without what fine-tuning has of its own: another capacity
    factor, and an optimizer that starts anew.
    """
    return {key: value for key, value in tuned.items() if key not in ("C", "state")}


def few_shot(model_dir: Path) -> dict[int, float]:
    """10-shot accuracy on ImageNet by step, as `upcycle_jax.few_shot` has left it in a MODEL_DIR.
    Files that are none of its are passed over.
    """
    found = {}
    for path in sorted((model_dir / "few_shot").glob("*.json")):
        match = _RESULT.fullmatch(path.name)
        try:
            accuracy = json.loads(path.read_text(encoding="utf-8"))["accuracy"] if match else None
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if match and isinstance(accuracy, int | float):
            found[int(match[1])] = float(accuracy)
    return found


def fine_tuned(model_dir: Path) -> float | None:
    """Accuracy of a fine-tuned run's last checkpoint that `upcycle_jax.eval` evaluated on ImageNet;
    None where it has not.
    """
    for path in sorted((model_dir / "inference_eval").glob(f"*{FINE_TUNING}*/{METRICS}")):
        rows = [row for row in read_rows(path) if _ACCURACY in row]
        if rows:
            return float(rows[-1][_ACCURACY])
    return None
