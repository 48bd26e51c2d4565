"""Where upcycling pays, by one's own runs: they are read from their MODEL_DIRs, the scaling law of
`planning.upcycling_law` is fitted to them, and what it says of crossing points comes with intervals
of resampled runs, or with the reason why it does not apply.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax.planning import upcycling_law as law
from upcycle_jax.planning.upcycling_law import Curve
from upcycle_jax.studies.run_list import model_dirs
from upcycle_jax.studies.run_results import METRICS, Run

LOSS = "cross_ent_loss"
SETTLED = 0.25
"""Losses of a run's first quarter are left out: warm-up, and the drop that a conversion causes."""
OVER_TRAINED = 500.0
"""Tokens per parameter of the dense parent from which on it is heavily over-trained. The law's
table 7 has 74; of OLMoE's parent, with 2,000, MoE from scratch caught up after a quarter of its
budget instead of more than all of it (arXiv 2409.02060)."""
POOR_FIT = 0.02
"""Root mean square of ln L minus the fit."""
FLAT = -0.005
"""An exponent of D2 above this says that training after upcycling hardly lowers the loss."""
RESAMPLES = 200
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of one model, told apart by their manifests.

    Attributes:
      dense: from scratch, or continued.
      upcycled: from dense parents.
      scratch: MoE from scratch.
      parameters: of the dense model.
      tokens_per_step: target tokens of an update, of the upcycled runs.
    """

    dense: list[Curve]
    upcycled: list[Curve]
    scratch: list[Curve]
    parameters: int
    tokens_per_step: float


@dataclasses.dataclass(frozen=True)
class Crossing:
    """From how many tokens after upcycling on one curve is below another.

    Attributes:
      begin: by the law; infinite where it is not below anywhere that was looked at.
      low: lower end of the interval.
      high: upper end, infinite where more than the rest of the resampled runs has no crossing.
      until: where it is above again; infinite where that was not found.
      seen: whether `begin` lies within what the runs cover.
    """

    begin: float
    low: float
    high: float
    until: float
    seen: bool


@dataclasses.dataclass(frozen=True)
class Advice:
    """What the runs say for parents of one length.

    Attributes:
      parent: D1.
      longest: the most tokens that a run has after upcycling.
      reasons: why the law does not apply; empty where it does.
      passes_dense: upcycled below dense continuation.
      scratch_passes: MoE from scratch below upcycled; None without runs from scratch.
    """

    parent: float
    longest: float
    reasons: tuple[str, ...]
    passes_dense: Crossing | None
    scratch_passes: Crossing | None


def read(folder: str | Path) -> Runs:
    """The runs below a folder.

    Raises:
      FileNotFoundError: it is no folder.
      ValueError: it holds no dense or no upcycled run that has been evaluated after an update.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: --advise takes one with MODEL_DIRs in it")
    found: dict[str, list[tuple[Run, float]]] = {"dense": [], "upcycled": [], "scratch": []}
    for path in model_dirs(root):
        if not any((path / "training_eval").glob(f"*/{METRICS}")):
            continue
        run = Run.load(path.relative_to(root).as_posix(), path)
        tokens = _tokens_per_step(run)
        if run.is_evaluated and run.extra_steps > 0 and tokens > 0:
            found[_kind(run)].append((run, tokens))
    missing = [kind for kind in ("dense", "upcycled") if not found[kind]]
    if missing:
        raise ValueError(
            f"{root} holds no {' and no '.join(missing)} run that reports its tokens and was"
            " evaluated after updates: --advise needs dense and upcycled runs of one model"
        )
    # Updates hold slightly different numbers of tokens; parents of one length shall have one D1.
    before = float(np.median([tokens for _, tokens in found["dense"]]))
    curves = {
        kind: [
            one for run, tokens in runs if (one := _curve(run, kind, tokens, before)).tokens.size
        ]
        for kind, runs in found.items()
    }
    return Runs(
        **curves,
        parameters=int(found["dense"][0][0].manifest["parameters"]),
        tokens_per_step=float(np.median([tokens for _, tokens in found["upcycled"]])),
    )


def _kind(run: Run) -> str:
    if not (run.manifest.get("model") or {}).get("moe"):
        return "dense"
    return "upcycled" if run.start_step > 0 else "scratch"


def _tokens_per_step(run: Run) -> float:
    rates = [
        row["timing/target_tokens_per_second"] / row["timing/steps_per_second"]
        for row in run.training
        if row.get("timing/steps_per_second") and row.get("timing/target_tokens_per_second")
    ]
    return float(np.median(rates)) if rates else math.nan


def _curve(run: Run, kind: str, tokens: float, before: float) -> Curve:
    """The settled part of a run's mean loss over tasks; an update has `tokens`, one before the run
    began had `before`.
    """
    curve = run.curve(LOSS)
    extra = np.asarray(curve.steps, float) - run.start_step
    losses = np.asarray(curve.values, float)
    kept = (extra >= SETTLED * extra[-1]) & (extra > 0) & np.isfinite(losses) & (losses > 0)
    parent = run.start_step * before
    if kind == "upcycled":
        return Curve(parent, extra[kept] * tokens, losses[kept])
    return Curve(0.0, parent + extra[kept] * tokens, losses[kept])


def advise(runs: Runs, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Advice]:
    """One piece of advice for each D1 of the upcycled runs.

    Raises:
      ValueError: too few losses for a fit.
    """
    fitted = _Fits.of(runs.dense, runs.upcycled, runs.scratch)
    rng = np.random.default_rng(seed)
    parents = sorted({curve.parent for curve in runs.upcycled})
    others = []
    if not all(_reasons(parent, runs, fitted) for parent in parents):
        for _ in range(resamples):
            drawn = (law.resampled(kind, rng) for kind in (runs.dense, runs.upcycled, runs.scratch))
            others.append(_Fits.of(*drawn, near=fitted))
    return [_of_parent(parent, runs, fitted, others) for parent in parents]


@dataclasses.dataclass(frozen=True)
class _Fits:
    """The three laws."""

    dense: law.PowerLaw
    upcycled: law.UpcyclingLaw
    scratch: law.PowerLaw | None

    @classmethod
    def of(
        cls,
        dense: Sequence[Curve],
        upcycled: Sequence[Curve],
        scratch: Sequence[Curve],
        *,
        near: "_Fits | None" = None,
    ) -> "_Fits":
        """Fitted to runs; `near` as in `upcycling_law.fit_power`."""
        return cls(
            law.fit_power(dense, near.dense if near else None),
            law.fit_upcycling(upcycled, near.upcycled if near else None),
            law.fit_power(scratch, near.scratch if near else None) if scratch else None,
        )

    def crossings(
        self, parent: float, start: float, end: float
    ) -> tuple[tuple[float, float], tuple[float, float] | None]:
        """Where upcycled is below dense continuation, and MoE from scratch below upcycled."""

        def upcycled(tokens: np.ndarray) -> np.ndarray:
            return self.upcycled.loss(parent, tokens)

        def dense(tokens: np.ndarray) -> np.ndarray:
            return self.dense.loss(parent + tokens)

        scratch = self.scratch
        return (
            law.ahead(upcycled, dense, start=start, end=end),
            None if scratch is None else law.ahead(scratch.loss, upcycled, start=start, end=end),
        )


def _of_parent(parent: float, runs: Runs, fitted: _Fits, others: Sequence[_Fits]) -> Advice:
    mine = [curve for curve in runs.upcycled if curve.parent == parent]
    longest = max(float(curve.tokens[-1]) for curve in mine)
    reasons = tuple(_reasons(parent, runs, fitted))
    if reasons:
        return Advice(parent, longest, reasons, None, None)
    start = min(float(curve.tokens[0]) for curve in mine)
    end = law.BEYOND * max(parent, longest)
    own = fitted.crossings(parent, start, end)
    drawn = [one.crossings(parent, start, end) for one in others]
    scratch = [one[1] for one in drawn if one[1] is not None]
    return Advice(
        parent,
        longest,
        (),
        _crossing(own[0], [one[0] for one in drawn], longest),
        None if own[1] is None else _crossing(own[1], scratch, longest),
    )


def _crossing(
    own: tuple[float, float], drawn: Sequence[tuple[float, float]], longest: float
) -> Crossing:
    begins = np.sort([begin for begin, _ in drawn])
    low, high = own[0], own[0]
    if begins.size:
        edge = (1 - CONFIDENCE) / 2
        low = float(begins[math.floor(edge * (begins.size - 1))])
        high = float(begins[math.ceil((1 - edge) * (begins.size - 1))])
    return Crossing(own[0], low, high, own[1], own[0] <= longest)


def _reasons(parent: float, runs: Runs, fitted: _Fits) -> list[str]:
    """Why the law does not apply."""
    reasons = []
    if parent / runs.parameters > OVER_TRAINED:
        reasons.append(
            f"the parent is heavily over-trained: {parent / runs.parameters:,.0f} tokens per"
            f" parameter, where the law was fitted to parents of well below {OVER_TRAINED:g}; MoE"
            " from scratch catches up far sooner then (arXiv 2409.02060: after a quarter of the"
            " dense budget)"
        )
    slope = fitted.upcycled.slope(parent)
    if slope > FLAT:
        reasons.append(
            f"training after upcycling hardly lowers the loss: the exponent of its tokens is"
            f" {slope:+.4f}. Raise the learning rate, or train longer"
        )
    fits: list[tuple[str, Sequence[Curve], Callable[[Curve], np.ndarray]]] = [
        ("dense", runs.dense, lambda one: fitted.dense.loss(one.tokens)),
        ("upcycled", runs.upcycled, lambda one: fitted.upcycled.loss(one.parent, one.tokens)),
    ]
    if fitted.scratch is not None:
        scratch = fitted.scratch
        fits.append(("from scratch", runs.scratch, lambda one: scratch.loss(one.tokens)))
    for name, curves, loss in fits:
        far = law.residual(
            np.concatenate([one.losses for one in curves]),
            np.concatenate([loss(one) for one in curves]),
        )
        if far > POOR_FIT:
            reasons.append(
                f"the {name} runs are no power law: the fit misses their losses by {far:.1%}"
                " (different schedules, or runs of different models)"
            )
    return reasons


def text(runs: Runs, found: Sequence[Advice]) -> str:
    """The advice for a terminal."""
    size = f", dense model of {runs.parameters:,} parameters"
    lines = [
        "Where upcycling pays, by your runs"
        f" ({len(runs.dense)} dense, {len(runs.upcycled)} upcycled, {len(runs.scratch)} from"
        f" scratch{size})",
        "Law: arXiv 2502.03009, fitted to evaluation losses after each run's first quarter;"
        f" intervals: {CONFIDENCE:.0%} of {RESAMPLES} resamplings of runs. Tokens are target"
        f" tokens, {runs.tokens_per_step:,.0f} an update.",
    ]
    for one in found:
        lines += ["", f"Parents of {_tokens(one.parent)}:"]
        if one.reasons:
            lines += ["  THE LAW DOES NOT APPLY:", *(f"  * {why}" for why in one.reasons)]
            continue
        assert one.passes_dense is not None
        lines.append(_line("upcycling passes dense continuation", one.passes_dense, one, runs))
        if one.scratch_passes is None:
            lines.append("  MoE from scratch: no such run, so nothing is said of it")
        else:
            lines.append(_line("MoE from scratch passes upcycling", one.scratch_passes, one, runs))
    lines += ["", *_caveats(found)]
    return "\n".join(lines) + "\n"


def _line(what: str, at: Crossing, one: Advice, runs: Runs) -> str:
    if math.isinf(at.begin):
        low = "" if math.isinf(at.low) else f"; the interval begins at {_tokens(at.low)}"
        limit = _tokens(law.BEYOND * max(one.parent, one.longest))
        return f"  {what}: not within {limit} after upcycling{low}"
    budget = at.begin / one.parent
    high = "no end" if math.isinf(at.high) else _tokens(at.high)
    line = (
        f"  {what} after {_tokens(at.begin)} more ({at.begin / runs.tokens_per_step:,.0f} updates,"
        f" {budget:.0%} of the parent's training); interval {_tokens(at.low)} to {high}"
    )
    if not at.seen:
        line += f" [extrapolated: the runs end at {_tokens(one.longest)}]"
    if not math.isinf(at.until):
        line += f"; no longer from {_tokens(at.until)} on"
    return line


def _caveats(found: Sequence[Advice]) -> list[str]:
    lines = [
        "Losses along one run are not those of runs that end there with a cool-down of their own:"
        " the law is about the latter."
    ]
    if len(found) == 1:
        lines.append(
            "All parents have one length: the fit holds for that length alone, and says nothing of"
            " longer or shorter pre-training."
        )
    return lines


def _tokens(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name} tokens"
    return f"{number:.3g} tokens"


def as_json(runs: Runs, found: Sequence[Advice]) -> dict[str, Any]:
    """The advice as plain values; infinite numbers are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and math.isinf(value) else value

    return {
        "parameters": runs.parameters,
        "tokens_per_step": runs.tokens_per_step,
        "runs": {k: len(getattr(runs, k)) for k in ("dense", "upcycled", "scratch")},
        "advice": [plain(dataclasses.asdict(one)) for one in found],
    }
