"""A vision transformer's forward pass in steps (see `models.layerwise`): the embedding, every
block, the logits. All run the modules of `network`.
"""

import dataclasses

import flax.linen as nn
import jax

from upcycle_jax.models.layerwise import State, Step, in_place, layer_step
from upcycle_jax.models.vit import network
from upcycle_jax.models.vit.config import STACK, VitConfig
from upcycle_jax.models.vit.network import VisionTransformer
from upcycle_jax.types import PyTree


def steps(config: VitConfig) -> list[Step]:
    """The steps of a model with these settings.

    What knows of no experts has the dense model's settings, so that a sparse model and the dense
    one that it is made of share those programs.
    """
    config = dataclasses.replace(config.unrolled, dropout_rate=0.0)
    dense = config.dense
    before = ["embedding", "pos_embedding"]
    before += ["cls"] if config.pool == "class_token" else []
    before += ["pre_norm"] if config.pre_norm else []
    after = [f"{STACK}/encoder_norm"] if config.final_norm else []
    after += ["map_head"] if config.pool == "map" else []
    after += ["head"] if config.num_classes else []
    return [
        Step("embedding", False, in_place(before), _Inputs(dense)),
        *(_layer(config, i) for i in range(config.num_layers)),
        Step("logits", False, in_place(after), _Logits(dense)),
    ]


def row_bytes(config: VitConfig) -> int:
    """Bytes of float32 activations of one image: what is kept between blocks, and the most that one
    block adds.
    """
    tokens = config.num_tokens
    attention = 3 * config.num_heads * tokens**2 + 4 * config.emb_dim * tokens
    mlp = 4 * max(config.mlp_dim, config.emb_dim) * tokens
    return 4 * (3 * config.emb_dim * tokens + attention + mlp)


def _layer(config: VitConfig, index: int) -> Step:
    sparse = index in config.sparse_layers
    return layer_step(
        f"{STACK}/layers_{index}",
        network.layer(config if sparse else config.dense, index, parent=None),
        ("valid",),
        moe=network.moe_layer(config, parent=None) if sparse else None,
    )


@dataclasses.dataclass(frozen=True)
class _Inputs:
    config: VitConfig

    def __call__(
        self, params: PyTree, state: State, expert_outputs: jax.Array | None = None
    ) -> tuple[State, None]:
        embed = nn.apply(VisionTransformer.embed, VisionTransformer(self.config))
        x, valid = embed({"params": params}, state["images"], state["weights"] > 0)
        return {"x": x, "valid": valid}, None


@dataclasses.dataclass(frozen=True)
class _Logits:
    config: VitConfig

    def __call__(
        self, params: PyTree, state: State, expert_outputs: jax.Array | None = None
    ) -> tuple[State, None]:
        def logits(module: VisionTransformer, x: jax.Array) -> jax.Array:
            return module.logits(module.features(module.encoder.finish(x)))

        applied = nn.apply(logits, VisionTransformer(self.config))
        return {"logits": applied({"params": params}, state["x"])}, None
