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
from upcycle_jax.layers.mlp import hidden_axis
from upcycle_jax.surgery import operations
from upcycle_jax.surgery.operations import Operation
from upcycle_jax.surgery.operations.hidden_units import virtual_group_scale
from upcycle_jax.trees import LeafSpec

__all__ = [
    "CopyExperts",
    "DepthTile",
    "DropUpcycling",
    "FreshExperts",
    "GivenRouter",
    "MergeRecipe",
    "NoisyCopies",
    "NormalRouter",
    "ParentExperts",
    "PartialCopies",
    "QwenExperts",
    "Recipe",
    "UniformRouter",
    "VirtualGroups",
    "ZeroRouter",
]

OPTIMIZER_STATES = ("reset", "dense_only", "tiled")
STEPS = ("keep", "reset")


@runtime_checkable
class ExpertInit(Protocol):
    """Chooses the operation for a matrix of an expert.

    Attributes:
      keeps_shape: an expert has the dense MLP's shape, so optimizer slots can be tiled with it.
      preserves_function: every expert computes the dense MLP (see `function_check`).
    """

    keeps_shape: bool
    preserves_function: bool

    def operation(self, path: str, target: LeafSpec) -> Operation:
        """The operation for target leaf `path`, `[E, ...]`."""


@runtime_checkable
class RouterInit(Protocol):
    """Chooses the operation for a router kernel."""

    def operation(self, path: str) -> Operation:
        """The operation for target leaf `path`, `[d, E]`."""


@dataclasses.dataclass(frozen=True)
class CopyExperts:
    """Every expert is a copy of the dense MLP: the paper's choice (section 2.2), and the best of
    those it compares.
    """

    keeps_shape = True
    preserves_function = True

    def operation(self, path: str, target: LeafSpec) -> Operation:
        return operations.Tile()


@dataclasses.dataclass(frozen=True)
class NoisyCopies:
    """Copies plus independent normal noise per expert (paper, appendix B: little noise changes
    nothing, much noise harms).

    Attributes:
      std: standard deviation of the noise, or its multiple of each matrix's own standard deviation
        where `relative`.
      relative: see `std`.
    """

    std: checks.NotNegative = 0.01
    relative: bool = False
    keeps_shape = True
    preserves_function = False

    def __post_init__(self):
        checks.check_fields(self)

    def operation(self, path: str, target: LeafSpec) -> Operation:
        return operations.AddNoise(self.std, self.relative)


@dataclasses.dataclass(frozen=True)
class FreshExperts:
    """Experts initialised as if the model were new (paper, figure 13: needs most of the extra
    budget to catch up with copies).
    """

    keeps_shape = True
    preserves_function = False

    def operation(self, path: str, target: LeafSpec) -> Operation:
        return operations.RandomExperts()


@dataclasses.dataclass(frozen=True)
class PartialCopies:
    """Some experts are copies, the others new (paper, appendix B: worse than copying all).

    Attributes:
      copied: experts to copy: a count (the first ones) or explicit indices.
    """

    copied: checks.CountOrZero | tuple[checks.CountOrZero, ...] = 1
    keeps_shape = True
    preserves_function = False

    def __post_init__(self):
        checks.check_fields(self)
        if not isinstance(self.copied, int) and len(set(self.copied)) != len(self.copied):
            raise ValueError(
                f"PartialCopies.copied is {tuple(self.copied)}: name every expert once"
            )

    def operation(self, path: str, target: LeafSpec) -> Operation:
        return operations.RandomExperts(
            tuple(range(self.copied)) if isinstance(self.copied, int) else tuple(self.copied)
        )


@dataclasses.dataclass(frozen=True)
class DropUpcycling:
    """Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261): redraw a share of every expert's
    hidden units from the statistics of what they replace.

    Attributes:
      ratio: r, the share that is redrawn; the paper's best is 0.5, and 0 gives plain copies.
      per_matrix_indices: choose the units of each matrix by itself, as the released code does; by
        default one set per expert, as the paper writes it.
      shuffle: permute the hidden units of every expert first (released code; leaves the function as
        it is).
      noise_std: add N(0, noise_std^2) to the chosen units instead of redrawing them: the paper's
        "random noise upcycling" baseline uses 0.02.
    """

    ratio: checks.Share = 0.5
    per_matrix_indices: bool = False
    shuffle: bool = False
    noise_std: checks.NotNegative | None = None
    keeps_shape = True

    def __post_init__(self):
        checks.check_fields(self)

    @property
    def preserves_function(self) -> bool:
        """Only where nothing is redrawn."""
        return self.ratio == 0

    def operation(self, path: str, target: LeafSpec) -> Operation:
        if self.ratio == 0 and not self.shuffle:
            return operations.Tile()
        axis = hidden_axis(path, target.axes, len(target.shape) - 1)
        return operations.HiddenUnits(
            axis,
            self.ratio,
            shuffle=self.shuffle,
            per_matrix=self.per_matrix_indices,
            noise_std=self.noise_std,
        )


@dataclasses.dataclass(frozen=True)
class VirtualGroups:
    """Granular experts: the MLP cut into G shards, expert e being shard e mod G (He et al. 2024,
    "Upcycling LLMs into MoE", arXiv 2410.07524).

    Pair it with `NormalRouter(repeat=G)`: the G shards of a copy tie exactly, and with T a multiple
    of G top-T selects whole sets.

    Attributes:
      granularity: G. The model's EXPERT_MLP_DIM must be the dense intermediate size / G.
      top_k: T, experts per token, for the weight scale.
      softmax_order: 'before_top_k' or 'after_top_k', for the weight scale.
      scale_weights: apply the paper's weight scale (better than without in all its comparisons).
      gated: the MLP has two input matrices (T5 1.1: yes).
    """

    granularity: checks.Size = 8
    top_k: checks.Size = 8
    softmax_order: str = "before_top_k"
    scale_weights: bool = True
    gated: bool = True
    keeps_shape = False
    preserves_function = False

    def __post_init__(self):
        checks.check_fields(self)
        if self.softmax_order not in ("before_top_k", "after_top_k"):
            raise ValueError(
                f"VirtualGroups.softmax_order is {self.softmax_order!r}: choose 'before_top_k' or"
                " 'after_top_k'"
            )

    def operation(self, path: str, target: LeafSpec) -> Operation:
        experts, axis = (
            target.shape[0],
            hidden_axis(path, target.axes, len(target.shape) - 1),
        )
        if experts % self.granularity:
            raise ValueError(
                f"{path}: {experts} experts do not form groups of {self.granularity}: choose"
                " NUM_EXPERTS as a multiple"
            )
        scale = 1.0
        if self.scale_weights:
            scale = virtual_group_scale(
                experts=experts,
                granularity=self.granularity,
                top_k=self.top_k,
                softmax_first=self.softmax_order == "before_top_k",
                gated=self.gated,
            )
        return operations.HiddenUnits(axis, scale=scale, groups=self.granularity)


@dataclasses.dataclass(frozen=True)
class QwenExperts:
    """Fine-grained experts of any width: repeat the MLP, shuffle each repetition, slice, redraw a
    share (Qwen2 technical report, arXiv 2407.10671, 2.2.2).

    The report says that half of every expert's parameters is redrawn and not from what
    distribution; here whole hidden units are redrawn, from the mean and deviation of the slice that
    they replace.

    Attributes:
      redraw: share of the hidden units of each expert that is redrawn.
      shuffle: permute the intermediate axis inside each repetition.
    """

    redraw: checks.Share = 0.5
    shuffle: bool = True
    keeps_shape = False
    preserves_function = False

    def __post_init__(self):
        checks.check_fields(self)

    def operation(self, path: str, target: LeafSpec) -> Operation:
        axis = hidden_axis(path, target.axes, len(target.shape) - 1)
        return operations.HiddenUnits(axis, self.redraw, shuffle=self.shuffle)


@dataclasses.dataclass(frozen=True)
class ParentExperts:
    """Experts from several dense checkpoints (Branch-Train-MiX, Sukhbaatar et al. 2024, arXiv
    2403.07816).

    Attributes:
      parents: the parent of each expert, by position in the list of source checkpoints.
      rest: 'mean' averages everything else over the parents, as the paper does; an integer takes it
        from that parent.
      shared: the parent of the shared expert, where the model has one; None: as `rest`. Nexus
        (Gritsch et al. 2024, arXiv 2408.15901) takes the model that the specialised parents were
        branched from.
    """

    parents: tuple[checks.CountOrZero, ...]
    rest: Literal["mean"] | checks.CountOrZero = "mean"
    shared: checks.CountOrZero | None = None
    keeps_shape = True
    preserves_function = False

    def __post_init__(self):
        checks.check_fields(self)
        object.__setattr__(self, "parents", tuple(self.parents))

    def operation(self, path: str, target: LeafSpec) -> Operation:
        return operations.FromParents(self.parents)


@dataclasses.dataclass(frozen=True)
class NormalRouter:
    """Router kernel N(0, std^2), no bias: std 0.02 in the paper and in Flaxformer.

    Attributes:
      std: standard deviation.
      repeat: how often every column stands in a row (virtual groups: the granularity).
    """

    std: checks.NotNegative = 0.02
    repeat: checks.Size = 1

    def __post_init__(self):
        checks.check_fields(self)

    def operation(self, path: str) -> Operation:
        return operations.RouterNormal(self.std, self.repeat)


@dataclasses.dataclass(frozen=True)
class UniformRouter:
    """Router kernel uniform, mean-subtracted, scaled to `std` (Drop-Upcycling's released code,
    there with 0.02).
    """

    std: checks.NotNegative = 0.02

    def __post_init__(self):
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

    def __post_init__(self):
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
    hidden units where it is narrower.

    Attributes:
      expert_init: what an expert starts as. Default: copies (paper, section 2.2).
      router_init: what a router starts as. Default: N(0, 0.02^2) (paper; Flaxformer).
      optimizer_state: 'reset' starts every slot at zero (paper, language: carrying it over brought
        nothing); 'dense_only' carries the slots of parameters that are not upcycled and starts
        those of experts at zero; 'tiled' gives every expert the MLP's slots too (paper, vision:
        figure 14). Router slots always start at zero.
      step: 'keep' lets the learning-rate schedule go on from the dense checkpoint's step (paper);
        'reset' starts at 0; a number is that step (for sources that record none: the public T5 1.1
        checkpoints were trained for 1000000 steps).
      seed: seed of everything random.
      depth: how layers are repeated where the target is deeper than the source; None: numbers of
        layers must agree.
      drop: regular expressions of source leaves that may stay unused (one alone may be given as it
        is); they are listed in the plan.
    """

    expert_init: Annotated[
        ExpertInit, Hint("@CopyExperts() or another initialisation of experts")
    ] = CopyExperts()
    router_init: Annotated[RouterInit, Hint("@NormalRouter() or another router's")] = NormalRouter()
    optimizer_state: str = "reset"
    step: str | checks.CountOrZero = "keep"
    seed: checks.Seed = 0
    depth: DepthTile | None = None
    drop: str | tuple[str, ...] = ()

    def __post_init__(self):
        checks.check_fields(self)
        if isinstance(self.router_init, ExpertInit):
            raise ValueError(
                f"Recipe.router_init is {self.router_init!r}, which initialises experts: write"
                " @NormalRouter() or another router's, and Recipe.expert_init for this"
            )
        object.__setattr__(
            self, "drop", (self.drop,) if isinstance(self.drop, str) else tuple(self.drop)
        )
        for pattern in self.drop:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"Recipe.drop: {pattern!r} is no regular expression ({error}); a dot is"
                    " written \\."
                ) from None
        if self.optimizer_state not in OPTIMIZER_STATES:
            raise ValueError(
                f"Recipe.optimizer_state is {self.optimizer_state!r}: choose one of"
                f" {OPTIMIZER_STATES}"
            )
        if self.step not in STEPS and not (isinstance(self.step, int) and self.step >= 0):
            raise ValueError(
                f"Recipe.step is {self.step!r}: choose one of {STEPS} or a number of steps"
            )
        if self.optimizer_state == "tiled" and not self.expert_init.keeps_shape:
            raise ValueError(
                "optimizer_state='tiled' needs experts of the dense MLP's shape, which"
                f" {type(self.expert_init).__name__} does not give: choose 'dense_only' or 'reset'"
            )


@dataclasses.dataclass(frozen=True)
class MergeRecipe:
    """How an upcycled checkpoint becomes dense again.

    Attributes:
      how: 'mean' of the experts, 'weighted' mean with `weights`, or one 'expert'.
      weights: for 'weighted': layer path ('encoder/layers_1') -> weight per expert, e.g. mean
        router probabilities (`function_check.router_weights`).
      expert: for 'expert': which one.
      optimizer_state: 'reset' or 'dense_only' (slots of what was never upcycled).
      step: 'keep' or 'reset'.
    """

    how: str = "mean"
    weights: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    expert: checks.CountOrZero = 0
    optimizer_state: str = "reset"
    step: str = "keep"
    seed: checks.Seed = 0

    def __post_init__(self):
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
