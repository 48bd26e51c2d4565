"""T5X mode against its rules, written out in NumPy with dispatch masks: grouping, padding,
capacity, positions, losses, metrics.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import LAYER_STATS, MoeLayer
from upcycle_jax.moe.routing import ExpertsChoose, TokensChoose

D, E, HIDDEN = 8, 4, 12


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def masks_of_tokens_choose(p, k, capacity, prioritised):
    """Dispatch mask `[S, E, C]` and choices `[S, K]` of one group."""
    choices = np.argsort(-p, axis=1, kind="stable")[:, :k]
    order = np.argsort(-p.max(axis=1), kind="stable") if prioritised else np.arange(len(p))
    mask, used = np.zeros((len(p), E, capacity)), np.zeros(E, int)
    for j in range(k):
        for token in order:
            expert = choices[token, j]
            if used[expert] < capacity:
                mask[token, expert, used[expert]] = 1
            used[expert] += 1
    return mask, choices


def masks_of_experts_choose(p, capacity):
    mask = np.zeros((len(p), E, capacity))
    for expert in range(E):
        for slot, token in enumerate(np.argsort(-p[:, expert], kind="stable")[:capacity]):
            mask[token, expert, slot] = 1
    return mask


def oracle(x, params, router, *, padding, num_groups, capacity):
    """The layer's output and metrics, by Flaxformer's rules."""
    batch, length, _ = x.shape
    rows, columns = padding
    padded = np.pad(x, ((0, rows), (0, columns), (0, 0)))
    groups = padded.reshape(num_groups, -1, D)
    kernel = params["router"]["router_weights"]["w"]["kernel"]
    wi_0, wi_1, wo = (params["expert"][name]["kernel"] for name in ("wi_0", "wi_1", "wo"))
    outputs, auxiliary, z, left, dispatched, weight = [], [], [], 0, 0, 0.0
    for tokens in groups:
        logits = tokens @ kernel
        p = softmax(logits)
        if isinstance(router, ExpertsChoose):
            mask = masks_of_experts_choose(p, capacity)
            auxiliary.append(0.0)
        else:
            mask, choices = masks_of_tokens_choose(
                p, router.num_selected_experts, capacity, router.batch_prioritized
            )
            chosen = np.zeros_like(p)
            chosen[np.arange(len(p))[:, None], choices] = 1
            auxiliary.append(E**2 * np.mean(chosen.mean(axis=0) * p.mean(axis=0)))
        z.append(np.mean(np.log(np.exp(logits).sum(axis=-1)) ** 2))
        combine = mask * p[:, :, None]
        inputs = np.einsum("sd,sec->ecd", tokens, mask)
        hidden = gelu(np.einsum("ecd,edf->ecf", inputs, wi_0)) * np.einsum(
            "ecd,edf->ecf", inputs, wi_1
        )
        outputs.append(np.einsum("ecf,efd,sec->sd", hidden, wo, combine))
        left += (mask.sum(axis=(1, 2)) == 0).sum()
        dispatched += mask.sum()
        weight += combine.sum()
    y = np.stack(outputs).reshape(padded.shape)[:batch, :length]
    metrics = {
        "auxiliary_loss": np.mean(auxiliary),
        "router_z_loss": np.mean(z),
        "left_behind": left / (num_groups * groups.shape[1]),
        "usage": dispatched / (num_groups * E * capacity),
        "confidence": weight / dispatched,
    }
    return y, metrics


@functools.cache
def _initial_params():
    layer = MoeLayer(MoeSettings(num_experts=E, t5x_mode=True), TokensChoose(), hidden=HIDDEN)
    x = jnp.ones((4, 16, D))
    return nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))["params"]


def initial_params():
    """Of a layer with any of the routers, in either mode, to be changed at will."""
    return jax.tree.map(np.array, _initial_params())


ROUTERS = [
    ExpertsChoose(),
    TokensChoose(),
    TokensChoose(num_selected_experts=1),
    TokensChoose(batch_prioritized=True),
]


# 64 tokens, 2 replicas of 4 experts: 8 groups of 8. Capacity max(round(1.25 * 8 / 4), 2) = 2.
EVEN = ((4, 16), 2, (0, 0), 8, 2)
# 35 tokens, 4 experts: one more column makes 40 = 4 * 10 (5 tokens), one more row 42, three 56 (21
# tokens). Groups of 10; capacity round(3.125) = 3.
UNEVEN = ((5, 7), 1, (0, 1), 4, 3)


# How tokens come to groups does not depend on how they choose: once where experts choose, once
# where tokens do, is enough.
@pytest.mark.parametrize(
    ("router", "shape", "replicas", "padding", "num_groups", "capacity"),
    [
        *(pytest.param(router, *EVEN, id=f"{router}-even") for router in ROUTERS),
        *(pytest.param(router, *UNEVEN, id=f"{router}-uneven") for router in ROUTERS[:2]),
        *(
            pytest.param(router, *UNEVEN, id=f"{router}-uneven", marks=pytest.mark.slow)
            for router in ROUTERS[2:]
        ),
    ],
)
def test_layer_follows_the_rules(router, shape, replicas, padding, num_groups, capacity):
    config = MoeSettings(
        num_experts=E,
        t5x_mode=True,
        num_expert_replicas=replicas,
        eval_expert_capacity_factor=1.25,
        min_expert_capacity=2,
    )
    layer = MoeLayer(config=config, router=router, hidden=HIDDEN)
    x = np.array(jax.random.normal(jax.random.key(1), (*shape, D)))
    # Padding inside the batch: zero vectors, which T5X routes and counts like any token.
    valid = np.arange(shape[1]) < np.linspace(2, shape[1], shape[0]).astype(int)[:, None]
    x = x * valid[..., None]
    params = initial_params()
    params["router"]["router_weights"]["w"]["kernel"] *= 50
    got, variables = jax.jit(
        lambda p, x, v: layer.apply({"params": p}, x, v, mutable=[LAYER_STATS])
    )(params, x, valid)
    report = variables[LAYER_STATS]["stats"]
    want, metrics = oracle(
        x.astype(np.float64),
        jax.tree.map(np.asarray, params),
        router,
        padding=padding,
        num_groups=num_groups,
        capacity=capacity,
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(report.auxiliary_loss, metrics["auxiliary_loss"], rtol=1e-5)
    np.testing.assert_allclose(report.router_z_loss, metrics["router_z_loss"], rtol=1e-5)
    np.testing.assert_allclose(
        report.left_behind / report.tokens, metrics["left_behind"], rtol=1e-5
    )
    np.testing.assert_allclose(jnp.sum(report.load) / report.capacity, metrics["usage"], rtol=1e-5)
    np.testing.assert_allclose(
        report.weight / jnp.sum(report.load), metrics["confidence"], rtol=1e-5
    )


def test_default_losses_leave_padding_out_and_t5x_mode_does_not():
    x = np.array(jax.random.normal(jax.random.key(1), (4, 8, D)))
    valid = np.arange(8) < np.array([8, 3, 5, 1])[:, None]
    x = x * valid[..., None]
    losses = {}
    for t5x_mode in (False, True):
        config = MoeSettings(
            num_experts=E,
            t5x_mode=t5x_mode,
            eval_expert_capacity_factor=4.0,
        )
        layer = MoeLayer(config=config, router=TokensChoose(), hidden=HIDDEN)
        params = initial_params()
        params["router"]["router_weights"]["w"]["kernel"] *= 50
        _, variables = jax.jit(
            lambda p, layer=layer: layer.apply({"params": p}, x, valid, mutable=[LAYER_STATS])
        )(params)
        losses[t5x_mode] = variables[LAYER_STATS]["stats"].router_z_loss
        logits = x[valid] @ np.asarray(params["router"]["router_weights"]["w"]["kernel"])
    real = np.log(np.exp(logits).sum(axis=-1)) ** 2
    np.testing.assert_allclose(losses[False], real.mean(), rtol=1e-5)
    # 17 real tokens; the other 15 of 32 have logits 0, so (log 4)^2.
    np.testing.assert_allclose(losses[True], (real.sum() + 15 * np.log(4) ** 2) / 32, rtol=1e-5)
