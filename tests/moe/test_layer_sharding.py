"""What crosses devices in an MoE layer: every collective of the compiled program, for every router,
forward and backward.
"""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import LAYER_STATS, MoeLayer
from upcycle_jax.moe.routing import (
    DroplessTopK,
    ExpertsChoose,
    HashTop1,
    LossFreeTopK,
    SigmoidTopK,
    SoftMoe,
    SwitchTop1,
    TokensChoose,
)
from upcycle_jax.partitioning import Partitioner

KINDS = (
    "all-to-all",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
ALONE = re.compile(r"replica_groups=(?:\[\d+,1\]<=|\{\{\d+\}(?:,\{\d+\})*\})")
"""Groups of one device each: nothing moves."""
ARRAY = re.compile(r"\w+\[([\d,]*)\]")

BATCH, LENGTH, D, E, HIDDEN = 16, 32, 24, 8, 40
TOKENS = BATCH * LENGTH
KERNELS = 2 * 3 * D * HIDDEN
"""Elements of the kernels of the experts that one device holds, two of eight."""

ROUTERS = [
    TokensChoose(),
    ExpertsChoose(),
    SwitchTop1(),
    SigmoidTopK(),
    LossFreeTopK(),
    HashTop1(),
    SoftMoe(3),
]


def name(router):
    return type(router).__name__


def slots(router):
    """Of all experts and groups: 8 groups of 64 tokens at capacity factor 2; a soft router has 3
    per expert and sequence.
    """
    return BATCH * E * 3 if isinstance(router, SoftMoe) else 2 * TOKENS


def elements(shapes):
    sizes = []
    for dims in ARRAY.findall(shapes):
        size = 1
        for n in dims.split(","):
            size *= int(n or 1)
        sizes.append(size)
    return sum(sizes)


def make_layer(router, **settings):
    config = MoeSettings(**{"num_experts": E, "group_size": 64} | settings)
    return MoeLayer(config=config, router=router, hidden=HIDDEN)


def collectives(router, *, gradient, reports=False, **settings):
    """By operation: elements per device of each that there is, in the compiled layer (or its
    gradient) on a mesh of 2 x 4.

    With `reports` those of the layer's report, or of the gradients of its losses, too.
    """
    layer, partitioner = make_layer(router, **settings), Partitioner(num_expert_partitions=4)
    ids = jnp.ones((1, 1), jnp.int32)
    boxed = jax.eval_shape(
        lambda key: layer.init(key, jnp.ones((1, 1, D)), token_ids=ids)["params"], jax.random.key(0)
    )
    flat = trees.flatten(boxed)
    assert all(isinstance(b, nn.LogicallyPartitioned) for b in flat.values())
    specs = {
        path: trees.LeafSpec(b.value.shape, b.value.dtype, b.names) for path, b in flat.items()
    }
    shardings = partitioner.shardings(specs)
    params = {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[path])
        for path, spec in specs.items()
    }
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, D), jnp.float32, sharding=partitioner.batch_sharding)
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=partitioner.batch_sharding)

    def forward(params, x, ids):
        y, sown = layer.apply({"params": params}, x, token_ids=ids, mutable=[LAYER_STATS])
        return (y, sown[LAYER_STATS]["stats"]) if reports else (y, None)

    def backward(params, x, ids):
        def loss(params, x):
            y, report = forward(params, x, ids)
            return jnp.sum(y**2) + (
                report.auxiliary_loss + report.router_z_loss if reports else 0.0
            )

        return jax.grad(loss, argnums=(0, 1))(params, x)

    with partitioner.activate():
        text = (
            jax.jit(backward if gradient else forward)
            .lower(trees.unflatten(params), x, ids)
            .compile()
            .as_text()
        )
    found = collections.defaultdict(list)
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match and not ALONE.search(line):
            found[match.group(2)].append(elements(match.group(1)))
    return dict(found)


@pytest.mark.parametrize("router", ROUTERS, ids=name)
def test_expert_exchange_is_two_all_to_alls(router):
    # Every slot goes to its expert and comes back. Routing stays where the tokens are.
    assert collectives(router, gradient=False) == {"all-to-all": [slots(router) // 8 * D] * 2}


@pytest.mark.parametrize(
    "router",
    [
        pytest.param(r, marks=[pytest.mark.slow] if i > 1 else [], id=name(r))
        for i, r in enumerate(ROUTERS)
    ],
)
def test_backward_adds_two_all_to_alls_and_the_sums_of_gradients(router):
    found = collectives(router, gradient=True)
    assert found.pop("all-to-all") == [slots(router) // 8 * D] * 4
    # Gradients are summed over replicas: the router's, and each device's share of experts.
    assert sum(found.pop("all-reduce")) == D * router.logit_columns(E) + KERNELS
    assert not found


@pytest.mark.parametrize("gradient", [False, True])
def test_reports_and_losses_add_sums_of_a_few_numbers(gradient):
    found = collectives(TokensChoose(), gradient=gradient, reports=True)
    assert found.pop("all-to-all") == [slots(TokensChoose()) // 8 * D] * (4 if gradient else 2)
    # The report has ten numbers and three for every expert. Losses are means over the groups that
    # hold tokens: one number, their count.
    assert sum(found.pop("all-reduce")) == (1 + D * E + KERNELS if gradient else 1 + 10 + 3 * E)
    assert not found


@pytest.mark.parametrize("router", [TokensChoose(), ExpertsChoose()], ids=name)
def test_groups_that_do_not_divide_gather_no_logits(router):
    # Four groups of 128 tokens on eight devices: each group is on one device, tokens come to it and
    # go back, slots are exchanged as ever.
    found = collectives(router, gradient=False, group_size=128)
    per_device = E * 32 * D  # of one group, at capacity factor 2
    assert found["all-to-all"].count(per_device) == 2
    found["all-to-all"] = [n for n in found["all-to-all"] if n != per_device]
    moved = [n for sizes in found.values() for n in sizes]
    # Vectors of d, and one bool per token; logits would be E numbers per token: of one group 1024,
    # of all 4096, neither a multiple of 24.
    assert moved and all(n % D == 0 or n <= TOKENS for n in moved), found


UNEVEN = {
    "12 groups": (TokensChoose(jitter_noise=0.1, noise_std=1.0), 24, {}),
    "4 groups": (ExpertsChoose(renormalize=True), 16, {"group_size": 128}),
    "1 group": (LossFreeTopK(), 16, {"group_size": 512}),
    "3 sequences": (ExpertsChoose(), 3, {"independent": True}),
    "4 groups without capacity": (DroplessTopK(), 16, {"group_size": 128}),
}


# Several groups, fewer than there are devices, and experts that choose, are in other cases, too.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.slow] if c in ("4 groups", "1 group") else [])
        for c in UNEVEN
    ],
)
def test_groups_that_do_not_divide_over_devices_change_nothing(case):
    router, batch, settings = UNEVEN[case]
    layer, partitioner = (
        make_layer(router, **settings).clone(dropout_rate=0.1),
        Partitioner(num_expert_partitions=4),
    )
    draw = np.random.default_rng(0)
    x = draw.normal(size=(batch, LENGTH, D)).astype(np.float32)
    valid = np.arange(LENGTH) < draw.integers(0, LENGTH + 1, (batch, 1))
    specs = jax.eval_shape(
        lambda key: nn.meta.unbox(layer.init(key, x))["params"], jax.random.key(0)
    )
    params = jax.tree.map(lambda spec: draw.normal(size=spec.shape).astype(np.float32) * 0.3, specs)

    def loss(params, x):
        rngs = {"jitter": jax.random.key(1), "dropout": jax.random.key(2)}
        y, sown = layer.apply(
            {"params": params}, x, valid, train=True, rngs=rngs, mutable=[LAYER_STATS]
        )
        report = sown[LAYER_STATS]["stats"]
        return jnp.mean(y**2) + report.auxiliary_loss + report.router_z_loss, (y, report)

    def run():
        return jax.jit(lambda *args: jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*args))(
            params, x
        )

    want = run()
    with partitioner.activate():
        have = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5), want, have)


def test_groups_that_do_not_divide_over_devices_are_said(caplog):
    layer = make_layer(TokensChoose())
    x = jax.ShapeDtypeStruct((28, LENGTH, D), jnp.float32)
    with Partitioner(num_expert_partitions=4).activate():
        jax.eval_shape(lambda key, x: layer.init(key, x, train=True), jax.random.key(0), x)
    # 28 * 32 / 64 = 14 groups, and 2 to reach 16. (Each number of groups is said once in a
    # process.)
    assert (
        "14 groups of 64 tokens on 8 batch shards (data x expert partitions): 2 groups of padding"
        in caplog.text
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_dropless_tokens_are_exchanged_in_blocks(gradient):
    # 64 tokens here, two choices each, four devices: an even share is 32 tokens for each, and a
    # block half of it, 16 for each of four.
    block = 4 * 16
    found = collectives(DroplessTopK(), gradient=gradient)
    # Of one round: vectors, two experts and two weights; and sums back. The number of rounds is a
    # maximum over all devices.
    forward = [block * D, block * (2 + 2), block * D]
    if not gradient:
        assert sorted(found.pop("all-to-all")) == sorted(forward)
        assert found == {"all-reduce": [1]}
        return
    # Gradients of the sums, then those of vectors and weights.
    assert sorted(found.pop("all-to-all")) == sorted([*forward, block * D, block * D, block * 2])
    assert sum(found.pop("all-reduce")) == 1 + D * E + KERNELS
    assert not found
