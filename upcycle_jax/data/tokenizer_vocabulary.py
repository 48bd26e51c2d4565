"""A Hugging Face tokenizer as a vocabulary of SeqIO tasks."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from upcycle_jax.data.text.tokenizer import Tokenizer


class TokenizerVocabulary(seqio.Vocabulary):
    """See `tokenizer.Tokenizer`. Without extra ids: the model's embedding has a row for each token
    and no others.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(extra_ids=0)
        self.tokenizer = tokenizer

    @property
    def path(self) -> str:
        """The folder or file, as it was given."""
        return self.tokenizer.path

    def fingerprint(self) -> dict[str, Any]:
        """See `tokenizer.identity`."""
        return dict(self.tokenizer.identity)

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def pad_id(self) -> int:
        """What may follow EOS: the padding that is stated, or else EOS again."""
        stated = (self.tokenizer.pad_id, self.tokenizer.eos_id)
        return next((found for found in stated if found is not None), 0)

    @property
    def unk_id(self) -> int | None:
        return self.tokenizer.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.size

    def _encode(self, s: Any) -> Sequence[int]:
        return self.tokenizer.encode(s.decode("utf-8", "replace") if isinstance(s, bytes) else s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: Any) -> np.ndarray:
            # bytes, or outside of graphs an array without dimensions that holds them
            return np.asarray(self._encode(np.asarray(text, object).item()), np.int32)

        # Without state, so that tf.data can save where an iterator stands.
        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(values: np.ndarray) -> np.ndarray:
            rows = values.reshape(-1, values.shape[-1])
            texts = [self._decode(row.tolist()).encode() for row in rows]
            return np.asarray(texts, object).reshape(values.shape[:-1])

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        return tf.ensure_shape(text, ids.shape[:-1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and self.tokenizer == other.tokenizer

    def __hash__(self) -> int:
        return hash(self.tokenizer)

    def __str__(self) -> str:
        return f"TokenizerVocabulary({self.path!r}, {self.vocab_size} ids)"
