"""T5 1.1 encoder-decoder, whose MLPs in chosen layers may be MoE layers."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import masks, projection
from upcycle_jax.layers.attention import Cached, DecodingStep, MultiHeadDotProductAttention
from upcycle_jax.layers.embedding import Embed
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.layers.norm import RMSNorm
from upcycle_jax.layers.relative_position import RelativePositionBiases, with_mask
from upcycle_jax.models import stacking
from upcycle_jax.models.t5.config import StackName, T5Config
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.partitioning import constrain

HIDDEN_AXES = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)


def _zero_padding(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Zeroes `[batch, length, d]` where bool `[batch, length]` is False: T5X does so before
    attention and before the MLP.
    """
    return x * valid[..., None].astype(x.dtype)


def _same(x: jax.Array) -> jax.Array:
    return x


def _norm(config: T5Config, name: str | None = None) -> RMSNorm:
    return RMSNorm(epsilon=config.layer_norm_epsilon, dtype=config.activation_dtype, name=name)


def _relative_positions(config: T5Config) -> RelativePositionBiases:
    return RelativePositionBiases(
        num_heads=config.num_heads,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        dtype=config.activation_dtype,
    )


def _attention(config: T5Config, name: str) -> MultiHeadDotProductAttention:
    return MultiHeadDotProductAttention(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        dropout_rate=config.dropout_rate,
        float32_logits=config.float32_attention_logits,
        dtype=config.activation_dtype,
        name=name,
    )


def moe_layer(config: T5Config, stack: StackName, **bound: Any) -> MoeLayer:
    """The MoE layer of a stack; `bound` are the keywords of `nn.Module` (`name`, `parent`)."""
    assert config.moe is not None
    return MoeLayer(
        config=config.moe,
        router=config.moe.router(stack),
        hidden=config.expert_mlp_dim,
        activations=config.mlp_activations,
        dropout_rate=config.expert_dropout_rate,
        dtype=config.activation_dtype,
        **bound,
    )


def _feed_forward(
    layer: "EncoderLayer | DecoderLayer",
    x: jax.Array,
    valid: jax.Array,
    token_ids: jax.Array,
    *,
    stack: StackName,
    train: bool,
) -> jax.Array:
    """Pre-norm, MLP or MoE layer, dropout and residual, and where the model has it the dense MLP
    after an MoE layer likewise; submodules belong to the compact `__call__` of `layer`.
    """
    config = layer.config

    def normed(x: jax.Array, name: str) -> jax.Array:
        return _zero_padding(_norm(config, name)(x), valid)

    def dense(y: jax.Array, name: str) -> jax.Array:
        return MlpBlock(
            hidden=config.mlp_dim,
            activations=config.mlp_activations,
            dropout_rate=config.dropout_rate,
            dtype=config.activation_dtype,
            name=name,
        )(y, not train)

    def added(x: jax.Array, y: jax.Array) -> jax.Array:
        y = x + projection.dropout(config.dropout_rate)(y, deterministic=not train)
        return constrain(y, HIDDEN_AXES)

    y = normed(x, "pre_mlp_layer_norm")
    if not layer.sparse:
        y = added(x, dense(y, "mlp"))
    else:
        assert config.moe is not None
        y = added(x, moe_layer(config, stack, name="mlp")(y, valid, token_ids, train=train))
        if config.moe.extra_mlp:
            y = added(y, dense(normed(y, "pre_extra_mlp_layer_norm"), "extra_mlp"))
    stacking.leave_residual(layer, y)
    return y


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each pre-normed and residual.

    Attributes:
      config: the model.
      sparse: whether the MLP is an MoE layer.
    """

    config: T5Config
    sparse: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, bias: jax.Array, valid: jax.Array, token_ids: jax.Array, *, train: bool
    ) -> jax.Array:
        """Maps `[batch, length, d]` to the same shape.

        Args:
          x: residual stream.
          bias: position and mask bias of self-attention.
          valid: bool `[batch, length]`, real tokens.
          token_ids: int32 `[batch, length]`, the tokens that were embedded, for routers that look
            at them.
          train: dropout and training capacity.
        """
        config = self.config
        y = _zero_padding(_norm(config, "pre_attention_layer_norm")(x), valid)
        y = _attention(config, "attention")(y, y, bias, deterministic=not train)
        x = constrain(
            x + projection.dropout(config.dropout_rate)(y, deterministic=not train), HIDDEN_AXES
        )
        return _feed_forward(self, x, valid, token_ids, stack="encoder", train=train)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, and MLP, each pre-normed and residual.

    Attributes:
      config: the model.
      sparse: whether the MLP is an MoE layer.
    """

    config: T5Config
    sparse: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        self_bias: jax.Array,
        cross_bias: jax.Array,
        valid: jax.Array,
        token_ids: jax.Array,
        *,
        train: bool,
        step: DecodingStep | None = None,
    ) -> jax.Array:
        """Maps `[batch, length, d]` to the same shape.

        Args:
          x: residual stream.
          encoded: encoder output `[batch, input length, d]`.
          self_bias: position and mask bias of self-attention.
          cross_bias: mask bias of attention to the encoder.
          valid: bool `[batch, length]`, real tokens.
          token_ids: int32 `[batch, length]`, the tokens that were embedded, for routers that look
            at them.
          train: dropout and training capacity.
          step: decode this one position, with caches.
        """
        config = self.config
        y = _zero_padding(_norm(config, "pre_self_attention_layer_norm")(x), valid)
        y = _attention(config, "self_attention")(
            y, y, self_bias, deterministic=not train, cached=Cached.GROWING, step=step
        )
        x = constrain(
            x + projection.dropout(config.dropout_rate)(y, deterministic=not train), HIDDEN_AXES
        )
        y = _zero_padding(_norm(config, "pre_cross_attention_layer_norm")(x), valid)
        attend = _attention(config, "encoder_decoder_attention")
        y = attend(y, encoded, cross_bias, deterministic=not train, cached=Cached.FIXED, step=step)
        x = constrain(
            x + projection.dropout(config.dropout_rate)(y, deterministic=not train), HIDDEN_AXES
        )
        return _feed_forward(self, x, valid, token_ids, stack="decoder", train=train)


class EncoderInputs(NamedTuple):
    """What the encoder gets, see `Encoder.__call__`."""

    embedded: jax.Array
    mask: jax.Array
    valid: jax.Array
    token_ids: jax.Array


class DecoderInputs(NamedTuple):
    """What the decoder gets beside the encoder's output, see `Decoder.__call__`."""

    embedded: jax.Array
    self_mask: jax.Array
    cross_mask: jax.Array
    valid: jax.Array
    token_ids: jax.Array


class Encoder(nn.Module):
    """The encoder stack.

    Attributes:
      config: the model.
    """

    config: T5Config

    def setup(self) -> None:
        config = self.config
        self.relpos_bias = _relative_positions(config)
        self.encoder_norm = _norm(config)

    def attention_bias(self, mask: jax.Array) -> jax.Array:
        """Bias `[batch, heads, length, length]` of every layer's attention, for bool `[batch, 1,
        length, length]`.
        """
        positions = jnp.arange(mask.shape[-1])
        return with_mask(self.relpos_bias(positions, positions, bidirectional=True), mask)

    def finish(
        self, x: jax.Array, valid: jax.Array, dropout: Callable[[jax.Array], jax.Array] = _same
    ) -> jax.Array:
        """The encoder's output, of the residual stream after its last layer; both are `[batch,
        length, d]`.
        """
        return _zero_padding(dropout(self.encoder_norm(x)), valid)

    @nn.compact
    def __call__(
        self,
        embedded: jax.Array,
        mask: jax.Array,
        valid: jax.Array,
        token_ids: jax.Array,
        *,
        train: bool,
    ) -> jax.Array:
        """Encodes `[batch, length, d]`.

        Args:
          embedded: token embeddings.
          mask: bool `[batch, 1, length, length]`, allowed pairs.
          valid: bool `[batch, length]`, real tokens.
          token_ids: int32 `[batch, length]`, the tokens that were embedded, for routers that look
            at them.
          train: dropout and training capacity.
        """
        config = self.config
        bias = self.attention_bias(mask)
        x = projection.dropout(config.dropout_rate)(embedded, deterministic=not train)
        sparse = config.sparse_layers("encoder")
        x = stacking.run_layers(
            self,
            lambda i, **module: EncoderLayer(config, sparse=i in sparse, **module),
            lambda layer, x: layer(x, bias, valid, token_ids, train=train),
            x,
            kinds=[i in sparse for i in range(config.num_encoder_layers)],
            scan=config.scan_layers,
            remat_policy=config.remat_policy,
        )
        dropout = projection.dropout(config.dropout_rate)
        return self.finish(x, valid, functools.partial(dropout, deterministic=not train))


class Decoder(nn.Module):
    """The decoder stack, up to the final norm, and the output projection of models that have their
    own.

    Attributes:
      config: the model.
    """

    config: T5Config

    def setup(self) -> None:
        config = self.config
        self.relpos_bias = _relative_positions(config)
        self.decoder_norm = _norm(config)
        if not config.logits_via_embedding:
            self.logits_dense = projection.Projection(
                config.vocab_size, (axes.EMBED, axes.VOCAB), dtype=jnp.float32
            )

    def attention_bias(self, mask: jax.Array, step: DecodingStep | None = None) -> jax.Array:
        """Bias `[batch, heads, length, keys]` of every layer's self-attention; arguments as in
        `__call__`.
        """
        queries = jnp.arange(mask.shape[-2]) if step is None else step.index[None]
        keys = jnp.arange(mask.shape[-1])
        return with_mask(self.relpos_bias(queries, keys, bidirectional=False), mask)

    def finish(
        self, x: jax.Array, valid: jax.Array, dropout: Callable[[jax.Array], jax.Array] = _same
    ) -> jax.Array:
        """What `__call__` returns, of the residual stream `[batch, length, d]` after the last
        layer.
        """
        x = _zero_padding(dropout(self.decoder_norm(x)), valid)
        return x if self.config.logits_via_embedding else self.logits_dense(x)

    @nn.compact
    def __call__(
        self,
        embedded: jax.Array,
        encoded: jax.Array,
        self_mask: jax.Array,
        cross_mask: jax.Array,
        valid: jax.Array,
        token_ids: jax.Array,
        *,
        train: bool,
        step: DecodingStep | None = None,
        finished: bool = True,
    ) -> jax.Array:
        """Decodes `[batch, length, d]` to float32 logits, or to the normed residual stream if the
        model shares its embedding table.

        Args:
          embedded: token embeddings.
          encoded: encoder output `[batch, input length, d]`.
          self_mask: bool `[batch, 1, length, keys]`, allowed pairs, causal.
          cross_mask: bool `[batch, 1, length, input length]`, allowed pairs.
          valid: bool `[batch, length]`, real tokens.
          token_ids: int32 `[batch, length]`, the tokens that were embedded, for routers that look
            at them.
          train: dropout and training capacity.
          step: decode this one position, with caches: length is 1, and keys are all positions that
            these have room for.
          finished: False: what `finish` makes that of.
        """
        config = self.config
        self_bias = self.attention_bias(self_mask, step)
        cross_bias = masks.to_bias(cross_mask)
        x = projection.dropout(config.dropout_rate)(embedded, deterministic=not train)
        sparse = config.sparse_layers("decoder")
        x = stacking.run_layers(
            self,
            lambda i, **module: DecoderLayer(config, sparse=i in sparse, **module),
            lambda layer, x: layer(
                x, encoded, self_bias, cross_bias, valid, token_ids, train=train, step=step
            ),
            x,
            kinds=[i in sparse for i in range(config.num_decoder_layers)],
            # A step of cached decoding is a small program, and would move all caches to loop over
            # them.
            scan=config.scan_layers and step is None,
            remat_policy=config.remat_policy if step is None else "none",
        )
        if not finished:
            return x
        dropout = projection.dropout(config.dropout_rate)
        return self.finish(x, valid, functools.partial(dropout, deterministic=not train))


class Transformer(nn.Module):
    """The encoder-decoder: tokens to logits.

    Attributes:
      config: the model.
    """

    config: T5Config

    def setup(self) -> None:
        config = self.config
        self.token_embedder = Embed(
            config.vocab_size, config.emb_dim, dtype=config.activation_dtype
        )
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        *,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Float32 logits `[batch, target length, vocab]`.

        Position features of packed batches are not needed: within one example, distances in the
        packed row are distances in the example.

        Args:
          encoder_input_tokens: int32 `[batch, input length]`, 0 for padding.
          decoder_input_tokens: int32 `[batch, target length]`, the targets shifted right.
          decoder_target_tokens: int32 `[batch, target length]`, 0 for padding; it alone says which
            decoder positions are real (in T5X mode the inputs say which positions are routed, see
            `masks.t5x_decoder_positions`).
          encoder_segment_ids: int32 `[batch, input length]`, which packed example a token belongs
            to.
          decoder_segment_ids: int32 `[batch, target length]`, likewise.
          train: dropout and training capacity.
        """
        into_encoder, into_decoder = self.inputs(
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
        )
        encoded = self.encoder(*into_encoder, train=train)
        return self.logits(
            self.decoder(into_decoder.embedded, encoded, *into_decoder[1:], train=train)
        )

    def inputs(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        *,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
    ) -> tuple[EncoderInputs, DecoderInputs]:
        """What both stacks get; arguments as in `__call__`."""
        encoder_valid, decoder_valid = encoder_input_tokens > 0, decoder_target_tokens > 0
        self_mask = masks.padding_mask(decoder_valid, decoder_valid) & masks.causal_mask(
            decoder_target_tokens.shape[1]
        )
        cross_mask = masks.padding_mask(decoder_valid, encoder_valid)
        if encoder_segment_ids is not None and decoder_segment_ids is not None:
            self_mask &= masks.segment_mask(decoder_segment_ids, decoder_segment_ids)
            cross_mask &= masks.segment_mask(decoder_segment_ids, encoder_segment_ids)
        else:
            encoder_segment_ids = None
        kept = decoder_valid
        if self.config.moe is not None and self.config.moe.t5x_mode:
            # What is not zeroed is routed as a token is, and takes places from others.
            kept = masks.t5x_decoder_positions(decoder_input_tokens)
        embedded = constrain(self.token_embedder(decoder_input_tokens), HIDDEN_AXES)
        return (
            self._encoder_inputs(encoder_input_tokens, encoder_segment_ids),
            DecoderInputs(embedded, self_mask, cross_mask, kept, decoder_input_tokens),
        )

    def _encoder_inputs(self, tokens: jax.Array, segment_ids: jax.Array | None) -> EncoderInputs:
        valid = tokens > 0
        mask = masks.padding_mask(valid, valid)
        if segment_ids is not None:
            mask &= masks.segment_mask(segment_ids, segment_ids)
        embedded = constrain(self.token_embedder(tokens), HIDDEN_AXES)
        return EncoderInputs(embedded, mask, valid, tokens)

    def encode(
        self,
        encoder_input_tokens: jax.Array,
        *,
        encoder_segment_ids: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """The encoder's output `[batch, input length, d]`; arguments as in `__call__`."""
        inputs = self._encoder_inputs(encoder_input_tokens, encoder_segment_ids)
        return self.encoder(*inputs, train=train)

    def decode_step(
        self, encoded: jax.Array, encoder_valid: jax.Array, tokens: jax.Array, step: DecodingStep
    ) -> jax.Array:
        """Float32 logits `[batch, vocab]` of the token after `tokens`, which are at position
        `step.index`.

        Reads and writes the collections `GROWING_CACHE` and `FIXED_CACHE`; both begin with the step
        of index 0.

        Args:
          encoded: encoder output `[batch, input length, d]`; after the first step only its shape
            counts.
          encoder_valid: bool `[batch, input length]`, real input tokens.
          tokens: int32 `[batch]`.
          step: the position.
        """
        valid = jnp.ones((tokens.shape[0], 1), bool)
        self_mask = (jnp.arange(step.max_length) <= step.index)[None, None, None, :]
        cross_mask = masks.padding_mask(valid, encoder_valid)
        embedded = constrain(self.token_embedder(tokens[:, None]), HIDDEN_AXES)
        return self.logits(
            self.decoder(
                embedded,
                encoded,
                self_mask,
                cross_mask,
                valid,
                tokens[:, None],
                train=False,
                step=step,
            )
        )[:, 0]

    def stream(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The residual stream `[batch, target length, d]` after the last layer of the decoder, and
        bool `[batch, target length]`, which positions are real; arguments as in `__call__`.
        """
        into_encoder, into_decoder = self.inputs(
            encoder_input_tokens, decoder_input_tokens, decoder_target_tokens
        )
        encoded = self.encoder(*into_encoder, train=False)
        stream = self.decoder(
            into_decoder.embedded, encoded, *into_decoder[1:], train=False, finished=False
        )
        return stream, into_decoder.valid

    def finish(self, stream: jax.Array, valid: jax.Array) -> jax.Array:
        """Float32 logits `[batch, length, vocab]` of `stream`, each position's of itself alone."""
        return self.logits(self.decoder.finish(stream, valid))

    def logits(self, decoded: jax.Array) -> jax.Array:
        """Float32 `[batch, length, vocab]` of the decoder's result (`Decoder.__call__`)."""
        if self.config.logits_via_embedding:
            decoded = self.token_embedder.attend(decoded) * self.config.emb_dim**-0.5
        return constrain(decoded, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_VOCAB))
