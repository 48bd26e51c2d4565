"""Rewritings of a model's parameters that leave its function as it is, so that a type can hold it
that otherwise could not. All are lazy: a part of a leaf is computed when it is read.

What is computed is float32, whatever it comes from: in bfloat16 the result would be rounded.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from upcycle_jax.checkpoints.huggingface.base import Leaf
from upcycle_jax.checkpoints.huggingface.transposing import transposed
from upcycle_jax.checkpoints.reader import Index, index_shape
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.moe import roles
from upcycle_jax.trees import LeafSpec

FLOAT32 = np.dtype(np.float32)
_EMBEDDING, _LOGITS = "token_embedder/embedding", "decoder/logits_dense/kernel"

ZERO_SHARED_WIDTH = 256
"""Hidden size of a shared expert that is there because the type must have one: some engines refuse
a width of 0, and divide the width over devices.
"""


Leaves = Mapping[str, Leaf]
"""By path without `target/`."""


class Rewriting(Protocol):
    """A rewriting. Both methods are told the model before it."""

    @property
    def name(self) -> str:
        """In words, for the verdict."""

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """The model after it."""

    def leaves(self, leaves: Leaves, config: DecoderConfig) -> dict[str, Leaf]:
        """The parameters after it."""


def _constant(shape: tuple[int, ...], value: float) -> Leaf:
    spec = LeafSpec(shape, FLOAT32)
    return Leaf(spec, lambda index: np.full(index_shape(index), value, FLOAT32))


def _mapped(leaf: Leaf, function: Callable[[np.ndarray], np.ndarray]) -> Leaf:
    """Elementwise, of float32."""
    spec = LeafSpec(leaf.spec.shape, FLOAT32)
    return Leaf(spec, lambda index: function(leaf.read(index).astype(FLOAT32)))


def _transposed(leaf: Leaf) -> Leaf:
    spec = LeafSpec(leaf.spec.shape[::-1], leaf.spec.dtype)
    return Leaf(spec, lambda index: transposed(leaf.read(index[::-1])))


def _layers(config: DecoderConfig) -> Iterator[tuple[int, str]]:
    for number in range(config.num_layers):
        yield number, f"decoder/layers_{number}"


@dataclasses.dataclass(frozen=True)
class ZeroBiases:
    """Queries, keys and values get biases of zero: Qwen2's code has them, whatever config.json says
    in some engines.
    """

    name = "zero biases of queries, keys and values"

    def config(self, config: DecoderConfig) -> DecoderConfig:
        return dataclasses.replace(config, qkv_bias=True)

    def leaves(self, leaves: Leaves, config: DecoderConfig) -> dict[str, Leaf]:
        out = dict(leaves)
        sizes = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
        for _, layer in _layers(config):
            for part, heads in sizes.items():
                path = f"{layer}/self_attention/{part}/bias"
                out[path] = _constant((heads * config.head_dim,), 0.0)
        return out


@dataclasses.dataclass(frozen=True)
class UntiedHead:
    """The logits get a matrix of their own, which is the embedding."""

    name = "untied head"

    def config(self, config: DecoderConfig) -> DecoderConfig:
        return dataclasses.replace(config, logits_via_embedding=False)

    def leaves(self, leaves: Leaves, config: DecoderConfig) -> dict[str, Leaf]:
        return {**leaves, _LOGITS: _transposed(leaves[_EMBEDDING])}


@dataclasses.dataclass(frozen=True)
class Centred:
    """LayerNorm without parameters (OLMo 1) becomes RMSNorm with scales of 1: what writes to the
    residual stream loses its mean over the width, so that the stream has none.

    LayerNorm is RMSNorm of a vector without its mean, and takes the mean out first; if there is
    none, the two are the same. A tied head is centred with the embedding, which changes no logit:
    it meets vectors whose entries sum to 0.
    """

    name = "centred OLMo"

    def config(self, config: DecoderConfig) -> DecoderConfig:
        return dataclasses.replace(config, norm="rms")

    def leaves(self, leaves: Leaves, config: DecoderConfig) -> dict[str, Leaf]:
        out = dict(leaves)
        for path, leaf in leaves.items():
            if path == _EMBEDDING or path.endswith(
                ("/out/kernel", "/out/bias", "/wo/kernel", "/wo/bias")
            ):
                out[path] = _centred(leaf)
        ones = _constant((config.emb_dim,), 1.0)
        out["decoder/decoder_norm/scale"] = ones
        for _, layer in _layers(config):
            out[f"{layer}/pre_self_attention_layer_norm/scale"] = ones
            out[f"{layer}/pre_mlp_layer_norm/scale"] = ones
        return out


def _centred(leaf: Leaf) -> Leaf:
    """Without its mean over the last axis, the width of the model."""

    def read(index: Index) -> np.ndarray:
        whole = leaf.read((*index[:-1], slice(0, leaf.spec.shape[-1]))).astype(np.float64)
        centred = whole - whole.mean(axis=-1, keepdims=True)
        return centred[..., index[-1]].astype(FLOAT32)

    return Leaf(LeafSpec(leaf.spec.shape, FLOAT32), read)


@dataclasses.dataclass(frozen=True)
class Folded:
    """Gemma 1 becomes a Llama: norms scaled by 1 + w get scales 1 + w, the factor of the embedding
    goes into its rows, and the head, which the factor does not concern, gets a matrix of its own.
    """

    name = "folded Gemma"

    def config(self, config: DecoderConfig) -> DecoderConfig:
        return dataclasses.replace(
            config, norm="rms", embedding_multiplier=1.0, logits_via_embedding=False
        )

    def leaves(self, leaves: Leaves, config: DecoderConfig) -> dict[str, Leaf]:
        out = dict(leaves)
        if config.logits_via_embedding:
            out[_LOGITS] = _transposed(leaves[_EMBEDDING])
        factor = np.float32(config.embedding_multiplier)
        out[_EMBEDDING] = _mapped(leaves[_EMBEDDING], lambda x: x * factor)
        for path, leaf in leaves.items():
            if path.endswith("norm/scale"):
                out[path] = _mapped(leaf, lambda x: 1 + x)
        return out


@dataclasses.dataclass(frozen=True)
class ZeroSharedExpert:
    """MoE layers get a shared expert whose matrices are zero, with a gate of zeros."""

    name = "zero shared expert"

    def config(self, config: DecoderConfig) -> DecoderConfig:
        return dataclasses.replace(config, moe=self._moe(config))

    def _moe(self, config: DecoderConfig) -> DecoderMoeConfig:
        assert config.moe is not None
        return dataclasses.replace(
            config.moe, shared_expert_mlp_dim=ZERO_SHARED_WIDTH, shared_expert_gate=True
        )

    def leaves(self, leaves: Leaves, config: DecoderConfig) -> dict[str, Leaf]:
        out = dict(leaves)
        for number in config.sparse_layers:
            out |= zero_shared(
                f"decoder/layers_{number}/mlp", config.emb_dim, ZERO_SHARED_WIDTH, gate=True
            )
        return out


def zero_shared(mlp: str, emb_dim: int, width: int, *, gate: bool) -> dict[str, Leaf]:
    """A shared expert that adds nothing.

    Args:
      mlp: path of the MoE layer.
      emb_dim: d.
      width: its hidden size.
      gate: with a gate.
    """
    shared = f"{mlp}/{roles.SHARED_EXPERT}"
    out = {f"{shared}/{name}/kernel": _constant((emb_dim, width), 0.0) for name in ("wi_0", "wi_1")}
    out[f"{shared}/wo/kernel"] = _constant((width, emb_dim), 0.0)
    if gate:
        out[f"{mlp}/{roles.SHARED_GATE}/kernel"] = _constant((emb_dim, 1), 0.0)
    return out


@dataclasses.dataclass(frozen=True)
class HalfGate:
    """An ungated shared expert gets a gate of zeros, sigmoid(0) = 1/2, and outputs twice as large:
    both are exact in every float.
    """

    name = "shared expert behind a gate of 1/2"

    def config(self, config: DecoderConfig) -> DecoderConfig:
        assert config.moe is not None
        return dataclasses.replace(
            config, moe=dataclasses.replace(config.moe, shared_expert_gate=True)
        )

    def leaves(self, leaves: Leaves, config: DecoderConfig) -> dict[str, Leaf]:
        out = dict(leaves)
        for number in config.sparse_layers:
            mlp = f"decoder/layers_{number}/mlp"
            path = f"{mlp}/{roles.SHARED_EXPERT}/wo/kernel"
            out[path] = _mapped(leaves[path], lambda x: 2 * x)
            out[f"{mlp}/{roles.SHARED_GATE}/kernel"] = _constant((config.emb_dim, 1), 0.0)
        return out


@dataclasses.dataclass(frozen=True)
class SharedInExperts:
    """An ungated shared expert becomes hidden units of every routed expert, behind their own. The
    weights of a token's experts sum to 1, and so do those of the shared expert's output.
    """

    name = "shared expert within every expert"

    def why_not(self, config: DecoderConfig) -> str | None:
        """Why a model cannot be written so; None where it can."""
        moe = config.moe
        if moe is None or not moe.shared_expert_mlp_dim:
            return "there is no shared expert"
        if moe.shared_expert_gate:
            return "the shared expert has a gate"
        if config.mlp_bias:
            return "experts have biases"
        return None if moe.router.unit_weights else "the weights of a token do not sum to 1"

    def config(self, config: DecoderConfig) -> DecoderConfig:
        assert config.moe is not None and config.moe.shared_expert_mlp_dim is not None
        moe = dataclasses.replace(
            config.moe,
            expert_mlp_dim=config.expert_mlp_dim + config.moe.shared_expert_mlp_dim,
            shared_expert_mlp_dim=None,
        )
        return dataclasses.replace(config, moe=moe)

    def leaves(self, leaves: Leaves, config: DecoderConfig) -> dict[str, Leaf]:
        out = dict(leaves)
        for number in config.sparse_layers:
            mlp = f"decoder/layers_{number}/mlp"
            for name in ("wi_0", "wi_1", "wo"):
                shared = out.pop(f"{mlp}/{roles.SHARED_EXPERT}/{name}/kernel")
                path = f"{mlp}/{roles.EXPERT}/{name}/kernel"
                out[path] = _with_units(out[path], shared, axis=1 if name == "wo" else 2)
        return out


def _with_units(experts: Leaf, shared: Leaf, *, axis: int) -> Leaf:
    """Experts `[E, ., .]` with those of `shared` `[., .]` behind their own along an axis."""
    has = experts.spec.shape[axis]
    shape = list(experts.spec.shape)
    shape[axis] += shared.spec.shape[axis - 1]
    same = experts.spec.dtype == shared.spec.dtype
    dtype = experts.spec.dtype if same else FLOAT32

    def read(index: Index) -> np.ndarray:
        own, other = list(index), list(index[1:])
        start, stop = index[axis].start, index[axis].stop
        own[axis] = slice(min(start, has), min(stop, has))
        other[axis - 1] = slice(max(start - has, 0), max(stop - has, 0))
        units = shared.read(tuple(other)).astype(dtype)
        copies = np.broadcast_to(units, (index[0].stop - index[0].start, *units.shape))
        return np.concatenate([experts.read(tuple(own)).astype(dtype), copies], axis)

    return Leaf(LeafSpec(tuple(shape), dtype), read)


@dataclasses.dataclass(frozen=True)
class Padded:
    """Dense layers become MoE layers of E identical experts with a router of zeros.

    Weights that sum to 1 give that expert back. Weights that do not are 1/E each, K of them: the
    experts' outputs then are E/K times as large. A dense MLP that is narrower than an expert is
    filled up with hidden units of zeros.
    """

    name = "padded mixed layers"

    def why_not(self, config: DecoderConfig) -> str | None:
        """Why a model cannot be padded; None where it can."""
        if config.moe is None or config.mlp_dim <= config.expert_mlp_dim:
            return None
        return (
            f"its dense layers have {config.mlp_dim} hidden units, more than an expert's"
            f" {config.expert_mlp_dim}"
        )

    def config(self, config: DecoderConfig) -> DecoderConfig:
        assert config.moe is not None
        moe = dataclasses.replace(
            config.moe,
            num_sparse_layers=None,
            sparse_layout=tuple(range(config.num_layers)),
            expert_mlp_dim=config.expert_mlp_dim,
        )
        return dataclasses.replace(config, moe=moe)

    def leaves(self, leaves: Leaves, config: DecoderConfig) -> dict[str, Leaf]:
        moe = config.moe
        assert moe is not None
        chosen = moe.router.active_experts(1.0)
        factor = 1.0 if moe.router.unit_weights else moe.num_experts / chosen
        out = dict(leaves)
        for number, layer in _layers(config):
            if number in config.sparse_layers:
                continue
            mlp = f"{layer}/mlp"
            for name in ("wi_0", "wi_1", "wo"):
                leaf = out.pop(f"{mlp}/{name}/kernel")
                if name == "wo" and factor != 1.0:
                    leaf = _mapped(leaf, lambda x: x * np.float32(factor))
                axis = 0 if name == "wo" else 1
                leaf = _filled(leaf, axis, config.expert_mlp_dim)
                out[f"{mlp}/{roles.EXPERT}/{name}/kernel"] = _copies(leaf, moe.num_experts)
            router = f"{mlp}/{roles.ROUTER}/router_weights/w/kernel"
            out[router] = _constant((config.emb_dim, moe.num_experts), 0.0)
            if moe.shared_expert_mlp_dim is not None:
                gate = moe.shared_expert_gate
                out |= zero_shared(mlp, config.emb_dim, moe.shared_expert_mlp_dim, gate=gate)
        return out


def _filled(leaf: Leaf, axis: int, size: int) -> Leaf:
    """Zeros behind the end of an axis."""
    has = leaf.spec.shape[axis]
    if has == size:
        return leaf
    shape = list(leaf.spec.shape)
    shape[axis] = size

    def read(index: Index) -> np.ndarray:
        inside = list(index)
        inside[axis] = slice(min(index[axis].start, has), min(index[axis].stop, has))
        part = leaf.read(tuple(inside))
        out = np.zeros(index_shape(index), part.dtype)
        out[tuple(slice(0, length) for length in part.shape)] = part
        return out

    return Leaf(LeafSpec(tuple(shape), leaf.spec.dtype), read)


def _copies(leaf: Leaf, count: int) -> Leaf:
    """Stacked along a first axis; read once however many are asked for."""

    def read(index: Index) -> np.ndarray:
        part = leaf.read(index[1:])
        return np.broadcast_to(part, (index[0].stop - index[0].start, *part.shape))

    return Leaf(LeafSpec((count, *leaf.spec.shape), leaf.spec.dtype), read)
