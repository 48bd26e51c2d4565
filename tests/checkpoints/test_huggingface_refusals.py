"""Hugging Face folders that are damaged, contradict themselves or are made to lead elsewhere: one
line that names what is wrong, and nothing read outside the folder.
"""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from upcycle_jax.checkpoints import open_checkpoint

WI = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
QUERY = "decoder.block.0.layer.0.SelfAttention.q.weight"
INDEX = "model.safetensors.index.json"


def assert_refused(folder, match, *, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    assert text.isprintable()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "umt5"}, "type 'umt5'; only T5 models .*position table of its own"),
        ({"model_type": "switch_transformers"}, "only T5 models.*Mixture-of-Experts already"),
        ({"model_type": "longt5"}, "only T5 models.*neighbours"),
        ({"model_type": None}, "type None; only T5 models"),
        ({"model_type": ["t5"]}, r"type \['t5'\]; only T5"),
        ({"feed_forward_proj": "gated-relu6"}, "'gated-relu6': this activation is not supported"),
        ({"feed_forward_proj": "gelu-gated"}, "only '<activation>' and 'gated-<activation>'"),
        ({"feed_forward_proj": 3}, "feed_forward_proj is 3: a text belongs there"),
        ({"feed_forward_proj": None}, "gated MLP, but feed_forward_proj .* is 'relu'"),
        ({"feed_forward_proj": "relu"}, "wi_0.weight in model.safetensors belongs to a gated"),
        ({"dense_act_fn": "silu"}, "dense_act_fn is 'silu': feed_forward_proj 'gated-gelu' means"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu': feed_forward_proj 'gated-gelu' means"),
        ({"is_gated_act": False}, "is_gated_act is False"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6'"),
        ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon is -1e-06"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"relative_attention_max_distance": 1.5}, "max_distance is 1.5: an integer belongs there"),
        ({"relative_attention_max_distance": 16}, "32 buckets .* distance 16"),
        ({"relative_attention_num_buckets": 16}, r"has the shape \[32, 2\], \[16, 2\] belongs"),
        ({"num_layers": 1}, "encoder blocks 0, 1 .2 in all., but num_layers in config.json is 1"),
        ({"num_layers": 3}, "num_layers in config.json is 3"),
        ({"num_decoder_layers": 10**9}, "num_decoder_layers in config.json is 1000000000"),
        ({"num_decoder_layers": None}, "num_decoder_layers in config.json is 2"),
        ({"num_layers": -2}, "num_layers is -2: a positive size"),
        ({"num_layers": True}, "num_layers is True: an integer belongs there"),
        ({"vocab_size": 41}, r"weight .* \[40, 12\], \[41, 12\] belongs .*vocab_size 41"),
        ({"d_model": 13}, r"\[40, 13\] belongs there"),
        ({"hidden_size": 13}, "d_model is 12: hidden_size says 13"),
        ({"d_kv": 8}, r"d_kv 8"),
        ({"d_ff": 21}, r"\[21, 12\] belongs there"),
        ({"num_heads": 4}, "num_heads 4"),
        ({"tie_word_embeddings": True}, "lm_head.weight .* differs from shared.weight"),
        ({"tie_word_embeddings": None}, "differs from shared.weight.*is absent, so true"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no': true or false belongs there"),
        ({"model_type": "mt5", "tie_word_embeddings": True}, "no transformers_version"),
        (
            {"model_type": "mt5", "scale_decoder_outputs": True},
            "scale_decoder_outputs is True: transformers computes",
        ),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder is True"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"decoder_start_token_id": 7}, "decoder_start_token_id is 7"),
    ],
)
def test_config_json(tmp_path, t5_folder, config, match):
    t5_folder(tmp_path / "hf", config=config)
    assert_refused(tmp_path / "hf", match)


def renamed(old, new):
    return lambda tensors: {new if name == old else name: v for name, v in tensors.items()}


def added(name, value):
    return lambda tensors: tensors | {name: np.asarray(value, np.float32)}


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (added("classifier.weight", np.ones((2, 2))), "1 tensor has no place in T5: classifier"),
        # A module at another's position: the leaf that it would land on has its tensor already.
        (added("encoder.block.0.layer.2.DenseReluDense.wo.weight", np.ones((12, 20))), "no place"),
        (added("decoder.block.0.layer.0.DenseReluDense.wo.weight", np.ones((12, 20))), "no place"),
        (added("decoder.block.1.layer.1.SelfAttention.q.weight", np.ones((8, 12))), "no place"),
        (added("encoder.block.0.layer.1.EncDecAttention.q.weight", np.ones((8, 12))), "no place"),
        (added("encoder.block.01.layer.0.layer_norm.weight", np.ones(12)), "no place"),
        (
            added(
                "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
                np.ones((32, 2)),
            ),
            r"no place.*block\.1.*\(in model\.safetensors\)",
        ),
        (added("encoder.block.0.layer.0.SelfAttention.q.bias", np.ones(8)), "no place"),
        (added("decoder.block.7.layer.0.layer_norm.weight", np.ones(12)), "0, 1, 2, 7"),
        (added("bad\x1b[31m\nname", np.ones(1)), r"bad\\x1b\[31m\\nname"),
        (added("decoder.block.0.layer.2.DenseReluDense.wi.weight", np.ones((20, 12))), "no place"),
        (renamed(WI, "x"), "no place in T5: x"),
        (lambda t: {name: v for name, v in t.items() if name != WI}, f"lacks 1 .*: {WI}"),
        (lambda t: {n: v for n, v in t.items() if "final" not in n}, "lacks 2 of the model's"),
        (lambda t: {n: v for n, v in t.items() if n != "shared.weight"}, "has no embedding"),
        (lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"}, "has no lm_head.weight"),
        (lambda t: {n: v for n, v in t.items() if "decoder" not in n}, "lacks|decoder blocks"),
        (added(WI, np.ones((12, 20))), rf"{WI} in model.safetensors has the shape \[12, 20\]"),
        (added("shared.weight", np.ones(480)), r"shared.weight .* the shape \[480\]; a matrix"),
        (added("shared.weight", np.ones((0, 12))), r"the shape \[0, 12\]; a matrix"),
        (
            added("encoder.embed_tokens.weight", np.ones((40, 12))),
            "encoder.embed_tokens.weight in model.safetensors should be a copy of shared.weight",
        ),
        (lambda t: t | {WI: t[WI].astype(np.int8)}, f"{WI} in model.safetensors is stored as I8"),
        (
            lambda t: t | {QUERY: t[QUERY].astype(ml_dtypes.float8_e4m3fn)},
            "stored as F8_E4M3; quantised weights are not supported",
        ),
    ],
)
def test_tensors(tmp_path, t5_folder, edit, match):
    t5_folder(tmp_path / "hf", edit=edit)
    assert_refused(tmp_path / "hf", match)


@pytest.fixture
def sharded(tmp_path, t5_folder):
    """A folder of two shards; gives its path, and a function that changes its weight_map."""
    names = sorted(t5_folder(tmp_path / "whole"))
    folder = tmp_path / "hf"
    shards = {
        "model-00001-of-00002.safetensors": names[:30],
        "model-00002-of-00002.safetensors": names[30:],
    }
    t5_folder(folder, shards=shards)
    open_checkpoint(folder)

    def change(edit):
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps({"weight_map": edit(index["weight_map"])}))

    return folder, change


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            lambda m: {n: f for n, f in m.items() if n != "lm_head.weight"},
            "lm_head.weight is in .*safetensors but not in the index",
        ),
        (lambda m: m | {"shared.weight": FIRST}, "places shared.weight in .*lies in"),
        (lambda m: m | {"more.weight": FIRST}, "places more.weight in .*no file has it"),
        (lambda m: {n: f for n, f in m.items() if f == FIRST}, "model-00002.* lies beside"),
        (lambda m: {}, "has no weight_map"),
        (lambda m: sorted(m), "has no weight_map"),
        (lambda m: m | {"shared.weight": 3}, "places shared.weight in 3; only"),
        (lambda m: m | {"shared.weight": None}, "in None; only"),
        (lambda m: m | {"shared.weight": "../secret.safetensors"}, "only a .*folder itself"),
        (lambda m: m | {"shared.weight": "/etc/x.safetensors"}, "only a .*folder itself"),
        (lambda m: m | {"shared.weight": "sub/x.safetensors"}, "only a .*folder itself"),
        (lambda m: m | {"shared.weight": "..\\x.safetensors"}, "only a .*folder itself"),
        (lambda m: m | {"shared.weight": "..safetensors"}, "missing"),
        (lambda m: m | {"shared.weight": "x\0.safetensors"}, "only a .*folder itself"),
        (lambda m: m | {"shared.weight": "config.json"}, "only a .*folder itself"),
        (lambda m: m | {"shared.weight": "absent.safetensors"}, "names absent.safetensors, which"),
    ],
)
def test_index(sharded, edit, match):
    folder, change = sharded
    shutil.copy(folder / FIRST, folder.parent / "secret.safetensors")
    change(edit)
    assert_refused(folder, match)


def test_a_tensor_in_two_shards(sharded, t5_folder):
    folder, _ = sharded
    tensors = t5_folder(folder.parent / "again")
    names = [n for n, f in json.loads((folder / INDEX).read_text())["weight_map"].items()
             if f == SECOND]  # fmt: skip
    lacking = "decoder.block.0.layer.0.layer_norm.weight"
    save_file({name: tensors[name] for name in (*names, lacking)}, folder / SECOND)
    assert_refused(folder, f"{lacking} is in two files, {FIRST} and {SECOND}")


def test_shards_without_their_index_or_beside_a_whole_file(sharded, t5_folder):
    folder, _ = sharded
    shutil.copy(folder.parent / "whole" / "model.safetensors", folder / "model.safetensors")
    assert_refused(folder, "model.safetensors lies beside .* it is not clear which")
    (folder / INDEX).unlink()
    assert_refused(folder, "lies beside model.safetensors")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, f"but no {INDEX}: copy the index too")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_stay_in_the_folder(tmp_path, t5_folder, name):
    t5_folder(tmp_path / "hf")
    (tmp_path / "hf" / name).rename(tmp_path / "hf" / "kept")
    (tmp_path / "hf" / name).symlink_to("kept")
    open_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "kept").rename(tmp_path / "outside")
    (tmp_path / "hf" / name).unlink()
    for target in ("../outside", str(tmp_path / "outside")):
        (tmp_path / "hf" / name).symlink_to(target)
        assert_refused(tmp_path / "hf", "is a link that leaves the folder")
        (tmp_path / "hf" / name).unlink()
    (tmp_path / "hf" / name).symlink_to("gone")
    assert_refused(tmp_path / "hf", f"has no {name}", error=FileNotFoundError)
    (tmp_path / "hf" / name).unlink()
    (tmp_path / "hf" / name).symlink_to(name)  # A loop.
    assert_refused(tmp_path / "hf", "cannot be read")


def test_a_pipe_and_a_folder_are_no_files(tmp_path, t5_folder):
    t5_folder(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "hf" / "model.safetensors")
    assert_refused(tmp_path / "hf", "is no file")
    (tmp_path / "hf" / "config.json").unlink()
    (tmp_path / "hf" / "config.json").mkdir()
    assert_refused(tmp_path / "hf", "config.json is no file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model_type": "t5", "model_type": "mt5"}',
        b'{"d_model": ' + b"9" * 10_000 + b"}",
    ],
    ids=range(10),
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_of_any_content(tmp_path, t5_folder, name, content):
    t5_folder(tmp_path / "hf")
    (tmp_path / "hf" / name).write_bytes(content)
    assert_refused(tmp_path / "hf", f"{name} (is damaged|has no weight_map)")


def test_other_weights(tmp_path, t5_folder):
    t5_folder(tmp_path / "hf")
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    assert_refused(tmp_path / "hf", "holds an adapter")
    (tmp_path / "hf" / "adapter_config.json").unlink()
    whole = (tmp_path / "hf" / "model.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole + b"more", b"", b"\xff" * 8 + whole[8:]):
        (tmp_path / "hf" / "model.safetensors").write_bytes(damaged)
        assert_refused(tmp_path / "hf", r"model\.safetensors is damaged or truncated")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    assert_refused(
        tmp_path / "hf",
        r"only pytorch_model\.bin: pickled weights are not read.*safe_serialization=True",
    )


def test_a_link_beside_the_weights_is_not_followed(tmp_path, t5_folder):
    """A fingerprint of everything below the folder would read what a link leads to."""
    t5_folder(tmp_path / "hf")
    before = open_checkpoint(tmp_path / "hf").fingerprint()
    (tmp_path / "hf" / "loop").symlink_to(tmp_path / "hf")
    assert open_checkpoint(tmp_path / "hf").fingerprint() == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
KEYS = (
    "model_type", "feed_forward_proj", "dense_act_fn", "is_gated_act", "layer_norm_epsilon",
    "relative_attention_num_buckets", "relative_attention_max_distance", "tie_word_embeddings",
    "scale_decoder_outputs", "transformers_version", "vocab_size", "d_model", "hidden_size", "d_kv",
    "num_layers", "num_decoder_layers", "num_heads", "torch_dtype", "architectures", "pruned_heads",
    "is_encoder_decoder", "decoder_start_token_id", "quantization_config",
)  # fmt: skip


@st.composite
def mutations(draw):
    """(file, how): a key of a JSON file with another value, or bytes of a file changed."""
    kind = draw(st.sampled_from(["config", "weight_map", "bytes"]))
    if kind == "config":
        return "config.json", draw(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1))
    if kind == "weight_map":
        path = st.sampled_from([SECOND, f"../{FIRST}", ".", "/dev/zero", "a.safetensors"])
        return INDEX, draw(st.dictionaries(st.just(WI) | st.text(max_size=5), path | JSON))
    file = draw(st.sampled_from(["config.json", INDEX, FIRST]))
    spots = st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=4)
    return file, (draw(spots), draw(st.none() | st.integers(0, 2000)))


@given(mutation=mutations())
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_is_changed_only_our_errors_come_out(sharded, mutation):
    folder, _ = sharded
    file, how = mutation
    kept = (folder / file).read_bytes()
    try:
        if isinstance(how, dict):
            content = json.loads(kept)
            (content["weight_map"] if file == INDEX else content).update(how)
            (folder / file).write_text(json.dumps(content))
        else:
            data = bytearray(kept)
            for spot, value in how[0]:
                data[spot % len(data)] = value
            (folder / file).write_bytes(data[: how[1]])
        try:
            reader = open_checkpoint(folder)
            for name in reader.specs():
                reader.read(name)
            reader.model_settings()
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
            assert str(error).isprintable()
    finally:
        (folder / file).write_bytes(kept)
