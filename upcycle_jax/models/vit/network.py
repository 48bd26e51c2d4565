"""A vision transformer: one stack of blocks, whose MLPs may be MoE layers.

Axis legend: B images, N tokens (patches, and a class token where there is one), d width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import projection
from upcycle_jax.layers.full_attention import FullAttention
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.layers.norm import LayerNorm
from upcycle_jax.layers.patches import PatchEmbed
from upcycle_jax.models import stacking
from upcycle_jax.models.vit.config import VitConfig
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.partitioning import constrain

HIDDEN_AXES = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


def norm(config: VitConfig, name: str | None = None) -> LayerNorm:
    """A layer norm of the residual stream."""
    return LayerNorm(epsilon=config.norm_epsilon, dtype=config.activation_dtype, name=name)


def dense_mlp(config: VitConfig, name: str) -> MlpBlock:
    """The MLP of a dense block, and of attention pooling."""
    return MlpBlock(
        hidden=config.mlp_dim,
        activations=config.mlp_activations,
        use_bias=True,
        dropout_rate=config.dropout_rate,
        dtype=config.activation_dtype,
        name=name,
    )


def moe_layer(config: VitConfig, **bound: Any) -> MoeLayer:
    """An MoE layer; `bound` are the keywords of `nn.Module` (`name`, `parent`)."""
    assert config.moe is not None
    return MoeLayer(
        config=config.moe,
        router=config.moe.router,
        hidden=config.expert_mlp_dim,
        activations=config.mlp_activations,
        use_bias=True,
        dropout_rate=config.expert_dropout_rate,
        dtype=config.activation_dtype,
        **bound,
    )


class EncoderLayer(nn.Module):
    """Attention and MLP, each pre-normed and residual.

    Attributes:
      config: the model.
      sparse: whether the MLP is an MoE layer.
    """

    config: VitConfig
    sparse: bool

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[B, N, d]` to the same shape.

        Args:
          x: residual stream.
          valid: bool `[B, N]`, tokens of real images.
          train: dropout and training capacity.
        """
        config = self.config
        y = norm(config, "pre_attention_layer_norm")(x)
        y = FullAttention(config.num_heads, dtype=config.activation_dtype, name="attention")(y, y)
        x = constrain(x + self._after(y, "attention_scale", train), HIDDEN_AXES)
        y = norm(config, "pre_mlp_layer_norm")(x)
        if self.sparse:
            y = moe_layer(config, name="mlp")(y, valid, train=train)
        else:
            y = dense_mlp(config, "mlp")(y, not train)
        x = constrain(x + self._after(y, "mlp_scale", train), HIDDEN_AXES)
        stacking.leave_residual(self, x)
        return x

    def _after(self, y: jax.Array, name: str, train: bool) -> jax.Array:
        """What a sublayer's output adds to the residual stream."""
        if self.config.layer_scale:
            init = nn.with_logical_partitioning(nn.initializers.ones, (axes.EMBED,))
            scale = self.param(name, init, (y.shape[-1],), jnp.float32)
            y = y * jnp.asarray(scale, y.dtype)
        return nn.Dropout(self.config.dropout_rate)(y, deterministic=not train)


def layer(config: VitConfig, index: int, **bound: Any) -> EncoderLayer:
    """The block of an index; `bound` are the keywords of `nn.Module` (`name`, `parent`)."""
    return EncoderLayer(config, index in config.sparse_layers, **bound)


class Encoder(nn.Module):
    """The stack, up to the final norm.

    Attributes:
      config: the model.
    """

    config: VitConfig

    def setup(self) -> None:
        if self.config.final_norm:
            self.encoder_norm = norm(self.config)

    def finish(self, x: jax.Array) -> jax.Array:
        """What `__call__` returns, of the residual stream `[B, N, d]` after the last block."""
        return self.encoder_norm(x) if self.config.final_norm else x

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, *, train: bool) -> jax.Array:
        """Encodes `[B, N, d]`; arguments as of `EncoderLayer`."""
        config = self.config
        x = stacking.run_layers(
            self,
            functools.partial(layer, config),
            lambda module, x: module(x, valid, train=train),
            x,
            kinds=[index in config.sparse_layers for index in range(config.num_layers)],
            scan=config.scan_layers,
            remat_policy=config.remat_policy,
        )
        return self.finish(x)


class MapHead(nn.Module):
    """Attention pooling: a learned probe attends to all tokens, then a residual MLP.

    Attributes:
      config: the model.
    """

    config: VitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, d]` of `[B, N, d]`."""
        config, width = self.config, x.shape[-1]
        init = nn.with_logical_partitioning(
            nn.initializers.xavier_uniform(), (None, None, axes.EMBED)
        )
        probe = self.param("probe", init, (1, 1, width), jnp.float32)
        queries = jnp.broadcast_to(jnp.asarray(probe, x.dtype), (x.shape[0], 1, width))
        attention = FullAttention(config.num_heads, dtype=config.activation_dtype, name="attention")
        pooled = attention(queries, x)
        pooled = pooled + dense_mlp(config, "mlp")(norm(config, "layer_norm")(pooled))
        return pooled[:, 0]


class VisionTransformer(nn.Module):
    """Images to logits.

    Attributes:
      config: the model.
    """

    config: VitConfig

    def setup(self) -> None:
        config = self.config
        self.embedding = PatchEmbed(
            config.patch_size,
            config.emb_dim,
            use_bias=config.patch_bias,
            dtype=config.activation_dtype,
        )
        if config.pre_norm:
            self.pre_norm = norm(config)
        self.encoder = Encoder(config)
        if config.pool == "map":
            self.map_head = MapHead(config)
        if config.num_classes:
            self.head = Head(config.num_classes, config.head_bias_init)
        self.dropout = nn.Dropout(config.dropout_rate)

    def __call__(
        self, images: jax.Array, valid: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Float32 logits `[B, classes]`, or features `[B, d]` of a model without a head.

        Args:
          images: `[B, size, size, channels]`, in [-1, 1].
          valid: bool `[B]`, real images; None: all are. Others take no expert's place.
          train: dropout and training capacity.
        """
        return self.logits(self.pre_logits(images, valid, train=train))

    def pre_logits(
        self, images: jax.Array, valid: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """What the head sees, `[B, d]`; arguments as of `__call__`."""
        x, real = self.embed(images, valid)
        x = self.encoder(self.dropout(x, deterministic=not train), real, train=train)
        return self.features(x)

    @nn.compact
    def embed(
        self, images: jax.Array, valid: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The residual stream before the first block `[B, N, d]`, and bool `[B, N]`, tokens of real
        images.
        """
        config = self.config
        x = self.embedding(images)
        positions = self._token(
            "pos_embedding", config.grid**2, config.emb_dim**-0.5, axis=axes.POSITIONS
        )
        x = x + positions.astype(x.dtype)
        if config.pool == "class_token":
            # Positions are those of patches: big_vision adds them before the class token.
            token = self._token("cls", 1, 0.0).astype(x.dtype)
            token = jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=1)
        if config.pre_norm:
            x = self.pre_norm(x)
        if valid is None:
            valid = jnp.ones(x.shape[:1], bool)
        return constrain(x, HIDDEN_AXES), jnp.broadcast_to(valid[:, None], x.shape[:2])

    def _token(self, name: str, count: int, stddev: float, *, axis: str | None = None) -> jax.Array:
        """A parameter `[1, count, d]`; `axis` names its second axis."""
        init = nn.with_logical_partitioning(
            nn.initializers.normal(stddev), (None, axis, axes.EMBED)
        )
        value = self.param(name, init, (1, count, self.config.emb_dim), jnp.float32)
        return jnp.asarray(value)

    def features(self, encoded: jax.Array) -> jax.Array:
        """What the head sees: `[B, d]` of the stack's result `[B, N, d]`."""
        if self.config.pool == "class_token":
            return encoded[:, 0]
        if self.config.pool == "map":
            return self.map_head(encoded)
        return jnp.mean(encoded, axis=1)

    def logits(self, features: jax.Array) -> jax.Array:
        """Float32 `[B, classes]`; the features themselves where there is no head."""
        return self.head(features) if self.config.num_classes else features


class Head(nn.Module):
    """The classifier: `x @ kernel + bias`, zeros at first. Classes are not divided over a mesh:
    their number may be any, as the 18,291 of JFT-300M.

    Attributes:
      num_classes: columns.
      bias_init: value that biases start with.
    """

    num_classes: int
    bias_init: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Float32 logits `[B, classes]` of `[B, d]`."""
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (axes.EMBED, axes.CLASSES))
        kernel = self.param("kernel", zeros, (x.shape[-1], self.num_classes), jnp.float32)
        constant = nn.initializers.constant(self.bias_init)
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(constant, (axes.CLASSES,)),
            (self.num_classes,),
            jnp.float32,
        )
        return projection.dot(x.astype(jnp.float32), jnp.asarray(kernel)) + jnp.asarray(bias)
