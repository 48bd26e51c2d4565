"""The proof finds every kind of damage and names the leaf; what is right passes."""

import json

import numpy as np
import pytest

from upcycle_jax import surgery
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.moe import roles
from upcycle_jax.surgery import leaf_check
from upcycle_jax.surgery import proof as proof_lib
from upcycle_jax.surgery.leaf_values import RowValues, regions_of
from upcycle_jax.trees import LeafSpec

EXPERT = "target/encoder/layers_1/mlp/expert"
ROUTER = "target/encoder/layers_1/mlp/router/router_weights/w/kernel"


def build(small, init=None, **options):
    source = small.dense(d=16, f=32)
    recipe = surgery.Recipe(
        expert_init=init or surgery.CopyExperts(), optimizer_state="tiled", seed=4, **options
    )
    plan = surgery.make_plan(source.specs(), small.tree(d=16, f=32, sparse=(1,), experts=4), recipe)
    arrays = {}
    for row in plan.rows:
        values, leaf = RowValues(row, source, 4), np.zeros(row.spec.shape, row.spec.dtype)
        for region in regions_of(row, 1 << 20):
            leaf[region] = values.region(region)
        arrays[row.target] = leaf
    return plan, source, arrays


def on_disk(folder, arrays):
    specs = roles.inferred(
        {name: LeafSpec(array.shape, array.dtype) for name, array in arrays.items()}
    )
    writer = create_checkpoint(folder, specs, step=int(arrays["state/step"]), metadata={})
    for name, array in arrays.items():
        if name != "state/step":
            writer.write(name, None, np.ascontiguousarray(array))
    writer.finalize()
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    "init",
    [
        surgery.CopyExperts(),
        surgery.NoisyCopies(0.05),
        surgery.NoisyCopies(0.05, relative=True),
        surgery.FreshExperts(),
        surgery.PartialCopies(2),
        surgery.DropUpcycling(0.5, per_matrix_indices=True, shuffle=True),
        surgery.DropUpcycling(0.5, noise_std=0.02),
    ],
)
def test_right_results_pass(small, init, tmp_path):
    plan, source, arrays = build(small, init)
    proof = surgery.prove(plan, source, on_disk(tmp_path / "out", arrays))
    assert proof.ok, proof.text()
    assert "PASSED" in proof.text()
    assert sum(leaf.identical + leaf.drawn for leaf in proof.leaves) == sum(
        leaf.elements for leaf in proof.leaves
    )
    assert all(leaf.regenerated == leaf.drawn for leaf in proof.leaves)
    data = json.loads(proof.write(tmp_path).read_text())
    assert data["ok"] and len(data["leaves"]) == len(plan.rows)
    assert data["recipe"]["expert_init"]["type"] == type(init).__name__


def flip_one_bit(arrays):
    arrays[f"{EXPERT}/wo/kernel"].view(np.uint32)[2, 3, 4] ^= 1


def swap_matrices(arrays):
    arrays[f"{EXPERT}/wi_0/kernel"], arrays[f"{EXPERT}/wi_1/kernel"] = (
        arrays[f"{EXPERT}/wi_1/kernel"],
        arrays[f"{EXPERT}/wi_0/kernel"],
    )


def other_layer(arrays):
    arrays[f"{EXPERT}/wo/kernel"][1] = arrays["target/encoder/layers_0/mlp/wo/kernel"]


def skip_expert(arrays):
    arrays[f"{EXPERT}/wi_0/kernel"][3] = 0


def skip_leaf(arrays):
    del arrays["target/encoder/layers_1/attention/query/kernel"]


def extra_leaf(arrays):
    arrays["target/encoder/layers_1/mlp/wo/kernel"] = np.zeros((2, 2), np.float32)


def wrong_dtype(arrays):
    arrays["target/token_embedder/embedding"] = arrays["target/token_embedder/embedding"].astype(
        np.float16
    )


def not_finite(arrays):
    arrays[ROUTER][0, 0] = np.nan


def other_seed(arrays):
    arrays[ROUTER] = (
        np.random.default_rng(0).normal(0, 0.02, arrays[ROUTER].shape).astype(np.float32)
    )


def too_wide_router(arrays):
    arrays[ROUTER] *= 10


def swap_router_columns(arrays):
    arrays[ROUTER][:, [0, 1]] = arrays[ROUTER][:, [1, 0]]


def slot_not_reset(arrays):
    arrays["state/param_states/encoder/layers_1/mlp/router/router_weights/w/kernel/v"][1] = 1


def slot_of_another(arrays):
    arrays["state/param_states/encoder/layers_1/mlp/expert/wo/kernel/v_col"][2] += 1


def negative_zero(arrays):
    arrays["state/param_states/encoder/layers_1/mlp/router/router_weights/w/kernel/v"][0] = -0.0


def step_lost(arrays):
    arrays["state/step"] = np.asarray(0, np.int32)


MUTATIONS = {
    flip_one_bit: f"{EXPERT}/wo/kernel (tile x4): expert 2: 1 of 512 values",
    swap_matrices: f"these are the bits of source leaf {EXPERT.replace('/expert', '')}/wi_1/kernel",
    other_layer: (
        "expert 1: .*these are the bits of source leaf target/encoder/layers_0/mlp/wo/kernel"
    ),
    skip_expert: f"{EXPERT}/wi_0/kernel (tile x4): expert 3",
    skip_leaf: "- target/encoder/layers_1/attention/query/kernel: not in the result",
    extra_leaf: "+ target/encoder/layers_1/mlp/wo/kernel: in the result, not in the plan",
    wrong_dtype: "target/token_embedder/embedding (copy): is float16",
    not_finite: "1 values are not finite",
    other_seed: "not those that seed 4 gives",
    too_wide_router: "the drawn values have .*, expected",
    swap_router_columns: (
        f"{ROUTER} (normal(0.02)): 32 of 64 values are not those that seed 4 gives"
    ),
    slot_not_reset: "router_weights/w/kernel/v (zeros)",
    slot_of_another: "expert/wo/kernel/v_col (tile x4): expert 2",
    negative_zero: "router_weights/w/kernel/v (zeros)",
    step_lost: "state/step (copy)",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_damage_on_disk_is_found_and_named(small, mutation, tmp_path):
    plan, source, arrays = build(small)
    mutation(arrays)
    proof = surgery.prove(plan, source, on_disk(tmp_path / "out", arrays))
    assert not proof.ok
    pattern = MUTATIONS[mutation]
    head, _, tail = pattern.partition(".*")
    assert any(head in line and tail in line for line in proof.text().splitlines()), proof.text()
    assert sum(not leaf.ok for leaf in proof.leaves) <= 2
    assert "FAILED" in proof.text() and not proof.json()["ok"]


def test_damage_in_redrawn_parts_is_found(small, tmp_path):
    plan, source, arrays = build(small, surgery.DropUpcycling(0.5))
    leaf = arrays[f"{EXPERT}/wi_0/kernel"]
    dense = source.arrays["target/encoder/layers_1/mlp/wi_0/kernel"]
    redrawn = np.flatnonzero((leaf[1] != dense).any(axis=0))
    kept = np.setdiff1d(np.arange(32), redrawn)
    for name, change, words in (
        (
            "kept",
            lambda x: x.__setitem__((1, 0, kept[0]), 9.0),
            "values that must be copies differ",
        ),
        (
            "shifted",
            lambda x: x.__setitem__((1, slice(None), redrawn), x[1][:, redrawn] + 1),
            "the drawn values have mean",
        ),
        (
            "one",
            lambda x: x.__setitem__((1, 0, redrawn[0]), x[1, 0, redrawn[0]] * 1.001),
            "not those that seed 4 gives",
        ),
        ("undone", lambda x: x.__setitem__(1, dense), "not those that seed 4 gives"),
    ):
        damaged = {path: array.copy() for path, array in arrays.items()}
        change(damaged[f"{EXPERT}/wi_0/kernel"])
        proof = surgery.prove(plan, source, on_disk(tmp_path / name, damaged))
        assert [leaf.path for leaf in proof.leaves if not leaf.ok] == [f"{EXPERT}/wi_0/kernel"]
        assert words in proof.text()


def test_a_chunk_that_is_gone_from_the_disk(small, tmp_path):
    plan, source, arrays = build(small)
    on_disk(tmp_path / "out", arrays)
    files = sorted(
        (tmp_path / "out" / "state" / "d").iterdir(), key=lambda path: -path.stat().st_size
    )
    content = bytearray(files[0].read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    files[0].write_bytes(content)
    try:
        proof = surgery.prove(plan, source, open_checkpoint(tmp_path / "out"))
    except ValueError:
        return  # The damage hit the index: the checkpoint cannot even be opened.
    assert not proof.ok


def test_ulps_count_representable_numbers():
    one = np.float32([1.0, -1.0, 0.0])
    assert leaf_check.ulps_between(one, np.nextafter(one, np.float32(2))) == 1
    assert leaf_check.ulps_between(np.float32([1e-45]), np.float32([-1e-45])) == 2


def test_little_memory_means_fewer_threads_and_smaller_regions(small, tmp_path, monkeypatch):
    plan, source, arrays = build(small, surgery.DropUpcycling(0.5))
    monkeypatch.setattr(proof_lib, "threads", lambda: 4)
    rows = list(plan.rows)
    largest = max(row.bytes_read + row.spec.nbytes // 4 for row in rows if "/expert/" in row.target)
    assert [proof_lib._workers(rows, largest * n) for n in (0, 4, 11, 1000)] == [1, 1, 2, 4]
    result = on_disk(tmp_path / "out", arrays)
    proofs = [surgery.prove(plan, source, result, max_memory=n) for n in (1, 1 << 30)]
    assert proofs[0].ok and proofs[0].json() == proofs[1].json()
