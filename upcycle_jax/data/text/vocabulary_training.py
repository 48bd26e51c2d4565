"""Trains a SentencePiece vocabulary on a user's own text, laid out as T5's: pad 0, EOS 1, unknown
2, no BOS. No TensorFlow.

Unlike T5's it loses nothing: no normalisation, line ends and runs of spaces are pieces of their
own, and characters that were not seen are spelt in bytes. So source code comes back as it was.
"""

import dataclasses
import io
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from upcycle_jax.data.text import files as text_files

_SPECIAL_PIECES = 3 + 256 + 2  # pad, EOS, unknown; the bytes; line end and tab
_LONGEST_SENTENCE = 16384


@dataclasses.dataclass(frozen=True)
class TrainedVocabulary:
    """Attributes:
    path: the written model.
    pieces: its size without sentinels.
    characters: of text that it was trained on.
    characters_per_token: on the last tenth of that text, at most a million characters.
    """

    path: pathlib.Path
    pieces: int
    characters: int
    characters_per_token: float


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, which are pieces of their own; longer ones in parts that the
    trainer takes.
    """
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_SENTENCE // 4):
                yield line[start : start + _LONGEST_SENTENCE // 4]


def _sample(texts: Sequence[str], characters: int) -> list[str]:
    """Texts spread evenly over all of them, of at most `characters` together; at least one."""
    total = sum(map(len, texts))
    if total <= characters:
        return list(texts)
    chosen: list[str] = []
    budget = 0.0
    for text in texts:
        budget += len(text) * characters / total
        if budget >= 1:
            chosen.append(text[: int(budget)])
            budget -= len(chosen[-1])
    return chosen


def train_vocabulary(
    texts: Sequence[str],
    output: pathlib.Path,
    *,
    size: int = 8192,
    max_characters: int = 20_000_000,
) -> TrainedVocabulary:
    """Trains a unigram model and writes it to `output`. The same texts give the same model.

    Args:
      texts: documents.
      output: file to write, usually named `*.model`.
      size: number of pieces, without the sentinels that a task adds.
      max_characters: of more text than this an even sample is used.

    Raises:
      ValueError: `size` is too small for the fixed pieces, or too large for the text.
      FileExistsError: `output` is there.
    """
    import sentencepiece

    if size < _SPECIAL_PIECES + 64:
        raise ValueError(
            f"vocab_size is {size}: {_SPECIAL_PIECES} pieces are fixed (bytes and specials), so"
            f" give {_SPECIAL_PIECES + 64} or more"
        )
    if output.exists():
        raise FileExistsError(
            f"{output} is there already, and checkpoints may depend on it: remove it, or write to"
            " another path"
        )
    sample = _sample(texts, max_characters)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            user_defined_symbols=["\n", "\t"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=_LONGEST_SENTENCE * 4,  # in bytes
            num_threads=1,  # more threads add floating-point numbers in another order
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"a vocabulary of {size} pieces cannot be trained on {sum(map(len, sample)):,}"
            f" characters of text ({error}): give more text or a smaller vocab_size"
        ) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    held_out = "\n".join(sample[-max(1, len(sample) // 10) :])[:1_000_000]
    return TrainedVocabulary(
        path=output,
        pieces=processor.get_piece_size(),
        characters=sum(map(len, sample)),
        characters_per_token=len(held_out) / max(1, len(processor.encode(held_out))),
    )


def read_texts(patterns: Sequence[str], *, field: str = "text") -> list[str]:
    """All documents of the files that the patterns name.

    Raises:
      FileNotFoundError: a pattern names nothing.
      ValueError: a file is unusable.
    """
    return [
        text
        for path in text_files.find_files(patterns)
        for text in text_files.read_file(path, field=field)
    ]
