"""The command `verify PATH`: everything else is in the record that the result carries."""

import dataclasses
import json
import os

import numpy as np
import pytest

from upcycle_jax import config, upcycle, verify
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models import registry
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.surgery.model_record import model_from_json, model_to_json
from upcycle_jax.surgery.recorded import read_recorded, sealed
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.train_state import state_specs

TINY = (
    "VOCAB_SIZE=64",
    "T5Config.emb_dim=16",
    "T5Config.mlp_dim=32",
    "T5Config.num_heads=2",
    "T5Config.head_dim=8",
)
SHALLOW = [f"T5Config.num_{stack}_layers=1" for stack in ("encoder", "decoder")]
SPARSE = ["ENCODER_SPARSE_LAYOUT=(0,)", "DECODER_SPARSE_LAYOUT=(0,)"]
OFF = "--gin.verify.function_check='off'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense checkpoint, and what became of it by a recipe that is not the default one."""
    folder = tmp_path_factory.mktemp("conversion")
    model = config.load(["models/t5_1_1_tiny.gin"], [*TINY, *SHALLOW]).macro("MODEL")
    specs = state_specs(model, Adafactor())
    rng = np.random.default_rng(0)
    with create_checkpoint(folder / "dense" / "checkpoint_7", specs, step=7, metadata={}) as writer:
        for name, spec in specs.items():
            if name != "state/step":
                values = rng.normal(size=spec.shape) * (0.1 if spec.shape != (1,) else 0)
                writer.write(name, None, values.astype(spec.dtype))
        writer.finalize()
    assert upcycle.main([*words(folder), "--gin.Recipe.seed=5"]) == 0
    return folder


def words(folder):
    return [
        "--gin_file=models/t5_1_1_tiny_upcycled.gin",
        "--gin_file=runs/upcycle.gin",
        *(f"--gin.{line}" for line in (*TINY, *SHALLOW, *SPARSE)),
        f"--gin.INITIAL_CHECKPOINT_PATH='{folder}/dense/checkpoint_7'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{folder}/sparse/checkpoint_7'",
        "--gin.FUNCTION_CHECK='off'",
    ]


def run(capsys, *arguments):
    code = verify.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out if code != 2 else captured.err


def test_a_path_alone_is_proved(folder, capsys, tmp_path):
    code, said = run(capsys, folder / "sparse", OFF, f"--gin.verify.proof_directory='{tmp_path}'")
    assert code == 0, said
    assert "source: as it was at the conversion" in said and "record: intact" in said
    assert "function check: skipped, as asked" in said
    proof = json.loads((tmp_path / "proof.json").read_text())
    first = json.loads((folder / "sparse" / "checkpoint_7" / "proof.json").read_text())
    assert proof["ok"] and proof["recipe"] == first["recipe"] and proof["recipe"]["seed"] == 5
    assert proof["leaves"] == first["leaves"] and proof["files"] == first["files"]


def test_another_recipe_than_the_recorded_one_is_named(folder, capsys):
    code, said = run(capsys, *words(folder))
    assert code == 0
    assert (
        "the configured recipe is not the recorded one, which is used: seed is 0, recorded 5"
        in (said)
    )
    assert run(capsys, *words(folder), "--gin.Recipe.seed=5")[1].count("note:") == 0
    code, said = run(capsys, *words(folder), "--gin.MoeConfig.group_size=64")
    assert code == 0 and "the configured model is not the recorded one" in said


def test_a_source_that_is_gone_or_cannot_be_opened(folder, capsys):
    dense = folder / "dense" / "checkpoint_7"
    dense.rename(folder / "elsewhere")
    try:
        code, said = run(capsys, folder / "sparse", OFF)
        assert code == 0 and "source: gone: the result is proved against the checksums" in said
        code, said = run(capsys, *words(folder))
        assert code == 2 and "checkpoint_7 does not exist" in said
        assert (
            f"without its source, the result is proved by: python -m upcycle_jax.verify {folder}"
            in (said)
        )
        # Where it lies now can be said.
        moved = f"--gin.verify.initial_checkpoint_path='{folder}/elsewhere'"
        assert run(capsys, folder / "sparse", OFF, moved)[0] == 0
        dense.mkdir()
        (dense / "state").mkdir()
        (dense / "state" / "_METADATA").write_text("{")
        code, said = run(capsys, folder / "sparse", OFF)
        assert code == 1 and "source: DAMAGED" in said and "cannot be opened" in said
        assert "result: as it was at the conversion" in said
        (dense / "state" / "_METADATA").unlink()
        (dense / "state").rmdir()
        dense.rmdir()
    finally:
        os.rename(folder / "elsewhere", dense)


def test_the_record_is_damaged_or_there_is_none(folder, capsys):
    sparse = folder / "sparse" / "checkpoint_7"
    record, proof = sparse / "_CHECKPOINT_METADATA", sparse / "proof.json"
    whole, proved = record.read_text(), proof.read_text()
    try:
        record.write_text(whole.replace('"seed": 5', '"seed": 6'))
        code, said = run(capsys, sparse, OFF)  # proof.json repeats the record.
        assert code == 1 and "record: DAMAGED" in said and "_CHECKPOINT_METADATA" in said
        assert f"{len(json.loads(proved)['leaves'])} leaves right" in said
        proof.unlink()
        code, said = run(capsys, sparse, OFF)
        assert code == 2 and "does not record what it was made from" in said
        assert "_CHECKPOINT_METADATA is not as it was written" in said
        code, said = run(capsys, *words(folder), "--gin.Recipe.seed=5")
        assert code == 1 and "proof: FAILED" in said and "record: DAMAGED" in said
    finally:
        record.write_text(whole)
        proof.write_text(proved)
    code, said = run(capsys, folder / "dense", OFF)
    assert code == 2 and "does not record what it was made from: name the source" in said
    code, said = run(capsys, folder / "nothing", OFF)
    assert code == 2 and "does not exist" in said


def test_the_recorded_model_is_the_model():
    """So that the function check needs no model file: every router, and through JSON."""
    bindings = [*TINY, "MoeConfig.decoder_router=@SwitchTop1()"]
    model = config.load(["models/t5_1_1_tiny_upcycled.gin"], bindings).macro("MODEL")
    routers = [router() for router in registry.ROUTERS]
    assert len(routers) == 8
    for router in routers:
        moe = dataclasses.replace(model.config.moe, encoder_router=router)
        model.config = dataclasses.replace(model.config, moe=moe)
        recorded = json.loads(json.dumps(model_to_json(model)))
        assert model_from_json(recorded).config == model.config
    with pytest.raises(ValueError, match="more than the checkpoint's 3 leaves"):
        model_from_json(recorded, max_layers=3)
    for damaged in ({**recorded, "type": "Other"}, {**recorded, "emb_dim": 0}, [], 3, {}):
        with pytest.raises(ValueError, match="recorded model|emb_dim"):
            model_from_json(damaged)


def test_the_recorded_language_model_is_the_model():
    """With ropes of its own, and lists where JSON has no tuples."""
    stretched = Rope(1e6, "longrope", original_length=64, short_factors=(1,), long_factors=(2,))
    sizes = {"emb_dim": 8, "num_layers": 2, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}
    for moe in (None, DecoderMoeConfig(num_experts=4, sparse_layout=(1,))):
        for rope in (None, Rope(), stretched):
            for more in ({"layer_types": ("full", "sliding"), "sliding_window": 4}, {}):
                given = DecoderConfig(32, **sizes, moe=moe, rope=rope, sliding_rope=rope, **more)
                recorded = json.loads(json.dumps(model_to_json(DecoderModel(given))))
                assert model_from_json(recorded).config == given


def test_a_record_is_not_trusted(folder):
    """Sealed as it should be, whatever it holds: no error but ours, and it is told."""
    target = open_checkpoint(folder / "sparse")
    right = target.metadata()
    surgery = right["surgery"]
    for content in (
        {**right, "surgery": []},
        {**right, "surgery": {**surgery, "leaves": [1]}},
        {**right, "surgery": {**surgery, "leaves": {"target/x": {"shape": "ab", "dtype": "f4"}}}},
        {**right, "surgery": {**surgery, "leaves": {"target/x": {"shape": [2], "dtype": "none"}}}},
        {**right, "surgery": {**surgery, "recipe": {"type": ["Recipe"]}}},
        {**right, "surgery": {**surgery, "recipe": {"type": "Recipe", "seed": {"a": 1}, "x": 2}}},
        {**right, "surgery": {**surgery, "sources": 3}},
    ):
        content.pop("seal", None)

        class Hostile:
            path = "nowhere"

            def metadata(self, content=content):
                return sealed(content)

        found = read_recorded(Hostile())
        assert found.problems and found.recipe is None and not found.checksums
