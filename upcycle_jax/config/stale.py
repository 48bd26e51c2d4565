"""T5X and Flaxformer gin lines that mean something else here, and their new form."""

import re

_PACKAGES = ("t5x", "flaxformer", "__main__", "__gin__")

_SIZES = "tiny|small|base|large|xl|xxl"

_FILES = (
    (
        rf".*experts_choose_({_SIZES})\.gin",
        r"models/t5_1_1_\1_upcycled.gin', with the paper's 32 experts and capacity factor 2 (its"
        r" own: --gin.NUM_EXPERTS=64 --gin.TRAIN_EXPERT_CAPACITY_FACTOR=1.0"
        r" --gin.EVAL_EXPERT_CAPACITY_FACTOR=1.0; small 32 experts, tiny 8)",
    ),
    (rf".*(tokens_choose_({_SIZES})|st_moe_(base|xl|32b))\.gin", r"models/\1.gin'"),
    (
        r".*switch_classic_(base|large|xxl|c)\.gin",
        r"models/switch_\1.gin' (set NUM_EXPERTS, which that file leaves open)",
    ),
    (rf".*(switch_({_SIZES}|c))\.gin", r"models/\1.gin'"),
    (rf".*t5_1_1(/|/examples/|_)({_SIZES})\.gin", r"models/t5_1_1_\2.gin'"),
    (r".*runs/(pretrain|finetune|eval|infer|continue_pretrain)\.gin", r"runs/\1.gin'"),
    (r".*sparse_upcycle\.gin", r"runs/upcycle.gin'"),
)
"""T5X's and Flaxformer's files -> the shipped one, with the quote that closes its name and what is
to be said of it.
"""

_TREES = re.compile(r"(.*/)?(t5x/(configs|examples|contrib)|flaxformer/t5x/configs)/")
_T5X_LINES = re.compile(
    r"""^\s*((from|import)\s+(__gin__|__main__|t5x|flaxformer)\b"""
    r"""|include\s+['"](t5x|flaxformer)/)""",
    re.MULTILINE,
)

_MACROS = {
    "MODEL_PARALLEL_SUBMESH": (
        "set NUM_MODEL_PARTITIONS, and NUM_EXPERT_PARTITIONS for experts: where the parts of a"
        " model lie follows from the devices"
    ),
    "NUM_EMBEDDINGS": "it is VOCAB_SIZE",
    "EMBED_DIM": "it is T5Config.emb_dim",
    "MLP_DIM": "it is T5Config.mlp_dim",
    "HEAD_DIM": "it is T5Config.head_dim",
    "NUM_HEADS": "it is T5Config.num_heads",
    "NUM_ENCODER_LAYERS": "it is T5Config.num_encoder_layers",
    "NUM_DECODER_LAYERS": "it is T5Config.num_decoder_layers",
    "MOE_TRUNCATED_DTYPE": "experts compute in ACTIVATION_DTYPE, routers in float32",
    "ACTIVATION_PARTITIONING_DIMS": "remove it: activations are laid out by Partitioner.rules",
    "USE_HARDWARE_RNG": "remove it: random numbers depend on RANDOM_SEED alone",
}
"""T5X's macros that no file here has -> what to write."""

_RENAMED = {
    "PjitPartitioner": "Partitioner",
    "MoePjitPartitioner": "Partitioner",
    "MoeTrainer": "Trainer",
    "T5Config": "T5Config",
    "MoeEncoderDecoderModel": "EncoderDecoderModel",
    "ExpertsChooseMaskedRouter": "ExpertsChoose",
    "TokensChooseMaskedRouter": "TokensChoose",
    "TokensChooseScatterRouter": "TokensChoose",
    "MoeLayer": "MoeConfig",
    "UpcycleCheckpointer": "Recipe",
}
"""Name there -> name here, where they differ."""

REMOVE = "remove it"
"""How advice begins that leaves nothing of a line."""

_PARAMETERS = {
    (
        "Partitioner",
        "num_partitions",
    ): "it is Partitioner.num_model_partitions, macro NUM_MODEL_PARTITIONS",
    (
        "Partitioner",
        "logical_axis_rules",
    ): "the rule table is upcycle_jax.partitioning.STANDARD_RULES; override Partitioner.rules",
    (
        "Partitioner",
        "model_parallel_submesh",
    ): "give Partitioner.num_model_partitions; the mesh follows from the devices",
    (
        "train",
        "train_state_initializer_cls",
    ): "to upcycle while restoring, bind RestoreCheckpointConfig.recipe = @Recipe()",
    (
        "DatasetConfig",
        "task",
    ): "it is DatasetConfig.mixture_or_task_name, macro MIXTURE_OR_TASK_NAME",
    ("DatasetConfig", "use_custom_packing_ops"): "remove it; DatasetConfig.pack packs",
    ("SaveCheckpointConfig", "dtype"): "remove it: parameters are saved in float32",
    ("train", "use_gda"): "remove it: arrays are always global",
    ("train", "use_orbax"): "remove it: checkpoints are always written with Orbax in T5X's layout",
    ("train", "inference_evaluator_cls"): "remove it: there is one evaluator",
    ("train", "summarize_config_fn"): "remove it: config.gin and the manifest are always written",
    ("EncoderDecoderModel", "module"): "bind EncoderDecoderModel.config = @T5Config()",
    ("EncoderDecoderModel", "optimizer_def"): "bind Trainer.optimizer = @Adafactor()",
    ("EncoderDecoderModel", "input_vocabulary"): "remove it: the vocabulary comes with the task",
    ("EncoderDecoderModel", "output_vocabulary"): "remove it: the vocabulary comes with the task",
    (
        "RestoreCheckpointConfig",
        "checkpointer_cls",
    ): "remove it; to upcycle while restoring, bind RestoreCheckpointConfig.recipe = @Recipe()",
    ("MoeConfig", "max_group_size"): "it is MoeConfig.group_size, macro GROUP_SIZE",
    ("Trainer", "num_expert_partitions"): (
        "remove it: experts are divided by Partitioner.num_expert_partitions, macro"
        " NUM_EXPERT_PARTITIONS. To multiply their gradients as MoeTrainer does, set"
        " Adafactor.expert_gradient_scale (docs/t5x.md)"
    ),
    ("Trainer", "num_experts"): "remove it: it is MoeConfig.num_experts, macro NUM_EXPERTS",
    ("RestoreCheckpointConfig", "assignment_map"): (
        "remove it: parameters have T5X's names, and what becomes of a dense checkpoint's MLPs a"
        " recipe says, RestoreCheckpointConfig.recipe = @Recipe()"
    ),
    ("RestoreCheckpointConfig", "fallback_to_scratch"): (
        "remove it: a run goes on from its own checkpoints in MODEL_DIR where there are any; a"
        " checkpoint that is named and not there stops it. To start from scratch use"
        " runs/pretrain.gin, which restores nothing"
    ),
    ("RestoreCheckpointConfig", "strict"): (
        "remove it: trees must be equal, or a recipe says what differs"
    ),
    ("train", "infer_eval_dataset_cfg"): (
        "remove it: training evaluates with teacher forcing (train_eval_dataset_cfg); the tasks'"
        " own metrics over predictions are what `python -m upcycle_jax.eval` computes, with"
        " runs/eval.gin"
    ),
    ("train", "trainer_cls"): "bind train.trainer = @Trainer()",
}
"""(name here, parameter there) -> what to write. Consulted only for parameters that do not exist
here.
"""


def explain_import(module: str) -> str | None:
    """What to do about an import line of a T5X gin file; None where the import is an ordinary
    one.
    """
    if module == "__gin__.dynamic_registration":
        return (
            "remove this line: every object is known by its own name, and your own modules by an"
            " `import` line"
        )
    package = module.partition(".")[0]
    if package in _PACKAGES or module in ("seqio", "gin"):
        return (
            "a T5X line: remove it, and the module prefix of the names below it; objects are known"
            " by name (see runs/pretrain.gin)"
        )
    return None


def explain_file(name: str) -> str | None:
    """The shipped file that stands for a T5X or Flaxformer one; None where there is none."""
    if not re.match(r"(t5x|flaxformer)/", name) and not _TREES.match(name):
        return None  # A file of one's own may lie below a folder of that name.
    for pattern, replacement in _FILES:
        match = re.fullmatch(pattern, name)
        if match:
            return f"{name!r} is T5X's file; here it is '{match.expand(replacement)}"
    return f"{name!r} is T5X's file and has no counterpart by that name"


def explain_found_file(path: str, text: str) -> str | None:
    """As `explain_file`, of a gin file that was found: None unless it lies in T5X's or Flaxformer's
    tree and is written for them.

    Args:
      path: where it was found.
      text: what it says.
    """
    if not _TREES.match(path) or not _T5X_LINES.search(text):
        return None
    return f"{explain_file(path)}. Leave T5X's folders out of --gin_search_paths"


def explain_macro(name: str) -> str | None:
    """What to write for a macro of T5X's files that no file here has; None for others."""
    return _MACROS.get(name)


def current_name(name: str, known: frozenset[str]) -> str | None:
    """The name here of an object with a T5X name (`utils.DatasetConfig`, `MoeTrainer`), or None."""
    last = name.rpartition(".")[2]
    candidate = _RENAMED.get(last, last)
    return candidate if candidate in known and candidate != name else None


def explain_parameter(name: str, parameter: str) -> str | None:
    """What to write for a T5X parameter that does not exist here; None where nothing is known about
    it.
    """
    return _PARAMETERS.get((name, parameter))
