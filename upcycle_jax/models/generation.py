"""What a decoding algorithm and a model say to each other. The algorithms are in `inference`."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.types import PyTree

EndIds = int | Sequence[int]
"""The token that ends a sequence, or all that do, none of them twice: chat models have several."""


@flax.struct.dataclass
class DecodingCache:
    """What a model keeps between the steps of decoding. The leading axis of every array is that of
    the sequences; what the arrays are, the model knows alone.

    Attributes:
      growing: of the positions so far, e.g. their keys and values.
      fixed: of the input; equal in all sequences that continue the same input.
    """

    growing: PyTree
    fixed: PyTree

    def repeated(self, times: int) -> "DecodingCache":
        """Each sequence `times` times, one after the other."""
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), self)

    def reordered(self, rows: jax.Array) -> "DecodingCache":
        """Continues in place i from sequence rows[i] (int32 `[sequences]`), which must have the
        same input.
        """
        growing = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), self.growing)
        return dataclasses.replace(self, growing=growing)


class NextLogits(Protocol):
    """One step of decoding: float32 logits `[sequences, vocab]` of the next token, and the cache
    after the step.
    """

    def __call__(
        self, tokens: jax.Array, index: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Steps.

        Args:
          tokens: int32 `[sequences]`, the tokens chosen last.
          index: int32 scalar, the position that they are at as inputs: 1 for the first tokens that
            were chosen.
          cache: from the step before.
        """
        ...


@flax.struct.dataclass
class Decoded:
    """Sequences that a decoding algorithm found, the best of each input first.

    Attributes:
      tokens: int32 `[batch, decodes, length]`; EOS is the last token, 0 follows.
      scores: float32 `[batch, decodes]`: the log-probability of the sequence, or what the algorithm
        ranks by.
    """

    tokens: jax.Array
    scores: jax.Array


@dataclasses.dataclass(frozen=True)
class DecodingStart:
    """What a search begins with.

    Attributes:
      next_logits: one step of the model.
      first_logits: float32 `[batch, vocab]`, logits of the first token.
      cache: after the step that gave them.
      max_length: tokens to produce at most, EOS included.
      eos_id: the token that ends a sequence, or all that do.
      keys: `[batch]` random keys, one per input, for algorithms that draw.
    """

    next_logits: NextLogits
    first_logits: jax.Array
    cache: DecodingCache
    max_length: int
    eos_id: EndIds
    keys: Any | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end a sequence."""
        return (self.eos_id,) if isinstance(self.eos_id, int) else tuple(self.eos_id)

    def ends(self, tokens: jax.Array) -> jax.Array:
        """Bool, of the shape of `tokens`: which of them end a sequence."""
        return (tokens[..., None] == jnp.asarray(self.eos_ids, jnp.int32)).any(axis=-1)


class DecodingAlgorithm(abc.ABC):
    """Finds likely sequences. `inference.decoding` and `inference.beam_search` have them."""

    def decode(
        self,
        next_logits: NextLogits,
        first_logits: jax.Array,
        cache: DecodingCache,
        *,
        max_length: int,
        eos_id: EndIds,
        keys: Any | None = None,
    ) -> Decoded:
        """Decodes a batch; a pure function that may be jitted. Arguments: see `DecodingStart`."""
        return self.search(
            DecodingStart(next_logits, first_logits, cache, max_length, eos_id, keys)
        )

    @abc.abstractmethod
    def search(self, start: DecodingStart) -> Decoded:
        """As `decode`."""
