import pytest

from upcycle_jax.config import ConfigError, load, registry


@pytest.fixture
def real_names(objects, monkeypatch):
    """The stand-in objects, under names that T5X files use."""
    paths = {
        "EncoderDecoderModel": "Model",
        "DatasetConfig": "Data",
        "Partitioner": "Net",
        "train": "run",
        "Trainer": "strict",
    }
    monkeypatch.setattr(registry, "PATHS", paths)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (
            "from __gin__ import dynamic_registration",
            "remove this line: every object is known by its own name",
        ),
        (
            "from t5x import utils",
            "a T5X line: remove it, and the module prefix of the names below it",
        ),
        ("import t5x.models", "a T5X line: remove it"),
        ("from __main__ import train as train_script", "a T5X line: remove it"),
        ("import seqio", "a T5X line: remove it"),
        (
            "utils.DatasetConfig.batch = 4",
            "'utils.DatasetConfig' is a T5X name; write 'DatasetConfig'",
        ),
        (
            "train/utils.DatasetConfig.batch = 4",
            (
                "train/utils.DatasetConfig.batch: 'utils.DatasetConfig' is a T5X name; write"
                " 'DatasetConfig'"
            ),
        ),
        (
            "MODEL = @models.EncoderDecoderModel()",
            r"'models.EncoderDecoderModel' is a T5X name; write 'EncoderDecoderModel'",
        ),
        ("partitioning.PjitPartitioner.num_partitions = 2", "write 'Partitioner'"),
        ("moe_trainer.MoeTrainer.value = 2", "write 'Trainer'"),
        ("train_script.train.steps = 2", "write 'train'"),
        (
            "Partitioner.num_partitions = 2",
            "it is Partitioner.num_model_partitions, macro NUM_MODEL_PARTITIONS",
        ),
        ("EncoderDecoderModel.optimizer_def = 2", r"bind Trainer.optimizer = @Adafactor\(\)"),
        (
            "include 't5x/examples/t5/t5_1_1/base.gin'",
            "is T5X's file; here it is 'models/t5_1_1_base.gin'",
        ),
        (
            "include 't5x/configs/runs/pretrain.gin'",
            "is T5X's file; here it is 'runs/pretrain.gin'",
        ),
        (
            "include 't5x/contrib/moe/configs/runs/sparse_upcycle.gin'",
            "here it is 'runs/upcycle.gin'",
        ),
        ("include 'flaxformer/t5x/configs/other.gin'", "has no counterpart by that name"),
    ],
)
def test_t5x_lines_are_explained_with_their_new_form(real_names, write, line, advice):
    with pytest.raises(ConfigError, match=f"old.gin:1: .*{advice}"):
        load([write("old.gin", line)])


def test_a_t5x_file_on_the_command_line_is_explained(real_names):
    with pytest.raises(
        FileNotFoundError,
        match="'t5x/examples/t5/t5_1_1/xl.gin' is T5X's file; here it is 'models/t5_1_1_xl.gin'",
    ):
        load(["t5x/examples/t5/t5_1_1/xl.gin"])
