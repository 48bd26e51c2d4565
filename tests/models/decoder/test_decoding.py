"""Cached decoding computes what the whole forward pass does, for every kind of attention and of MoE
layer, whatever stands beside a sequence and before it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.decoder.kinds import config, random_params
from upcycle_jax import trees
from upcycle_jax.features import DecoderOnlyFeatures
from upcycle_jax.inference.beam_search import BeamSearch, brevity_penalty
from upcycle_jax.inference.decoding import Greedy, Sampling
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models.base import Generative
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.moe.routing import TokensChoose
from upcycle_jax.partitioning import Partitioner

EOS, BOS, VOCAB = 2, 1, 50
LENGTHS = np.array([8, 3, 1, 6])
WIDTH, NEW = 8, 9
"""Prompts have up to 8 tokens, 9 follow: windows of 5 are left behind in the prompts and after."""
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (len(LENGTHS), WIDTH + NEW), np.int32)
KINDS = (
    "llama3",
    "mistral",
    "olmo",
    "olmo2",
    "gemma2",
    "gemma3",
    "smollm3",
    "gpt_neox",
    "capacity",
)
SLOW = ("llama3", "mistral", "olmo")
"""What OLMo clips, it clips before anything is cached. Another turn of keys is in
`test_longrope_turns_as_the_whole_row_says`; windows are in Gemma and Mixtral.
"""

ONE_LAYER = {"num_layers": 1, "layer_types": ("sliding",), "sliding_window": 5}


def model_of(kind, **changes):
    """A model, where nothing else is said of two layers where they differ or of one, and its
    parameters, nested.
    """
    whole = config(kind)
    few = {"num_layers": 2 if len(set(whole.layer_types)) > 1 or whole.no_rope_layers else 1}
    few |= {"layer_types": whole.layer_types[: few["num_layers"]]}
    few |= {"no_rope_layers": (1,)} if whole.no_rope_layers else {}
    model = DecoderModel(
        dataclasses.replace(whole, **few | changes), features=DecoderOnlyFeatures(bos_id=BOS)
    )
    return model, trees.unflatten(random_params(model))


def for_inference(model):
    return DecoderModel(model.config.for_inference, features=model.features)


def step_by_step(model, params, rows=slice(None), width=WIDTH):
    """Float32 `[B, NEW + 1, V]`: logits after each prompt and after each of the tokens that follow,
    from the caches.
    """

    @jax.jit
    def run(params, tokens, lengths):
        prompts = jnp.pad(tokens[:, :WIDTH], ((0, 0), (0, max(width - WIDTH, 0))))[:, :width]
        first, cache = model.start_decoding(params, prompts, max_length=NEW + 1, lengths=lengths)

        def step(cache, at):
            logits, cache = model.decode_step(params, tokens[:, WIDTH + at - 1], at, cache)
            return cache, logits

        _, rest = jax.lax.scan(step, cache, jnp.arange(1, NEW + 1))
        return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], axis=1)

    return run(params, TOKENS[rows], LENGTHS[rows])


def whole(model, params):
    """The same from one forward pass over whole sequences."""
    tokens, segments = np.zeros_like(TOKENS), np.zeros_like(TOKENS)
    for row, length in enumerate(LENGTHS):
        sequence = np.concatenate([TOKENS[row, :length], TOKENS[row, WIDTH:]])
        tokens[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
    logits = jax.jit(for_inference(model).token_logits)(params, tokens, segments)
    at = LENGTHS[:, None] - 1 + np.arange(NEW + 1)
    return np.take_along_axis(np.asarray(logits), at[..., None], axis=1)


@pytest.fixture(scope="module")
def mixtral():
    """A model, its parameters and what it gives step by step."""
    model, params = model_of("mixtral", **ONE_LAYER)
    return model, params, step_by_step(model, params)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS]
)
def test_cached_decoding_equals_the_full_forward_pass(kind):
    model, params = model_of(kind)
    np.testing.assert_allclose(step_by_step(model, params), whole(model, params), atol=1e-4)


def test_cached_decoding_of_dropless_experts_equals_the_full_forward_pass(mixtral):
    model, params, steps = mixtral
    np.testing.assert_allclose(steps, whole(model, params), atol=1e-4)


def tight(**moe):
    """Few slots: grouped routing drops tokens."""
    settings = {"router": TokensChoose(), "eval_expert_capacity_factor": 0.5}
    return DecoderMoeConfig(num_experts=4, min_expert_capacity=1, **settings | moe)


# Attention is that of "mistral" in either case.
@pytest.mark.parametrize("kind", [pytest.param("mistral", marks=pytest.mark.slow), "tight"])
def test_neighbours_and_padding_change_nothing(kind):
    changes = {"moe": tight(), **ONE_LAYER} if kind == "tight" else {}
    model, params = model_of("mistral", **changes)
    together = step_by_step(model, params)
    np.testing.assert_allclose(
        step_by_step(model, params, slice(1, 2), width=3)[0], together[1], atol=1e-5
    )
    np.testing.assert_allclose(step_by_step(model, params, width=11), together, atol=1e-5)


def test_grouped_routing_does_depend_on_the_batch():
    model, params = model_of("mistral", moe=tight(inference_routing="grouped"), **ONE_LAYER)
    alone = step_by_step(model, params, slice(1, 2))[0]
    assert np.abs(alone - step_by_step(model, params)[1]).max() > 1e-2


def test_eight_devices_compute_what_one_does(mixtral):
    model, params, want = mixtral
    with Partitioner(num_expert_partitions=2, num_model_partitions=2).activate():
        np.testing.assert_allclose(step_by_step(model, params), want, atol=1e-4)


def test_a_cache_holds_what_its_layer_sees_of_its_own_heads():
    types = ("sliding", "full", "sliding")
    model, params = model_of("gemma2", num_layers=3, layer_types=types)
    prompts = TOKENS[:, :WIDTH]
    _, cache = jax.eval_shape(
        lambda p: model.start_decoding(p, prompts, max_length=NEW + 1), params
    )
    shapes = {path: leaf.shape for path, leaf in trees.flatten(cache.growing).items()}
    # 2 of 4 heads have keys; a window is 5 positions, the rows have 8 + 9.
    for layer, places in enumerate((5, 17, 5)):
        for name in ("key", "value"):
            path = f"decoder/layers_{layer}/self_attention/cached_{name}"
            assert shapes[path] == (len(LENGTHS), 2, places, 8)


def test_bfloat16_decodes_too():
    model, params = model_of("gemma2", dtype="bfloat16", **ONE_LAYER)
    got, want = step_by_step(model, params), whole(model, params)
    assert got.dtype == jnp.float32
    assert np.median(np.abs(got - want)) < 0.05 * np.std(want)


def batch_of(model, prompts, length):
    """A batch of examples with these inputs, and targets that must not be looked at."""
    examples = [{"inputs": prompt, "targets": [7, 9, 8, 7]} for prompt in prompts]
    lengths = {"inputs": length, "targets": NEW}
    return model.features.pad(examples, lengths, len(prompts) + 1)


def prompts_of(rows):
    return [TOKENS[row, : LENGTHS[row]] for row in rows]


@pytest.fixture(scope="module")
def ending():
    """A model whose sequences end, in different places."""
    model, params = model_of("mistral")
    kernel = params["decoder"]["logits_dense"]["kernel"]
    dense = {"kernel": kernel.copy()}
    dense["kernel"][:, EOS] *= 2.5
    return model, {**params, "decoder": {**params["decoder"], "logits_dense": dense}}


def predicted(model, params, prompts, length=WIDTH, decoder=None, keys=None):
    @jax.jit
    def run(params, batch):
        return model.predict_batch_with_aux(
            params,
            batch,
            decoder=decoder or Greedy(),
            keys=keys,
            eos_id=EOS,
            max_length=NEW,
        )

    return jax.tree.map(np.asarray, run(params, batch_of(model, prompts, length)))


def test_greedy_predictions_are_the_most_likely_tokens(ending):
    model, params = ending
    got = predicted(model, params, prompts_of(range(4)))
    # Of arrays of JAX every slice would be a program.
    run = jax.jit(for_inference(model).token_logits)
    logits = lambda *args: np.asarray(run(*args))
    lengths = []
    for row, prompt in enumerate(prompts_of(range(4))):
        sequence, total = [BOS, *prompt], 0.0
        for _ in range(NEW):
            tokens = np.zeros((1, 1 + WIDTH + NEW), np.int32)
            tokens[0, : len(sequence)] = sequence
            after = logits(params, tokens)[0, len(sequence) - 1]
            sequence.append(int(np.argmax(after)))
            total += float(jax.nn.log_softmax(after)[sequence[-1]])
            if sequence[-1] == EOS:
                break
        want = sequence[1 + len(prompt) :]
        lengths.append(len(want))
        np.testing.assert_array_equal(got.tokens[row, 0], want + [0] * (NEW - len(want)))
        np.testing.assert_allclose(got.scores[row, 0], total, atol=1e-4)
    assert min(lengths) < NEW  # one of them ends


@pytest.mark.parametrize(
    "decoder", [Sampling(num_decodes=2), BeamSearch(num_decodes=3)], ids=lambda d: type(d).__name__
)
def test_a_prompt_decodes_alone_as_it_does_in_a_batch(decoder, ending):
    model, params = ending
    keys = jax.random.split(jax.random.key(0), 5)
    together = predicted(model, params, prompts_of(range(4)), decoder=decoder, keys=keys)
    alone = predicted(
        model, params, prompts_of([1]), length=5, decoder=decoder, keys=keys[jnp.array([1, 0])]
    )
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
    np.testing.assert_allclose(alone.scores[0], together.scores[1], atol=1e-4)


def test_scores_are_sums_of_log_probabilities_of_targets_alone():
    model, params = model_of("mistral", moe=tight(), **ONE_LAYER)
    examples = [
        {"inputs": TOKENS[0, :5], "targets": TOKENS[0, 8:12]},
        {"inputs": TOKENS[1, :2], "targets": TOKENS[1, 8:10]},
    ]
    score = jax.jit(model.score_batch)
    scores = score(params, model.features.pad(examples, {"inputs": 6, "targets": 5}, 4))
    logits = jax.jit(for_inference(model).token_logits)
    for row, example in enumerate(examples):
        sequence = np.concatenate([[BOS], example["inputs"], example["targets"]])
        after = jax.nn.log_softmax(logits(params, sequence[None, :-1]))[0]
        first = len(example["inputs"])
        want = sum(float(after[first + i, t]) for i, t in enumerate(example["targets"]))
        np.testing.assert_allclose(scores[row], want, atol=1e-4)
    alone = score(params, model.features.pad(examples[1:], {"inputs": 2, "targets": 3}, 1))
    np.testing.assert_allclose(alone[0], scores[1], atol=1e-4)


def test_without_inputs_the_prompt_is_bos(ending):
    model, params = ending
    batch = model.features.pad([{"targets": [5, 6, 7]}], {"targets": NEW}, 1)

    @functools.partial(jax.jit, static_argnames="max_length")
    def run(params, batch, max_length):
        return model.predict_batch(
            params, batch, decoder=Greedy(), eos_id=EOS, max_length=max_length
        )

    got = run(params, batch, NEW)
    np.testing.assert_array_equal(got, predicted(model, params, [[]], length=1).tokens[:1, 0])
    # A row of 9 positions lets 9 tokens be produced where nothing else is asked for.
    np.testing.assert_array_equal(run(params, batch, None), got)
    with pytest.raises(ValueError, match="max_length must be from 1 to 9, .* got 10"):
        run(params, batch, NEW + 1)


def test_wide_beams_find_the_best_of_all_sequences():
    # 3 tokens of which one ends, at most 3 of them: 1 + 2 + 4 sequences that end, and 2 x 2 x 2
    # beams that never do. 8 beams prune none; they need a vocabulary of 16, of which the other
    # tokens are impossible.
    eos, length, tokens = 0, 3, (1, 2)
    settings = DecoderConfig(16, 8, 1, 2, 8, 16, 1, logits_bias=True)
    model = DecoderModel(settings, features=DecoderOnlyFeatures(bos_id=BOS))
    params = random_params(model)
    params["decoder/logits_dense/bias"] = np.where(np.arange(16) < 3, 0, -1e4).astype(np.float32)
    params = trees.unflatten(params)
    ended = [(*start, eos) for n in range(length) for start in np.ndindex(*(2,) * n)]
    ended = [(*(tokens[i] for i in sequence[:-1]), eos) for sequence in ended]
    inputs, lengths = [5, 9, 4], {"inputs": 3, "targets": length}
    examples = [{"inputs": inputs, "targets": list(sequence)} for sequence in ended]
    scores = jax.jit(model.score_batch)(params, model.features.pad(examples, lengths, len(ended)))
    alpha = 0.6
    ranked = sorted(
        (
            (float(score / brevity_penalty(alpha, len(sequence))), sequence)
            for score, sequence in zip(scores, ended, strict=True)
        ),
        reverse=True,
    )
    batch = model.features.pad([{"inputs": inputs, "targets": []}], lengths, 1)
    decoder = BeamSearch(num_decodes=8, alpha=alpha)
    found = jax.jit(
        lambda p: model.predict_batch_with_aux(
            p, batch, decoder=decoder, eos_id=eos, max_length=length
        )
    )(params)
    for place, (score, sequence) in enumerate(ranked):
        want = [*sequence, *[0] * (length - len(sequence))]
        np.testing.assert_array_equal(found.tokens[0, place], want)
        np.testing.assert_allclose(found.scores[0, place], score, atol=1e-4)


def test_it_is_a_model_that_generates():
    assert isinstance(model_of("mistral")[0], Generative)


def test_longrope_turns_as_the_whole_row_says():
    # Rows of 8 + 9 positions are longer than 12: the long factors hold from the first one on.
    rope = Rope(
        kind="longrope",
        factor=2.0,
        original_length=12,
        short_factors=(1.0,) * 4,
        long_factors=(1.0, 2.0, 3.0, 4.0),
    )
    model, params = model_of("llama3", rope=rope)
    np.testing.assert_allclose(step_by_step(model, params), whole(model, params), atol=1e-4)
