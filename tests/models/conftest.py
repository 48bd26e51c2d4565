"""A tiny model and batches for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.moe.routing import ExpertsChoose, TokensChoose


@pytest.fixture
def ample():
    """MoE settings under which nothing is dropped and weights sum to 1: 4 experts, each with room
    for every token.
    """
    return {
        "num_experts": 4,
        "encoder_router": ExpertsChoose(renormalize=True),
        "decoder_router": TokensChoose(renormalize=True),
        "train_expert_capacity_factor": 4.0,
        "eval_expert_capacity_factor": 4.0,
    }


@pytest.fixture
def single(tiny):
    """As `tiny`, with one layer per stack (an MoE layer where there are MoE settings): half the
    compile time.
    """

    def make(*, model=None, **moe):
        shallow = {"num_encoder_layers": 1, "num_decoder_layers": 1} | (model or {})
        return tiny(
            model=shallow,
            **({"encoder_sparse_layout": (0,), "decoder_sparse_layout": (0,)} | moe if moe else {}),
        )

    return make


@pytest.fixture(scope="session")
def make_params():
    """Random parameters drawn with NumPy, which needs no compilation: kernels keep their input's
    scale, router logits have std about 1.
    """

    def make(model, seed=0):
        rng = np.random.default_rng(seed)
        params = {}
        for path, leaf in model.param_specs().items():
            if path.endswith("scale"):
                value = 1 + 0.1 * rng.normal(size=leaf.shape)
            else:
                fan_in = 1 if path.endswith("embedding") or len(leaf.shape) == 1 else leaf.shape[-2]
                value = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
            params[path] = jnp.asarray(value, jnp.float32)
        return trees.unflatten(params)

    return make


@pytest.fixture(scope="session")
def make_batch():
    """Makes batches of random tokens; with `lengths`, row i has lengths[i] real tokens on both
    sides and padding after them.
    """

    def make(batch_size=4, inputs=12, targets=8, *, lengths=None, seed=0, vocab_size=64):
        rng = np.random.default_rng(seed)
        encoder = rng.integers(1, vocab_size, (batch_size, inputs))
        decoder = rng.integers(1, vocab_size, (batch_size, targets))
        if lengths is not None:
            encoder *= np.arange(inputs) < np.asarray(lengths)[:, None]
            decoder *= np.arange(targets) < np.asarray(lengths)[:, None]
        shifted = np.pad(decoder, ((0, 0), (1, 0)))[:, :-1]
        return {
            "encoder_input_tokens": jnp.asarray(encoder, jnp.int32),
            "decoder_input_tokens": jnp.asarray(shifted, jnp.int32),
            "decoder_target_tokens": jnp.asarray(decoder, jnp.int32),
            "decoder_loss_weights": jnp.asarray(decoder > 0, jnp.int32),
        }

    return make


@pytest.fixture
def copy_into_experts():
    """Dense parameters with each MLP of the MoE model's sparse layers copied into all of its
    experts, and the routers of `moe_params`.
    """

    def copy(dense_params, moe_params):
        dense, out = trees.flatten(dense_params), {}
        for path, leaf in trees.flatten(moe_params).items():
            if "/router/" in path:
                out[path] = leaf
            elif "/mlp/expert/" in path:
                out[path] = jnp.broadcast_to(dense[path.replace("/expert/", "/")], leaf.shape)
            else:
                out[path] = dense[path]
        return trees.unflatten(out)

    return copy


@pytest.fixture
def key():
    return jax.random.key(0)
