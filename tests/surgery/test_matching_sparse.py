"""Plans from a Mixture-of-Experts to a larger one: what they make, everywhere, and what they
refuse. How such results compute is tested in test_decoder_recipes.py.
"""

import numpy as np
import pytest

from upcycle_jax import surgery
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.partitioning import Partitioner

MLP = "target/encoder/layers_1/mlp"
SLOTS = "state/param_states/encoder/layers_1/mlp"
TWICE = surgery.MoreExperts(copies=2)


def moe(small, experts, *, width=None, optimizer="adafactor"):
    return small.tree(sparse=(1,), experts=experts, width=width, optimizer=optimizer)


def enlarge(init, **others):
    return surgery.Recipe(expert_init=init, **others)


def columns_with_noise(init):
    return np.arange(4 * init.copies) % init.copies != 0


@pytest.mark.parametrize(
    ("init", "optimizer_state"),
    [
        (TWICE, "tiled"),
        (surgery.MoreExperts(copies=2, router_noise=0.5), "dense_only"),
        (surgery.MoreExperts(copies=3, split=True), "reset"),
    ],
)
def test_offline_online_and_by_hand_are_the_same(small, tmp_path, init, optimizer_state):
    """The oracle is `numpy.repeat`, and slices of it."""
    source = small.Reader(small.filled(moe(small, 4)))
    width = small.F // init.copies if init.split else None
    target = moe(small, 4 * init.copies, width=width)
    plan = surgery.make_plan(source.specs(), target, enlarge(init, optimizer_state=optimizer_state))
    surgery.apply_offline(plan, source, tmp_path / "large")
    written = open_checkpoint(tmp_path / "large")
    meshes = Partitioner(num_expert_partitions=4, num_model_partitions=2)
    made = surgery.apply_online(plan, source, meshes.shardings(target))
    for path, leaf in made.items():
        np.testing.assert_array_equal(np.asarray(leaf), written.read(path), err_msg=path)
    assert surgery.prove(plan, source, written).ok

    for name in ("wi_0", "wi_1", "wo"):
        stored = source.arrays[f"{MLP}/expert/{name}/kernel"]
        wanted = np.repeat(stored, init.copies, axis=0)
        if init.split:
            units = [
                slice(e % init.copies * width, (e % init.copies + 1) * width) for e in range(12)
            ]
            wanted = np.stack(
                [
                    one[u] * np.float32(init.copies) if name == "wo" else one[:, u]
                    for one, u in zip(wanted, units, strict=True)
                ]
            )
        np.testing.assert_array_equal(written.read(f"{MLP}/expert/{name}/kernel"), wanted)
        # Factored slots go with whole experts.
        slot = f"{SLOTS}/expert/{name}/kernel/v_row"
        tiled = np.repeat(source.arrays[slot], init.copies, axis=0)
        found = written.read(slot)
        np.testing.assert_array_equal(
            found, tiled if optimizer_state == "tiled" else np.zeros(found.shape)
        )
    router = f"{MLP}/router/router_weights/w/kernel"
    repeated, found = np.repeat(source.arrays[router], init.copies, axis=1), written.read(router)
    disturbed = columns_with_noise(init) & (init.router_noise > 0)
    np.testing.assert_array_equal(found[:, ~disturbed], repeated[:, ~disturbed])
    if init.router_noise:
        noise = (found - repeated)[:, disturbed]
        assert 0.3 < noise.std() < 0.7 and len(np.unique(noise)) == noise.size
    dense = "target/encoder/layers_0/mlp/wo/kernel"
    np.testing.assert_array_equal(written.read(dense), source.arrays[dense])


def test_damage_is_found_expert_by_expert(small):
    source = small.Reader(small.filled(moe(small, 4, optimizer=None)))
    target = moe(small, 8, optimizer=None)
    plan = surgery.make_plan(source.specs(), target, enlarge(TWICE))
    mesh = Partitioner(num_expert_partitions=1)
    made = surgery.apply_online(plan, source, mesh.shardings(target))
    arrays = {path: np.array(leaf) for path, leaf in made.items()}
    arrays[f"{MLP}/expert/wi_0/kernel"][[3, 4]] = arrays[f"{MLP}/expert/wi_0/kernel"][[4, 3]]
    arrays[f"{MLP}/router/router_weights/w/kernel"][:, 5] += 1
    # Gate and up projection of expert 6 of layer 1 change places.
    gate, up = (arrays[f"{MLP}/expert/{name}/kernel"] for name in ("wi_0", "wi_1"))
    gate[6], up[6] = up[6].copy(), gate[6].copy()
    proof = surgery.prove(plan, source, small.Reader(arrays))
    wrong = {leaf.path: leaf.problems for leaf in proof.leaves if not leaf.ok}
    assert wrong.keys() == {
        f"{MLP}/expert/wi_0/kernel",
        f"{MLP}/expert/wi_1/kernel",
        f"{MLP}/router/router_weights/w/kernel",
    }
    problems = wrong[f"{MLP}/expert/wi_0/kernel"]
    assert [one.split(":")[0] for one in problems] == ["expert 3", "expert 4", "expert 6"]
    assert problems[2].endswith(f"these are the bits of source leaf {MLP}/expert/wi_1/kernel")


def test_an_interrupted_conversion_goes_on(small, tmp_path):
    class Interrupted(Exception):
        pass

    class Failing(small.Reader):
        def read(self, name, index=None):
            if len(self.reads) >= 12:
                raise Interrupted
            return super().read(name, index)

    arrays = small.filled(moe(small, 4))
    plan = surgery.make_plan(small.Reader(arrays).specs(), moe(small, 8), enlarge(TWICE))
    with pytest.raises(Interrupted):
        surgery.apply_offline(plan, Failing(arrays), tmp_path / "large")
    assert not (tmp_path / "large").exists()
    source = small.Reader(arrays)
    surgery.apply_offline(plan, source, tmp_path / "large")
    assert surgery.prove(plan, source, open_checkpoint(tmp_path / "large")).ok


@pytest.mark.parametrize(
    ("source", "target", "init", "message"),
    [
        ({"experts": 0}, {"experts": 8}, TWICE, r"the source has none: choose CopyExperts"),
        ({"experts": 4}, {"experts": 12}, TWICE, r"the target has 12: set NUM_EXPERTS = 8"),
        (
            {"experts": 4},
            {"experts": 8, "width": 5},
            surgery.MoreExperts(copies=2, split=True),
            r"12 hidden units, which are 2 parts of 6, the model's have 5: set EXPERT_MLP_DIM",
        ),
    ],
)
def test_what_does_not_fit_is_refused(small, source, target, init, message):
    tree = moe(small, **source) if source["experts"] else small.tree()
    with pytest.raises(ValueError, match=message):
        surgery.make_plan(tree, moe(small, **target), enlarge(init))


def test_settings_that_contradict_more_experts_are_refused():
    with pytest.raises(ValueError, match=r"leave Recipe\.router_init and Recipe\.depth out"):
        enlarge(TWICE, router_init=surgery.ZeroRouter())
    with pytest.raises(ValueError, match=r"tiled' needs experts of the dense MLP's shape"):
        enlarge(surgery.MoreExperts(split=True), optimizer_state="tiled")


def test_a_split_needs_a_shared_expert(small):
    split = enlarge(surgery.SplitExperts())
    with pytest.raises(ValueError, match="the target has none: set SHARED_EXPERT_MLP_DIM"):
        surgery.make_plan(small.tree(), moe(small, 4, width=6), split)
    with pytest.raises(ValueError, match="leave Recipe.shared_expert at 'dense', got 'zeros'"):
        enlarge(surgery.SplitExperts(), shared_expert="zeros")
