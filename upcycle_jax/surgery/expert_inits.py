"""What experts start as: the choices of `Recipe.expert_init`."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

from upcycle_jax import checks
from upcycle_jax.layers.mlp import has_hidden_axis, hidden_axis
from upcycle_jax.surgery import operations
from upcycle_jax.surgery.operations import Operation
from upcycle_jax.surgery.operations.hidden_units import (
    virtual_group_deficit,
    virtual_group_scale,
)
from upcycle_jax.trees import LeafSpec


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
        if (self.ratio == 0 and not self.shuffle) or not has_hidden_axis(path):
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
    of G top-T selects whole sets. With `scaled='output'` and `softmax_order='after_top_k'` (the
    router's, or renormalised weights) the result then computes the dense model exactly.

    Attributes:
      granularity: G. The model's EXPERT_MLP_DIM must be the dense intermediate size / G.
      top_k: T, experts per token, for the weight scale.
      softmax_order: 'before_top_k' or 'after_top_k', for the weight scale; with renormalised
        weights 'after_top_k' is the right one, whatever the router's.
      scale_weights: apply the paper's weight scale (better than without in all its comparisons).
      gated: the MLP has two input matrices (T5 1.1: yes).
      scaled: which matrices carry the factor: 'all' with its cube root (square root where not
        `gated`), as the paper does, which activations that are not linear make inexact; 'output'
        for `wo` alone with the whole factor.
    """

    granularity: checks.Size = 8
    top_k: checks.Size = 8
    softmax_order: str = "before_top_k"
    scale_weights: bool = True
    gated: bool = True
    scaled: Literal["all", "output"] = dataclasses.field(default="all", metadata=checks.ADDED)
    keeps_shape = False

    @property
    def preserves_function(self) -> bool:
        """Where `wo` alone carries the factor G, if routers choose whole groups."""
        if not self.scale_weights:
            return self.granularity == 1
        whole = self.scaled == "output" or self.granularity == 1
        return whole and self.softmax_order == "after_top_k"

    def __post_init__(self):
        checks.check_fields(self)
        if self.softmax_order not in ("before_top_k", "after_top_k"):
            raise ValueError(
                f"VirtualGroups.softmax_order is {self.softmax_order!r}: choose 'before_top_k' or"
                " 'after_top_k'"
            )

    def operation(self, path: str, target: LeafSpec) -> Operation:
        if not has_hidden_axis(path):  # Weights of a group sum to those of the dense MLP.
            return operations.Tile()
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
        if self.scale_weights and self.scaled == "all":
            scale = virtual_group_scale(
                experts=experts,
                granularity=self.granularity,
                top_k=self.top_k,
                softmax_first=self.softmax_order == "before_top_k",
                gated=self.gated,
            )
        elif self.scale_weights and path.split("/")[-2] == "wo":
            scale = virtual_group_deficit(
                experts=experts,
                granularity=self.granularity,
                top_k=self.top_k,
                softmax_first=self.softmax_order == "before_top_k",
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
        if not has_hidden_axis(path):
            return operations.Tile()
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
class SplitExperts:
    """Routed experts and shared expert divide the dense MLP: every routed expert holds its first
    EXPERT_MLP_DIM hidden units, the shared expert the others.

    With combine weights that sum to 1 the result computes the dense model exactly, and with K = 1
    it costs what the dense model costs. A gate of the shared expert starts at zero, which is a
    factor of 1/2 for every token: `wo` is doubled for it. The two widths must add up to that of the
    dense MLP.
    """

    keeps_shape = False
    preserves_function = True

    def operation(self, path: str, target: LeafSpec) -> Operation:
        if not has_hidden_axis(path):
            return operations.Tile()
        axis = hidden_axis(path, target.axes, len(target.shape) - 1)
        return operations.TileFirstUnits(axis, target.shape[1 + axis])

    def shared_operation(
        self, path: str, target: LeafSpec, *, experts: LeafSpec, gated: bool
    ) -> Operation:
        """The operation for a leaf of the shared expert.

        Args:
          path: of the leaf.
          target: its spec.
          experts: the spec of the same leaf of routed experts, `[E, ...]`.
          gated: the shared expert has a gate.
        """
        if not has_hidden_axis(path):  # The routed experts have that bias.
            return operations.Zeros()
        axis = hidden_axis(path, target.axes, len(target.shape))
        doubled = gated and path.split("/")[-2:] == ["wo", "kernel"]
        return operations.LastUnits(axis, experts.shape[1 + axis], 2.0 if doubled else 1.0)


@dataclasses.dataclass(frozen=True)
class MoreExperts:
    """A larger MoE from an MoE: every expert of every layer several times, or cut into as many
    parts, and with it its column of the router; everything else as it is.

    With c copies and K the source's, the result computes the source exactly where it chooses c * K
    experts per token: those are all copies of the K best, each with a share of the weight. With
    fewer, e.g. K as before, it computes what the source would compute with K / c experts per token,
    and the difference is measured. Copies that are chosen together learn alike until something
    tells them apart: `router_noise` does.

    Attributes:
      copies: c, experts of the result for each one of the source.
      split: a copy is one of c parts of its expert, with `wo` multiplied by c: EXPERT_MLP_DIM is
        the source's divided by c. With c * K experts per token a token then costs what it did.
      router_noise: deviation of normal noise on the columns of all copies but the first; 0 for
        none.
      selected: K of the result where no model file says it; None for c times the source's.
      selected_before: K of the source where its checkpoint does not state it.
    """

    copies: checks.Size = 2
    split: bool = False
    router_noise: checks.NotNegative = 0.0
    selected: checks.Size | None = None
    selected_before: checks.Size | None = None
    preserves_function = True

    def __post_init__(self):
        checks.check_fields(self)

    @property
    def keeps_shape(self) -> bool:
        """Only where experts stay whole."""
        return not self.split

    def operation(self, path: str, target: LeafSpec) -> Operation:
        if not self.split or not has_hidden_axis(path):
            return operations.CopiesOfExperts(self.copies)
        axis = hidden_axis(path, target.axes, len(target.shape) - 1)
        is_output = path.split("/")[-2:] == ["wo", "kernel"]
        scale = float(self.copies) if is_output else 1.0
        return operations.CopiesOfExperts(self.copies, axis, target.shape[1 + axis], scale)

    def router_operation(self) -> Operation:
        """The operation for a router's kernel `[d, E]`."""
        return operations.CopiesOfColumns(self.copies, self.router_noise)
