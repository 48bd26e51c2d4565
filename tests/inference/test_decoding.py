"""Decoding algorithms against brute force, on a table of logits in place of a model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.inference.beam_search import BeamSearch, brevity_penalty
from upcycle_jax.inference.decoding import NEGATIVE, Greedy, Sampling, keep_top_k, keep_top_p
from upcycle_jax.models.generation import DecodingCache

EOS, LENGTH = 1, 4


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def decode_table(table, keys, algorithm, vocab, length, eos):
    """Compiled once for tables of one shape."""
    inputs, prefixes, _ = table.shape

    # The number of a prefix: 0 is the empty one; its child by token t is number * vocab + 1 + t.
    def next_logits(tokens, index, cache):
        number = jnp.minimum(cache.growing["number"] * vocab + 1 + tokens, prefixes - 1)
        return table[cache.fixed["input"], number], cache.replace(growing={"number": number})

    cache = DecodingCache(
        growing={"number": jnp.zeros(inputs, jnp.int32)}, fixed={"input": jnp.arange(inputs)}
    )
    return algorithm.decode(
        next_logits, table[:, 0], cache, max_length=length, eos_id=eos, keys=keys
    )


class Table:
    """A model over `vocab` tokens whose logits depend on the whole sequence so far: each input has
    a random table by prefix.

    Tokens from `vocab` to `width` exist and are practically impossible.
    """

    def __init__(
        self,
        inputs: int,
        vocab: int,
        seed: int = 0,
        length: int = LENGTH,
        scale: float = 2.0,
        width: int = 0,
    ):
        random = np.random.default_rng(seed)
        self.vocab, self.length, self.width = vocab, length, width or vocab
        self.prefixes = sum(vocab**n for n in range(length))
        table = random.normal(size=(inputs, self.prefixes, vocab)) * scale
        self.table = table.astype(np.float32)

    def decode(self, algorithm, rows=slice(None), keys=None, eos=EOS):
        width = self.width - self.vocab
        table = np.pad(self.table[rows], ((0, 0), (0, 0), (0, width)), constant_values=-1e4)
        decoded = decode_table(table, keys, algorithm, self.vocab, self.length, eos)
        return jax.tree.map(np.asarray, decoded)

    def log_probability(self, row, tokens):
        """Of the tokens up to EOS."""
        table = np.asarray(jax.nn.log_softmax(self.table[row]))
        number, total = 0, 0.0
        for token in tokens:
            total += table[number, token]
            number = number * self.vocab + 1 + token
            if token == EOS:
                break
        return total

    def finished_sequences(self):
        """All token sequences that end with their only EOS, up to the length."""
        others = [token for token in range(self.vocab) if token != EOS]
        for n in range(self.length):
            for start in itertools.product(others, repeat=n):
                yield (*start, EOS)


def filled(sequence):
    return tuple(sequence) + (0,) * (LENGTH - len(sequence))


def draw_keys(rows, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(rows))


def test_greedy_takes_the_most_probable_token():
    model = Table(inputs=5, vocab=6)
    got = model.decode(Greedy())
    for row in range(5):
        number, want = 0, []
        while len(want) < LENGTH and (not want or want[-1] != EOS):
            want.append(int(np.argmax(model.table[row, number])))
            number = number * 6 + 1 + want[-1]
        assert tuple(got.tokens[row, 0]) == filled(want)
        np.testing.assert_allclose(got.scores[row, 0], model.log_probability(row, want), rtol=1e-5)


# Whatever the exponent, the way is the same; of narrow beams, one has none.
SLOW_ALPHAS = [pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.0, 2.0)]


@pytest.mark.parametrize("alpha", [0.6, *SLOW_ALPHAS])
def test_wide_beams_find_the_best_of_all_sequences(alpha):
    # At most 27 prefixes without EOS of 3 tokens each: 28 beams prune none of them. They need a
    # vocabulary of 56.
    model = Table(inputs=3, vocab=4, seed=1, width=56)
    got = model.decode(BeamSearch(num_decodes=28, alpha=alpha))
    for row in range(3):
        ranked = sorted(
            model.finished_sequences(),
            key=lambda sequence: (
                -model.log_probability(row, sequence) / float(brevity_penalty(alpha, len(sequence)))
            ),
        )
        for place in range(5):
            assert tuple(got.tokens[row, place]) == filled(ranked[place])
            want = model.log_probability(row, ranked[place]) / float(
                brevity_penalty(alpha, len(ranked[place]))
            )
            np.testing.assert_allclose(got.scores[row, place], want, rtol=1e-4)


def beam_by_hand(model, row, beams, alpha, ends=(EOS,)):
    """Beam search over Python lists: live and finished sets as the class describes, without early
    ending. Scores of sequences that go on after EOS are none: `ends` holds EOS.
    """
    live, finished = [((), 0.0)], []
    for _ in range(LENGTH):
        extended = []
        for tokens, _ in live:
            for token in range(model.vocab):
                extended.append(((*tokens, token), model.log_probability(row, (*tokens, token))))
        extended = sorted(extended, key=lambda item: -item[1])[: (1 + len(ends)) * beams]
        finished += [
            (t, s / float(brevity_penalty(alpha, len(t)))) for t, s in extended if t[-1] in ends
        ]
        finished = sorted(finished, key=lambda item: -item[1])[:beams]
        live = [item for item in extended if item[0][-1] not in ends][:beams]
    unfinished = [(t, s / float(brevity_penalty(alpha, LENGTH))) for t, s in live]
    return (finished + sorted(unfinished, key=lambda item: -item[1]))[:beams]


@pytest.mark.parametrize(
    ("beams", "alpha", "seed"),
    [
        (1, 0.6, 0),
        pytest.param(2, 0.6, 1, marks=pytest.mark.slow),
        (3, 0.0, 2),
        pytest.param(3, 1.5, 3, marks=pytest.mark.slow),
    ],
)
def test_narrow_beams_equal_a_search_over_lists(beams, alpha, seed):
    model = Table(inputs=6, vocab=7, seed=seed)
    got = model.decode(BeamSearch(num_decodes=beams, alpha=alpha))
    for row in range(6):
        for place, (tokens, score) in enumerate(beam_by_hand(model, row, beams, alpha)):
            assert tuple(got.tokens[row, place]) == filled(tokens), (row, place)
            np.testing.assert_allclose(got.scores[row, place], score, rtol=1e-4)


def test_any_of_several_tokens_ends_a_sequence():
    model, ends = Table(inputs=6, vocab=8, seed=5), (EOS, 4, 6)
    greedy = model.decode(Greedy(), eos=ends)
    endless = model.decode(Greedy(), eos=-1).tokens[:, 0]
    for row in range(6):
        ended = np.flatnonzero(np.isin(endless[row], ends))
        length = ended[0] + 1 if len(ended) else LENGTH
        assert tuple(greedy.tokens[row, 0]) == filled(endless[row, :length])
    assert {int(token) for token in greedy.tokens.ravel()} & {4, 6}
    # 2 beams and 3 ends: up to 6 of the best extensions end, so that 8 are looked at.
    got = model.decode(BeamSearch(num_decodes=2), eos=ends)
    for row in range(6):
        for place, (tokens, score) in enumerate(beam_by_hand(model, row, 2, 0.6, ends)):
            assert tuple(got.tokens[row, place]) == filled(tokens), (row, place)
            np.testing.assert_allclose(got.scores[row, place], score, rtol=1e-4)
    with pytest.raises(ValueError, match="num_decodes=3 needs a vocabulary of at least 12 tokens"):
        model.decode(BeamSearch(num_decodes=3), eos=ends)


@pytest.mark.parametrize(
    "algorithm",
    [Greedy(), Sampling(num_decodes=2, top_k=4), BeamSearch(num_decodes=3)],
    ids=lambda a: type(a).__name__,
)
def test_an_input_decodes_alone_as_it_does_in_a_batch(algorithm):
    model = Table(inputs=5, vocab=7, seed=4)
    together = model.decode(algorithm, keys=draw_keys(range(5)))
    for row in (0, 3):
        alone = model.decode(algorithm, rows=slice(row, row + 1), keys=draw_keys([row]))
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-5)


def test_samples_follow_the_distribution():
    # One input, one position, 4000 draws: frequencies within 4 standard deviations of
    # softmax(logits / temperature).
    model = Table(inputs=1, vocab=5, length=1, scale=1.0)
    draws = 4000
    got = model.decode(Sampling(temperature=0.7, num_decodes=draws), keys=draw_keys([0]))
    want = np.asarray(jax.nn.softmax(model.table[0, 0] / 0.7))
    frequency = np.bincount(got.tokens[0, :, 0], minlength=5) / draws
    assert np.all(np.abs(frequency - want) < 4 * np.sqrt(want * (1 - want) / draws))
    # Scores are the model's own log-probabilities, and fall.
    log_probabilities = np.asarray(jax.nn.log_softmax(model.table[0, 0]))
    np.testing.assert_allclose(got.scores[0], log_probabilities[got.tokens[0, :, 0]], rtol=1e-5)
    assert np.all(np.diff(got.scores[0]) <= 0)


def test_cut_offs():
    # Probabilities 0.5, 0.25, 0.15, 0.1: top-p 0.7 needs the first two (0.5 alone is short of it),
    # 0.5 the first, 0.76 three.
    logits = jnp.log(jnp.array([[0.15, 0.5, 0.1, 0.25]]))

    def kept(result):
        return list(np.flatnonzero(np.asarray(result)[0] > NEGATIVE / 2))

    assert kept(keep_top_p(logits, 0.7)) == [1, 3]
    assert kept(keep_top_p(logits, 0.49)) == [1]
    assert kept(keep_top_p(logits, 0.76)) == [0, 1, 3]
    assert kept(keep_top_p(logits, 1.0)) == [0, 1, 2, 3]
    assert kept(keep_top_p(logits, 1e-6)) == [1]
    assert kept(keep_top_k(logits, 1)) == [1] and kept(keep_top_k(logits, 3)) == [0, 1, 3]
    assert kept(keep_top_k(logits, 0)) == kept(keep_top_k(logits, 9)) == [0, 1, 2, 3]


def test_top_k_of_one_is_greedy():
    model = Table(inputs=4, vocab=6, seed=5)
    sampled, greedy = (
        model.decode(Sampling(top_k=1), keys=draw_keys(range(4))),
        model.decode(Greedy()),
    )
    np.testing.assert_array_equal(sampled.tokens, greedy.tokens)


@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_cold_draws_are_greedy_and_keep_to_the_cut(cut):
    """Logits of -100 at temperature 1e-9 are -1e11, below the logit of tokens that may not be
    drawn.
    """
    model = Table(inputs=16, vocab=6, seed=5)
    model.table -= 100.0
    sampled = model.decode(Sampling(temperature=1e-9, **cut), keys=draw_keys(range(16)))
    np.testing.assert_array_equal(sampled.tokens, model.decode(Greedy()).tokens)


def test_brevity_penalty_by_hand():
    # ((5 + 7) / 6) ^ 0.5 = sqrt(2); length 1 is neutral.
    np.testing.assert_allclose(brevity_penalty(0.5, 7), np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(brevity_penalty(0.6, 1), 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(temperature=-1.0), "temperature must be at least 0, got -1.0"),
        (lambda: Sampling(top_k=-1), "top_k must be at least 0"),
        (lambda: Sampling(top_p=0.0), "top_p must be above 0"),
        (lambda: Sampling(num_decodes=0), "num_decodes must be at least 1"),
        (
            lambda: Sampling(temperature=0.0, num_decodes=2),
            "temperature 0 gives num_decodes=2 equal sequences",
        ),
        (lambda: BeamSearch(num_decodes=0), "num_decodes must be at least 1"),
        (lambda: BeamSearch(alpha=-0.1), "alpha must be at least 0"),
        (
            lambda: Table(1, 5).decode(BeamSearch(num_decodes=3)),
            "num_decodes=3 needs a vocabulary of at least 6 tokens, got 5",
        ),
        (lambda: Table(1, 5).decode(Sampling()), "needs a random key per input"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "decoder",
    [Greedy(), pytest.param(BeamSearch(num_decodes=3), marks=pytest.mark.slow)],
    ids=lambda d: type(d).__name__,
)
def test_a_model_decodes_with_each_algorithm(decoder, make_model, make_params, make_batch, keys):
    """Batched against alone beside empty rows, through a model with experts and its caches."""
    model = make_model(eval_expert_capacity_factor=0.5, min_expert_capacity=1)
    params, batch = make_params(model, eos=1.0), make_batch([5, 8, 3])
    one = {name: jnp.zeros_like(value).at[1].set(value[1]) for name, value in batch.items()}
    run = jax.jit(
        lambda params, batch, keys: model.predict_batch_with_aux(
            params, batch, decoder=decoder, keys=keys
        )
    )
    together = run(params, batch, keys(3))
    alone = run(params, one, keys(3))
    assert together.tokens.shape == (3, getattr(decoder, "num_decodes", 1), 8)
    np.testing.assert_array_equal(alone.tokens[1], together.tokens[1])
    np.testing.assert_allclose(alone.scores[1], together.scores[1], atol=1e-4)
    if isinstance(decoder, Greedy):
        # Scoring what was decoded gives the same log-probability. Token 0, which a trained model
        # does not produce, would be padding.
        tokens = np.asarray(together.tokens[:, 0])
        length = np.array([list(row).index(EOS) + 1 if EOS in row else 8 for row in tokens])
        written = np.arange(8) < length[:, None]
        whole = ~np.any((tokens == 0) & written, axis=1)
        assert whole.any()
        inputs = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        scored = batch | {
            "decoder_target_tokens": tokens,
            "decoder_input_tokens": inputs,
            "decoder_loss_weights": written,
        }
        np.testing.assert_allclose(
            jax.jit(model.score_batch)(params, scored)[whole], together.scores[whole, 0], atol=1e-4
        )
