"""Hugging Face T5 folders: names, tying, shards, partial reads, and the way back into
transformers.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from upcycle_jax import leases
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
from upcycle_jax.checkpoints.to_orbax import convert_to_orbax
from upcycle_jax.trees import LeafSpec

EMBEDDING, LOGITS = "target/token_embedder/embedding", "target/decoder/logits_dense/kernel"


def transformers_model(**config):
    """A small random model with weights of everyday size, so that logits are not all alike."""
    torch = pytest.importorskip("torch", reason="torch is needed as the oracle")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is needed as the oracle"
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40,
            d_model=12,
            d_kv=4,
            d_ff=20,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=2,
            **config,
        )
    )
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


def test_reads_transposed_and_in_parts(tmp_path, t5_folder):
    tensors = t5_folder(tmp_path / "hf")
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


def test_bfloat16_keeps_its_bits(tmp_path, t5_folder):
    tensors = t5_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16)
    reader = open_checkpoint(tmp_path / "hf")
    value = reader.read(LOGITS, (slice(0, 6), slice(0, 3)))
    assert value.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        value.view(np.uint16),
        np.ascontiguousarray(tensors["lm_head.weight"].T[0:6, 0:3]).view(np.uint16),
    )


def test_logits_for_each_combination_of_tying_and_scaling(tmp_path, t5_folder):
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
        tensors = t5_folder(tmp_path / name, tied=tied, config={"scale_decoder_outputs": scaled})
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


def test_a_scaled_head_keeps_its_bits(tmp_path, t5_folder):
    """bfloat16 cannot hold the product with 12^-0.5: the leaf is float32."""
    tensors = t5_folder(
        tmp_path / "hf", dtype=ml_dtypes.bfloat16, config={"scale_decoder_outputs": True}
    )
    value = open_checkpoint(tmp_path / "hf").read(LOGITS)
    want = tensors["lm_head.weight"].T.astype(np.float64) * 12**-0.5
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, want, rtol=1e-6)


@pytest.mark.parametrize("names", [["decoder"], ["encoder"], ["encoder", "decoder"]])
def test_an_embedding_under_its_other_names(tmp_path, t5_folder, names):
    """As MADLAD-400 is published: no shared.weight."""

    def rename(tensors):
        shared = tensors.pop("shared.weight")
        return tensors | {f"{name}.embed_tokens.weight": shared for name in names}

    tensors = t5_folder(tmp_path / "hf", edit=rename)
    reader = open_checkpoint(tmp_path / "hf")
    embedding = tensors[f"{names[0]}.embed_tokens.weight"]
    np.testing.assert_array_equal(reader.read(EMBEDDING), embedding)
    assert len(reader.specs()) == 2 * 9 + 3 * 14 + 6


def test_copies_of_the_embedding_and_a_tied_head_add_no_leaf(tmp_path, t5_folder):
    def copies(tensors):
        shared = tensors["shared.weight"]
        return tensors | {
            "encoder.embed_tokens.weight": shared,
            "decoder.embed_tokens.weight": shared.astype(np.float64),
            "lm_head.weight": shared,
        }

    t5_folder(tmp_path / "copies", tied=True, edit=copies)
    t5_folder(tmp_path / "plain", tied=True)
    copied, plain = (open_checkpoint(tmp_path / name) for name in ("copies", "plain"))
    assert copied.specs() == plain.specs()
    assert copied.fingerprint() != plain.fingerprint()


def test_a_head_of_its_own_counts_where_transformers_5_wrote_the_folder(tmp_path, t5_folder):
    """That version writes tie_word_embeddings true whatever the model is."""
    keys = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    t5_folder(tmp_path / "new", config=keys)
    assert LOGITS in open_checkpoint(tmp_path / "new").specs()


def test_the_bias_that_no_t5_uses_is_left_out(tmp_path, t5_folder):
    """Published T5 1.0 folders have it; its last part is that of the decoder's position table."""
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors = t5_folder(tmp_path / "hf", edit=lambda t: t | {unused: np.ones((32, 2), np.float32)})
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path / "hf").read("target/decoder/relpos_bias/rel_embedding"),
        tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].T,
    )


def test_an_encoder_alone_is_read(tmp_path, t5_folder):
    t5_folder(
        tmp_path / "hf",
        tied=True,
        config={"architectures": ["T5EncoderModel"]},
        edit=lambda t: {name: v for name, v in t.items() if not name.startswith("decoder")},
    )
    specs = open_checkpoint(tmp_path / "hf").specs()
    assert len(specs) == 2 * 9 + 3
    assert not any(name.startswith("target/decoder") for name in specs)


def test_a_snapshot_of_the_hugging_face_cache_is_read(tmp_path, t5_folder):
    """Its files are links to the blobs beside the snapshots."""
    tensors = t5_folder(tmp_path / "plain")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors")):
        (tmp_path / "plain" / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    np.testing.assert_array_equal(
        open_checkpoint(snapshot).read(EMBEDDING), tensors["shared.weight"]
    )


def test_settings_of_each_type_of_model(tmp_path, t5_folder):
    settings = {}
    for name, config in {
        "t5": {"feed_forward_proj": "swish", "layer_norm_epsilon": 1e-5},
        "mt5": {"model_type": "mt5", "feed_forward_proj": None},
        "named by dense_act_fn": {
            "feed_forward_proj": None, "dense_act_fn": "gelu", "is_gated_act": True,
        },
    }.items():  # fmt: skip
        t5_folder(tmp_path / name, gated=name != "t5", config=config)
        settings[name] = open_checkpoint(tmp_path / name).model_settings()
    assert settings["t5"] == {
        "mlp_activations": ("silu",),
        "layer_norm_epsilon": 1e-5,
        "relative_attention_max_distance": 128,
    }
    assert settings["mt5"]["mlp_activations"] == ("gelu", "linear")
    assert settings["named by dense_act_fn"]["mlp_activations"] == ("gelu_exact", "linear")


def test_shards(tmp_path, t5_folder):
    names = sorted(t5_folder(tmp_path / "whole"))
    folder = tmp_path / "shards"
    t5_folder(folder, shards={"a.safetensors": names[:20], "b.safetensors": names[20:]})
    whole, shards = open_checkpoint(tmp_path / "whole"), open_checkpoint(folder)
    assert whole.specs() == shards.specs()
    for name in whole.specs():
        np.testing.assert_array_equal(whole.read(name), shards.read(name))
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index names b\.safetensors, which is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 6000])
def test_writing_gives_back_the_same_tensors(tmp_path, shard_bytes, t5_folder):
    tensors = t5_folder(tmp_path / "hf")
    write_huggingface(open_checkpoint(tmp_path / "hf"), tmp_path / "out", shard_bytes=shard_bytes)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(written[name], tensors[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    read = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: config[key] for key in read} == read
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
        {
            "feed_forward_proj": "gated-silu",
            "layer_norm_epsilon": 1e-3,
            "relative_attention_max_distance": 20,
            "relative_attention_num_buckets": 8,
        },
        {"feed_forward_proj": "gelu"},
    ],
)
def test_orbax_carries_what_config_json_says_back_to_transformers(tmp_path, config):
    model = transformers_model(**config)
    model.save_pretrained(tmp_path / "hf")
    written = convert_to_orbax(open_checkpoint(tmp_path / "hf"), tmp_path / "orbax")
    again = convert_to_orbax(open_checkpoint(written), tmp_path / "again")
    write_huggingface(open_checkpoint(again), tmp_path / "back")
    first, last = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back")
    )
    for key in (
        "feed_forward_proj",
        "layer_norm_epsilon",
        "relative_attention_max_distance",
        "relative_attention_num_buckets",
    ):
        assert last[key] == first[key]
    np.testing.assert_allclose(logits_of(load(tmp_path / "back")), logits_of(model), atol=1e-5)


def test_gated_erf_gelu_has_a_name_that_transformers_knows(tmp_path, t5_folder):
    """'gated-gelu' is the tanh form there."""
    t5_folder(tmp_path / "hf", config={"feed_forward_proj": "gated-gelu_python"})
    reader = open_checkpoint(tmp_path / "hf")
    assert reader.model_settings()["mlp_activations"] == ("gelu_exact", "linear")
    write_huggingface(reader, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").model_settings() == reader.model_settings()


def test_untied_logits_survive_transformers(tmp_path, t5_folder):
    """An lm_head that differs from the embedding, as in T5 1.1, must not be tied again when
    transformers loads it.
    """
    torch = pytest.importorskip("torch", reason="torch is needed as the oracle")
    tensors = t5_folder(tmp_path / "hf")
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


def test_a_second_writer_of_a_folder_is_refused(tmp_path, t5_folder):
    t5_folder(tmp_path / "hf")
    with (
        leases.hold(tmp_path / ".out.lease.json", what="it", remedy="wait"),
        pytest.raises(leases.InUseError, match="out is in use: process"),
    ):
        write_huggingface(open_checkpoint(tmp_path / "hf"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
