"""The recipe files of language models as a command uses them: a dense checkpoint, no model file."""

import numpy as np
import pytest

from tests.checkpoints.random_decoders import BASE, Held
from upcycle_jax.checkpoints import create_checkpoint, model_settings, open_checkpoint
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
from upcycle_jax.config import load
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.state_tree import parameter_specs
from upcycle_jax.surgery.operations import (
    CopiesOfExperts,
    HiddenUnits,
    LastUnits,
    Tile,
    TileFirstUnits,
)
from upcycle_jax.surgery.verdict import Verdict

CONFIG = DecoderConfig(
    vocab_size=64, emb_dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=32, num_kv_heads=1
)
HALVES = ["EXPERT_MLP_DIM=16", "SHARED_EXPERT_MLP_DIM=16"]
GRANULAR = ["EXPERT_MLP_DIM=16", "NUM_EXPERTS=8", "NUM_SELECTED_EXPERTS=4", "GRANULARITY=2"]
FILES = {
    "mixtral": ([], "expert/wo/kernel", Tile()),
    "qwen2_moe": (["NUM_SPARSE_LAYERS=1"], "expert/wo/kernel", Tile()),
    "qwen3_moe": (["NUM_EXPERTS=4"], "expert/wo/kernel", Tile()),
    "olmoe": ([], "expert/wo/kernel", Tile()),
    "flex_olmo": ([], "expert/wo/kernel", Tile()),
    "granite_moe": ([], "expert/wo/kernel", Tile()),
    "half_shared": (HALVES, "shared_expert/wo/kernel", LastUnits(0, 16, 2.0)),
    "granular": (GRANULAR, "expert/wo/kernel", HiddenUnits(0, scale=2.0, groups=2)),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("dense") / "checkpoint_7", np.random.default_rng(0)
    specs = parameter_specs(DecoderModel(CONFIG).param_specs())
    metadata = model_settings.record(CONFIG.forward_settings)
    with create_checkpoint(path, specs, step=7, metadata=metadata) as writer:
        for name, spec in specs.items():
            values = rng.normal(size=spec.shape, scale=spec.shape[0] ** -0.5)
            writer.write(name, tuple(slice(0, n) for n in spec.shape), values.astype(spec.dtype))
        writer.finalize()
    return path


def upcycle(source, output, *files, bindings=(), **options):
    paths = [f"INITIAL_CHECKPOINT_PATH='{source}'", f"OUTPUT_CHECKPOINT_PATH='{output}'"]
    names = ["runs/upcycle.gin", *(f"recipes/{name}.gin" for name in files)]
    loaded = load(names, [*paths, "OPTIMIZER=None", *bindings])
    return loaded.build("upcycle")().run(**{"report": lambda line: None, **options})


@pytest.mark.parametrize("name", FILES)
def test_a_file_plans_what_it_says(dense, tmp_path, name):
    bindings, leaf, operation = FILES[name]
    said: list[str] = []
    done = upcycle(
        dense, tmp_path / "out", name, bindings=bindings, dry_run=True, report=said.append
    )
    assert "its function, as predicted: exact" in "\n".join(said)
    assert done.plan.row(f"target/decoder/layers_1/mlp/{leaf}").operation == operation
    assert not (tmp_path / "out").exists()


def test_recipes_are_combined_with_the_formats(dense, tmp_path):
    done = upcycle(dense, tmp_path / "out", "mixtral", "drop_upcycling", dry_run=True)
    row = done.plan.row("target/decoder/layers_0/mlp/expert/wi_1/kernel")
    assert row.operation == HiddenUnits(1, redraw=0.5)
    # Branch-Train-MiX: FlexOlmo's form with experts of two folders.
    parents, mixed = ["PARENTS=(0,1,0,1,0,1,0,1)"], f"[{str(dense)!r}, {str(dense)!r}]"
    loaded = load(
        ["runs/upcycle.gin", "recipes/flex_olmo.gin", "recipes/branch_train_mix.gin"],
        [
            f"INITIAL_CHECKPOINT_PATH={mixed}",
            f"OUTPUT_CHECKPOINT_PATH='{tmp_path / 'mixed'}'",
            "OPTIMIZER=None",
            *parents,
        ],
    )
    done = loaded.build("upcycle")().run(report=lambda line: None, dry_run=True)
    row = done.plan.row("target/decoder/layers_0/mlp/expert/wi_1/kernel")
    assert row.operation.name == "experts of parents 0,1,0,1,0,1,0,1"


def test_half_and_half_is_proven_exact_and_merges_are_refused(dense, tmp_path):
    done = upcycle(dense, tmp_path / "out", "half_shared", bindings=HALVES)
    assert done.ok and done.proof.function["prediction"]["verdict"] == Verdict.EXACT
    row = done.plan.row("target/decoder/layers_0/mlp/expert/wi_1/kernel")
    assert row.operation == TileFirstUnits(1, 16)
    with pytest.raises(
        ValueError, match="shared experts have gates.*each token has another weight"
    ):
        upcycle(tmp_path / "out", tmp_path / "merged", "merge_mean")


def test_an_moe_grows_and_is_merged_back_without_a_model_file(dense, tmp_path):
    """8 experts of 32 units and 2 per token; 16 and 4; 32 of 16 units and 8."""
    small, large, parts = (tmp_path / name for name in ("small", "large", "parts"))
    # That its function is exact, `test_decoder_recipes` shows.
    assert upcycle(dense, small, "mixtral", bindings=["FUNCTION_CHECK='off'"]).ok
    done = upcycle(small, large, "more_experts")
    assert done.ok and done.proof.function["prediction"]["verdict"] == Verdict.EXACT
    assert done.plan.recipe.expert_init.selected_before == 2
    row = done.plan.row("target/decoder/layers_0/mlp/expert/wi_1/kernel")
    assert row.operation == CopiesOfExperts(2) and row.spec.shape == (16, 16, 32)
    # K as it was: predicted, measured, said.
    done = upcycle(small, tmp_path / "fixed", "more_experts", bindings=["SELECTED=2"])
    found = done.proof.function
    assert done.ok and found["prediction"]["verdict"] == Verdict.FEWER
    assert "where 2 experts were: the best 1 with all copies" in done.proof.text()
    done = upcycle(large, parts, "more_experts", bindings=["SPLIT=True"], dry_run=True)
    assert done.plan.row("target/decoder/layers_0/mlp/expert/wo/kernel").spec.shape == (32, 16, 16)
    # The proof again, from what is recorded.
    loaded = load(
        ["runs/upcycle.gin"],
        [
            f"INITIAL_CHECKPOINT_PATH='{small}'",
            f"OUTPUT_CHECKPOINT_PATH='{large}'",
            "OPTIMIZER=None",
        ],
    )
    proof = loaded.build("verify")().run(report=lambda line: None)
    assert proof.ok and proof.function["prediction"]["verdict"] == Verdict.EXACT
    # And back to the dense model, of whose MLPs the experts are copies.
    done = upcycle(large, tmp_path / "merged", "merge_mean")
    merged, source = open_checkpoint(tmp_path / "merged"), open_checkpoint(dense)
    assert done.ok and merged.specs().keys() == source.specs().keys()
    for name in source.specs():
        np.testing.assert_array_equal(merged.read(name), source.read(name))


def test_a_source_without_experts_or_a_model_is_refused(dense, tmp_path):
    with pytest.raises(ValueError, match="does not state its own model: name a model file"):
        upcycle(dense, tmp_path / "out", "more_experts")
    assert upcycle(dense, tmp_path / "small", "mixtral", bindings=["FUNCTION_CHECK='off'"]).ok
    with pytest.raises(ValueError, match="upcycling happens once.*MoreExperts"):
        upcycle(tmp_path / "small", tmp_path / "out", "mixtral")


def test_folders_become_experts_beside_each_other(tmp_path):
    """Branch-Train-MiX of two Hugging Face folders, and the mixture as a folder again."""
    held = [Held(BASE, seed=seed) for seed in (1, 2)]
    folders = [str(write_huggingface(one, tmp_path / f"hf{i}")) for i, one in enumerate(held)]

    def mixed(paths, output):
        bindings = [
            f"INITIAL_CHECKPOINT_PATH={paths}",
            f"OUTPUT_CHECKPOINT_PATH='{output}'",
            "OPTIMIZER=None",
            "NUM_EXPERTS=4",
            "PARENTS=(0, 1, 1, 0)",
        ]
        files = ("runs/upcycle", "recipes/mixtral", "recipes/branch_train_mix")
        loaded = load([f"{name}.gin" for name in files], bindings)
        return loaded.build("upcycle")().run(report=lambda line: None)

    assert mixed(folders, tmp_path / "mixed").ok
    result = open_checkpoint(tmp_path / "mixed")
    first, second = (one.leaves["decoder/layers_1/mlp/wo/kernel"] for one in held)
    experts = result.read("target/decoder/layers_1/mlp/expert/wo/kernel")
    np.testing.assert_array_equal(experts, [first, second, second, first])
    first, second = (one.leaves["token_embedder/embedding"] for one in held)
    embedding = result.read("target/token_embedder/embedding")
    np.testing.assert_allclose(embedding, (first + second) / 2, atol=1e-6)

    again = open_checkpoint(write_huggingface(result, tmp_path / "again"))
    assert again.model_config().moe.num_experts == 4
    name = "target/decoder/layers_0/mlp/expert/wi_1/kernel"
    np.testing.assert_array_equal(again.read(name), result.read(name))

    damaged = dict(held[1].leaves)
    damaged["decoder/decoder_norm/scale"] = np.full(BASE.emb_dim, np.nan, np.float32)
    folders[1] = str(write_huggingface(Held(BASE, damaged), tmp_path / "damaged"))
    with pytest.raises(ValueError, match="damaged: .*decoder_norm/scale has 32 NaN .*Nothing was"):
        mixed(folders, tmp_path / "refused")
    assert not list(tmp_path.glob("refused*"))
