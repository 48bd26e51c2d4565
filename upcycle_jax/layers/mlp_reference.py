"""`mlp.MlpBlock` in NumPy, written apart from it: what the function check compares with."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.special

_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
    "gelu_exact": lambda v: 0.5 * v * (1 + scipy.special.erf(v / np.sqrt(2))),
    "linear": lambda v: v,
    "quick_gelu": lambda v: v / (1 + np.exp(-1.702 * v)),
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
}


def mlp(
    x: np.ndarray,
    kernels: Mapping[str, np.ndarray],
    activations: Sequence[str],
    *,
    units: int | None = None,
) -> np.ndarray:
    """`prod_i act_i(x wi_i + b_i) wo + b` in float64, `[..., d]`; without biases where there are
    none.

    Args:
      x: inputs `[..., d]`.
      kernels: `wi_0/kernel [d, f]`, ... (`wi/kernel` for a single activation), `wo/kernel [f, d]`,
        and `wi_0/bias [f]`, ..., `wo/bias [d]` where there are biases.
      activations: names, one per input kernel.
      units: the first hidden units alone; None: all f.
    """
    x = x.astype(np.float64)
    hidden = np.ones(())
    for number, name in enumerate(activations):
        part = "wi" if len(activations) == 1 else f"wi_{number}"
        product = x @ kernels[f"{part}/kernel"][:, :units].astype(np.float64)
        if f"{part}/bias" in kernels:
            product = product + kernels[f"{part}/bias"][:units].astype(np.float64)
        hidden = hidden * _ACTIVATIONS[name](product)
    out = hidden @ kernels["wo/kernel"][:units].astype(np.float64)
    return out + kernels["wo/bias"].astype(np.float64) if "wo/bias" in kernels else out
