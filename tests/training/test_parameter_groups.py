"""Weight decay, learning rate and freezing by group, in one update and in whole runs."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.training.config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from upcycle_jax.training.optimizers import Adafactor, AdamW
from upcycle_jax.training.parameter_groups import ParameterGroup, check, kind_of, settings_of
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train import Train
from upcycle_jax.training.train_state import TrainState
from upcycle_jax.training.train_step import make_train_step
from upcycle_jax.trees import LeafSpec, Role

F32 = np.dtype(np.float32)
SPECS = {
    "token_embedder/embedding": LeafSpec((6, 4), F32, ("vocab", "embed")),
    "decoder/layers_0/mlp/expert/wi/kernel": LeafSpec(
        (2, 4, 3), F32, ("expert", "embed", "expert_mlp"), Role.EXPERT
    ),
    "decoder/layers_0/mlp/expert/wi/bias": LeafSpec(
        (2, 3), F32, ("expert", "expert_mlp"), Role.EXPERT
    ),
    "decoder/layers_0/mlp/router/w/kernel": LeafSpec(
        (4, 2), F32, ("embed", "unmodeled"), Role.ROUTER
    ),
    "decoder/decoder_norm/scale": LeafSpec((4,), F32, ("embed",)),
    "decoder/logits_dense/kernel": LeafSpec((4, 6), F32, ("embed", "vocab")),
}


def test_kinds_follow_from_axes():
    kinds = {path.rsplit("/", 2)[-2] + "/" + path.rsplit("/", 1)[-1]: kind_of(spec)
             for path, spec in SPECS.items()}  # fmt: skip
    assert kinds == {
        "token_embedder/embedding": "embedding",
        "wi/kernel": "matrix",
        "wi/bias": "vector",
        "w/kernel": "matrix",
        "decoder_norm/scale": "vector",
        "logits_dense/kernel": "output",
    }


def test_each_setting_is_that_of_the_first_group_that_states_it():
    groups = (
        ParameterGroup(kinds=("vector", "embedding"), weight_decay=0.0),
        ParameterGroup(roles=("router",), learning_rate_factor=10.0),
        ParameterGroup(paths=r"decoder/.*", learning_rate_factor=2.0, weight_decay=0.5),
    )
    found = {path: settings_of(path, spec, groups) for path, spec in SPECS.items()}
    assert {path: (s.weight_decay, s.learning_rate_factor) for path, s in found.items()} == {
        "token_embedder/embedding": (0.0, 1.0),
        "decoder/layers_0/mlp/expert/wi/kernel": (0.5, 2.0),
        "decoder/layers_0/mlp/expert/wi/bias": (0.0, 2.0),
        "decoder/layers_0/mlp/router/w/kernel": (0.5, 10.0),
        "decoder/decoder_norm/scale": (0.0, 2.0),
        "decoder/logits_dense/kernel": (0.5, 2.0),
    }


def updates(optimizer, groups, steps=3):
    """Parameters and state after each of some updates by the same gradients of 1, from 1."""
    params = {path: jnp.ones(spec.shape) for path, spec in SPECS.items()}
    tree, state = trees.unflatten(params), optimizer.init(SPECS, groups)

    @jax.jit
    def update(tree, state, step):
        grads = jax.tree.map(jnp.ones_like, tree)
        done = optimizer.apply(
            tree, grads, state, param_specs=SPECS, step=step, learning_rate=0.1, groups=groups
        )
        return done.params, done.param_states

    out = []
    for step in range(steps):
        tree, state = update(tree, state, step)
        out.append((trees.flatten(tree), trees.flatten(state)))
    return out


def test_adamw_by_group_by_hand():
    # The first Adam direction of gradients 1 is 1 (bias correction), so with weight decay w and
    # learning rate r a parameter of 1 becomes 1 - r (1 + w).
    groups = (
        ParameterGroup(kinds=("vector",), weight_decay=0.0),
        ParameterGroup(roles=("router",), learning_rate_factor=3.0, weight_decay=0.5),
        ParameterGroup(roles=("expert",), learning_rate_factor=0.0),
    )
    params, _ = updates(AdamW(weight_decay=0.2), groups, steps=1)[0]
    want = {
        "token_embedder/embedding": 1 - 0.1 * 1.2,
        "decoder/layers_0/mlp/expert/wi/kernel": 1.0,
        "decoder/layers_0/mlp/expert/wi/bias": 1.0,
        "decoder/layers_0/mlp/router/w/kernel": 1 - 0.3 * 1.5,
        "decoder/decoder_norm/scale": 1 - 0.1,
        "decoder/logits_dense/kernel": 1 - 0.1 * 1.2,
    }
    for path, value in want.items():
        np.testing.assert_allclose(params[path], value, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=0.1), Adafactor()])
def test_frozen_leaves_and_their_state_keep_every_bit(optimizer):
    groups = (
        ParameterGroup(roles=("router",), frozen=False),
        ParameterGroup(paths=r".*/decoder_norm/.*|token_embedder/.*", frozen=True),
        ParameterGroup(frozen=True, from_step=1, until_step=2),
    )
    plain = updates(optimizer, ())
    done = updates(optimizer, groups)
    start = trees.flatten(optimizer.init(SPECS, groups))
    for path in SPECS:
        slots = [name for name in start if name.startswith(f"{path}/")]
        if "decoder_norm" in path or "embedding" in path:
            for params, state in done:
                np.testing.assert_array_equal(params[path], np.ones(SPECS[path].shape))
                for slot in slots:
                    assert start[slot].shape == (1,)  # no memory
                    np.testing.assert_array_equal(state[slot], start[slot])
        elif "router" in path:
            for (mine, my_state), (params, state) in zip(done, plain, strict=True):
                np.testing.assert_array_equal(mine[path], params[path])
                for slot in slots:
                    np.testing.assert_array_equal(my_state[slot], state[slot])
        else:
            np.testing.assert_array_equal(done[0][0][path], plain[0][0][path])
            np.testing.assert_array_equal(done[1][0][path], done[0][0][path])
            assert not np.array_equal(done[2][0][path], done[1][0][path])
            for slot in slots:
                np.testing.assert_array_equal(done[1][1][slot], done[0][1][slot])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "changes nothing"),
        ({"frozen": True, "from_step": 5, "until_step": 5}, "no step between"),
        ({"frozen": True, "paths": "(["}, "is no regular expression"),
        ({"frozen": True, "roles": ("routers",)}, "'routers'"),
        ({"weight_decay": -1.0}, "at least 0"),
    ],
)
def test_groups_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ParameterGroup(**settings)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"paths": "layers_0.*"}, "fits no parameter, such as"),
        ({"paths": "decoder/.*", "roles": ("shared_expert",)}, "of its roles and kinds"),
        ({}, "every parameter is frozen in every step"),
    ],
)
def test_groups_that_do_not_fit_the_model(group, message):
    with pytest.raises(ValueError, match=message):
        check([ParameterGroup(frozen=True, **group)], SPECS)


def test_groups_of_roles_that_a_model_lacks_are_allowed():
    check([ParameterGroup(roles=("shared_expert",), weight_decay=0.0)], SPECS)


def test_no_gradient_is_computed_for_what_is_never_trained(bags):
    """The gradient norm is that of the trained parameters; clipping scales by it."""
    model = bags.Model(num_experts=2, dropout=0.0)
    router = ParameterGroup(roles=("dense", "expert"), frozen=True)

    def step(**kwargs):
        trainer = bags.trainer(
            optimizer=AdamW(eps=1.0), learning_rate_fn=lambda step: 1.0, **kwargs
        )
        specs = model.param_specs()
        params = model.init_params(jax.random.key(0))
        state = TrainState(jnp.int32(0), params, trainer.optimizer.init(specs))
        with bags.one_device.activate():
            after, output = jax.jit(make_train_step(model, trainer, seed=0))(
                state, bags.Dataset().batch(0)
            )
        grads = {
            path.removesuffix("/mu"): 10 * value  # mu = (1 - b1) g
            for path, value in trees.flatten(after.param_states).items()
            if path.endswith("/mu")
        }
        return grads, float(output.grad_norm)

    grads, norm = step()
    trained, norm_of_trained = step(parameter_groups=(router,))
    kernel = "decoder/layers_0/mlp/router/router_weights/w/kernel"
    np.testing.assert_allclose(norm_of_trained, np.linalg.norm(grads[kernel]), rtol=1e-5)
    assert norm > norm_of_trained and all(
        not np.any(grad) for path, grad in trained.items() if path != kernel
    )
    clipped, same = step(max_gradient_norm=norm / 4)
    assert same == norm
    np.testing.assert_allclose(clipped[kernel], grads[kernel] / 4, rtol=1e-5)
    # Frozen for some steps only: their gradients do not count either.
    passing = ParameterGroup(roles=("dense", "expert"), frozen=True, until_step=1)
    clipped, _ = step(parameter_groups=(passing,), max_gradient_norm=norm_of_trained / 2)
    np.testing.assert_allclose(clipped[kernel], grads[kernel] / 2, rtol=1e-5)
    same, _ = step(max_gradient_norm=2 * norm)
    np.testing.assert_array_equal(same[kernel], grads[kernel])


@pytest.fixture
def start(bags, tmp_path):
    """Runs whose experts and embedding are frozen in their first three steps, whose schedule, too,
    counts from their start.
    """

    def run(name, *, steps, restore=None, **trainer):
        schedule = create_learning_rate_scheduler(
            "constant * linear_warmup * linear_cooldown",
            base_learning_rate=0.1,
            warmup_steps=2,
            step_offset="start",
            total_steps=10,
            cooldown_steps=2,
        )
        group = ParameterGroup(
            roles=("expert", "dense"), frozen=True, until_step=3, step_offset="start"
        )
        settings = {
            "optimizer": AdamW(step_offset="start"),
            "learning_rate_fn": schedule,
            "parameter_groups": (group,),
        }
        return Train(
            model=bags.Model(num_experts=2),
            model_dir=tmp_path / name,
            train_dataset_cfg=bags.Dataset(),
            checkpoint_cfg=CheckpointConfig(restore=restore, save=SaveCheckpointConfig(period=1)),
            partitioner=bags.one_device,
            trainer=bags.trainer(**settings | trainer),
            total_steps=steps,
            stats_period=1,
        ).run()

    return run


def saved(folder, step):
    reader = open_checkpoint(folder / f"checkpoint_{step}")
    return {name: reader.read(name) for name in reader.specs()}


def rates(folder):
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["learning_rate"] for row in map(json.loads, lines)}


def test_steps_that_count_from_the_start_of_a_run_survive_a_resumption(start, tmp_path):
    """A run that goes on from step 2 is frozen in steps 2 to 4; killed after step 3 and resumed it
    ends with the same bits.
    """
    start("dense", steps=2, parameter_groups=())
    restore = RestoreCheckpointConfig(path=str(tmp_path / "dense"), optimizer_state="reset")
    start("whole", steps=7, restore=restore)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (4, 5, 6, 7):
        shutil.rmtree(tmp_path / "parts" / f"checkpoint_{step}")
    assert start("parts", steps=7, restore=restore).start == "resume"
    whole, parts = saved(tmp_path / "whole", 7), saved(tmp_path / "parts", 7)
    assert whole.keys() == parts.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
    before, at_five = saved(tmp_path / "dense", 2), saved(tmp_path / "parts", 5)
    for name, value in before.items():
        if name.startswith("target/") and "router" not in name:
            np.testing.assert_array_equal(at_five[name], value, err_msg=name)
            assert not np.array_equal(parts[name], value)
        elif name.startswith("state/param_states/") and "router" not in name:
            assert not np.any(at_five[name])
    # Warm-up over 2 steps from step 2: the update from step 2 has rate 0 (its floor), from 3 half.
    assert rates(tmp_path / "parts") == rates(tmp_path / "whole")
    np.testing.assert_allclose(
        [rates(tmp_path / "parts")[step] for step in (3, 4, 5, 6, 7)],
        [1e-8, 0.05, 0.1, 0.1, 0.1],
        rtol=1e-6,
    )
    assert open_checkpoint(tmp_path / "parts" / "checkpoint_7").metadata()["run_start"] == 2


def test_what_is_frozen_for_good_has_no_optimizer_state(start, tmp_path, caplog):
    """Of experts frozen for good no slots are kept; a state with slots goes on without them, and
    one without them with fresh ones, from another folder or in its own.
    """
    frozen = {"parameter_groups": (ParameterGroup(roles=("expert",), frozen=True),)}
    free = {"parameter_groups": ()}
    before = {"optimizer": AdamW(), "learning_rate_fn": create_learning_rate_scheduler("constant")}

    def of_experts(state):
        slots = {name: leaf for name, leaf in state.items() if "param_states" in name}
        return {name: leaf for name, leaf in slots.items() if "expert" in name}

    caplog.set_level("INFO", "upcycle_jax")
    start("full", steps=2, **before, **free)
    full = saved(tmp_path / "full", 2)
    restore = RestoreCheckpointConfig(path=str(tmp_path / "full"))
    start("frozen", steps=3, restore=restore, **before, **frozen)
    count = len({name.rpartition("/")[0] for name in of_experts(full)})
    told = f"without the optimizer slots of {count} parameters"
    assert told in caplog.text
    start("frozen", steps=4, restore=restore, **before, **frozen)
    after = saved(tmp_path / "frozen", 4)
    assert all(leaf.shape == (1,) and not leaf.any() for leaf in of_experts(after).values())
    assert all(np.any(leaf) for leaf in of_experts(full).values())
    for name in full:
        if name.startswith("target/") and "expert" in name:
            np.testing.assert_array_equal(after[name], full[name])
    # The other slots were carried on: equal to a run whose experts are frozen, and keep slots,
    # because that would end.
    ends = ParameterGroup(roles=("expert",), frozen=True, until_step=9)
    start("until", steps=4, restore=restore, **before, parameter_groups=(ends,))
    until = saved(tmp_path / "until", 4)
    for name in after.keys() - of_experts(after).keys():
        np.testing.assert_array_equal(after[name], until[name], err_msg=name)
    for name, leaf in of_experts(until).items():
        np.testing.assert_array_equal(leaf, full[name])
    # The run itself goes on with what it had frozen, and from then on with slots; and back.
    caplog.clear()
    resumed = start("frozen", steps=5, restore=restore, **before, **free)
    assert resumed.start == "resume"
    assert resumed.start == "resume" and told in caplog.text
    trained = of_experts(saved(tmp_path / "frozen", 5))
    assert {name: leaf.shape for name, leaf in trained.items()} == {
        name: leaf.shape for name, leaf in of_experts(full).items()
    }
    assert all(np.any(leaf) for leaf in trained.values())
    start("frozen", steps=6, restore=restore, **before, **frozen)
    assert all(leaf.shape == (1,) for leaf in of_experts(saved(tmp_path / "frozen", 6)).values())


def test_a_resumed_run_that_nothing_says_the_start_of_is_refused(start, tmp_path):
    plain = {
        "optimizer": AdamW(),
        "learning_rate_fn": create_learning_rate_scheduler("constant"),
        "parameter_groups": (),
    }
    start("run", steps=2, **plain)
    assert "run_start" not in open_checkpoint(tmp_path / "run" / "checkpoint_2").metadata()
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="says at which step it started: set step_offset"):
        start("run", steps=3)


def test_a_schedule_that_ends_before_it_began_is_refused_before_the_run(start, tmp_path):
    start("dense", steps=7, parameter_groups=())
    with pytest.raises(ValueError, match=r"has 3 steps \(from step 7 to total_steps 10\)"):
        start("late", steps=9, restore=RestoreCheckpointConfig(path=str(tmp_path / "dense")))
    assert not (tmp_path / "late").exists()
