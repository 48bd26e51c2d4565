"""Experts made of a selection of the dense MLP's hidden units: Drop-Upcycling, virtual groups,
Qwen-style.

All three are the same two steps: take hidden units `index[e]` of the dense matrix along its
intermediate axis, scale, then redraw a part of them. They differ in which units, and that choice
is made on the host from integers (`prepare`).

Legend: E experts, f dense hidden units, w hidden units of one expert.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from upcycle_jax.surgery.keys import KeySource, draw, permutation
from upcycle_jax.surgery.operations.base import Expectation, Operation, Reach

FIRST_REDRAW = 2**31
"""Permutations from this number on choose redrawn units; those below shuffle the copies of the
MLP.
"""


@dataclasses.dataclass(frozen=True)
class HiddenUnits(Operation):
    """Takes, scales and partly redraws hidden units of one matrix of an MLP.

    Attributes:
      axis: intermediate axis of the dense matrix (1 of wi `[d, f]`, 0 of wo `[f, d]`).
      redraw: share r of the expert's hidden units to redraw, floor(r * w) of them, from N(mean,
        std^2) of the very slice that is replaced (one scalar each per expert and matrix).
      shuffle: permute the hidden units first, alike in all matrices of the MLP, which leaves the
        MLP's function as it is.
      per_matrix: choose the redrawn units of each matrix by itself; otherwise one set per expert
        for all its matrices.
      noise_std: add N(0, noise_std^2) to the chosen units instead of replacing them.
      scale: factor on every value that is kept or redrawn.
      groups: G, where an expert must be exactly one of G equal shards of the dense MLP; 0: any
        width.
    """

    axis: int
    redraw: float = 0.0
    shuffle: bool = False
    per_matrix: bool = False
    noise_std: float | None = None
    scale: float = 1.0
    groups: int = 0

    stacked: ClassVar[bool] = True
    reach: ClassVar[Reach] = Reach.WHOLE
    draws: ClassVar[bool] = True
    reads_statistics: ClassVar[bool] = True

    @property
    def name(self) -> str:
        parts = [f"shard of {self.groups}" if self.groups else "units"]
        if self.shuffle:
            parts.append("shuffled")
        if self.redraw:
            what = "per matrix" if self.per_matrix else "per expert"
            parts.append(
                f"{self.redraw:g}"
                f" {'redrawn' if self.noise_std is None else f'+ noise({self.noise_std:g})'} {what}"
            )
        if self.scale != 1.0:
            parts.append(f"x{self.scale:.4g}")
        return ", ".join(parts)

    @property
    def keeps_values(self) -> bool:
        return not self.redraw and self.scale == 1.0

    def result_shape(self, sources, target):
        dense = tuple(sources[0])
        if self.axis >= len(dense) or len(target) != len(dense) + 1:
            raise ValueError(
                f"an MLP kernel is needed, the dense leaf has shape {list(dense)} and the model's"
                f" {list(target)}"
            )
        width = target[1 + self.axis]
        if self.groups and width * self.groups != dense[self.axis]:
            raise ValueError(
                f"granularity {self.groups} cuts the dense MLP's {dense[self.axis]} hidden units"
                f" into shards of {dense[self.axis] / self.groups:g}, the model's experts have"
                f" {width}: set EXPERT_MLP_DIM to the dense size divided by the granularity"
            )
        return (target[0], *dense[: self.axis], width, *dense[self.axis + 1 :])

    def prepare(self, sources, keys, target):
        dense = sources[0]
        experts, width = target[0], target[1 + self.axis]
        index = hidden_unit_index(
            keys, experts=experts, width=width, hidden=dense.shape[self.axis], shuffle=self.shuffle
        )
        aux = {
            "index": index,
            "redrawn": np.zeros((experts, width), bool),
            "mean": np.zeros(experts, np.float32),
            "std": np.zeros(experts, np.float32),
        }
        count = math.floor(self.redraw * width)
        if not count:
            return aux
        moved = np.moveaxis(dense, self.axis, 0)
        for expert in range(experts):
            number = FIRST_REDRAW + expert
            chosen = permutation(
                keys.seed, keys.leaf if self.per_matrix else keys.layer, number, width
            )[:count]
            aux["redrawn"][expert, chosen] = True
            if self.noise_std is not None:
                aux["std"][expert] = self.noise_std
            else:
                slice_ = moved[index[expert, np.sort(chosen)]]
                aux["mean"][expert] = np.mean(slice_, dtype=np.float64)
                aux["std"][expert] = np.std(slice_.astype(np.float64))
        return aux

    def make(self, sources, aux, keys, expert, shape):
        values = np.take(sources[0], aux["index"][expert], axis=self.axis)
        if not aux["redrawn"][expert].any() and self.scale == 1.0:
            return values
        values = values.astype(np.float32, copy=False)
        if aux["redrawn"][expert].any():
            drawn = draw("normal", keys.seed, keys.leaf, expert, values.shape) * aux["std"][expert]
            drawn += aux["mean"][expert]
            if self.noise_std is not None:
                drawn += values
            form = [1] * values.ndim
            form[self.axis] = -1
            np.copyto(values, drawn, where=aux["redrawn"][expert].reshape(form))
        if self.scale != 1.0:
            values *= np.float32(self.scale)
        return values

    def expectation(self, sources, aux, expert, shape):
        values = np.take(sources[0], aux["index"][expert], axis=self.axis)
        if self.scale != 1.0:
            values = values.astype(np.float32) * np.float32(self.scale)
        form = [1] * values.ndim
        form[self.axis] = -1
        kept = np.broadcast_to(~aux["redrawn"][expert].reshape(form), values.shape)
        mean, std = (float(aux[name][expert]) * self.scale for name in ("mean", "std"))
        return Expectation(
            values=values, kept=kept, mean=mean, std=std, additive=self.noise_std is not None
        )


def hidden_unit_index(
    keys: KeySource, *, experts: int, width: int, hidden: int, shuffle: bool
) -> np.ndarray:
    """Which dense hidden unit each hidden unit of each expert is taken from, int32 `[E, w]`.

    The dense MLP is repeated ceil(E * w / f) times, every repetition shuffled by itself where
    asked, and cut into experts of w units in order: expert e holds units `e * w ... (e + 1) * w -
    1` of the row, the remainder is discarded (Qwen2 technical report, section 2.2.2). With w = f
    every expert is one (shuffled) copy; with f = G * w and no shuffling, expert e is shard e mod G
    (NVIDIA's virtual groups).
    """
    copies = -(-experts * width // hidden)
    row = [
        (
            permutation(keys.seed, keys.layer, c, hidden)
            if shuffle
            else np.arange(hidden, dtype=np.int32)
        )
        for c in range(copies)
    ]
    return np.concatenate(row)[: experts * width].reshape(experts, width)


def virtual_group_scale(
    *, experts: int, granularity: int, top_k: int, softmax_first: bool, gated: bool
) -> float:
    """NVIDIA's factor on all expert matrices (He et al. 2024, arXiv 2410.07524, section 3.2;
    Megatron-LM's `upcycling_utils`).

    The output of the MoE layer falls short of the dense MLP's by a deficit at the start. Spread
    over three matrices of a gated MLP (or over squared units) the factor is deficit^(1/3), over two
    matrices of a plain one deficit^(1/2).

    Args:
      experts: all experts of the layer, E * G in the paper's notation.
      granularity: G, shards per dense MLP.
      top_k: T, experts per token.
      softmax_first: softmax over all experts, then top-k.
      gated: the MLP has two input matrices.

    >>> virtual_group_scale(experts=64, granularity=8, top_k=8, softmax_first=True, gated=True)
    4.0
    """
    deficit = virtual_group_deficit(
        experts=experts, granularity=granularity, top_k=top_k, softmax_first=softmax_first
    )
    return round(deficit ** (1 / 3 if gated else 1 / 2), 12)


def virtual_group_deficit(
    *, experts: int, granularity: int, top_k: int, softmax_first: bool
) -> float:
    """What an MoE layer of virtual groups gives is the dense MLP's output divided by this at the
    start: E G^2 / T with softmax before top-k (E G experts, each of the G shards weighted by about
    1 / (E G), T / G sets selected), and G with top-k before softmax (weights that sum to 1 over G
    shards). Arguments as of `virtual_group_scale`.

    >>> virtual_group_deficit(experts=64, granularity=8, top_k=8, softmax_first=False)
    8.0
    """
    if not softmax_first:
        return float(granularity)
    return experts / granularity * granularity**2 / top_k
