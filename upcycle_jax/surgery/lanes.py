"""Runs models layer by layer, several beside each other, with the parameters of one layer in
memory at a time.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.models import layerwise
from upcycle_jax.models.layerwise import LayerwiseModel, MoeCall, State, Step
from upcycle_jax.surgery.layer_weights import Expert, LayerWeights
from upcycle_jax.types import Batch, PyTree

LOGIT_BYTES = 256 << 20
"""Bytes of logits to hold at a time, of one model."""


class Lane:
    """One model on its way through its steps.

    Attributes:
      steps: the model's, in order; the last one gives logits.
      state: after the step that was run last.
    """

    def __init__(self, model: LayerwiseModel, batch: Batch):
        model.check_batch(batch)
        self.steps: Sequence[Step] = model.layer_steps()
        self.state: State = {name: jnp.asarray(value) for name, value in batch.items()}


def advance(
    lanes: Sequence[Lane], number: int, params: PyTree, weights: LayerWeights
) -> list[MoeCall | None]:
    """Takes lanes through a step of one number; they share its parameters. The experts of an MoE
    layer are read once, one after the other.

    Args:
      lanes: where the steps before were run.
      number: of the step.
      params: its parameters, from `weights`.
      weights: where its experts come from.

    Returns:
      What went through the MoE layer of each lane; None where the step has none.
    """
    steps = [lane.steps[number] for lane in lanes]
    outputs: list[jax.Array | None] = [None] * len(lanes)
    if steps[0].experts:
        outputs = _expert_outputs(lanes, steps, params, weights)
    calls = []
    for lane, step, output in zip(lanes, steps, outputs, strict=True):
        lane.state, call = layerwise.run(step.program, params, lane.state, output)
        calls.append(call)
    return calls


def _expert_outputs(
    lanes: Sequence[Lane], steps: Sequence[Step], params: PyTree, weights: LayerWeights
) -> list[jax.Array | None]:
    """What the experts of an MoE layer give, for each lane."""
    moe = steps[0].moe
    assert moe is not None  # Experts are those of an MoE layer.
    routed = [
        layerwise.route(step.program, params, lane.state)
        for lane, step in zip(lanes, steps, strict=True)
    ]
    sums = [jnp.zeros(tokens.shape, jnp.float32) for tokens, _ in routed]

    def add(expert: Expert) -> None:
        kernels, copies = expert.params(), int(expert.members.sum()) > 1
        for lane, (tokens, plan) in enumerate(routed):
            if copies:
                theirs = layerwise.copies_outputs(moe, kernels, tokens, plan, expert.members)
            else:
                theirs = layerwise.expert_outputs(moe, kernels, tokens, plan, expert.number)
            sums[lane] += theirs

    first: Expert | None = None
    for expert in weights.experts(steps[0]):
        if first is None:
            first = expert
        elif first.same_bits(expert):  # Copies that do not share their bytes are computed once.
            first = dataclasses.replace(first, members=first.members | expert.members)
        else:
            add(expert)
    if first is not None:
        add(first)
    return list(sums)


def logits(lane: Lane, params: PyTree, rows: slice) -> np.ndarray:
    """Float32 logits `[rows, length, vocab]` of some rows, after all steps but the last."""
    state = {name: lane.state[name][rows] for name in ("x", "valid")}
    state, _ = layerwise.run(lane.steps[-1].program, params, state)
    return np.asarray(state["logits"])


def row_blocks(targets: np.ndarray, vocab_size: int | None) -> list[slice]:
    """Rows of targets `[batch, length]`, or `[batch]`, cut so that the logits of one part are at
    most `LOGIT_BYTES`.
    """
    rows, length = len(targets), targets[0].size
    count = max(1, LOGIT_BYTES // (4 * length * (vocab_size or 1)))
    return [slice(start, min(rows, start + count)) for start in range(0, rows, count)]


def moe_calls(
    model: LayerwiseModel, weights: LayerWeights, batch: Batch
) -> Iterator[tuple[str, MoeCall]]:
    """Runs a model's layers and gives what goes through each MoE layer, with the layer's name."""
    lane = Lane(model, batch)
    for number, step in enumerate(lane.steps[:-1]):
        (call,) = advance([lane], number, weights.of(step), weights)
        if call is not None:
            yield step.name, call
