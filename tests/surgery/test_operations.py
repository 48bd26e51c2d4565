"""Every operation against NumPy written for the test, with keys folded here by hand."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.layers.mlp import hidden_axis
from upcycle_jax.surgery import keys, operations
from upcycle_jax.surgery.operations import hidden_units

PATH, LAYER = "target/encoder/layers_1/mlp/expert/wi_0/kernel", "target/encoder/layers_1/mlp"
SEED = 5


def hand_key(path, expert, seed=SEED):
    number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), np.uint32(number)), expert
    )


def make(operation, sources, shape, *, path=PATH, layer=LAYER, seed=SEED):
    """The whole leaf, as the offline path would write it."""
    source = keys.key_source(seed, path, layer)
    aux = operation.prepare(sources, source, shape)
    if not operation.stacked:
        return operation.make(sources, aux, source, 0, shape)
    return np.stack([operation.make(sources, aux, source, e, shape[1:]) for e in range(shape[0])])


@pytest.fixture
def dense():
    return np.random.default_rng(0).normal(2.0, 3.0, (6, 10)).astype(np.float32)


def test_tile_is_the_dense_leaf_for_every_expert_in_numpy_and_on_devices(dense):
    np.testing.assert_array_equal(
        make(operations.Tile(), [dense], (3, 6, 10)), np.repeat(dense[None], 3, axis=0)
    )
    np.testing.assert_array_equal(
        operations.Tile().move([jnp.asarray(dense)], (3, 6, 10)),
        np.repeat(dense[None], 3, axis=0),
    )


def test_router_columns_are_normal_draws_of_their_own_keys_whatever_the_number_of_experts():
    few, many = (make(operations.RouterNormal(0.02), [], (64, experts)) for experts in (4, 7))
    np.testing.assert_array_equal(few, many[:, :4])
    column = np.asarray(jax.random.normal(hand_key(PATH, 2), (64,))) * np.float32(0.02)
    np.testing.assert_allclose(few[:, 2], column, rtol=1e-6)
    large = make(operations.RouterNormal(0.02), [], (2000, 8))
    assert abs(large.mean()) < 6 * 0.02 / np.sqrt(16000)
    assert abs(large.std() - 0.02) < 6 * 0.02 / np.sqrt(32000)


def test_repeated_router_columns_tie_exactly():
    kernel = make(operations.RouterNormal(0.02, repeat=3), [], (16, 6))
    single = make(operations.RouterNormal(0.02), [], (16, 2))
    np.testing.assert_array_equal(kernel, np.stack([single[:, 0]] * 3 + [single[:, 1]] * 3, axis=1))
    with pytest.raises(ValueError, match=r"multiple of 3.*\[16, 4\]"):
        operations.RouterNormal(0.02, repeat=3).result_shape([], (16, 4))


def test_uniform_router_has_mean_zero_and_the_deviation_asked_for():
    kernel = make(operations.RouterUniform(0.02), [], (32, 4)).astype(np.float64)
    assert abs(kernel.mean()) < 1e-9
    assert kernel.std() == pytest.approx(0.02, rel=1e-6)
    assert (
        np.abs(kernel).max() < 0.02 * np.sqrt(3) * 1.2
    )  # A uniform's range is sqrt(3) deviations; a normal's of 128 draws is wider.


@pytest.mark.parametrize("relative", [False, True])
def test_noise_is_added_to_the_copy(dense, relative):
    made = make(operations.AddNoise(0.1, relative), [dense], (3, 6, 10))
    scale = 0.1 * (np.std(dense.astype(np.float64)) if relative else 1.0)
    for expert in range(3):
        noise = np.asarray(jax.random.normal(hand_key(PATH, expert), (6, 10)))
        np.testing.assert_allclose(
            made[expert], dense + noise * np.float32(scale), rtol=1e-5, atol=1e-6
        )
    assert (made[0] != made[1]).all()


def test_partial_copies_copy_only_whom_they_name(dense):
    made = make(operations.RandomExperts((1,)), [dense], (3, 6, 10))
    np.testing.assert_array_equal(made[1], dense)
    drawn = np.asarray(jax.random.truncated_normal(hand_key(PATH, 2), -2, 2, (6, 10)))
    # Variance 1 / fan_in after the cut: a normal cut at two deviations keeps 0.8796 of its
    # deviation.
    np.testing.assert_allclose(made[2], drawn * (6**-0.5 / 0.8796256610342398), rtol=1e-5)
    with pytest.raises(ValueError, match=r"experts \[7\].*from 0 to 2"):
        operations.RandomExperts((7,)).result_shape([(6, 10)], (3, 6, 10))


def test_parents_take_turns_and_the_rest_is_averaged(dense):
    others = [dense, dense + 1, dense * 2]
    made = make(operations.FromParents((2, 0, 1, 2)), others, (4, 6, 10))
    np.testing.assert_array_equal(made, np.stack([others[2], others[0], others[1], others[2]]))
    moved = operations.FromParents((2, 0, 1, 2)).move([jnp.asarray(o) for o in others], (4, 6, 10))
    np.testing.assert_array_equal(moved, made)
    np.testing.assert_allclose(
        make(operations.Mean(), others, (6, 10)), np.mean(others, axis=0), rtol=1e-6
    )
    with pytest.raises(ValueError, match="4 experts are assigned to parents, the model has 5"):
        operations.FromParents((2, 0, 1, 2)).result_shape([(6, 10)] * 3, (5, 6, 10))


def test_merging_equal_experts_gives_them_back_to_the_bit(dense):
    for experts in (2, 3, 5, 7):
        stack = np.repeat(dense[None], experts, axis=0)
        np.testing.assert_array_equal(make(operations.MergeExperts(), [stack], (6, 10)), dense)
        weights = tuple(np.random.default_rng(experts).dirichlet(np.ones(experts)))
        np.testing.assert_array_equal(
            make(operations.MergeExperts(weights), [stack], (6, 10)), dense
        )
        np.testing.assert_array_equal(
            make(operations.PickExpert(experts - 1), [stack[experts - 1 :]], (6, 10)), dense
        )


def test_weighted_merge_is_the_weighted_mean(dense):
    stack = np.stack([dense, dense * 2, dense - 5])
    made = make(operations.MergeExperts((0.2, 0.5, 0.3)), [stack], (6, 10))
    np.testing.assert_allclose(
        made, 0.2 * dense + 0.5 * 2 * dense + 0.3 * (dense - 5), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="2 weights for 3 experts"):
        operations.MergeExperts((0.5, 0.5)).result_shape([(3, 6, 10)], (6, 10))


def hand_permutation(path, number, size):
    with jax.threefry_partitionable(True):
        bits = np.asarray(jax.random.bits(hand_key(path, np.uint32(number)), (size,), "uint32"))
    return np.argsort(bits, kind="stable")


@pytest.mark.parametrize(("axis", "shape"), [(1, (6, 10)), (0, (10, 6))])
@pytest.mark.parametrize("per_matrix", [False, True])
def test_drop_upcycling_redraws_the_chosen_units_from_what_they_replace(axis, shape, per_matrix):
    dense = np.random.default_rng(1).normal(2.0, 3.0, shape).astype(np.float32)
    operation = operations.HiddenUnits(axis, redraw=0.5, per_matrix=per_matrix)
    made = make(operation, [dense], (3, *shape))
    for expert in range(3):
        chosen = hand_permutation(PATH if per_matrix else LAYER, 2**31 + expert, 10)[
            :5
        ]  # floor(0.5 * 10)
        kept = np.setdiff1d(np.arange(10), chosen)
        np.testing.assert_array_equal(np.take(made[expert], kept, axis), np.take(dense, kept, axis))
        replaced = np.take(dense, chosen, axis).astype(np.float64)
        noise = np.asarray(jax.random.normal(hand_key(PATH, expert), shape))
        expected = replaced.mean() + replaced.std() * np.take(noise, chosen, axis)
        np.testing.assert_allclose(
            np.take(made[expert], chosen, axis), expected, rtol=1e-5, atol=1e-5
        )


def test_the_matrices_of_an_mlp_share_their_index_sets_unless_told_otherwise():
    for per_matrix in (False, True):
        operation = operations.HiddenUnits(1, redraw=0.5, per_matrix=per_matrix)
        one, other = (
            operation.prepare(
                [np.ones((4, 32), np.float32)],
                keys.key_source(0, f"{LAYER}/expert/{name}/kernel", LAYER),
                (4, 4, 32),
            )["redrawn"]
            for name in ("wi_0", "wi_1")
        )
        assert (one == other).all() != per_matrix
        assert (one.sum(axis=1) == 16).all()
        assert len({row.tobytes() for row in one}) == 4  # Every expert chooses for itself.


def test_noise_variant_of_drop_upcycling_keeps_the_values_below():
    dense = np.random.default_rng(1).normal(size=(40, 50)).astype(np.float32)
    made = make(operations.HiddenUnits(1, redraw=0.5, noise_std=0.02), [dense], (2, 40, 50))
    changed = (made[0] != dense).all(axis=0)
    assert changed.sum() == 25
    assert np.std(made[0] - dense, where=changed) == pytest.approx(0.02, rel=0.1)


def mlp(x, wi_0, wi_1, wo):
    return (np.tanh(x @ wi_0) * (x @ wi_1)) @ wo


def matrices(d=6, f=12):
    rng = np.random.default_rng(3)
    return (
        rng.normal(size=(d, f)).astype(np.float32),
        rng.normal(size=(d, f)).astype(np.float32),
        rng.normal(size=(f, d)).astype(np.float32),
    )


def test_shuffled_units_leave_the_mlp_as_it_is():
    wi_0, wi_1, wo = matrices()
    x = np.random.default_rng(4).normal(size=(5, 6))
    one = [
        make(
            operations.HiddenUnits(axis, shuffle=True),
            [m],
            (3, *m.shape),
            path=f"{LAYER}/expert/{name}/kernel",
        )
        for name, axis, m in (("wi_0", 1, wi_0), ("wi_1", 1, wi_1), ("wo", 0, wo))
    ]
    for expert in range(3):
        assert not np.array_equal(one[0][expert], wi_0)
        np.testing.assert_allclose(
            mlp(x, *(m[expert] for m in one)), mlp(x, wi_0, wi_1, wo), rtol=1e-4, atol=1e-4
        )


def test_the_shards_of_a_virtual_group_add_up_to_the_mlp():
    wi_0, wi_1, wo = matrices()
    x = np.random.default_rng(4).normal(size=(5, 6))
    shards = [
        make(operations.HiddenUnits(axis, groups=3), [m], (6, *shape))
        for axis, m, shape in ((1, wi_0, (6, 4)), (1, wi_1, (6, 4)), (0, wo, (4, 6)))
    ]
    for group in (0, 3):  # Experts 0-2 are one copy's shards in order, 3-5 the other's.
        total = sum(mlp(x, *(m[group + g] for m in shards)) for g in range(3))
        np.testing.assert_allclose(total, mlp(x, wi_0, wi_1, wo), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(shards[0][4], wi_0[:, 4:8])
    with pytest.raises(
        ValueError,
        match=r"granularity 3 cuts.*12 hidden units.*4, the model's experts have 5.*EXPERT_MLP_DIM",
    ):
        operations.HiddenUnits(1, groups=3).result_shape([(6, 12)], (6, 6, 5))


@pytest.mark.parametrize(
    ("experts", "granularity", "top_k", "softmax_first", "gated", "scale"),
    [
        (64, 8, 8, True, True, 4.0),  # E8G8T8: deficit 8 * 64 / 8 = 64, cube root
        (8, 1, 1, True, True, 2.0),  # E8G1T1: deficit 8
        (8, 1, 2, True, True, 4 ** (1 / 3)),  # E8G1T2: deficit 4
        (64, 8, 8, True, False, 8.0),  # plain GELU: square root
        (64, 8, 8, False, True, 2.0),  # top-k first: deficit G = 8
    ],
)
def test_virtual_group_scale_of_the_paper(experts, granularity, top_k, softmax_first, gated, scale):
    found = hidden_units.virtual_group_scale(
        experts=experts,
        granularity=granularity,
        top_k=top_k,
        softmax_first=softmax_first,
        gated=gated,
    )
    assert found == pytest.approx(scale)


def test_qwen_experts_are_slices_of_shuffled_repetitions():
    dense = np.arange(12, dtype=np.float32)[None].repeat(
        3, axis=0
    )  # Every value is its hidden unit.
    made = make(operations.HiddenUnits(1, shuffle=True), [dense], (4, 3, 5))
    # Four experts of five units need ceil(20 / 12) = 2 repetitions; four units are discarded.
    row = np.concatenate([hand_permutation(LAYER, 0, 12), hand_permutation(LAYER, 1, 12)])
    np.testing.assert_array_equal(made[:, 0], row[:20].reshape(4, 5))
    redrawn = make(operations.HiddenUnits(1, shuffle=True, redraw=0.5), [dense], (4, 3, 5))
    assert (
        (redrawn != made).any(axis=1).sum(axis=1) == 2
    ).all()  # floor(0.5 * 5) units of every expert.


def test_the_intermediate_axis_is_found_by_axis_name_or_by_kernel_name():
    assert hidden_axis("x/wi_0/kernel", ("expert", "embed", "expert_mlp"), 2) == 1
    assert hidden_axis("x/wo/kernel", ("expert", "expert_mlp", "embed"), 2) == 0
    assert hidden_axis("x/wo/kernel", ("mlp", "embed"), 2) == 0
    assert hidden_axis("x/wo/kernel", (None, None, None), 2) == 0
    assert hidden_axis("x/wi_1/kernel", (None, None, None), 2) == 1


def test_seed_out_of_range():
    with pytest.raises(ValueError, match="seed -1 is out of range"):
        keys.key_source(-1, "a", "a")
