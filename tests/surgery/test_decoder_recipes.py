"""Every recipe on a small language model: its proof, and what is predicted of its function."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from upcycle_jax import state_tree, surgery
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.moe.routing import DroplessTopK, SigmoidTopK, TokensChoose
from upcycle_jax.surgery.function_check import check_function
from upcycle_jax.surgery.prediction import predict
from upcycle_jax.surgery.probe_batch import ProbeBatch
from upcycle_jax.surgery.verdict import Verdict

DENSE = DecoderConfig(
    vocab_size=64,
    emb_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=32,
)
TOKENS = ProbeBatch.random(DecoderModel(DENSE))
RENORMALISED = DroplessTopK(num_selected_experts=2, renormalize=True)
PLAIN = DroplessTopK(num_selected_experts=2)


def moe_model(router=RENORMALISED, config=DENSE, **settings):
    moe = DecoderMoeConfig(**{"num_experts": 4, "router": router, **settings})
    return DecoderModel(dataclasses.replace(config, moe=moe))


@functools.cache
def arrays(config):
    """Random parameters of a model, norms and routers too."""
    rng = np.random.default_rng(0)
    return {
        f"target/{path}": (
            rng.normal(size=spec.shape, scale=spec.shape[-2:][0] ** -0.5).astype(np.float32)
        )
        for path, spec in DecoderModel(config).param_specs().items()
    }


def converted(small, model, recipe, source=DENSE):
    reader = small.Reader(arrays(source))
    target = state_tree.parameter_specs(model.param_specs())
    plan = surgery.make_plan(reader.specs(), target, recipe)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    made = surgery.apply_online(plan, reader, dict.fromkeys(target, here))
    result = small.Reader({path: np.array(leaf) for path, leaf in made.items()})
    return types.SimpleNamespace(plan=plan, source=reader, result=result, model=model)


def checked(conversion):
    return check_function(
        conversion.plan, conversion.model, conversion.source, conversion.result, TOKENS
    )


def proven(conversion):
    return surgery.prove(conversion.plan, conversion.source, conversion.result)


recipe = functools.partial(surgery.Recipe, step="reset")
WHOLE_GROUPS = surgery.VirtualGroups(
    granularity=2, top_k=4, softmax_order="after_top_k", scaled="output"
)
GROUPS = recipe(expert_init=WHOLE_GROUPS, router_init=surgery.NormalRouter(repeat=2))
GRANULAR = {"num_experts": 8, "expert_mlp_dim": 16}
HALVES = {"expert_mlp_dim": 20, "shared_expert_mlp_dim": 12}
FOUR = dataclasses.replace(RENORMALISED, num_selected_experts=4)
CASES = {
    "copies": (moe_model(), recipe(), Verdict.EXACT, "experts are copies"),
    "copies, softmax after top-k": (
        moe_model(dataclasses.replace(PLAIN, softmax_order="after_top_k")),
        recipe(),
        Verdict.EXACT,
        "sum to 1",
    ),
    "copies, plain weights": (moe_model(PLAIN), recipe(), Verdict.SCALED, "not renormalised"),
    "copies, short of room": (
        moe_model(
            TokensChoose(renormalize=True), eval_expert_capacity_factor=1.0, min_expert_capacity=1
        ),
        recipe(),
        Verdict.SCALED,
        "slots for 64 tokens",
    ),
    "noise": (
        moe_model(),
        recipe(expert_init=surgery.NoisyCopies(relative=True)),
        Verdict.NOT_PRESERVED,
        "NoisyCopies changes the experts",
    ),
    "drop": (
        moe_model(),
        recipe(expert_init=surgery.DropUpcycling()),
        Verdict.NOT_PRESERVED,
        "DropUpcycling",
    ),
    "fine-grained": (
        moe_model(expert_mlp_dim=8),
        recipe(expert_init=surgery.QwenExperts()),
        Verdict.NOT_PRESERVED,
        "QwenExperts",
    ),
    "groups": (moe_model(FOUR, **GRANULAR), GROUPS, Verdict.EXACT, "whole groups"),
    "groups, plain weights": (
        moe_model(dataclasses.replace(FOUR, renormalize=False), **GRANULAR),
        GROUPS,
        Verdict.SCALED,
        "not renormalised",
    ),
    "groups that are torn": (
        moe_model(dataclasses.replace(FOUR, num_selected_experts=3), **GRANULAR),
        GROUPS,
        Verdict.NOT_PRESERVED,
        "3 experts per token are no whole groups of 2",
    ),
    "groups without repeated columns": (
        moe_model(FOUR, **GRANULAR),
        recipe(expert_init=WHOLE_GROUPS),
        Verdict.NOT_PRESERVED,
        "columns do not stand 2 times in a row",
    ),
    "groups scaled as in the paper": (
        moe_model(FOUR, **GRANULAR),
        recipe(
            expert_init=dataclasses.replace(WHOLE_GROUPS, scaled="all"),
            router_init=surgery.NormalRouter(repeat=2),
        ),
        Verdict.NOT_PRESERVED,
        "VirtualGroups changes",
    ),
    "shared": (
        moe_model(shared_expert_mlp_dim=12, shared_expert_gate=True),
        recipe(),
        Verdict.SCALED,
        "a shared expert is added",
    ),
    "shared zeros": (
        moe_model(shared_expert_mlp_dim=12, shared_expert_gate=True),
        recipe(shared_expert="zeros"),
        Verdict.EXACT,
        "copies",
    ),
    "halves, gated": (
        moe_model(shared_expert_gate=True, **HALVES),
        recipe(expert_init=surgery.SplitExperts()),
        Verdict.EXACT,
        "divide the dense MLP",
    ),
    "halves, one expert per token": (
        moe_model(dataclasses.replace(RENORMALISED, num_selected_experts=1), **HALVES),
        recipe(expert_init=surgery.SplitExperts()),
        Verdict.EXACT,
        "divide the dense MLP",
    ),
    "halves, plain weights": (
        moe_model(PLAIN, shared_expert_gate=True, **HALVES),
        recipe(expert_init=surgery.SplitExperts()),
        Verdict.SCALED,
        "not renormalised",
    ),
}


SLOW = {
    "copies, softmax after top-k",
    "halves, one expert per token",
    "shared zeros",
    "groups, plain weights",
    "K doubled",
    "K doubled, sigmoid",
    "K fixed, plain weights",
}
"""Cases that differ little from others: left to the longer run."""


def cases(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


@pytest.mark.parametrize("name", cases(CASES))
def test_the_result_is_proven_and_its_function_is_as_predicted(small, name):
    model, how, verdict, words = CASES[name]
    conversion = converted(small, model, how)
    proof = proven(conversion)
    assert proof.ok, proof.text()
    as_predicted(conversion, verdict, words, measured=name == "drop")


def as_predicted(conversion, verdict, words, *, measured=False):
    """Asserts a prediction, and where it claims something (or `measured`) that it holds."""
    prediction = predict(conversion.plan, conversion.model, TOKENS.batch)
    assert prediction.verdict is verdict and words in prediction.reason
    if verdict is Verdict.NOT_PRESERVED and not measured:
        return
    outcome = checked(conversion)
    assert outcome.prediction == prediction and outcome.ok, outcome.text()
    equal = outcome.logit_difference < 1e-4 * max(1.0, outcome.logit_scale)
    assert equal == (verdict is Verdict.EXACT), outcome.text()
    assert ("with so many experts" in outcome.text()) == (verdict is Verdict.FEWER)


@pytest.mark.parametrize(
    "name", [pytest.param("copies", marks=pytest.mark.slow), "groups", "halves, gated"]
)
def test_plain_mlps_with_biases_are_exact_too(small, name):
    dense = dataclasses.replace(DENSE, mlp_bias=True, mlp_activations=("gelu_exact",))
    model, how, *_ = CASES[name]
    model = DecoderModel(dataclasses.replace(dense, moe=model.config.moe))
    conversion = converted(small, model, how, dense)
    assert proven(conversion).ok
    outcome = checked(conversion)
    assert outcome.prediction.verdict is Verdict.EXACT and outcome.ok, outcome.text()


def test_halves_must_add_up(small):
    model = moe_model(expert_mlp_dim=20, shared_expert_mlp_dim=10)
    with pytest.raises(
        ValueError, match="SHARED_EXPERT_MLP_DIM must add up to the dense MLP's hidden size"
    ):
        converted(small, model, recipe(expert_init=surgery.SplitExperts()))


MLP = "target/decoder/layers_1/mlp"


def swap(leaves, one, other):
    leaves[one], leaves[other] = leaves[other], leaves[one]


def disturb(leaves, path, index):
    leaves[path][index] += 0.5


FAULTS = {
    "gate and up swapped": (
        "copies",
        lambda leaves: swap(leaves, f"{MLP}/expert/wi_0/kernel", f"{MLP}/expert/wi_1/kernel"),
        {f"{MLP}/expert/wi_0/kernel", f"{MLP}/expert/wi_1/kernel"},
        "bits of source leaf target/decoder/layers_1/mlp/wi_1/kernel",
    ),
    "a random expert": (
        "copies",
        lambda leaves: disturb(leaves, f"{MLP}/expert/wo/kernel", 3),
        {f"{MLP}/expert/wo/kernel"},
        "expert 3",
    ),
    "a missing expert": (
        "copies",
        lambda leaves: leaves.update(
            {f"{MLP}/expert/wo/kernel": leaves[f"{MLP}/expert/wo/kernel"][:3]}
        ),
        {f"{MLP}/expert/wo/kernel"},
        "planned",
    ),
    "a shared expert that is not doubled": (
        "halves, gated",
        lambda leaves: leaves.update(
            {f"{MLP}/shared_expert/wo/kernel": leaves[f"{MLP}/shared_expert/wo/kernel"] / 2}
        ),
        {f"{MLP}/shared_expert/wo/kernel"},
        "values that must be copies differ",
    ),
    "a gate that is not zero": (
        "halves, gated",
        lambda leaves: disturb(leaves, f"{MLP}/shared_expert_gate/kernel", (3, 0)),
        {f"{MLP}/shared_expert_gate/kernel"},
        "1 of 16 values",
    ),
    "another router column": (
        "groups",
        lambda leaves: disturb(leaves, f"{MLP}/router/router_weights/w/kernel", (2, 5)),
        {f"{MLP}/router/router_weights/w/kernel"},
        "",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_by_the_proof_and_by_the_function_check(small, name):
    case, damage, wrong, words = FAULTS[name]
    model, how, *_ = CASES[case]
    conversion = converted(small, model, how)
    damage(conversion.result.arrays)
    proof = proven(conversion)
    assert {leaf.path for leaf in proof.leaves if not leaf.ok} == wrong
    assert words in proof.text()
    if proof.readable:
        outcome = checked(conversion)
        assert not outcome.ok and outcome.first_divergence == "decoder/layers_1"


def enlarged(small, router, init, before=RENORMALISED, **settings):
    """A conversion of an MoE of 4 experts (of 32 hidden units) into one of more."""
    source = moe_model(before).config
    moe = {"num_experts": 4 * init.copies, "router": router, **settings}
    model = moe_model(config=DENSE, **moe)
    conversion = converted(small, model, recipe(expert_init=init), source)
    assert proven(conversion).ok, proven(conversion).text()
    return conversion


SELECTED = functools.partial(dataclasses.replace, RENORMALISED)
TWICE = surgery.MoreExperts(copies=2)
LARGER = {
    "K doubled": (SELECTED(num_selected_experts=4), TWICE, {}, Verdict.EXACT, "all copies"),
    "K doubled, plain weights": (
        SELECTED(num_selected_experts=4, renormalize=False),
        TWICE,
        {"before": PLAIN},
        Verdict.EXACT,
        "all copies",
    ),
    "K doubled, sigmoid": (
        SigmoidTopK(num_selected_experts=4, dropless=True),
        TWICE,
        {"before": SigmoidTopK(num_selected_experts=2, dropless=True)},
        Verdict.EXACT,
        "all copies",
    ),
    "K doubled, sigmoid that does not divide": (
        SigmoidTopK(num_selected_experts=4, dropless=True, renormalize=False),
        TWICE,
        {"before": SigmoidTopK(num_selected_experts=2, dropless=True, renormalize=False)},
        Verdict.NOT_PRESERVED,
        "weights of SigmoidTopK do not divide over copies",
    ),
    "parts of which some are not chosen": (
        SELECTED(num_selected_experts=6),
        surgery.MoreExperts(copies=4, split=True, selected_before=2),
        {"expert_mlp_dim": 8},
        Verdict.NOT_PRESERVED,
        "Choose a multiple of 4",
    ),
    "split": (
        SELECTED(num_selected_experts=4),
        surgery.MoreExperts(copies=2, split=True),
        {"expert_mlp_dim": 16},
        Verdict.EXACT,
        "all copies",
    ),
    "K fixed": (
        SELECTED(num_selected_experts=2),
        dataclasses.replace(TWICE, selected_before=2),
        {},
        Verdict.FEWER,
        "2 of 2 copies of every expert are chosen where 2 experts were: the best 1 with all",
    ),
    "K fixed, plain weights": (
        SELECTED(num_selected_experts=2, renormalize=False),
        dataclasses.replace(TWICE, selected_before=2),
        {"before": PLAIN},
        Verdict.FEWER,
        "Choose 4 per token for the same function",
    ),
    "noise": (
        SELECTED(num_selected_experts=4),
        dataclasses.replace(TWICE, router_noise=0.1),
        {},
        Verdict.NOT_PRESERVED,
        "noise",
    ),
}


@pytest.mark.parametrize("name", cases(LARGER))
def test_a_larger_mixture_computes_what_is_predicted(small, name):
    router, init, others, verdict, words = LARGER[name]
    as_predicted(enlarged(small, router, init, **others), verdict, words)


def test_a_damaged_copy_is_found_where_fewer_experts_are_predicted(small):
    router, init, *_ = LARGER["K fixed"]
    conversion = enlarged(small, router, init)
    conversion.result.arrays[f"{MLP}/expert/wi_0/kernel"][:, 2, 3] += 0.5
    outcome = checked(conversion)
    assert not outcome.ok and outcome.first_divergence == "decoder/layers_1"


def test_experts_and_router_columns_of_a_larger_mixture_stand_side_by_side(small):
    """Experts 0 to 3 become 0 0 1 1 2 2 3 3, or their halves; NumPy is the oracle."""
    source = arrays(moe_model().config)
    whole = enlarged(small, SELECTED(num_selected_experts=4), TWICE).result.arrays
    halves = enlarged(
        small,
        SELECTED(num_selected_experts=4),
        surgery.MoreExperts(copies=2, split=True),
        expert_mlp_dim=16,
    ).result.arrays
    for name in ("wi_0", "wi_1", "wo"):
        path = f"{MLP}/expert/{name}/kernel"
        np.testing.assert_array_equal(whole[path], np.repeat(source[path], 2, axis=0))
        axis, factor = (1, 2) if name == "wo" else (2, 1)
        parts = np.stack(np.split(source[path], 2, axis=axis), axis=1)  # [E, 2, ., .]
        np.testing.assert_array_equal(halves[path], factor * parts.reshape(8, *parts.shape[2:]))
    router = f"{MLP}/router/router_weights/w/kernel"
    np.testing.assert_array_equal(whole[router], np.repeat(source[router], 2, axis=1))
