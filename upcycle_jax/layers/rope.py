"""Rotary position embeddings, and the ways in which models stretch them to longer contexts.

Axis legend: B rows, L positions, H heads, D size of a head, R = rotated part of D
(`Rope.fraction`).
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import checks
from upcycle_jax.checks import Range

Positive = Annotated[float, Range(above=0)]


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary position embedding (Su et al., arXiv 2104.09864), in the rotate-half form: pair i of
    a head is its entries i and i + R/2, and turns by position * frequency i.

    Attributes:
      theta: base of the frequencies, theta^(-2i/R).
      kind: 'default'; 'linear': all frequencies divided by `factor`; 'llama3': the slow ones alone,
        with a ramp between (Llama 3.1); 'yarn': ramp over the index (Peng et al., arXiv
        2309.00071); 'longrope': each divided by a factor of its own (Ding et al., arXiv
        2402.13753).
      fraction: R / D, the part of a head that is rotated: its first entries.
      factor: how much longer the context is than the one before stretching.
      original_length: positions before stretching; 'llama3', 'yarn' and 'longrope' need it.
      low_freq_factor: 'llama3': wavelengths above original_length / this are divided by `factor`.
      high_freq_factor: 'llama3': wavelengths below original_length / this are left alone.
      beta_fast: 'yarn': frequencies that turn at least so often over `original_length` are kept.
      beta_slow: 'yarn': those that turn at most so often are divided by `factor`.
      truncate: 'yarn': bounds of the ramp are rounded outwards to whole indices.
      attention_factor: sines and cosines are multiplied by it; None: what the kind says (yarn:
        0.1 ln(factor) + 1; longrope: sqrt(1 + ln(factor) / ln(original_length)); else 1).
      short_factors: 'longrope': R/2 divisors for sequences up to `original_length`.
      long_factors: 'longrope': R/2 divisors for longer ones.

    Raises:
      ValueError: a number out of range, or one that the kind needs is missing.
    """

    theta: Positive = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    factor: Positive = 1.0
    original_length: checks.Count | None = None
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    attention_factor: Positive | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        checks.check_fields(self)
        if self.kind in ("llama3", "yarn", "longrope") and self.original_length is None:
            raise ValueError(f"a rope of kind {self.kind!r} needs original_length")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "low_freq_factor of a 'llama3' rope must be below high_freq_factor, got"
                f" {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.kind == "longrope" and not (self.short_factors and self.long_factors):
            raise ValueError("a rope of kind 'longrope' needs short_factors and long_factors")

    def rotated(self, head_dim: int) -> int:
        """R, entries of a head that are rotated."""
        return int(head_dim * self.fraction)

    def frequencies(self, head_dim: int, length: int) -> np.ndarray:
        """Float64 `[R/2]`, radians per position.

        Args:
          head_dim: D.
          length: positions of a sequence; 'longrope' asks whether it is above `original_length`.
        """
        rotated = self.rotated(head_dim)
        inverse = self.theta ** (-np.arange(0, rotated, 2) / rotated)
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        if self.kind == "yarn":
            return self._yarn(inverse)
        if self.kind == "longrope":
            assert self.original_length is not None
            factors = self.long_factors if length > self.original_length else self.short_factors
            if len(factors) != rotated // 2:
                raise ValueError(
                    f"a 'longrope' for heads of {head_dim} needs {rotated // 2} factors, got"
                    f" {len(factors)}"
                )
            return inverse / np.asarray(factors)
        return inverse

    def _llama3(self, inverse: np.ndarray) -> np.ndarray:
        assert self.original_length is not None
        turns = self.original_length * inverse / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - kept) * inverse / self.factor + kept * inverse

    def _yarn(self, inverse: np.ndarray) -> np.ndarray:
        assert self.original_length is not None
        count = len(inverse)

        def index_of(turns: float) -> float:
            """The index of the frequency that turns so often over `original_length`."""
            wavelength = self.original_length / (2 * math.pi * turns)  # type: ignore[operator]
            return count * math.log(wavelength) / math.log(self.theta)

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)
        high += 0.001 * (low == high)
        kept = 1 - np.clip((np.arange(count) - low) / (high - low), 0, 1)
        return inverse / self.factor * (1 - kept) + inverse * kept

    @property
    def amplitude(self) -> float:
        """What sines and cosines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn" and self.factor > 1:
            return 0.1 * math.log(self.factor) + 1
        if self.kind == "longrope" and self.factor > 1:
            assert self.original_length is not None
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return 1.0

    def angles(self, positions: jax.Array, head_dim: int, length: int) -> jax.Array:
        """Float32 `[..., R/2]`, by how much each pair turns at int positions `[...]`."""
        frequencies = jnp.asarray(self.frequencies(head_dim, length), jnp.float32)
        return positions[..., None].astype(jnp.float32) * frequencies


def rotate(x: jax.Array, angles: jax.Array, amplitude: float = 1.0) -> jax.Array:
    """Turns the first R entries of every head, in float32; the others stay.

    Args:
      x: `[B, L, H, D]`.
      angles: float32 `[B or 1, L, R/2]`, see `Rope.angles`.
      amplitude: see `Rope.amplitude`.
    """
    half = angles.shape[-1]
    cos, sin = (amplitude * f(angles)[:, :, None, :] for f in (jnp.cos, jnp.sin))  # [B, L, 1, R/2]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def as_plain(rope: Rope | None) -> dict[str, Any] | None:
    """What differs from the defaults, as JSON has it; None for no rope."""
    if rope is None:
        return None
    out: dict[str, Any] = {}
    for field in dataclasses.fields(rope):
        value = getattr(rope, field.name)
        if value != field.default:
            out[field.name] = list(value) if isinstance(value, tuple) else value
    return out
