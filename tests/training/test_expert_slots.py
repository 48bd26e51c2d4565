"""Second moments of experts as T5X keeps them: their shapes and arithmetic, checkpoints that have
them, and what its factor on gradients leaves in them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.training.config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.prepare import prepare
from upcycle_jax.training.train import Train
from upcycle_jax.training.train_settings import TrainSettings
from upcycle_jax.training.train_state import state_specs
from upcycle_jax.trees import LeafSpec, Role

F32 = np.dtype(np.float32)
WI, WO = ("expert", "embed", "expert_mlp"), ("expert", "expert_mlp", "embed")
SPECS = {
    "wide/wi/kernel": LeafSpec((3, 4, 6), F32, WI, Role.EXPERT),
    "wide/wo/kernel": LeafSpec((3, 6, 4), F32, WO, Role.EXPERT),
    "narrow/wi/kernel": LeafSpec((3, 6, 2), F32, WI, Role.EXPERT),
    "narrow/wo/kernel": LeafSpec((3, 2, 6), F32, WO, Role.EXPERT),
    "square/wi/kernel": LeafSpec((3, 5, 5), F32, WI, Role.EXPERT),
    "square/wo/kernel": LeafSpec((3, 5, 5), F32, WO, Role.EXPERT),
    "router/kernel": LeafSpec((4, 3), F32, ("embed", "unmodeled")),
}


def test_slots_have_t5x_s_shapes():
    specs = Adafactor(expert_factoring="t5x").state_specs(SPECS)
    for path, spec in SPECS.items():
        if "router" in path:  # Any other matrix: not factored below 128.
            assert specs[f"{path}/v"].shape == spec.shape
            continue
        embed, width = (spec.shape[spec.axes.index(axis)] for axis in ("embed", "expert_mlp"))
        assert specs[f"{path}/v_row"] == LeafSpec((3, embed), F32, ("expert", "embed"))
        assert specs[f"{path}/v_col"] == LeafSpec((3, width), F32, ("expert", "expert_mlp"))
        assert specs[f"{path}/v"].shape == specs[f"{path}/m"].shape == (1,)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_updates_follow_t5x_s_rules(beta1):
    """Against T5X's rules in float64, over three steps: rows are `embed`, whatever the sizes."""
    random = np.random.default_rng(0)
    experts = {path: spec for path, spec in SPECS.items() if "router" not in path}
    params = {path: random.normal(size=spec.shape).astype("f") for path, spec in experts.items()}
    optimizer = Adafactor(expert_factoring="t5x", beta1=beta1)
    got, state = trees.unflatten(params), optimizer.init(experts)
    want = {path: value.astype(np.float64) for path, value in params.items()}
    slots = {path: [0.0, 0.0, 0.0] for path in experts}
    update = jax.jit(
        lambda p, g, s, step: (lambda u: (u.params, u.param_states))(
            optimizer.apply(p, g, s, param_specs=experts, step=step, learning_rate=0.1)
        )
    )
    for step in range(3):
        grads = {path: random.normal(size=spec.shape).astype("f") for path, spec in experts.items()}
        got, state = update(got, trees.unflatten(grads), state, jnp.int32(step))
        decay = 1 - (step + 1.0) ** -0.8
        for path, spec in experts.items():
            row_dim, col_dim = spec.axes.index("embed"), spec.axes.index("expert_mlp")
            row, col, momentum = slots[path]
            g, p = grads[path].astype(np.float64), want[path]
            square = g**2 + 1e-30
            row = decay * row + (1 - decay) * square.mean(axis=col_dim)
            col = decay * col + (1 - decay) * square.mean(axis=row_dim)
            y = g / np.sqrt(np.expand_dims(row / row.mean(axis=1, keepdims=True), col_dim))
            y /= np.sqrt(np.expand_dims(col, row_dim))
            y /= np.maximum(1.0, np.sqrt((y**2).mean(axis=(1, 2), keepdims=True)))
            y *= 0.1 * np.maximum(np.sqrt((p**2).mean(axis=(1, 2), keepdims=True)), 1e-3)
            if beta1 is not None:
                y = momentum = beta1 * momentum + (1 - beta1) * y
            want[path], slots[path] = p - y, [row, col, momentum]
    got, state = trees.flatten(got), trees.flatten(state)
    for path in experts:
        np.testing.assert_allclose(got[path], want[path], atol=1e-5, err_msg=path)
        np.testing.assert_allclose(state[f"{path}/v_row"], slots[path][0], rtol=1e-4)
        np.testing.assert_allclose(state[f"{path}/v_col"], slots[path][1], rtol=1e-4)


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="expert_factoring must be 'by_size', 't5x' or None"):
        Adafactor(expert_factoring="rows")


@pytest.fixture
def settings(bags, tmp_path):
    """The arguments of `train` that continue a checkpoint."""

    def make(name, restore, *, model=None, steps=5, **kwargs):
        return {
            "model": model or bags.Model(num_experts=2),
            "model_dir": tmp_path / name,
            "train_dataset_cfg": bags.Dataset(),
            "checkpoint_cfg": CheckpointConfig(
                restore=RestoreCheckpointConfig(path=str(restore)),
                save=SaveCheckpointConfig(period=1),
            ),
            "partitioner": bags.one_device,
            "trainer": bags.trainer(optimizer=Adafactor(**kwargs)),
            "total_steps": steps,
            "stats_period": 1,
        }

    return make


@pytest.fixture
def prepared(settings):
    """The optimizer that a run would have; nothing is computed."""

    def prepare_run(*args, **kwargs):
        run = prepare(TrainSettings(**settings(*args, **kwargs)))
        return run.settings.trainer.optimizer

    return prepare_run


@pytest.fixture
def foreign(bags, tmp_path):
    """Makes checkpoints of step 4 as another program leaves them: hand-made slots, no record."""

    def make(name, form, model=None, *, expert_scale=1.0, record=None, **kwargs):
        model = model or bags.Model(num_experts=2)
        specs = state_specs(model, Adafactor(expert_factoring=form, **kwargs))
        random = np.random.default_rng(0)
        writer = create_checkpoint(tmp_path / name, specs, step=4, metadata=record or {})
        for path, spec in specs.items():
            if path.startswith("target/"):
                writer.write(path, None, random.normal(size=spec.shape).astype("f"))
            elif path != "state/step":
                scale = expert_scale**2 if "/expert/" in path else 1.0
                value = scale * random.uniform(0.5, 1.5, spec.shape) * (spec.shape != (1,))
                writer.write(path, None, value.astype("f"))
        writer.finalize()
        return tmp_path / name

    return make


SLOT = "state/param_states/decoder/layers_0/mlp/expert/wo/kernel/"


def test_a_small_t5x_checkpoint_is_continued_and_resumed_in_its_form(settings, foreign, tmp_path):
    source = foreign("t5x", "t5x")
    assert Train(**settings("run", source)).run().step == 5
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "run" / "checkpoint_5")
    assert not trees.diff(before.specs(), after.specs(), compare_dtype=True)
    assert after.spec(f"{SLOT}v_row").shape == (2, 8) and after.spec(f"{SLOT}v").shape == (1,)
    # The averages went on from those of the checkpoint: at step 4 they decay by 1 - 5^-0.8.
    kept = (1 - 5**-0.8) * before.read(f"{SLOT}v_row")
    assert (after.read(f"{SLOT}v_row") > kept).all()
    assert Train(**settings("run", source, steps=6)).run().start == "resume"
    specs = open_checkpoint(tmp_path / "run" / "checkpoint_6").specs()
    assert not trees.diff(before.specs(), specs)


@pytest.mark.parametrize("form", ["t5x", "by_size"])
def test_the_checkpoint_decides_the_form(form, prepared, foreign):
    assert prepared("run", foreign("source", form)).expert_factoring == form


@pytest.mark.parametrize(("has", "set_to"), [("t5x", "by_size"), ("by_size", "t5x")])
def test_a_setting_against_the_checkpoint_is_refused(has, set_to, prepared, foreign):
    message = (
        f"in the form '{has}', and Adafactor.expert_factoring is '{set_to}': set it to '{has}', or"
        " to None"
    )
    with pytest.raises(ValueError, match=message):
        prepared("run", foreign("source", has), expert_factoring=set_to)


def test_where_shapes_do_not_tell_the_form_a_setting_must(bags, prepared, foreign):
    model = bags.Model(num_experts=2, hidden=8)  # as wide as d_model
    options = {"model": model, "min_dim_size_to_factor": 8}
    source = foreign("square", "t5x", **options)
    with pytest.raises(ValueError, match="Set Adafactor.expert_factoring = 't5x' if T5X wrote it"):
        prepared("run", source, **options)
    assert prepared("run", source, expert_factoring="t5x", **options).expert_factoring == "t5x"


def with_dense_layer(model):
    """The model with the parameters of a dense MLP beside its experts."""

    class Beside(type(model)):
        def param_specs(self):
            beside = LeafSpec((8, 16), F32, ("embed", "mlp"))
            return {"decoder/layers_1/mlp/wi_0/kernel": beside, **super().param_specs()}

    return Beside(num_experts=2)


def test_a_factor_on_expert_gradients_is_noticed(bags, prepared, foreign, caplog):
    model = with_dense_layer(bags.Model(num_experts=2))
    scaled = foreign("scaled", "t5x", model, expert_scale=16.0)
    prepared("run", scaled, model=model)
    assert "Set Adafactor.expert_gradient_scale to that number" in caplog.text
    ratio = float(caplog.text.partition("kernel is ")[2].partition(" times")[0])
    assert ratio == pytest.approx(256, rel=0.2)
    assert "as with such a factor" in caplog.text

    caplog.clear()
    prepared("run", foreign("plain", "t5x", model, expert_scale=0.1), model=model)
    assert "which does not look like it" in caplog.text

    # Neither where it is undone, nor where a state of our own goes on.
    caplog.clear()
    prepared("run", scaled, model=model, expert_gradient_scale=16.0)
    prepared("run", foreign("ours", "t5x", model, record={"recipe": "x"}), model=model)
    assert "expert_gradient_scale" not in caplog.text
