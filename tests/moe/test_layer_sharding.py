"""What crosses devices in an MoE layer: every collective of the compiled program, for every router, forward and backward."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from upcycle_jax import trees
from upcycle_jax.moe.config import MoeConfig
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.moe.routing import DroplessTopK, ExpertsChoose, HashTop1, LossFreeTopK, SigmoidTopK, SoftMoe, SwitchTop1, TokensChoose
from upcycle_jax.partitioning import Partitioner

KINDS = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "collective-broadcast")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
ALONE = re.compile(r"replica_groups=(?:\[\d+,1\]<=|\{\{\d+\}(?:,\{\d+\})*\})")
"""Groups of one device each: nothing moves."""
ARRAY = re.compile(r"\w+\[([\d,]*)\]")

BATCH, LENGTH, D, E, HIDDEN = 16, 32, 24, 8, 40
TOKENS = BATCH * LENGTH
KERNELS = 2 * 3 * D * HIDDEN
"""Elements of the kernels of the experts that one device holds, two of eight."""

ROUTERS = [TokensChoose(), ExpertsChoose(), SwitchTop1(), SigmoidTopK(), LossFreeTopK(), HashTop1(), SoftMoe(3)]


def name(router):
    return type(router).__name__


def gathered(router):
    """XLA for CPUs does not divide `top_k`, and gathers what it sorts: a number per token and expert, no token vectors."""
    return {} if isinstance(router, SoftMoe | HashTop1) else {"all-gather for top_k": [TOKENS * E]}


def slots(router):
    """Of all experts and groups: 8 groups of 64 tokens at capacity factor 2; a soft router has 3 per expert and sequence."""
    return BATCH * E * 3 if isinstance(router, SoftMoe) else 2 * TOKENS


def elements(shapes):
    sizes = []
    for dims in ARRAY.findall(shapes):
        size = 1
        for n in dims.split(","):
            size *= int(n or 1)
        sizes.append(size)
    return sum(sizes)


def make_layer(router):
    stack = "encoder" if router.not_causal_because else "decoder"
    return MoeLayer(config=MoeConfig(num_experts=E, group_size=64, **{f"{stack}_router": router}), stack=stack, hidden=HIDDEN)


def collectives(router, *, gradient):
    """By operation: elements per device of each that there is, in the compiled layer (or its gradient) on a mesh of 2 x 4."""
    layer, partitioner = make_layer(router), Partitioner(num_expert_partitions=4)
    ids = jnp.ones((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda key: layer.init(key, jnp.ones((1, 1, D)), token_ids=ids)["params"], jax.random.key(0))
    flat = trees.flatten(boxed)
    assert all(isinstance(b, nn.LogicallyPartitioned) for b in flat.values())
    specs = {path: trees.LeafSpec(b.value.shape, b.value.dtype, b.names) for path, b in flat.items()}
    shardings = partitioner.shardings(specs)
    params = {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[path]) for path, spec in specs.items()}
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, D), jnp.float32, sharding=partitioner.batch_sharding)
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=partitioner.batch_sharding)

    def forward(params, x, ids):
        return layer.apply({"params": params}, x, token_ids=ids)

    def backward(params, x, ids):
        return jax.grad(lambda params, x: jnp.sum(forward(params, x, ids) ** 2), argnums=(0, 1))(params, x)

    with partitioner.activate():
        text = jax.jit(backward if gradient else forward).lower(trees.unflatten(params), x, ids).compile().as_text()
    found = collections.defaultdict(list)
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match and not ALONE.search(line):
            of_top_k = re.search(r'op_name="[^"]*/top_k"', line)
            found[match.group(2) + (" for top_k" if of_top_k else "")].append(elements(match.group(1)))
    return dict(found)


@pytest.mark.parametrize("router", ROUTERS, ids=name)
def test_expert_exchange_is_two_all_to_alls(router):
    # Every slot goes to its expert and comes back.
    assert collectives(router, gradient=False) == {"all-to-all": [slots(router) // 8 * D] * 2} | gathered(router)


@pytest.mark.parametrize("router", [pytest.param(r, marks=[pytest.mark.slow] if i > 1 else [], id=name(r)) for i, r in enumerate(ROUTERS)])
def test_backward_adds_two_all_to_alls_and_the_sums_of_gradients(router):
    found = collectives(router, gradient=True)
    assert found.pop("all-to-all") == [slots(router) // 8 * D] * 4
    # Gradients are summed over replicas: the router's, and each device's share of experts.
    assert sum(found.pop("all-reduce")) == D * router.logit_columns(E) + KERNELS
    assert found == gathered(router)


@pytest.mark.parametrize("gradient", [False, True])
def test_dropless_tokens_are_exchanged_in_blocks(gradient):
    # 64 tokens here, two choices each, four devices: an even share is 32 tokens for each, and a block half of it, 16 for each of four.
    block = 4 * 16
    found = collectives(DroplessTopK(), gradient=gradient)
    found.pop("all-gather for top_k", None)
    # Of one round: vectors, two experts and two weights; and sums back. The number of rounds is a maximum over all devices.
    forward = [block * D, block * (2 + 2), block * D]
    if not gradient:
        assert sorted(found.pop("all-to-all")) == sorted(forward)
        assert found == {"all-reduce": [1]}
        return
    # Gradients of the sums, then those of vectors and weights.
    assert sorted(found.pop("all-to-all")) == sorted([*forward, block * D, block * D, block * 2])
    assert sum(found.pop("all-reduce")) == 1 + D * E + KERNELS
    assert not found
