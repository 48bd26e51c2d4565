"""The T5 shape that a checkpoint implies, for conversions where no model file is given."""

import re
from collections.abc import Mapping

from upcycle_jax.models.api import EncoderDecoderModel
from upcycle_jax.models.config import T5Config
from upcycle_jax.moe.config import MoeConfig
from upcycle_jax.trees import LeafSpec


def infer_config(specs: Mapping[str, LeafSpec]) -> T5Config:
    """The dense configuration of a T5 checkpoint, read off its shapes; numerics (dtype, dropout)
    are the defaults.

    Raises:
      ValueError: the leaves are not those of a dense T5 1.0 or 1.1 encoder-decoder.
    """
    embedding = specs.get("target/token_embedder/embedding")
    table = specs.get("target/encoder/relpos_bias/rel_embedding")
    query = specs.get("target/encoder/layers_0/attention/query/kernel")
    gated, plain = (
        specs.get(f"target/encoder/layers_0/mlp/{name}/kernel") for name in ("wi_0", "wi")
    )
    inner = gated or plain
    layers = {
        stack: (
            1
            + max(
                (
                    int(m.group(1))
                    for name in specs
                    if (m := re.match(rf"target/{stack}/layers_(\d+)/", name))
                ),
                default=-1,
            )
        )
        for stack in ("encoder", "decoder")
    }
    if (
        embedding is None
        or table is None
        or query is None
        or inner is None
        or not all(layers.values())
    ):
        raise ValueError(
            "the source's leaves are not those of a dense T5 encoder-decoder, so its model cannot"
            " be inferred: name a model file, --gin_file=models/t5_1_1_<size>_upcycled.gin"
        )
    heads = table.shape[0]
    return T5Config(
        vocab_size=embedding.shape[0],
        emb_dim=embedding.shape[1],
        num_heads=heads,
        num_encoder_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        head_dim=query.shape[1] // heads,
        mlp_dim=inner.shape[1],
        mlp_activations=("gelu", "linear") if gated is not None else ("relu",),
        logits_via_embedding="target/decoder/logits_dense/kernel" not in specs,
    )


def infer_sparse_model(specs: Mapping[str, LeafSpec], moe: MoeConfig) -> EncoderDecoderModel:
    """The sparse model that a dense T5 checkpoint becomes with these MoE layers.

    Raises:
      ValueError: see `infer_config`.
    """
    config = infer_config(specs)
    return EncoderDecoderModel(
        T5Config(**{**config.__dict__, "moe": moe}),
        loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    )
