"""The recipe: every choice that a conversion involves, as frozen dataclasses that gin fills in.

An *expert initialisation* answers with the operation for one matrix of an expert; a *router
initialisation* with the operation for a router kernel. Defaults are the paper's for language
(Komatsuzaki et al., ICLR 2023, arXiv 2212.05055).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Literal, Protocol, runtime_checkable

from upcycle_jax import checks
from upcycle_jax.checks import Hint
from upcycle_jax.layers.position_grids import Interpolation
from upcycle_jax.surgery import operations
from upcycle_jax.surgery.expert_inits import (
    CopyExperts,
    DropUpcycling,
    ExpertInit,
    FreshExperts,
    MoreExperts,
    NoisyCopies,
    ParentExperts,
    PartialCopies,
    QwenExperts,
    SplitExperts,
    VirtualGroups,
)
from upcycle_jax.surgery.operations import Operation

__all__ = [
    "CopyExperts",
    "DepthTile",
    "DropUpcycling",
    "FreshExperts",
    "GivenRouter",
    "MergeRecipe",
    "MoreExperts",
    "NoisyCopies",
    "NormalRouter",
    "ParentExperts",
    "PartialCopies",
    "QwenExperts",
    "Recipe",
    "SplitExperts",
    "UniformRouter",
    "VirtualGroups",
    "ZeroRouter",
]

COPIES = CopyExperts()
OPTIMIZER_STATES = ("reset", "dense_only", "tiled")
STEPS = ("keep", "keep_or_zero", "reset")


@runtime_checkable
class RouterInit(Protocol):
    """Chooses the operation for a router kernel."""

    def operation(self, path: str) -> Operation:
        """The operation for target leaf `path`, `[d, E]`."""


@dataclasses.dataclass(frozen=True)
class NormalRouter:
    """Router kernel N(0, std^2), no bias: std 0.02 in the paper and in Flaxformer.

    Attributes:
      std: standard deviation.
      repeat: how often every column stands in a row (virtual groups: the granularity).
    """

    std: checks.NotNegative = 0.02
    repeat: checks.Size = 1

    def __post_init__(self) -> None:
        checks.check_fields(self)

    def operation(self, path: str) -> Operation:
        return operations.RouterNormal(self.std, self.repeat)


@dataclasses.dataclass(frozen=True)
class UniformRouter:
    """Router kernel uniform, mean-subtracted, scaled to `std` (Drop-Upcycling's released code,
    there with 0.02).
    """

    std: checks.NotNegative = 0.02

    def __post_init__(self) -> None:
        checks.check_fields(self)

    def operation(self, path: str) -> Operation:
        return operations.RouterUniform(self.std)


@dataclasses.dataclass(frozen=True)
class ZeroRouter:
    """Router kernel of zeros: every expert equally likely; ties go to the lowest index, so add
    jitter or noise to leave them.
    """

    def operation(self, path: str) -> Operation:
        return operations.Zeros()


@dataclasses.dataclass(frozen=True)
class GivenRouter:
    """Router kernels from a `.npz` file that holds one array per router, under its path
    ('target/encoder/layers_1/mlp/router/...').
    """

    file: checks.PathText

    def __post_init__(self) -> None:
        checks.check_fields(self)

    def operation(self, path: str) -> Operation:
        return operations.Given(self.file, path)


@dataclasses.dataclass(frozen=True)
class DepthTile:
    """A deeper target from a shallower source: the paper's warm-start baseline (figure 5, "dense
    upcycling"; Gopher's depth tiling, Rae et al. 2021).

    Attributes:
      order: 'repeat' puts the copies of a layer side by side (0 0 1 1 2 2), 'cycle' repeats the
        stack (0 1 2 0 1 2).
      layers: source layer of each target layer instead, the same for all stacks.
    """

    order: str = "repeat"
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks.check_fields(self)
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.order not in ("repeat", "cycle"):
            raise ValueError(f"DepthTile.order is {self.order!r}: choose 'repeat' or 'cycle'")

    def source_layer(self, layer: int, num_source: int, num_target: int) -> int:
        """The source layer that target layer `layer` is taken from.

        Raises:
          ValueError: `layers` does not fit the numbers of layers.
        """
        if self.layers:
            if (
                len(self.layers) != num_target
                or max(self.layers) >= num_source
                or min(self.layers) < 0
            ):
                raise ValueError(
                    f"DepthTile.layers {self.layers} must name {num_target} source layers (one per"
                    f" target layer) from 0 to {num_source - 1}"
                )
            return self.layers[layer]
        return layer * num_source // num_target if self.order == "repeat" else layer % num_source


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a dense checkpoint becomes the target model.

    A shared expert of the target (`MoeConfig.shared_expert_mlp_dim`) is the dense MLP, or its first
    hidden units where it is narrower, unless `shared_expert` or `expert_init` says otherwise. A
    gate of it starts at zero: a factor of 1/2 for every token.

    Attributes:
      expert_init: what an expert starts as. Default: copies (paper, section 2.2).
      router_init: what a router starts as. Default: N(0, 0.02^2) (paper; Flaxformer).
      optimizer_state: 'reset' starts every slot at zero (paper, language: carrying it over brought
        nothing); 'dense_only' carries the slots of parameters that are not upcycled and starts
        those of experts at zero; 'tiled' gives every expert the MLP's slots too (paper, vision:
        figure 14). Router slots always start at zero.
      step: 'keep' lets the learning-rate schedule go on from the dense checkpoint's step (paper);
        'reset' starts at 0; 'keep_or_zero' does so where the source records no step, as Hugging
        Face folders; a number is that step (for sources that record none: the public T5 1.1
        checkpoints were trained for 1000000 steps).
      seed: seed of everything random.
      depth: how layers are repeated where the target is deeper than the source; None: numbers of
        layers must agree.
      drop: regular expressions of source leaves that may stay unused (one alone may be given as it
        is); they are listed in the plan.
      shared_expert: 'dense': a shared expert is the dense MLP. 'zeros': its `wo` is zero, so that
        it adds nothing at the start and learns from there.
      position_interpolation: how the positions of a vision transformer's patches are taken over
        where the target's images have another size (`position_grids.Interpolation`): 'bilinear'
        as big_vision, vit_jax and V-MoE, 'bicubic' as Hugging Face, 'bicubic_antialiased' as timm.
        The position of a class token stays. None: sizes must agree. Where this or `zeroed` is set,
        the source may have experts already: they are carried over as they are. Optimizer slots of
        interpolated positions start at zero.
      zeroed: regular expressions of the model's parameters that start at zero, whatever the source
        has, as a head for other classes: 'head/.*'. What the source has in their place is dropped;
        their optimizer slots start at zero.
    """

    expert_init: Annotated[
        ExpertInit, Hint("@CopyExperts() or another initialisation of experts")
    ] = COPIES
    router_init: Annotated[RouterInit, Hint("@NormalRouter() or another router's")] = NormalRouter()
    optimizer_state: str = "reset"
    step: str | checks.CountOrZero = "keep"
    seed: checks.Seed = 0
    depth: DepthTile | None = None
    drop: str | tuple[str, ...] = ()
    shared_expert: Literal["dense", "zeros"] = dataclasses.field(
        default="dense", metadata=checks.ADDED
    )
    position_interpolation: Interpolation | None = dataclasses.field(
        default=None, metadata=checks.ADDED
    )
    zeroed: str | tuple[str, ...] = dataclasses.field(default=(), metadata=checks.ADDED)

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.position_interpolation is not None and isinstance(
            self.expert_init, MoreExperts | ParentExperts
        ):
            raise ValueError(
                f"Recipe.position_interpolation={self.position_interpolation!r} is for one source"
                f" at a time, without {type(self.expert_init).__name__}: leave it None, and change"
                " the image size of the result afterwards"
            )
        if isinstance(self.router_init, ExpertInit):
            raise ValueError(
                f"Recipe.router_init is {self.router_init!r}, which initialises experts: write"
                " @NormalRouter() or another router's, and Recipe.expert_init for this"
            )
        self._set_patterns("drop")
        self._set_patterns("zeroed")
        if self.optimizer_state not in OPTIMIZER_STATES:
            raise ValueError(
                f"Recipe.optimizer_state is {self.optimizer_state!r}: choose one of"
                f" {OPTIMIZER_STATES}"
            )
        if self.step not in STEPS and not (isinstance(self.step, int) and self.step >= 0):
            raise ValueError(
                f"Recipe.step is {self.step!r}: choose one of {STEPS} or a number of steps"
            )
        if isinstance(self.expert_init, SplitExperts) and self.shared_expert != "dense":
            raise ValueError(
                "SplitExperts gives the shared expert its part of the dense MLP: leave"
                f" Recipe.shared_expert at 'dense', got {self.shared_expert!r}"
            )
        if isinstance(self.expert_init, MoreExperts) and (
            self.router_init != NormalRouter() or self.depth is not None
        ):
            raise ValueError(
                "MoreExperts takes routers and layers from the source: leave Recipe.router_init and"
                " Recipe.depth out"
            )
        if self.optimizer_state == "tiled" and not self.expert_init.keeps_shape:
            raise ValueError(
                "optimizer_state='tiled' needs experts of the dense MLP's shape, which"
                f" {type(self.expert_init).__name__} does not give: choose 'dense_only' or 'reset'"
            )

    def _set_patterns(self, name: str) -> None:
        """Makes a field a tuple of regular expressions.

        Raises:
          ValueError: one is none.
        """
        given = getattr(self, name)
        patterns = (given,) if isinstance(given, str) else tuple(given)
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"Recipe.{name}: {pattern!r} is no regular expression ({error}); a dot is"
                    " written \\."
                ) from None
        object.__setattr__(self, name, patterns)


@dataclasses.dataclass(frozen=True)
class MergeRecipe:
    """How an upcycled checkpoint becomes dense again.

    A shared expert's hidden units are put after those of the experts' mean (or of the chosen one):
    the dense MLPs are then as wide as both together, and give the sum of both. With a gate, whose
    weight every token has its own of, it cannot be merged.

    Attributes:
      how: 'mean' of the experts, 'weighted' mean with `weights`, or one 'expert'.
      weights: for 'weighted': layer path ('encoder/layers_1') -> weight per expert, e.g. mean
        router probabilities (`function_check.router_weights`).
      expert: for 'expert': which one.
      optimizer_state: 'reset' or 'dense_only' (slots of what was never upcycled).
      step: 'keep', 'keep_or_zero' or 'reset', as of `Recipe`.
    """

    how: str = "mean"
    weights: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    expert: checks.CountOrZero = 0
    optimizer_state: str = "reset"
    step: str = "keep"
    seed: checks.Seed = 0

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.how not in ("mean", "weighted", "expert"):
            raise ValueError(
                f"MergeRecipe.how is {self.how!r}: choose 'mean', 'weighted' or 'expert'"
            )
        for layer, weights in self.weights.items():
            if not all(weight >= 0 for weight in weights) or not sum(weights) > 0:
                raise ValueError(
                    f"MergeRecipe.weights of {layer!r} are {tuple(weights)}: give weights of 0 or"
                    " more, not all 0"
                )
        if self.optimizer_state not in ("reset", "dense_only"):
            raise ValueError(
                f"MergeRecipe.optimizer_state is {self.optimizer_state!r}: choose 'reset' or"
                " 'dense_only'"
            )
        if self.step not in STEPS:
            raise ValueError(f"MergeRecipe.step is {self.step!r}: choose one of {STEPS}")

    @property
    def lacks_weights(self) -> bool:
        """Whether weights are still to be measured."""
        return self.how == "weighted" and not self.weights


PARTS: tuple[type, ...] = tuple(globals()[name] for name in __all__)
"""Every class a recipe may be made of: `from_json` rebuilds from them."""
