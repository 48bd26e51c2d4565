"""Our activations against transformers', every layer given what theirs got: a layer that differs is
named, and those after it are not blamed for it.
"""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from upcycle_jax.models.decoder.config import STACK
from upcycle_jax.models.layer_names import layer as layer_name
from upcycle_jax.surgery.served.ours import LayerActivations, OurModel
from upcycle_jax.surgery.served.theirs import TheirRun

TOLERANCE = 1e-4
"""Of the largest value compared: float32 through one layer."""

LOGIT_TOLERANCE = 1e-3
"""The same for logits from end to end: float32 through a whole model."""

TIE = 1e-5
"""Router logits that are nearer, in units of the largest, are chosen between by rounding."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """One part of the model.

    Attributes:
      part: 'decoder/layers_1 attention'.
      difference: largest difference.
      size: largest value of ours.
      tolerance: in units of `size`.
    """

    part: str
    difference: float
    size: float
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """Equal within float32 rounding. NaN is not."""
        return bool(self.difference <= self.tolerance * self.size)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was compared, in the order in which the model computes it.

    Attributes:
      version: of transformers.
      parts: all of them; the logits from end to end are last.
      ties: tokens that a router chose experts for by rounding, in all layers: their experts' output
        is not compared.
    """

    version: str
    parts: tuple[Compared, ...]
    ties: int

    @property
    def first(self) -> Compared | None:
        """The first part that differs."""
        return next((one for one in self.parts if not one.ok), None)

    @property
    def first_of_each(self) -> list[Compared]:
        """The first part that differs of every layer; those after it in a layer follow from it."""
        wrong: dict[str, Compared] = {}
        for one in self.parts[:-1]:
            if not one.ok:
                wrong.setdefault(one.part.partition(" ")[0], one)
        return list(wrong.values())


def compare(ours: OurModel, theirs: TheirRun, *, centred: bool = False) -> Comparison:
    """Runs our layers on what transformers' layers got.

    Args:
      ours: the checkpoint's model.
      theirs: the folder's, on the same tokens.
      centred: the folder's residual stream lacks its mean over the width (a centred OLMo).
    """
    parts: list[Compared] = []
    ties = 0
    embedded = ours.embedded
    parts.append(_compared("embedding", embedded, theirs.embedded, centred=centred))
    own, given = embedded, jnp.asarray(theirs.embedded)
    for index, seen in enumerate(theirs.layers):
        streams = jnp.stack([given, own])
        both = ours.layer(index, streams)
        mine = LayerActivations(
            both.attention[0],
            None if both.router is None else both.router[0],
            both.mlp[0],
            both.output[0],
        )
        clear = _clear(mine, ours, index)
        ties += int((~clear).sum())
        parts += _layer(layer_name(STACK, index), mine, seen, clear, centred=centred)
        own, given = jnp.asarray(both.output[1]), jnp.asarray(seen.output)
    on_theirs, end_to_end = ours.logits(jnp.stack([given, own]))
    parts.append(_compared("logits of the last layer's output", on_theirs, theirs.logits))
    parts.append(
        dataclasses.replace(
            _compared("logits from end to end", end_to_end, theirs.logits),
            tolerance=LOGIT_TOLERANCE,
        )
    )
    return Comparison(theirs.version, tuple(parts), ties)


def _layer(
    name: str,
    ours: LayerActivations,
    theirs: LayerActivations,
    clear: np.ndarray,
    *,
    centred: bool,
) -> Iterator[Compared]:
    yield _compared(f"{name} attention", ours.attention, theirs.attention, centred=centred)
    if ours.router is not None and theirs.router is not None:
        router = np.asarray(ours.router)
        if _are_probabilities(theirs.router):
            router = np.exp(router - router.max(-1, keepdims=True))
            router /= router.sum(-1, keepdims=True)
        yield _compared(f"{name} router", router, theirs.router)
    mlp = "experts" if ours.router is not None else "mlp"
    for part, mine, their in (
        (mlp, ours.mlp, theirs.mlp),
        ("output", ours.output, theirs.output),
    ):
        yield _compared(
            f"{name} {part}", np.asarray(mine)[clear], np.asarray(their)[clear], centred=centred
        )


def _compared(part: str, ours: object, theirs: object, *, centred: bool = False) -> Compared:
    a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
    if a.shape != b.shape:
        return Compared(f"{part} ({list(a.shape)} here, {list(b.shape)} there)", np.inf, 1.0)
    if centred:
        a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    if not a.size:
        return Compared(part, 0.0, 1.0)
    return Compared(part, float(np.abs(a - b).max()), float(np.abs(a).max()))


def _are_probabilities(values: object) -> bool:
    """Some versions return the router's probabilities for its logits."""
    found = np.asarray(values)
    return bool((found >= 0).all() and np.allclose(found.sum(-1), 1, atol=1e-4))


def _clear(ours: LayerActivations, model: OurModel, index: int) -> np.ndarray:
    """Bool `[B, L]`, tokens whose experts are not chosen by rounding."""
    moe, router = model.config.moe, ours.router
    if router is None or moe is None:
        return np.ones(np.asarray(ours.output).shape[:2], bool)
    chosen = int(moe.router.active_experts(1.0))
    logits = np.sort(np.asarray(router), axis=-1)[..., ::-1]
    if chosen >= logits.shape[-1]:
        return np.ones(logits.shape[:2], bool)
    gap = logits[..., chosen - 1] - logits[..., chosen]
    return np.asarray(gap > TIE * np.abs(logits).max())
