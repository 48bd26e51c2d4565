"""A language model's forward pass in steps (see `models.layerwise`): the embedding, every layer,
the logits. All run the modules of `network`.
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np

from upcycle_jax.models.decoder import network
from upcycle_jax.models.decoder.config import STACK, DecoderConfig
from upcycle_jax.models.decoder.network import LanguageModel
from upcycle_jax.models.layerwise import State, Step, in_place, layer_step
from upcycle_jax.types import Batch, PyTree

_TABLE = "token_embedder"


def steps(config: DecoderConfig) -> list[Step]:
    """The steps of a model with these settings.

    What knows of no experts has the dense model's settings, so that a sparse model and the dense
    one that it is made of share those programs.
    """
    config = dataclasses.replace(config.unrolled, dropout_rate=0.0)
    dense = config.dense
    after = [f"{STACK}/decoder_norm"] if _has_final_norm(config) else []
    after.append(_TABLE if config.logits_via_embedding else f"{STACK}/logits_dense")
    return [
        Step("embedding", False, in_place([_TABLE]), _Inputs(dense)),
        *(_layer(config, i) for i in range(config.num_layers)),
        Step("logits", False, in_place(after), _Logits(dense)),
    ]


def row_bytes(config: DecoderConfig, batch: Batch) -> int:
    """Bytes of float32 activations of one row: what is kept between layers, and the most that one
    layer adds.
    """
    length = np.shape(batch["decoder_input_tokens"])[1]
    kept = (3 * config.emb_dim + 2 * config.head_dim) * length
    attention = 3 * config.num_heads * length**2 + 4 * config.num_heads * config.head_dim * length
    mlp = 4 * max(config.mlp_dim, config.emb_dim) * length
    return 4 * (kept + attention + mlp)


def _has_final_norm(config: DecoderConfig) -> bool:
    """Whether the norm after the last layer has parameters."""
    return config.norm != "layer_norm_without_parameters"


def _layer(config: DecoderConfig, index: int) -> Step:
    sparse = index in config.sparse_layers
    return layer_step(
        f"{STACK}/layers_{index}",
        network.layer(config if sparse else config.dense, index, parent=None),
        ("where",),
        moe=network.moe_layer(config, parent=None) if sparse else None,
    )


@dataclasses.dataclass(frozen=True)
class _Inputs:
    config: DecoderConfig

    def __call__(
        self, params: PyTree, state: State, expert_outputs: jax.Array | None = None
    ) -> tuple[State, None]:
        def inputs(module: LanguageModel, batch: State) -> State:
            names = ("input_tokens", "segment_ids", "positions")
            x, where = module.inputs(*(batch[f"decoder_{name}"] for name in names))
            return {"x": x, "valid": where.valid, "where": where}

        return nn.apply(inputs, LanguageModel(self.config))({"params": params}, state), None


@dataclasses.dataclass(frozen=True)
class _Logits:
    config: DecoderConfig

    def __call__(
        self, params: PyTree, state: State, expert_outputs: jax.Array | None = None
    ) -> tuple[State, None]:
        applied = nn.apply(LanguageModel.finish, LanguageModel(self.config))
        return {"logits": applied({"params": params}, state["x"])}, None
