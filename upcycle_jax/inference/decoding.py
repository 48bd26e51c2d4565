"""Decoding one token after the other: greedy, or drawn from the model's distribution.

Axis legend: B inputs, N sequences per input, V vocabulary, L length.
"""

import dataclasses
from typing import Annotated

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax import checks
from upcycle_jax.models.generation import Decoded, DecodingAlgorithm, DecodingCache, DecodingStart

NEGATIVE = -1e10
"""Logit of a token that may not be drawn: finite, so that differences of such logits are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(DecodingAlgorithm):
    """Draws each token from the model's distribution, sharpened and cut off as asked.

    Every draw depends on the input's own key, the sequence's number and the position only, so that
    the rest of a batch changes nothing.

    Attributes:
      temperature: logits are divided by it: below 1 likely tokens become likelier. 0 takes the most
        probable token, without a draw.
      top_k: draw among this many most probable tokens; 0 for all.
      top_p: draw among the fewest most probable tokens whose probabilities (at the temperature,
        after top_k) reach this sum; 1.0 for all (nucleus sampling, arXiv 1904.09751).
      num_decodes: N, sequences drawn per input. They are returned by falling log-probability.

    Raises:
      ValueError: a value out of range.
    """

    temperature: checks.NotNegative = 1.0
    top_k: checks.CountOrZero = 0
    top_p: Annotated[float, checks.Range(above=0, at_most=1)] = 1.0
    num_decodes: checks.Size = 1

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.temperature == 0 and self.num_decodes > 1:
            raise ValueError(
                f"temperature 0 gives num_decodes={self.num_decodes} equal sequences: raise it, or"
                " set num_decodes to 1"
            )

    def search(self, start: DecodingStart) -> Decoded:
        """Scores are log-probabilities under the model itself, whatever the temperature.

        Raises:
          ValueError: a temperature above 0 without keys.
        """
        first_logits, cache, keys = start.first_logits, start.cache, start.keys
        num_inputs, max_length = first_logits.shape[0], start.max_length
        if self.temperature > 0:
            if keys is None:
                raise ValueError(
                    "sampling needs a random key per input: give `keys`, e.g. jax.random.split(key,"
                    " batch_size)"
                )
            keys = jax.vmap(
                lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(
                    jnp.arange(self.num_decodes)
                )
            )(keys).reshape(-1)
        if self.num_decodes > 1:
            first_logits, cache = (
                jnp.repeat(first_logits, self.num_decodes, axis=0),
                cache.repeated(self.num_decodes),
            )

        state = _State(
            index=jnp.int32(0),
            tokens=jnp.zeros((first_logits.shape[0], max_length), jnp.int32),
            scores=jnp.zeros(first_logits.shape[0], jnp.float32),
            ended=jnp.zeros(first_logits.shape[0], bool),
            logits=first_logits,
            cache=cache,
        )

        def more(state: _State) -> jax.Array:
            return (state.index < max_length) & ~jnp.all(state.ended)

        def choose(state: _State) -> _State:
            chosen = jnp.where(state.ended, 0, self._choose(state.logits, keys, state.index))
            log_probabilities = jax.nn.log_softmax(state.logits, axis=-1)
            gained = jnp.take_along_axis(log_probabilities, chosen[:, None], axis=-1)[:, 0]
            return dataclasses.replace(
                state,
                index=state.index + 1,
                tokens=jax.lax.dynamic_update_slice_in_dim(
                    state.tokens, chosen[:, None], state.index, axis=1
                ),
                scores=state.scores + jnp.where(state.ended, 0.0, gained),
                ended=state.ended | start.ends(chosen),
            )

        def step(state: _State) -> _State:
            last = jax.lax.dynamic_index_in_dim(
                state.tokens, state.index - 1, axis=1, keepdims=False
            )
            logits, cache = start.next_logits(last, state.index, state.cache)
            return choose(dataclasses.replace(state, logits=logits, cache=cache))

        state = jax.lax.while_loop(more, step, choose(state))
        tokens = state.tokens.reshape(num_inputs, self.num_decodes, max_length)
        scores = state.scores.reshape(num_inputs, self.num_decodes)
        order = jnp.argsort(-scores, axis=1, stable=True)
        return Decoded(
            tokens=jnp.take_along_axis(tokens, order[..., None], axis=1),
            scores=jnp.take_along_axis(scores, order, axis=1),
        )

    def _choose(self, logits: jax.Array, keys: jax.Array | None, index: jax.Array) -> jax.Array:
        """Tokens int32 `[B * N]` for logits `[B * N, V]`."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # From the largest logit, which then stays above `NEGATIVE` at any temperature; the
        # distribution is the same.
        sharpened = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        allowed = keep_top_p(keep_top_k(sharpened, self.top_k), self.top_p)
        draw = jax.vmap(
            lambda key, row: jax.random.categorical(jax.random.fold_in(key, index), row)
        )
        return draw(keys, allowed).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Greedy(DecodingAlgorithm):
    """Takes the most probable token at every position; of equal ones, the lowest id."""

    def search(self, start: DecodingStart) -> Decoded:
        """Scores are log-probabilities."""
        return Sampling(temperature=0.0).search(start)


@flax.struct.dataclass
class _State:
    """Sequences `[B * N, ...]` that grow together; `index` is the number of tokens that they
    have.
    """

    index: jax.Array
    tokens: jax.Array
    scores: jax.Array
    ended: jax.Array
    logits: jax.Array
    cache: DecodingCache


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Logits `[..., V]` with all but the k largest of each row at `NEGATIVE` (ties with the k-th
    stay); k = 0 keeps all.
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= least, logits, NEGATIVE)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Logits `[..., V]` with all at `NEGATIVE` but the fewest most probable whose probabilities sum
    to p; p = 1.0 keeps all.
    """
    if p >= 1.0:
        return logits
    falling = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(falling, axis=-1)
    # A token stays where those before it do not reach p yet: so the first one always does.
    stays = jnp.cumsum(probabilities, axis=-1) - probabilities < p
    least = jnp.min(jnp.where(stays, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, NEGATIVE)
