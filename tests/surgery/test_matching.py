"""The plan covers both trees exactly, and what does not fit is one error that shows both sides."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from upcycle_jax import surgery
from upcycle_jax.surgery import recipe as recipe_lib
from upcycle_jax.surgery import recipe_json
from upcycle_jax.trees import LeafSpec


def what(plan, path):
    return plan.row(path).what


def test_default_plan_copies_tiles_and_draws(small):
    plan = surgery.make_plan(small.tree(), small.tree(sparse=(1,), experts=4))
    assert what(plan, "target/encoder/layers_0/mlp/wi_0/kernel") == "copy"
    assert what(plan, "target/encoder/layers_1/mlp/expert/wo/kernel") == "tile x4"
    assert plan.row("target/encoder/layers_1/mlp/expert/wo/kernel").sources == (
        "target/encoder/layers_1/mlp/wo/kernel",
    )
    assert (
        what(plan, "target/encoder/layers_1/mlp/router/router_weights/w/kernel") == "normal(0.02)"
    )
    assert what(plan, "state/param_states/encoder/layers_0/attention/query/kernel/v_row") == "zeros"
    assert what(plan, "state/step") == "copy"
    assert {d.reason for d in plan.dropped} == {"optimizer state starts afresh"}


@pytest.mark.parametrize(
    ("policy", "dense_slot", "expert_slot", "placeholder"),
    [
        ("reset", "zeros", "zeros", "zeros"),
        ("dense_only", "copy", "zeros", "zeros"),
        ("tiled", "copy", "tile x4", "copy"),
    ],
)
@pytest.mark.parametrize("optimizer", ["adafactor", "adam"])
def test_optimizer_policies(small, optimizer, policy, dense_slot, expert_slot, placeholder):
    source, target = small.tree(optimizer=optimizer), small.tree(sparse=(1,), optimizer=optimizer)
    plan = surgery.make_plan(source, target, surgery.Recipe(optimizer_state=policy))
    slot = "v_col" if optimizer == "adafactor" else "nu"
    assert what(plan, f"state/param_states/encoder/layers_0/mlp/wi_0/kernel/{slot}") == dense_slot
    assert (
        what(plan, f"state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/{slot}")
        == expert_slot
    )
    assert (
        what(
            plan,
            "state/param_states/encoder/layers_1/mlp/router/router_weights/w/kernel"
            f"/{'v' if slot == 'v_col' else slot}",
        )
        == "zeros"
    )
    if optimizer == "adafactor":
        assert (
            what(plan, "state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/m")
            == placeholder
        )
        assert plan.specs()[
            "state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/m"
        ].shape == (1,)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("keep", "copy"),
        ("keep_or_zero", "copy"),
        ("reset", "zeros"),
        (1_000_000, "set to 1000000"),
    ],
)
def test_step_policies(small, step, text):
    plan = surgery.make_plan(small.tree(), small.tree(sparse=(1,)), surgery.Recipe(step=step))
    assert what(plan, "state/step") == text


@hypothesis.settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_every_leaf_of_both_trees_is_accounted_for_exactly_once(small, data):
    layers = data.draw(st.integers(1, 5))
    sparse = tuple(sorted(data.draw(st.sets(st.integers(0, layers - 1)))))
    experts = data.draw(st.integers(1, 6))
    optimizer = data.draw(st.sampled_from(["adafactor", "adam", None]))
    policy = data.draw(st.sampled_from(recipe_lib.OPTIMIZER_STATES)) if optimizer else "reset"
    init = data.draw(
        st.sampled_from(
            [
                surgery.CopyExperts(),
                surgery.NoisyCopies(),
                surgery.DropUpcycling(),
                surgery.FreshExperts(),
            ]
        )
    )
    source = small.tree(layers=layers, optimizer=optimizer)
    target = small.tree(layers=layers, sparse=sparse, experts=experts, optimizer=optimizer)
    plan = surgery.make_plan(
        source, target, surgery.Recipe(expert_init=init, optimizer_state=policy)
    )
    assert sorted(row.target for row in plan.rows) == sorted(target)
    assert {row.target: row.spec for row in plan.rows} == target
    used, dropped = (
        {name for row in plan.rows for name in row.sources},
        {item.source for item in plan.dropped},
    )
    assert used | dropped == set(source)
    assert not used & dropped
    assert plan.bytes_written == sum(spec.nbytes for spec in target.values())


def test_a_deviating_tree_shows_both_sides_and_only_what_is_unexplained(small):
    source = small.tree()
    source["target/encoder/extra/kernel"] = LeafSpec((3,), np.float32)
    del source["target/encoder/layers_0/mlp/wo/kernel"]
    with pytest.raises(ValueError, match="does not fit") as error:
        surgery.make_plan(source, small.tree(sparse=(1,)))
    message = str(error.value)
    assert (
        "- target/encoder/layers_0/mlp/wo/kernel float32[12,8] (in the target, the source has no"
        in message
    )
    assert (
        "+ target/encoder/extra/kernel float32[3] (in the source, no use in the target)" in message
    )
    assert "wi_0" not in message
    assert "Recipe.drop" in message
    dropping = surgery.Recipe(drop=("target/encoder/extra/.*",))
    source["target/encoder/layers_0/mlp/wo/kernel"] = small.tree()[
        "target/encoder/layers_0/mlp/wo/kernel"
    ]
    plan = surgery.make_plan(source, small.tree(sparse=(1,)), dropping)
    assert [d.source for d in plan.dropped if d.reason == "named in Recipe.drop"] == [
        "target/encoder/extra/kernel"
    ]


def test_shapes_that_do_not_fit_show_both_and_the_remedy(small):
    with pytest.raises(
        ValueError,
        match=(
            r"expert/wi_0/kernel: tile of float32\[8,12\] gives shape \[4, 8, 12\], the target has"
            r" \[4, 8, 16\]"
        ),
    ):
        surgery.make_plan(
            small.tree(optimizer=None), small.tree(sparse=(1,), width=16, optimizer=None)
        )
    with pytest.raises(
        ValueError,
        match=(
            r"token_embedder/embedding: copy of float32\[16,8\].*the target has \[16,"
            r" 4\](.|\n)*Remedy: choose the model"
        ),
    ):
        surgery.make_plan(small.tree(optimizer=None), small.tree(sparse=(1,), d=4, optimizer=None))


def test_upcycling_twice_is_refused(small):
    sparse = small.tree(sparse=(1,))
    with pytest.raises(
        ValueError, match=r"Mixture-of-Experts already.*e\.g\. target/.*happens once"
    ):
        surgery.make_plan(sparse, sparse)


def test_a_source_without_optimizer_state_or_step(small):
    source = {name: spec for name, spec in small.tree().items() if name.startswith("target/")}
    with pytest.raises(
        ValueError, match=r"no optimizer state(.|\n)*Recipe\.optimizer_state = 'reset'"
    ):
        surgery.make_plan(
            source, small.tree(sparse=(1,)), surgery.Recipe(optimizer_state="tiled", step="reset")
        )
    with pytest.raises(ValueError, match=r"state/step(.|\n)*Recipe\.step = 'reset' or a number"):
        surgery.make_plan(source, small.tree(sparse=(1,)))
    for step, text in ((7, "set to 7"), ("keep_or_zero", "zeros")):
        plan = surgery.make_plan(source, small.tree(sparse=(1,)), surgery.Recipe(step=step))
        assert what(plan, "state/step") == text


def test_parameters_that_are_frozen_for_good_on_one_side_have_no_slots_to_carry(small):
    full, sparse = small.tree(optimizer="adam"), small.tree(sparse=(1,), optimizer="adam")
    attention, mlp = "encoder/layers_0/attention/query/kernel", "encoder/layers_1/mlp/wi_0/kernel"
    expert = "encoder/layers_1/mlp/expert/wi_0/kernel"

    def frozen(tree, *parameters):
        slots = {
            f"state/param_states/{parameter}/{slot}"
            for parameter in parameters
            for slot in ("mu", "nu")
        }
        return {
            path: dataclasses.replace(spec, shape=(1,), axes=()) if path in slots else spec
            for path, spec in tree.items()
        }

    tiled = surgery.Recipe(optimizer_state="tiled")
    plan = surgery.make_plan(full, frozen(sparse, expert, attention), tiled)
    for parameter in (expert, attention):
        assert what(plan, f"state/param_states/{parameter}/mu") == "zeros"
    assert what(plan, "state/param_states/encoder/layers_1/mlp/expert/wo/kernel/mu") == "tile x4"
    dropped = {d.source: d.reason for d in plan.dropped}
    assert dropped == {
        f"state/param_states/{parameter}/{slot}": "slots of frozen parameters are not kept"
        for parameter in (mlp, attention)
        for slot in ("mu", "nu")
    }
    plan = surgery.make_plan(frozen(full, mlp), sparse, tiled)
    assert (
        plan.row(f"state/param_states/{expert}/nu").spec
        == sparse[f"state/param_states/{expert}/nu"]
    )
    assert what(plan, f"state/param_states/{expert}/nu") == "zeros"
    both = surgery.make_plan(frozen(full, mlp), frozen(sparse, expert), tiled)
    assert what(both, f"state/param_states/{expert}/nu") == "copy" and not both.dropped


def test_adafactor_slots_do_not_become_adam_slots(small):
    with pytest.raises(ValueError, match="the optimizers differ"):
        surgery.make_plan(
            small.tree(),
            small.tree(sparse=(1,), optimizer="adam"),
            surgery.Recipe(optimizer_state="dense_only"),
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: surgery.Recipe(optimizer_state="fresh"), "'fresh': choose one of"),
        (lambda: surgery.Recipe(step="later"), "'later': choose one of"),
        (
            lambda: surgery.Recipe(expert_init=surgery.QwenExperts(), optimizer_state="tiled"),
            "QwenExperts does not give",
        ),
        (
            lambda: surgery.DropUpcycling(ratio=1.5),
            r"ratio must be at least 0 and at most 1, got 1",
        ),
        (lambda: surgery.VirtualGroups(softmax_order="both"), "'both'"),
        (lambda: surgery.DepthTile(order="random"), "'random'"),
        (lambda: surgery.MergeRecipe(how="median"), "'median'"),
        (lambda: surgery.ParentExperts(parents=(0, 1), rest="best"), "'best'"),
    ],
)
def test_bad_recipes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_depth_tiling_names_the_source_layer(small):
    plan = surgery.make_plan(
        small.tree(layers=2), small.tree(layers=4), surgery.Recipe(depth=surgery.DepthTile())
    )
    sources = [plan.row(f"target/encoder/layers_{n}/mlp/wo/kernel").sources[0] for n in range(4)]
    assert [int(name.split("layers_")[1][0]) for name in sources] == [0, 0, 1, 1]
    cycle = surgery.make_plan(
        small.tree(layers=2), small.tree(layers=4), surgery.Recipe(depth=surgery.DepthTile("cycle"))
    )
    assert [
        int(cycle.row(f"target/encoder/layers_{n}/mlp/wo/kernel").sources[0].split("layers_")[1][0])
        for n in range(4)
    ] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"must name 4 source layers .* from 0 to 1"):
        surgery.make_plan(
            small.tree(layers=2),
            small.tree(layers=4),
            surgery.Recipe(depth=surgery.DepthTile(layers=(0, 1, 2, 3))),
        )
    carried = surgery.Recipe(
        depth=surgery.DepthTile(layers=(1, 0, 0, 1)), optimizer_state="dense_only"
    )
    plan = surgery.make_plan(small.tree(layers=2), small.tree(layers=4), carried)
    assert (
        plan.row("state/param_states/encoder/layers_0/mlp/wo/kernel/v_row")
        .sources[0]
        .endswith("layers_1/mlp/wo/kernel/v_row")
    )


def joined(tree, parents):
    return {f"parent_{n}/{name}": spec for n in range(parents) for name, spec in tree.items()}


def test_parents(small):
    recipe = surgery.Recipe(expert_init=surgery.ParentExperts(parents=(0, 1, 1, 0)))
    plan = surgery.make_plan(joined(small.tree(), 2), small.tree(sparse=(1,)), recipe)
    assert (
        what(plan, "target/encoder/layers_1/mlp/expert/wo/kernel") == "experts of parents 0,1,1,0"
    )
    assert what(plan, "target/encoder/layers_0/mlp/wo/kernel") == "mean of parents"
    assert plan.row("state/step").sources == ("parent_0/state/step",)
    one = dataclasses.replace(
        recipe, expert_init=surgery.ParentExperts(parents=(0, 1, 1, 0), rest=1)
    )
    plan = surgery.make_plan(joined(small.tree(), 2), small.tree(sparse=(1,)), one)
    assert plan.row("target/encoder/layers_0/mlp/wo/kernel").sources == (
        "parent_1/target/encoder/layers_0/mlp/wo/kernel",
    )
    with pytest.raises(ValueError, match=r"names parents \[0, 2\], there are 2"):
        surgery.make_plan(
            joined(small.tree(), 2),
            small.tree(sparse=(1,)),
            surgery.Recipe(expert_init=surgery.ParentExperts((0, 2, 0, 2))),
        )
    with pytest.raises(ValueError, match="several source checkpoints"):
        surgery.make_plan(small.tree(), small.tree(sparse=(1,)), recipe)


def test_merging(small):
    plan = surgery.make_plan(small.tree(sparse=(1,)), small.tree(), surgery.MergeRecipe())
    assert what(plan, "target/encoder/layers_1/mlp/wo/kernel") == "mean of experts"
    assert "routers have no place in a dense model" in {d.reason for d in plan.dropped}
    plan = surgery.make_plan(
        small.tree(sparse=(1,)),
        small.tree(),
        surgery.MergeRecipe(how="expert", expert=2, optimizer_state="dense_only"),
    )
    assert what(plan, "target/encoder/layers_1/mlp/wo/kernel") == "expert 2"
    assert what(plan, "state/param_states/encoder/layers_1/mlp/wo/kernel/v_row") == "zeros"
    with pytest.raises(ValueError, match="no experts to merge"):
        surgery.make_plan(small.tree(), small.tree(), surgery.MergeRecipe())
    with pytest.raises(ValueError, match=r"no entry for layer 'encoder/layers_1'"):
        surgery.make_plan(
            small.tree(sparse=(1,)), small.tree(), surgery.MergeRecipe(how="weighted")
        )


def test_json_abbreviates_nothing(small):
    plan = surgery.make_plan(
        small.tree(), small.tree(sparse=(1,), experts=4), surgery.Recipe(seed=9)
    )
    data = json.loads(json.dumps(plan.json()))
    assert len(data["rows"]) == data["leaves"] == len(plan.rows)
    row = next(r for r in data["rows"] if r["target"].endswith("expert/wo/kernel"))
    assert (row["operation"], row["shape"], row["source_shapes"], row["bytes_written"]) == (
        "tile x4",
        [4, 12, 8],
        [[12, 8]],
        4 * 12 * 8 * 4,
    )
    assert next(r for r in data["rows"] if r["target"].endswith("w/kernel"))["seed"] == 9


@pytest.mark.parametrize(
    "value",
    [
        surgery.Recipe(),
        surgery.Recipe(
            expert_init=surgery.PartialCopies((1, 3)),
            router_init=surgery.ZeroRouter(),
            depth=surgery.DepthTile(layers=(0, 1)),
            drop=("a",),
        ),
        surgery.MergeRecipe(how="weighted", weights={"encoder/layers_1": (0.25, 0.75)}),
    ],
)
def test_recipes_survive_json(value):
    assert recipe_json.from_json(json.loads(json.dumps(recipe_json.to_json(value)))) == value


def test_a_recipe_of_another_version_is_named():
    with pytest.raises(ValueError, match="'Telepathy'.*another version"):
        recipe_json.from_json({"type": "Telepathy", "strength": 3})
