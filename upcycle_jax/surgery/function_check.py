"""Does the sparse model compute what the dense one did? Both are run in float32 on the same tokens
and compared.

The recipe and the routers predict one of three verdicts:

  exact: every token's combine weights sum to 1 (renormalised, or softmax after top-k) and no token
    is dropped; logits must be equal.
  scaled: experts are copies, but combine weights sum to something else; every MoE layer must give
    the dense MLP's output times that sum. This is checked layer by layer, on the inputs that the
    layers get in the sparse model's own forward pass, against an MLP written in NumPy with the
    dense checkpoint's weights; and a twin of the sparse model with renormalised weights and room
    for every token must give the dense logits, which covers everything between the MoE layers. A
    shared expert adds the dense MLP (or its first hidden units) once more: it is part of the
    comparison by layers, and the twin goes without it.
  not preserved: the recipe changes experts; the difference is measured and nothing is claimed.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import trees
from upcycle_jax.models.api import EncoderDecoderModel
from upcycle_jax.moe.config import Stack
from upcycle_jax.moe.layer import MoeLayer, RouterLogits
from upcycle_jax.moe.routing import Group
from upcycle_jax.moe.sizes import layer_sizes
from upcycle_jax.surgery.recipe import MergeRecipe
from upcycle_jax.surgery.sources import Reader
from upcycle_jax.surgery.table import Plan
from upcycle_jax.surgery.tokens import Tokens
from upcycle_jax.types import Batch, PyTree

TOLERANCE = 1e-4
"""Of the largest value compared: float32 through a whole model."""
LAYER_TOLERANCE = 1e-5
"""The same for one MoE layer."""


class Verdict(enum.StrEnum):
    """What the sparse model's function is to the dense one's."""

    EXACT = "exact"
    SCALED = "scaled by the gate sum"
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
      tokens: what was compared on (`Tokens.description`).
      logit_difference: largest difference between sparse and dense logits, as the model is
        configured.
      logit_scale: largest dense logit.
      dense_loss: cross entropy per target token of the dense model on the tokens.
      sparse_loss: the same of the sparse model as configured.
      twin_difference: as `logit_difference`, of the twin with renormalised weights and room for
        every token; None where nothing is claimed.
      first_divergence: first layer whose residual stream differs when it should not.
      shared_expert: MoE layers have one.
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
    first_divergence: str | None
    shared_expert: bool
    layers: list[LayerScaling]
    ok: bool

    def text(self) -> str:
        """For people."""
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
                f" {self.twin_difference:.3g}"
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


def load_params(reader: Reader, specs: Mapping[str, trees.LeafSpec]) -> PyTree:
    """A checkpoint's parameters as nested float32 arrays, for a model with these specs
    (`EncoderDecoderModel.param_specs`).
    """
    return trees.unflatten(
        {path: jnp.asarray(reader.read(f"target/{path}"), jnp.float32) for path in specs}
    )


def dense_counterpart(sparse: EncoderDecoderModel) -> EncoderDecoderModel:
    """The dense model that a sparse one is upcycled from, in float32."""
    config = dataclasses.replace(sparse.config.unrolled, moe=None, dtype="float32")
    return EncoderDecoderModel(config, label_smoothing=0.0, z_loss=sparse.z_loss)


def _in_float32(sparse: EncoderDecoderModel, *, renormalised: bool = False) -> EncoderDecoderModel:
    moe = sparse.config.moe
    assert moe is not None
    if renormalised:
        moe = dataclasses.replace(
            moe,
            encoder_router=_renormalised(moe.encoder_router),
            decoder_router=_renormalised(moe.decoder_router),
            shared_expert_mlp_dim=None,
            eval_expert_capacity_factor=float(
                moe.num_experts
            ),  # As many slots as tokens: nothing is dropped, nobody left out.
        )
    return EncoderDecoderModel(
        dataclasses.replace(sparse.config.unrolled, moe=moe, dtype="float32"), z_loss=sparse.z_loss
    )


def _renormalised(router: Any) -> Any:
    return router.renormalized() or router


def predict(plan: Plan, sparse: EncoderDecoderModel, batch: Batch) -> Prediction:
    """What the sparse model's function should be to the dense one's on such a batch."""
    recipe = plan.recipe
    if isinstance(recipe, MergeRecipe):
        return Prediction(Verdict.NOT_PRESERVED, "experts are merged")
    if recipe.depth is not None:
        return Prediction(Verdict.NOT_PRESERVED, "the depth changes")
    if not recipe.expert_init.preserves_function:
        return Prediction(
            Verdict.NOT_PRESERVED, f"{type(recipe.expert_init).__name__} changes the experts"
        )
    if not all(
        row.moves_values for row in plan.rows if row.target.startswith("target/") and row.sources
    ):
        shuffled = all(
            row.moves_values or "shuffled" in row.operation.name for row in plan.rows if row.sources
        )
        if not shuffled:
            return Prediction(Verdict.NOT_PRESERVED, "parameters are rounded to a narrower type")
    assert sparse.config.moe is not None
    stacks: tuple[Stack, ...] = ("encoder", "decoder")
    for router in (
        sparse.config.moe.router(stack) for stack in stacks if sparse.config.sparse_layers(stack)
    ):
        if router.renormalized() is None:
            return Prediction(
                Verdict.NOT_PRESERVED, f"{type(router).__name__} gives experts mixtures of tokens"
            )
    reasons = (
        ["a shared expert is added"] if sparse.config.moe.shared_expert_mlp_dim is not None else []
    )
    features: dict[Stack, str] = {
        "encoder": "encoder_input_tokens",
        "decoder": "decoder_target_tokens",
    }
    for stack, feature in features.items():
        if sparse.config.sparse_layers(stack):
            reasons += _why_not_exact(sparse, stack, np.shape(batch[feature]))
    if reasons:
        return Prediction(Verdict.SCALED, "; ".join(reasons))
    return Prediction(
        Verdict.EXACT, "experts are copies, combine weights sum to 1 and every token has room"
    )


def _why_not_exact(sparse: EncoderDecoderModel, stack: Stack, shape: Sequence[int]) -> list[str]:
    moe = sparse.config.moe
    assert moe is not None
    router, reasons = moe.router(stack), []
    if not router.unit_weights:
        reasons.append(f"combine weights are not renormalised in the {stack}")
    sizes = layer_sizes(moe, router, shape[0], shape[1], train=False)
    grouping, slots = sizes.grouping, sizes.slots
    if slots < grouping.group_size:
        reasons.append(f"{stack} experts have {slots} slots for {grouping.group_size} tokens")
    return reasons


def check_function(
    plan: Plan,
    sparse: EncoderDecoderModel,
    dense_params: PyTree,
    sparse_params: PyTree,
    tokens: Tokens,
) -> FunctionCheck:
    """Compares the two models on a batch.

    Args:
      plan: the conversion, for the prediction.
      sparse: the sparse model; the dense one follows from it.
      dense_params: parameters of the dense checkpoint, nested, float32.
      sparse_params: parameters of the sparse checkpoint.
      tokens: random ones, or real text.
    """
    prediction = predict(plan, sparse, tokens.batch)
    dense, configured = dense_counterpart(sparse), _in_float32(sparse)
    batch = {name: jnp.asarray(value) for name, value in tokens.batch.items()}
    want = np.asarray(jax.jit(dense.logits)(dense_params, batch))
    have, inner = forward(configured, sparse_params, batch)
    dense_loss, sparse_loss = (cross_entropy(logits, batch) for logits in (want, have))
    difference, scale = float(np.abs(want - have).max()), float(np.abs(want).max())
    twin_difference: float | None = None
    first: str | None = None
    layers: list[LayerScaling] = []
    ok = bool(np.isfinite(have).all())
    if prediction.verdict is not Verdict.NOT_PRESERVED:
        twin, twin_logits = configured, have
        if prediction.verdict is Verdict.SCALED:
            twin = _in_float32(sparse, renormalised=True)
            twin_logits = np.asarray(jax.jit(twin.logits)(sparse_params, batch))
        twin_difference = float(np.abs(want - twin_logits).max())
        if not twin_difference <= TOLERANCE * max(1.0, scale):
            ok, first = False, first_divergence(dense, dense_params, twin, sparse_params, batch)
    if prediction.verdict is Verdict.SCALED:
        layers = check_layers(configured, dense_params, inner)
        wrong = [layer.layer for layer in layers if not layer.ok]
        if wrong:
            ok, first = False, first or wrong[0]
    return FunctionCheck(
        prediction=prediction,
        tokens=tokens.description,
        logit_difference=difference,
        logit_scale=scale,
        dense_loss=dense_loss,
        sparse_loss=sparse_loss,
        twin_difference=twin_difference,
        first_divergence=first,
        shared_expert=configured.config.moe is not None
        and configured.config.moe.shared_expert_mlp_dim is not None,
        layers=layers,
        ok=ok,
    )


def cross_entropy(logits: np.ndarray, batch: Batch) -> float:
    """Mean cross entropy per target token of logits `[batch, length, vocab]`."""
    targets = np.asarray(batch["decoder_target_tokens"])
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return float(losses[targets > 0].mean())


@dataclasses.dataclass(frozen=True)
class InnerValues:
    """What went through one MoE layer in a forward pass: input and output `[batch, length, d]`,
    real tokens and token ids `[batch, length]`, router logits `[G, S, E]`.
    """

    layer: str
    x: np.ndarray
    valid: np.ndarray
    token_ids: np.ndarray
    y: np.ndarray
    router_logits: np.ndarray


def forward(
    model: EncoderDecoderModel, params: PyTree, batch: Batch
) -> tuple[np.ndarray, list[InnerValues]]:
    """Logits of a forward pass in evaluation mode, and what went through its MoE layers."""
    names: list[str] = []

    def run(params, batch):
        seen: list[Any] = []
        router_logits: list[Any] = []

        def record(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if isinstance(context.module, RouterLogits) and context.method_name == "__call__":
                router_logits.append(out)
            elif isinstance(context.module, MoeLayer) and context.method_name == "__call__":
                names.append("/".join(context.module.path[:2]))
                seen.append((*args[:3], out, router_logits[-1]))
            return out

        with nn.intercept_methods(record):
            logits = model.logits(params, batch)
        return logits, seen

    logits, seen = jax.jit(run)(params, batch)
    return np.asarray(logits), [
        InnerValues(name, *map(np.asarray, values))
        for name, values in zip(names, seen, strict=True)
    ]


def first_divergence(
    one: EncoderDecoderModel,
    one_params: PyTree,
    other: EncoderDecoderModel,
    other_params: PyTree,
    batch: Batch,
) -> str:
    """The first layer after which the residual streams of two models differ, or 'after the last
    layer'.
    """
    ours, theirs = (
        jax.jit(one.layer_outputs)(one_params, batch),
        jax.jit(other.layer_outputs)(other_params, batch),
    )
    for layer in sorted(
        ours, key=lambda name: (name.startswith("decoder/"), int(name.rsplit("_", 1)[1]))
    ):
        a, b = np.asarray(ours[layer]), np.asarray(theirs[layer])
        if not np.abs(a - b).max() <= TOLERANCE * max(1.0, float(np.abs(a).max())):
            return layer
    return "after the last layer"


def check_layers(
    sparse: EncoderDecoderModel, dense_params: PyTree, inner: Sequence[InnerValues]
) -> list[LayerScaling]:
    """Compares every MoE layer with the dense MLP times the summed combine weights, plus the shared
    expert, on the inputs of the sparse forward pass.
    """
    flat = trees.flatten(dense_params)
    shared_units = (
        sparse.config.moe.shared_expert_mlp_dim if sparse.config.moe is not None else None
    )
    out = []
    for values in inner:
        prefix, valid = f"{values.layer}/mlp/", values.valid
        kernels = {
            path.removeprefix(prefix).removesuffix("/kernel"): np.asarray(kernel)
            for path, kernel in flat.items()
            if path.startswith(prefix)
        }
        dense = dense_mlp(values.x, kernels, sparse.config.mlp_activations)
        gates = gate_sums(sparse, values)
        scale = max(float(np.abs(dense[valid]).max(initial=0)), 1e-20)
        expected = dense * gates[..., None]
        if shared_units is not None:
            units = {
                name: kernel[:shared_units] if name == "wo" else kernel[:, :shared_units]
                for name, kernel in kernels.items()
            }
            expected = expected + dense_mlp(values.x, units, sparse.config.mlp_activations)
        difference = float(np.abs(values.y - expected)[valid].max(initial=0)) / scale
        out.append(
            LayerScaling(
                values.layer,
                difference,
                float(gates[valid].mean()),
                float((gates[valid] == 0).mean()),
            )
        )
    return out


def dense_mlp(
    x: np.ndarray, kernels: Mapping[str, np.ndarray], activations: Sequence[str]
) -> np.ndarray:
    """T5's MLP in NumPy, float64, written apart from the model: `prod_i act_i(x wi_i) wo` for x
    `[..., d]`.
    """
    functions = {
        "gelu": lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
        "linear": lambda v: v,
        "relu": lambda v: np.maximum(v, 0),
        "silu": lambda v: v / (1 + np.exp(-v)),
    }
    hidden: Any = 1.0
    for number, name in enumerate(activations):
        kernel = kernels["wi" if len(activations) == 1 else f"wi_{number}"]
        hidden = hidden * functions[name](x.astype(np.float64) @ kernel.astype(np.float64))
    return hidden @ kernels["wo"].astype(np.float64)


def gate_sums(sparse: EncoderDecoderModel, values: InnerValues) -> np.ndarray:
    """The summed combine weights of every token of an MoE layer, float32 `[batch, length]`, from
    its router logits.
    """
    moe = sparse.config.moe
    assert moe is not None
    router = moe.router("encoder" if values.layer.startswith("encoder/") else "decoder")
    rows, columns = values.valid.shape
    sizes = layer_sizes(moe, router, rows, columns, train=False)
    grouping, slots = sizes.grouping, sizes.slots
    padding = ((0, grouping.batch_padding), (0, grouping.length_padding))
    real, ids = (
        np.pad(a, padding).reshape(grouping.num_groups, grouping.group_size)
        for a in (values.valid, values.token_ids)
    )

    def one_group(logits, real, token_ids):
        routable = (
            real if moe.ignore_padding_tokens or router.skips_padding else jnp.ones_like(real)
        )
        counted = real.astype(jnp.float32)
        group = Group(
            logits, moe.num_experts, routable, counted, jnp.sum(counted), token_ids=token_ids
        )
        return router.route(group, capacity=slots).plan.weight_per_token(grouping.group_size)

    sums = np.asarray(jax.jit(jax.vmap(one_group))(values.router_logits, real, ids))
    return sums.reshape(rows + grouping.batch_padding, columns + grouping.length_padding)[
        :rows, :columns
    ]


def router_weights(
    sparse: EncoderDecoderModel, sparse_params: PyTree, batch: Batch
) -> dict[str, tuple[float, ...]]:
    """Mean router probability of every expert over a batch, by layer: weights for
    `MergeRecipe(how='weighted')`.

    Padded positions count too: their probabilities are all equal, so they only pull the weights
    towards each other.
    """
    _, inner = forward(
        _in_float32(sparse),
        sparse_params,
        {name: jnp.asarray(value) for name, value in batch.items()},
    )
    out = {}
    for values in inner:
        logits = values.router_logits.astype(np.float64)
        if sparse.config.moe is None or logits.shape[-1] != sparse.config.moe.num_experts:
            raise ValueError(
                f"{values.layer} has no router logit per expert, so its experts cannot be weighted:"
                " merge with how='mean'"
            )
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        mean = (odds / odds.sum(axis=-1, keepdims=True)).reshape(-1, logits.shape[-1]).mean(axis=0)
        out[values.layer] = tuple(float(p) for p in mean / mean.sum())
    return out
