"""What makes the batches of a model family out of the examples of its tasks.

Everything above `models/` that reads data asks the model's converter which features its tasks need
and what a batch of them is, so that another family brings one converter and changes nothing there.

Axis legend: B rows of a batch, N examples, F task features, R sequences of a row.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import jax
    import seqio

Example = Mapping[str, Any]
"""One example of a task by task feature: token ids `[length]`, and whatever else the task keeps."""

Lengths = Mapping[str, int]
"""Tokens of each task feature: `DatasetConfig.task_feature_lengths`."""

HostBatch = dict[str, np.ndarray]
"""Model features by SeqIO name, e.g. `encoder_input_tokens` int32 `[B, length]`."""


class FeatureConverter(Protocol):
    """Makes a family's batches: padded, packed, random, and through SeqIO."""

    @property
    def task_features(self) -> tuple[str, ...]:
        """Features that every example has, and that `TASK_FEATURE_LENGTHS` names: ('inputs',
        'targets').
        """
        ...

    @property
    def optional_features(self) -> tuple[str, ...]:
        """Features that examples have besides where `TASK_FEATURE_LENGTHS` names them."""
        ...

    @property
    def annotations(self) -> tuple[str, ...]:
        """What examples may say of each of their tokens, without a length of its own; made use of
        where it is there.
        """
        ...

    @property
    def targets(self) -> str:
        """The model feature that holds what the model predicts; see `real_targets`."""
        ...

    @property
    def unit(self) -> str:
        """What real targets are, in the plural, where speed is told: 'tokens'."""
        ...

    @property
    def usual_lengths(self) -> Lengths:
        """Of a batch that costs are told of where nobody says how large it is."""
        ...

    def specs(
        self, batch_size: int, lengths: Lengths, *, packed: bool = False
    ) -> dict[str, "jax.ShapeDtypeStruct"]:
        """Shapes and dtypes of a batch.

        Raises:
          ValueError: a length is missing.
        """
        ...

    def pad(self, examples: Sequence[Example], lengths: Lengths, rows: int) -> HostBatch:
        """One example a row, zeros after it. Longer sequences are cut; missing rows are zeros."""
        ...

    def pack(self, rows: Sequence[Sequence[Example]], lengths: Lengths) -> HostBatch:
        """Several examples a row, told apart by segment ids and positions.

        Raises:
          ValueError: the family has no packed batches.
        """
        ...

    def row_capacity(self, lengths: Lengths) -> tuple[int, ...]:
        """Tokens that a packed row has room for, of each of its R sequences."""
        ...

    def row_usage(self, sizes: np.ndarray) -> np.ndarray:
        """Tokens of a row that packed examples take, int64 `[N, R]`, of which `sizes` `[N, F]` are
        the tokens by task feature.
        """
        ...

    def random(
        self, vocab_size: int | None, *, batch_size: int = 2, length: int = 32, seed: int = 0
    ) -> HostBatch:
        """A batch of random values with some padding, for where no data are at hand.

        Raises:
          ValueError: the family's inputs are tokens and there is no `vocab_size`.
        """
        ...

    def real_targets(self, batch: Mapping[str, Any]) -> Any:
        """Which values of `batch[self.targets]` are no padding: bool of its shape, and an array of
        its kind.
        """
        ...

    def describe(self, batch: Mapping[str, Any]) -> str:
        """The size of a batch in words: '2 x 32 inputs, 2 x 32 targets'."""
        ...

    def seqio_converter(self, *, pack: bool) -> "seqio.FeatureConverter":
        """SeqIO's own converter, which makes the same features."""
        ...


def token_features(features: FeatureConverter, lengths: Lengths) -> tuple[str, ...]:
    """The features that examples of these lengths have, in the order in which a row takes them:
    the optional ones stand first.
    """
    asked = (name for name in features.optional_features if name in lengths)
    return (*asked, *features.task_features)


def check_task(
    features: FeatureConverter, lengths: Lengths, having: Collection[str], *, what: str
) -> None:
    """Checks that the examples of a task are what lengths ask for.

    Args:
      features: the model's converter.
      lengths: by task feature.
      having: the task's features.
      what: the task, for the message.

    Raises:
      ValueError: a feature is missing, or one that the model would read has no length.
    """
    asked = token_features(features, lengths)
    missing = sorted(set(asked) - set(having))
    if missing:
        needed = " and ".join(map(repr, asked))
        raise ValueError(
            f"{what} has no feature {missing}, only {sorted(having)}: the model needs {needed}"
        )
    check_all_read(features, lengths, having, what=what)


def check_all_read(
    features: FeatureConverter, lengths: Lengths, having: Collection[str], *, what: str
) -> None:
    """Raises a ValueError where a model would read a feature of a task, but for its length.
    Arguments as in `check_task`.
    """
    asked = token_features(features, lengths)
    unread = [name for name in features.optional_features if name in having and name not in asked]
    if unread:
        raise ValueError(
            f"{what} has {unread}, which task_feature_lengths {dict(lengths)} does not name, so"
            " that the model would not see them: give a length, for example"
            f" {dict.fromkeys((*unread, *asked), 512)}, or learn plain text by OBJECTIVE ="
            " 'language_modeling'"
        )


def check_lengths(features: FeatureConverter, lengths: Lengths) -> None:
    """Raises a ValueError where a feature that the model needs has no length."""
    for name in token_features(features, lengths):
        length = lengths.get(name)
        if not isinstance(length, int) or length < 1:
            raise ValueError(
                f"task_feature_lengths is {dict(lengths)}: it needs a length of at least 1 for"
                f" '{name}', for example {dict.fromkeys(features.task_features, 512)}"
            )


def num_rows(batch: Mapping[str, Any]) -> int:
    """Rows of a batch."""
    return int(np.shape(next(iter(batch.values())))[0])
