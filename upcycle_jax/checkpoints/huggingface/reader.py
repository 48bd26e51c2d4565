"""Reads Hugging Face T5 folders (T5, T5 1.1, Flan-T5, mT5, ByT5, MADLAD-400) as if they were T5X
checkpoints.

Every leaf comes from exactly one tensor, and every tensor has its place, is a copy that is compared,
or is in `tensors.IGNORED`; anything else is refused, and so is what config.json says otherwise.

Here a model without `logits_dense` takes its logits from the embedding and scales the decoder's
output by d_model^-0.5 (T5), and one with it does not scale (T5 1.1). The two other combinations
exist there too, and get a `logits_dense` that gives the same logits; a scaled one is float32, since
the product would not fit into fewer bits.

Opening a folder reads the headers of its files, and, where it holds copies of the embedding, each
of these once.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.huggingface.config_json import SIZES, read_config
from upcycle_jax.checkpoints.huggingface.files import (
    CONFIG,
    WEIGHTS_INDEX,
    WeightFiles,
    shown,
)
from upcycle_jax.checkpoints.huggingface.tensors import (
    EMBEDDING_COPIES,
    IGNORED,
    LM_HEAD,
    LOGITS,
    SHARED,
    Place,
    T5Dimensions,
    input_kernels,
    places,
    table_name,
)
from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec

_BLOCK = re.compile(r"(encoder|decoder)\.block\.(0|[1-9]\d{0,8})\..*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class _Source:
    """The tensor behind a leaf."""

    tensor: str
    transposed: bool
    factor: float = 1.0


class HuggingFaceReader(ReaderBase):
    """A Hugging Face T5 folder: config.json with model.safetensors, or with shards and their index.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the model is no T5, its weights are pickled, quantised or damaged, a tensor has no
        place or is missing, or config.json, index, headers and copies contradict each other.
    """

    format = "huggingface"

    def __init__(self, path: epath.Path):
        self.path = path
        if not storage.is_local(path):
            raise ValueError(
                f"{path}: safetensors files are memory-mapped, so copy the folder to a local disk"
                " first"
            )
        self._folder = Path(path)
        self._stated = read_config(self._folder)
        self._weights = WeightFiles(self._folder)
        self._embedding = self._find_embedding()
        tied = self._find_tying()
        self._sources = self._place(self._dimensions(tied))
        self._specs = {
            name: self._leaf_spec(source) for name, source in sorted(self._sources.items())
        }

    # What the tensors are.

    def _find_embedding(self) -> str:
        """The tensor that is the embedding; its copies are compared with it."""
        tensors = self._weights.tensors
        names = [name for name in (SHARED, *EMBEDDING_COPIES) if name in tensors]
        if not names and LM_HEAD in tensors and self._stated.tied:
            names = [LM_HEAD]  # One matrix under one of its names.
        if not names:
            raise ValueError(
                f"{self.path} has no embedding ({SHARED}): the folder holds a part of a model"
            )
        for copy in names[1:]:
            if not self._weights.equal(names[0], copy):
                raise ValueError(
                    f"{self.path}: {copy} in {tensors[copy].file} should be a copy of {names[0]} in"
                    f" {tensors[names[0]].file} and holds other values: a T5 has one embedding."
                    " Remove the one that is wrong"
                )
        return names[0]

    def _find_tying(self) -> bool:
        """Whether the logits come from the embedding."""
        stated, tensors = self._stated, self._weights.tensors
        if stated.encoder_only and not self._blocks("decoder"):
            return True
        if LM_HEAD not in tensors:
            if stated.tied is False:
                raise ValueError(
                    f"{self.path} has no {LM_HEAD}, but tie_word_embeddings in {CONFIG} is false:"
                    " the output matrix is missing. Copy the folder again; where the embedding is"
                    " the output matrix, set tie_word_embeddings to true and scale_decoder_outputs"
                    " to false"
                )
            return True
        if stated.tied is False:
            return False
        if self._embedding == LM_HEAD or self._weights.equal(self._embedding, LM_HEAD):
            return True
        if stated.head_may_differ:
            return False
        raise ValueError(
            f"{self.path}: {LM_HEAD} in {tensors[LM_HEAD].file} differs from {self._embedding}, but"
            f" tie_word_embeddings in {CONFIG} is {'true' if stated.tied else 'absent, so true'}:"
            f" set it to false (with scale_decoder_outputs) where {LM_HEAD} counts, or remove"
            f" {LM_HEAD} where the embedding does"
        )

    def _blocks(self, stack: str) -> set[int]:
        """Numbers of the blocks of a stack that have tensors."""
        matches = map(_BLOCK.fullmatch, self._weights.tensors)
        return {int(match.group(2)) for match in matches if match and match.group(1) == stack}

    def _dimensions(self, tied: bool) -> T5Dimensions:
        """What config.json states, and the tensors where it is silent.

        Raises:
          ValueError: a tensor that shows a size is missing, or a block is.
        """
        stated, sizes = self._stated, self._stated.sizes
        self._check_gating()
        vocab_size, d_model = self._matrix(self._embedding)
        buckets, heads = self._matrix(table_name("encoder"))
        if buckets < 4 or stated.max_distance <= buckets // 2:
            raise ValueError(
                f"{self.path}: {buckets} buckets of relative positions cannot reach to the distance"
                f" {stated.max_distance} (relative_attention_max_distance in {CONFIG}): at least 4"
                " buckets, and a distance above half their number, are needed"
            )
        heads = sizes.get("num_heads", heads)
        query = self._matrix("encoder.block.0.layer.0.SelfAttention.q.weight")[0]
        inner = self._matrix(input_kernels("encoder", stated.gated)[0])[0]
        return T5Dimensions(
            vocab_size=sizes.get("vocab_size", vocab_size),
            d_model=sizes.get("d_model", d_model),
            d_kv=sizes.get("d_kv", query // heads),
            d_ff=sizes.get("d_ff", inner),
            num_heads=heads,
            num_layers=self._depth("encoder", "num_layers"),
            num_decoder_layers=self._depth("decoder", "num_decoder_layers"),
            num_buckets=sizes.get("relative_attention_num_buckets", buckets),
            gated=stated.gated,
            tied=tied,
        )

    def _depth(self, stack: str, key: str) -> int:
        blocks, stated = self._blocks(stack), self._stated.sizes.get(key)
        if stack == "decoder" and self._stated.encoder_only and not blocks:
            return 0
        depth = max(blocks, default=0) + 1 if stated is None else stated
        if len(blocks) != depth or max(blocks) != depth - 1:
            raise ValueError(
                f"{self.path} has tensors of the {stack} blocks {_numbers(blocks)}, but"
                f" {f'{key} in {CONFIG} is {stated}' if stated else 'they have gaps'}: a block is"
                f" missing, or {CONFIG} is of another model"
            )
        return depth

    def _check_gating(self) -> None:
        tensors, stated = self._weights.tensors, self._stated
        for name in input_kernels("encoder", not stated.gated):
            if name in tensors:
                raise ValueError(
                    f"{self.path}: {name} in {tensors[name].file} belongs to"
                    f" {'a plain' if stated.gated else 'a gated'} MLP, but feed_forward_proj in"
                    f" {CONFIG} is {stated.feed_forward!r} (given or by default): set it to what"
                    " the model was trained with, e.g."
                    f" {'relu' if stated.gated else 'gated-gelu'!r}"
                )

    def _matrix(self, tensor: str) -> tuple[int, int]:
        stored = self._weights.tensors.get(tensor)
        if stored is None:
            raise ValueError(
                f"{self.path} has no {tensor}: the folder holds a part of a model, or none of a T5"
            )
        if len(stored.shape) != 2 or 0 in stored.shape:
            raise ValueError(
                f"{self.path}: {tensor} in {stored.file} has the shape {list(stored.shape)}; a"
                " matrix belongs there"
            )
        return stored.shape[0], stored.shape[1]

    # Where they belong.

    def _place(self, dimensions: T5Dimensions) -> dict[str, _Source]:
        tensors = self._weights.tensors
        expected = places(dimensions)
        expected[self._embedding] = expected.pop(SHARED)
        copies = {SHARED, *EMBEDDING_COPIES} | ({LM_HEAD} if dimensions.tied else set())
        unknown = sorted(tensors.keys() - expected.keys() - IGNORED - copies)
        if unknown:
            raise ValueError(
                f"{self.path}: {_count(unknown)} no place in T5:"
                f" {', '.join(f'{shown(n)} (in {tensors[n].file})' for n in unknown[:5])}. {CONFIG}"
                f" describes {dimensions.num_layers} encoder and {dimensions.num_decoder_layers}"
                f" decoder blocks with {'gated' if dimensions.gated else 'plain'} MLPs"
            )
        missing = sorted(expected.keys() - tensors.keys())
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} of the model's tensors:"
                f" {', '.join(missing[:5])}. The folder holds a part of a model: copy it"
                " again"
            )
        self._check_shapes(expected, dimensions)
        sources = {
            TARGET + place.name: _Source(name, place.transposed) for name, place in expected.items()
        }
        scaled = self._stated.scaled
        if dimensions.num_decoder_layers and dimensions.tied != scaled:
            factor = dimensions.d_model**-0.5 if scaled else 1.0
            matrix = self._embedding if dimensions.tied else LM_HEAD
            sources[TARGET + LOGITS] = _Source(matrix, transposed=True, factor=factor)
        return sources

    def _check_shapes(self, expected: dict[str, Place], dimensions: T5Dimensions) -> None:
        for name, place in expected.items():
            stored = self._weights.tensors[name]
            if stored.shape != place.shape:
                given = ", ".join(f"{key} {self._stated.sizes[key]}" for key in SIZES
                                  if key in self._stated.sizes)  # fmt: skip
                raise ValueError(
                    f"{self.path}: {name} in {stored.file} has the shape {list(stored.shape)},"
                    f" {list(place.shape)} belongs there according to {CONFIG}"
                    f" ({given or 'and the other tensors'}): one of the two is of another model"
                )

    def _leaf_spec(self, source: _Source) -> LeafSpec:
        shape, dtype = (
            self._weights.tensors[source.tensor].shape,
            self._weights.dtype(source.tensor),
        )
        if source.factor != 1.0:
            dtype = np.promote_types(dtype, np.float32)
        return LeafSpec(shape[::-1] if source.transposed else shape, dtype)

    # The reader's interface.

    def specs(self) -> dict[str, LeafSpec]:
        return dict(self._specs)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        spec = self.spec(name)
        index = checked_index(name, spec.shape, index)
        source = self._sources[name]
        value = self._weights.read(source.tensor, index[::-1] if source.transposed else index)
        value = np.ascontiguousarray(value.T) if source.transposed else value
        if source.factor == 1.0:
            return value
        return value.astype(spec.dtype) * np.asarray(source.factor, spec.dtype)

    def model_settings(self) -> dict[str, Any]:
        return {
            "mlp_activations": self._stated.activations,
            "layer_norm_epsilon": self._stated.epsilon,
            "relative_attention_max_distance": self._stated.max_distance,
        }

    def _files(self) -> Iterable[epath.Path]:
        # The files that are read, and no others: a link beside them may lead anywhere.
        index = [WEIGHTS_INDEX] if (self.path / WEIGHTS_INDEX).exists() else []
        return [self.path / name for name in sorted((CONFIG, *index, *self._weights.files))]


def _count(tensors: list[str]) -> str:
    return f"{len(tensors)} tensors have" if len(tensors) > 1 else "1 tensor has"


def _numbers(blocks: set[int]) -> str:
    """Few of many numbers, for people."""
    shown_numbers = sorted(blocks)[:8]
    return (
        f"{', '.join(map(str, shown_numbers))}{', ...' if len(blocks) > 8 else ''}"
        f" ({len(blocks)} in all)"
    )
