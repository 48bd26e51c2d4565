"""big_vision's Adafactor against a NumPy writing of its rules and against optax; how experts are
factored; how large the updates of fresh parameters are.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from upcycle_jax import trees
from upcycle_jax.training.big_vision_adafactor import BigVisionAdafactor
from upcycle_jax.training.parameter_groups import ParameterGroup
from upcycle_jax.trees import LeafSpec, Role

F32 = np.dtype(np.float32)
SPECS = {
    "mlp/wi/kernel": LeafSpec((32, 48), F32, ("embed", "mlp")),
    "mlp/wo/kernel": LeafSpec((48, 32), F32, ("mlp", "embed")),
    "mlp/wi/bias": LeafSpec((48,), F32, ("mlp",)),
    "embedding/kernel": LeafSpec((4, 4, 3, 32), F32, (None, None, None, "embed")),
    "pos_embedding": LeafSpec((1, 40, 32), F32, (None, None, "embed")),
    "head/kernel": LeafSpec((32, 5), F32, ("embed", "unmodeled")),
    "expert/wi/kernel": LeafSpec((3, 32, 48), F32, ("expert", "embed", "expert_mlp"), Role.EXPERT),
    "expert/wi/bias": LeafSpec((3, 48), F32, ("expert", "expert_mlp"), Role.EXPERT),
}


def random_tree(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        path: (scale * rng.standard_normal(spec.shape)).astype(np.float32)
        for path, spec in SPECS.items()
    }


class NumpyAdafactor:
    """The rules in float64, one parameter (one expert's) at a time."""

    def __init__(self, *, clip=None, decay=0.0, momentum_dtype=ml_dtypes.bfloat16):
        self.clip, self.decay, self.momentum_dtype = clip, decay, momentum_dtype
        self.state: dict = {}

    def step(self, key, param, grad, t, lr):
        """The parameter after update number t, counted from 1."""
        param, grad = param.astype(np.float64), grad.astype(np.float64)
        beta = min(0.999, 1.0 - t**-0.8)
        square = grad**2 + 1e-30
        moments, m = self.state.get(key, ((0.0, 0.0), np.zeros(param.shape)))
        order = sorted(range(param.ndim), key=lambda axis: param.shape[axis])  # stable
        if param.ndim >= 2 and param.shape[order[-2]] >= 32:
            small, large = order[-2:]
            row = beta * moments[0] + (1 - beta) * square.mean(axis=large, keepdims=True)
            col = beta * moments[1] + (1 - beta) * square.mean(axis=small, keepdims=True)
            moments = (row, col)
            second = row * col / row.mean(axis=small, keepdims=True)
        else:
            second = beta * moments[0] + (1 - beta) * square
            moments = (second, 0.0)
        update = grad / np.sqrt(second)
        if self.clip is not None:
            update /= max(1.0, np.sqrt((update**2).mean()) / self.clip)
        m = 0.9 * m.astype(np.float64) + 0.1 * update
        self.state[key] = (moments, m.astype(np.float32).astype(self.momentum_dtype))
        return param - lr * (m + self.decay * param)


def apply(optimizer, specs=None, groups=()):
    """One jitted update: (params, grads, state, step, rate) -> (params, state)."""

    @jax.jit
    def run(params, grads, state, step, rate):
        done = optimizer.apply(
            params,
            grads,
            state,
            param_specs=specs or SPECS,
            step=step,
            learning_rate=rate,
            groups=groups,
        )
        return done.params, done.param_states

    return run


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ({}, {}),
        ({"clipping_threshold": 0.5, "weight_decay": 0.03}, {"clip": 0.5, "decay": 0.03}),
        ({"momentum_dtype": "float32"}, {"momentum_dtype": np.float32}),
    ],
)
def test_updates_equal_numpy(settings, oracle):
    params, rates = random_tree(0), [0.1, 0.05, 0.2, 0.01]
    grads = [random_tree(i, scale=3.0**i) for i in range(1, 5)]
    optimizer = BigVisionAdafactor(**settings)
    run, want, rules = apply(optimizer), dict(params), NumpyAdafactor(**oracle)
    got, state = trees.unflatten(params), optimizer.init(SPECS)
    for i, (grad, rate) in enumerate(zip(grads, rates, strict=True)):
        got, state = run(got, trees.unflatten(grad), state, jnp.int32(i), rate)
        for path, spec in SPECS.items():
            if spec.role is Role.EXPERT:
                want[path] = np.stack(
                    [
                        rules.step((path, e), want[path][e], grad[path][e], i + 1, rate)
                        for e in range(3)
                    ]
                )
            else:
                want[path] = rules.step(path, want[path], grad[path], i + 1, rate)
    got = trees.flatten(got)
    for path in SPECS:
        # A momentum that float32 and float64 round to neighbours in bfloat16 is 2^-8 of it apart.
        far = np.abs(got[path] - want[path]) > 1e-6 + 1e-6 * np.abs(want[path])
        assert far.mean() < 2e-3, path
        np.testing.assert_allclose(got[path], want[path], atol=2e-4, err_msg=path)
    state = trees.flatten(state)
    assert state["mlp/wi/kernel/count"] == 4
    assert state["expert/wi/kernel/count"].tolist() == [4, 4, 4]
    assert not trees.diff(optimizer.state_specs(SPECS), state, compare_dtype=True)


@pytest.mark.parametrize("clip", [None, 0.7])
def test_matrices_equal_optax(clip):
    """Without momentum, which optax rounds at another place; the decay of late steps too."""
    optimizer = BigVisionAdafactor(momentum=0.0, clipping_threshold=clip)
    dense = {path: spec for path, spec in SPECS.items() if spec.role is not Role.EXPERT}
    params = {path: jnp.asarray(value) for path, value in random_tree(0).items() if path in dense}
    rms = optax.scale_by_factored_rms(
        min_dim_size_to_factor=32,
        decay_rate_fn=lambda i, power: jnp.minimum(0.999, 1.0 - (i + 1.0) ** -power),
    )
    chain = optax.chain(rms, optax.clip_by_block_rms(clip) if clip else optax.identity())
    theirs = chain.init(params)
    factored = theirs[0]._replace(count=jnp.int32(20_000))
    theirs = (factored, *theirs[1:])
    state = optimizer.init(dense)
    state = trees.unflatten(
        {
            path: jnp.full_like(leaf, 20_000) if path.endswith("count") else leaf
            for path, leaf in trees.flatten(state).items()
        }
    )
    run, update = apply(optimizer, dense), jax.jit(chain.update)
    got, want = trees.unflatten(params), params
    for i in range(3):
        grads = {path: value for path, value in random_tree(i + 1).items() if path in dense}
        got, state = run(got, trees.unflatten(grads), state, jnp.int32(i), 0.01)
        change, theirs = update(grads, theirs, want)
        want = {path: want[path] - 0.01 * change[path] for path in dense}
    for path, value in trees.flatten(got).items():
        np.testing.assert_allclose(value, want[path], atol=1e-6, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("num_experts", [8, 32, 64])
def test_an_expert_is_factored_as_its_dense_leaf(num_experts):
    """Whether E reaches the 32 from which dimensions are factored or not: the kernel by [d] and
    [f], the bias not at all.
    """
    e = num_experts
    specs = BigVisionAdafactor().state_specs(
        {
            "kernel": LeafSpec((e, 32, 48), F32, ("expert", "embed", "expert_mlp"), Role.EXPERT),
            "bias": LeafSpec((e, 48), F32, ("expert", "expert_mlp"), Role.EXPERT),
            "router": LeafSpec((32, e), F32, ("embed", "unmodeled"), Role.ROUTER),
        }
    )
    bfloat16, int32, unused = jnp.dtype("bfloat16"), np.dtype(np.int32), LeafSpec((1,), F32)
    assert specs["kernel/v_row"] == LeafSpec((e, 32), F32, ("expert", "embed"))
    assert specs["kernel/v_col"] == LeafSpec((e, 48), F32, ("expert", "expert_mlp"))
    assert specs["kernel/v"] == unused
    assert specs["bias/v"] == LeafSpec((e, 48), F32, ("expert", "expert_mlp"))
    assert specs["bias/v_row"] == specs["bias/v_col"] == unused
    assert specs["bias/m"] == LeafSpec((e, 48), bfloat16, ("expert", "expert_mlp"))
    assert specs["bias/count"] == LeafSpec((e,), int32, ("expert",))
    # A router is no expert: it is a matrix like any other.
    assert ("v" if e < 32 else "v_row") in {
        path.removeprefix("router/")
        for path, spec in specs.items()
        if path.startswith("router/v") and spec != unused
    }
    assert specs["router/count"] == LeafSpec((), int32)


ROUTER = {"w": LeafSpec((64, 8), F32, ("embed", "unmodeled"), Role.ROUTER)}
FITTED_SIGNAL = 0.83
"""Share of a gradient's RMS that is the same in every step, at which updates without remedy are
those that were measured on a real small model: RMS 3.2, 6.8, 5.0 and 2.4 after 1, 10, 30 and 100
steps.
"""


@functools.cache
def update_sizes(optimizer: BigVisionAdafactor, *, loaded: bool = False) -> np.ndarray:
    """RMS of a matrix's updates 1 to 100 from step 100,000 on, of which slots are fresh, or those
    of a parameter that was trained from the start.
    """
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((64, 8))
    noise = rng.standard_normal((100, 64, 8))
    grads = FITTED_SIGNAL * signal + np.sqrt(1 - FITTED_SIGNAL**2) * noise

    @jax.jit
    def run(grads, state):
        def one(carry, grad):
            params, state, step = carry
            done = optimizer.apply(
                params, {"w": grad}, state, param_specs=ROUTER, step=step, learning_rate=1.0
            )
            size = jnp.sqrt(jnp.mean(jnp.square(done.params["w"] - params["w"])))
            return (done.params, done.param_states, step + 1), size

        start = ({"w": jnp.zeros((64, 8))}, state, jnp.int32(100_000))
        return jax.lax.scan(one, start, grads)[1]

    state = optimizer.init(ROUTER)
    if loaded:
        second = FITTED_SIGNAL**2 * signal**2 + 1 - FITTED_SIGNAL**2
        slots = {"v": jnp.asarray(second, jnp.float32), "count": jnp.int32(100_000)}
        state = {"w": state["w"] | slots}
    return np.asarray(run(jnp.asarray(grads, jnp.float32), state))


def test_a_fresh_router_under_a_loaded_step_count_moves_too_far():
    """beta is 0.999 and v starts at 0: u is g / sqrt(0.001 g^2) = 31.6 sign(g) at first, of which
    momentum passes on a tenth.
    """
    sizes = update_sizes(BigVisionAdafactor(count_by="step"))
    np.testing.assert_allclose(sizes[0], 0.1 * 1000**0.5, rtol=1e-5)
    np.testing.assert_allclose(sizes[[0, 9, 29, 99]], [3.2, 6.8, 5.0, 2.4], rtol=0.05)


def test_its_own_count_is_the_remedy():
    """As at the beginning of training: u has RMS 1, m reaches it within momentum's ten steps, and
    the router moves as far as what was loaded.
    """
    sizes, body = update_sizes(BigVisionAdafactor()), loaded_sizes()
    np.testing.assert_allclose(sizes[0], 0.1, rtol=1e-5)
    assert sizes.max() < 0.9
    np.testing.assert_allclose(sizes[[9, 29, 99]], body[[9, 29, 99]], rtol=0.12)


def test_clipping_is_the_other_remedy():
    """u never exceeds RMS 1, and has it in every step while v is too small."""
    sizes = update_sizes(BigVisionAdafactor(count_by="step", clipping_threshold=1.0))
    assert sizes.max() < 1.0
    np.testing.assert_allclose(sizes[[9, 29, 99]], loaded_sizes()[[9, 29, 99]], rtol=0.2)


def loaded_sizes() -> np.ndarray:
    return update_sizes(BigVisionAdafactor(), loaded=True)


def test_counts_are_of_leaves():
    """What is frozen counts no updates; a state of another age keeps its own."""
    specs = {"a": LeafSpec((2,), F32), "b": LeafSpec((2,), F32)}
    optimizer = BigVisionAdafactor()
    state = optimizer.init(specs)
    state["a"]["count"] = jnp.int32(7)
    group = ParameterGroup(paths="b", frozen=True, until_step=1)
    run = apply(optimizer, specs, (group,))
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for step in range(2):
        params, state = run(params, params, state, jnp.int32(step), 0.1)
    assert (state["a"]["count"], state["b"]["count"]) == (9, 1)


def test_weight_decay_of_head_and_body_comes_before_the_rate():
    """With no gradient the update is what decays: 1 - 0.01 * 3 of the head, 1 - 0.01 * 0.03 of
    other kernels, nothing of biases.
    """
    groups = (
        ParameterGroup(paths="head/kernel", weight_decay=3.0),
        ParameterGroup(paths=".*/kernel", weight_decay=0.03),
    )
    params = {path: np.ones(spec.shape, np.float32) for path, spec in SPECS.items()}
    grads = {path: np.zeros(spec.shape, np.float32) for path, spec in SPECS.items()}
    optimizer = BigVisionAdafactor()
    after, _ = apply(optimizer, groups=groups)(
        trees.unflatten(params), trees.unflatten(grads), optimizer.init(SPECS), jnp.int32(0), 0.01
    )
    for path, value in trees.flatten(after).items():
        decay = 3.0 if path == "head/kernel" else 0.03 if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(value, 1 - 0.01 * decay, rtol=1e-6, err_msg=path)


def test_an_offset_beside_counts_of_leaves_is_refused():
    with pytest.raises(ValueError, match="step_offset is 10, and every parameter counts its own"):
        BigVisionAdafactor(step_offset=10)
    assert BigVisionAdafactor(step_offset=10, count_by="step").step_offset == 10
