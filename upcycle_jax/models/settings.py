"""The models that a configuration stands for besides its own, whatever the family: the dense one,
the one without dropout, the one that predicts.
"""

import dataclasses
from typing import Any, ClassVar, Self

import jax.numpy as jnp

from upcycle_jax.moe.config import MoeSettings


class StackedSettings:
    """What the configurations of all families derive in the same way: the base of their frozen
    dataclasses, which have the fields that are named here.

    Attributes:
      mlp_dim: hidden size of the dense MLP.
      dropout_rate: of the dense parts.
      dtype: dtype of activations.
      moe: the MoE layers, or None for a dense model.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    mlp_dim: int
    dropout_rate: float
    dtype: str
    moe: MoeSettings | None

    @property
    def expert_mlp_dim(self) -> int:
        """Hidden size of one expert."""
        return (self.moe and self.moe.expert_mlp_dim) or self.mlp_dim

    @property
    def expert_dropout_rate(self) -> float:
        """Dropout rate inside experts."""
        rate = self.moe.expert_dropout_rate if self.moe else None
        return self.dropout_rate if rate is None else rate

    @property
    def activation_dtype(self) -> jnp.dtype:
        """`dtype` as a dtype."""
        return jnp.dtype(self.dtype)

    @property
    def dense(self) -> Self:
        """The same model without MoE layers: what it is upcycled from."""
        return dataclasses.replace(self, moe=None)

    @property
    def without_dropout(self) -> Self:
        """The same model with every dropout rate 0."""
        moe = self.moe and dataclasses.replace(self.moe, expert_dropout_rate=0.0)
        return dataclasses.replace(self, dropout_rate=0.0, moe=moe)

    @property
    def unrolled(self) -> Self:
        """The same model run layer by layer, nothing computed twice: for code that looks into
        single layers.
        """
        return dataclasses.replace(self, remat_policy="none", scan_layers=False)

    def in_float32(self, *, renormalised: bool) -> Self:
        """The same model, unrolled and in float32; see `LayerwiseModel.in_float32`."""
        moe = self.moe.like_dense if self.moe is not None and renormalised else self.moe
        return dataclasses.replace(self.unrolled, moe=moe, dtype="float32")

    @property
    def for_inference(self) -> Self:
        """The same model as it predicts and scores: see `MoeSettings.inference_routing`."""
        if self.moe is None or self.moe.inference_routing != "independent":
            return self
        moe = dataclasses.replace(self.moe, independent=True, t5x_mode=False)
        return dataclasses.replace(self, moe=moe)
