"""MoE layers against those of transformers on the same numbers: both orders of softmax and top-k,
with and without renormalisation, shared experts with a gate; and its load-balancing loss.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.moe import losses
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import LAYER_STATS, MoeLayer
from upcycle_jax.moe.routing import DroplessTopK, TokensChoose

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

D, F, E, K, SHARED = 12, 20, 6, 3, 8
BEFORE, AFTER = (
    DroplessTopK(num_selected_experts=K, softmax_order=order)
    for order in ("before_top_k", "after_top_k")
)
RENORMALISED = DroplessTopK(num_selected_experts=K, renormalize=True)
WITH_SLOTS = TokensChoose(num_selected_experts=K, renormalize=True)
COMMON = {"hidden_size": D, "num_experts_per_tok": K, "hidden_act": "silu"}
NARROW = {"moe_intermediate_size": F, "num_experts": E}
QWEN2 = {**NARROW, "shared_expert_intermediate_size": SHARED}
WIDE = {"intermediate_size": F, "num_local_experts": E}
OLMO = {"intermediate_size": F, "num_experts": E}
BLOCKS = {
    "mixtral is softmax after top-k": ("mixtral.MixtralSparseMoeBlock", WIDE, AFTER),
    "mixtral is renormalised": ("mixtral.MixtralSparseMoeBlock", WIDE, RENORMALISED),
    "mixtral with slots": ("mixtral.MixtralSparseMoeBlock", WIDE, WITH_SLOTS),
    "qwen2": ("qwen2_moe.Qwen2MoeSparseMoeBlock", {**QWEN2, "norm_topk_prob": False}, BEFORE),
    "qwen2, renormalised": (
        "qwen2_moe.Qwen2MoeSparseMoeBlock",
        {**QWEN2, "norm_topk_prob": True},
        RENORMALISED,
    ),
    "qwen3": ("qwen3_moe.Qwen3MoeSparseMoeBlock", {**NARROW, "norm_topk_prob": False}, BEFORE),
    "qwen3, renormalised": (
        "qwen3_moe.Qwen3MoeSparseMoeBlock",
        {**NARROW, "norm_topk_prob": True},
        RENORMALISED,
    ),
    "olmoe": ("olmoe.OlmoeSparseMoeBlock", {**OLMO, "norm_topk_prob": False}, BEFORE),
    "flex_olmo": (
        "flex_olmo.FlexOlmoSparseMoeBlock",
        {**OLMO, "norm_topk_prob": True},
        RENORMALISED,
    ),
    "granite": ("granitemoe.GraniteMoeMoE", WIDE, AFTER),
}


def block_of(name, settings):
    """A block with random parameters."""
    family, kind = name.split(".")
    models = importlib.import_module(f"transformers.models.{family}")
    config = getattr(models, f"{kind.removesuffix('SparseMoeBlock').removesuffix('MoE')}Config")
    if not hasattr(models, kind):
        models = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    block = getattr(models, kind)(config(**COMMON, **settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(std=D**-0.5, generator=generator)
    return block


def ours(leaves):
    """Arrays of a block under our names: transposed, gate and up apart."""
    out = {}
    for name, leaf in leaves.items():
        match name.split("."):
            case ["gate" | "router", "weight"]:
                out["router/router_weights/w/kernel"] = leaf.T
            case ["experts", "gate_up_proj"]:
                out["expert/wi_0/kernel"] = leaf[:, :F].transpose(0, 2, 1)
                out["expert/wi_1/kernel"] = leaf[:, F:].transpose(0, 2, 1)
            case ["experts", "down_proj"]:
                out["expert/wo/kernel"] = leaf.transpose(0, 2, 1)
            case ["shared_expert_gate", "weight"]:
                out["shared_expert_gate/kernel"] = leaf.T
            case ["shared_expert", part, "weight"]:
                part = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}[part]
                out[f"shared_expert/{part}/kernel"] = leaf.T
            case _:
                raise AssertionError(name)
    return out


SLOW = {"mixtral is renormalised", "qwen2, renormalised", "qwen3", "olmoe", "flex_olmo"}
"""Blocks that are others by another name, or with the weights of another: left to the longer
run.
"""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BLOCKS]
)
def test_outputs_and_gradients_are_those_of_transformers(name):
    kind, settings, router = BLOCKS[name]
    block, rng = block_of(kind, settings), np.random.default_rng(1)
    x, target = rng.normal(size=(2, 2, 16, D)).astype(np.float32)
    given = torch.tensor(x, requires_grad=True)
    want = block(given)
    torch.sum(want * torch.tensor(target)).backward()
    gradients = {name: leaf.grad.numpy() for name, leaf in block.named_parameters()}

    moe = MoeSettings(
        num_experts=E,
        train_expert_capacity_factor=float(E),
        shared_expert_mlp_dim=SHARED if "qwen2" in kind else None,
        shared_expert_gate="qwen2" in kind,
    )
    layer = MoeLayer(moe, router, F, ("silu", "linear"))

    def loss(params, x):
        y, _ = layer.apply({"params": params}, x, train=True, mutable=[LAYER_STATS])
        return jnp.sum(y * target), y

    params = ours({name: leaf.detach().numpy() for name, leaf in block.named_parameters()})
    nested = trees.unflatten({path: jnp.asarray(leaf) for path, leaf in params.items()})
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), (of_params, of_x) = run(nested, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(y, want.detach().numpy())
    close(of_x, given.grad.numpy(), atol=2e-5)
    found = trees.flatten(of_params)
    for path, leaf in ours(gradients).items():
        close(found[path], leaf, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_joint_balancing_loss_is_that_of_transformers(layers):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng = np.random.default_rng(2)
    logits = rng.normal(size=(layers, 40, E)).astype(np.float32)
    want = float(load_balancing_loss_func(tuple(torch.tensor(logits)), E, K))
    chosen, probability, of_layers = np.zeros(E, np.float32), np.zeros(E, np.float32), []
    for of_layer in logits:
        probabilities = jax.nn.softmax(jnp.asarray(of_layer), axis=-1)
        _, expert = jax.lax.top_k(probabilities, K)
        chosen += np.bincount(np.asarray(expert).ravel(), minlength=E)
        probability += np.asarray(probabilities).sum(axis=0)
        one = losses.load_balancing_loss(
            probabilities, expert, counted=jnp.ones(40), count=jnp.float32(40)
        )
        of_layers.append(float(one))
    joint = losses.joint_load_balancing_loss(chosen, probability, jnp.float32(layers * 40))
    np.testing.assert_allclose(joint, want, rtol=1e-6)
    # One layer: the same number. Several: another one, in the same scale.
    assert (abs(np.mean(of_layers) - want) < 1e-6 * want) == (layers == 1)
    np.testing.assert_allclose(np.mean(of_layers), want, rtol=0.1)
