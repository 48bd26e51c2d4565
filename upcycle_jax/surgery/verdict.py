"""What is promised about a sparse model's function, and what was found: the words of the function
check.
"""

import dataclasses
import enum
from typing import Any

LAYER_TOLERANCE = 1e-5
"""Of the largest value compared: float32 through one MoE layer."""


class Verdict(enum.StrEnum):
    """What the sparse model's function is to the dense one's."""

    EXACT = "exact"
    SCALED = "scaled by the gate sum"
    FEWER = "as the source with fewer experts per token"
    NOT_PRESERVED = "not preserved"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the recipe and the routers promise, and why."""

    verdict: Verdict
    reason: str


@dataclasses.dataclass
class LayerScaling:
    """One MoE layer against the dense MLP times the summed combine weights.

    Attributes:
      layer: 'encoder/layers_1'.
      difference: largest difference, in units of the largest dense output.
      gate_sum_mean: mean over real tokens of the summed combine weights.
      untouched: share of real tokens that no expert took.
    """

    layer: str
    difference: float
    gate_sum_mean: float
    untouched: float

    @property
    def ok(self) -> bool:
        """Equal within float32 rounding."""
        return self.difference <= LAYER_TOLERANCE


@dataclasses.dataclass
class FunctionCheck:
    """Prediction and measurement.

    Attributes:
      prediction: what was expected.
      tokens: what was compared on (`ProbeBatch.description`).
      logit_difference: largest difference between sparse and dense logits, as the model is
        configured.
      logit_scale: largest dense logit.
      dense_loss: cross entropy per target token of the dense model on the tokens.
      sparse_loss: the same of the sparse model as configured.
      twin_difference: as `logit_difference`, of the twin with renormalised weights and room for
        every token; None where nothing is claimed, or the source has experts itself.
      step_difference: the largest difference of a step of that twin, given what the dense model's
        step gets, to the dense model's, in units of the largest value; None where nothing is
        claimed. Where the source has experts: of the result as configured, to the source, with as
        many experts per token as the verdict says.
      first_divergence: first layer (or what is between layers) that gives something else than the
        dense model's when it should not.
      shared_expert: MoE layers have one that is part of the comparison by layers.
      layers: the layer-by-layer comparison, where the verdict is 'scaled'.
      ok: the prediction holds.
    """

    prediction: Prediction
    tokens: str
    logit_difference: float
    logit_scale: float
    dense_loss: float
    sparse_loss: float
    twin_difference: float | None
    step_difference: float | None
    first_divergence: str | None
    shared_expert: bool
    layers: list[LayerScaling]
    ok: bool

    def text(self) -> str:
        """Prediction and measurement as text."""
        lines = [
            (
                f"function check: {'PASSED' if self.ok else 'FAILED'}; predicted:"
                f" {self.prediction.verdict} ({self.prediction.reason})"
            ),
            f"  tokens: {self.tokens}",
            (
                f"  as configured: logits differ by at most {self.logit_difference:.3g} (largest"
                f" dense logit {self.logit_scale:.3g}); loss per token {self.dense_loss:.4f} dense,"
                f" {self.sparse_loss:.4f} sparse"
            ),
        ]
        if self.twin_difference is not None:
            lines.append(
                "  with renormalised weights and room for every token: logits differ by at most"
                f" {self.twin_difference:.3g}; every layer, given the dense model's stream, by at"
                f" most {self.step_difference:.1e} of its largest value"
            )
        elif self.step_difference is not None:
            fewer = " with so many experts" if self.prediction.verdict is Verdict.FEWER else ""
            lines.append(
                f"  every layer, given the source's stream, is what the source's is{fewer}, within"
                f" {self.step_difference:.1e} of its largest value"
            )
        for layer in self.layers:
            lines.append(
                f"  {layer.layer}: output = dense MLP x gate"
                f" sum{' + shared expert' if self.shared_expert else ''} within"
                f" {layer.difference:.1e}; gate sum {layer.gate_sum_mean:.3f} on average,"
                f" {100 * layer.untouched:.1f}% of tokens without an"
                f" expert{'' if layer.ok else '  <-- DIFFERS'}"
            )
        if self.first_divergence is not None:
            lines.append(f"  first layer that diverges: {self.first_divergence}")
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """Plain JSON; the text included."""
        out = dataclasses.asdict(self)
        out["prediction"] = {
            "verdict": str(self.prediction.verdict),
            "reason": self.prediction.reason,
        }
        return {**out, "text": self.text()}
