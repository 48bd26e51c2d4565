"""Adafactor against a NumPy writing of T5X's rules; AdamW against Adam by hand; state trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from upcycle_jax import trees
from upcycle_jax.training.optimizers import Adafactor, AdamW, root_mean_squares
from upcycle_jax.trees import LeafSpec, Role

F32 = np.dtype(np.float32)
SPECS = {
    "mlp/wi/kernel": LeafSpec((4, 6), F32, ("embed", "mlp")),
    "mlp/wo/kernel": LeafSpec((6, 4), F32, ("mlp", "embed")),
    "attention/out/kernel": LeafSpec((5, 5), F32, ("joined_kv", "embed")),
    "router/kernel": LeafSpec((4, 3), F32, ("embed", "unmodeled")),
    "norm/scale": LeafSpec((4,), F32, ("embed",)),
    "expert/wi/kernel": LeafSpec((3, 4, 6), F32, ("expert", "embed", "expert_mlp"), Role.EXPERT),
    "expert/wo/kernel": LeafSpec((3, 6, 4), F32, ("expert", "expert_mlp", "embed"), Role.EXPERT),
    "expert/small/kernel": LeafSpec((3, 2, 6), F32, ("expert", "embed", "expert_mlp"), Role.EXPERT),
}


def random_tree(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        path: (scale * rng.standard_normal(spec.shape)).astype(np.float32)
        for path, spec in SPECS.items()
    }


class NumpyAdafactor:
    """T5X's Adafactor in float64, one matrix or vector at a time, written from the description of
    its rules.
    """

    def __init__(
        self, min_dim: int, step_offset: int = 0, scale: bool = True, clip: float | None = 1.0
    ):
        self.min_dim, self.step_offset, self.scale, self.clip = min_dim, step_offset, scale, clip
        self.state: dict = {}

    def step(self, key, param, grad, step, lr):
        param, grad = param.astype(np.float64), grad.astype(np.float64)
        decay = 1.0 - (step + 1.0 - self.step_offset) ** -0.8
        square = grad**2 + 1e-30
        if param.ndim == 2 and min(param.shape) >= self.min_dim:
            row_dim = (
                0 if param.shape[0] <= param.shape[1] else 1
            )  # v_row is indexed by the smaller dimension
            row, col = self.state.get(key, (0.0, 0.0))
            row = decay * row + (1 - decay) * square.mean(axis=1 - row_dim)
            col = decay * col + (1 - decay) * square.mean(axis=row_dim)
            self.state[key] = (row, col)
            second = np.outer(row, col) / row.mean()
            second = second if row_dim == 0 else second.T
        else:
            (second,) = self.state.get(key, (0.0,))
            second = decay * second + (1 - decay) * square
            self.state[key] = (second,)
        update = grad / np.sqrt(second)
        if self.clip is not None:
            update /= max(1.0, np.sqrt((update**2).mean()) / self.clip)
        size = max(np.sqrt((param**2).mean()), 1e-3) if self.scale else 1.0
        return param - lr * size * update


def run_jax(optimizer, params, grads, rates, first_step=0):
    state = optimizer.init(SPECS)
    params = trees.unflatten(params)
    update = jax.jit(
        lambda p, g, s, step, lr: (lambda u: (u.params, u.param_states))(
            optimizer.apply(p, g, s, param_specs=SPECS, step=step, learning_rate=lr)
        )
    )
    for i, (grad, rate) in enumerate(zip(grads, rates, strict=True)):
        params, state = update(
            params, trees.unflatten(grad), state, jnp.int32(first_step + i), rate
        )
    return trees.flatten(params), trees.flatten(state)


@pytest.mark.parametrize("min_dim", [4, 128])
@pytest.mark.parametrize(("step_offset", "first_step"), [(0, 0), (0, 1000), (1000, 1000)])
def test_adafactor_equals_numpy_over_steps(min_dim, step_offset, first_step):
    params, grads = random_tree(0), [random_tree(i, scale=3.0**i) for i in range(1, 6)]
    params["router/kernel"] = (
        params["router/kernel"] * 1e-5
    )  # smaller than epsilon2: the floor of the parameter scale acts
    rates = [0.1, 0.05, 0.2, 0.01, 0.1]
    got, state = run_jax(
        Adafactor(min_dim_size_to_factor=min_dim, step_offset=step_offset),
        params,
        grads,
        rates,
        first_step,
    )

    oracle, want = NumpyAdafactor(min_dim, step_offset), dict(params)
    for i, (grad, rate) in enumerate(zip(grads, rates, strict=True)):
        for path in SPECS:
            if path.startswith("expert/"):
                one = [
                    oracle.step((path, e), want[path][e], grad[path][e], first_step + i, rate)
                    for e in range(SPECS[path].shape[0])
                ]
                want[path] = np.stack(one)
            else:
                want[path] = oracle.step(path, want[path], grad[path], first_step + i, rate)
    for path in SPECS:
        np.testing.assert_allclose(got[path], want[path], rtol=2e-5, atol=1e-6, err_msg=path)

    if min_dim == 4:
        row, col = oracle.state["mlp/wo/kernel"]
        np.testing.assert_allclose(state["mlp/wo/kernel/v_row"], row, rtol=1e-5)
        np.testing.assert_allclose(state["mlp/wo/kernel/v_col"], col, rtol=1e-5)
        for e in range(3):
            np.testing.assert_allclose(
                state["expert/wi/kernel/v_row"][e],
                oracle.state["expert/wi/kernel", e][0],
                rtol=1e-5,
            )
            np.testing.assert_allclose(
                state["expert/wi/kernel/v_col"][e],
                oracle.state["expert/wi/kernel", e][1],
                rtol=1e-5,
            )


def test_first_adafactor_update_by_hand():
    # v = g^2, so the update is sign(g) = (1, -1), of RMS 1 (not clipped); RMS(param) = sqrt((9 +
    # 16) / 2) = 3.5355; lr 0.1.
    spec = {"w": LeafSpec((2,), F32)}
    optimizer = Adafactor()
    out = optimizer.apply(
        {"w": jnp.array([3.0, 4.0])},
        {"w": jnp.array([0.5, -7.0])},
        optimizer.init(spec),
        param_specs=spec,
        step=jnp.int32(0),
        learning_rate=0.1,
    )
    np.testing.assert_allclose(out.params["w"], [3 - 0.35355, 4 + 0.35355], rtol=1e-5)
    np.testing.assert_allclose(out.param_states["w"]["v"], [0.25, 49.0], rtol=1e-6)


def test_fresh_state_at_a_late_step_is_bounded_by_clipping_and_restart_forgets():
    # Step 1e6 with zero averages: v = 1e6^-0.8 g^2, so the raw update is about 251 sign(g);
    # clipping brings its RMS to 1.
    spec = {"w": LeafSpec((2,), F32)}
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -1.0])}
    for optimizer in (Adafactor(), Adafactor(step_offset=1_000_000)):
        out = optimizer.apply(
            params,
            grads,
            optimizer.init(spec),
            param_specs=spec,
            step=jnp.int32(1_000_000),
            learning_rate=0.1,
        )
        np.testing.assert_allclose(out.params["w"], [0.9, 1.1], rtol=1e-4)
    # With the offset at the current step, whatever the averages held is forgotten.
    stale = {"w": {**optimizer.init(spec)["w"], "v": jnp.full(2, 1e4)}}
    out = optimizer.apply(
        params, grads, stale, param_specs=spec, step=jnp.int32(1_000_000), learning_rate=0.1
    )
    np.testing.assert_array_equal(out.param_states["w"]["v"], [1.0, 1.0])


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0])
def test_root_mean_squares_are_those_of_optax(scale):
    x = scale * jax.random.normal(jax.random.key(0), (96, 33))
    ours, theirs = (jax.jit(f)(x, 1e-3) for f in (root_mean_squares, optax.safe_root_mean_squares))
    assert ours == theirs


def test_one_expert_does_not_see_the_others():
    params, grads = random_tree(0), random_tree(1)
    loud = {path: value.copy() for path, value in grads.items()}
    loud["expert/wi/kernel"][0] *= 1000.0
    optimizer = Adafactor(min_dim_size_to_factor=4)
    quiet_params, _ = run_jax(optimizer, params, [grads], [0.1])
    loud_params, _ = run_jax(optimizer, params, [loud], [0.1])
    np.testing.assert_array_equal(
        quiet_params["expert/wi/kernel"][1:], loud_params["expert/wi/kernel"][1:]
    )


def test_adafactor_matrices_equal_optax_adafactor():
    params, grads = random_tree(0), [random_tree(i) for i in (1, 2, 3)]
    got, _ = run_jax(Adafactor(min_dim_size_to_factor=4, beta1=0.9), params, grads, [0.1] * 3)
    tx = optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9)
    dense = {path: jnp.asarray(params[path]) for path in SPECS if not path.startswith("expert/")}
    state = tx.init(dense)
    for grad in grads:
        updates, state = tx.update({path: grad[path] for path in dense}, state, dense)
        dense = optax.apply_updates(dense, updates)
    for path, value in dense.items():
        np.testing.assert_allclose(got[path], value, rtol=1e-5, atol=1e-7, err_msg=path)


@pytest.mark.parametrize(
    "optimizer",
    [
        Adafactor(),
        Adafactor(min_dim_size_to_factor=4, beta1=0.9),
        Adafactor(factored=False),
        AdamW(),
    ],
)
def test_state_specs_describe_the_state_before_and_after_an_update(optimizer):
    _, after = run_jax(optimizer, random_tree(0), [random_tree(1)], [0.1])
    specs, before = optimizer.state_specs(SPECS), trees.flatten(optimizer.init(SPECS))
    assert not trees.diff(specs, before, compare_dtype=True)
    assert not trees.diff(specs, after, compare_dtype=True)


def test_state_specs_of_adafactor_by_hand():
    specs = Adafactor(min_dim_size_to_factor=4).state_specs(SPECS)
    assert specs["mlp/wo/kernel/v_row"] == LeafSpec((4,), F32, ("embed",))
    assert specs["mlp/wo/kernel/v_col"] == LeafSpec((6,), F32, ("mlp",))
    assert specs["expert/wo/kernel/v_row"] == LeafSpec((3, 4), F32, ("expert", "embed"))
    assert specs["expert/wo/kernel/v_col"] == LeafSpec((3, 6), F32, ("expert", "expert_mlp"))
    assert specs["expert/small/kernel/v"] == LeafSpec(
        (3, 2, 6), F32, ("expert", "embed", "expert_mlp")
    )
    for path in (
        "mlp/wo/kernel/m",
        "mlp/wo/kernel/v",
        "norm/scale/v_row",
        "expert/wo/kernel/v",
        "expert/wo/kernel/m",
    ):
        assert specs[path] == LeafSpec((1,), F32), path
    assert sum(path.startswith("norm/scale/") for path in specs) == 4


def test_expert_gradient_scale_reaches_experts_only():
    params, grads = random_tree(0), random_tree(1)
    doubled = {
        path: grad * (2.0 if path.startswith("expert/") else 1.0) for path, grad in grads.items()
    }
    _, got = run_jax(Adafactor(expert_gradient_scale=2.0), params, [grads], [0.1])
    _, want = run_jax(Adafactor(), params, [doubled], [0.1])
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def test_adamw_by_hand():
    # First step: mu_hat = g, nu_hat = g^2, so the Adam direction is g / (|g| + eps) = sign(g);
    # decay adds 0.1 * param.
    spec = {"w": LeafSpec((2,), F32)}
    for step, optimizer in (
        (0, AdamW(weight_decay=0.1)),
        (500, AdamW(weight_decay=0.1, step_offset=500)),
    ):
        out = optimizer.apply(
            {"w": jnp.array([1.0, 2.0])},
            {"w": jnp.array([0.3, -4.0])},
            optimizer.init(spec),
            param_specs=spec,
            step=jnp.int32(step),
            learning_rate=0.01,
        )
        np.testing.assert_allclose(
            out.params["w"], [1 - 0.01 * 1.1, 2 + 0.01 * (1 - 0.2)], rtol=1e-6
        )
        np.testing.assert_allclose(out.param_states["w"]["mu"], [0.03, -0.4], rtol=1e-5)
        np.testing.assert_allclose(out.param_states["w"]["nu"], [0.00009, 0.016], rtol=1e-4)


def test_parameters_keep_their_dtype():
    spec = {"w": LeafSpec((4, 4), jnp.bfloat16)}
    optimizer = Adafactor()
    out = optimizer.apply(
        {"w": jnp.ones((4, 4), jnp.bfloat16)},
        {"w": jnp.ones((4, 4), jnp.bfloat16)},
        optimizer.init(spec),
        param_specs=spec,
        step=jnp.int32(0),
        learning_rate=0.1,
    )
    assert out.params["w"].dtype == jnp.bfloat16 and out.param_states["w"]["v"].dtype == jnp.float32
