"""What the metadata of a GGUF file says of the function that the model computes: every key that
changes it is read, and what cannot be computed here, or is not known, is refused by name.

Source: ggml's docs/gguf.md for the keys, and llama.cpp's loader for their defaults.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from upcycle_jax.checkpoints.gguf.files import GgufFile
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.printing import printable

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of `general.architecture` that are read; they are also Hugging Face's model types."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of what each rotary frequency is divided by (Llama 3.1 and later)."""

_NOT_READ = {
    "qwen2moe": "it is a Mixture-of-Experts already",
    "qwen3moe": "it is a Mixture-of-Experts already",
    "gemma": "take its Hugging Face folder",
    "gemma2": "take its Hugging Face folder",
    "gemma3": "take its Hugging Face folder",
    "olmo": "take its Hugging Face folder",
    "olmo2": "take its Hugging Face folder",
    "granite": "take its Hugging Face folder",
    "phi3": "take its Hugging Face folder",
    "smollm3": "take its Hugging Face folder",
}
"""Architectures that are near to those -> why they are not read."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "pooling_type": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
"""Keys that change what a model computes -> the values with which they do not; 0 means 'none'."""

_READ = frozenset(
    {
        *("block_count", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        *("attention.value_length", "attention.layer_norm_rms_epsilon", "attention.scale"),
        *("attention.sliding_window", "rope.dimension_count", "rope.freq_base"),
        *("rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
        *("rope.scaling.original_context_length", "rope.scaling.attn_factor"),
        *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    }
)
_SILENT = frozenset({"context_length", "rope.scaling.finetuned", "attention.layer_norm_epsilon"})
"""Keys that change nothing: how long texts may be, and the epsilon of a norm that is not there."""

_MAX_SIZE = 1 << 31


def read_config(file: GgufFile) -> DecoderConfig:
    """The model of a file.

    Raises:
      ValueError: it is of no architecture that is read, its metadata are incomplete, contradict its
        tensors, or describe what cannot be computed here; the message names file, key and value.
    """
    return _Metadata(file).config()


class _Metadata:
    """Typed access to the metadata of one file."""

    def __init__(self, file: GgufFile):
        self._file = file
        self._check_whole()
        self._arch = self._text("general.architecture")
        if self._arch not in ARCHITECTURES:
            why = _NOT_READ.get(self._arch, "")
            raise self._refuse(
                "general.architecture",
                f"only GGUF files of {', '.join(ARCHITECTURES)} models can be read"
                f"{f': {why}' if why else ''}",
            )

    def config(self) -> DecoderConfig:
        self._refuse_what_changes_more()
        sizes = self._sizes()
        tensors, window = self._file.tensors, self._window()
        return DecoderConfig(
            **sizes,
            norm_epsilon=self._number("attention.layer_norm_rms_epsilon", above=0, below=1),
            qk_norm="head" if self._arch == "qwen3" else None,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            attention_out_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_down.bias" in tensors,
            attention_scale=self._number("attention.scale", 0.0) or None,
            rope=self._rope(sizes["head_dim"]),
            layer_types=("sliding",) * sizes["num_layers"] if window else (),
            sliding_window=window,
            logits_via_embedding="output.weight" not in tensors,
        )

    # Access.

    def _keys(self) -> list[str]:
        """The keys of the architecture."""
        start = f"{self._arch}."
        return [key.removeprefix(start) for key in self._file.metadata if key.startswith(start)]

    def _full(self, key: str) -> str:
        return key if key.startswith("general.") else f"{self._arch}.{key}"

    def _get(self, key: str) -> Any:
        return self._file.metadata.get(self._full(key))

    def _refuse(self, key: str, why: str) -> ValueError:
        value = self._get(key)
        shown = printable(repr(value))
        shown = shown if len(shown) <= 120 else f"{shown[:110]}..."
        stated = "is missing" if value is None else f"is {shown}"
        return ValueError(
            f"{printable(self._file.path)}: {printable(self._full(key))} {stated}: {why}"
        )

    def _text(self, key: str, default: str | None = None) -> str:
        value = self._get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._refuse(key, "a text belongs there. Copy the file again")
        return value

    def _number(
        self, key: str, default: float | None = None, *, above: float = -math.inf,
        below: float = math.inf,
    ) -> float:  # fmt: skip
        value = self._get(key)
        if value is None and default is not None:
            return default
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not above < value < below:
            raise self._refuse(key, "a number belongs there. Copy the file again")
        # A float32 of the file is the number that was written into it: 1e-5, not 9.9999997e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else float(value)

    def _size(self, key: str, default: int | None = None) -> int:
        """A size, which may stand there once for each layer."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        if (
            isinstance(value, np.ndarray)
            and value.ndim == 1
            and value.size
            and value.dtype.kind in "iu"
        ):
            if (value != value[0]).any():
                raise self._refuse(key, "models whose layers differ in it cannot be computed here")
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < _MAX_SIZE:
            raise self._refuse(key, "a positive size belongs there. Copy the file again")
        return value

    # What is stated.

    def _check_whole(self) -> None:
        kind = self._text("general.type", "model")
        if kind != "model":
            raise self._refuse("general.type", "only a whole model can be read")
        parts = self._file.metadata.get("split.count", 0)
        if parts not in (0, 1):
            raise ValueError(
                f"{printable(self._file.path)} is one of {parts} parts of a model: merge them with"
                " llama.cpp's llama-gguf-split --merge"
            )

    def _refuse_what_changes_more(self) -> None:
        for key in self._keys():
            if key in _NEUTRAL:
                if self._get(key) not in _NEUTRAL[key]:
                    raise self._refuse(key, "a dense model without it can be computed here")
            elif key not in _READ | _SILENT:
                raise self._refuse(
                    key,
                    "this setting is not known here, and may change what the model computes; take"
                    " the model's Hugging Face folder",
                )

    def _sizes(self) -> dict[str, Any]:
        width, heads = self._size("embedding_length"), self._size("attention.head_count")
        kv_heads = self._size("attention.head_count_kv", heads)
        if "attention.key_length" not in self._keys() and width % heads:
            raise self._refuse("attention.head_count", f"it does not divide the width {width}")
        head_dim = self._size("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._size(key, head_dim) != head_dim:
                raise self._refuse(key, f"heads of size {head_dim} need the same number there")
        vocabulary = self._file.tensors.get("token_embd.weight")
        if vocabulary is None or len(vocabulary.shape) != 2:
            raise ValueError(
                f"{printable(self._file.path)} has no token_embd.weight: it holds a part of a model"
            )
        rows = vocabulary.shape[0]
        if self._size("vocab_size", rows) != rows:
            raise self._refuse("vocab_size", f"token_embd.weight has {rows} rows")
        return {
            "vocab_size": rows,
            "emb_dim": width,
            "num_layers": self._size("block_count"),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "mlp_dim": self._size("feed_forward_length"),
        }

    def _window(self) -> int | None:
        """The sliding window of all layers."""
        key = "attention.sliding_window"
        if self._get(key) in (None, 0):
            return None
        if self._arch != "llama":
            raise self._refuse(
                key, "the file does not say which layers have it; take the Hugging Face folder"
            )
        return self._size(key)

    def _rope(self, head_dim: int) -> Rope:
        theta = self._number("rope.freq_base", 10000.0, above=0)
        factors = self._file.tensors.get(ROPE_FACTORS)
        kind = self._text(
            "rope.scaling.type", "linear" if self._get("rope.scale_linear") else "none"
        )
        factor = self._number(
            "rope.scaling.factor", self._number("rope.scale_linear", 1.0, above=0), above=0
        )
        if factors is not None:
            if kind not in ("none", "llama3") and factor != 1:
                raise self._refuse("rope.scaling.type", f"beside {ROPE_FACTORS} it cannot be read")
            return self._rope_of_factors(theta, head_dim)
        if kind == "none" or (kind == "linear" and factor == 1):
            return Rope(theta)
        if kind == "linear":
            return Rope(theta, "linear", factor=factor)
        if kind == "yarn":
            return self._yarn(theta, factor)
        raise self._refuse("rope.scaling.type", "known are none, linear and yarn")

    def _yarn(self, theta: float, factor: float) -> Rope:
        if self._number("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
            raise self._refuse("rope.scaling.yarn_ext_factor", "only 1 can be computed here")
        # llama.cpp's amplitude is a factor of YaRN's own, which is 0.1 ln(factor) + 1.
        amplitude = self._number(
            "rope.scaling.yarn_attn_factor", self._number("rope.scaling.attn_factor", 1.0), above=0
        )
        return Rope(
            theta,
            "yarn",
            factor=factor,
            original_length=self._size("rope.scaling.original_context_length"),
            beta_fast=self._number("rope.scaling.yarn_beta_fast", 32.0, above=0),
            beta_slow=self._number("rope.scaling.yarn_beta_slow", 1.0, above=0),
            attention_factor=(None if amplitude == 1 else amplitude * (0.1 * math.log(factor) + 1)),
        )

    def _rope_of_factors(self, theta: float, head_dim: int) -> Rope:
        """Llama 3.1's rope where its own settings give the factors of the file, and otherwise one
        with the factors themselves.
        """
        shape = self._file.tensors[ROPE_FACTORS].shape
        if shape != (head_dim // 2,):
            raise ValueError(
                f"{printable(self._file.path)}: {ROPE_FACTORS} has the shape {list(shape)}; heads"
                f" of size {head_dim} need {head_dim // 2} factors"
            )
        values = self._file.read(ROPE_FACTORS, (slice(0, head_dim // 2),))
        factors = values.astype(np.float64)
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise ValueError(
                f"{printable(self._file.path)}: {ROPE_FACTORS} has entries that are no positive"
                " numbers: copy the file again"
            )
        original = self._size("rope.scaling.original_context_length", 8192)
        llama = Rope(
            theta, "llama3", factor=float(str(values.max())), original_length=original
        )  # with the ramp from 1 to 4 that every Llama has
        plain = Rope(theta).frequencies(head_dim, 1)
        if np.allclose(plain / factors, llama.frequencies(head_dim, 1), rtol=1e-5, atol=0):
            return llama
        each = tuple(float(str(value)) for value in values.astype(np.float32))
        # One set of factors for all lengths, and no amplitude.
        return Rope(
            theta, "longrope", original_length=original, attention_factor=1.0,
            short_factors=each, long_factors=each,
        )  # fmt: skip
