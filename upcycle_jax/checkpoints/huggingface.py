"""Reads Hugging Face T5 folders (T5, T5 1.1, Flan-T5, mT5, ByT5) as if they were T5X checkpoints.

A linear layer there holds `W [out, in]`; here its kernel is `[in, out]`, so matrices are transposed
as they are read. The embedding and the layer norms are taken as they are, and the relative position
table `[buckets, heads]` is transposed.

Here a model without `logits_dense` takes its logits from the embedding and scales the decoder's
output by d_model^-0.5 (T5), and one with it does not scale (T5 1.1). The two other combinations
exist there too, and get a `logits_dense` that gives the same logits.
"""

import dataclasses
import functools
import json
import re
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors looks up by name)
import numpy as np
import safetensors
from etils import epath

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index
from upcycle_jax.trees import LeafSpec

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_TYPES = ("t5", "mt5")

_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_BLOCK = re.compile(
    r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.(?:(layer_norm)|(\w+)\.(\w+))\.weight"
)
_LAYER_NORMS = {
    ("encoder", 0): "pre_attention_layer_norm",
    ("encoder", 1): "pre_mlp_layer_norm",
    ("decoder", 0): "pre_self_attention_layer_norm",
    ("decoder", 1): "pre_cross_attention_layer_norm",
    ("decoder", 2): "pre_mlp_layer_norm",
}
_OUTSIDE_BLOCKS = {
    "shared.weight": ("token_embedder/embedding", False),
    "lm_head.weight": ("decoder/logits_dense/kernel", True),
    "encoder.final_layer_norm.weight": ("encoder/encoder_norm/scale", False),
    "decoder.final_layer_norm.weight": ("decoder/decoder_norm/scale", False),
}
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


_LOGITS = "target/decoder/logits_dense/kernel"
_EMBEDDING = "target/token_embedder/embedding"


@dataclasses.dataclass(frozen=True)
class _Source:
    """The tensor behind a leaf."""

    file: str
    tensor: str
    transposed: bool
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a Hugging Face tensor belongs.

    Attributes:
      name: the parameter's T5X path, without `target/`.
      transposed: whether the parameter is the tensor's transpose.
    """

    name: str
    transposed: bool


def t5x_tensor(name: str) -> Tensor | None:
    """The T5X parameter that a Hugging Face tensor holds; None for a name that T5 does not have.

    >>> t5x_tensor("decoder.block.3.layer.1.EncDecAttention.o.weight").name
    'decoder/layers_3/encoder_decoder_attention/out/kernel'
    """
    if name in _OUTSIDE_BLOCKS:
        return Tensor(*_OUTSIDE_BLOCKS[name])
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    stack, block, position, norm, module, part = match.groups()
    layer = f"{stack}/layers_{block}"
    if norm:
        place = _LAYER_NORMS.get((stack, int(position)))
        return Tensor(f"{layer}/{place}/scale", False) if place else None
    if part == "relative_attention_bias":
        return Tensor(f"{stack}/relpos_bias/rel_embedding", True)
    if module == "DenseReluDense" and part in ("wi", "wi_0", "wi_1", "wo"):
        return Tensor(f"{layer}/mlp/{part}/kernel", True)
    attention = {
        "SelfAttention": "attention" if stack == "encoder" else "self_attention",
        "EncDecAttention": "encoder_decoder_attention",
    }
    if module in attention and part in _ATTENTION:
        return Tensor(f"{layer}/{attention[module]}/{_ATTENTION[part]}/kernel", True)
    return None


class HuggingFaceReader(ReaderBase):
    """A Hugging Face T5 folder: config.json with model.safetensors, or with shards and their index.

    Args:
      path: the folder.

    Raises:
      ValueError: the model is no T5, its weights are pickled, a shard is missing, or a tensor has
        no place in T5.
    """

    format = "huggingface"

    def __init__(self, path: epath.Path):
        self.path = path
        if not storage.is_local(path):
            raise ValueError(
                f"{path}: safetensors files are memory-mapped, so copy the folder to a local disk"
                " first"
            )
        self.config = _load_json(path / CONFIG)
        model_type = self.config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"{path} holds a model of type {model_type!r}; only T5 models"
                f" ({', '.join(MODEL_TYPES)}) can be read"
            )
        self._open: dict[str, Any] = {}
        self._tensors = self._place(self._locate())

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file that holds it."""
        index = self.path / WEIGHTS_INDEX
        if index.exists():
            files = _load_json(index)["weight_map"]
        elif (self.path / WEIGHTS).exists():
            files = dict.fromkeys(self._file(WEIGHTS).keys(), WEIGHTS)
        else:
            pickled = sorted(
                child.name
                for child in self.path.iterdir()
                if child.name.endswith((".bin", ".pt", ".ckpt", ".msgpack", ".h5"))
            )
            raise ValueError(
                f"{self.path} has no {WEIGHTS}"
                + (
                    f", only {', '.join(pickled)}: pickled weights are not read; load them"
                    if pickled
                    else ": load the model"
                )
                + " with transformers and call save_pretrained(..., safe_serialization=True)"
            )
        missing = sorted({file for file in files.values() if not (self.path / file).exists()})
        if missing:
            raise ValueError(
                f"{self.path}: the index names {', '.join(missing)}, which"
                f" {'is' if len(missing) == 1 else 'are'} missing"
            )
        return files

    def _place(self, files: dict[str, str]) -> dict[str, _Source]:
        placed: dict[str, _Source] = {}
        unknown = []
        for tensor, file in files.items():
            if tensor in _EMBEDDING_COPIES and "shared.weight" in files:
                continue
            place = t5x_tensor("shared.weight" if tensor == _EMBEDDING_COPIES[0] else tensor)
            if place is None:
                unknown.append(tensor)
            else:
                placed[f"target/{place.name}"] = _Source(file, tensor, place.transposed)
        if unknown:
            raise ValueError(
                f"{self.path}: {len(unknown)} tensors have no place in T5:"
                f" {', '.join(sorted(unknown)[:5])}"
            )
        if _EMBEDDING not in placed:
            raise ValueError(
                f"{self.path} has no embedding (shared.weight): the folder holds a part of a model"
            )
        embedding, logits = placed[_EMBEDDING], placed.get(_LOGITS)
        if logits is not None and self.scaled_logits:
            placed[_LOGITS] = dataclasses.replace(logits, factor=self.config["d_model"] ** -0.5)
        elif (
            logits is None
            and not self.scaled_logits
            and "target/decoder/decoder_norm/scale" in placed
        ):
            placed[_LOGITS] = dataclasses.replace(embedding, transposed=True)
        return dict(sorted(placed.items()))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safetensors.safe_open(str(self.path / name), framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(
                    f"{self.path / name} is damaged or truncated ({error}): copy it again"
                ) from None
        return self._open[name]

    @functools.cached_property
    def _specs(self) -> dict[str, LeafSpec]:
        specs = {}
        for name, source in self._tensors.items():
            piece = self._file(source.file).get_slice(source.tensor)
            shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
            if dtype not in _SAFETENSORS_DTYPES:
                raise ValueError(
                    f"{self.path}: {source.tensor} is stored as {dtype}; quantised weights are not"
                    " supported, use float16 or wider"
                )
            specs[name] = LeafSpec(
                shape[::-1] if source.transposed else shape, np.dtype(_SAFETENSORS_DTYPES[dtype])
            )
        return specs

    def specs(self) -> dict[str, LeafSpec]:
        return dict(self._specs)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        index = checked_index(name, self.spec(name).shape, index)
        source = self._tensors[name]
        value = self._file(source.file).get_slice(source.tensor)[
            index[::-1] if source.transposed else index
        ]
        value = np.ascontiguousarray(value.T) if source.transposed else np.asarray(value)
        return value if source.factor == 1.0 else (value * np.asarray(source.factor, value.dtype))

    @property
    def scaled_logits(self) -> bool:
        """Whether the decoder's output is multiplied by d_model^-0.5 before the logits."""
        return bool(
            self.config.get("scale_decoder_outputs", self.config.get("tie_word_embeddings", True))
        )


def _load_json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from None
