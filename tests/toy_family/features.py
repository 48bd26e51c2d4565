"""The toy family's batches: a line of tokens, each of which is to be predicted from those before
it.

Axis legend: B rows, T tokens of a row.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from upcycle_jax.features.base import check_lengths


@dataclasses.dataclass(frozen=True)
class LineFeatures:
    """A `FeatureConverter`: `line` int32 `[B, T]` is made of the task feature 'text'."""

    task_features: ClassVar[tuple[str, ...]] = ("text",)
    optional_features: ClassVar[tuple[str, ...]] = ()
    annotations: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[str] = "line"
    unit: ClassVar[str] = "tokens"

    @property
    def usual_lengths(self):
        return {"text": 512}

    def specs(self, batch_size, lengths, *, packed=False):
        import jax

        check_lengths(self, lengths)
        return {"line": jax.ShapeDtypeStruct((batch_size, lengths["text"]), np.dtype(np.int32))}

    def pad(self, examples, lengths, rows):
        line = np.zeros((rows, lengths["text"]), np.int32)
        for row, example in enumerate(examples):
            tokens = np.asarray(example["text"], np.int32)[: lengths["text"]]
            line[row, : len(tokens)] = tokens
        return {"line": line}

    def pack(self, rows, lengths):
        raise ValueError("toy models have no packed batches")

    def row_capacity(self, lengths):
        return (lengths["text"],)

    def row_usage(self, sizes):
        return sizes

    def random(self, vocab_size, *, batch_size=2, length=32, seed=0):
        rng = np.random.default_rng(seed)
        return {"line": rng.integers(1, vocab_size, (batch_size, length), np.int32)}

    def real_targets(self, batch):
        return batch["line"] > 0

    def describe(self, batch):
        rows, length = np.shape(batch["line"])
        return f"{rows} x {length} text"

    def seqio_converter(self, *, pack):
        raise ValueError("toy models read no SeqIO tasks")
