"""T5's forward pass in steps (see `layerwise`): what is before the layers, every layer of the
encoder, the encoder's end, every layer of the decoder, the logits. All run the modules of
`network`.
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np

from upcycle_jax.layers import masks
from upcycle_jax.models.layerwise import State, Step, in_place, layer_step
from upcycle_jax.models.t5.config import StackName, T5Config
from upcycle_jax.models.t5.network import (
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Transformer,
    moe_layer,
)
from upcycle_jax.types import Batch, PyTree


def steps(config: T5Config) -> list[Step]:
    """The steps of a model with these settings.

    What knows of no experts has the dense model's settings, so that a sparse model and the dense
    one that it is made of share those programs.
    """
    config = dataclasses.replace(config.unrolled, dropout_rate=0.0)
    dense, t5x_mode = config.dense, config.moe is not None and config.moe.t5x_mode
    table = "token_embedder"
    before = (table, "encoder/relpos_bias", "decoder/relpos_bias")
    after = ("decoder/decoder_norm", table if config.logits_via_embedding else _LOGITS)
    return [
        Step(
            "embedding and position biases",
            False,
            in_place(before),
            _Inputs(config if t5x_mode else dense),
        ),
        *(_layer(config, "encoder", i) for i in range(config.num_encoder_layers)),
        Step("encoder_norm", False, in_place(["encoder/encoder_norm"]), _Encoded(dense)),
        *(_layer(config, "decoder", i) for i in range(config.num_decoder_layers)),
        Step("logits", False, in_place(after), _Logits(dense)),
    ]


def row_bytes(config: T5Config, batch: Batch) -> int:
    """Bytes of float32 activations of one row: what is kept between layers, and the most that one
    layer adds.
    """
    inputs, targets = (
        np.shape(batch[f"{name}_tokens"])[1] for name in ("encoder_input", "decoder_target")
    )
    longest, length = max(inputs, targets), inputs + targets
    kept = 3 * config.emb_dim * length
    kept += config.num_heads * (inputs**2 + targets**2) + inputs * targets
    attention = 3 * config.num_heads * longest**2 + 4 * config.num_heads * config.head_dim * longest
    mlp = 4 * max(config.mlp_dim, config.emb_dim) * longest
    return 4 * (kept + attention + mlp)


_LOGITS = "decoder/logits_dense"


def _layer(config: T5Config, stack: StackName, number: int) -> Step:
    sparse = number in config.sparse_layers(stack)
    of = config if sparse else config.dense
    shared = ("valid", "token_ids")
    return layer_step(
        f"{stack}/layers_{number}",
        EncoderLayer(of, sparse, parent=None)
        if stack == "encoder"
        else DecoderLayer(of, sparse, parent=None),
        ("bias", *shared) if stack == "encoder" else ("encoded", "bias", "cross_bias", *shared),
        moe=moe_layer(config, stack, parent=None) if sparse else None,
    )


@dataclasses.dataclass(frozen=True)
class _Inputs:
    config: T5Config

    def __call__(
        self, params: PyTree, state: State, expert_outputs: jax.Array | None = None
    ) -> tuple[State, None]:
        def inputs(module: Transformer, batch: State) -> State:
            encoder, decoder = module.inputs(
                batch["encoder_input_tokens"],
                batch["decoder_input_tokens"],
                batch["decoder_target_tokens"],
                encoder_segment_ids=batch.get("encoder_segment_ids"),
                decoder_segment_ids=batch.get("decoder_segment_ids"),
            )
            later = {
                "x": decoder.embedded,
                "valid": decoder.valid,
                "token_ids": decoder.token_ids,
                "bias": module.decoder.attention_bias(decoder.self_mask),
                "cross_bias": masks.to_bias(decoder.cross_mask),
            }
            return {
                "x": encoder.embedded,
                "valid": encoder.valid,
                "token_ids": encoder.token_ids,
                "bias": module.encoder.attention_bias(encoder.mask),
                "decoder": later,
            }

        return nn.apply(inputs, Transformer(self.config))({"params": params}, state), None


@dataclasses.dataclass(frozen=True)
class _Encoded:
    config: T5Config

    def __call__(
        self, params: PyTree, state: State, expert_outputs: jax.Array | None = None
    ) -> tuple[State, None]:
        variables = {"params": params["encoder"]}
        encoded = Encoder(self.config).apply(variables, state["x"], state["valid"], method="finish")
        return {**state["decoder"], "encoded": encoded}, None


@dataclasses.dataclass(frozen=True)
class _Logits:
    config: T5Config

    def __call__(
        self, params: PyTree, state: State, expert_outputs: jax.Array | None = None
    ) -> tuple[State, None]:
        applied = nn.apply(Transformer.finish, Transformer(self.config))
        return {"logits": applied({"params": params}, state["x"], state["valid"])}, None
