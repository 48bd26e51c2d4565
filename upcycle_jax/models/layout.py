"""Which layers of a stack are MoE layers."""

SparseLayout = str | tuple[int, ...]
"""One of `LAYOUTS`, or indices of layers."""

LAYOUTS = ("MIXED", "BOTTOM", "MIDDLE", "TOP", "LAST_ODD")


def sparse_layers(
    num_layers: int, num_sparse_layers: int | None, layout: SparseLayout, *, stack: str
) -> tuple[int, ...]:
    """Zero-based indices of the MoE layers, ascending (Flaxformer's layouts, and explicit ones).

    >>> sparse_layers(12, 6, "MIXED", stack="encoder")
    (1, 3, 5, 7, 9, 11)

    Args:
      num_layers: layers in the stack.
      num_sparse_layers: how many are MoE layers; None for half of them, or for as many as an
        explicit layout names.
      layout: 'MIXED' (i % (L/n) == L/n - 1), 'BOTTOM' (first n), 'MIDDLE', 'TOP' (last n),
        'LAST_ODD' (V-MoE's last n: of the odd indices), or the indices themselves.
      stack: 'encoder' or 'decoder', for messages.

    Raises:
      ValueError: counts or indices that do not fit the stack, or an unknown layout.
    """
    if not isinstance(layout, str):
        return _explicit(num_layers, num_sparse_layers, tuple(layout), stack)
    if layout not in LAYOUTS:
        raise ValueError(
            f"unknown {stack} sparse layout {layout!r}: use one of {', '.join(LAYOUTS)}, or a tuple"
            " of layer indices"
        )
    count = num_layers // 2 if num_sparse_layers is None else num_sparse_layers
    if not 0 <= count <= num_layers:
        raise ValueError(
            f"num_{stack}_sparse_layers={count} does not fit a stack of {num_layers} layers"
        )
    if count == 0:
        return ()
    if layout == "BOTTOM":
        return tuple(range(count))
    if layout == "MIDDLE":
        return tuple(
            i for i in range(num_layers) if num_layers - count <= 2 * i < num_layers + count
        )
    if layout == "LAST_ODD":
        odd = tuple(range(1, num_layers, 2))
        if count > len(odd):
            raise ValueError(
                f"the LAST_ODD layout has {len(odd)} odd layers of {num_layers} in the {stack}, got"
                f" num_{stack}_sparse_layers={count}"
            )
        return odd[len(odd) - count :]
    if layout == "TOP":
        return tuple(range(num_layers - count, num_layers))
    if num_layers % count:
        valid = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise ValueError(
            f"the MIXED layout needs a number of sparse layers that divides the {num_layers}"
            f" {stack} layers, got {count}; valid: {valid}"
        )
    every = num_layers // count
    return tuple(i for i in range(num_layers) if i % every == every - 1)


def _explicit(
    num_layers: int, num_sparse_layers: int | None, layers: tuple[int, ...], stack: str
) -> tuple[int, ...]:
    outside = [i for i in layers if not 0 <= i < num_layers]
    if outside or len(set(layers)) != len(layers):
        raise ValueError(
            f"{stack} sparse layers {layers} must be distinct indices from 0 to {num_layers - 1}"
        )
    if num_sparse_layers is not None and num_sparse_layers != len(layers):
        raise ValueError(
            f"num_{stack}_sparse_layers={num_sparse_layers} contradicts the explicit layout"
            f" {layers}: leave it None, or name {num_sparse_layers} layers"
        )
    return tuple(sorted(layers))
