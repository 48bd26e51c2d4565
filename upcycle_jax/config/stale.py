"""T5X and Flaxformer gin lines that mean something else here, and their new form."""

import re

_PACKAGES = ("t5x", "flaxformer", "__main__", "__gin__")

_FILES = (
    (r".*t5_1_1/(examples/)?(tiny|small|base|large|xl|xxl)\.gin", r"models/t5_1_1_\2.gin"),
    (r".*moe/.*(tiny|small|base|large|xl|xxl)\.gin", r"models/t5_1_1_\1_upcycled.gin"),
    (r".*runs/(pretrain|finetune|eval|infer)\.gin", r"runs/\1.gin"),
    (r".*runs/(continue_pretrain)\.gin", r"runs/\1.gin"),
    (r".*sparse_upcycle\.gin", r"runs/upcycle.gin"),
)

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
    if not re.match(r"(.*/)?(t5x|flaxformer)/", name):
        return None
    for pattern, replacement in _FILES:
        match = re.fullmatch(pattern, name)
        if match:
            return f"{name!r} is T5X's file; here it is {match.expand(replacement)!r}"
    return f"{name!r} is T5X's file and has no counterpart by that name"


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
