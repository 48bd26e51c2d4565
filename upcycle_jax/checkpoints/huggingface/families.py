"""The families whose folders are read and written. A new one is one line here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface.base import Export, FolderFamily, WritingOptions
from upcycle_jax.checkpoints.huggingface.decoder import kinds
from upcycle_jax.checkpoints.huggingface.decoder import writing as decoder_writing
from upcycle_jax.checkpoints.huggingface.decoder.reading import DecoderLayout
from upcycle_jax.checkpoints.huggingface.files import shown
from upcycle_jax.checkpoints.huggingface.t5.config_json import MODEL_TYPES, NOT_READ
from upcycle_jax.checkpoints.huggingface.t5.reading import T5Layout
from upcycle_jax.checkpoints.huggingface.t5.writing import export
from upcycle_jax.checkpoints.huggingface.vit import timm
from upcycle_jax.checkpoints.huggingface.vit.config_json import KINDS as VIT_KINDS
from upcycle_jax.checkpoints.huggingface.vit.config_json import NOT_READ as VIT_NOT_READ
from upcycle_jax.checkpoints.huggingface.vit.config_json import WHOLE
from upcycle_jax.checkpoints.huggingface.vit.reading import VitLayout
from upcycle_jax.checkpoints.huggingface.vit.writing import export as vit_export
from upcycle_jax.checkpoints.reader import CheckpointReader

FAMILIES = [
    FolderFamily("T5", tuple(MODEL_TYPES), NOT_READ, T5Layout, export),
    FolderFamily(
        "decoder-only",
        tuple(kinds.KINDS),
        kinds.NOT_READ,
        DecoderLayout,
        decoder_writing.export,
    ),
    FolderFamily("timm's vision", (timm.TYPE,), {}, timm.TimmLayout, lambda reader, options: None),
    FolderFamily("vision", (*VIT_KINDS, *WHOLE), VIT_NOT_READ, VitLayout, vit_export),
]


def family_of(folder: Path, keys: Mapping[str, Any]) -> FolderFamily:
    """The family of a folder.

    Args:
      folder: for messages.
      keys: content of config.json.

    Raises:
      ValueError: it is of no family that is read.
    """
    kind = timm.TYPE if timm.is_timm(keys) else keys.get("model_type")
    for family in FAMILIES:
        if isinstance(kind, str) and kind in family.model_types:
            return family
    known = " and ".join(f"{one.name} models ({', '.join(one.model_types)})" for one in FAMILIES)
    reasons = [
        one.refused[kind] for one in FAMILIES if isinstance(kind, str) and kind in one.refused
    ]
    quoted = f"'{shown(kind)}'" if isinstance(kind, str) else shown(kind)
    raise ValueError(
        f"{folder} holds a model of type {quoted}; only {known} can be read"
        f"{f': {reasons[0]}' if reasons else ''}"
    )


def exported(reader: CheckpointReader, options: WritingOptions) -> Export:
    """The folder that a checkpoint becomes, see `FolderFamily.export`.

    Raises:
      ValueError: it is of no family that is written. Of several families that say why, the first
        does.
    """
    errors = []
    for family in FAMILIES:
        try:
            found = family.export(reader, options)
        except ValueError as error:
            errors.append(error)
            continue
        if found is not None:
            return found
    raise errors[0]
