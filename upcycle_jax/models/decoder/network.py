"""A decoder-only language model: one stack of causal layers, whose MLPs may be MoE layers.

Axis legend: B rows, L positions, d width of the residual stream, V vocabulary.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import masks, projection
from upcycle_jax.layers.causal_attention import (
    CachedStep,
    GroupedQueryAttention,
    NextPosition,
    Prefill,
)
from upcycle_jax.layers.embedding import Embed
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.layers.norm import LayerNorm, RMSNorm
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models import stacking
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.partitioning import constrain

EMBEDDING_STDDEV = 0.02
"""Of a fresh embedding, as in GPT-2 and Llama."""

HIDDEN_AXES = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


def norm(config: DecoderConfig, name: str | None = None) -> RMSNorm | LayerNorm:
    """A norm of the residual stream."""
    epsilon, dtype = config.norm_epsilon, config.activation_dtype
    if config.norm in ("rms", "rms_plus_one"):
        plus_one = config.norm == "rms_plus_one"
        return RMSNorm(epsilon=epsilon, dtype=dtype, plus_one=plus_one, name=name)
    return LayerNorm(
        epsilon=epsilon, dtype=dtype, parametric=config.norm == "layer_norm", name=name
    )


def moe_layer(config: DecoderConfig, **bound: Any) -> MoeLayer:
    """An MoE layer; `bound` are the keywords of `nn.Module` (`name`, `parent`)."""
    assert config.moe is not None
    return MoeLayer(
        config=config.moe,
        router=config.moe.router,
        hidden=config.expert_mlp_dim,
        activations=config.mlp_activations,
        dropout_rate=config.expert_dropout_rate,
        dtype=config.activation_dtype,
        use_bias=config.mlp_bias,
        **bound,
    )


@flax.struct.dataclass
class Positions:
    """What attention needs to know of where tokens are; the same for all layers.

    Attributes:
      ropes: the rotary embeddings that some layer has.
      angles: of each of them, float32 `[B or 1, L, R/2]`.
      mask: bool `[B, 1, L or 1, L]`, pairs that are allowed beside the causal order; None: all.
      valid: bool `[B, L]`, real tokens.
      token_ids: int32 `[B, L]`, the tokens that were embedded, for routers that look at them.
    """

    ropes: tuple[Rope, ...] = flax.struct.field(pytree_node=False)
    angles: tuple[jax.Array, ...]
    mask: jax.Array | None
    valid: jax.Array
    token_ids: jax.Array

    def angles_of(self, rope: Rope | None) -> jax.Array | None:
        """The angles of a layer's embedding; None where it has none."""
        return None if rope is None else self.angles[self.ropes.index(rope)]


class DecoderLayer(nn.Module):
    """Causal self-attention and MLP with their norms and residual connections.

    Attributes:
      config: the model.
      sparse: whether the MLP is an MoE layer.
      rope: rotary embedding of its attention; None for none.
      window: positions that its attention sees; None for all before a query.
    """

    config: DecoderConfig
    sparse: bool
    rope: Rope | None
    window: int | None

    @nn.compact
    def __call__(
        self, x: jax.Array, where: Positions, *, train: bool, step: CachedStep | None = None
    ) -> jax.Array:
        """Maps `[B, L, d]` to the same shape.

        Args:
          x: residual stream.
          where: the tokens' positions.
          train: dropout and training capacity.
          step: decode these positions, with a cache.
        """
        attended = self._attention(self._before(x, "self_attention"), where, train, step)
        attended = self._after(attended, "self_attention", train)
        after_attention = constrain(x + attended, HIDDEN_AXES)
        read = x if self.config.parallel_residual else after_attention
        y = self._after(self._mlp(self._before(read, "mlp"), where, train), "mlp", train)
        y = constrain(after_attention + y, HIDDEN_AXES)
        stacking.leave_residual(self, y)
        return y

    def _before(self, x: jax.Array, sublayer: str) -> jax.Array:
        """What a sublayer reads of the residual stream."""
        if self.config.norm_place == "post":
            return x.astype(self.config.activation_dtype)
        return norm(self.config, f"pre_{sublayer}_layer_norm")(x)

    def _after(self, y: jax.Array, sublayer: str, train: bool) -> jax.Array:
        """What a sublayer's output adds to the residual stream."""
        config = self.config
        if config.norm_place != "pre":
            y = norm(config, f"post_{sublayer}_layer_norm")(y)
        if config.residual_multiplier != 1.0:
            y = y * jnp.asarray(config.residual_multiplier, y.dtype)
        return projection.dropout(config.dropout_rate)(y, deterministic=not train)

    def _attention(
        self, x: jax.Array, where: Positions, train: bool, step: CachedStep | None
    ) -> jax.Array:
        config = self.config
        attention = GroupedQueryAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            scale=config.logit_scale,
            window=self.window,
            qkv_bias=config.qkv_bias,
            out_bias=config.attention_out_bias,
            qk_norm=config.qk_norm,
            qk_norm_plus_one=config.norm == "rms_plus_one",
            norm_epsilon=config.norm_epsilon,
            clip=config.clip_qkv,
            softcap=config.attention_softcap,
            dropout_rate=config.dropout_rate,
            implementation=config.attention_implementation,
            dtype=config.activation_dtype,
            name="self_attention",
        )
        return attention(
            x,
            where.angles_of(self.rope),
            where.mask,
            amplitude=1.0 if self.rope is None else self.rope.amplitude,
            deterministic=not train,
            step=step,
        )

    def _mlp(self, x: jax.Array, where: Positions, train: bool) -> jax.Array:
        config = self.config
        if self.sparse:
            return moe_layer(config, name="mlp")(x, where.valid, where.token_ids, train=train)
        mlp = MlpBlock(
            hidden=config.mlp_dim,
            activations=config.mlp_activations,
            use_bias=config.mlp_bias,
            dropout_rate=config.dropout_rate,
            dtype=config.activation_dtype,
            name="mlp",
        )
        return mlp(x, not train)


def layer(config: DecoderConfig, index: int, **bound: Any) -> DecoderLayer:
    """The layer of an index; `bound` are the keywords of `nn.Module` (`name`, `parent`)."""
    return DecoderLayer(config, *_kind(config, index), **bound)


def _kind(config: DecoderConfig, index: int) -> tuple[bool, Rope | None, int | None]:
    """What tells a layer from others: layers of one kind differ in their parameters alone."""
    sparse = index in config.sparse_layers
    return sparse, config.layer_rope(index), config.layer_window(index)


class Decoder(nn.Module):
    """The stack, up to the final norm, and the output projection of models that have their own.

    Attributes:
      config: the model.
    """

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.decoder_norm = norm(config)
        if not config.logits_via_embedding:
            self.logits_dense = projection.Projection(
                config.vocab_size,
                (axes.EMBED, axes.VOCAB),
                dtype=jnp.float32,
                use_bias=config.logits_bias,
            )

    def finish(self, x: jax.Array) -> jax.Array:
        """What `__call__` returns, of the residual stream `[B, L, d]` after the last layer."""
        x = self.decoder_norm(x)
        return x if self.config.logits_via_embedding else self.logits_dense(x)

    @nn.compact
    def __call__(
        self,
        embedded: jax.Array,
        where: Positions,
        *,
        train: bool,
        step: CachedStep | None = None,
        finished: bool = True,
    ) -> jax.Array:
        """Decodes `[B, L, d]` to float32 logits before `LanguageModel.logits`, or to the normed
        residual stream if the model shares its embedding table; with a `Prefill`, those of the last
        position alone; not `finished`: what `finish` makes them of. Other arguments as of
        `DecoderLayer`.
        """
        config = self.config
        x = projection.dropout(config.dropout_rate)(embedded, deterministic=not train)
        x = stacking.run_layers(
            self,
            functools.partial(layer, config),
            lambda module, x: module(x, where, train=train, step=step),
            x,
            kinds=[_kind(config, index) for index in range(config.num_layers)],
            # A step of cached decoding is a small program, and would move all caches to loop over
            # them.
            scan=config.scan_layers and step is None,
            remat_policy=config.remat_policy if step is None else "none",
        )
        x = x[:, -1:] if isinstance(step, Prefill) else x
        return self.finish(x) if finished else x


class LanguageModel(nn.Module):
    """Tokens to logits.

    Attributes:
      config: the model.
    """

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.token_embedder = Embed(
            config.vocab_size,
            config.emb_dim,
            dtype=config.activation_dtype,
            stddev=EMBEDDING_STDDEV,
        )
        self.decoder = Decoder(config)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Float32 logits `[B, L, V]` of the token after each position.

        Args:
          tokens: int32 `[B, L]`, what the model reads.
          segment_ids: int32 `[B, L]`, the sequence of a packed row that a token belongs to, from 1;
            0 is padding. A token sees its own sequence alone. None: each row is one sequence.
          positions: int32 `[B, L]`, position of a token in its sequence; None: in its row.
          train: dropout and training capacity.
        """
        embedded, where = self.inputs(tokens, segment_ids, positions)
        return self.logits(self.decoder(embedded, where, train=train))

    def stream(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """The residual stream `[B, L, d]` after the last layer; arguments as in `__call__`."""
        embedded, where = self.inputs(tokens, segment_ids, positions)
        return self.decoder(embedded, where, train=False, finished=False)

    def finish(self, x: jax.Array) -> jax.Array:
        """Float32 logits `[B, L, V]` of `stream`, each position's of itself alone."""
        return self.logits(self.decoder.finish(x))

    def prefill(self, tokens: jax.Array, starts: jax.Array, step: Prefill) -> jax.Array:
        """Float32 logits `[B, V]` of the token after each row; begins `GROWING_CACHE`.

        Args:
          tokens: int32 `[B, L]`, sequences that end with their rows.
          starts: int32 `[B]`, index of the first token of each; before it stands padding.
          step: how long the rows will be.
        """
        positions = jnp.arange(tokens.shape[1]) - starts[:, None]
        segment_ids = (positions >= 0).astype(jnp.int32)
        embedded, where = self.inputs(
            tokens, segment_ids, jnp.maximum(positions, 0), length=step.room
        )
        return self.logits(self.decoder(embedded, where, train=False, step=step))[:, 0]

    def decode_step(self, tokens: jax.Array, step: NextPosition) -> jax.Array:
        """Float32 logits `[B, V]` of the token after int32 `tokens` `[B]`, which are at the step's
        position; goes on with `GROWING_CACHE`.
        """
        tokens, positions = tokens[:, None], (step.index - step.starts)[:, None]
        embedded, where = self.inputs(tokens, None, positions, length=step.room)
        return self.logits(self.decoder(embedded, where, train=False, step=step))[:, 0]

    def inputs(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        *,
        length: int | None = None,
    ) -> tuple[jax.Array, Positions]:
        """What the stack gets; `length` as in `where`, None for that of the rows; other arguments
        as in `__call__`.
        """
        mask, valid = None, jnp.ones(tokens.shape, bool)
        if segment_ids is not None:
            mask, valid = masks.segment_mask(segment_ids, segment_ids), segment_ids > 0
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        length = tokens.shape[1] if length is None else length
        return self.embed(tokens), self.where(tokens, positions, mask, valid, length=length)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """The residual stream before the first layer, `[B, L, d]`."""
        x = self.token_embedder(tokens)
        if self.config.embedding_multiplier != 1.0:
            # In the dtype of activations, as Gemma and Granite round it.
            x = x * jnp.asarray(self.config.embedding_multiplier, x.dtype)
        return constrain(x, HIDDEN_AXES)

    def where(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None,
        valid: jax.Array,
        *,
        length: int,
    ) -> Positions:
        """What attention needs to know of tokens at int positions `[B or 1, L]`; `length` is that
        of the longest sequence that the program can hold.
        """
        config = self.config
        of_layers = map(config.layer_rope, range(config.num_layers))
        ropes = tuple(dict.fromkeys(rope for rope in of_layers if rope is not None))
        angles = tuple(rope.angles(positions, config.head_dim, length) for rope in ropes)
        return Positions(ropes, angles, mask, valid, tokens)

    def logits(self, decoded: jax.Array) -> jax.Array:
        """Float32 `[B, L, V]` of the stack's result (`Decoder.__call__`)."""
        config = self.config
        if config.logits_via_embedding:
            decoded = self.token_embedder.attend(decoded)
        if config.logits_divisor != 1.0:
            decoded = decoded / config.logits_divisor
        if config.logits_softcap is not None:
            decoded = config.logits_softcap * jnp.tanh(decoded / config.logits_softcap)
        return constrain(decoded, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_VOCAB))
