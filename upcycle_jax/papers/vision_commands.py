"""The commands that produce a vision curve of the paper at full scale, from the shipped files."""

from collections.abc import Sequence

from upcycle_jax.papers.command_lines import Command, Places
from upcycle_jax.papers.exhibits import Method, Point, Series
from upcycle_jax.papers.runs import paper_setting
from upcycle_jax.papers.vision_runs import SHOTS
from upcycle_jax.step_names import step_name

_SPARSE = (Method.UPCYCLED, Method.SCRATCH)


def commands(series: Series, places: Places) -> list[Command]:
    """What produces a vision curve: the pre-training run, and what judges it.

    Figure 6 varies the dense checkpoint, so that each of its points is a run.
    """
    head = series.head
    if head.metric == "parameters":
        return []
    if head.x_unit == "dense steps":
        return [
            command
            for point in series.points
            for command in _of_point(point, series.label, int(point.x or 0), places)
        ]
    return _of_point(series.points[-1], series.label, None, places)


def _of_point(point: Point, label: str, start: int | None, places: Places) -> list[Command]:
    """The run of a point, which ends in a cool-down, and its evaluation.

    Args:
      point: one that has the curve's method, size and setting.
      label: of the curve.
      start: step of the dense checkpoint that it starts from; None: the paper's.
      places: where to read and write.
    """
    model = f"vit_{point.size.lower().replace('/', '')}"
    name = "_".join([model, _NAMES[point.method], *_setting_names(point)])
    makes = f"{label}: pre-training with a cool-down"
    half = (7 if point.size.endswith("/32") else 14) * _EPOCH
    bound = ["MIXTURE_OR_TASK_NAME='jft_300m'", "USE_CACHED_TASKS=True"]
    files = [f"{FOLDER}/{model}{_FILES[point.method]}.gin"]
    steps = half if point.method == Method.START else 2 * half
    if point.x_unit == "extra epochs":
        steps = int(point.x or 0) * _EPOCH + (0 if point.method == Method.SCRATCH else half)
    if start is not None:
        name += f"_from_{start}"
        makes += f", from step {start:,}"
        steps = start + (point.extra_steps or 0)
    if point.method in (Method.DENSE, Method.UPCYCLED):
        dense = f"{places.dense_checkpoints}/{model}/{step_name(half if start is None else start)}"
        bound.append(f"INITIAL_CHECKPOINT_PATH='{dense}'")
    if point.method == Method.DENSE:
        files.append("runs/parts/cool_down.gin")
    else:
        bound.append(f"LEARNING_RATE_FACTORS='{_COOLED}'")
    bound += [f"TRAIN_STEPS={steps}", *_bindings(point)]
    model_dir = f"{places.results}/{name}"
    out = [Command(_line("train", files, [f"MODEL_DIR='{model_dir}'", *bound]), makes)]
    if point.metric == "imagenet_full_finetune":
        out += _fine_tuning(point, label, model, f"{model_dir}/{step_name(steps)}")
    if point.metric == "imagenet_10shot":
        sparse = "_upcycled" if point.method in _SPARSE else ""
        files = [f"models/{model}{sparse}.gin", "runs/few_shot.gin"]
        given = [
            f"CHECKPOINT_PATH='{model_dir}'",
            f"EVAL_OUTPUT_DIR='{model_dir}'",
            *("MIXTURE_OR_TASK_NAME='imagenet2012'", "USE_CACHED_TASKS=True"),
            *("SHOTS_SPLIT='train'", "EVAL_SPLIT='test'", "EVAL_CROP='central'"),
            *(f"SHOTS={SHOTS}", "VIEWS=1"),
            *(text for text in _bindings(point) if not text.startswith("Recipe.")),
        ]
        out.append(
            Command(_line("few_shot", files, given), f"{label}: {SHOTS}-shot accuracy, 5 seeds")
        )
    return out


def _fine_tuning(point: Point, label: str, model: str, checkpoint: str) -> list[Command]:
    """Twelve settings of full fine-tuning of a checkpoint, and what the chosen one does on images
    that had no part in the choice.
    """
    sparse = point.method in _SPARSE
    study = f"{checkpoint.rpartition('/')[0]}_imagenet"
    model_file = f"models/{model}{'_upcycled' if sparse else ''}.gin"
    patches = (_TUNED_SIZE // int(point.size.partition("/")[2])) ** 2
    tuned: dict[str, int | float] = {"IMAGE_SIZE": _TUNED_SIZE}
    if sparse:
        # Groups of 8 images, and V-MoE's capacity factor of fine-tuning.
        tuned |= {"GROUP_SIZE": 8 * patches, "TRAIN_EXPERT_CAPACITY_FACTOR": 1.5}
    given = [
        f"SWEEP_DIR='{study}'",
        f"MODEL_FILE='{model_file}'",
        f"CHECKPOINT='{checkpoint}'",
        f"TUNED={tuned}",
    ]
    chosen = f"{study}/cells/CHOSEN"
    evaluated = [
        *(f"{name}={value}" for name, value in tuned.items() if name != _TRAINED),
        f"CHECKPOINT_PATH='{chosen}'",
        f"EVAL_OUTPUT_DIR='{chosen}'",
        *("EVAL_SPLIT='test'", "EVAL_CROP='central'"),
    ]
    files = [model_file, "runs/eval_images.gin", f"{FOLDER}/parts/imagenet.gin"]
    return [
        Command(
            _line("sweep", [f"{FOLDER}/vit_imagenet.gin"], given),
            f"{label}: full fine-tuning, 12 settings, the best on validation in chosen.json",
        ),
        Command(
            _line("eval", files, evaluated),
            f"{label}: its accuracy; CHOSEN is the cell that chosen.json names",
        ),
    ]


FOLDER = "papers/sparse_upcycling"
_TUNED_SIZE = 384
"""Pixels, as V-MoE fine-tunes; the paper's is not printed."""
_TRAINED = "TRAIN_EXPERT_CAPACITY_FACTOR"
_EPOCH = 74_000
"""Steps of an epoch: about 303 million images in batches of 4096 (inferred)."""
_COOLED = "constant * linear_warmup * rsqrt_timescale * straight_cooldown"
_NAMES = {
    Method.START: "dense",
    Method.DENSE: "dense_continued",
    Method.UPCYCLED: "upcycled",
    Method.SCRATCH: "moe_from_scratch",
}
_FILES = {
    Method.START: "",
    Method.DENSE: "",
    Method.UPCYCLED: "_upcycled",
    Method.SCRATCH: "_moe_from_scratch",
}


def _setting_names(point: Point) -> list[str]:
    return [f"{key}_{value}" for key, value in paper_setting(point).items()]


def _bindings(point: Point) -> list[str]:
    """The difference from the paper's usual model, as bindings."""
    bound: list[str] = []
    setting = paper_setting(point)
    top_k = setting.get("router") == "top_k"
    for key, value in setting.items():
        if key == "C" and not top_k:
            bound += [
                f"TRAIN_EXPERT_CAPACITY_FACTOR={float(value)}",
                f"EVAL_EXPERT_CAPACITY_FACTOR={float(value)}",
            ]
        elif key != "C":
            bound += _SETTINGS[key, value] if (key, value) in _SETTINGS else [_COUNTS[key](value)]
    if top_k:
        # The paper's column C is K there. The table names batch priority, and no capacity factor. A
        # single weight divided by itself would be 1, and its router would not learn.
        selected = int(point.setting["C"])
        bound.append(f"TokensChoose.num_selected_experts={selected}")
        bound.append(f"TokensChoose.renormalize={selected > 1}")
    return bound


_SETTINGS = {
    ("router", "top_k"): [
        "VitMoeConfig.router=@TokensChoose()",
        "TokensChoose.batch_prioritized=True",
        "TRAIN_EXPERT_CAPACITY_FACTOR=1.0",
        "EVAL_EXPERT_CAPACITY_FACTOR=1.0",
    ],
    ("renormalize", "no"): ["RENORMALIZE=False"],
    ("init", "random"): ["Recipe.expert_init=@FreshExperts()"],
    ("state", "fresh"): ["Recipe.optimizer_state='reset'"],
}
_COUNTS = {
    "experts": "NUM_EXPERTS={}".format,
    "moe_layers": lambda value: f"NUM_SPARSE_LAYERS={value.removeprefix('last_')}",
}


def _line(command: str, gin_files: Sequence[str], bindings: Sequence[str]) -> tuple[str, ...]:
    return (
        "python",
        "-m",
        f"upcycle_jax.{command}",
        *(f"--gin_file={name}" for name in gin_files),
        *(f"--gin.{text}" for text in bindings),
    )
