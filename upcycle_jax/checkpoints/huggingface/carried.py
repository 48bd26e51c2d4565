"""Files of a Hugging Face folder that a checkpoint knows nothing of, and that readers need: those
of the tokenizer, and how to generate. They are copied byte for byte.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.huggingface.files import CONFIG, inner_file, load_json, shown
from upcycle_jax.checkpoints.reader import CheckpointReader

NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
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


def carried_files(folder: Path) -> dict[str, Path]:
    """The files of `NAMES` that a folder has, by name.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it has none of them, or one is a link that leaves the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name one that holds {TOKENIZER}")
    found = {name: inner_file(folder, name) for name in NAMES if os.path.lexists(folder / name)}
    if not found:
        raise ValueError(f"{folder} has no tokenizer ({', '.join(NAMES)})")
    return found


def origin(reader: CheckpointReader) -> Path | None:
    """The Hugging Face folder that a checkpoint is, or that its record says it was made from, if it
    is still there.
    """
    if reader.format == "huggingface":
        return Path(reader.path)
    record = reader.metadata()
    for path in _named(record):
        if storage.is_local(path) and (Path(path) / CONFIG).is_file():
            return Path(path)
    return None


def _named(record: dict[str, Any]) -> Iterator[str]:
    """Paths of sources in a record, of which nothing is trusted."""
    surgery, source = record.get("surgery"), record.get("source")
    if isinstance(surgery, dict):
        sources = surgery.get("sources")
        yield from (path for path in sources or () if isinstance(path, str))
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
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    if not all(isinstance(one, int) for one in ids):
        raise ValueError(f"{folder / TOKENIZER} is damaged: ids are whole numbers")
    largest = max(ids, default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{shown(folder / TOKENIZER)} has ids up to {largest}, the embedding has {vocab_size}"
            " rows: it is the tokenizer of another model"
        )
