"""Files of a Hugging Face folder that a checkpoint knows nothing of, and that readers need: those
of the tokenizer, and how to generate. They are copied byte for byte, or made of what a GGUF file
says.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.gguf.files import SUFFIX, GgufFile
from upcycle_jax.checkpoints.gguf.folder import carried_texts, config_keys
from upcycle_jax.checkpoints.gguf.tokenizer import NoTokenizer
from upcycle_jax.checkpoints.huggingface.files import CONFIG, inner_file, load_json, shown
from upcycle_jax.checkpoints.orbax_metadata import STEP_METADATA, read_record
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.data.text.tokenizer import WITHOUT_ROW

GENERATION = "generation_config.json"

NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Names of such files."""

TOKENIZER = "tokenizer.json"

_MAX_STEPS = 16
"""Checkpoints that are looked at on the way to the folder: records may go in a circle."""


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a model comes from, or its tokenizer.

    Attributes:
      place: a Hugging Face folder or a GGUF file.
      keys: what its config.json says, or would say; of any content.
    """

    place: Path
    keys: Mapping[str, Any]

    def files(self, vocab_size: int) -> Mapping[str, Path | str]:
        """The files of `NAMES` that are there, or what they hold, by name.

        Args:
          vocab_size: rows of the embedding.

        Raises:
          FileNotFoundError: there is no such folder.
          NoTokenizer: there is none, or one of a kind that is not read.
          ValueError: it is damaged, or has more tokens than the embedding has rows.
        """
        if self.place.name.endswith(SUFFIX):
            return carried_texts(GgufFile(self.place), vocab_size)
        found = carried_files(self.place)
        check_tokenizer(self.place, vocab_size)
        return found


def home_at(place: Path) -> Home:
    """What lies at a path.

    Raises:
      FileNotFoundError: nothing does.
      ValueError: its config.json, or the GGUF file, is damaged.
    """
    if place.name.endswith(SUFFIX) and place.is_file():
        return Home(place, config_keys(GgufFile(place)))
    if not place.is_dir():
        raise FileNotFoundError(
            f"{place} is no folder: name one that holds {TOKENIZER}, or a {SUFFIX} file"
        )
    return Home(place, load_json(place, CONFIG) if (place / CONFIG).is_file() else {})


def carried_files(folder: Path) -> dict[str, Path]:
    """The files of `NAMES` that a folder has, by name.

    Raises:
      FileNotFoundError: there is no such folder.
      NoTokenizer: it has none of them.
      ValueError: one is a link that leaves the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name one that holds {TOKENIZER}")
    found = {name: inner_file(folder, name) for name in NAMES if os.path.lexists(folder / name)}
    if not found:
        raise NoTokenizer(f"{folder} has no tokenizer ({', '.join(NAMES)})")
    return found


def origin(reader: CheckpointReader) -> Home | None:
    """The Hugging Face folder or GGUF file that a checkpoint is, or that its record says it was
    made from, directly or by way of other checkpoints, if it is still there.

    Raises:
      ValueError: it is damaged.
    """
    if reader.format in ("huggingface", "gguf"):
        return home_at(Path(reader.path))
    for path in came_from(reader):
        if (path / CONFIG).is_file() or (path.name.endswith(SUFFIX) and path.is_file()):
            return home_at(path)
    return None


def came_from(reader: CheckpointReader) -> Iterator[Path]:
    """Where a checkpoint was made from, directly or by way of other checkpoints, as their records
    say. What is there now, nobody knows.
    """
    records = [reader.metadata()]
    for record in records:
        for path in map(Path, filter(storage.is_local, _named(record))):
            yield path
            if len(records) < _MAX_STEPS and (path / STEP_METADATA).is_file():
                records.append(read_record(epath.Path(path / STEP_METADATA)))


def _named(record: dict[str, Any]) -> Iterator[str]:
    """Paths of sources in a record, of which nothing is trusted."""
    surgery, source = record.get("surgery"), record.get("source")
    if isinstance(surgery, dict):
        sources = surgery.get("sources")
        listed = sources if isinstance(sources, list) else ()
        yield from (path for path in listed if isinstance(path, str))
    if isinstance(source, dict) and isinstance(source.get("path"), str):
        yield source["path"]


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Compares a tokenizer with the embedding.

    Args:
      folder: of the tokenizer; without a tokenizer.json nothing is compared.
      vocab_size: rows of the embedding.

    Raises:
      ValueError: it gives ids that the embedding has no rows for, or is damaged.
    """
    if not (folder / TOKENIZER).exists():
        return
    content = load_json(folder, TOKENIZER)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: list[Any] = []
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    added = content.get("added_tokens")
    if isinstance(added, list):
        ids += [
            token.get("id")
            for token in added
            if isinstance(token, dict) and token.get("content") not in WITHOUT_ROW
        ]
    if not all(isinstance(one, int) for one in ids):
        raise ValueError(f"{folder / TOKENIZER} is damaged: ids are whole numbers")
    largest = max(ids, default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{shown(folder / TOKENIZER)} has ids up to {largest}, the embedding has {vocab_size}"
            " rows: it is the tokenizer of another model"
        )
