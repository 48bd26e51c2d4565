"""Settings of a recipe that cannot be meant are refused where they are written, and files of given
routers where they are planned.
"""

import numpy as np
import pytest

from upcycle_jax import axes, surgery
from upcycle_jax.models.t5.config import MoeConfig
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.routing import TokensChoose
from upcycle_jax.surgery.recipe_json import from_json, to_json
from upcycle_jax.trees import LeafSpec

ROUTER = "target/encoder/layers_1/mlp/router/router_weights/w/kernel"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # floor(-0.1 x 12) = -2 units would have been "all but two".
        (
            lambda: surgery.QwenExperts(redraw=-0.1),
            r"QwenExperts.redraw must be at least 0 and at most 1, got -0.1",
        ),
        (
            lambda: surgery.QwenExperts(redraw=1.5),
            r"QwenExperts.redraw must be at least 0 and at most 1, got 1.5",
        ),
        (
            lambda: surgery.DropUpcycling(ratio=2),
            r"DropUpcycling.ratio must be at least 0 and at most 1, got 2",
        ),
        (
            lambda: surgery.DropUpcycling(noise_std=-0.02),
            r"DropUpcycling.noise_std must be at least 0, got -0.02",
        ),
        (lambda: surgery.NoisyCopies(std=-1.0), r"NoisyCopies.std must be at least 0, got -1.0"),
        (
            lambda: surgery.NoisyCopies(std=float("nan")),
            r"NoisyCopies.std must be a finite number in float32, got nan",
        ),
        (
            lambda: surgery.NormalRouter(std=float("inf")),
            r"NormalRouter.std must be a finite number in float32, got inf",
        ),
        (
            lambda: surgery.NormalRouter(repeat=0),
            r"NormalRouter.repeat must be at least 1, got 0",
        ),
        (
            lambda: surgery.UniformRouter(std=-0.1),
            r"UniformRouter.std must be at least 0, got -0.1",
        ),
        # range(-1) is empty: every expert would have been random.
        (
            lambda: surgery.PartialCopies(copied=-1),
            r"PartialCopies.copied must be at least 0, got -1",
        ),
        (
            lambda: surgery.PartialCopies(copied=(0, 0)),
            r"PartialCopies.copied is \(0, 0\): name every expert once",
        ),
        (
            lambda: surgery.Recipe(drop=("target/(",)),
            r"Recipe.drop: 'target/\(' is no regular expression",
        ),
        (
            lambda: surgery.MergeRecipe(how="weighted", weights={"encoder/layers_1": (0.0, 0.0)}),
            r"weights of 'encoder/layers_1' are .*not all 0",
        ),
        (
            lambda: surgery.MergeRecipe(how="weighted", weights={"encoder/layers_1": (2.0, -1.0)}),
            r"give weights of 0 or more",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_pattern_to_drop_may_be_given_as_it_is(small):
    """A string is one pattern, not a pattern per letter."""
    recipe = surgery.Recipe(drop=r"target/extra/.*")
    assert recipe.drop == (r"target/extra/.*",)
    source = {
        **small.tree(),
        "target/extra/kernel": small.tree()["target/token_embedder/embedding"],
    }
    plan = surgery.make_plan(source, small.tree(sparse=(1,)), recipe)
    assert "named in Recipe.drop" in {
        item.reason for item in plan.dropped if item.source == "target/extra/kernel"
    }


def write_router_file(kind, folder):
    path = folder / f"router.{'npy' if kind == 'one array' else 'npz'}"
    if kind == "one array":
        np.save(path, np.zeros((8, 4), np.float32))
    elif kind == "another array":
        np.savez(path, other=np.zeros((8, 4), np.float32))
    elif kind == "truncated":
        np.savez(path, **{ROUTER: np.zeros((8, 4), np.float32)})
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "text":
        path.write_text("0.1 0.2\n")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", r"router.npz cannot be read as NumPy's .npz \(.*No such file"),
        ("truncated", r"router.npz cannot be read as NumPy's .npz"),
        ("text", r"router.npz cannot be read as NumPy's .npz"),
        ("another array", rf"router.npz has no array '{ROUTER}'; it has other"),
        ("one array", r"router.npy holds one array without a name"),
    ],
)
def test_router_files_that_cannot_be_used_are_named(kind, message, small, tmp_path):
    recipe = surgery.Recipe(router_init=surgery.GivenRouter(str(write_router_file(kind, tmp_path))))
    with pytest.raises(ValueError, match=message):
        surgery.make_plan(small.tree(), small.tree(sparse=(1,)), recipe)


@pytest.mark.parametrize(
    ("settings", "preserves"),
    [
        # Factors on all matrices, (8 / 2)^(1/3) for one group: NVIDIA's E8G1T2.
        ({"granularity": 1, "top_k": 2}, False),
        ({"granularity": 1, "softmax_order": "after_top_k"}, True),
        ({"granularity": 1, "scale_weights": False}, True),
        ({"granularity": 2, "scale_weights": False}, False),
        ({"granularity": 2, "softmax_order": "after_top_k"}, False),
        ({"granularity": 2, "softmax_order": "after_top_k", "scaled": "output"}, True),
        ({"granularity": 2, "scaled": "output"}, False),
    ],
)
def test_virtual_groups_that_may_be_exact(settings, preserves):
    assert surgery.VirtualGroups(**settings).preserves_function == preserves


def test_records_of_earlier_versions_read_the_same():
    """What was added later is recorded where it is set."""
    plain = to_json(surgery.Recipe(expert_init=surgery.VirtualGroups()))
    assert "shared_expert" not in plain and "scaled" not in plain["expert_init"]
    init = surgery.VirtualGroups(softmax_order="after_top_k", scaled="output")
    recipe = surgery.Recipe(expert_init=init, shared_expert="zeros")
    assert to_json(recipe)["shared_expert"] == "zeros"
    assert from_json(to_json(recipe)) == recipe
    assert "aux_loss" not in to_json(MoeSettings()) and "aux_loss=" not in repr(MoeConfig())
    assert repr(MoeConfig(aux_loss="joint", encoder_router=TokensChoose())).endswith(
        "independent=False, aux_loss='joint')"
    )


HEAD = ("target/head/kernel", *(f"state/param_states/head/kernel/{s}" for s in ("m", "v")))


def test_a_head_for_other_classes_starts_at_zero(small):
    """Of another size than the source's, which is dropped, with its slots; all else is carried."""
    source, target = (small.tree(sparse=sparse) for sparse in ((), (1,)))
    for tree, classes in ((source, 7), (target, 3)):
        names = (axes.EMBED, axes.CLASSES)
        tree |= {path: LeafSpec((8, classes), np.dtype(np.float32), names) for path in HEAD}
    recipe = surgery.Recipe(optimizer_state="tiled", zeroed="head/.*")
    assert recipe.zeroed == ("head/.*",) and from_json(to_json(recipe)) == recipe
    plan = surgery.make_plan(source, target, recipe)
    rows = {row.target: row for row in plan.rows}
    assert {(rows[path].operation.name, rows[path].sources) for path in HEAD} == {("zeros", ())}
    reason = "the recipe starts it at zero"
    assert {item.source: item.reason for item in plan.dropped} == dict.fromkeys(HEAD, reason)
    with pytest.raises(ValueError, match=r"Recipe.zeroed = 'head/\.\*' for a new head"):
        surgery.make_plan(source, target, surgery.Recipe())
    with pytest.raises(ValueError, match="Recipe.zeroed: 'heads' fits no parameter of the model"):
        surgery.make_plan(source, target, surgery.Recipe(zeroed="heads"))
    with pytest.raises(ValueError, match=r"Recipe.zeroed: 'head\(' is no regular expression"):
        surgery.Recipe(zeroed="head(")
