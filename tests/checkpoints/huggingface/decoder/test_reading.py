"""Folders of decoder-only models that transformers writes: every tensor has its leaf, and the model
that config.json states computes the same logits and gradients from them.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import upcycle_jax as uj
from tests.checkpoints.huggingface.decoder import oracle
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.huggingface.decoder.tensors import tensor_shapes
from upcycle_jax.models.decoder.from_specs import from_specs
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.partitioning import Partitioner

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12))
# Of separate and of fused tensors, and of experts; the others' are left to the longer run.
WITH_GRADIENTS = ("llama with biases", "gpt_neox", "qwen2_moe")


def read_params(reader):
    return trees.unflatten(
        {name.removeprefix("target/"): reader.read(name) for name in reader.specs()}
    )


def logits_and_gradients(config, params):
    """Float32 logits after `TOKENS`, and the gradients of the mean loss of predicting each next
    one, by path.
    """
    model = DecoderModel(config)

    def loss(params):
        logits = model.token_logits(params, TOKENS)
        chosen = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(chosen, TOKENS[:, 1:, None], axis=-1)
        return -picked.mean(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(logits), trees.flatten(gradients)


def logits(config, params):
    model = DecoderModel(config)
    return np.asarray(jax.jit(lambda p: model.token_logits(p, TOKENS))(params))


def shapes(config):
    """Shape of every parameter of the model, by path."""
    return {path: spec.shape for path, spec in DecoderModel(config).param_specs().items()}


@pytest.mark.parametrize(
    "name",
    [
        # The same with a shared expert stays.
        pytest.param(name, marks=pytest.mark.slow) if name == "granitemoe" else name
        for name in oracle.CASES
    ],
)
def test_logits_of_every_type(written, tmp_path, name):
    theirs, folder = written(name)
    reader = open_checkpoint(folder)
    config, params = reader.model_config(), read_params(reader)
    stored = load_file(folder / "model.safetensors")
    found = tensor_shapes(oracle.CASES[name][0], config)
    assert found == {tensor: value.shape for tensor, value in stored.items()}
    assert {path: leaf.shape for path, leaf in trees.flatten(params).items()} == shapes(config)
    # Nothing is left out and nothing counted twice.
    numbers = sum(p.numel() for p in theirs.parameters())
    assert sum(spec.size for spec in reader.specs().values()) == numbers
    assert reader.model_settings() == config.forward_settings
    want = oracle.logits_of(theirs, TOKENS)
    if name in WITH_GRADIENTS:
        ours, gradients = logits_and_gradients(config, params)
        assert_gradients(gradients, gradients_of(theirs, tmp_path))
    else:
        ours = logits(config, params)
    np.testing.assert_allclose(ours, want, atol=1e-4)
    if oracle.CASES[name][0] not in oracle.NOT_IN_REFERENCE:
        reference = oracle.reference().forward(str(folder), TOKENS[0])
        np.testing.assert_allclose(ours[0], reference, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in oracle.CASES if name not in WITH_GRADIENTS])
def test_gradients_of_every_other_type(written, tmp_path, name):
    theirs, folder = written(name)
    reader = open_checkpoint(folder)
    _, gradients = logits_and_gradients(reader.model_config(), read_params(reader))
    assert_gradients(gradients, gradients_of(theirs, tmp_path))


def assert_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_allclose(value, theirs[path], atol=1e-4, err_msg=path)


def test_the_loss_that_transformers_trains_an_moe_with(written):
    """Cross-entropy, and `router_aux_loss_coef` times what balances experts."""
    torch, _ = oracle.torch_and_transformers()
    theirs, folder = written("qwen3_moe")
    reader = open_checkpoint(folder)
    model = uj.build_model(str(folder))
    next_tokens = np.roll(TOKENS, -1, axis=1)
    weights = np.ones_like(TOKENS)
    weights[:, -1] = 0  # Nothing follows the last one.
    batch = {
        "decoder_input_tokens": TOKENS,
        "decoder_target_tokens": next_tokens,
        "decoder_loss_weights": weights,
        "decoder_segment_ids": np.ones_like(TOKENS),
        "decoder_positions": np.tile(np.arange(TOKENS.shape[1]), (2, 1)),
    }

    @jax.jit
    def loss(params):
        denominator = model.loss_denominator(batch)
        return model.loss_fn(params, batch, None, denominator=denominator)[0]

    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        plain = theirs(tokens, labels=tokens, output_router_logits=False).loss.item()
        balanced = theirs(tokens, labels=tokens, output_router_logits=True).loss.item()
    assert balanced - plain > 1e-3
    assert float(loss(read_params(reader))) == pytest.approx(balanced, abs=1e-5)


def gradients_of(model, tmp_path):
    """Torch's gradients, read as the leaves of a folder in which they stand for the tensors: what
    is behind a leaf is no arithmetic, so its gradient has the same way.
    """
    torch, _ = oracle.torch_and_transformers()
    tokens = torch.tensor(TOKENS)
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
        model.save_pretrained(tmp_path / "gradients")
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return trees.flatten(read_params(open_checkpoint(tmp_path / "gradients")))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granitemoeshared", "gpt_neox"])
def test_names_that_transformers_5_has_in_memory(written, tmp_path, name):
    model, folder = written(name)
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    assert_equal_leaves(open_checkpoint(tmp_path / "memory"), open_checkpoint(folder))
    one, other = (load_file(place / "model.safetensors") for place in (tmp_path / "memory", folder))
    assert one.keys() != other.keys()


def assert_equal_leaves(one, other):
    assert one.specs() == other.specs()
    for name in one.specs():
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)


@pytest.mark.parametrize("name", ["qwen2", "llama with biases", "gemma"])
def test_a_tied_model_saved_without_its_head(written, tmp_path, name):
    """Its tensors have no 'model.' before their names."""
    model, folder = written(name)
    model.base_model.save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
    assert_equal_leaves(open_checkpoint(tmp_path / "base"), open_checkpoint(folder))


def test_an_untied_model_saved_without_its_head_is_refused(written, tmp_path):
    model, _ = written("mistral")
    model.base_model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"has no lm_head.weight, but .*saved without its head"):
        open_checkpoint(tmp_path / "base")


def edited(folder, target, edit, **config):
    """A copy of a folder with other tensors."""
    oracle.rewritten(folder, target, **config)
    tensors = edit(load_file(target / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_copies_of_a_tied_embedding(written, tmp_path):
    folder = written("qwen2")[1]
    table = "model.embed_tokens.weight"
    plain = open_checkpoint(folder)
    copied = edited(folder, tmp_path / "copied", lambda t: t | {"lm_head.weight": t[table]})
    assert_equal_leaves(open_checkpoint(copied), plain)
    named = edited(folder, tmp_path / "named", lambda t: t | {"lm_head.weight": t.pop(table)})
    assert_equal_leaves(open_checkpoint(named), plain)
    other = edited(folder, tmp_path / "other", lambda t: t | {"lm_head.weight": 2 * t[table]})
    with pytest.raises(ValueError, match=r"lm_head.weight .* differs from model.embed_tokens"):
        open_checkpoint(other)


def test_tables_that_older_versions_stored_are_left_out(written, tmp_path):
    folder = written("gpt_neox")[1]
    more = {
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), np.uint8),
        "gpt_neox.layers.0.attention.masked_bias": np.full((), -1e9, np.float32),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    old = edited(folder, tmp_path / "old", lambda t: t | more)
    assert_equal_leaves(open_checkpoint(old), open_checkpoint(folder))


def test_a_shared_expert_without_units(written, tmp_path):
    """An exact Qwen2-MoE of a dense Qwen2 may have one; it adds nothing."""
    kind, settings = oracle.CASES["qwen2_moe"]
    settings = settings | {"shared_expert_intermediate_size": 0}
    model = oracle.random_model(kind, settings)
    model.save_pretrained(tmp_path / "empty")
    reader = open_checkpoint(tmp_path / "empty")
    assert reader.model_config().moe.shared_expert_mlp_dim is None
    ours = logits(reader.model_config(), read_params(reader))
    np.testing.assert_allclose(ours, oracle.logits_of(model, TOKENS), atol=1e-4)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_dtypes_keep_their_bits(written, tmp_path, dtype):
    folder = written("granitemoe")[1]
    narrow = edited(
        folder, tmp_path / "narrow", lambda t: {name: x.astype(dtype) for name, x in t.items()}
    )
    reader, wide = open_checkpoint(narrow), open_checkpoint(folder)
    for name, spec in reader.specs().items():
        assert spec.dtype == dtype
        np.testing.assert_array_equal(
            reader.read(name).view(np.uint16), wide.read(name).astype(dtype).view(np.uint16)
        )


@pytest.mark.parametrize("name", ["mixtral", "phi3", "gpt_neox", "granitemoeshared"])
def test_shards_and_parts_of_leaves(written, tmp_path, name):
    model, folder = written(name)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    reader, whole = open_checkpoint(tmp_path / "shards"), open_checkpoint(folder)
    assert_equal_leaves(reader, whole)
    for leaf, spec in reader.specs().items():
        part = tuple(slice(n // 3, n - n // 4) for n in spec.shape)
        np.testing.assert_array_equal(reader.read(leaf, part), whole.read(leaf)[part])


def test_what_a_config_states_is_what_its_leaves_imply(written):
    """A dense folder gives the same model by its shapes and settings alone."""
    for name in ("llama with biases", "gemma2", "gpt_neox", "olmo3"):
        reader = open_checkpoint(written(name)[1])
        inferred = from_specs(reader.specs(), reader.model_settings())
        assert inferred == reader.model_config()


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_a_folder_alone_is_a_model_and_its_parameters(written, name):
    """Each device gets its part of experts that are tensors of their own, and of fused heads."""
    folder = written(name)[1]
    model = uj.build_model(str(folder))
    reader = open_checkpoint(folder)
    assert model.config == reader.model_config()
    partitioner = Partitioner(num_expert_partitions=4, num_model_partitions=2)
    params = trees.flatten(uj.load_params(folder, model, partitioner=partitioner))
    for path, value in trees.flatten(read_params(reader)).items():
        np.testing.assert_array_equal(params[path], value)
    with pytest.raises(ValueError, match="is a checkpoint, which knows no macros .got NUM_EXPERTS"):
        uj.build_model(str(folder), NUM_EXPERTS=8)


def test_weights_that_are_no_numbers_are_named(written, tmp_path):
    def damage(tensors):
        tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][3, 5] = np.nan
        return tensors

    folder = edited(written("mixtral")[1], tmp_path / "damaged", damage)
    leaf = "target/decoder/layers_1/mlp/expert/wi_1/kernel"
    with pytest.raises(ValueError, match=f"{leaf} has 1 NaN or infinite"):
        uj.load_params(folder, uj.build_model(str(folder)))
