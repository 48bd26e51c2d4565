"""The tokens on which two models are compared: random, or a batch of real text with its origin."""

import dataclasses

import numpy as np

from upcycle_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What both models are run on.

    Attributes:
      batch: model features.
      origin: where it comes from, for the proof: 'random', or a task's name and split.
      rows_left_out: rows that the batch had beyond those here.
    """

    batch: Batch
    origin: str
    rows_left_out: int = 0

    @classmethod
    def random(cls, vocab_size: int) -> "Tokens":
        """See `random_tokens`."""
        return cls(random_tokens(vocab_size), "random")

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return int(np.shape(self.batch["decoder_target_tokens"])[0])

    def first_rows(self, count: int) -> "Tokens":
        """The first rows alone."""
        batch = {name: values[:count] for name, values in self.batch.items()}
        return Tokens(batch, self.origin, self.rows_left_out + max(0, self.num_rows - count))

    @property
    def description(self) -> str:
        """The origin with the shape, e.g. 'random: 2 x 32 inputs, 2 x 32 targets'."""
        inputs, targets = (
            np.shape(self.batch[f"{name}_tokens"]) for name in ("encoder_input", "decoder_target")
        )
        left_out = f", {self.rows_left_out} more rows left out" if self.rows_left_out else ""
        return (
            f"{self.origin}: {inputs[0]} x {inputs[1]} inputs, {targets[0]} x {targets[1]}"
            f" targets{left_out}"
        )


def random_tokens(
    vocab_size: int, *, batch_size: int = 2, length: int = 32, seed: int = 0
) -> dict[str, np.ndarray]:
    """A batch of random token ids, the last quarter of the second row padded; for where no text is
    at hand.
    """
    rng = np.random.default_rng(seed)
    inputs = rng.integers(1, vocab_size, (batch_size, length), np.int32)
    targets = rng.integers(1, vocab_size, (batch_size, length), np.int32)
    inputs[1:, length - length // 4 :] = 0
    targets[1:, length - length // 4 :] = 0
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }
