"""The Hugging Face folder that a dense T5 becomes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from upcycle_jax.checkpoints.huggingface.base import Export, Source, WritingOptions, leaves_of
from upcycle_jax.checkpoints.huggingface.carried import carried_files
from upcycle_jax.checkpoints.huggingface.t5.tensors import (
    EMBEDDING,
    STACKS,
    T5Dimensions,
    places,
)
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.moe import roles
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec, Role, diff

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


def export(reader: CheckpointReader, options: WritingOptions) -> Export | None:
    """See `base.FolderFamily.export`."""
    leaves = leaves_of(reader)
    stacks = {path.removeprefix(TARGET).partition("/")[0] for path in leaves}
    if "pos_embedding" in stacks or ("decoder" in stacks and "encoder" not in stacks):
        return None
    if options.model_type not in (None, "t5") or options.readers:
        raise ValueError(
            f"{reader.path} is no language model that is decoder-only: model types and readers are"
            " chosen for those alone"
        )
    specs = {path: leaf.spec for path, leaf in leaves.items()}
    dimensions = t5_dimensions(specs)
    found = places(dimensions)
    # Every leaf of a T5, with the shape that it has here.
    expected = {
        TARGET + place.name: LeafSpec(
            place.shape[::-1] if place.transposed else place.shape, np.dtype(np.float32)
        )
        for place in found.values()
    }
    difference = diff(expected, specs)
    if difference:
        raise ValueError(
            "the parameters are not those of a T5 that transformers knows:\n"
            + "\n".join(str(difference).splitlines()[:20])
        )
    stored = np.dtype(options.dtype or specs[TARGET + EMBEDDING].dtype)
    tensors = {TARGET + place.name: Source(name, place.transposed) for name, place in found.items()}
    config = huggingface_config(dimensions, stored, reader.model_settings())
    copied = carried_files(options.tokenizer) if options.tokenizer else {}
    return Export(config, tensors, leaves, copied=copied)


def t5_dimensions(specs: Mapping[str, LeafSpec]) -> T5Dimensions:
    """Reads the architecture off the shapes of `target/...`.

    Raises:
      ValueError: the model is sparse, or lacks a parameter that every T5 has.
    """
    if any(spec.role != Role.DENSE for spec in roles.inferred(specs).values()):
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
