"""Every router inside a model: it trains, sees no later token, depends neither on the batch nor on
padding nor on the mesh.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import surgery, trees
from upcycle_jax.costs import model_info, parameters
from upcycle_jax.models import metrics
from upcycle_jax.models.base import balance_rates
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.routing import (
    DroplessTopK,
    ExpertsChoose,
    HashTop1,
    LossFreeTopK,
    SigmoidTopK,
    SoftMoe,
    SwitchTop1,
    TokensChoose,
)
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.optimizers import AdamW
from upcycle_jax.training.train_state import from_state_dict, state_specs
from upcycle_jax.training.train_step import jitted_train_step, make_train_step
from upcycle_jax.training.trainer import Trainer

DENSE = T5Config(
    vocab_size=64,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=8,
    mlp_dim=32,
    dropout_rate=0.0,
)
EVERYWHERE = [
    SwitchTop1(),
    SigmoidTopK(),
    LossFreeTopK(update_rate=0.01),
    HashTop1(),
    DroplessTopK(),
]
ROUTERS = [*EVERYWHERE, SoftMoe(2)]
IDS = [type(router).__name__ for router in ROUTERS]
# In every run: the routers that differ from plain top-K in more than one line, two of them in one
# model.
LONG = [
    *(
        pytest.param(
            (router,), marks=[] if isinstance(router, SoftMoe) else [pytest.mark.slow], id=name
        )
        for router, name in zip(ROUTERS, IDS, strict=True)
    ),
    pytest.param((LossFreeTopK(update_rate=0.01), DroplessTopK()), id="LossFree-Dropless"),
]
BIAS = "encoder/layers_0/mlp/router/bias"


def make_model(router, decoder=None, **settings):
    """The router in both stacks, unless the decoder is given another; where it may not be in the
    decoder, in the encoder alone.
    """
    decoder = decoder or (TokensChoose() if router.not_causal_because else router)
    moe = {
        "num_experts": 8,
        "encoder_sparse_layout": (0,),
        "decoder_sparse_layout": (0,),
        "encoder_router": router,
        "decoder_router": decoder,
    }
    config = dataclasses.replace(DENSE, moe=MoeConfig(**(moe | settings)))
    return EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")


def make_params(model, seed=0):
    rng, params = np.random.default_rng(seed), {}
    for path, leaf in model.param_specs().items():
        scale = (
            0.1
            if len(leaf.shape) == 1
            else 1 / np.sqrt(1 if path.endswith("embedding") else leaf.shape[-2])
        )
        params[path] = jnp.asarray(
            rng.normal(size=leaf.shape) * scale + path.endswith("scale"), jnp.float32
        )
    return trees.unflatten(params)


def make_batch(lengths, inputs=8, targets=8, seed=0):
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    encoder, decoder = (
        rng.integers(1, 64, (rows, 12))[:, :n] * (np.arange(n) < np.asarray(lengths)[:, None])
        for n in (inputs, targets)
    )
    batch = {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": np.pad(decoder, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": decoder,
        "decoder_loss_weights": decoder > 0,
    }
    return {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}


def trainer(num_microbatches=None):
    return Trainer(
        optimizer=AdamW(weight_decay=0.1),
        learning_rate_fn=lambda step: jnp.float32(0.01),
        num_microbatches=num_microbatches,
    )


def start(model, setup):
    """A state at step 0: random parameters, balancing biases and slots of zero."""
    specs = state_specs(model, setup.optimizer)
    state = {path: np.zeros(spec.shape, spec.dtype) for path, spec in specs.items()}
    for path, leaf in trees.flatten(make_params(model)).items():
        if not path.endswith("router/bias"):
            state[f"target/{path}"] = leaf
    return from_state_dict(state)


def biases_of(state):
    """The selection biases of routers, by path."""
    flat = trees.flatten(state.params)
    return {path: np.asarray(leaf) for path, leaf in flat.items() if path.endswith("router/bias")}


def train(model, steps, *, partitioner=None, num_microbatches=None, batch=None):
    """The biases after each of some steps on one batch, and the outputs of the steps."""
    partitioner = partitioner or Partitioner(devices=(jax.devices()[0],))
    setup = trainer(num_microbatches)
    shardings = partitioner.shardings(state_specs(model, setup.optimizer))
    batch = make_batch([8, 3, 5, 8, 2, 8, 7, 4]) if batch is None else batch
    state = jax.device_put(start(model, setup), from_state_dict(shardings))
    with partitioner.activate():
        step = jitted_train_step(model, setup, partitioner=partitioner, shardings=shardings, seed=0)
        batch, outputs, biases = jax.device_put(batch, partitioner.batch_sharding), [], []
        for _ in range(steps):
            state, output = step(state, batch)
            outputs.append(jax.device_get(output))
            biases.append(biases_of(state))
    return biases, outputs


@functools.cache
def trained(*routers):
    """25 steps on one device, which several tests look at."""
    return train(make_model(*routers), 25)


@pytest.mark.parametrize("routers", LONG)
def test_the_loss_falls(routers):
    model = make_model(*routers)
    biases, outputs = trained(*routers)
    losses = [float(output.loss) for output in outputs]
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0], losses
    values = metrics.compute(outputs[-1].metrics)
    for stack in ("encoder", "decoder"):
        layer = f"{stack}/layers_0"
        np.testing.assert_allclose(values[f"experts/{layer}/load"].sum(), 1, rtol=1e-5)
        np.testing.assert_allclose(
            values[f"experts/{layer}/dead"], (values[f"experts/{layer}/load"] == 0).mean()
        )
        assert outputs[-1].bad_logits[layer] == 0
    for path, rate in (
        (f"{layer}/mlp/router/bias", rate) for layer, rate in balance_rates(model.stacks).items()
    ):
        # Weight decay and momentum leave the bias alone: it is a sum of whole steps.
        steps = biases[-1][path] / rate
        assert np.abs(steps).max() > 0
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


def inference_logits(model):
    return jax.jit(EncoderDecoderModel(model.config.for_inference).logits)


# Top-K by one expert, or with other gates, is independent where plain top-K is, which
# inference/test_independence.py shows. In every run a model has two routers: no later token could
# change what the first of them does, as it is for encoders or goes by a token's id.
@pytest.mark.parametrize(
    "routers",
    [
        pytest.param((SoftMoe(2), LossFreeTopK(update_rate=0.01)), id="Soft-LossFree"),
        pytest.param((HashTop1(), DroplessTopK()), id="Hash-Dropless"),
        *(
            pytest.param((router,), id=name, marks=pytest.mark.slow)
            for router, name in zip(ROUTERS, IDS, strict=True)
        ),
    ],
)
def test_alone_padded_and_causal(routers):
    model = make_model(*routers, eval_expert_capacity_factor=0.5, min_expert_capacity=1)
    params, run = make_params(model), inference_logits(model)
    # All of NumPy: of arrays of JAX every slice would be a program.
    logits = lambda batch: np.asarray(run(params, batch))
    batch = jax.tree.map(np.asarray, make_batch([8, 3, 5]))
    together = logits(batch)
    others = jax.tree.map(np.asarray, make_batch([8, 8, 1], seed=1))
    mixed = {name: np.concatenate([value[:1], others[name][1:]]) for name, value in batch.items()}
    np.testing.assert_allclose(logits(mixed)[0], together[0], atol=1e-5)
    longer = logits({name: np.pad(value, ((0, 0), (0, 4))) for name, value in batch.items()})
    for row, length in enumerate((8, 3, 5)):
        np.testing.assert_allclose(longer[row, :length], together[row, :length], atol=1e-5)
    # Another token from position 5 on: nothing before it changes, in training's routing neither
    # where there is room.
    changed = dict(batch, decoder_input_tokens=batch["decoder_input_tokens"].copy())
    changed["decoder_input_tokens"][:, 5:] = 1
    after = logits(changed)
    np.testing.assert_allclose(after[:, :5], together[:, :5], atol=1e-6)
    assert np.abs(after[0, 5:] - together[0, 5:]).max() > 1e-2


# Language models decode with dropless routers in models/decoder/test_decoding.py.
@pytest.mark.parametrize(
    "router", [HashTop1(), pytest.param(DroplessTopK(), marks=pytest.mark.slow)], ids=repr
)
def test_cached_decoding_equals_the_full_pass(router):
    # In a step the ids and the rows to sort are those of one position.
    model = make_model(router)
    params, batch = make_params(model), make_batch([8, 8, 8])
    want = inference_logits(model)(params, batch)
    logits, cache = jax.jit(lambda p, x: model.start_decoding(p, x, max_length=8))(
        params, batch["encoder_input_tokens"]
    )
    np.testing.assert_allclose(logits, want[:, 0], atol=1e-5)
    step = jax.jit(model.decode_step)
    for at in range(1, 8):
        logits, cache = step(params, batch["decoder_input_tokens"][:, at], jnp.int32(at), cache)
        np.testing.assert_allclose(logits, want[:, at], atol=1e-5)


# A balancing bias and dropless experts are on a mesh in test_step_forms.py and test_sharding.py of
# models/decoder, too.
ON_A_MESH = [
    pytest.param(router, marks=[] if isinstance(router, SoftMoe) else [pytest.mark.slow], id=name)
    for router, name in zip(ROUTERS, IDS, strict=True)
]


@pytest.mark.parametrize("router", ON_A_MESH)
def test_eight_devices_equal_one(router):
    biases, outputs = trained(router)
    on_eight = Partitioner(num_expert_partitions=4)
    biases_of_eight, outputs_of_eight = train(make_model(router), 3, partitioner=on_eight)
    for first, second in zip(outputs[:3], outputs_of_eight, strict=True):
        np.testing.assert_allclose(second.loss, first.loss, rtol=1e-4)
        want, got = (metrics.compute(output.metrics) for output in (first, second))
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-5, err_msg=name)
    for path, bias in biases[2].items():
        np.testing.assert_array_equal(biases_of_eight[2][path], bias, err_msg=path)


RATE = 2.0**-6


@functools.cache
def biased_step(num_microbatches):
    """A state and the step of a model with one biased router, which learns nothing else: a program
    that two tests share.
    """
    model = make_model(
        LossFreeTopK(num_selected_experts=1, update_rate=RATE),
        group_size=8,
        num_decoder_sparse_layers=0,
        decoder_sparse_layout="MIXED",
    )
    setup = trainer(num_microbatches)
    setup = dataclasses.replace(setup, learning_rate_fn=lambda step: jnp.float32(0))
    return start(model, setup), jax.jit(make_train_step(model, setup, seed=0))


# Microbatches and meshes move biases as one device does in models/test_step_forms.py.
@pytest.mark.parametrize("parts", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_the_bias_follows_the_whole_batch_whatever_its_division(parts):
    state, step = biased_step(parts)
    state, output = step(state, make_batch([8, 3, 5, 8, 2, 8, 7, 4]))
    chosen = np.asarray(output.metrics["experts/encoder/layers_0/chosen"].total)
    # A choice of each of 45 real tokens; padding wants nobody.
    assert chosen.sum() == 45
    np.testing.assert_array_equal(biases_of(state)[BIAS], RATE * np.sign(chosen.mean() - chosen))


def test_a_biased_router_balances_a_skewed_load():
    # All tokens prefer expert 0 by a constant: the bias takes that away.
    state, step = biased_step(None)
    flat = trees.flatten(state.params)
    flat[BIAS] = np.eye(8, dtype=np.float32)[0]
    state = state.replace(params=trees.unflatten(flat))
    violations = []
    for seed in range(75):
        state, output = step(state, make_batch([8] * 8, seed=seed))
        chosen = np.asarray(output.metrics["experts/encoder/layers_0/chosen"].total)
        violations.append(chosen.max() / chosen.mean() - 1)
    # At first everybody goes to expert 0: 8 times the mean.
    assert violations[0] == 7 and np.mean(violations[-10:]) < 0.35 * violations[0]


def test_the_surgeon_writes_biases_of_zero_and_checkpoints_hold_them():
    model = make_model(LossFreeTopK())
    setup = trainer()
    target, dense = (
        state_specs(model, setup.optimizer),
        state_specs(EncoderDecoderModel(DENSE), setup.optimizer),
    )
    assert target[f"target/{BIAS}"].shape == (8,)
    rows = {row.target: row for row in surgery.make_plan(dense, target, surgery.Recipe()).rows}
    assert rows[f"target/{BIAS}"].operation.name == "zeros"
    kernel = "target/encoder/layers_0/mlp/router/router_weights/w/kernel"
    assert rows[kernel].operation.name == "normal(0.02)"
    assert rows[f"state/param_states/{BIAS}/mu"].operation.name == "zeros"


def test_router_leaves_follow_the_router():
    def leaves(router):
        specs = make_model(router).param_specs()
        return {
            path.split("router/")[1]: leaf.shape
            for path, leaf in specs.items()
            if path.startswith("encoder") and "router/" in path
        }

    assert leaves(HashTop1()) == {}
    assert leaves(SoftMoe(3)) == {"router_weights/w/kernel": (16, 24)}
    assert leaves(LossFreeTopK()) == {"router_weights/w/kernel": (16, 8), "bias": (8,)}
    # Lists of parameters name the bias, whole on every device.
    text = model_info.model_info(
        make_model(LossFreeTopK()).param_specs(), partitioner=Partitioner(num_expert_partitions=4)
    )
    assert re.search(
        r"Variable +encoder/layers_0/mlp/router/bias +size 8 +shape \(unmodeled=8\) +partition spec"
        r" \(None,\)",
        text,
    )


@pytest.mark.parametrize(
    ("router", "active"),
    [
        (SwitchTop1(), 1),
        (SigmoidTopK(), 2),
        (HashTop1(), 1),
        (DroplessTopK(num_selected_experts=3), 3),
        (SoftMoe(2), 8),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_active_parameters_by_hand(router, active):
    model = make_model(router, num_decoder_sparse_layers=0, decoder_sparse_layout="MIXED")
    counts = parameters.count(model)
    assert counts.total - counts.active == (8 - active) * 3 * 16 * 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"decoder_router": SoftMoe()},
            (
                "SoftMoe cannot be the decoder's router: every slot is a mixture of all"
                " tokens.*TokensChoose"
            ),
        ),
        (
            {"t5x_mode": True, "decoder_router": SigmoidTopK()},
            "t5x_mode follows Flaxformer, which has no SigmoidTopK",
        ),
        (
            {"t5x_mode": True, "decoder_router": DroplessTopK()},
            "t5x_mode follows Flaxformer, which has no DroplessTopK",
        ),
        (
            {"dispatch": "einsum"},
            "dispatch must be 'auto', 'sorted', 'ragged_dot', 'gather' or 'one_hot', got 'einsum'",
        ),
        (
            {"dispatch": "sorted"},
            (
                "dispatch='sorted' moves the tokens of dropless routers, and both routers have a"
                " capacity"
            ),
        ),
        (
            {"decoder_router": SigmoidTopK(40)},
            "num_selected_experts=40 is more than num_experts=32",
        ),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoeConfig(**settings)


def test_packed_rows_and_missing_ids_are_refused():
    model = make_model(SoftMoe())
    batch = make_batch([8, 8])
    batch["encoder_segment_ids"] = batch["decoder_segment_ids"] = jnp.ones((2, 8), jnp.int32)
    with pytest.raises(
        ValueError, match="SoftMoe cannot route packed rows: .*would see each other.*PACK"
    ):
        jax.eval_shape(model.logits, model_params_shapes(model), batch)
    from upcycle_jax.moe.layer import MoeLayer

    layer = MoeLayer(MoeSettings(num_experts=4), HashTop1(), hidden=8)
    with pytest.raises(
        ValueError, match="HashTop1 routes by token ids, and this model has none.*TokensChoose"
    ):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 4, 8)))


def model_params_shapes(model):
    return trees.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in model.param_specs().items()
        }
    )


# That all forms of one assignment agree, test_dispatch.py shows.
@pytest.mark.parametrize(
    "dispatch", ["auto", "gather", pytest.param("one_hot", marks=pytest.mark.slow)]
)
def test_dropless_forms_and_a_capacity_for_all_agree(dispatch):
    batch = make_batch([8, 3, 5, 1])
    tokens = {
        "encoder_router": DroplessTopK(renormalize=True),
        "decoder_router": DroplessTopK(renormalize=True),
    }
    model = make_model(DroplessTopK(), **tokens, dispatch=dispatch)
    params = make_params(model)
    np.testing.assert_allclose(
        jax.jit(model.logits)(params, batch), logits_with_room_for_all(), atol=1e-5
    )


@functools.cache
def logits_with_room_for_all():
    ample = make_model(
        TokensChoose(renormalize=True), eval_expert_capacity_factor=8.0, ignore_padding_tokens=True
    )
    return jax.jit(ample.logits)(make_params(ample), make_batch([8, 3, 5, 1]))


def test_dropout_in_dropless_experts_drops_hidden_units_of_an_expert():
    # Experts are relu(x) with one of two hidden units each; with a rate of 1/2 a unit gives 0 or
    # twice its value, the same for all tokens.
    from upcycle_jax.moe.layer import MoeLayer

    router = DroplessTopK(num_selected_experts=1, renormalize=True)
    settings = MoeSettings(num_experts=2)
    layer = MoeLayer(settings, router, hidden=2, activations=("relu",), dropout_rate=0.5)
    params = {
        "router": {"router_weights": {"w": {"kernel": jnp.array([[9.0, -9.0], [-9.0, 9.0]])}}},
        "expert": {
            "wi": {"kernel": jnp.stack([jnp.eye(2)] * 2)},
            "wo": {"kernel": jnp.stack([jnp.eye(2)] * 2)},
        },
    }
    x = jnp.array([[[2.0, 1.0], [1.0, 2.0], [3.0, 1.0], [1.0, 3.0]]])
    drop = jax.jit(
        lambda key: layer.apply({"params": params}, x, train=True, rngs={"dropout": key})
    )
    seen = set()
    for seed in range(12):
        y = drop(jax.random.key(seed))
        ratio = np.asarray(y / x)[0]
        assert set(ratio.reshape(-1).tolist()) <= {0.0, 2.0}
        np.testing.assert_array_equal(ratio[0], ratio[2])
        np.testing.assert_array_equal(ratio[1], ratio[3])
        seen.add(tuple(ratio[:2].reshape(-1).tolist()))
    assert len(seen) > 3
    in_evaluation = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_allclose(in_evaluation, x, rtol=1e-6)


def test_experts_choose_is_unchanged_by_the_dispatch_of_others():
    one, other = (
        make_model(ExpertsChoose(), decoder_router=TokensChoose(), dispatch=d)
        for d in ("auto", "gather")
    )
    params, batch = make_params(one), make_batch([8, 3])
    np.testing.assert_array_equal(
        jax.jit(one.logits)(params, batch), jax.jit(other.logits)(params, batch)
    )
