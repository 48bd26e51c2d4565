"""Does the sparse model compute what the dense one did? Both are run in float32 on the same tokens
and compared, layer by layer: the weights of one layer of each are read, used and let go, so that
models of any size are checked. Of a larger MoE made of an MoE, that MoE stands for the dense model.

The recipe and the routers predict one of four verdicts (`prediction`):

  exact: every token's combine weights sum to 1 (renormalised, or softmax after top-k) and no token
    is dropped; logits must be equal.
  scaled: experts are copies, but combine weights sum to something else; every MoE layer must give
    the dense MLP's output times that sum. This is checked layer by layer, on the inputs that the
    layers get in the sparse model's own forward pass, against an MLP written in NumPy with the
    dense checkpoint's weights; and a twin of the sparse model with renormalised weights and room
    for every token must be the dense model, which covers everything between the MoE layers. A
    shared expert adds the dense MLP (or its first hidden units) once more: it is part of the
    comparison by layers, and the twin goes without it. Where routed and shared experts divide the
    dense MLP, the sum scales the part of the routed ones, and the twin keeps both.
  as the source with fewer experts per token: a larger MoE chooses too few of the copies of its
    experts. Every layer, given what the source's gets, must be what that one is with so many
    experts per token; the difference of logits to the source as it is, is measured.
  not preserved: the recipe changes experts; the difference is measured and nothing is claimed.

Whether a model is the dense one is decided step by step too: every step is given what the dense
model's own step gets, and must give the same. Steps that are equal make equal models; compared from
end to end alone, deep models would amplify the rounding of their first layers. The difference of
logits from end to end is measured and shown.

Positions without a real token are not compared.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from upcycle_jax import trees
from upcycle_jax.models.layerwise import LayerwiseModel, MoeCall, State, Step
from upcycle_jax.progress import Meter, Progress
from upcycle_jax.surgery.lanes import Lane, advance, logits, moe_calls, row_blocks
from upcycle_jax.surgery.layer_weights import LayerWeights
from upcycle_jax.surgery.offline import DEFAULT_MAX_MEMORY
from upcycle_jax.surgery.overlaid import Overlaid
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.plan import Plan
from upcycle_jax.surgery.prediction import Parts, Sources, predict, twin_of
from upcycle_jax.surgery.probe_batch import ProbeBatch
from upcycle_jax.surgery.verdict import (
    LAYER_TOLERANCE,
    FunctionCheck,
    LayerScaling,
    Prediction,
    Verdict,
)
from upcycle_jax.types import Batch, PyTree

__all__ = [
    "LAYER_TOLERANCE",
    "TOLERANCE",
    "FunctionCheck",
    "LayerScaling",
    "Prediction",
    "Verdict",
    "check_function",
    "predict",
    "router_weights",
]

TOLERANCE = 1e-4
"""Of the largest value compared: float32 through a whole model."""
MLP_ROWS = 2048
"""Tokens that `reference_mlp` is given at a time."""


def check_function(
    plan: Plan,
    sparse: LayerwiseModel,
    dense_reader: Reader,
    sparse_reader: Reader,
    tokens: ProbeBatch,
    *,
    max_memory: int = DEFAULT_MAX_MEMORY,
    progress: Progress | None = None,
) -> FunctionCheck:
    """Compares the two models on a batch.

    Both checkpoints are read once, experts that share their stored bytes once for all. Beyond the
    first layer's size, memory does not grow with the model.

    Args:
      plan: the conversion, for the prediction.
      sparse: the sparse model; the dense one (or the smaller MoE) follows from it and the plan.
      dense_reader: the source checkpoint.
      sparse_reader: the sparse checkpoint.
      tokens: random ones, or real text. As many of its first rows are used as `max_memory`
        allows.
      max_memory: bytes, half for activations, half for the weights of a layer: experts are read as
        many at a time as that allows. The floor is one layer of each model without experts, three
        experts, one row's activations, and logits of `lanes.LOGIT_BYTES` for each model.
      progress: called with a line of text about every second.

    Raises:
      ValueError: a leaf cannot be read, or the batch does not divide into routing groups.
    """
    tokens = _rows_that_fit(plan, sparse, tokens, max_memory // 2)
    prediction = predict(plan, sparse, tokens.batch)
    sources, configured = Sources.of(plan, sparse), sparse.in_float32()
    dense, parts = sources.source.in_float32(), Parts.of(plan.recipe, sparse.config.moe)
    block_bytes = max_memory // 8
    if plan.replaced:
        replaced = [row.target for row in plan.replaced]
        dense_reader = Overlaid(dense_reader, sparse_reader, replaced)
    dense_weights, sparse_weights = (
        LayerWeights(reader, model.param_specs(), block_bytes=block_bytes)
        for reader, model in ((dense_reader, dense), (sparse_reader, configured))
    )
    dense_lane, lanes = Lane(dense, tokens.batch), [Lane(configured, tokens.batch)]
    # What every step must be: the source's own, or that of the source with fewer experts.
    wanted = [dense_lane]
    if prediction.verdict is Verdict.FEWER:
        wanted.append(Lane(sources.reference.in_float32(), tokens.batch))
    claims = prediction.verdict is not Verdict.NOT_PRESERVED
    if claims:
        # The twin from end to end (where the configured model is not it), and step by step.
        renormalised = prediction.verdict is Verdict.SCALED
        twin = twin_of(plan, sparse, prediction.verdict)
        lanes += [Lane(twin, tokens.batch) for _ in range(1 + renormalised)]
    total = sum(dense_weights.bytes_of(step) for step in dense_lane.steps)
    total += sum(sparse_weights.bytes_of(step) for step in lanes[0].steps)
    meter = Meter(total, progress, verb="function check: read")
    dense_weights.meter = sparse_weights.meter = meter

    diverging: list[str] = []
    step_difference = 0.0
    layers: list[LayerScaling] = []
    for number, step in enumerate(dense_lane.steps[:-1]):
        if claims:
            lanes[-1].state = wanted[-1].state = dense_lane.state
        params = dense_weights.of(step)
        advance(wanted, number, params, dense_weights)
        calls = advance(lanes, number, sparse_weights.of(lanes[0].steps[number]), sparse_weights)
        if claims:
            difference = _difference(step, wanted[-1].state, lanes[-1].state)
            step_difference = float(np.maximum(step_difference, difference))
            if not difference <= LAYER_TOLERANCE:
                diverging.append(step.name)
        if prediction.verdict is Verdict.SCALED and calls[0] is not None:
            twins = sparse_weights.twins_of_experts(lanes[0].steps[number])
            kernels = _twin_kernels(twins, step, params)
            layers.append(check_layer(configured, step.name, kernels, calls[0], parts))
    features = sparse.features
    targets = np.asarray(tokens.batch[features.targets])
    is_real = np.asarray(features.real_targets(tokens.batch))
    if targets.ndim > is_real.ndim:  # Several labels of an image: the losses shown are the first's.
        targets = np.maximum(targets[..., 0], 0)
    if claims:
        lanes[-1].state = dense_lane.state
    found = _compare_logits(
        dense_lane, lanes, targets, is_real, sparse.vocab_size, dense_weights, sparse_weights
    )
    meter.finish()

    ok, first = found.finite, None
    if claims:
        if not found.differences[-1] <= TOLERANCE * max(1.0, found.scale):
            diverging.append("after the last layer")
        if diverging:
            ok, first = False, diverging[0]
    wrong = [layer.layer for layer in layers if not layer.ok]
    if wrong:
        ok, first = False, first or wrong[0]
    return FunctionCheck(
        prediction=prediction,
        tokens=tokens.description,
        logit_difference=found.differences[0],
        logit_scale=found.scale,
        dense_loss=found.losses[0],
        sparse_loss=found.losses[1],
        twin_difference=found.differences[-2] if claims and dense.config.moe is None else None,
        step_difference=step_difference if claims else None,
        first_divergence=first,
        shared_expert=parts.shared > 0,
        layers=layers,
        ok=ok,
    )


def _rows_that_fit(
    plan: Plan, sparse: LayerwiseModel, tokens: ProbeBatch, max_bytes: int
) -> ProbeBatch:
    """The first rows of a batch, as many as the activations of the four runs have room for and
    routing groups allow.
    """
    at_most = max(1, max_bytes // (4 * sparse.row_bytes(tokens.batch)))
    if at_most >= tokens.num_rows:
        return tokens
    for count in range(at_most, 1, -1):
        try:
            predict(plan, sparse, tokens.first_rows(count).batch)
        except ValueError:
            continue
        return tokens.first_rows(count)
    return tokens.first_rows(1)


def _difference(step: Step, dense: State, sparse: State) -> float:
    """How far the states of two models after a step lie apart: of a layer the residual streams
    where there are real tokens, in units of the largest value; else everything, each value in
    units of itself or 1.
    """
    if step.is_layer:
        valid = np.asarray(dense["valid"])
        a, b = (np.asarray(state["x"])[valid] for state in (dense, sparse))
        return _largest(0.0, a - b) / max(_largest(0.0, a), 1e-20)
    out = 0.0
    pairs = zip(jax.tree.leaves(dense), jax.tree.leaves(sparse), strict=True)
    for a, b in ((np.asarray(a), np.asarray(b)) for a, b in pairs):
        if a.dtype.kind == "f":
            out = _largest(out, (a - b) / np.maximum(1.0, np.abs(a)))
    return out


@dataclasses.dataclass
class _Logits:
    """How logits compare.

    Attributes:
      differences: the largest to the dense model's, of each sparse model.
      scale: the largest dense logit.
      losses: cross entropy per target token of the dense model and of the first sparse one.
      finite: whether all logits of the first sparse model are.
    """

    differences: list[float]
    scale: float
    losses: tuple[float, float]
    finite: bool


def _compare_logits(
    dense: Lane,
    lanes: Sequence[Lane],
    targets: np.ndarray,
    is_real: np.ndarray,
    vocab_size: int | None,
    dense_weights: LayerWeights,
    sparse_weights: LayerWeights,
) -> _Logits:
    """Compares the logits of real target tokens, a block of rows at a time.

    Args:
      dense: the dense model, after all steps but the last.
      lanes: the sparse models, likewise.
      targets: int `[batch, length]`, or `[batch]`.
      is_real: bool of that shape, which of them are no padding.
      vocab_size: columns of the logits.
      dense_weights: where the parameters of the last step come from.
      sparse_weights: likewise.
    """
    dense_params = dense_weights.of(dense.steps[-1])
    sparse_params = sparse_weights.of(lanes[0].steps[-1])
    found = _Logits([0.0] * len(lanes), 0.0, (0.0, 0.0), finite=True)
    sums = np.zeros(2)
    for rows in row_blocks(targets, vocab_size):
        real = is_real[rows]
        want = logits(dense, dense_params, rows)[real]
        found.scale = _largest(found.scale, want)
        for number, lane in enumerate(lanes):
            have = logits(lane, sparse_params, rows)[real]
            found.differences[number] = _largest(found.differences[number], want - have)
            if number == 0:
                found.finite &= bool(np.isfinite(have).all())
                sums += [cross_entropy(one, targets[rows][real]).sum() for one in (want, have)]
    count = max(1, int(is_real.sum()))
    found.losses = (float(sums[0] / count), float(sums[1] / count))
    return found


def _largest(so_far: float, values: np.ndarray) -> float:
    """The larger one of a number and the absolute values; NaN if there is any."""
    return float(np.maximum(so_far, np.abs(values).max(initial=0)))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Cross entropy `[tokens]`, float64, of logits `[tokens, vocab]`."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=-1))
    return log_sums - np.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]


def _twin_kernels(twins: Mapping[str, str], step: Step, params: PyTree) -> dict[str, np.ndarray]:
    """Kernels of the dense MLP that experts come from, by the paths below the experts.

    Args:
      twins: from `LayerWeights.twins_of_experts`.
      step: of the dense model.
      params: what it takes.
    """
    flat = trees.flatten(params)
    places = {path: step.place(twin) for path, twin in twins.items()}
    return {path: np.asarray(flat[place]) for path, place in places.items() if place is not None}


def check_layer(
    sparse: LayerwiseModel,
    layer: str,
    kernels: Mapping[str, np.ndarray],
    call: MoeCall,
    parts: Parts,
) -> LayerScaling:
    """Compares an MoE layer with the dense MLP times the summed combine weights, plus the shared
    expert, on the inputs of the sparse forward pass.

    Args:
      sparse: the model.
      layer: 'encoder/layers_1'.
      kernels: of the dense MLP, by path below it.
      call: what went through the MoE layer.
      parts: of which hidden units it is made.
    """
    valid = np.asarray(call.valid)
    x, y, gates = (np.asarray(values)[valid] for values in (call.x, call.y, call.gates))
    scale, difference = 1e-20, 0.0
    for start in range(0, len(x), MLP_ROWS):
        part = slice(start, start + MLP_ROWS)
        dense = sparse.reference_mlp(x[part], kernels)
        if parts.divided:
            routed = sparse.reference_mlp(x[part], kernels, units=parts.routed)
            expected = routed * gates[part, None] + (dense - routed)
        else:
            expected = dense * gates[part, None]
            if parts.shared:
                shared = sparse.reference_mlp(x[part], kernels, units=parts.shared)
                expected = expected + shared * parts.shared_factor
        scale = _largest(scale, dense)
        difference = _largest(difference, y[part] - expected)
    return LayerScaling(layer, difference / scale, float(gates.mean()), float((gates == 0).mean()))


def router_weights(
    sparse: LayerwiseModel,
    reader: Reader,
    batch: Batch,
    *,
    max_memory: int = DEFAULT_MAX_MEMORY,
) -> dict[str, tuple[float, ...]]:
    """Mean router probability of every expert over a batch, by layer: weights for
    `MergeRecipe(how='weighted')`.

    Padded positions count too: their probabilities are all equal, so they only pull the weights
    towards each other.

    Args:
      sparse: the model.
      reader: its checkpoint.
      batch: model features.
      max_memory: see `check_function`.
    """
    model = sparse.in_float32()
    weights = LayerWeights(reader, model.param_specs(), block_bytes=max_memory // 8)
    out = {}
    for layer, call in moe_calls(model, weights, batch):
        router_logits = np.asarray(call.router_logits, np.float64)
        if sparse.config.moe is None or router_logits.shape[-1] != sparse.config.moe.num_experts:
            raise ValueError(
                f"{layer} has no router logit per expert, so its experts cannot be weighted:"
                " merge with how='mean'"
            )
        odds = np.exp(router_logits - router_logits.max(axis=-1, keepdims=True))
        probabilities = odds / odds.sum(axis=-1, keepdims=True)
        mean = probabilities.reshape(-1, odds.shape[-1]).mean(axis=0)
        out[layer] = tuple(float(p) for p in mean / mean.sum())
    return out
