"""Dropless experts against a loop over tokens: values, gradients, any load, any mesh."""

import functools
import logging
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle_jax.moe import batched_blocks, expert_runs, grouped_experts
from upcycle_jax.partitioning import Partitioner

D, F = 6, 10


def loop_over_tokens(tokens, expert, weight, kernels, activations):
    """The definition: every token, every choice, one after the other, in float64."""
    gelu = lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))
    functions = {"gelu": gelu, "linear": lambda v: v, "relu": lambda v: np.maximum(v, 0)}
    names = ["wi"] if len(activations) == 1 else [f"wi_{i}" for i in range(len(activations))]
    # Of arrays of JAX every slice would be a program.
    kernels = jax.tree.map(np.asarray, kernels)
    out = np.zeros(tokens.shape)
    for n, token in enumerate(np.asarray(tokens, np.float64)):
        for e, w in zip(np.asarray(expert[n]), np.asarray(weight[n]), strict=True):
            if e < kernels["wo"].shape[0]:
                hidden = np.prod(
                    [
                        functions[a](token @ kernels[name][e])
                        for a, name in zip(activations, names, strict=True)
                    ],
                    axis=0,
                )
                out[n] += w * (hidden @ kernels["wo"][e])
    return out


def problem(
    seed, num_tokens, num_experts, k, *, skew=0.0, skip=0.0, activations=("gelu", "linear")
):
    rng = np.random.default_rng(seed)
    preference = rng.normal(size=(num_tokens, num_experts)) + skew * np.arange(num_experts)
    expert = np.argsort(-preference, axis=1)[:, :k]
    expert = np.where(rng.random(expert.shape) < skip, num_experts, expert)
    weight = np.where(expert < num_experts, rng.random(expert.shape), 0)
    names = ["wi"] if len(activations) == 1 else [f"wi_{i}" for i in range(len(activations))]
    # As layers initialise them: outputs are about one, which absolute tolerances are made for.
    kernels = {name: rng.normal(size=(num_experts, D, F)) / D**0.5 for name in names} | {
        "wo": rng.normal(size=(num_experts, F, D)) / F**0.5
    }
    to_jax = lambda a: jnp.asarray(a, jnp.float32)
    return (
        to_jax(rng.normal(size=(num_tokens, D))),
        jnp.asarray(expert, jnp.int32),
        to_jax(weight),
        jax.tree.map(to_jax, kernels),
    )


SMALL = {"one product": batched_blocks.SMALL, "loop": 0}
"""Of `moe.batched_blocks`: what makes the blocks of these experts one product, or a loop over the
parts of runs."""


@pytest.fixture(scope="module", autouse=True)
def few_sizes_of_parts():
    """A loop is compiled for each size of a part of a run: four of them, not 16, which
    test_expert_runs.py has.
    """
    with mock.patch.object(expert_runs, "STEPS", 4):
        yield


@functools.cache
def in_sorted_form(blocks):
    return jax.jit(
        functools.partial(grouped_experts.apply, activations=("gelu", "linear"), dispatch="sorted")
    )


@pytest.mark.parametrize("blocks", SMALL)
@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 1, 1), (40, 3, 2), (200, 8, 3)]),
    st.sampled_from([0.0, 3.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_sorted_equals_a_loop_over_tokens(blocks, seed, sizes, skew, skip):
    args = problem(seed, *sizes, skew=skew, skip=skip)
    with mock.patch.object(batched_blocks, "SMALL", SMALL[blocks]):
        got = in_sorted_form(blocks)(*args)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, loop_over_tokens(*args, ("gelu", "linear")), rtol=1e-5, atol=1e-5
    )


@functools.cache
def of_a_product_with_every_expert(activations):
    """A problem, and the sum of its outputs times a target with its gradients.

    All 300 tokens want expert 2: blocks and what is left in smaller ones; expert 0 gets nobody.
    """
    tokens, expert, weight, kernels = problem(
        0, 300, 3, 2, skew=9.0, skip=0.1, activations=activations
    )
    target = jax.random.normal(jax.random.key(0), tokens.shape)

    def every_expert(tokens, weight, kernels):
        functions = {
            "gelu": lambda v: jax.nn.gelu(v, approximate=True),
            "linear": lambda v: v,
            "relu": jax.nn.relu,
        }
        names = ["wi"] if len(activations) == 1 else ["wi_0", "wi_1"]
        hidden = 1.0
        for name, activation in zip(names, activations, strict=True):
            hidden = hidden * functions[activation](
                jnp.einsum("nd,edf->nef", tokens, kernels[name])
            )
        outputs = jnp.einsum("nef,efd->ned", hidden, kernels["wo"])
        gate = jnp.einsum("nke,nk->ne", jax.nn.one_hot(expert, 3), weight)
        return jnp.sum(jnp.einsum("ned,ne->nd", outputs, gate) * target)

    want = jax.jit(jax.value_and_grad(every_expert, argnums=(0, 1, 2)))(tokens, weight, kernels)
    return (tokens, expert, weight, kernels), target, want


@pytest.mark.parametrize("activations", [("relu",), ("gelu", "linear")])
@pytest.mark.parametrize(
    ("dispatch", "blocks"), [*(("sorted", blocks) for blocks in SMALL), ("ragged_dot", "loop")]
)
def test_gradients_equal_those_of_a_product_with_every_expert(
    dispatch, blocks, activations, monkeypatch
):
    monkeypatch.setattr(batched_blocks, "SMALL", SMALL[blocks])
    (tokens, expert, weight, kernels), target, want = of_a_product_with_every_expert(activations)

    def ours(tokens, weight, kernels):
        return jnp.sum(
            grouped_experts.apply(
                tokens, expert, weight, kernels, activations=activations, dispatch=dispatch
            )
            * target
        )

    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(tokens, weight, kernels)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    # The gradient of the weight of a choice that is not made is nobody's business.
    made = np.asarray(expert) < 3
    np.testing.assert_allclose(
        np.asarray(got[1][1])[made], np.asarray(want[1][1])[made], rtol=1e-5, atol=1e-5
    )
    for g, w in zip(
        jax.tree.leaves((got[1][0], got[1][2])),
        jax.tree.leaves((want[1][0], want[1][2])),
        strict=True,
    ):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * np.abs(w).max())
    assert not np.asarray(got[1][2]["wo"][0]).any()  # nobody chose expert 0


def test_ragged_dot_is_refused_where_it_is_masked(caplog):
    with pytest.raises(
        ValueError,
        match=r"dispatch='ragged_dot' of MoE layers \(DISPATCH\): on this cpu .*one masked product"
        r".*'auto' or 'sorted'",
    ):
        grouped_experts.resolve("ragged_dot")
    grouped_experts._automatic.cache_clear()
    with caplog.at_level(logging.INFO):
        assert grouped_experts.resolve("auto") == grouped_experts.resolve("auto") == "sorted"
    assert (
        len(
            [
                record
                for record in caplog.records
                if "dropless routers use 'sorted' on cpu" in record.message
            ]
        )
        == 1
    )


# Of as many tokens, two choices each, are one program.
LOADS = {
    "random": {"num_tokens": 157, "num_experts": 8, "k": 2, "skew": 1.0, "skip": 0.1},
    "all want the last experts": {"num_tokens": 157, "num_experts": 8, "k": 2, "skew": 99.0},
    "no choices": {"num_tokens": 157, "num_experts": 8, "k": 2, "skip": 1.0},
    "more choices than devices": {"num_tokens": 80, "num_experts": 8, "k": 6, "skip": 0.2},
}
MESHES = [(1, 1), (8, 1), (2, 1), (4, 1), (2, 2), (1, 8)]
"""Expert and model partitions of eight devices: 8x1, 1x8, 4x2, 2x4 (data x expert), 2x2x2, and
model partitions alone.
"""


def wide_problem(load):
    """As `problem`, with hidden units for eight model partitions, and what is dropped of them."""
    tokens, expert, weight, kernels = problem(3, **LOADS[load])
    kernels = {
        name: jnp.concatenate([kernel] * 4, axis=1 if name == "wo" else 2) / 4
        for name, kernel in kernels.items()
    }
    return (
        tokens,
        expert,
        weight,
        kernels,
        jax.random.bernoulli(jax.random.key(1), 0.7, (8, 4 * F)) / 0.7,
    )


@functools.cache
def on_one_device(load):
    return jax.jit(loss_and_gradients)(*wide_problem(load))


def loss_and_gradients(tokens, expert, weight, kernels, scale):
    target = jax.random.normal(jax.random.key(0), tokens.shape)

    def loss(tokens, weight, kernels):
        out = grouped_experts.apply(
            tokens,
            expert,
            weight,
            kernels,
            activations=("gelu", "linear"),
            dispatch="sorted",
            hidden_scale=scale,
        )
        return jnp.sum(out * target), out

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(tokens, weight, kernels)


@functools.cache
def in_form(faster):
    return jax.jit(lambda *args: loss_and_gradients(*args))


@pytest.mark.parametrize("load", ["random", "all want the last experts"])
def test_all_forms_are_one_function(load, monkeypatch):
    # What CPUs do with large experts, and the blocks of other platforms.
    monkeypatch.setattr(batched_blocks, "SMALL", 0)
    for faster in (True, False):
        monkeypatch.setattr(expert_runs, "is_faster", lambda faster=faster: faster)
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(
                g, w, rtol=1e-5, atol=1e-5 * max(np.abs(w).max(), 1)
            ),
            in_form(faster)(*wide_problem(load)),
            on_one_device(load),
        )


QUICK = {("random", mesh) for mesh in ((2, 2), (1, 8))} | {(load, (4, 1)) for load in LOADS}


@pytest.mark.parametrize(
    ("load", "experts", "model"),
    [
        pytest.param(load, *mesh, marks=[] if (load, mesh) in QUICK else [pytest.mark.slow])
        for load in LOADS
        for mesh in MESHES
    ],
)
def test_a_mesh_changes_nothing(load, experts, model):
    want = on_one_device(load)
    with Partitioner(num_expert_partitions=experts, num_model_partitions=model).activate():
        got = jax.jit(loss_and_gradients)(*wide_problem(load))
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(
            g, w, rtol=1e-5, atol=1e-5 * max(np.abs(w).max(), 1)
        ),
        got,
        want,
    )
    if load == "no choices":
        assert not any(
            np.asarray(leaf).any() for leaf in jax.tree.leaves((got[0], got[1][0], got[1][2]))
        )


def random_expert_loads():
    """Any set of preferences: from even to all for one, and tokens that choose less than they
    may.
    """
    return st.tuples(
        st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 4.0]), st.sampled_from([0.0, 0.5, 0.95])
    )


@settings(deadline=None, max_examples=10)
@given(random_expert_loads(), st.sampled_from([(4, 1), (2, 2)]))
def test_any_load_on_a_mesh_equals_a_loop_over_tokens(load, mesh):
    seed, skew, skip = load
    args = problem(seed, 203, 8, 3, skew=skew, skip=skip)
    partitioner = Partitioner(num_expert_partitions=mesh[0], num_model_partitions=mesh[1])
    with partitioner.activate(), mock.patch.object(batched_blocks, "SMALL", SMALL["loop"]):
        got = in_sorted_form("loop")(*args)
    np.testing.assert_allclose(
        got, loop_over_tokens(*args, ("gelu", "linear")), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("experts", [1, 2])
def test_one_expert_partition_exchanges_nothing(experts):
    with Partitioner(num_expert_partitions=experts).activate():
        traced = str(jax.make_jaxpr(loss_and_gradients)(*wide_problem("random")))
    assert ("all_to_all" in traced) == ("pmax" in traced) == (experts > 1)
