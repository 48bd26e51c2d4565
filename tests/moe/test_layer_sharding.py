"""What crosses devices in an MoE layer: read from the compiled program."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from upcycle_jax import trees
from upcycle_jax.moe.config import MoeConfig
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.partitioning import Partitioner

COLLECTIVE = re.compile(r"= (.*?) (all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\(")
ARRAY = re.compile(r"\w+\[([\d,]*)\]")

BATCH, LENGTH, D, E, HIDDEN = 16, 32, 24, 8, 40


def elements(shapes):
    sizes = []
    for dims in ARRAY.findall(shapes):
        size = 1
        for n in dims.split(","):
            size *= int(n or 1)
        sizes.append(size)
    return sum(sizes)


def collectives(function, layer, partitioner):
    """(operation, elements per device, name of the source operation) of the compiled function of parameters and tokens."""
    boxed = jax.eval_shape(lambda key: layer.init(key, jnp.ones((1, 1, D)))["params"], jax.random.key(0))
    flat = trees.flatten(boxed)
    shardings = partitioner.shardings({path: trees.LeafSpec(b.value.shape, b.value.dtype, b.names) for path, b in flat.items()})
    params = trees.unflatten(
        {path: jax.ShapeDtypeStruct(b.value.shape, b.value.dtype, sharding=shardings[path]) for path, b in flat.items()}
    )
    assert all(isinstance(b, nn.LogicallyPartitioned) for b in flat.values())
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, D), jnp.float32, sharding=partitioner.batch_sharding)
    with partitioner.activate():
        text = jax.jit(function).lower(params, x).compile().as_text()
    found = []
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            source = re.search(r'op_name="([^"]*)"', line)
            found.append((match.group(2), elements(match.group(1)), source.group(1) if source else ""))
    return found


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_expert_exchange_is_two_all_to_alls(stack):
    layer = MoeLayer(config=MoeConfig(num_experts=E, group_size=64), stack=stack, hidden=HIDDEN)
    partitioner = Partitioner(num_expert_partitions=4)
    found = collectives(lambda params, x: layer.apply({"params": params}, x), layer, partitioner)
    counts = collections.Counter(operation for operation, _, _ in found)
    assert counts["all-to-all"] == 2, found
    others = [entry for entry in found if entry[0] != "all-to-all"]
    # 512 tokens with 2 slots each over 8 devices: each exchange moves 128 vectors per device.
    assert {size for operation, size, _ in found if operation == "all-to-all"} == {2 * BATCH * LENGTH // 8 * D}
    # Besides, top_k gathers router probabilities: tokens x E numbers, no token vectors.
    assert all(operation == "all-gather" and source.endswith("top_k") for operation, _, source in others), found
    assert all(size <= BATCH * LENGTH * E for _, size, _ in others), found


def test_backward_adds_two_all_to_alls_and_the_sums_of_gradients():
    layer = MoeLayer(config=MoeConfig(num_experts=E, group_size=64), stack="decoder", hidden=HIDDEN)

    def gradient(params, x):
        return jax.grad(lambda p, x: jnp.sum(layer.apply({"params": p}, x) ** 2), argnums=(0, 1))(params, x)

    found = collectives(gradient, layer, Partitioner(num_expert_partitions=4))
    counts = collections.Counter(operation for operation, _, _ in found)
    assert counts["all-to-all"] == 4, found
    # Gradients are summed over replicas: the router's, and each device's share of experts (2 of 8).
    reduced = sum(size for operation, size, _ in found if operation == "all-reduce")
    assert reduced == D * E + 2 * 3 * D * HIDDEN, found
    assert all(source.endswith("top_k") for operation, _, source in found if operation == "all-gather"), found
    assert set(counts) <= {"all-to-all", "all-reduce", "all-gather"}, found
