"""The convert command on decoder-only language models: to Orbax, which states the model, and
back.
"""

import json
import re

import numpy as np
import pytest

from tests.checkpoints.random_decoders import FAMILIES, SPARSE, UNIT, Held, of
from upcycle_jax import convert as command
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.checkpoints.huggingface.base import WritingOptions
from upcycle_jax.checkpoints.huggingface.decoder.reading_back import differences
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def written(folder, model_type):
    options = WritingOptions(model_type=model_type)
    return write_huggingface(Held(FAMILIES[model_type]), folder, options=options)


def equal(one, other):
    assert one.specs().keys() - {"state/step"} == other.specs().keys() - {"state/step"}
    for name in one.specs().keys() - {"state/step"}:
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "granitemoeshared", "gemma3_text"])
def test_to_orbax_and_back(model_type, tmp_path, capsys):
    """Orbax states the whole model: nothing is told on the way back."""
    folder = written(tmp_path / "hf", model_type)
    assert run(folder, tmp_path / "orbax", "--quiet") == 0
    orbax = open_checkpoint(tmp_path / "orbax")
    assert not list(differences(FAMILIES[model_type], orbax.model_config()))
    assert run(tmp_path / "orbax", tmp_path / "back", "--to=huggingface", "--max_memory=20K") == 0
    said = capsys.readouterr()
    assert f"verdicts on {model_type}" in said.err
    assert re.search(r"transformers5 +exact", said.err)
    equal(open_checkpoint(folder), open_checkpoint(tmp_path / "back"))
    ours, theirs = ((at / "config.json").read_text() for at in (folder, tmp_path / "back"))
    assert json.loads(ours) == json.loads(theirs)
    # 20 KB a file: several, with an index that names each tensor and their bytes.
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    stored = open_checkpoint(folder).specs().values()
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in stored)


def test_tokenizer_files_are_carried_byte_for_byte(tmp_path, capsys):
    folder = written(tmp_path / "hf", "llama")
    files = {
        "tokenizer.json": b'{"model": {"vocab": {"a": 0, "b": 95}},  "added_tokens":'
        b' [{"id": 96, "content": "<image_soft_token>"}]}\n',
        "tokenizer_config.json": b"{}",
        "tokenizer.model": bytes(range(256)),
        "generation_config.json": b'{"temperature": 0.5}',
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    keys = json.loads((folder / "config.json").read_text())
    keys |= {"max_position_embeddings": 131072, "eos_token_id": [2, 95], "bos_token_id": 4096}
    (folder / "config.json").write_text(json.dumps(keys))
    # Through two Orbax checkpoints: the record of the second names the first, that of the first
    # the folder.
    assert run(folder, tmp_path / "first", "--quiet") == 0
    assert run(tmp_path / "first", tmp_path / "orbax", "--quiet") == 0
    assert run(tmp_path / "orbax", tmp_path / "out", "--to=huggingface") == 0
    assert f"tokenizer from {folder}" in capsys.readouterr().err
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    back = json.loads((tmp_path / "out" / "config.json").read_text())
    # A token beyond the embedding is none.
    special = back["eos_token_id"], back["bos_token_id"], back["max_position_embeddings"]
    assert special == ([2, 95], None, 131072)

    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 96}}}')
    assert run(tmp_path / "orbax", tmp_path / "no", "--to=huggingface") == 2
    assert "has ids up to 96, the embedding has 96 rows" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_dry_run_says_the_verdicts_and_writes_nothing(tmp_path, capsys):
    folder = written(tmp_path / "hf", "olmoe")
    assert run(folder, tmp_path / "out", "--to=huggingface", "--dry_run") == 0
    said = capsys.readouterr()
    assert "dry run: nothing was written" in said.out
    assert re.search(r"vllm +differs +it ignores clip_qkv", said.err)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("model_type", "flags", "message"),
    [
        ("mixtral", ["--reader=sglang"], "ignores rope scaling, without a word"),
        ("olmoe", ["--reader=vllm"], "ignores clip_qkv"),
        ("mixtral", ["--model_type=olmoe"], "normed by projection, the model's by nothing"),
        ("mixtral", ["--model_type=mistral"], "it is dense, the model has experts"),
        ("mixtral", ["--model_type=mamba"], "model_type 'mamba' is not among llama, mistral"),
        ("mixtral", ["--reader=tgi"], "reader 'tgi' is not among transformers5"),
        ("mixtral", ["--max_position_embeddings=0"], "must be at least 1, got 0"),
        ("mixtral", ["--tokenizer=/nowhere"], "/nowhere is no folder"),
    ],
)
def test_refusals_write_nothing(model_type, flags, message, tmp_path, capsys):
    folder = written(tmp_path / "hf", model_type)
    assert run(folder, tmp_path / "out", "--to=huggingface", *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_flags_of_folders_are_refused_for_other_formats(tmp_path, capsys):
    folder = written(tmp_path / "hf", "llama")
    assert run(folder, tmp_path / "out", "--reader=vllm") == 2
    assert "say how a Hugging Face folder is written" in capsys.readouterr().err


def silent(folder, config):
    """A checkpoint of a model that says nothing of it."""
    held = Held(config)
    with create_checkpoint(folder, held.specs(), step=0, metadata={}) as writer:
        for name in held.specs():
            writer.write(name, None, held.read(name))
        writer.finalize()
    return folder


MODEL = (
    "MODEL = @DecoderModel()",
    "DecoderModel.config = @DecoderConfig()",
    "DecoderConfig.vocab_size = 96",
    "DecoderConfig.emb_dim = 32",
    "DecoderConfig.num_layers = 2",
    "DecoderConfig.num_heads = 4",
    "DecoderConfig.head_dim = 8",
    "DecoderConfig.mlp_dim = 48",
    "DecoderConfig.num_kv_heads = 2",
    "DecoderConfig.moe = @DecoderMoeConfig()",
    "DecoderMoeConfig.num_experts = 4",
)


def test_a_checkpoint_that_does_not_state_its_model_needs_one(tmp_path, capsys):
    path = silent(tmp_path / "checkpoint_0", of(moe=UNIT))
    assert run(path, tmp_path / "out", "--to=huggingface") == 2
    assert (
        "does not state its router: name its model file with --gin_file" in capsys.readouterr().err
    )
    file = tmp_path / "model.gin"
    file.write_text("\n".join(MODEL))
    gin = [f"--gin_file={file}"]
    assert run(path, tmp_path / "out", "--to=huggingface", *gin) == 0
    equal(open_checkpoint(path), open_checkpoint(tmp_path / "out"))
    wrong = [*gin, "--gin.DecoderMoeConfig.num_experts=8"]
    assert run(path, tmp_path / "no", "--to=huggingface", *wrong) == 2
    assert "are not those of the model that it states" in capsys.readouterr().err


def test_a_damaged_record_is_one_error(tmp_path, capsys):
    held = Held(SPARSE["mixtral"])
    record = {"model": {"type": "DecoderConfig", "vocab_size": -3}}
    path = tmp_path / "checkpoint_0"
    with create_checkpoint(path, held.specs(), step=0, metadata=record) as writer:
        for name in held.specs():
            writer.write(name, None, held.read(name))
        writer.finalize()
    assert run(path, tmp_path / "out", "--to=huggingface") == 2
    error = capsys.readouterr().err
    assert str(path) in error and "the recorded model" in error
