"""The network against a NumPy forward pass of each family, which was written apart from it and
agrees with transformers, and against itself where two ways must give one result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from tests.models.decoder.kinds import KINDS, OTHERS, config, random_params
from upcycle_jax import trees
from upcycle_jax.models.decoder.model import DecoderModel

_TYPES = {"llama3": "llama", "yarn": "llama", "linear": "llama", "gemma3": "gemma3_text"}
_LAYER_TYPES = {"full": "full_attention", "sliding": "sliding_attention"}
_MODULES = {
    "self_attention/query": "self_attn.q_proj",
    "self_attention/key": "self_attn.k_proj",
    "self_attention/value": "self_attn.v_proj",
    "self_attention/out": "self_attn.o_proj",
    "self_attention/query_norm": "self_attn.q_norm",
    "self_attention/key_norm": "self_attn.k_norm",
    "mlp/wi_0": "mlp.gate_proj",
    "mlp/wi_1": "mlp.up_proj",
    "mlp/wo": "mlp.down_proj",
    "mlp/router/router_weights/w": "block_sparse_moe.gate",
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
    "post_mlp_layer_norm": "post_feedforward_layernorm",
}
_EXPERT = {"wi_0": "w1", "wi_1": "w3", "wo": "w2"}


def logits_of(model):
    """Compiled: parameters, tokens, segment ids and positions to logits."""
    return jax.jit(model.token_logits)


def settings(kind, config):
    """The config.json that states `config` to the oracle."""
    gelu = config.mlp_activations[0] == "gelu"
    out = {
        "model_type": _TYPES.get(kind, kind),
        "hidden_size": config.emb_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_layers,
        "hidden_act": "gelu_pytorch_tanh" if gelu else "silu",
        "rms_norm_eps": config.norm_epsilon,
        "sliding_window": config.sliding_window,
        "layer_types": [_LAYER_TYPES[config.layer_type(i)] for i in range(config.num_layers)],
        "rope_theta": config.rope.theta,
        "clip_qkv": config.clip_qkv,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
        "query_pre_attn_scalar": config.logit_scale**-2,
        "attention_multiplier": config.logit_scale,
        "residual_multiplier": config.residual_multiplier,
        "embedding_multiplier": config.embedding_multiplier,
        "logits_scaling": config.logits_divisor,
        "no_rope_layers": [int(config.layer_rope(i) is not None) for i in range(config.num_layers)],
        "num_experts_per_tok": 2,
    }
    if config.rope.kind != "default":
        out["rope_scaling"] = {
            "rope_type": config.rope.kind,
            "factor": config.rope.factor,
            "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_length,
        }
    if config.sliding_rope is not None:
        out["rope_local_base_freq"] = config.sliding_rope.theta
    return out


def tensors(params, config):
    """Parameters by path as the tensors that the oracle reads."""
    pre_mlp = "post_attention" if config.norm_place == "pre" else "pre_feedforward"
    modules = _MODULES | {"pre_mlp_layer_norm": f"{pre_mlp}_layernorm"}
    out = {}
    for path, value in params.items():
        value = value.astype(np.float64)
        if path == "token_embedder/embedding":
            out["model.embed_tokens.weight"] = value
        elif path == "decoder/decoder_norm/scale":
            out["model.norm.weight"] = value
        elif path == "decoder/logits_dense/kernel":
            out["lm_head.weight"] = value.T
        else:
            _, layer, rest = path.split("/", 2)
            start = f"model.layers.{layer.removeprefix('layers_')}."
            module, _, leaf = rest.rpartition("/")
            suffix = "bias" if leaf == "bias" else "weight"
            if module.startswith("mlp/expert/"):
                for expert, kernel in enumerate(value):
                    name = f"experts.{expert}.{_EXPERT[module.rsplit('/', 1)[-1]]}"
                    out[f"{start}block_sparse_moe.{name}.weight"] = kernel.T
            else:
                out[f"{start}{modules[module]}.{suffix}"] = value.T
    return out


@pytest.fixture(scope="module")
def oracle():
    return oracles.load("reference_forward")


def shallow(kind):
    """The config of a kind, with two layers where all of them are alike."""
    whole = config(kind)
    if len(set(whole.layer_types)) > 1 or whole.no_rope_layers:
        return whole
    return dataclasses.replace(whole, num_layers=2, layer_types=whole.layer_types[:2])


@functools.cache
def compiled(kind):
    """A model, its parameters by path, and `logits_of` it: tests that ask for logits of one shape
    share a program.
    """
    model = DecoderModel(shallow(kind))
    return model, random_params(model), logits_of(model)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_oracles(kind, oracle, monkeypatch):
    model, params, logits = compiled(kind)
    tokens = np.random.default_rng(1).integers(0, 50, (1, 17), np.int32)
    given = settings(kind, model.config), tensors(params, model.config)
    monkeypatch.setattr(oracle, "load", lambda folder: given)
    expected = oracle.forward("", tokens[0])
    found = logits(trees.unflatten(params), tokens)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    # The model uses what the oracle was given: another window or rope would show.
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_later_tokens_change_nothing_before_them(kind):
    _, params, logits = compiled(kind)
    apply = functools.partial(logits, trees.unflatten(params))
    tokens = np.random.default_rng(2).integers(0, 50, (1, 17), np.int32)
    changed = tokens.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    before, after = apply(tokens)[0], apply(changed)[0]
    np.testing.assert_allclose(after[:7], before[:7], atol=1e-5, rtol=0)
    assert np.abs(after[7:] - before[7:]).max() > 1e-3


# Windows of all layers go the way of those of some.
@pytest.mark.parametrize(
    "kind",
    ["llama", pytest.param("mistral", marks=pytest.mark.slow), "gemma2", "gpt_neox", "mixtral"],
)
def test_a_packed_row_gives_what_its_sequences_give_alone(kind):
    model = DecoderModel(shallow(kind))
    params = trees.unflatten(random_params(model))
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 50, 7, np.int32), rng.integers(0, 50, 6, np.int32)
    # 7 tokens, 6 tokens, 3 of padding: token 0 in place of padding's would be an ordinary one.
    row = np.concatenate([first, second, [0, 0, 0]]).astype(np.int32)[None]
    segments = np.repeat([1, 2, 0], [7, 6, 3]).astype(np.int32)[None]
    positions = np.concatenate([np.arange(7), np.arange(6), np.zeros(3)]).astype(np.int32)[None]
    apply = logits_of(model)
    packed = apply(params, row, segments, positions)[0]
    alone = apply(params, np.pad(np.stack([first, np.pad(second, (0, 1))]), ((0, 0), (0, 9))))
    np.testing.assert_allclose(packed[:7], alone[0, :7], atol=1e-4, rtol=0)
    np.testing.assert_allclose(packed[7:13], alone[1, :6], atol=1e-4, rtol=0)


def test_padding_takes_no_expert_capacity():
    # 4 experts, K = 2, C = round(1.0 * 32 / 4) = 8 slots of each; with a row of padding routed
    # first, its 16 zero-like tokens would fill experts.
    settings = config("capacity")
    model = DecoderModel(settings)
    params = trees.unflatten(random_params(model))
    tokens = np.random.default_rng(4).integers(0, 50, (2, 16), np.int32)
    segments = np.ones((2, 16), np.int32)
    segments[0] = 0
    apply = logits_of(model)
    other = tokens.copy()
    other[0] = (other[0] + 1) % 50
    with_padding = apply(params, tokens, segments, None)[1]
    np.testing.assert_array_equal(with_padding, apply(params, other, segments, None)[1])


@functools.cache
def gradient(kind, **form):
    """By path, of a model in a form: four layers where two kinds of them alternate, or two."""
    settings = dataclasses.replace(config(kind), num_layers=2, layer_types=())
    if config(kind).layer_types:
        # The second and the fourth layer are full and sparse.
        moe = config("capacity").moe
        settings = dataclasses.replace(
            settings,
            num_layers=4,
            layer_types=("sliding", "full") * 2,
            moe=dataclasses.replace(moe, sparse_layout=(1, 3)),
        )
    settings = dataclasses.replace(settings, **form)
    model = DecoderModel(settings)
    params = jax.tree.map(jnp.asarray, trees.unflatten(random_params(model)))
    batch = model.features.random(50, batch_size=2, length=16)
    denominator = model.loss_denominator(batch)
    loss = lambda p: model.loss_fn(p, batch, None, denominator=denominator)[0]
    return trees.flatten(jax.jit(jax.grad(loss))(params))


FORMS = [
    {"scan_layers": True, "remat_policy": "minimal"},
    {"scan_layers": True},
    {"remat_policy": "full"},
]


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        # Both at once with layers that differ in all they can, each by itself with layers that are
        # alike, in every run.
        pytest.param(
            kind,
            form,
            marks=[] if (kind, len(form)) in (("gemma3", 2), ("gpt_neox", 1)) else pytest.mark.slow,
        )
        for kind in ("gemma3", "capacity", "gpt_neox")
        for form in FORMS
    ],
    ids=str,
)
def test_scan_and_remat_change_no_gradient(kind, form):
    expected = gradient(kind)
    for path, leaf in gradient(kind, **form).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, rtol=1e-5, err_msg=path)
