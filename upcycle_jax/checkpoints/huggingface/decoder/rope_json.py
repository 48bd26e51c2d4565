"""The rotary position embeddings that a config.json states, in both dialects.

transformers 4 has `rope_theta`, `rope_scaling`, and for Gemma 3 `rope_local_base_freq`; 5 has
`rope_parameters`, of some types one for each type of layer. A file may have both; where these say
different things, readers of one version compute something else than those of the other, and the
file is refused.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface.decoder.kinds import Kind
from upcycle_jax.checkpoints.huggingface.keys import Keys
from upcycle_jax.layers.rope import Rope, as_plain

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names of `models.decoder.config.LayerType`."""

_NAMED = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_READ = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast"),
        *("beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("short_factor", "long_factor"),
    ),
}
"""Kinds of ropes -> the keys of each, besides `_NAMED`."""

_NOT_READ = {
    "dynamic": "its frequencies change with the length of each text",
    "mrope": "it places images and videos",
    "proportional": "no model that is read has it",
}


class _Ropes:
    """Reads the ropes of one config.json.

    Args:
      folder: for messages.
      keys: the whole file's.
      kind: of the model.
      head_dim: D.
    """

    def __init__(self, folder: Path, keys: Keys, kind: Kind, head_dim: int):
        self._folder, self._keys, self._kind = folder, keys, kind
        self._head_dim = head_dim
        self._local_theta = kind.local_theta if kind.local_theta is not None else kind.theta
        neox = not kind.own_head_dim
        self._theta_key = "rotary_emb_base" if neox and "rotary_emb_base" in keys else "rope_theta"
        self._fraction_key = "rotary_pct" if neox else "partial_rotary_factor"

    def stated(self) -> dict[str, Rope]:
        """The rope of each type of layer."""
        keys = self._keys
        new = keys.get("rope_parameters", dict, {})
        scaling = keys.get("rope_scaling", dict, {})
        local = "rope_local_base_freq"
        old_there = bool(scaling) or keys.value(self._theta_key) is not None
        old_there = old_there or (
            self._kind.local_theta is not None and keys.value(local) is not None
        )
        old = self._old(scaling) if old_there or not new else {}
        if not new:
            return old
        both = self._new(new)
        for name, rope in old.items():
            if both[name] != rope:
                raise keys.refused(
                    "rope_parameters",
                    f"that is {_shown(both[name])} in {name} layers, but {self._theta_key} and"
                    f" rope_scaling say {_shown(rope)}: transformers 5 and 4 would compute"
                    " different models. Write the same into both, or remove one of them",
                )
        return both

    def _old(self, scaling: Mapping[str, Any]) -> dict[str, Rope]:
        """As transformers 4 reads it."""
        keys, kind = self._keys, self._kind
        theta = keys.number(self._theta_key, kind.theta)
        full = self._rope(scaling, "rope_scaling", theta)
        if not kind.layered_rope:
            return dict.fromkeys((FULL, SLIDING), full)
        local = theta
        if kind.local_theta is not None:
            local = keys.given("rope_local_base_freq", kind.local_theta)
        return {FULL: full, SLIDING: self._rope({}, "rope_scaling", local)}

    def _new(self, found: Mapping[str, Any]) -> dict[str, Rope]:
        """As transformers 5 reads it."""
        keys, kind = self._keys, self._kind
        theta = keys.number(self._theta_key, kind.theta)
        layered = [name for name in (FULL, SLIDING) if name in found]
        if not kind.layered_rope:
            if layered:
                raise keys.refused(
                    "rope_parameters", "this type of model has one rope for all layers"
                )
            rope = self._rope(found, "rope_parameters", theta)
            return dict.fromkeys((FULL, SLIDING), rope)
        if found.keys() - {FULL, SLIDING}:
            raise keys.refused(
                "rope_parameters", f"objects {FULL} and {SLIDING} alone belong there"
            )
        parts = Keys(self._folder, found, "rope_parameters")
        defaults = {FULL: theta, SLIDING: theta if kind.local_theta is None else self._local_theta}
        return {
            name: self._rope(parts.get(name, dict, {}), f"rope_parameters.{name}", default)
            for name, default in defaults.items()
        }

    def _rope(self, found: Mapping[str, Any], inside: str, theta: float | None) -> Rope:
        """One rope.

        Args:
          found: the object that states it.
          inside: its key.
          theta: its base, where the object states none.
        """
        part = Keys(self._folder, found, inside)
        name = self._name(part, found)
        unread = [key for key in found if key not in (*_NAMED, *_READ[name])]
        for key in unread:
            if found[key] not in (None, False, 1, 1.0, [], {}):
                raise part.refused(key, f"a rope of type {name!r} has no such key. Remove it")
        theta = part.number("rope_theta", theta)
        if theta is None:
            raise self._keys.lacks(
                f"{inside}.rope_theta",
                "the versions of transformers differ in what they take instead. Add it, or"
                f" {self._theta_key}",
            )
        settings: dict[str, Any] = {"theta": theta, "kind": name, "fraction": self._fraction(part)}
        if name in ("linear", "llama3", "yarn"):
            settings["factor"] = self._needed(part, "factor")
        if name in ("llama3", "yarn", "longrope"):
            settings["original_length"] = self._original(part)
        if name == "llama3":
            settings["low_freq_factor"] = self._needed(part, "low_freq_factor")
            settings["high_freq_factor"] = self._needed(part, "high_freq_factor")
        if name == "yarn":
            settings |= self._yarn(part, settings["factor"])
        if name == "longrope":
            settings |= self._longrope(part, settings["original_length"], settings["fraction"])
        try:
            return Rope(**settings)
        except ValueError as error:
            raise ValueError(f"{self._folder}: {inside} in config.json: {error}") from None

    def _name(self, part: Keys, found: Mapping[str, Any]) -> str:
        """The kind of the rope."""
        first, second = part.get("rope_type", str, None), part.get("type", str, None)
        name: str = first or second or "default"
        phi3 = self._kind.fraction == 1.0
        if name == "su" or (phi3 and name == "yarn" and "long_factor" in found):
            name = "longrope"  # earlier names of it
        if name not in _READ:
            key = "rope_type" if first else "type"
            known = f"known are {', '.join(_READ)}"
            raise part.refused(key, f"{_NOT_READ[name]}; {known}" if name in _NOT_READ else known)
        if first and second and first != second and name != "longrope":
            raise part.refused("type", f"rope_type says {first!r}. Correct one of them")
        return name

    def _needed(self, part: Keys, key: str) -> float:
        value: float | None = part.number(key, None)
        if value is None:
            raise part.lacks(key, "this type of rope needs it. Copy the file again")
        return value

    def _fraction(self, part: Keys) -> float:
        default = self._kind.fraction
        whole = self._keys.given(self._fraction_key, 1.0 if default is None else default)
        key = "partial_rotary_factor"
        fraction = part.given(key, whole)
        if default is None and fraction != 1.0:
            raise ValueError(
                f"{self._folder}: {key} in config.json is {fraction}: this type of model rotates"
                " whole heads"
            )
        rotated = int(self._head_dim * fraction)
        if fraction > 1 or rotated % 2 or not rotated:
            raise ValueError(
                f"{self._folder}: the {key} of its config.json is {fraction}: of heads of"
                f" {self._head_dim} an even number of entries is rotated, and no more than these"
            )
        return fraction

    def _original(self, part: Keys) -> int:
        key = "original_max_position_embeddings"
        inner, outer = part.size(key), self._keys.size(key)
        if inner is not None and outer is not None and inner != outer:
            raise part.refused(key, f"{key} outside says {outer}. Correct one of them")
        if inner is None and outer is None and self._kind.fraction == 1.0:
            outer = 4096  # Phi-3's default
        length = inner or outer or self._keys.size("max_position_embeddings")
        if length is None:
            raise part.lacks(key, "this type of rope needs it. Copy the file again")
        return length

    def _yarn(self, part: Keys, factor: float) -> dict[str, Any]:
        amplitude = part.number("attention_factor", None)
        scales = [part.number(key, None) for key in ("mscale", "mscale_all_dim")]
        if amplitude is None and all(scales):
            one, other = (0.1 * s * math.log(factor) + 1 if factor > 1 else 1.0 for s in scales)
            amplitude = one / other
        return {
            "attention_factor": amplitude,
            "beta_fast": part.given("beta_fast", 32.0),
            "beta_slow": part.given("beta_slow", 1.0),
            "truncate": part.get("truncate", bool, True),
        }

    def _longrope(self, part: Keys, original: int, fraction: float) -> dict[str, Any]:
        longest = self._keys.size("max_position_embeddings")
        stated, outer = part.number("factor", None), "original_max_position_embeddings"
        if longest is None and stated is None:
            raise self._keys.lacks("max_position_embeddings", "longrope needs it")
        ratio = stated if longest is None else longest / original
        amplitude = part.number("attention_factor", None)  # The factor is for this alone.
        differs = stated is not None and outer in self._keys and stated != ratio
        if differs and amplitude is None:
            raise part.refused(
                "factor",
                f"max_position_embeddings / {outer} is {ratio:g}; transformers 4 takes that, 5"
                " takes factor. Correct one of them",
            )
        factor = ratio if stated is None else stated
        out: dict[str, Any] = {"factor": factor, "attention_factor": amplitude}
        pairs = int(self._head_dim * fraction) // 2
        for key, name in (("short_factor", "short_factors"), ("long_factor", "long_factors")):
            values = part.get(key, list, [])
            plain = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
            if len(values) != pairs or not plain or not all(0 < x < math.inf for x in values):
                raise part.refused(key, f"{pairs} positive numbers belong there")
            out[name] = tuple(float(x) for x in values)
        return out


def read_ropes(folder: Path, keys: Keys, kind: Kind, head_dim: int) -> dict[str, Rope]:
    """The rope of each type of layer, 'full_attention' and 'sliding_attention'.

    Args:
      folder: for messages.
      keys: of config.json.
      kind: of the model.
      head_dim: D.

    Raises:
      ValueError: it is damaged, unknown, or the two dialects contradict each other.
    """
    return _Ropes(folder, keys, kind, head_dim).stated()


def _shown(rope: Rope) -> str:
    plain = as_plain(rope) or {}
    text = ", ".join(f"{name} {value}" for name, value in plain.items() if name != "kind")
    return f"a {rope.kind!r} rope" + (f" with {text}" if text else "")
