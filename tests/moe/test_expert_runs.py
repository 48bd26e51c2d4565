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
LARGEST = expert_runs.STEPS * STEP
"""128 rows."""


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


def problem(load, activations, *, whole, dtype=jnp.float32):
    """Tokens of which `load[e]` choose expert e, and what `apply` takes; biases and a scale of
    hidden units if `whole`.
    """
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    chosen = [e for e, number in enumerate(load) for _ in range(number)]
    # The second choice of a token is the next expert, or none at all.
    first = rng.permutation(np.asarray(chosen + [E] * (8 - len(chosen) % 8)))
    second = np.where(rng.random(first.size) < 0.5, (first + 1) % E, E)
    second = np.where(first == E, E, second)
    expert = jnp.asarray(np.stack([first, second], axis=1), jnp.int32)
    names = ["wi"] if len(activations) == 1 else ["wi_0", "wi_1"]
    kernels = {name: draw(E, D, F) / D**0.5 for name in names} | {"wo": draw(E, F, D) / F**0.5}
    biases = {name: draw(E, k.shape[2]) for name, k in kernels.items()} if whole else {}
    scale = jnp.abs(draw(E, F)) if whole else None
    weight = jnp.where(expert < E, jnp.asarray(rng.random(expert.shape), jnp.float32), 0)
    return expert, (draw(first.size, D), weight, kernels, scale, biases)


LOADS = {
    "a head each": [8, 1, 40],
    "an expert without tokens": [0, 0, 20],
    "one block": [LARGEST, 0, 0],
    "blocks and heads": [2 * LARGEST, LARGEST + 1, 3 * LARGEST - 5],
    "nobody": [0, 0, 0],
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("activations", "whole"), [(("silu", "linear"), True), (("relu",), False)])
def test_values_and_gradients(load, activations, whole):
    expert, args = problem(LOADS[load], activations, whole=whole)
    target = jax.random.normal(jax.random.key(0), args[0].shape)

    def loss(form, *args):
        out = form(*args, expert=expert, activations=activations)
        return jnp.sum(out * target), out

    def of(form):
        # The scale is what dropout draws: it has no gradient.
        run = jax.value_and_grad(functools.partial(loss, form), (0, 1, 2, 4), has_aux=True)
        ((_, out), gradients) = jax.jit(run)(*args)
        # The gradient of the weight of a choice that is not made is nobody's business.
        return out, (gradients[0], jnp.where(expert < E, gradients[1], 0), *gradients[2:])

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
    out = run(token, weight, kernels)
    assert out.dtype == jnp.float32 and (out == 256).all()
    of_token, of_weight, of_kernels = jax.grad(lambda *args: jnp.sum(run(*args)), (0, 1, 2))(
        token, weight, kernels
    )
    # 4096 outputs of 256 each; every one has the token's features as its gradient, times one.
    assert of_weight.dtype == jnp.float32 and float(of_weight[0, 0]) == 4096 * 256
    assert of_token.dtype == jnp.bfloat16 and (of_token == 4096).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(of_kernels)} == {jnp.dtype(jnp.bfloat16)}


@pytest.fixture(scope="module")
def compiled():
    """A forward and a backward pass as XLA compiles them."""
    expert, args = problem([40, 20, 8], ("silu", "linear"), whole=False)

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
