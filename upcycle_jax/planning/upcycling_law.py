"""The scaling law of upcycling (Liew et al., arXiv 2502.03009), fitted to losses of one's own runs.

    dense, or MoE from scratch   L = A D^-a + c
    upcycled                     L = A D1^-a1 D2^(-a2 + a3 ln D1) + c

D are tokens, D1 those of the dense parent, D2 those after upcycling; c = B N^-b + E is one number
for models of one size N. With parents of one D1 only the exponent of D2 and a factor can be told:
the law then holds for that parent alone. Fits are least squares on ln L with Huber's loss; what
they are worth is said by refitting resampled runs.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize

HUBER = 1e-3
"""Residuals of ln L from which on they count linearly (Hoffmann et al., arXiv 2203.15556)."""
SAME_PARENT = 0.02
"""Parents whose ln D1 differ by less are of one length."""
BEYOND = 100.0
"""How far beyond the longest run crossings are looked for, as a factor on its tokens."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Losses of one run.

    Attributes:
      parent: D1, tokens that its dense parent saw; 0 for runs that were not upcycled.
      tokens: float64 `[n]`, ascending: D of a run that was not upcycled, its parent's included; D2
        of one that was.
      losses: float64 `[n]`.
    """

    parent: float
    tokens: np.ndarray
    losses: np.ndarray


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """L = A D^-a + c.

    Attributes:
      factor: A.
      exponent: a.
      floor: c.
    """

    factor: float
    exponent: float
    floor: float

    def loss(self, tokens: np.ndarray) -> np.ndarray:
        """At D tokens."""
        return self.factor * tokens**-self.exponent + self.floor


@dataclasses.dataclass(frozen=True)
class UpcyclingLaw:
    """L = A D1^-a1 D2^(-a2 + a3 ln D1) + c.

    Attributes:
      factor: A.
      parent_exponent: a1.
      exponent: a2.
      interplay: a3.
      floor: c.
    """

    factor: float
    parent_exponent: float
    exponent: float
    interplay: float
    floor: float

    def slope(self, parent: float) -> float:
        """The exponent of D2: below 0 where training after upcycling lowers the loss."""
        return -self.exponent + self.interplay * float(np.log(parent))

    def loss(self, parent: float, tokens: np.ndarray) -> np.ndarray:
        """At D1 = `parent` and D2 = `tokens`."""
        factor = self.factor * parent**-self.parent_exponent
        return factor * tokens ** self.slope(parent) + self.floor


def published(parameters: float) -> tuple[PowerLaw, UpcyclingLaw, PowerLaw]:
    """Dense, upcycled and from scratch by the constants of arXiv 2502.03009 (table 2: 8 experts,
    top-2), for a dense model of `parameters` parameters.
    """
    irreducible = 0.165
    return (
        PowerLaw(8.83, 0.088, 12.3 * parameters**-0.116 + irreducible),
        UpcyclingLaw(16.3, 0.043, 0.085, 7.98e-4, 8.53 * parameters**-0.112 + irreducible),
        PowerLaw(32.0, 0.161, 7.05 * parameters**-0.080 + irreducible),
    )


def fit_power(curves: Sequence[Curve], near: PowerLaw | None = None) -> PowerLaw:
    """The dense law, or that of MoE from scratch, of runs of one model; `near` is a fit to other
    draws of the same runs, from which the search begins.

    Raises:
      ValueError: fewer than four losses.
    """
    tokens, losses = (
        np.concatenate([getattr(curve, name) for curve in curves]) for name in ("tokens", "losses")
    )
    y = np.log(tokens)
    middle = float(np.mean(y))
    k, q, floor = _fit(lambda p: p[0] + p[1] * (y - middle), losses, 2, near)
    return PowerLaw(float(np.exp(k - q * middle)), float(-q), floor)


def fit_upcycling(curves: Sequence[Curve], near: UpcyclingLaw | None = None) -> UpcyclingLaw:
    """The law of upcycled runs of one model, with parents of one or several D1; of one, a1 and a3
    are 0 and A holds for it alone. `near` as in `fit_power`.

    Raises:
      ValueError: fewer than four losses.
    """
    losses = np.concatenate([curve.losses for curve in curves])
    y = np.log(np.concatenate([curve.tokens for curve in curves]))
    x = np.concatenate([np.full(curve.tokens.size, np.log(curve.parent)) for curve in curves])
    x0, y0 = float(np.mean(x)), float(np.mean(y))
    u, v = x - x0, y - y0
    if np.ptp(x) < SAME_PARENT:
        k, q, floor = _fit(lambda p: p[0] + p[1] * v, losses, 2, near)
        return UpcyclingLaw(float(np.exp(k - q * y0)), 0.0, float(-q), 0.0, floor)
    # ln(L - c) is bilinear in ln D1 and ln D2; about their means the four numbers hardly correlate.
    k, p, q, a3, floor = _fit(lambda w: w[0] + w[1] * u + w[2] * v + w[3] * u * v, losses, 4, near)
    a1, a2 = a3 * y0 - p, a3 * x0 - q
    factor = np.exp(k + a1 * x0 + a2 * y0 - a3 * x0 * y0)
    return UpcyclingLaw(float(factor), float(a1), float(a2), float(a3), floor)


def _fit(
    log_excess: Callable[[np.ndarray], np.ndarray],
    losses: np.ndarray,
    size: int,
    near: PowerLaw | UpcyclingLaw | None,
) -> tuple[float, ...]:
    """The `size` parameters of ln(L - c), and c, by least squares on ln L from several starts, or
    from the floor of `near` alone.
    """
    if losses.size < 4:
        raise ValueError(f"a law cannot be fitted to {losses.size} losses: at least 4 are needed")
    target, lowest = np.log(losses), float(np.min(losses))
    widest = np.array([50.0, *[3.0] * (size - 1), 12.0])  # of k, exponents, and the logit of c

    def residuals(params: np.ndarray) -> np.ndarray:
        floor = lowest / (1.0 + np.exp(-params[-1]))  # Between 0 and the lowest loss.
        excess = np.exp(np.clip(log_excess(params[:-1]), -50.0, 50.0))
        return np.log(excess + floor) - target

    best = None
    shares = (0.2, 0.7, 0.95) if near is None else (min(max(near.floor / lowest, 0.01), 0.99),)
    for share in shares:
        start = np.zeros(size + 1)
        start[0] = np.log(np.mean(losses) - share * lowest)
        start[2 if size == 4 else 1] = -0.2
        start[-1] = np.log(share / (1 - share))
        found = scipy.optimize.least_squares(
            residuals, start, bounds=(-widest, widest), loss="huber", f_scale=HUBER
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    floor = lowest / (1.0 + np.exp(-best.x[-1]))
    return (*map(float, best.x[:-1]), float(floor))


def ahead(
    first: Callable[[np.ndarray], np.ndarray],
    second: Callable[[np.ndarray], np.ndarray],
    *,
    start: float,
    end: float,
) -> tuple[float, float]:
    """Tokens from which on `first` has the lower loss, and until when, between `start` and `end`.

    Both are infinite where it never has; the second is infinite where it still has at `end`.
    """
    grid = np.geomspace(start, end, 2000)
    lower = first(grid) < second(grid)
    if not lower.any():
        return float("inf"), float("inf")

    def exact(i: int) -> float:
        """Where the two meet between points i and i + 1."""

        def gap(log_tokens: float) -> float:
            at = np.exp(np.array([log_tokens]))
            return float((first(at) - second(at))[0])

        return float(np.exp(scipy.optimize.brentq(gap, np.log(grid[i]), np.log(grid[i + 1]))))

    begin = int(np.argmax(lower))
    behind_again = np.flatnonzero(~lower[begin:])
    return (
        float(start) if begin == 0 else exact(begin - 1),
        exact(begin + int(behind_again[0]) - 1) if behind_again.size else float("inf"),
    )


def resampled(curves: Sequence[Curve], rng: np.random.Generator) -> list[Curve]:
    """As many runs, drawn with replacement from those with an equal parent, each with losses drawn
    with replacement from its own.
    """
    found = []
    for curve in curves:
        alike = [one for one in curves if one.parent == curve.parent]
        one = alike[int(rng.integers(len(alike)))]
        rows = np.sort(rng.integers(one.tokens.size, size=one.tokens.size))
        found.append(Curve(one.parent, one.tokens[rows], one.losses[rows]))
    return found


def residual(losses: np.ndarray, fitted: np.ndarray) -> float:
    """Root mean square of ln L minus its fit: 0.01 is one percent."""
    return float(np.sqrt(np.mean(np.square(np.log(losses) - np.log(fitted)))))
