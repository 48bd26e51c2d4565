"""The commands that produce a curve of the paper at full scale, from the shipped
`gin_configs/papers/sparse_upcycling/` files.
"""

from upcycle_jax.papers import vision_commands
from upcycle_jax.papers.command_lines import Command, Places
from upcycle_jax.papers.exhibits import Method, Point, Series
from upcycle_jax.papers.runs import START_STEP, paper_setting
from upcycle_jax.step_names import step_name

FOLDER = "papers/sparse_upcycling"
GIN_FILES = {
    Method.START: "dense",
    Method.DENSE: "dense",
    Method.UPCYCLED: "upcycled",
    Method.SCRATCH: "moe_from_scratch",
    Method.DEPTH_TILED: "depth_tiled",
}
FINE_TUNING_STEPS = 200_000
FINE_TUNING_SEEDS = (0, 1, 2)
"""The paper's SuperGLUE scores are means of three runs."""

MESH = ("NUM_EXPERT_PARTITIONS=32", "GROUP_SIZE=512")
"""One expert per device of a row of a 64-chip mesh, as in `pods/`."""

SETTINGS = {
    ("router", "top_2_bpr"): (
        "MoeConfig.encoder_router=@encoder/TokensChoose()",
        "encoder/TokensChoose.batch_prioritized=True",
    ),
    ("router", "switch"): (
        "MoeConfig.encoder_router=@encoder/TokensChoose()",
        "encoder/TokensChoose.num_selected_experts=1",
    ),
    ("renormalize", "yes"): ("ExpertsChoose.renormalize=True", "TokensChoose.renormalize=True"),
}
"""A setting that is not the default of the paper's language models -> bindings."""


def _bindings(point: Point) -> list[str]:
    bound: list[str] = []
    for key, value in paper_setting(point).items():
        if key == "C":
            bound += [
                f"TRAIN_EXPERT_CAPACITY_FACTOR={value}",
                f"EVAL_EXPERT_CAPACITY_FACTOR={value}",
            ]
        else:
            bound += SETTINGS[key, value]
    return bound


def _name(point: Point) -> str:
    """Folder of the run; curves of several figures that are one run share it."""
    name = f"{point.size.lower()}_{GIN_FILES[point.method]}"
    return "_".join([name, *(f"{key}_{value}" for key, value in paper_setting(point).items())])


def _train(gin: str, *bindings: str) -> tuple[str, ...]:
    return (
        "python",
        "-m",
        "upcycle_jax.train",
        f"--gin_file={FOLDER}/{gin}.gin",
        *(f"--gin.{text}" for text in bindings),
    )


def commands(series: Series, places: Places = Places()) -> list[Command]:
    """What produces a curve; empty for table 1 (`model_info`).

    A pre-training run gives all points of its curve, because it is evaluated as it goes. A
    SuperGLUE score needs a fine-tuning run per point and seed, of the checkpoint that the
    pre-training run left there, and its evaluation.
    """
    head = series.head
    if head.modality == "vision":
        return vision_commands.commands(series, places)
    if head.metric == "parameters":
        return []
    name, gin = _name(head), f"{head.size.lower()}_{GIN_FILES[head.method]}"
    model_dir = f"{places.results}/{name}"
    mesh = MESH if head.method in (Method.UPCYCLED, Method.SCRATCH) else ()
    bound = [f"MODEL_DIR='{model_dir}'"]
    if head.method != Method.SCRATCH:
        dense = f"{places.dense_checkpoints}/t5_1_1_{head.size.lower()}"
        bound.append(f"INITIAL_CHECKPOINT_PATH='{dense}/{step_name(START_STEP)}'")
    words = _train(gin, *bound, *mesh, *_bindings(head))
    makes = f"{series.label}: pre-training, all points of the curve"
    out = (
        []
        if head.method == Method.START and head.metric == "superglue"
        else [Command(words, makes)]
    )
    return out + (_fine_tuning(series, name, mesh, places) if head.metric == "superglue" else [])


def _fine_tuning(series: Series, name: str, mesh: tuple[str, ...], places: Places) -> list[Command]:
    """Fine-tuning and evaluation of every point's checkpoint, three seeds each."""
    out = []
    head = series.head
    gin = f"{head.size.lower()}_{GIN_FILES[head.method]}_superglue"
    for point in series.points:
        step = START_STEP + (point.extra_steps or 0)
        source = f"{places.results}/{name}/{step_name(step)}"
        if head.method == Method.START:
            source = f"{places.dense_checkpoints}/t5_1_1_{head.size.lower()}/{step_name(step)}"
        for seed in FINE_TUNING_SEEDS:
            model_dir = f"{places.results}/{name}_superglue_{step}_seed{seed}"
            bound = (
                f"MODEL_DIR='{model_dir}'",
                f"INITIAL_CHECKPOINT_PATH='{source}'",
                f"TRAIN_STEPS={step + FINE_TUNING_STEPS}",
                f"RANDOM_SEED={seed}",
            )
            where = f"{series.label}, {point.extra_steps or 0:,} extra steps, seed {seed}"
            out.append(
                Command(_train(gin, *bound, *mesh, *_bindings(head)), f"{where}: fine-tuning")
            )
            out.append(Command(_evaluation(point, model_dir, mesh), f"{where}: its score"))
    return out


def _evaluation(point: Point, model_dir: str, mesh: tuple[str, ...]) -> tuple[str, ...]:
    kind = "_upcycled" if point.method == Method.UPCYCLED else ""
    model = f"models/t5_1_1_{point.size.lower()}{kind}.gin"
    bound = (
        "MIXTURE_OR_TASK_NAME='super_glue_v102_proportional'",
        f"CHECKPOINT_PATH='{model_dir}'",
        f"EVAL_OUTPUT_DIR='{model_dir}'",
        *(text for text in mesh if text.startswith("NUM_")),
        *_bindings(point),
    )
    return (
        "python",
        "-m",
        "upcycle_jax.eval",
        f"--gin_file={model}",
        "--gin_file=runs/eval.gin",
        *(f"--gin.{text}" for text in bound),
    )
