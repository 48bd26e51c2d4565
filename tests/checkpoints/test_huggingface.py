"""Hugging Face T5 folders: names, tying, shards, partial reads, and the way back into
transformers.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.checkpoints.huggingface import t5x_tensor
from upcycle_jax.checkpoints.huggingface_writer import (
    t5_dimensions,
    tensor_names,
    write_huggingface,
)
from upcycle_jax.trees import LeafSpec

SIZES = {
    "vocab_size": 40,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
}
EMBEDDING, LOGITS = "target/token_embedder/embedding", "target/decoder/logits_dense/kernel"


def transformers_model(**config):
    """A small random model with weights of everyday size, so that logits are not all alike."""
    torch = pytest.importorskip("torch", reason="torch is needed as the oracle")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is needed as the oracle"
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def logits_of(model):
    torch = pytest.importorskip("torch", reason="torch is needed as the oracle")
    inputs = torch.tensor([[5, 9, 3, 1], [7, 2, 1, 0]])
    with torch.no_grad():
        return model(
            input_ids=inputs,
            attention_mask=(inputs > 0).long(),
            decoder_input_ids=torch.tensor([[0, 4, 6], [0, 8, 2]]),
        ).logits.numpy()


def load(folder):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is needed as the oracle"
    )
    return transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()


def fake_folder(path, *, dtype=np.float32, tied=False, gated=True, config=None, seed=0):
    """A T5 folder written without transformers: every tensor that the architecture has, at
    random.
    """
    specs = {
        EMBEDDING: LeafSpec((40, 12), np.dtype(dtype)),
        "target/encoder/relpos_bias/rel_embedding": LeafSpec((2, 32), np.dtype(dtype)),
    }
    specs |= {"target/encoder/layers_0/attention/query/kernel": LeafSpec((12, 8), np.dtype(dtype))}
    specs |= {
        f"target/encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel": LeafSpec(
            (12, 20), np.dtype(dtype)
        )
    }
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        specs |= {
            f"target/{stack}/layers_{i}/pre_mlp_layer_norm/scale": LeafSpec((12,), np.dtype(dtype))
            for i in range(layers)
        }
    if not tied:
        specs[LOGITS] = LeafSpec((12, 40), np.dtype(dtype))
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(size=_hf_shape(name)).astype(dtype)
        for name, _ in tensor_names(t5_dimensions(specs)).values()
    }
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps(
            {"model_type": "t5", "d_model": 12, "tie_word_embeddings": tied} | (config or {})
        )
    )
    return tensors


def _hf_shape(name):
    if name in ("shared.weight", "lm_head.weight"):
        return (40, 12)
    if "norm" in name:
        return (12,)
    if "relative" in name:
        return (32, 2)
    return {"o": (12, 8), "wo": (12, 20), "wi": (20, 12), "wi_0": (20, 12), "wi_1": (20, 12)}.get(
        name.split(".")[-2], (8, 12)
    )


@pytest.mark.parametrize(
    ("tensor", "parameter"),
    [
        (
            "encoder.block.1.layer.0.SelfAttention.q.weight",
            "encoder/layers_1/attention/query/kernel",
        ),
        (
            "decoder.block.0.layer.0.SelfAttention.o.weight",
            "decoder/layers_0/self_attention/out/kernel",
        ),
        ("decoder.block.2.layer.2.DenseReluDense.wi_1.weight", "decoder/layers_2/mlp/wi_1/kernel"),
        (
            "decoder.block.2.layer.1.layer_norm.weight",
            "decoder/layers_2/pre_cross_attention_layer_norm/scale",
        ),
        ("encoder.block.0.layer.1.layer_norm.weight", "encoder/layers_0/pre_mlp_layer_norm/scale"),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder/relpos_bias/rel_embedding",
        ),
        ("encoder.final_layer_norm.weight", "encoder/encoder_norm/scale"),
        ("lm_head.weight", "decoder/logits_dense/kernel"),
    ],
)
def test_names(tensor, parameter):
    assert t5x_tensor(tensor).name == parameter


def test_names_that_t5_does_not_have():
    assert t5x_tensor("encoder.block.0.layer.0.SelfAttention.q.bias") is None
    assert t5x_tensor("classification_head.dense.weight") is None


def test_reads_transposed_and_in_parts(tmp_path):
    tensors = fake_folder(tmp_path / "hf")
    reader = open_checkpoint(tmp_path / "hf")
    assert reader.format == "huggingface"
    assert reader.step == 0
    name = "target/encoder/layers_1/mlp/wi_0/kernel"
    expected = tensors["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"].T
    np.testing.assert_array_equal(reader.read(name), expected)
    np.testing.assert_array_equal(
        reader.read(name, (slice(2, 5), slice(7, 11))), expected[2:5, 7:11]
    )
    np.testing.assert_array_equal(
        reader.read(EMBEDDING, (slice(3, 9),)), tensors["shared.weight"][3:9]
    )
    assert reader.specs()["target/decoder/relpos_bias/rel_embedding"].shape == (2, 32)
    # Every tensor is found once: 2 encoder layers of 9, 3 decoder layers of 14, 2 tables, 2 norms,
    # embedding and logits.
    assert len(reader.specs()) == 2 * 9 + 3 * 14 + 6


def test_bfloat16_keeps_its_bits(tmp_path):
    tensors = fake_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16)
    reader = open_checkpoint(tmp_path / "hf")
    value = reader.read(LOGITS, (slice(0, 6), slice(0, 3)))
    assert value.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        value.view(np.uint16),
        np.ascontiguousarray(tensors["lm_head.weight"].T[0:6, 0:3]).view(np.uint16),
    )


def test_logits_for_each_combination_of_tying_and_scaling(tmp_path):
    """T5X's logits are x @ kernel, or x @ embedding.T * d**-0.5 without a kernel; each folder must
    come out with equal ones.
    """
    cases = {
        "t5": (True, True),
        "t5 1.1": (False, False),
        "tied, not scaled": (True, False),
        "untied, scaled": (False, True),
    }
    for name, (tied, scaled) in cases.items():
        tensors = fake_folder(tmp_path / name, tied=tied, config={"scale_decoder_outputs": scaled})
        reader = open_checkpoint(tmp_path / name)
        x = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)
        theirs = (x * 12**-0.5 if scaled else x) @ tensors[
            "shared.weight" if tied else "lm_head.weight"
        ].T
        ours = (
            x @ reader.read(LOGITS)
            if LOGITS in reader.specs()
            else x @ reader.read(EMBEDDING).T * 12**-0.5
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert (LOGITS in reader.specs()) == (not (tied and scaled))


def test_shards(tmp_path):
    tensors = fake_folder(tmp_path / "whole")
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(tensors)
    files = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, shards = open_checkpoint(tmp_path / "whole"), open_checkpoint(folder)
    assert whole.specs() == shards.specs()
    for name in whole.specs():
        np.testing.assert_array_equal(whole.read(name), shards.read(name))
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index names b\.safetensors, which is missing"):
        open_checkpoint(folder)


def test_refusals(tmp_path):
    fake_folder(tmp_path / "hf", config={"model_type": "umt5"})
    with pytest.raises(ValueError, match="type 'umt5'; only T5 models"):
        open_checkpoint(tmp_path / "hf")
    fake_folder(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match=r"only pytorch_model\.bin: pickled weights are not read.*safe_serialization=True",
    ):
        open_checkpoint(tmp_path / "pickled")
    tensors = fake_folder(tmp_path / "extra")
    save_file(
        {**tensors, "classifier.weight": np.zeros((2, 2), np.float32)},
        tmp_path / "extra" / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"1 tensors have no place in T5: classifier\.weight"):
        open_checkpoint(tmp_path / "extra")
    fake_folder(tmp_path / "short")
    data = (tmp_path / "short" / "model.safetensors").read_bytes()
    (tmp_path / "short" / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        open_checkpoint(tmp_path / "short")


@pytest.mark.parametrize("shard_bytes", [1 << 30, 6000])
def test_writing_gives_back_the_same_tensors(tmp_path, shard_bytes):
    tensors = fake_folder(tmp_path / "hf")
    write_huggingface(open_checkpoint(tmp_path / "hf"), tmp_path / "out", shard_bytes=shard_bytes)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(written[name], tensors[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in SIZES} == SIZES
    assert config["feed_forward_proj"] == "gated-gelu"
    with pytest.raises(FileExistsError, match="exists already: nothing was changed"):
        write_huggingface(open_checkpoint(tmp_path / "hf"), tmp_path / "out")


def test_a_sparse_checkpoint_is_refused(tmp_path):
    specs = {
        EMBEDDING: LeafSpec((4, 2), np.dtype(np.float32)),
        "target/encoder/layers_1/mlp/expert/wi_0/kernel": LeafSpec((2, 2, 2), np.dtype(np.float32)),
    }
    with create_checkpoint(tmp_path / "checkpoint_1", specs, step=1, metadata={}) as writer:
        for name, spec in specs.items():
            writer.write(name, None, np.zeros(spec.shape, spec.dtype))
        writer.finalize()
    with pytest.raises(ValueError, match="Mixture-of-Experts.*merge the experts first"):
        write_huggingface(open_checkpoint(tmp_path), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"feed_forward_proj": "relu"},
    ],
)
def test_transformers_loads_what_is_written_with_equal_logits(tmp_path, config):
    model = transformers_model(**config)
    model.save_pretrained(tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf")
    specs = source.specs()
    with create_checkpoint(tmp_path / "checkpoint_1", specs, step=1, metadata={}) as writer:
        for name in specs:
            writer.write(name, None, source.read(name))
        writer.finalize()
    write_huggingface(open_checkpoint(tmp_path / "checkpoint_1"), tmp_path / "back")
    np.testing.assert_allclose(logits_of(load(tmp_path / "back")), logits_of(model), atol=1e-5)


def test_untied_logits_survive_transformers(tmp_path):
    """An lm_head that differs from the embedding, as in T5 1.1, must not be tied again when
    transformers loads it.
    """
    torch = pytest.importorskip("torch", reason="torch is needed as the oracle")
    tensors = fake_folder(tmp_path / "hf")
    write_huggingface(open_checkpoint(tmp_path / "hf"), tmp_path / "out")
    model = load(tmp_path / "out")
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), tensors["lm_head.weight"])
    np.testing.assert_array_equal(model.shared.weight.detach().numpy(), tensors["shared.weight"])
    assert model.config.scale_decoder_outputs is False
    hidden = torch.randn(1, 1, 12)
    np.testing.assert_allclose(
        model.lm_head(hidden).detach().numpy(),
        hidden.numpy() @ tensors["lm_head.weight"].T,
        atol=1e-5,
    )
