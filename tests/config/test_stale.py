import pytest

from upcycle_jax.config import ConfigError, load, registry, search, stale


@pytest.fixture
def real_names(objects, monkeypatch):
    """The stand-in objects, under names that T5X files use."""
    paths = {
        "EncoderDecoderModel": "Model",
        "DatasetConfig": "Data",
        "Partitioner": "Net",
        "train": "run",
        "Trainer": "strict",
        "RestoreCheckpointConfig": "Net",
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
        (
            "include 'flaxformer/t5x/configs/moe/models/experts_choose_xl.gin'",
            "'models/t5_1_1_xl_upcycled.gin', with the paper's 32 experts .*NUM_EXPERTS=64",
        ),
        (
            "include 'flaxformer/t5x/configs/moe/models/switch_classic_xxl.gin'",
            "here it is 'models/switch_xxl.gin' .set NUM_EXPERTS",
        ),
        (
            "moe_trainer.MoeTrainer.num_expert_partitions = 8",
            (
                "moe_trainer.MoeTrainer.num_expert_partitions: remove it: experts are divided by .*"
                " Adafactor.expert_gradient_scale"
            ),
        ),
        ("utils.RestoreCheckpointConfig.assignment_map = ()", "RestoreCheckpointConfig.recipe ="),
        ("RestoreCheckpointConfig.fallback_to_scratch = True", "To start from scratch use"),
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
    # Each of several.
    files = ["t5x/examples/t5/t5_1_1/xl.gin", "t5x/configs/runs/eval.gin"]
    with pytest.raises(FileNotFoundError, match="'models/t5_1_1_xl.gin'; .*'runs/eval.gin'"):
        load(files)


def test_what_an_absent_file_of_t5x_would_give_is_not_missed(real_names, write):
    own = write("own.gin", "include 't5x/configs/runs/eval.gin'\nDEPTH = %UNKNOWN\nimport t5x")
    with pytest.raises(ConfigError) as caught:
        load([own], ["OTHER=1"])
    first, second = caught.value.problems
    assert "here it is 'runs/eval.gin'" in first and "a T5X line: remove it" in second


@pytest.mark.parametrize(
    ("name", "count"), [("tokens_choose", 6), ("switch", 7), ("st_moe", 3), ("t5_1_1", 6)]
)
def test_flaxformers_models_have_a_file_of_their_own(name, count):
    """Each shipped file of the kind is named for Flaxformer's file of that name."""
    files = [file for file in search.shipped_files() if file.startswith(f"models/{name}")]
    files = [file for file in files if not file.endswith("_upcycled.gin")]
    assert len(files) == count
    for file in files:
        advice = stale.explain_file(f"/home/me/flaxformer/t5x/configs/moe/{file}")
        assert advice is not None and advice.endswith(f"here it is '{file}'")


@pytest.fixture
def t5x_tree(write):
    """A little of T5X's tree, as it lies on a search path."""
    write("repository/t5x/configs/runs/finetune.gin", "from __gin__ import dynamic_registration")
    write("repository/t5x/examples/t5/t5_1_1/base.gin", "import t5x.models\nEMBED_DIM = 768")
    write(
        "repository/flaxformer/t5x/configs/moe/models/tokens_choose_tiny.gin",
        "include 'flaxformer/t5x/configs/moe/models/tokens_choose_base.gin'\nNUM_EXPERTS = 8",
    )


def test_where_t5x_s_tree_is_found_its_files_are_named_and_nothing_that_follows(
    real_names, t5x_tree
):
    files = ["t5x/examples/t5/t5_1_1/base.gin", "t5x/configs/runs/finetune.gin"]
    flags = ["MIXTURE_OR_TASK_NAME='x'", "MODEL_PARALLEL_SUBMESH=(1, 1)"]
    with pytest.raises(ConfigError) as caught:
        load(files, flags, ["repository"])
    assert len(caught.value.problems) == 2
    for problem, ours in zip(
        caught.value.problems, ("models/t5_1_1_base.gin", "runs/finetune.gin"), strict=True
    ):
        assert f"is T5X's file; here it is '{ours}'" in problem
        assert "out of --gin_search_paths" in problem


def test_a_search_path_into_t5x_s_tree_does_not_hide_our_files(real_names, t5x_tree):
    with pytest.raises(ConfigError, match="finetune.gin' is T5X's file; .* 'runs/finetune.gin'"):
        load(["runs/finetune.gin"], [], ["repository/t5x/configs"])


def test_an_included_file_of_t5x_names_the_file_that_includes_it(real_names, t5x_tree, write):
    name = "flaxformer/t5x/configs/moe/models/tokens_choose_tiny.gin"
    own = write("own.gin", f"include '{name}'\nUNKNOWN = %NOWHERE")
    with pytest.raises(ConfigError, match="own.gin: .* here it is 'models/tokens_choose_tiny.gin'"):
        load([own], [], ["repository"])


def test_a_file_of_ones_own_in_a_folder_named_t5x_is_read(real_names, write):
    assert stale.explain_file("/home/me/t5x/own.gin") is None
    assert load([write("t5x/configs/own.gin", "DEPTH = 3")]).macro("DEPTH") == 3


@pytest.mark.parametrize(
    ("macro", "advice"),
    [("MODEL_PARALLEL_SUBMESH", "set NUM_MODEL_PARTITIONS"), ("NUM_EMBEDDINGS", "VOCAB_SIZE")],
)
def test_macros_of_t5x_are_explained(real_names, macro, advice):
    with pytest.raises(ConfigError, match=f"{macro} is a macro of T5X's files: .*{advice}"):
        load([], [f"{macro}=1"])


def test_parameters_of_train_are_explained():
    with pytest.raises(ConfigError, match="infer_eval_dataset_cfg: .*`python -m upcycle_jax.eval`"):
        load([], ["train.infer_eval_dataset_cfg=None"])
