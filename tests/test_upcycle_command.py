"""The commands `upcycle` and `verify`, from flags to exit status."""

import hashlib
import json

import jax
import numpy as np
import pytest

from upcycle_jax import config, trees, upcycle, verify
from upcycle_jax.checkpoints import CheckpointManager, create_checkpoint, open_checkpoint
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.surgery import function_check
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.train_state import state_specs

TINY = (
    "VOCAB_SIZE=64",
    "T5Config.emb_dim=16",
    "T5Config.mlp_dim=32",
    "T5Config.num_heads=2",
    "T5Config.head_dim=8",
    "T5Config.num_decoder_layers=1",
)
SPARSE = "DECODER_SPARSE_LAYOUT=(0,)"
MODEL_FILE = "models/t5_1_1_tiny_upcycled.gin"


def write_dense(folder, step=7, bindings=TINY, seed=0):
    model = config.load(["models/t5_1_1_tiny.gin"], bindings).macro("MODEL")
    specs = state_specs(model, Adafactor())
    rng = np.random.default_rng(seed)
    writer = create_checkpoint(folder, specs, step=step, metadata={})
    for name, spec in specs.items():
        if name != "state/step":
            writer.write(
                name,
                None,
                (rng.normal(size=spec.shape) * (0.1 if spec.shape != (1,) else 0)).astype(
                    spec.dtype
                ),
            )
    writer.finalize()
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """What nobody changes, one for all tests."""
    return write_dense(tmp_path_factory.mktemp("source") / "dense" / "checkpoint_7")


def words(dense, output, *more, model=MODEL_FILE):
    files = [f"--gin_file={model}"] if model else []
    bindings = [f"--gin.{line}" for line in TINY] if model else []
    bindings += [f"--gin.{SPARSE}"] if model == MODEL_FILE else []
    paths = [f"--gin.INITIAL_CHECKPOINT_PATH='{dense}'", f"--gin.OUTPUT_CHECKPOINT_PATH='{output}'"]
    return [*files, "--gin_file=runs/upcycle.gin", *bindings, *paths, *more]


OFF = "--gin.FUNCTION_CHECK='off'"


def digest(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_plan_before_proof_after_and_both_on_disk(dense, tmp_path, capsys):
    before = digest(dense)
    assert upcycle.main(words(dense.parent, tmp_path / "sparse")) == 0
    shown = capsys.readouterr().out
    assert shown.index("tile x4") < shown.index("proof: PASSED")
    assert "function check: PASSED; predicted: scaled by the gate sum" in shown
    assert digest(dense) == before
    proof = json.loads((tmp_path / "sparse" / "proof.json").read_text())
    assert proof["ok"] and proof["function"]["ok"]
    assert proof["function"]["tokens"] == "random: 2 x 32 inputs, 2 x 32 targets"
    plan = json.loads((tmp_path / "sparse" / "plan.json").read_text())
    assert len(plan["rows"]) == len(proof["leaves"])
    written = open_checkpoint(tmp_path / "sparse")
    assert written.step == 7
    record = written.metadata()["surgery"]
    assert (
        record["recipe"]["type"] == "Recipe"
        and record["source_step"] == 7
        and record["versions"]["jax"]
    )

    assert verify.main(words(dense, tmp_path / "sparse", OFF)) == 0
    assert "proof: PASSED" in capsys.readouterr().out


def verified_alone(path, capsys):
    """What `verify PATH` says, which must be that the proof holds."""
    capsys.readouterr()
    assert verify.main([str(path), "--gin.verify.function_check='off'"]) == 0
    return capsys.readouterr().out


def test_the_function_check_on_real_text(tmp_path, capsys):
    """The first batch of the validation split of one's own text, by gin alone; bytes and sentinels
    are 359 ids.
    """
    shallow = "T5Config.num_encoder_layers=1"
    bindings = [*(line.replace("VOCAB_SIZE=64", "VOCAB_SIZE=384") for line in TINY), shallow]
    dense = write_dense(tmp_path / "dense" / "checkpoint_7", bindings=bindings)
    text = tmp_path / "text.txt"
    text.write_text(
        " ".join(f"The {n}th sentence speaks of {n * n}, the square of {n}." for n in range(400))
    )
    real = [
        "--gin.FUNCTION_CHECK_DATASET=@function_check/DatasetConfig()",
        f"--gin.TEXT_FILES=['{text}']",
        "--gin.MIXTURE_OR_TASK_NAME='sentences_on_squares'",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 24}",
        "--gin.BATCH_SIZE=4",
        f"--gin.{shallow}",
        "--gin.ENCODER_SPARSE_LAYOUT=(0,)",
    ]
    assert upcycle.main(words(dense, tmp_path / "refused", *real)) == 2
    refused = capsys.readouterr().err
    assert "does not fit the target model" in refused or "the model's vocab_size is 64" in refused
    assert not (tmp_path / "refused").exists()

    assert upcycle.main(words(dense, tmp_path / "sparse", *real, "--gin.VOCAB_SIZE=384")) == 0
    described = (
        "first batch of sentences_on_squares, split validation: 4 x 64 inputs, 4 x 24 targets"
    )
    assert described in capsys.readouterr().out
    function = json.loads((tmp_path / "sparse" / "proof.json").read_text())["function"]
    assert function["ok"] and function["tokens"] == described
    assert verify.main(words(dense, tmp_path / "sparse", *real, "--gin.VOCAB_SIZE=384")) == 0
    assert described in capsys.readouterr().out


def test_a_hugging_face_source_gives_the_same_parameters(dense, tmp_path, capsys):
    write_huggingface(open_checkpoint(dense), tmp_path / "hf")
    assert upcycle.main(words(tmp_path / "hf", tmp_path / "refused", OFF)) == 2
    assert "Recipe.step = 'reset' or a number" in capsys.readouterr().err
    assert upcycle.main(words(tmp_path / "hf", tmp_path / "one", OFF, "--gin.Recipe.step=7")) == 0
    assert upcycle.main(words(dense, tmp_path / "other", OFF)) == 0
    one, other = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "other")
    assert one.specs() == other.specs()
    for name in one.specs():
        assert one.read(name).tobytes() == other.read(name).tobytes(), name
    assert verified_alone(tmp_path / "one", capsys)
    (tmp_path / "hf").rename(tmp_path / "gone")
    assert "source: gone" in verified_alone(tmp_path / "one", capsys)


def test_orbax_itself_restores_the_result_with_the_proof_beside_it(dense, tmp_path):
    assert upcycle.main(words(dense, tmp_path / "run" / "checkpoint_7", OFF)) == 0
    written, manager = open_checkpoint(tmp_path / "run"), CheckpointManager(tmp_path / "run")
    specs = written.specs()
    restored = trees.flatten(
        manager.restore(
            7, specs, dict.fromkeys(specs, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        )
    )
    manager.close()
    assert restored.keys() == specs.keys()
    for name, leaf in restored.items():
        assert np.asarray(leaf).tobytes() == written.read(name).tobytes(), name


def test_killed_between_writing_and_proving(dense, tmp_path, capsys):
    assert upcycle.main(words(dense, tmp_path / "sparse", OFF)) == 0
    (tmp_path / "sparse" / "proof.json").unlink()
    assert (
        upcycle.main(words(dense, tmp_path / "sparse", OFF, "--gin.Recipe.seed=1")) == 2
    )  # Another conversion's result stays.
    assert upcycle.main(words(dense, tmp_path / "sparse", OFF)) == 0
    assert "only the proof is missing" in capsys.readouterr().out
    assert (tmp_path / "sparse" / "proof.json").exists()
    assert upcycle.main(words(dense, tmp_path / "sparse", OFF)) == 2


def test_verify_fails_for_another_source(dense, tmp_path, capsys):
    assert upcycle.main(words(dense, tmp_path / "sparse", OFF)) == 0
    other = write_dense(tmp_path / "other", step=8)
    capsys.readouterr()
    assert verify.main(words(other, tmp_path / "sparse", OFF)) == 1
    shown = capsys.readouterr().out
    assert "! state/step (copy)" in shown
    assert "another source" in shown


def test_verify_takes_the_recorded_recipe_and_not_the_configured_one(dense, tmp_path):
    recipe = ["--gin_file=recipes/drop_upcycling.gin", OFF]
    assert upcycle.main(words(dense, tmp_path / "sparse", *recipe)) == 0
    assert verify.main(words(dense, tmp_path / "sparse", OFF)) == 0


def test_dry_run_prints_the_plan_and_writes_nothing(dense, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert upcycle.main(words(dense, tmp_path / "sparse", "--dry_run")) == 0
    shown = capsys.readouterr().out
    assert "tile x4" in shown and "dry run: nothing was written" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_model_file_the_target_is_the_sources_shape_with_the_papers_experts(
    dense, tmp_path
):
    assert (
        upcycle.main(
            words(
                dense,
                tmp_path / "sparse",
                OFF,
                "--materialize",
                "--max_memory=64000000",
                model=None,
            )
        )
        == 0
    )
    specs = open_checkpoint(tmp_path / "sparse").specs()
    assert specs["target/encoder/layers_1/mlp/expert/wi_0/kernel"].shape == (32, 16, 32)
    assert "target/encoder/layers_0/mlp/wi_0/kernel" in specs


@pytest.mark.parametrize(
    "name",
    [
        "paper_language",
        "paper_vision_state",
        "noisy_copies",
        "random_experts",
        "drop_upcycling",
        "qwen",
    ],
)
def test_shipped_recipes_plan(name, dense, tmp_path, capsys):
    assert (
        upcycle.main(
            words(dense, tmp_path / "sparse", f"--gin_file=recipes/{name}.gin", "--dry_run")
        )
        == 0
    )
    assert "leaves," in capsys.readouterr().out


def test_virtual_groups_recipe(dense, tmp_path):
    settings = [
        "--gin.NUM_EXPERTS=8",
        "--gin.EXPERT_MLP_DIM=8",
        "--gin.GRANULARITY=4",
        "--gin.TOP_K=4",
        OFF,
    ]
    assert (
        upcycle.main(
            words(dense, tmp_path / "sparse", "--gin_file=recipes/virtual_groups.gin", *settings)
        )
        == 0
    )
    router = open_checkpoint(tmp_path / "sparse").read(
        "target/encoder/layers_1/mlp/router/router_weights/w/kernel"
    )
    np.testing.assert_array_equal(router[:, :4], np.repeat(router[:, :1], 4, axis=1))


def test_parents_and_the_way_back(dense, tmp_path, capsys):
    other = write_dense(tmp_path / "other")
    paths = f"--gin.INITIAL_CHECKPOINT_PATH=('{dense}', '{other}')"
    mix = ["--gin_file=recipes/branch_train_mix.gin", "--gin.PARENTS=(0, 1, 0, 1)", paths, OFF]
    assert upcycle.main(words(dense, tmp_path / "mixed", *mix)) == 0
    merge = ["--gin_file=recipes/merge_mean.gin", OFF]
    assert (
        upcycle.main(
            words(tmp_path / "mixed", tmp_path / "merged", *merge, model="models/t5_1_1_tiny.gin")
        )
        == 0
    )
    name = "target/encoder/layers_1/mlp/wo/kernel"
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path / "merged").read(name), open_checkpoint(dense).read(name)
    )
    for result in ("mixed", "merged"):
        assert "source: as it was" in verified_alone(tmp_path / result, capsys)
    other.rename(tmp_path / "gone")
    assert "source: gone" in verified_alone(tmp_path / "mixed", capsys)


def test_nexus_recipe_shared_expert_from_the_first_parent(dense, tmp_path):
    other = write_dense(tmp_path / "other", seed=1)
    paths = f"--gin.INITIAL_CHECKPOINT_PATH=('{dense}', '{other}')"
    nexus = [
        "--gin_file=recipes/nexus.gin",
        "--gin.PARENTS=(1, 1, 0, 1)",
        "--gin.SHARED_EXPERT_MLP_DIM=8",
        paths,
        OFF,
    ]
    assert upcycle.main(words(dense, tmp_path / "sparse", *nexus)) == 0
    sparse, first, second = (open_checkpoint(path) for path in (tmp_path / "sparse", dense, other))
    name = "target/encoder/layers_1/mlp/{}wo/kernel"
    np.testing.assert_array_equal(
        sparse.read(name.format("shared_expert/")), first.read(name.format(""))[:8]
    )
    np.testing.assert_array_equal(
        sparse.read(name.format("expert/"))[0], second.read(name.format(""))
    )


def test_weighted_merge_measures_its_weights_with_the_sparse_model(dense, tmp_path, capsys):
    """Against NumPy: the mean of the experts by the router's mean probabilities on the tokens that
    the command documents.
    """
    parted = [
        "--gin_file=recipes/noisy_copies.gin",
        "--gin.Recipe.router_init=@NormalRouter()",
        "--gin.NormalRouter.std=2.0",
        OFF,
    ]
    assert upcycle.main(words(dense, tmp_path / "sparse", *parted)) == 0
    assert (
        upcycle.main(
            words(tmp_path / "sparse", tmp_path / "merged", "--gin_file=recipes/merge_weighted.gin")
        )
        == 0
    )
    assert "weighted mean of experts" in capsys.readouterr().out
    merged, sparse = open_checkpoint(tmp_path / "merged"), open_checkpoint(tmp_path / "sparse")
    model = config.load([MODEL_FILE], [*TINY, SPARSE]).macro("MODEL")
    tokens = EncoderDecoderFeatures().random(64)
    weights = function_check.router_weights(model, sparse, tokens)
    assert max(weights["encoder/layers_1"]) > 0.26  # Not the plain mean.
    recorded = merged.metadata()["surgery"]["recipe"]
    assert recorded["how"] == "weighted" and recorded["weights"].keys() == weights.keys()
    for layer, shares in weights.items():
        np.testing.assert_allclose(recorded["weights"][layer], shares, rtol=1e-6)
        for name in ("wi_0", "wi_1", "wo"):
            experts = sparse.read(f"target/{layer}/mlp/expert/{name}/kernel").astype(np.float64)
            expected = sum(share * expert for share, expert in zip(shares, experts, strict=True))
            np.testing.assert_allclose(
                merged.read(f"target/{layer}/mlp/{name}/kernel"), expected, rtol=1e-5, atol=1e-7
            )
    assert "target/encoder/layers_1/mlp/router/router_weights/w/kernel" not in merged.specs()

    assert (
        verify.main(
            words(tmp_path / "sparse", tmp_path / "merged", "--gin_file=recipes/merge_weighted.gin")
        )
        == 0
    )
    capsys.readouterr()
    lacking = ["--gin_file=recipes/merge_weighted.gin", "--gin.SOURCE_MODEL=None"]
    assert upcycle.main(words(tmp_path / "sparse", tmp_path / "again", *lacking)) == 2
    assert "needs weights, or upcycle.source_model" in capsys.readouterr().err


def test_depth_tiling_recipe(dense, tmp_path):
    deeper = [
        "--gin_file=recipes/depth_tiling.gin",
        "--gin.T5Config.num_encoder_layers=4",
        "--gin.T5Config.num_decoder_layers=3",
        OFF,
    ]
    assert (
        upcycle.main(words(dense, tmp_path / "deep", *deeper, model="models/t5_1_1_tiny.gin")) == 0
    )
    deep, shallow = open_checkpoint(tmp_path / "deep"), open_checkpoint(dense)
    for layer, origin in ((0, 0), (1, 0), (2, 1), (3, 1)):
        np.testing.assert_array_equal(
            deep.read(f"target/encoder/layers_{layer}/attention/out/kernel"),
            shallow.read(f"target/encoder/layers_{origin}/attention/out/kernel"),
        )


def test_errors_name_the_value_and_the_remedy(dense, tmp_path, capsys):
    def refused(*arguments, **options):
        assert upcycle.main(words(*arguments, **options)) == 2
        return capsys.readouterr().err

    assert "nowhere" in refused(tmp_path / "nowhere", tmp_path / "sparse")
    assert "does not fit the target model" in refused(
        dense, tmp_path / "sparse", "--gin.T5Config.emb_dim=24"
    )
    (tmp_path / "taken").mkdir()
    assert "taken exists already" in refused(dense, tmp_path / "taken")
    assert "named for step 9, but the step to record is 7" in refused(
        dense, tmp_path / "checkpoint_9"
    )
    assert "must be 'auto', 'on' or 'off'" in refused(
        dense, tmp_path / "sparse", "--gin.FUNCTION_CHECK='maybe'"
    )
    assert upcycle.main(words(dense, tmp_path / "sparse", OFF)) == 0
    capsys.readouterr()
    assert "upcycling happens once" in refused(tmp_path / "sparse", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert upcycle.main(["--gin_file=runs/upcycle.gin"]) == 2
    message = capsys.readouterr().err
    assert "INITIAL_CHECKPOINT_PATH" in message and "OUTPUT_CHECKPOINT_PATH" in message
