"""Where the tensors of a T5 folder go.

Every leaf comes from exactly one tensor, and every tensor has its place, is a copy that is
compared, or is in `tensors.IGNORED`; anything else is refused, and so is what config.json says
otherwise.

Here a model without `logits_dense` takes its logits from the embedding and scales the decoder's
output by d_model^-0.5 (T5), and one with it does not scale (T5 1.1). The two other combinations
exist there too, and get a `logits_dense` that gives the same logits; a scaled one is float32, since
the product would not fit into fewer bits.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface.base import Source, Sources
from upcycle_jax.checkpoints.huggingface.comparing import compare, few, numbered
from upcycle_jax.checkpoints.huggingface.files import CONFIG, WeightFiles
from upcycle_jax.checkpoints.huggingface.t5.config_json import SIZES, Stated, read_config
from upcycle_jax.checkpoints.huggingface.t5.tensors import (
    EMBEDDING_COPIES,
    IGNORED,
    LM_HEAD,
    LOGITS,
    SHARED,
    STACKS,
    T5Dimensions,
    input_kernels,
    places,
    table_name,
)
from upcycle_jax.state_tree import TARGET

_BLOCK = {stack: re.compile(rf"{stack}\.block\.(0|[1-9]\d{{0,8}})\.") for stack in STACKS}


class T5Layout:
    """See `base.Layout`.

    Args:
      folder: for messages.
      keys: content of config.json.

    Raises:
      ValueError: see `config_json.read_config`.
    """

    def __init__(self, folder: Path, keys: Mapping[str, Any]):
        self._folder, self._stated = folder, read_config(folder, keys)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "mlp_activations": self._stated.activations,
            "layer_norm_epsilon": self._stated.epsilon,
            "relative_attention_max_distance": self._stated.max_distance,
        }

    @property
    def config(self) -> None:
        """The leaves say it all: see `models.t5.from_specs`."""
        return None

    def sources(self, weights: WeightFiles) -> dict[str, Sources]:
        return _Placing(self._folder, self._stated, weights).sources()


class _Placing:
    """Finds the tensor behind every leaf."""

    def __init__(self, folder: Path, stated: Stated, weights: WeightFiles):
        self.path, self._stated, self._weights = folder, stated, weights
        self._embedding = self._find_embedding()

    def sources(self) -> dict[str, Sources]:
        return self._place(self._dimensions(self._find_tying()))

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
        return numbered(self._weights, _BLOCK[stack])

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
                f"{self.path} has tensors of the {stack} blocks {few(blocks)}, but"
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

    def _place(self, dimensions: T5Dimensions) -> dict[str, Sources]:
        expected = places(dimensions)
        expected[self._embedding] = expected.pop(SHARED)
        copies = {SHARED, *EMBEDDING_COPIES} | ({LM_HEAD} if dimensions.tied else set())
        sizes = self._stated.sizes
        compare(
            self.path,
            self._weights,
            {name: place.shape for name, place in expected.items()},
            ignored=IGNORED | copies,
            kind="T5",
            describes=f"{dimensions.num_layers} encoder and {dimensions.num_decoder_layers} decoder"
            f" blocks with {'gated' if dimensions.gated else 'plain'} MLPs",
            given=", ".join(f"{key} {sizes[key]}" for key in SIZES if key in sizes)
            or "and the other tensors",
        )
        sources: dict[str, Sources] = {
            TARGET + place.name: Source(name, place.transposed) for name, place in expected.items()
        }
        scaled = self._stated.scaled
        if dimensions.num_decoder_layers and dimensions.tied != scaled:
            factor = dimensions.d_model**-0.5 if scaled else 1.0
            matrix = self._embedding if dimensions.tied else LM_HEAD
            sources[TARGET + LOGITS] = Source(matrix, transposed=True, factor=factor)
        return sources
