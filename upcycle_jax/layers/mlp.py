"""The (gated) MLP: the dense block of a transformer layer, and, lifted over an expert axis, the
expert.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import projection
from upcycle_jax.partitioning import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "linear": lambda x: x,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""By name. 'gelu' is the tanh form, as in T5 1.1 and T5X; 'gelu_exact' the one with erf;
'quick_gelu' CLIP's, with a sigmoid."""


def are_activations(value: object) -> bool:
    """Whether a value out of a file names the activations of an MLP."""
    names = value if isinstance(value, list | tuple) else ()
    return bool(names) and all(isinstance(name, str) and name in ACTIVATIONS for name in names)


def input_kernel_names(activations: Sequence[str]) -> tuple[str, ...]:
    """Names of the kernels before the hidden axis, one per activation: `wi`, or `wi_0`, `wi_1`, ...
    where there are several.
    """
    return ("wi",) if len(activations) == 1 else tuple(f"wi_{i}" for i in range(len(activations)))


def has_hidden_axis(path: str) -> bool:
    """Whether a parameter of an MLP has a value for each hidden unit: all but the bias of `wo`."""
    return path.split("/")[-2:] != ["wo", "bias"]


def hidden_axis(path: str, axes_of: Sequence[str | None], rank: int) -> int:
    """The hidden axis of a parameter of an MLP that has one: the one so named, else the first of
    `wo` and the last of the others. Of an expert's parameter, the axis within one expert.

    Args:
      path: of the parameter, e.g. 'mlp/wo/kernel'.
      axes_of: its logical axes, None where unknown.
      rank: dimensions of the parameter (of one expert).
    """
    for name in (axes.EXPERT_MLP, axes.MLP):
        if name in axes_of:
            return list(axes_of).index(name) - (len(axes_of) - rank)
    return 0 if path.split("/")[-2:-1] == ["wo"] else rank - 1


def gated(products: Sequence[jax.Array], activations: Sequence[str]) -> jax.Array:
    """Hidden activations: each product with an input kernel through its activation, multiplied. All
    shapes are the same.
    """
    return functools.reduce(
        jnp.multiply, (ACTIVATIONS[name](x) for x, name in zip(products, activations, strict=True))
    )


class MlpBlock(nn.Module):
    """`(act_0(x wi_0) * act_1(x wi_1) * ...) wo`; with a single activation the input kernel is
    named `wi`, as in T5 1.0.

    Attributes:
      hidden: size of the hidden axis.
      activations: names from `ACTIVATIONS`, one per input kernel.
      hidden_axis: logical axis of the kernels' hidden dimension.
      activation_axes: logical axes of the hidden activations, for their sharding.
      dropout_rate: dropout of the hidden activations.
      dtype: dtype of the computation.
      use_bias: every kernel has a `bias` beside it, which is added to its product.
    """

    hidden: int
    activations: tuple[str, ...] = ("gelu", "linear")
    hidden_axis: str = axes.MLP
    activation_axes: tuple[str | None, ...] = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_MLP)
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, deterministic: bool = True, *, hidden_scale: jax.Array | None = None
    ) -> jax.Array:
        """Maps `[..., length, d]` to the same shape.

        Args:
          x: inputs.
          deterministic: no dropout.
          hidden_scale: factor on the hidden activations `[..., length, hidden]`, which it
            broadcasts to; None for none.
        """
        products = [
            projection.Projection(
                self.hidden,
                (axes.EMBED, self.hidden_axis),
                dtype=self.dtype,
                use_bias=self.use_bias,
                name=name,
            )(x)
            for name in input_kernel_names(self.activations)
        ]
        hidden = constrain(gated(products, self.activations), self.activation_axes)
        hidden = projection.dropout(self.dropout_rate)(hidden, deterministic=deterministic)
        if hidden_scale is not None:
            hidden = hidden * hidden_scale.astype(hidden.dtype)
        return projection.Projection(
            x.shape[-1],
            (self.hidden_axis, axes.EMBED),
            dtype=self.dtype,
            use_bias=self.use_bias,
            name="wo",
        )(hidden)
