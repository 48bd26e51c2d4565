"""Typed access to the keys of a config.json, which is not trusted."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface.files import CONFIG, shown

DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
"""What `dtype` and `torch_dtype` may say."""

ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_python_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu_accurate": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names of activations -> those of `layers.mlp.ACTIVATIONS`."""

_MAX_SIZE = 1 << 31
_KINDS = {
    int: "an integer",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def quoted(value: object) -> str:
    """A value out of a file, for messages; texts in quotes."""
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


class Keys:
    """The keys of one config.json, or of an object in it.

    Args:
      folder: for messages.
      keys: the content.
      inside: the key of the object whose keys these are, for messages; '' for the whole file.

    Attributes:
      asked: names of the keys that were asked for.
    """

    def __init__(self, folder: Path, keys: Mapping[str, Any], inside: str = ""):
        self._folder, self._keys = folder, keys
        self._where = f"{folder / CONFIG}: {f'{inside}.' if inside else ''}"
        self.asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def value(self, key: str) -> Any:
        """Whatever stands there; None where nothing does."""
        self.asked.add(key)
        return self._keys.get(key)

    def refused(self, key: str, why: str) -> ValueError:
        """The error that names file, key and value."""
        return ValueError(f"{self._where}{shown(key)} is {quoted(self._keys.get(key))}: {why}")

    def lacks(self, key: str, why: str) -> ValueError:
        """The error for a key that has to be there."""
        return ValueError(f"{self._where}{key} is missing: {why}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        """The value of a key; the default where it is absent or null."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise self.refused(key, f"{_KINDS[kind]} belongs there. Copy the file again")
        return value

    def size(self, key: str) -> int | None:
        """A positive integer; None where the key is absent or null."""
        value = self.get(key, int, None)
        if value is not None and not 1 <= value < _MAX_SIZE:
            raise self.refused(key, "a positive size belongs there. Copy the file again")
        return value

    def needed(self, key: str) -> int:
        """A positive integer that has to be there."""
        value = self.size(key)
        if value is None:
            raise self.lacks(key, "it cannot be seen in the tensors. Copy the file again")
        return value

    def check_heads(self, width: int, heads: int) -> None:
        """Raises a ValueError where heads do not divide the width."""
        if width % heads:
            raise self.refused(
                "num_attention_heads", f"hidden_size {width} does not divide into so many"
            )

    def activation(self, key: str, name: str, known: Mapping[str, str] = ACTIVATIONS) -> str:
        """Our name of an activation that is stated under `key`; `known` are theirs -> ours."""
        if name not in known:
            raise self.refused(
                key, f"this activation is not supported; known are {', '.join(sorted(known))}"
            )
        return known[name]

    def number(self, key: str, default: float | None, *, below: float = float("inf")) -> Any:
        """A positive number below a bound; the default where the key is absent, None where it is
        null.
        """
        value = self.value(key)
        if key not in self:
            return default
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < below:
            bound = f"between 0 and {below:g}" if below < float("inf") else "above 0"
            raise self.refused(key, f"a number {bound} belongs there")
        return float(value)

    def given(self, key: str, default: float) -> float:
        """A positive number; the default where the key is absent or null."""
        value = self.number(key, default)
        return default if value is None else float(value)

    def check_plain(self) -> None:
        """Checks what no family computes.

        Raises:
          ValueError: the weights are quantised or pruned, or of an unknown dtype.
        """
        if self.get("quantization_config", dict, {}):
            raise self.refused(
                "quantization_config",
                "quantised weights are not supported, save the model in float16 or wider",
            )
        if self.get("pruned_heads", dict, {}):
            raise self.refused("pruned_heads", "pruned models have no counterpart here")
        for key in ("torch_dtype", "dtype"):
            if self.get(key, str, "float32").removeprefix("torch.") not in DTYPES:
                raise self.refused(key, f"known are {', '.join(DTYPES)}")

    def refuse_unknown(self, model_type: str, harmless: Set[str]) -> None:
        """Refuses keys that nobody asked for, unless they say that something is off.

        Args:
          model_type: for messages.
          harmless: keys that change nothing.

        Raises:
          ValueError: there is one.
        """
        for key in sorted(self._keys.keys() - self.asked - harmless):
            if self._keys[key] in (None, False, 0, "", [], {}):
                continue
            raise self.refused(
                key,
                f"models of type {model_type!r} have no such key here, and it may change what they"
                f" compute. Remove it from config.json where it does not",
            )
