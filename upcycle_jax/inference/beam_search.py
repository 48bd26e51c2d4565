"""Beam search with length normalisation.

Axis legend: B inputs, N beams per input, V vocabulary, L length.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax import checks
from upcycle_jax.models.generation import Decoded, DecodingAlgorithm, DecodingCache, DecodingStart

IMPOSSIBLE = -1.0e7
"""Score of a beam that is not there: below every real one, and finite."""


def brevity_penalty(alpha: float, length: jax.Array | int) -> jax.Array:
    """((5 + length) / 6) ^ alpha, by which log-probabilities are divided (arXiv 1609.08144, section
    7).
    """
    return jnp.power((5.0 + jnp.asarray(length, jnp.float32)) / 6.0, alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch(DecodingAlgorithm):
    """Keeps the N most probable unfinished sequences and the N best finished ones, as T5X does.

    At each position every live beam is extended by every token. Of the 2N best extensions (where
    several tokens end sequences: N more for each) those that end are candidates for the finished
    set, ranked by log-probability / `brevity_penalty(alpha, tokens)`; the N best of the others live
    on. An input is done when no live beam can still beat the worst of its N finished sequences.
    Sequences without EOS are returned only for inputs that have fewer than N with one, and rank
    behind those.

    Attributes:
      num_decodes: N.
      alpha: 0 ranks by log-probability, which favours short sequences; larger values favour longer
        ones. T5X's default is 0.6.

    Raises:
      ValueError: a value out of range.
    """

    num_decodes: checks.Size = 4
    alpha: checks.NotNegative = 0.6

    def __post_init__(self) -> None:
        checks.check_fields(self)

    def search(self, start: DecodingStart) -> Decoded:
        """Scores are log-probabilities divided by the brevity penalty.

        Raises:
          ValueError: the extensions looked at are more than the vocabulary.
        """
        num_inputs, vocab_size = start.first_logits.shape
        beams, max_length = self.num_decodes, start.max_length
        if (least := _candidates(start, beams)) > vocab_size:
            raise ValueError(
                f"num_decodes={beams} needs a vocabulary of at least {least} tokens, got"
                f" {vocab_size}: lower num_decodes"
            )
        # All beams begin alike: only the first may be extended, so that the others do not repeat
        # it.
        only_first = jnp.where(jnp.arange(beams) == 0, 0.0, IMPOSSIBLE)
        state = _State(
            index=jnp.int32(0),
            live_scores=jnp.broadcast_to(only_first, (num_inputs, beams)).astype(jnp.float32),
            live_tokens=jnp.zeros((num_inputs, beams, max_length), jnp.int32),
            finished_scores=jnp.full((num_inputs, beams), IMPOSSIBLE, jnp.float32),
            finished_tokens=jnp.zeros((num_inputs, beams, max_length), jnp.int32),
            finished=jnp.zeros((num_inputs, beams), bool),
            cache=start.cache.repeated(beams),
        )

        def more(state: _State) -> jax.Array:
            best_possible = jnp.max(state.live_scores, axis=1) / brevity_penalty(
                self.alpha, max_length
            )
            worst_finished = jnp.min(
                jnp.where(state.finished, state.finished_scores, IMPOSSIBLE), axis=1
            )
            return (state.index < max_length) & ~jnp.all(worst_finished > best_possible)

        def step(state: _State) -> _State:
            last = jax.lax.dynamic_index_in_dim(
                state.live_tokens, state.index - 1, axis=2, keepdims=False
            )
            logits, cache = start.next_logits(last.reshape(-1), state.index, state.cache)
            return self._extend(dataclasses.replace(state, cache=cache), logits, start)

        state = self._extend(state, jnp.repeat(start.first_logits, beams, axis=0), start)
        state = jax.lax.while_loop(more, step, state)
        return self._ranked(state)

    def _extend(self, state: "_State", logits: jax.Array, start: DecodingStart) -> "_State":
        """Extends all live beams by one token; logits `[B * N, V]`."""
        num_inputs, beams = state.live_scores.shape
        log_probabilities = jax.nn.log_softmax(logits, axis=-1).reshape(num_inputs, beams, -1)
        vocab_size = log_probabilities.shape[-1]
        total = (state.live_scores[..., None] + log_probabilities).reshape(num_inputs, -1)
        scores, places = jax.lax.top_k(total, _candidates(start, beams))
        parents, chosen = places // vocab_size, (places % vocab_size).astype(jnp.int32)
        tokens = jnp.take_along_axis(state.live_tokens, parents[..., None], axis=1)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[..., None], state.index, axis=2)
        ends = start.ends(chosen)

        live_scores, kept = jax.lax.top_k(jnp.where(ends, IMPOSSIBLE, scores), beams)
        kept_parents = jnp.take_along_axis(parents, kept, axis=1)
        rows = (kept_parents + jnp.arange(num_inputs)[:, None] * beams).reshape(-1)

        length = state.index + 1
        # Extensions of beams that are not there end nowhere.
        ends = ends & (scores > IMPOSSIBLE / 2)
        end_scores = jnp.where(ends, scores / brevity_penalty(self.alpha, length), IMPOSSIBLE)
        all_scores = jnp.concatenate([state.finished_scores, end_scores], axis=1)
        finished_scores, best = jax.lax.top_k(all_scores, beams)
        all_tokens = jnp.concatenate([state.finished_tokens, tokens], axis=1)
        all_finished = jnp.concatenate([state.finished, ends], axis=1)
        return dataclasses.replace(
            state,
            index=length,
            live_scores=live_scores,
            live_tokens=jnp.take_along_axis(tokens, kept[..., None], axis=1),
            finished_scores=finished_scores,
            finished_tokens=jnp.take_along_axis(all_tokens, best[..., None], axis=1),
            finished=jnp.take_along_axis(all_finished, best, axis=1),
            cache=state.cache.reordered(rows),
        )

    def _ranked(self, state: "_State") -> Decoded:
        """The N best of each input: finished ones first."""
        beams = self.num_decodes
        live_scores = state.live_scores / brevity_penalty(self.alpha, state.index)
        scores = jnp.concatenate([state.finished_scores, live_scores], axis=1)
        tokens = jnp.concatenate([state.finished_tokens, state.live_tokens], axis=1)
        is_live = jnp.concatenate([~state.finished, jnp.ones_like(state.finished)], axis=1)
        # Sorted by (unfinished, falling score); unused finished slots carry the impossible score.
        order = jnp.lexsort((-scores, is_live), axis=1)[:, :beams]
        return Decoded(
            tokens=jnp.take_along_axis(tokens, order[..., None], axis=1),
            scores=jnp.take_along_axis(scores, order, axis=1),
        )


def _candidates(start: DecodingStart, beams: int) -> int:
    """Extensions that are looked at: even if each of the N beams ends with each token that ends,
    N live on.
    """
    return (1 + len(start.eos_ids)) * beams


@flax.struct.dataclass
class _State:
    """Beams `[B, N, ...]`; `index` is the number of tokens that live beams have. The cache's rows
    are the live beams, input by input.
    """

    index: jax.Array
    live_scores: jax.Array
    live_tokens: jax.Array
    finished_scores: jax.Array
    finished_tokens: jax.Array
    finished: jax.Array
    cache: DecodingCache
