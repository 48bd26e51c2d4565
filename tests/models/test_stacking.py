"""Loops over layers and recomputation change neither values nor gradients nor what checkpoints
hold.
"""

import dataclasses
import doctest
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models import metrics, stacking
from upcycle_jax.models.stacking import Segment
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import LossFreeTopK
from upcycle_jax.partitioning import Partitioner

MOE = {
    "num_experts": 4,
    "group_size": 32,
    "train_expert_capacity_factor": 1.0,
    "min_expert_capacity": 2,
    "router_z_loss_factor": 0.1,
}
SHALLOW_DECODER = {"num_encoder_layers": 4, "num_decoder_layers": 1}
ONE_SPARSE = {"decoder_sparse_layout": (0,)}
DENSE_DECODER = {"num_decoder_sparse_layers": 0}
DEEP = {"num_encoder_layers": 4, "num_decoder_layers": 4}


def loop_form(config, *, scan=True, remat="none"):
    return dataclasses.replace(config, scan_layers=scan, remat_policy=remat)


def outcome(config, params, batch, *, rng=None, partitioner=None):
    """Loss, metrics and gradients of a training step, with the gradients laid out as the
    parameters.
    """
    model = EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    partitioner = partitioner or Partitioner(devices=(jax.devices()[0],))
    shardings = trees.unflatten(partitioner.shardings(model.param_specs()))
    params, batch = (
        jax.device_put(params, shardings),
        jax.device_put(batch, partitioner.batch_sharding),
    )

    def value(params, batch):
        return model.loss_fn(params, batch, rng, denominator=model.loss_denominator(batch))

    with partitioner.activate():
        (loss, found), gradient = jax.jit(
            jax.value_and_grad(value, has_aux=True), out_shardings=((None, None), shardings)
        )(params, batch)
    return float(loss), metrics.compute(found), trees.flatten(gradient)


def assert_same(left, right):
    np.testing.assert_allclose(left[0], right[0], rtol=1e-5)
    assert left[1].keys() == right[1].keys()
    for name, value in left[1].items():
        np.testing.assert_allclose(right[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert left[2].keys() == right[2].keys()
    for path, leaf in left[2].items():
        np.testing.assert_allclose(
            right[2][path], leaf, atol=1e-4 * max(np.abs(leaf).max(), 1e-3), err_msg=path
        )


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("DSDSDS", [Segment(0, 2, 3)]),
        ("DDDD", [Segment(0, 1, 4)]),
        ("SSDD", [Segment(0, 1, 2), Segment(2, 1, 2)]),  # BOTTOM
        ("DDSSDD", [Segment(0, 1, 2), Segment(2, 1, 2), Segment(4, 1, 2)]),  # MIDDLE
        ("DDSDDSD", [Segment(0, 3, 2), Segment(6, 1, 1)]),  # what does not fit stays by itself
        ("DS", [Segment(0, 1, 1), Segment(1, 1, 1)]),
        ("D", [Segment(0, 1, 1)]),
        ("", []),
    ],
)
def test_stacks_are_divided_into_blocks_that_repeat(kinds, expected):
    assert list(stacking.segments(kinds)) == expected


def test_segments_cover_every_layer_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        kinds = "".join(rng.choice(list("DS"), size=rng.integers(0, 12)))
        parts = stacking.segments(kinds)
        assert [i for part in parts for i in part.layers] == list(range(len(kinds)))
        for part in parts:
            block = kinds[part.start : part.start + part.period]
            assert "".join(kinds[i] for i in part.layers) == block * part.repeats


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(stacking).failed == 0


@pytest.mark.parametrize(
    ("settings", "moe"),
    [
        # Loops over two kinds of layers, with a selection bias in one, and over dense ones.
        (
            {"num_encoder_layers": 4, "num_decoder_layers": 2},
            MOE | DENSE_DECODER | {"encoder_router": LossFreeTopK()},
        ),
        pytest.param(
            {"num_encoder_layers": 2, "num_decoder_layers": 2}, {}, marks=pytest.mark.slow
        ),
        pytest.param(SHALLOW_DECODER, MOE | ONE_SPARSE, marks=pytest.mark.slow),
        pytest.param(DEEP, MOE, marks=pytest.mark.slow),
        pytest.param(
            DEEP,
            MOE | {"encoder_sparse_layout": "TOP", "decoder_sparse_layout": "MIDDLE"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            DEEP,
            MOE
            | {
                "encoder_sparse_layout": (0,),
                "decoder_sparse_layout": "BOTTOM",
                "shared_expert_mlp_dim": 8,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mixed_dense", "dense", "mixed", "both_mixed", "top_middle", "explicit_bottom"],
)
def test_a_scanned_model_computes_what_its_layers_do(settings, moe, tiny, make_batch, make_params):
    config = tiny(model=settings, **moe)
    params = make_params(EncoderDecoderModel(config))
    batch = make_batch(batch_size=4, inputs=16, targets=8, lengths=[16, 3, 9, 12])
    want = outcome(config, params, batch)
    assert_same(want, outcome(loop_form(config), params, batch))


@pytest.fixture(scope="module")
def with_dropout(tiny, make_batch, make_params):
    """Makes the outcome, on one device, of a form of one model with dropout: each form once. Its
    config, parameters, batch and key are attributes. The encoder is a loop over two layers, the
    decoder has one beside any loop.
    """
    config = tiny(
        model={"num_encoder_layers": 2, "num_decoder_layers": 1, "dropout_rate": 0.1},
        **MOE | ONE_SPARSE | {"encoder_sparse_layout": (0, 1), "num_experts": 8},
    )
    params = make_params(EncoderDecoderModel(config))
    batch = make_batch(batch_size=8, inputs=16, targets=8, lengths=[16, 3, 9, 12, 1, 8, 5, 14])
    rng = jax.random.key(7)

    @functools.cache
    def make(**form):
        return outcome(loop_form(config, **form), params, batch, rng=rng)

    make.config, make.params, make.batch, make.rng = config, params, batch, rng
    return make


@pytest.mark.parametrize(
    ("remat", "scan"),
    [
        pytest.param("minimal", True, marks=pytest.mark.slow),  # on eight devices in every run
        pytest.param("full", False, marks=pytest.mark.slow),
        pytest.param("minimal", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
    ],
)
def test_recomputing_changes_nothing(remat, scan, with_dropout):
    """What is computed again draws the masks that were drawn before."""
    assert_same(with_dropout(scan=scan, remat="none"), with_dropout(scan=scan, remat=remat))


@pytest.mark.parametrize(
    ("experts", "model_parts", "fsdp"),
    [
        (2, 2, True),
        pytest.param(4, 1, False, marks=pytest.mark.slow),
        pytest.param(8, 1, False, marks=pytest.mark.slow),
        pytest.param(1, 1, False, marks=pytest.mark.slow),
        pytest.param(1, 2, False, marks=pytest.mark.slow),
        pytest.param(4, 1, True, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_that_recompute_equal_one_that_does_not(
    experts, model_parts, fsdp, with_dropout
):
    partitioner = Partitioner(
        num_expert_partitions=experts, num_model_partitions=model_parts, fsdp=fsdp
    )
    have = outcome(
        loop_form(with_dropout.config, remat="minimal"),
        with_dropout.params,
        with_dropout.batch,
        rng=with_dropout.rng,
        partitioner=partitioner,
    )
    assert_same(with_dropout(scan=True, remat="none"), have)
    gradient = have[2]
    specs = EncoderDecoderModel(with_dropout.config).param_specs()
    for path, sharding in partitioner.shardings(specs).items():
        assert gradient[path].sharding.is_equivalent_to(sharding, gradient[path].ndim), path
    data = 8 // experts // model_parts
    for layer in ("encoder/layers_1", "decoder/layers_0"):
        kernel = gradient[f"{layer}/mlp/expert/wi_0/kernel"].addressable_shards[0].data
        assert kernel.shape == (8 // experts, 16 // (data if fsdp else 1), 32 // model_parts)


def test_layers_of_a_loop_draw_masks_of_their_own():
    """Each layer adds 2 to every unit that its mask keeps: with one mask for all three, the sums
    would be 0 or 6.
    """

    class Adding(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dropout(0.5)(jnp.ones_like(x), deterministic=False)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return stacking.run_layers(
                self,
                lambda i, **m: Adding(**m),
                lambda layer, x: layer(x),
                x,
                kinds="DDD",
                scan=True,
            )

    sums = Stack().apply({}, jnp.zeros((1, 1, 1000)), rngs={"dropout": jax.random.key(0)})
    values, counts = np.unique(np.asarray(sums), return_counts=True)
    assert values.tolist() == [0, 2, 4, 6] and all(
        abs(count / 1000 - share) < 0.05
        for count, share in zip(counts, (1 / 8, 3 / 8, 3 / 8, 1 / 8), strict=True)
    )


def test_parameters_are_those_of_single_layers(tiny):
    config = tiny(model=DEEP, **MOE)
    assert (
        EncoderDecoderModel(loop_form(config, remat="full")).param_specs()
        == EncoderDecoderModel(config).param_specs()
    )


def test_parameters_listed_from_one_layer_of_each_kind_are_those_of_all(tiny):
    moe = MOE | {"encoder_sparse_layout": (1, 2), "shared_expert_mlp_dim": 8}
    model = EncoderDecoderModel(tiny(model=DEEP, **moe))
    made = jax.eval_shape(model.init_params, jax.random.key(0))
    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in trees.flatten(made).items()}
    listed = model.param_specs()
    assert list(listed) == list(shapes)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in listed.items()} == shapes


def test_layer_outputs_keep_their_names(tiny, make_batch, make_params):
    config = tiny(
        model={"num_encoder_layers": 5, "num_decoder_layers": 2},
        num_experts=4,
        encoder_sparse_layout=(1, 3),
        decoder_sparse_layout=(0, 1),
    )
    model, scanned = EncoderDecoderModel(config), EncoderDecoderModel(loop_form(config))
    params, batch = make_params(model), make_batch()

    def run(model):
        return jax.jit(lambda p, b: (model.logits(p, b), model.layer_outputs(p, b)))(params, batch)

    (logits, want), (scanned_logits, have) = run(model), run(scanned)
    np.testing.assert_allclose(scanned_logits, logits, atol=1e-4)
    assert set(want) == set(have) and len(have) == 7
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value, atol=1e-4, err_msg=name)


def test_cached_decoding_of_a_scanned_model(tiny, make_batch, make_params):
    config = tiny(
        model={"num_encoder_layers": 1, "num_decoder_layers": 2},
        num_experts=4,
        encoder_sparse_layout=(0,),
        decoder_sparse_layout=(0, 1),
    )
    batch = make_batch(lengths=[12, 3, 9, 5])
    params = make_params(EncoderDecoderModel(config))
    found = []
    for form in (config, loop_form(config, remat="full")):
        model = EncoderDecoderModel(form)

        def two_steps_and_scores(params, batch, model=model):
            inputs = batch["encoder_input_tokens"]
            first, cache = model.start_decoding(params, inputs, max_length=6)
            second, _ = model.decode_step(params, jnp.argmax(first, -1), jnp.int32(1), cache)
            return first, second, model.score_batch(params, batch)

        found.append(jax.jit(two_steps_and_scores)(params, batch))
    for want, have in zip(*found, strict=True):
        np.testing.assert_allclose(have, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("change", [{"remat_policy": "some"}, {"scan_layers": "yes"}])
def test_settings_that_do_not_exist_are_refused(change, tiny):
    with pytest.raises(ValueError, match=f"T5Config.{next(iter(change))} must be"):
        tiny(model=change)
