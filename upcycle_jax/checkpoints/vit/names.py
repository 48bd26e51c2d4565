"""Where the arrays of a vision transformer belong, and what they are called.

Four projects store them, under nearly the same names:

    vit_jax, AugReg   Transformer/encoderblock_0/{LayerNorm_0, MultiHeadDotProductAttention_1,
                      LayerNorm_2, MlpBlock_3}; positions in Transformer/posembed_input, those of
                      the class token first
    big_vision        Transformer/encoderblock_0/{LayerNorm_0, MultiHeadDotProductAttention_0,
                      LayerNorm_1, MlpBlock_0}, or all blocks in Transformer/encoderblock with a
                      leading axis of layers; positions of patches alone in pos_embedding
    V-MoE             Encoder/encoderblock_0/{LayerNorm_0, SelfAttention, LayerNorm_1, Mlp}, and
                      Moe/{Router, Mlp} in place of Mlp; positions in Encoder/posembed_input,
                      those of the class token first
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FIRST = "embedding/kernel"
"""An array that every vision transformer has."""

PREFIXES = ("params/img/", "opt/target/", "optimizer/target/", "params/", "")
"""What may stand before every name of the model, tried in this order."""

UNUSED = re.compile(
    r"(?:opt|optimizer|states?|extra|rngs|chrono)/.*|opt_state.*|step|params/(?:txt/.*|t|b)"
)
"""What training states and image-text models hold beside the image model."""

STEPS = ("step", "opt/state/step", "optimizer/state/step")
"""Where the number of a training step may stand."""

_OPTIMIZER_STATE = re.compile(r"(?:opt|optimizer)/(?!target/).*|opt_state.*")


def is_optimizer_state(name: str) -> bool:
    """Whether an array of a training state is of its optimizer, and no step."""
    return _OPTIMIZER_STATE.fullmatch(name) is not None and name not in STEPS


ARITHMETIC: Mapping[str, Any] = {"mlp_activations": ("gelu",), "norm_epsilon": 1e-6}
"""What all these projects compute, and no array shows."""

HEADS, JOINED = "heads", "joined"
"""How an attention array is joined: `[..., H, D]` over its last two axes, or a kernel `[H, D, d]`
over its first two.
"""

_TOP = {
    "embedding/kernel": "embedding/kernel",
    "embedding/bias": "embedding/bias",
    "cls": "cls",
    "pos_embedding": "pos_embedding",
    "head/kernel": "head/kernel",
    "head/bias": "head/bias",
    "MAPHead_0/probe": "map_head/probe",
}
_BLOCK = re.compile(r"(?:Transformer|Encoder)/encoderblock(?:_(\d{1,4}))?/(.+)")
_STACK = re.compile(r"(?:Transformer|Encoder)/(?:encoder_norm/(scale|bias)|posembed_input/(.+))")
_PARTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"LayerNorm_0/(scale|bias)"), r"pre_attention_layer_norm/\1"),
    (re.compile(r"LayerNorm_[12]/(scale|bias)"), r"pre_mlp_layer_norm/\1"),
    (
        re.compile(
            r"(?:MultiHeadDotProductAttention_[01]|SelfAttention)"
            r"/(query|key|value|out)/(kernel|bias)"
        ),
        r"attention/\1/\2",
    ),
    (re.compile(r"(?:MlpBlock_[03]|Mlp)/Dense_0/(kernel|bias)"), r"mlp/wi/\1"),
    (re.compile(r"(?:MlpBlock_[03]|Mlp)/Dense_1/(kernel|bias)"), r"mlp/wo/\1"),
    (re.compile(r"Moe/Mlp/Dense_0/(kernel|bias)"), r"mlp/expert/wi/\1"),
    (re.compile(r"Moe/Mlp/Dense_1/(kernel|bias)"), r"mlp/expert/wo/\1"),
    (re.compile(r"Moe/Router/dense/kernel"), r"mlp/router/router_weights/w/kernel"),
)
_MAP_PARTS = (
    (re.compile(r"LayerNorm_0/(scale|bias)"), r"layer_norm/\1"),
    *_PARTS[2:5],
)


class Place(NamedTuple):
    """Where an array belongs.

    Attributes:
      path: of the parameter; of arrays with a leading axis of layers, with '{layer}'.
      joined: how its axes are joined; None for not at all.
    """

    path: str
    joined: str | None = None


def prefix_of(arrays: Iterable[str]) -> str | None:
    """What stands before every name of the model; None where there is no vision transformer."""
    found = {array.removesuffix(FIRST) for array in arrays if array.endswith(FIRST)}
    return next((prefix for prefix in PREFIXES if prefix in found), None)


def place(name: str) -> Place | None:
    """Where an array belongs, of which `name` is without the prefix; None for nowhere.

    >>> place("Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel")
    Place(path='encoder/layers_3/mlp/wi/kernel', joined=None)
    """
    if name in _TOP:
        return Place(_TOP[name])
    if match := _STACK.fullmatch(name):
        if match[1]:
            return Place(f"encoder/encoder_norm/{match[1]}")
        return Place("pos_embedding") if match[2] == "pos_embedding" else None
    if name.startswith("MAPHead_0/"):
        return _part("map_head", name.removeprefix("MAPHead_0/"), _MAP_PARTS)
    if match := _BLOCK.fullmatch(name):
        number = match[1]
        layer = "{layer}" if number is None else str(int(number))
        return _part(f"encoder/layers_{layer}", match[2], _PARTS)
    return None


def _part(owner: str, name: str, parts: tuple[tuple[re.Pattern[str], str], ...]) -> Place | None:
    for pattern, ours in parts:
        if match := pattern.fullmatch(name):
            path = f"{owner}/{match.expand(ours)}"
            if "/attention/" not in path:
                return Place(path)
            if path.endswith("out/bias"):
                return Place(path)
            return Place(path, JOINED if path.endswith("out/kernel") else HEADS)
    return None
