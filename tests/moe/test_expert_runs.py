"""Experts on their runs, part by part, against products of every row with every expert."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe import expert_runs
from upcycle_jax.moe.grouped_matmul import sort_rows

D, F, E = 6, 10, 3
STEP = 8
STEPS = 4
"""Of the largest part in most tests. A loop is compiled for each size of a part, so that 16 of them
take four times as long and show no more.
"""


def test_steps_by_hand():
    # 5120 choices of 8 experts: 640 each, a tenth is 64. 1024 of 64: 16, a tenth is 1.6: the least.
    assert expert_runs.rows_per_step(5120, 8) == 64
    assert expert_runs.rows_per_step(1024, 64) == 8
    # 300 each: 30, whose nearest power of two is 32; 10,000 each: the most.
    assert expert_runs.rows_per_step(1200, 4) == 32
    assert expert_runs.rows_per_step(40000, 4) == 64
    assert expert_runs.rows_per_step(0, 4) == 8


def apply(tokens, weight, kernels, scale, biases, *, expert, activations):
    rows = sort_rows(expert, num_experts=E, alignment=STEP)
    return expert_runs.apply(
        tokens,
        weight,
        kernels,
        rows,
        step=STEP,
        activations=activations,
        hidden_scale=scale,
        biases=biases,
    )


def every_expert(tokens, weight, kernels, scale, biases, *, expert, activations):
    """The definition; gradients are automatic."""
    functions = {"silu": jax.nn.silu, "linear": lambda v: v, "relu": jax.nn.relu}
    names = ["wi"] if len(activations) == 1 else ["wi_0", "wi_1"]
    hidden = 1.0
    for name, activation in zip(names, activations, strict=True):
        product = jnp.einsum("nd,edf->nef", tokens, kernels[name])
        hidden = hidden * functions[activation](product + (biases[name] if biases else 0))
    hidden = hidden if scale is None else hidden * scale
    outputs = jnp.einsum("nef,efd->ned", hidden, kernels["wo"])
    outputs = outputs + (biases["wo"] if biases else 0)
    gate = jnp.einsum("nke,nk->ne", jax.nn.one_hot(expert, E), weight)
    return jnp.einsum("ned,ne->nd", outputs, gate)


def problem(load, activations, *, whole, num_tokens, dtype=jnp.float32):
    """Tokens of which `load[e]` choose expert e, and what `apply` takes; biases and a scale of
    hidden units if `whole`.
    """
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    chosen = [e for e, number in enumerate(load) for _ in range(number)]
    # The second choice of a token is the next expert, or none at all.
    first = rng.permutation(np.asarray(chosen + [E] * (num_tokens - len(chosen))))
    second = np.where(rng.random(first.size) < 0.5, (first + 1) % E, E)
    second = np.where(first == E, E, second)
    expert = jnp.asarray(np.stack([first, second], axis=1), jnp.int32)
    names = ["wi"] if len(activations) == 1 else ["wi_0", "wi_1"]
    kernels = {name: draw(E, D, F) / D**0.5 for name in names} | {"wo": draw(E, F, D) / F**0.5}
    biases = {name: draw(E, k.shape[2]) for name, k in kernels.items()} if whole else {}
    scale = jnp.abs(draw(E, F)) if whole else None
    weight = jnp.where(expert < E, jnp.asarray(rng.random(expert.shape), jnp.float32), 0)
    return expert, (draw(first.size, D), weight, kernels, scale, biases)


def loads(steps):
    """By name: tokens in all, of which many choose nothing, and the load of each expert. Few tokens
    have heads alone.
    """
    few, largest = (steps - 1) * STEP, steps * STEP
    many = 6 * largest + 8
    return {
        "a head each": (few, [8, 1, few - 9]),
        "an expert without tokens": (few, [0, 0, few - 5]),
        "nobody": (few, [0, 0, 0]),
        "one block": (many, [largest, 0, 0]),
        "blocks and heads": (many, [2 * largest, largest + 1, 3 * largest - 5]),
    }


@functools.cache
def values_and_gradients(form, activations, steps):
    """Compiled: of loads of as many tokens it is one program."""

    def loss(tokens, weight, kernels, scale, biases, expert, target):
        args = tokens, weight, kernels, scale, biases
        out = form(*args, expert=expert, activations=activations)
        return jnp.sum(out * target), out

    # The scale is what dropout draws: it has no gradient.
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 4), has_aux=True))


@pytest.mark.parametrize(
    ("activations", "whole", "steps", "load"),
    [
        *((("silu", "linear"), True, STEPS, load) for load in loads(STEPS)),
        *((("relu",), False, STEPS, load) for load in loads(STEPS)),
        (("relu",), False, expert_runs.STEPS, "blocks and heads"),
    ],
)
def test_values_and_gradients(activations, whole, steps, load, monkeypatch):
    monkeypatch.setattr(expert_runs, "STEPS", steps)
    num_tokens, of_experts = loads(steps)[load]
    expert, args = problem(of_experts, activations, whole=whole, num_tokens=num_tokens)
    target = np.random.default_rng(1).normal(size=args[0].shape).astype(np.float32)

    def of(form):
        run = values_and_gradients(form, activations, steps)
        ((_, out), gradients) = run(*args, expert, target)
        # The gradient of the weight of a choice that is not made is nobody's business.
        return out, (gradients[0], np.where(expert < E, gradients[1], 0), *gradients[2:])

    got, want = of(apply), of(every_expert)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * np.abs(w).max()),
        got,
        want,
    )


def test_bfloat16_accumulates_in_float32():
    # A token of 4096 times 2^-4 against ones: 256 exactly; in bfloat16 the sum would stop growing
    # at 16. It goes to expert 0 of one hidden unit, whose output is 256 times one.
    rows = sort_rows(jnp.zeros((1, 1), jnp.int32), num_experts=1, alignment=STEP)
    run = functools.partial(expert_runs.apply, rows=rows, step=STEP, activations=("linear",))
    kernels = {"wi": jnp.ones((1, 4096, 1), jnp.bfloat16), "wo": jnp.ones((1, 1, 4096), "bfloat16")}
    token, weight = jnp.full((1, 4096), 2.0**-4, jnp.bfloat16), jnp.ones((1, 1))

    def summed(*args):
        out = run(*args)
        return jnp.sum(out), out

    (_, out), (of_token, of_weight, of_kernels) = jax.jit(
        jax.value_and_grad(summed, (0, 1, 2), has_aux=True)
    )(token, weight, kernels)
    assert out.dtype == jnp.float32 and (out == 256).all()
    # 4096 outputs of 256 each; every one has the token's features as its gradient, times one.
    assert of_weight.dtype == jnp.float32 and float(of_weight[0, 0]) == 4096 * 256
    assert of_token.dtype == jnp.bfloat16 and (of_token == 4096).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(of_kernels)} == {jnp.dtype(jnp.bfloat16)}


@pytest.fixture(scope="module")
def compiled():
    """A forward and a backward pass as XLA compiles them."""
    expert, args = problem([16, 8, 5], ("silu", "linear"), whole=False, num_tokens=32)

    def loss(tokens, weight, kernels):
        out = apply(
            tokens, weight, kernels, None, {}, expert=expert, activations=("silu", "linear")
        )
        return jnp.sum(out**2)

    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args[:3]).compile().as_text()


def test_no_product_is_made_outside_the_loop_that_needs_it(compiled):
    # A head's loop has one iteration or none. A product that does not depend on the iteration would
    # be moved before the loop: made for every size of a head.
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", compiled, re.M | re.S))
    of_matrices = r" = f32\[\d+,(?!1\])\d+\]\S* (dot|fusion)\("
    products = {
        name
        for name, body in bodies.items()
        if any(" dot(" in line and re.search(of_matrices, line) for line in body.splitlines())
    }
    callers = {
        name
        for name, body in bodies.items()
        if name in products or products & set(re.findall(r"calls=%?([\w.\-]+)", body))
    }
    assert callers and not [name for name in callers if " while(" in bodies[name]]


def test_what_a_loop_fills_or_overwrites_is_not_copied(compiled):
    # Both products with input kernels [R, F] and both kernels' gradients [E, D, F] would be copies
    # of one array of zeros each.
    of_rows, of_kernels = rf"f32\[\d+,{F}\]", rf"f32\[{E},{D},{F}\]"
    for shape in (of_rows, of_kernels):
        assert re.search(rf" = {shape}\S* dynamic-update-slice\(", compiled)
        assert not re.search(rf" = {shape}\S* copy\(", compiled)
