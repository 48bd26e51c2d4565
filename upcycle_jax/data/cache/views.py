"""The examples of one split of a cached task, by number: read, and finished as the task's last
steps would. No TensorFlow.

A cache holds what a task's steps gave up to SeqIO's `CacheDatasetPlaceholder`: token sequences
before anything that depends on lengths or is random. What comes after is done here, each time an
example is read, so that every epoch has fresh noise.

Axis legend: N examples, F asked features, L tokens of a segment.
"""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from upcycle_jax.data import draws
from upcycle_jax.data.cache.format import CachedTask, decode
from upcycle_jax.data.objectives import numpy as numpy_objectives
from upcycle_jax.features.names import DOCUMENTS, INPUTS, TARGETS

DENOISE, APPEND_EOS, APPEND_EOS_AFTER_TRIM = "denoise", "append_eos", "append_eos_after_trim"
STEPS = (DENOISE, APPEND_EOS, APPEND_EOS_AFTER_TRIM)
"""Steps after caching that are known here: `{'step': name}`, denoising with its 'denoisers'."""

_OFFSET_DRAW = 0x0FF5E7  # keeps the draws of offsets apart from those of noise
HELD_TOKENS = 2**24
"""A text of no more tokens stays in memory once it is read, in 64 MiB: to read a record again for
each of its segments would take half of an example's time.
"""

Tokens = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which example, and which time that it is seen.

    Attributes:
      place: number of the example in the split.
      epoch: passes over the split before this one.
      number: examples of the split drawn before this one; fixes the noise.
    """

    place: int
    epoch: int
    number: int


class View(Protocol):
    """Numbered examples."""

    def __len__(self) -> int:
        """Examples of one epoch."""
        ...

    def examples(self, drawn: Sequence[Draw], *, key: int) -> list[Tokens]:
        """Each of the asked features that there is, tokens as int32 and no longer than asked; `key`
        is the seed of noise.
        """
        ...

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Tokens of each asked feature that has a length, int64 `[N, F]`, or more where noise
        decides.
        """
        ...


class _Records:
    """Random access to the records of a split.

    Raises:
      ValueError: a file is damaged; with the command that makes the cache again.
    """

    def __init__(self, task: CachedTask, split: str):
        entry = task.manifest.splits[split]
        self._task = task
        self._where = f"{task.folder}, split '{split}'"
        paths = [os.fspath(task.folder / file.name) for file in entry.files]
        try:
            self._source = grain.sources.ArrayRecordDataSource(paths)
            records = len(self._source)
        except (ValueError, RuntimeError, OSError) as error:
            raise task.damaged(f"{self._where} ({_first_line(error)})") from error
        self._dtypes = task.manifest.token_dtypes
        if records != entry.records:
            raise task.damaged(f"{self._where} has {records} records instead of {entry.records}")
        index_file = task.folder / entry.index.name
        names = sorted(self._dtypes)
        try:
            index = np.load(index_file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise task.damaged(f"{index_file} is no array ({_first_line(error)})") from error
        if index.shape != (records, len(names)) or index.dtype != np.int64:
            raise task.damaged(f"{index_file} holds {index.dtype} {list(index.shape)}")
        # Plain arrays over the same mapped file: one element of a memmap takes ten times as long.
        self.ends = {name: np.asarray(index)[:, column] for column, name in enumerate(names)}

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            example = decode(self._source[number], token_dtypes=self._dtypes)
        except (ValueError, RuntimeError, OSError, TypeError, KeyError) as error:
            # array_record checks each chunk's checksum when it reads it.
            raise self._task.damaged(
                f"record {number} of {self._where} cannot be read ({_first_line(error)})"
            ) from error
        for name, ends in self.ends.items():
            expected = int(ends[number]) - (int(ends[number - 1]) if number else 0)
            if len(example.get(name, ())) != expected:
                raise self._task.damaged(
                    f"record {number} of {self._where} holds {len(example.get(name, ()))} tokens of"
                    f" '{name}', its index says {expected}"
                )
        return example


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _finish(
    tokens: np.ndarray, steps: Sequence[Mapping[str, Any]], feature: Mapping[str, Any], length: int
) -> np.ndarray:
    """EOS and trimming, as SeqIO's steps of these names do it."""
    for step in steps:
        if feature["add_eos"] and step["step"] in (APPEND_EOS, APPEND_EOS_AFTER_TRIM):
            kept = tokens[: length - 1] if step["step"] == APPEND_EOS_AFTER_TRIM else tokens
            tokens = np.concatenate([kept, np.array([feature["eos_id"]], np.int32)])
    return tokens[:length]


def _with_lengths(names: Sequence[str], lengths: Mapping[str, int]) -> list[str]:
    """Those that are token sequences of their own; the others say something of their tokens."""
    return [name for name in names if name in lengths]


class ExampleView:
    """Records that are examples already."""

    def __init__(
        self,
        task: CachedTask,
        split: str,
        sequence_length: Mapping[str, int],
        names: Sequence[str],
    ):
        self._records = _Records(task, split)
        self._features, self._steps = task.manifest.features, task.manifest.steps
        self._lengths, self._names = dict(sequence_length), tuple(names)
        self._count = task.manifest.splits[split].records

    def __len__(self) -> int:
        return self._count

    def examples(self, drawn: Sequence[Draw], *, key: int) -> list[Tokens]:
        wholes = (self.whole(draw.place) for draw in drawn)
        return [{name: whole[name] for name in self._names if name in whole} for whole in wholes]

    def whole(self, place: int) -> dict[str, Any]:
        """An example with everything that the task keeps: its text before tokenizing, numbers for
        metrics.
        """
        example = self._records[place]
        for name, length in self._lengths.items():
            if name in example and name in self._features:
                example[name] = _finish(example[name], self._steps, self._features[name], length)
        return example

    def lengths(self, places: np.ndarray) -> np.ndarray:
        columns = []
        for name in _with_lengths(self._names, self._lengths):
            # The index holds tokens up to and with each record, so a record's own are a difference;
            # steps that append EOS add one each.
            ends = self._records.ends[name]
            before = np.where(places > 0, ends[np.maximum(places - 1, 0)], 0)
            extra = sum(
                self._features[name]["add_eos"]
                for step in self._steps
                if step["step"] in (APPEND_EOS, APPEND_EOS_AFTER_TRIM)
            )
            columns.append(np.minimum(ends[places] - before + extra, self._lengths[name]))
        return np.stack(columns, axis=1)


class TextView:
    """Segments of the split's whole text, the records' tokens one after another, each corrupted
    when it is read.

    A segment has exactly the tokens that fill the model's inputs. Where an objective has several
    denoisers they take turns along the text, so that together they see all of it; one turn of each,
    in the order of `numpy.pattern`, is a round, and rounds follow one another:

        text      0 ........................................................ total
        round       |<------------ round_length ------------>|<----
        segments    | denoiser 0 | denoiser 0 | denoiser 1   | denoiser 0 ...
                    ^ offset

    In training each epoch draws another offset, so that the cuts are elsewhere; what is left at
    both ends, less than one round, is left out. In one pass for evaluation the offset is 0 and the
    last, shorter segment is given too.
    """

    def __init__(
        self,
        task: CachedTask,
        split: str,
        sequence_length: Mapping[str, int],
        names: Sequence[str],
        *,
        one_pass: bool,
        seed: int = 0,
    ):
        self._records = _Records(task, split)
        self._features, self._names = task.manifest.features, tuple(names)
        self._lengths = dict(sequence_length)
        denoise, *self._steps = task.manifest.steps
        self._denoisers = [
            numpy_objectives.from_json(described) for described in denoise["denoisers"]
        ]
        vocabulary = self._features[TARGETS]["vocabulary"]
        self._first_sentinel = int(vocabulary["size"]) - 1
        segment_lengths = [
            denoiser.raw_length(self._lengths, int(vocabulary["extra_ids"]))
            for denoiser in self._denoisers
        ]
        # Which denoiser corrupts each segment of a round, and where these segments begin: the last
        # edge is the length of a round.
        self._turns = numpy_objectives.pattern(self._denoisers)
        self._edges = [0, *itertools.accumulate(segment_lengths[turn] for turn in self._turns)]
        # Tokens up to and with each record: record i holds tokens ends[i - 1] to ends[i] of the
        # text.
        self._ends = self._records.ends[TARGETS]
        self._total = int(self._ends[-1]) if len(self._ends) else 0
        self._held: dict[int, np.ndarray] | None = {} if self._total <= HELD_TOKENS else None
        self._seed = seed
        if self._total < 2:
            raise ValueError(
                f"the cached task '{task.manifest.task}' has no text in the split '{split}': cache"
                " more text"
            )
        self._count, self._largest_offset = self._divide(one_pass=one_pass)

    def _divide(self, *, one_pass: bool) -> tuple[int, int]:
        """Segments of an epoch, and the largest offset of the first."""
        round_length = self._edges[-1]
        if one_pass or self._total < round_length:
            rounds, rest = divmod(self._total, round_length)
            # Then the segments that begin in the rest; the text's end cuts the last one short.
            return rounds * len(self._turns) + bisect.bisect_left(self._edges, rest), 0
        # As many rounds as leave room for every offset below one round; a text that is shorter than
        # two rounds has one, with the offsets that there is room for.
        rounds = max(1, (self._total - round_length + 1) // round_length)
        room = self._total - rounds * round_length
        return rounds * len(self._turns), min(round_length - 1, room)

    def __len__(self) -> int:
        return self._count

    def _offset(self, epoch: int) -> int:
        """Where an epoch's first segment begins."""
        if not self._largest_offset:
            return 0
        bits = draws.bits(self._seed, _OFFSET_DRAW, epoch)
        return int(bits % np.uint64(self._largest_offset + 1))

    def _span(self, draw: Draw, offset: int) -> tuple[int, int, int]:
        """(denoiser, first token, end) of a segment of an epoch that begins at `offset`."""
        number, turn = divmod(draw.place, len(self._turns))
        start = offset + number * self._edges[-1]
        return (
            self._turns[turn],
            start + self._edges[turn],
            min(start + self._edges[turn + 1], self._total),
        )

    def _record(self, number: int) -> np.ndarray:
        """int32 `[tokens]` of a record."""
        if self._held is None:
            return self._records[number][TARGETS]
        if number not in self._held:
            self._held[number] = self._records[number][TARGETS]
        return self._held[number]

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        """int32 `[stop - start]` of the whole text, out of the records that hold them."""
        # By bisection: NumPy's search would copy the whole column, one of several of the index.
        record = bisect.bisect_right(self._ends, start)
        parts = []
        while start < stop:
            end = int(self._ends[record])
            begin = int(self._ends[record - 1]) if record else 0
            if end > start:  # not an empty record
                parts.append(self._record(record)[start - begin : stop - begin])
                start = end
            record += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def examples(self, drawn: Sequence[Draw], *, key: int) -> list[Tokens]:
        offsets = {epoch: self._offset(epoch) for epoch in {draw.epoch for draw in drawn}}
        spans = [self._span(draw, offsets[draw.epoch]) for draw in drawn]
        # A denoiser corrupts segments of one length at a time: [N, L].
        alike: dict[tuple[int, int], list[int]] = {}
        for row, (denoiser, start, stop) in enumerate(spans):
            alike.setdefault((denoiser, stop - start), []).append(row)
        out: list[Tokens] = [{}] * len(drawn)
        for (denoiser, _), rows in alike.items():
            tokens = np.stack([self._tokens(*spans[row][1:]) for row in rows])
            keys = draws.bits(key, np.array([drawn[row].number for row in rows]))
            pairs = self._denoisers[denoiser].corrupt(
                tokens, keys, sequence_length=self._lengths, first_sentinel=self._first_sentinel
            )
            for row, *pair in zip(rows, *pairs, strict=True):
                made = dict(zip((INPUTS, TARGETS), pair, strict=True))
                out[row] = {
                    name: _finish(
                        made[name], self._steps, self._features[name], self._lengths[name]
                    )
                    for name in _with_lengths(self._names, self._lengths)
                }
                rows_of_text = self._denoisers[denoiser]
                if DOCUMENTS in self._names and isinstance(
                    rows_of_text, numpy_objectives.CausalRows
                ):
                    out[row][DOCUMENTS] = rows_of_text.documents(out[row][TARGETS])
        return out

    def lengths(self, places: np.ndarray) -> np.ndarray:
        # [segments of a round, 2]: the most inputs and targets. A place's segment is one of these.
        by_turn = np.array(
            [
                self._denoisers[turn].result_lengths(stop - start, self._lengths)
                for turn, start, stop in zip(
                    self._turns, self._edges[:-1], self._edges[1:], strict=True
                )
            ],
            np.int64,
        )
        names = _with_lengths(self._names, self._lengths)
        columns = [(INPUTS, TARGETS).index(name) for name in names]
        return by_turn[places % len(self._turns)][:, columns]


def open_view(
    task: CachedTask,
    split: str,
    sequence_length: Mapping[str, int],
    names: Sequence[str],
    *,
    one_pass: bool = False,
    seed: int = 0,
) -> ExampleView | TextView:
    """The examples of a split.

    Args:
      task: the cache.
      split: one of its splits.
      sequence_length: the most tokens of each feature.
      names: the features that examples are asked for.
      one_pass: for evaluation: all of it in order, once.
      seed: of the cuts.

    Raises:
      ValueError: the lengths do not suit the objective, or the split is empty or damaged.
    """
    steps = task.manifest.steps
    if steps and steps[0]["step"] == DENOISE:
        return TextView(task, split, sequence_length, names, one_pass=one_pass, seed=seed)
    return ExampleView(task, split, sequence_length, names)
