"""What config.json says of the function that a decoder-only model computes, in the dialects of
transformers 4 and 5: every key that changes it is read, and what cannot be computed here, or is not
known, is refused.

What differs between types of models is data: `kinds.KINDS`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface.decoder.kinds import HARMLESS, KINDS, MoeKind
from upcycle_jax.checkpoints.huggingface.decoder.rope_json import FULL, SLIDING, read_ropes
from upcycle_jax.checkpoints.huggingface.keys import ACTIVATIONS, Keys
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig, LayerType
from upcycle_jax.moe.routing import DroplessTopK

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
"""Keys that every config.json has."""

_LAYER_TYPES: Mapping[str, LayerType] = {FULL: "full", SLIDING: "sliding"}


def read_config(folder: Path, keys: Mapping[str, Any]) -> DecoderConfig:
    """The model that config.json states, with the load-balancing loss of transformers; dropout and
    dtype are the defaults.

    Args:
      folder: for messages.
      keys: content of config.json, whose `model_type` is one of `KINDS`.

    Raises:
      ValueError: it is damaged, contradicts itself, or describes what cannot be computed here; the
        message names file, key, value and remedy.
    """
    return _DecoderKeys(folder, keys).config()


class _DecoderKeys(Keys):
    """What the keys of a decoder's config.json state."""

    def __init__(self, folder: Path, keys: Mapping[str, Any]):
        super().__init__(folder, keys)
        self._type: str = keys["model_type"]
        self._kind = KINDS[self._type]

    def config(self) -> DecoderConfig:
        self.check_plain()
        self._refuse_what_is_no_decoder()
        kind, sizes = self._kind, self._sizes()
        heads, layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
        head_dim = self._head_dim(sizes)
        without_rope = self._without_rope(layers)
        window, layer_types = self._windows(layers, without_rope)
        ropes = read_ropes(self._folder, self, kind, head_dim)
        bias = self._bias(kind.bias_key, kind.bias)
        settings: dict[str, Any] = {
            "vocab_size": sizes["vocab_size"],
            "emb_dim": sizes["hidden_size"],
            "num_layers": layers,
            "num_heads": heads,
            "head_dim": head_dim,
            "mlp_dim": sizes["intermediate_size"],
            "num_kv_heads": self._kv_heads(heads),
            "mlp_activations": self._activations(),
            "norm": kind.norm,
            "norm_place": kind.norm_place,
            "norm_epsilon": self._epsilon(),
            "qk_norm": kind.qk_norm,
            "qkv_bias": bias,
            "attention_out_bias": bias and kind.out_bias,
            "mlp_bias": self._bias(kind.mlp_bias_key, kind.mlp_bias),
            "clip_qkv": self.number("clip_qkv", None) if kind.clips else None,
            "rope": ropes[FULL],
            "sliding_rope": ropes[SLIDING] if ropes[SLIDING] != ropes[FULL] else None,
            "no_rope_layers": without_rope,
            "layer_types": layer_types,
            "sliding_window": window,
            "logits_via_embedding": self.get("tie_word_embeddings", bool, kind.tied),
            "parallel_residual": kind.parallel and self.get("use_parallel_residual", bool, True),
            **self._scales(sizes["hidden_size"], head_dim),
            "moe": self._moe(kind.moe, sizes) if kind.moe is not None else None,
        }
        self._refuse_unknown()
        try:
            return DecoderConfig(**settings)
        except ValueError as error:
            raise ValueError(f"{self._folder}: its config.json is no decoder's: {error}") from None

    # What every type has.

    def _sizes(self) -> dict[str, int]:
        return {key: self.needed(key) for key in SIZES}

    def _head_dim(self, sizes: Mapping[str, int]) -> int:
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        stated = self.size("head_dim")
        if not self._kind.own_head_dim:
            if stated is not None and stated * heads != width:
                raise self.refused("head_dim", f"this type of model has {width} / {heads}")
            stated = None
        head_dim = stated or self._kind.head_dim
        if head_dim is None:
            self.check_heads(width, heads)
            head_dim = width // heads
        if head_dim % 2:
            raise self.refused("head_dim", f"heads of {head_dim} do not rotate by pairs")
        return head_dim

    def _kv_heads(self, heads: int) -> int:
        """KV, as many as query heads where nothing else is said."""
        stated = self.size("num_key_value_heads")
        if not self._kind.own_head_dim and stated not in (None, heads):
            raise self.refused(
                "num_key_value_heads", f"this type of model has as many as heads, {heads}"
            )
        if "num_key_value_heads" not in self:
            stated = self._kind.kv_heads
        return stated or heads

    def _activations(self) -> tuple[str, ...]:
        kind, key = self._kind, self._kind.activation_key
        names = {name: self.get(name, str, None) for name in ("hidden_act", "hidden_activation")}
        given = names[key] or kind.activation
        if self._type == "gemma" and given == "gelu":
            given = kind.activation  # Gemma 1 was trained with tanh's gelu, whatever its files say.
        ours = self.activation(key, given)
        for other, name in names.items():
            if name is not None and other != key and ACTIVATIONS.get(name) != ours:
                raise self.refused(other, f"{key} means {given!r}. Correct one of them")
        return (ours, "linear") if kind.gated else (ours,)

    def _epsilon(self) -> float:
        kind = self._kind
        if kind.epsilon_key:
            value = self.number(kind.epsilon_key, kind.epsilon, below=1)
            if value is None:
                raise self.refused(kind.epsilon_key, "a number between 0 and 1 belongs there")
            return float(value)
        for key in ("layer_norm_eps", "rms_norm_eps"):
            if self.given(key, kind.epsilon) != kind.epsilon:
                raise self.refused(key, f"this type of model has {kind.epsilon}, always")
        return kind.epsilon

    def _bias(self, key: str, default: bool) -> bool:
        return self.get(key, bool, default) if key else default

    def _scales(self, width: int, head_dim: int) -> dict[str, Any]:
        """Factors, divisors and caps."""
        kind = self._kind
        out: dict[str, Any] = {}
        if kind.scaled_embedding:
            out["embedding_multiplier"] = width**0.5
        if kind.query_scalar is not None:
            out["attention_scale"] = self.given("query_pre_attn_scalar", kind.query_scalar) ** -0.5
        if kind.multipliers:
            out["attention_scale"] = self.given("attention_multiplier", 1.0)
            out["embedding_multiplier"] = self.given("embedding_multiplier", 1.0)
            out["residual_multiplier"] = self.given("residual_multiplier", 1.0)
            out["logits_divisor"] = self.given("logits_scaling", 1.0)
        if out.get("attention_scale") == head_dim**-0.5:
            del out["attention_scale"]
        if kind.softcaps is not None:
            attention, logits = kind.softcaps
            out["attention_softcap"] = self.number("attn_logit_softcapping", attention)
            out["logits_softcap"] = self.number("final_logit_softcapping", logits)
        return out

    # Layers.

    def _without_rope(self, layers: int) -> tuple[int, ...]:
        """Indices of the layers without one."""
        if not self._kind.no_rope:
            return ()
        given = self.get("no_rope_layers", list, None)
        every = self.size("no_rope_layer_interval") or 4
        if given is None:
            return tuple(i for i in range(layers) if (i + 1) % every == 0)
        if len(given) != layers or any(not isinstance(x, int) or x not in (0, 1) for x in given):
            raise self.refused("no_rope_layers", f"{layers} numbers, each 0 or 1, belong there")
        return tuple(i for i, has_rope in enumerate(given) if not has_rope)

    def _windows(
        self, layers: int, without_rope: tuple[int, ...]
    ) -> tuple[int | None, tuple[LayerType, ...]]:
        """`sliding_window` and `layer_types` of `DecoderConfig`."""
        kind = self._kind
        listed = self._listed_types(layers)
        used = self.get("use_sliding_window", bool, False)
        if kind.windows == "none":
            if "sliding" in listed:
                raise self.refused("layer_types", "this type of model has no windows")
            return None, ()
        window = self._window()
        if kind.windows.endswith("if used") and not used:
            window = None
        types = self._sliding(layers, listed, window, without_rope)
        if listed and types != listed:
            raise self.refused(
                "layer_types",
                f"that is not what sliding_window {window} and use_sliding_window"
                f" {str(used).lower()} say. Correct one of them",
            )
        if "sliding" not in types:
            return None, ()
        if window is None:
            raise self.refused("sliding_window", "some layers are of a sliding type, and need it")
        return window, types

    def _window(self) -> int | None:
        value = self.get("sliding_window", int, None)
        window = self._kind.window if "sliding_window" not in self else None
        if value:
            window = self.size("sliding_window")
        other = self.size("sliding_window_size")  # Gemma 2 was released with both.
        if other not in (None, window):
            raise self.refused("sliding_window_size", f"sliding_window says {window}. Correct one")
        return window

    def _sliding(
        self,
        layers: int,
        listed: tuple[LayerType, ...],
        window: int | None,
        without_rope: tuple[int, ...],
    ) -> tuple[LayerType, ...]:
        """The type of each layer."""
        kind = self._kind

        def chosen(which: Any) -> tuple[LayerType, ...]:
            return tuple("sliding" if which(i) else "full" for i in range(layers))

        if kind.windows == "pattern":
            every = self.size("sliding_window_pattern") or kind.period
            return listed or chosen(lambda i: (i + 1) % every)
        if window is None:
            return chosen(lambda i: False)
        if kind.windows in ("all", "all if used"):
            return chosen(lambda i: True)
        if listed:
            return listed
        if kind.windows == "late if used":
            first = self.get("max_window_layers", int, 28)
            return chosen(lambda i: i >= first)
        if kind.windows == "without rope if used":
            return chosen(lambda i: i in without_rope)
        raise self.refused(
            "use_sliding_window",
            "the versions of transformers differ in which layers that means. Add layer_types",
        )

    def _listed_types(self, layers: int) -> tuple[LayerType, ...]:
        """`layer_types` in our words; empty where they are not there."""
        given = self.get("layer_types", list, None)
        if given is None:
            return ()
        unknown = [x for x in given if not isinstance(x, str) or x not in _LAYER_TYPES]
        if len(given) != layers or unknown:
            raise self.refused(
                "layer_types", f"{layers} times {FULL!r} or {SLIDING!r} belongs there"
            )
        return tuple(_LAYER_TYPES[name] for name in given)

    # MoE layers.

    def _moe(self, kind: MoeKind, sizes: Mapping[str, int]) -> DecoderMoeConfig | None:
        """The MoE layers; None where all layers are dense."""
        layers = sizes["num_hidden_layers"]
        sparse = self._sparse_layers(layers) if kind.steps else tuple(range(layers))
        experts = self._experts()
        chosen = self.size("num_experts_per_tok")
        if chosen is None:
            raise self.lacks("num_experts_per_tok", "it cannot be seen in the tensors")
        width = self.size(kind.width)
        if width is None:
            raise self.lacks(kind.width, "it is the hidden size of the experts")
        always = kind.renormalize or kind.after_top_k
        renormalize = True if always else self.get("norm_topk_prob", bool, False)
        shared = self.get(kind.shared, int, 0) if kind.shared else 0
        if shared:
            shared = self.size(kind.shared) or 0
        if not sparse:
            return None
        try:
            return DecoderMoeConfig(
                num_experts=experts,
                router=DroplessTopK(
                    num_selected_experts=chosen,
                    renormalize=renormalize and not kind.after_top_k,
                    softmax_order="after_top_k" if kind.after_top_k else "before_top_k",
                ),
                expert_mlp_dim=width if width != sizes["intermediate_size"] else None,
                shared_expert_mlp_dim=shared or None,
                shared_expert_gate=kind.shared_gate and bool(shared),
                aux_loss_factor=self._aux_loss(kind),
                aux_loss="joint",  # The form of transformers.
                sparse_layout=sparse if len(sparse) < layers else "MIXED",
            )
        except ValueError as error:
            raise ValueError(
                f"{self._folder}: the MoE layers of its config.json cannot be computed: {error}"
            ) from None

    def _experts(self) -> int:
        found = {key: self.size(key) for key in ("num_experts", "num_local_experts")}
        values = {value for value in found.values() if value is not None}
        if len(values) > 1:
            raise self.refused(
                "num_experts", f"num_local_experts says {found['num_local_experts']}. Correct one"
            )
        if not values:
            raise self.lacks("num_experts", "it is the number of experts")
        return values.pop()

    def _aux_loss(self, kind: MoeKind) -> float:
        """Weight of the load-balancing loss."""
        key = "router_aux_loss_coef"
        return 0.0 if self.value(key) == 0 else self.given(key, kind.aux_loss)

    def _sparse_layers(self, layers: int) -> tuple[int, ...]:
        """Indices of the MoE layers."""
        step = self.size("decoder_sparse_step") or 1
        dense = self.get("mlp_only_layers", list, [])
        if any(not isinstance(x, int) or isinstance(x, bool) for x in dense):
            raise self.refused("mlp_only_layers", "indices of layers belong there")
        return tuple(i for i in range(layers) if (i + 1) % step == 0 and i not in dense)

    # What is refused.

    def _refuse_what_is_no_decoder(self) -> None:
        for key, why in {
            "is_encoder_decoder": "it has an encoder",
            "add_cross_attention": "its layers attend to an encoder",
            "tie_encoder_decoder": "it has an encoder",
            "use_bidirectional_attention": "a position sees those after it",
            "rope_interleaved": "it rotates neighbouring entries, no model that is read does",
        }.items():
            if self.get(key, bool, False):
                raise self.refused(key, f"{why}. A decoder-only language model can be read")
        if self.get("is_causal", bool, True) is False:
            raise self.refused("is_causal", "a position sees those after it")
        if self.get("position_embedding_type", str, "rope") != "rope":
            raise self.refused("position_embedding_type", "positions are rotary here")

    def _refuse_unknown(self) -> None:
        """Refuses keys that nobody asked for, unless they say that something is off."""
        for key in (
            *("max_position_embeddings", "original_max_position_embeddings", "layer_types"),
            "router_aux_loss_coef",
        ):
            self.value(key)
        self.refuse_unknown(self._type, HARMLESS)
