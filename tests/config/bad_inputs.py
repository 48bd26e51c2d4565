"""Bad inputs as data: settings times kinds of nonsense. Each must end in one message that names the
setting, and exit code 2, before anything is written. `test_bad_inputs` builds them in process; a
script may run them as commands.
"""

import dataclasses
from collections.abc import Iterator

MODEL_FILE = "models/t5_1_1_tiny_upcycled.gin"
FILES = {
    "train": (MODEL_FILE, "runs/continue_pretrain.gin"),
    "eval": (MODEL_FILE, "runs/eval.gin"),
    "infer": (MODEL_FILE, "runs/infer.gin"),
    "upcycle": (MODEL_FILE, "runs/upcycle.gin"),
}
FUNCTIONS = {"train": "train", "eval": "evaluate", "infer": "infer", "upcycle": "upcycle"}
"""Command -> the function that it builds."""

REQUIRED = {
    "train": (
        "MODEL_DIR='run'",
        "MIXTURE_OR_TASK_NAME='task'",
        "TRAIN_STEPS=2",
        "INITIAL_CHECKPOINT_PATH='dense'",
    ),
    "eval": ("MIXTURE_OR_TASK_NAME='task'", "CHECKPOINT_PATH='run'", "EVAL_OUTPUT_DIR='out'"),
    "infer": ("MIXTURE_OR_TASK_NAME='task'", "CHECKPOINT_PATH='run'", "INFER_OUTPUT_DIR='out'"),
    "upcycle": ("INITIAL_CHECKPOINT_PATH='dense'", "OUTPUT_CHECKPOINT_PATH='sparse'"),
}
"""Command -> bindings without which it does not start; a row's own come after them."""


@dataclasses.dataclass(frozen=True)
class BadInput:
    """One bad input.

    Attributes:
      command: the command's name.
      files: gin files.
      bindings: as after `--gin.`, the bad ones last.
      fragment: what the message must hold.
    """

    command: str
    files: tuple[str, ...]
    bindings: tuple[str, ...]
    fragment: str

    @property
    def flags(self) -> list[str]:
        """The command's flags."""
        return [
            *(f"--gin_file={file}" for file in self.files),
            *(f"--gin.{binding}" for binding in self.bindings),
        ]


NO_INT = ("'7'", "7.0", "7.5", "True", "[7]", "{}", "'nan'", "1e999", "@Greedy()")
INT_TOO_SMALL, INT_TOO_LARGE = ("-7",), ("10000000000",)
NO_FLOAT = ("'0.1'", "[0.1]", "True", "'nan'", "1e999", "-1e999", "@Greedy()")
NO_BOOL = ("'False'", "'no'", "0", "1.0", "None", "[]")
NO_TEXT = ("3", "None", "['a']", "{}", "@Greedy()")
NO_PATH = (*NO_TEXT[:2], "''", f"'{'x' * 5000}'", "'a\\0b'")
NO_LENGTHS = (
    "None",
    "512",
    "[512, 128]",
    "{}",
    "{'inputs': 512}",
    "{'inputs': '512', 'targets': 128}",
    "{'inputs': 0, 'targets': 128}",
    "{'inputs': 1000000000, 'targets': 128}",
)
NO_OBJECT = ("'x'", "3", "[]", "True", "@Sampling", "@Sampling()")

COUNTS = {
    "train": (
        "BATCH_SIZE",
        "NUM_EXPERTS",
        "GROUP_SIZE",
        "NUM_SELECTED_EXPERTS",
        "VOCAB_SIZE",
        "T5Config.emb_dim",
        "T5Config.mlp_dim",
        "T5Config.num_heads",
        "T5Config.num_encoder_layers",
        "TRAIN_STEPS",
        "SAVING_PERIOD",
        "WARMUP_STEPS",
        "RANDOM_SEED",
        "NUM_EXPERT_PARTITIONS",
        "NUM_MODEL_PARTITIONS",
        "FIRST_BATCH",
        "SECOND_MOMENT_RESTART_STEP",
    ),
    "infer": ("CHECKPOINT_PERIOD", "NUM_SHARDS", "SHARD_ID"),
}
OPTIONAL_COUNTS = {
    "train": (
        "EVAL_STEPS",
        "EVAL_PERIOD",
        "KEEP_CHECKPOINTS",
        "NUM_MICROBATCHES",
        "EXPERT_MLP_DIM",
        "NUM_ENCODER_SPARSE_LAYERS",
    ),
    "eval": ("NUM_EXAMPLES",),
    "infer": ("NUM_EXAMPLES",),
}
NUMBERS = {
    "train": (
        "LEARNING_RATE",
        "DROPOUT_RATE",
        "TRAIN_EXPERT_CAPACITY_FACTOR",
        "AUX_LOSS_FACTOR",
        "ROUTER_Z_LOSS_FACTOR",
        "JITTER_NOISE",
        "LABEL_SMOOTHING",
        "Z_LOSS",
        "Adafactor.decay_rate",
        "Adafactor.epsilon1",
    ),
}
SWITCHES = {
    "train": (
        "T5Config.logits_via_embedding",
        "SCAN_LAYERS",
        "MoeConfig.t5x_mode",
        "TokensChoose.renormalize",
        "USE_CACHED_TASKS",
        "SHUFFLE_TRAIN_EXAMPLES",
        "Partitioner.fsdp",
        "Adafactor.factored",
        "SaveCheckpointConfig.save_dataset",
    ),
    "upcycle": ("upcycle.materialize",),
}
OPTIONAL_SWITCHES = {"train": ("MoeConfig.ignore_padding_tokens",)}
PATHS = {
    "train": ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH"),
    "eval": ("EVAL_OUTPUT_DIR",),
    "upcycle": ("OUTPUT_CHECKPOINT_PATH",),
}
OBJECTS = {
    "train": (
        "MODEL",
        "RECIPE",
        "T5Config.moe",
        "MoeConfig.encoder_router",
        "MoeConfig.decoder_router",
        "Trainer.optimizer",
        "Trainer.learning_rate_fn",
        "train.partitioner",
        "train.train_dataset_cfg",
        "train.checkpoint_cfg",
    ),
    "infer": ("MODEL", "FEW_SHOT"),
    "upcycle": ("RECIPE", "OPTIMIZER", "Recipe.expert_init", "Recipe.router_init"),
}

FURTHER = (
    ("train", "NUM_EXPERTS=0", "NUM_EXPERTS"),
    ("train", "WARMUP_STEPS=0", "WARMUP_STEPS"),
    ("train", "TRAIN_EXPERT_CAPACITY_FACTOR=1e9", "TRAIN_EXPERT_CAPACITY_FACTOR"),
    ("train", "DROPOUT_RATE=1.0", "DROPOUT_RATE"),
    ("train", "ACTIVATION_DTYPE='float8'", "ACTIVATION_DTYPE"),
    ("train", "REMAT_POLICY='all'", "REMAT_POLICY"),
    ("train", "LEARNING_RATE_FACTORS='const'", "unknown learning-rate factor 'const'"),
    ("train", "MIXTURE_OR_TASK_NAME=''", "mixture_or_task_name"),
    ("train", "T5Config.mlp_activations='gelu'", "write ['gelu']"),
    ("train", "Trainer.learning_rate_fn=@create_learning_rate_scheduler", "write @create"),
    ("train", "RECIPE='@Recipe()'", "write @Recipe() without quotes"),
    ("train", "RECIPE=@Recipe", "write it with parentheses, @Recipe()"),
    ("train", "MoeConfig.decoder_router=@ExpertsChoose()", "cannot be the decoder's router"),
    ("train", "T5Config.scan_layers=false", "--gin.T5Config.scan_layers=False"),
    ("train", "EVAL_PERIOD=none", "--gin.EVAL_PERIOD=None"),
    ("train", "LEARNING_RATE=nan", "finite number"),
    ("train", "MODEL_DIR=/tmp/run", "A string needs quotes"),
    ("train", "BATCH_SIZES=8", "Did you mean BATCH_SIZE"),
    ("infer", "NUM_EXAMPLES=0", "NUM_EXAMPLES"),
    ("eval", "CHECKPOINT_STEPS=-5", "CHECKPOINT_STEPS"),
    ("upcycle", "FUNCTION_CHECK='maybe'", "FUNCTION_CHECK"),
    ("upcycle", "upcycle.max_memory='much'", "no size; write for example 512MiB"),
    ("upcycle", "upcycle.max_memory=0", "no size; write for example 512MiB"),
    ("upcycle", "Recipe.router_init=@CopyExperts()", "Recipe.router_init"),
    ("upcycle", "Recipe.seed=-1", "Recipe.seed"),
    ("upcycle", "Recipe.position_interpolation='nearest'", "position_interpolation"),
    ("train", "MoeConfig.capacity_rounding='up'", "capacity_rounding"),
    ("train", "MoeConfig.capacity_multiple=0", "capacity_multiple"),
    ("train", "ExpertsChoose.noise_std=-1.0", "noise_std"),
    ("train", "MoeConfig.importance_loss_factor=0.005", "importance_loss_factor=0.005"),
    ("train", "MoeConfig.fresh_experts='same'", "fresh_experts"),
)
"""Command, binding, fragment: what the table of kinds does not have."""

VISION_FILES = (
    "models/vit_tiny_upcycled.gin",
    "runs/continue_pretrain_images.gin",
    "runs/parts/vision_optimizer.gin",
    "runs/parts/cool_down.gin",
)
VISION = (
    ("COUNT_BY='router'", "COUNT_BY"),
    ("UPDATE_CLIPPING=0.0", "UPDATE_CLIPPING"),
    ("MOMENTUM_DTYPE='float16'", "MOMENTUM_DTYPE"),
    ("BigVisionAdafactor.momentum=1.0", "BigVisionAdafactor.momentum"),
    ("BigVisionAdafactor.step_offset=1", "every parameter counts its own updates"),
    ("HEAD_WEIGHT_DECAY=-3.0", "HEAD_WEIGHT_DECAY"),
    ("TIMESCALE=0", "TIMESCALE"),
    ("COOLDOWN_STEPS=0", "straight_cooldown lasts cooldown_steps, which is 0"),
    ("COOLDOWN_STEPS=7", "its warm-up takes 1 and its cool-down 7"),
    ("OPTIMIZER=@Sgd", "write it with parentheses, @Sgd()"),
)
"""Binding and fragment: of runs of vision transformers, which end at step 2."""


def _row(command: str, binding: str, fragment: str) -> BadInput:
    return BadInput(command, FILES[command], (*REQUIRED[command], binding), fragment)


def rows() -> Iterator[BadInput]:
    """All of them."""
    kinds = (
        (COUNTS, (*NO_INT, "None", *INT_TOO_SMALL, *INT_TOO_LARGE)),
        (OPTIONAL_COUNTS, (*NO_INT, *INT_TOO_SMALL, *INT_TOO_LARGE)),
        (NUMBERS, (*NO_FLOAT, "None", "-1.0")),
        (SWITCHES, NO_BOOL),
        (OPTIONAL_SWITCHES, tuple(value for value in NO_BOOL if value != "None")),
        (PATHS, NO_PATH),
        (OBJECTS, NO_OBJECT),
        (
            {"train": ("TASK_FEATURE_LENGTHS",), "infer": ("TASK_FEATURE_LENGTHS",)},
            NO_LENGTHS,
        ),
    )
    for settings, values in kinds:
        for command, names in settings.items():
            for name in names:
                for value in values:
                    yield _row(command, f"{name}={value}", name)
    for command, binding, fragment in FURTHER:
        yield _row(command, binding, fragment)
    given = ("MODEL_DIR='run'", "TRAIN_STEPS=2", "INITIAL_CHECKPOINT_PATH='dense'")
    short = ("WARMUP_STEPS=1", "COOLDOWN_STEPS=1")
    for binding, fragment in VISION:
        yield BadInput("train", VISION_FILES, (*given, *short, binding), fragment)
