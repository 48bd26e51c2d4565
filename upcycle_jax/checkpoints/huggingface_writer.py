"""Writes dense T5 parameters as a Hugging Face folder that transformers loads."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.casting import cast
from upcycle_jax.checkpoints.huggingface import CONFIG, WEIGHTS, WEIGHTS_INDEX, t5x_tensor
from upcycle_jax.checkpoints.opening import PARTIAL_SUFFIX
from upcycle_jax.checkpoints.output import check_unfinished, checked_output
from upcycle_jax.checkpoints.reader import TARGET, CheckpointReader
from upcycle_jax.trees import LeafSpec

DEFAULT_SHARD_BYTES = 1 << 30
HUGGINGFACE_FILES = r"config\.json|model.*\.(safetensors|json)"
"""Names of the files that are written, as a pattern."""


@dataclasses.dataclass(frozen=True)
class T5Dimensions:
    """What a dense T5's parameter shapes say about its architecture."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    num_buckets: int
    gated: bool
    tied: bool


def t5_dimensions(specs: dict[str, LeafSpec]) -> T5Dimensions:
    """Reads the architecture off the shapes of `target/...`.

    Raises:
      ValueError: the model is sparse, or lacks a parameter that every T5 has.
    """
    if any("/expert/" in name for name in specs):
        raise ValueError(
            "the checkpoint is a Mixture-of-Experts: Hugging Face's T5 is dense; merge the experts"
            " first"
        )

    def shape(name: str) -> tuple[int, ...]:
        if TARGET + name not in specs:
            raise ValueError(
                f"the checkpoint has no {TARGET}{name}: it is no encoder-decoder T5, or its layers"
                " are stored stacked"
            )
        return specs[TARGET + name].shape

    layers = {
        stack: sum(
            name.endswith("/pre_mlp_layer_norm/scale")
            for name in specs
            if f"{TARGET}{stack}/" in name
        )
        for stack in _STACKS
    }
    vocab_size, d_model = shape("token_embedder/embedding")
    num_heads, num_buckets = shape("encoder/relpos_bias/rel_embedding")
    gated = f"{TARGET}encoder/layers_0/mlp/wi_0/kernel" in specs
    return T5Dimensions(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shape("encoder/layers_0/attention/query/kernel")[1] // num_heads,
        d_ff=shape(f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel")[1],
        num_heads=num_heads,
        num_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        num_buckets=num_buckets,
        gated=gated,
        tied=f"{TARGET}decoder/logits_dense/kernel" not in specs,
    )


_STACKS = ("encoder", "decoder")


def huggingface_config(
    dimensions: T5Dimensions, dtype: np.dtype, *, feed_forward: str | None = None
) -> dict[str, Any]:
    """The config.json of a T5 of these dimensions.

    Args:
      dimensions: see `t5_dimensions`.
      dtype: dtype of the weights.
      feed_forward: Hugging Face's name of the activation; by default 'gated-gelu' (T5 1.1) or
        'relu' (T5).
    """
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": dimensions.vocab_size,
        "d_model": dimensions.d_model,
        "d_kv": dimensions.d_kv,
        "d_ff": dimensions.d_ff,
        "num_heads": dimensions.num_heads,
        "num_layers": dimensions.num_layers,
        "num_decoder_layers": dimensions.num_decoder_layers,
        "relative_attention_num_buckets": dimensions.num_buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "feed_forward_proj": feed_forward or ("gated-gelu" if dimensions.gated else "relu"),
        "is_encoder_decoder": True,
        # T5 scales the decoder's output where it shares the embedding; T5 1.1 does neither.
        "tie_word_embeddings": dimensions.tied,
        "scale_decoder_outputs": dimensions.tied,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
        "dtype": dtype.name,
        "torch_dtype": dtype.name,
    }


def tensor_names(dimensions: T5Dimensions) -> dict[str, tuple[str, bool]]:
    """T5X path (with `target/`) -> (Hugging Face name, whether it is transposed), for every tensor
    of a T5.
    """
    names = ["shared.weight", *(f"{stack}.final_layer_norm.weight" for stack in _STACKS)]
    names += [] if dimensions.tied else ["lm_head.weight"]
    wi = ("wi_0", "wi_1") if dimensions.gated else ("wi",)
    for stack, layers in (
        ("encoder", dimensions.num_layers),
        ("decoder", dimensions.num_decoder_layers),
    ):
        modules = (
            [("SelfAttention", "qkvo")]
            + [("EncDecAttention", "qkvo")] * (stack == "decoder")
            + [("DenseReluDense", (*wi, "wo"))]
        )
        names.append(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        for block in range(layers):
            for position, (module, parts) in enumerate(modules):
                layer = f"{stack}.block.{block}.layer.{position}"
                names += [
                    f"{layer}.layer_norm.weight",
                    *(f"{layer}.{module}.{part}.weight" for part in parts),
                ]
    places = {name: t5x_tensor(name) for name in names}
    return {
        TARGET + place.name: (name, place.transposed)
        for name, place in places.items()
        if place is not None
    }


def write_huggingface(
    reader: CheckpointReader,
    output: os.PathLike | str,
    *,
    dtype: np.dtype | None = None,
    feed_forward: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes the dense parameters of a checkpoint as config.json and safetensors. Optimizer state
    and step are left behind.

    Args:
      reader: a dense T5.
      output: a folder that does not exist; it appears when complete. The tokenizer is the user's to
        copy.
      dtype: dtype to write; None keeps each parameter's own.
      feed_forward: see `huggingface_config`.
      shard_bytes: at most so many bytes are held in memory and written to one file.
      progress: called with the name of each file written.

    Raises:
      ValueError: the checkpoint is sparse, or no encoder-decoder T5; a leaf is damaged, or `dtype`
        cannot hold a value of it; `output` cannot be written to or lies in the source. Nothing is
        left at `output`.
      FileExistsError: there is something at `output`.
    """
    if not storage.is_local(output):
        raise ValueError(
            f"{output}: a Hugging Face folder is written to a local disk; write it there and"
            " upload it"
        )
    final = checked_output(output, [reader.path])
    if final.exists():
        raise FileExistsError(
            f"{final} exists already: nothing was changed. Choose another output path or remove it"
            " first"
        )
    specs = {name: spec for name, spec in reader.specs().items() if name.startswith(TARGET)}
    dimensions = t5_dimensions(specs)
    places = tensor_names(dimensions)
    if places.keys() != specs.keys():
        lines = [f"- {name} (expected)" for name in places.keys() - specs.keys()] + [
            f"+ {name}" for name in specs.keys() - places.keys()
        ]
        raise ValueError(
            "the parameters are not those of a T5 that transformers knows:\n"
            + "\n".join(sorted(lines)[:20])
        )
    stored = np.dtype(dtype or specs[f"{TARGET}token_embedder/embedding"].dtype)
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    check_unfinished(partial, HUGGINGFACE_FILES)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(reader, places, specs, partial, dtype, shard_bytes, progress)
    except ValueError:  # damage in the source, or a value that the dtype cannot hold
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (partial / CONFIG).write_text(
        json.dumps(huggingface_config(dimensions, stored, feed_forward=feed_forward), indent=2)
        + "\n"
    )
    os.rename(partial, final)
    return final


def _write_weights(
    reader: CheckpointReader,
    places: dict[str, tuple[str, bool]],
    specs: dict[str, LeafSpec],
    folder: Path,
    dtype: np.dtype | None,
    shard_bytes: int,
    progress: Callable[[str], None] | None,
) -> None:
    shards = list(_shards(places, specs, dtype, shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = (
            WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {}
        for name in names:
            tensor, transposed = places[name]
            value = reader.read(name)
            value = value if dtype is None else cast(name, value, np.dtype(dtype))
            tensors[tensor] = np.ascontiguousarray(value.T if transposed else value)
            total += tensors[tensor].nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        if progress:
            progress(file)
    if len(shards) > 1:
        (folder / WEIGHTS_INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            + "\n"
        )


def _shards(
    places: dict[str, tuple[str, bool]],
    specs: dict[str, LeafSpec],
    dtype: np.dtype | None,
    shard_bytes: int,
) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name in places:
        nbytes = specs[name].size * np.dtype(dtype or specs[name].dtype).itemsize
        if names and held + nbytes > shard_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += nbytes
    yield names
