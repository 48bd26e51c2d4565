"""Writes dense T5 parameters as a Hugging Face folder that transformers loads."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from upcycle_jax import leases
from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.casting import cast
from upcycle_jax.checkpoints.formats import PARTIAL_SUFFIX
from upcycle_jax.checkpoints.huggingface.files import CONFIG, WEIGHTS, WEIGHTS_INDEX
from upcycle_jax.checkpoints.huggingface.tensors import STACKS, T5Dimensions, places
from upcycle_jax.checkpoints.output import check_unfinished, checked_output
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec, diff

_DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_SHARD_BYTES = 1 << 30
HUGGINGFACE_FILES = r"config\.json|model.*\.(safetensors|json)"
"""Names of the files that are written, as a pattern."""


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

    def shape(name: str) -> tuple[int, int]:
        if TARGET + name not in specs:
            raise ValueError(
                f"the checkpoint has no {TARGET}{name}: it is no encoder-decoder T5, or its layers"
                " are stored stacked"
            )
        found = specs[TARGET + name].shape
        if len(found) != 2 or 0 in found:
            raise ValueError(f"{TARGET}{name} has the shape {list(found)}: it is no matrix")
        return found[0], found[1]

    layers = {
        stack: sum(
            name.endswith("/pre_mlp_layer_norm/scale")
            for name in specs
            if f"{TARGET}{stack}/" in name
        )
        for stack in STACKS
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


def huggingface_config(
    dimensions: T5Dimensions, dtype: np.dtype, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a T5 of these dimensions.

    Args:
      dimensions: see `t5_dimensions`.
      dtype: dtype of the weights.
      settings: what the checkpoint states of its forward pass (`CheckpointReader.model_settings`);
        what it does not state is T5 1.1's where the MLP is gated, and T5 1.0's where it is not.

    Raises:
      ValueError: transformers has no name for these activations, or they are not those of such an
        MLP.
    """
    default = ("gelu", "linear") if dimensions.gated else ("relu",)
    activations = tuple(settings.get("mlp_activations", default))
    if (len(activations) == 2) != dimensions.gated or activations not in FEED_FORWARD:
        raise ValueError(
            f"the checkpoint states mlp_activations {activations!r}, its MLP is"
            f" {'gated' if dimensions.gated else 'plain'}: transformers has"
            f" {', '.join(map(str, FEED_FORWARD))}"
        )
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
        "relative_attention_max_distance": settings.get("relative_attention_max_distance", 128),
        "layer_norm_epsilon": settings.get("layer_norm_epsilon", 1e-6),
        "feed_forward_proj": FEED_FORWARD[activations],
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


FEED_FORWARD = {
    ("gelu", "linear"): "gated-gelu",
    ("gelu_exact", "linear"): "gated-gelu_python",  # 'gated-gelu' is the tanh form there.
    ("relu", "linear"): "gated-relu",
    ("silu", "linear"): "gated-silu",
    ("gelu",): "gelu_new",
    ("gelu_exact",): "gelu",
    ("relu",): "relu",
    ("silu",): "silu",
}
"""Activations -> `feed_forward_proj`."""


def tensor_names(dimensions: T5Dimensions) -> dict[str, tuple[str, bool]]:
    """T5X path (with `target/`) -> (Hugging Face name, whether it is transposed), for every tensor
    of a T5.
    """
    return {
        TARGET + place.name: (name, place.transposed) for name, place in places(dimensions).items()
    }


def _expected(dimensions: T5Dimensions) -> dict[str, LeafSpec]:
    """Every leaf of a T5, with the shape that it has here."""
    return {
        TARGET + place.name: LeafSpec(
            place.shape[::-1] if place.transposed else place.shape, np.dtype(np.float32)
        )
        for place in places(dimensions).values()
    }


def write_huggingface(
    reader: CheckpointReader,
    output: os.PathLike | str,
    *,
    dtype: np.dtype | None = None,
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
    names = tensor_names(dimensions)
    difference = diff(_expected(dimensions), specs)
    if difference:
        raise ValueError(
            "the parameters are not those of a T5 that transformers knows:\n"
            + "\n".join(str(difference).splitlines()[:20])
        )
    for name, spec in specs.items():
        if dtype is None and spec.dtype.name not in _DTYPES:
            raise ValueError(
                f"{name} is stored as {spec}: Hugging Face's T5 has {', '.join(_DTYPES)}; choose one"
                " with --dtype"
            )
    stored = np.dtype(dtype or specs[f"{TARGET}token_embedder/embedding"].dtype)
    config = huggingface_config(dimensions, stored, reader.model_settings())
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    with leases.hold(
        final.with_name(f".{final.name}.lease.json"),
        what=str(final),
        remedy="choose another output path",
    ):
        check_unfinished(partial, HUGGINGFACE_FILES)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write_weights(reader, names, specs, partial, dtype, shard_bytes, progress)
        except ValueError:  # damage in the source, or a value that the dtype cannot hold
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        os.rename(partial, final)
    return final


def _write_weights(
    reader: CheckpointReader,
    tensors_of: dict[str, tuple[str, bool]],
    specs: dict[str, LeafSpec],
    folder: Path,
    dtype: np.dtype | None,
    shard_bytes: int,
    progress: Callable[[str], None] | None,
) -> None:
    shards = list(_shards(tensors_of, specs, dtype, shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = (
            WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {}
        for name in names:
            tensor, transposed = tensors_of[name]
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
    tensors_of: dict[str, tuple[str, bool]],
    specs: dict[str, LeafSpec],
    dtype: np.dtype | None,
    shard_bytes: int,
) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name in tensors_of:
        nbytes = specs[name].size * np.dtype(dtype or specs[name].dtype).itemsize
        if names and held + nbytes > shard_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += nbytes
    yield names
