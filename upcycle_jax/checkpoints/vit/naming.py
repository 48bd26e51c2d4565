"""A vision transformer under the names of other projects: the way back of `names`."""

import dataclasses
import enum
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from upcycle_jax.checkpoints.casting import cast
from upcycle_jax.checkpoints.reader import CheckpointReader, Index
from upcycle_jax.checkpoints.vit.model import dense_model
from upcycle_jax.checkpoints.vit.names import ARITHMETIC
from upcycle_jax.models.base import ModelConfig
from upcycle_jax.models.vit.config import VitConfig
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec, Role

BLOCK_BYTES = 16 << 20
"""About what is held of an array at a time."""


class Dialect(enum.StrEnum):
    """Whose names."""

    BIG_VISION = "big_vision"
    VIT_JAX = "vit_jax"
    VMOE = "vmoe"


@dataclasses.dataclass(frozen=True)
class Named:
    """An array that is to be written.

    Attributes:
      name: whose parts are joined by '/'.
      shape: of it.
      dtype: of it.
      blocks: its values in C order, a part at a time; their shapes are of no account. Raises
        ValueError where a leaf is damaged, holds NaN, or does not fit into the dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Names:
    """What a project calls the parts of a model.

    Attributes:
      stack: what the blocks are in.
      positions: the table.
      attention: in a block.
      mlp_norm: the norm before the MLP.
      mlp: in a block.
      token_has_position: the class token's position is the first of the table.
      experts: MoE layers have names.
      pooling: attention pooling has names.
    """

    stack: str
    positions: str
    attention: str
    mlp_norm: str
    mlp: str
    token_has_position: bool
    experts: bool = False
    pooling: bool = True


_NAMES = {
    Dialect.BIG_VISION: _Names(
        "Transformer",
        "pos_embedding",
        "MultiHeadDotProductAttention_0",
        "LayerNorm_1",
        "MlpBlock_0",
        token_has_position=False,
    ),
    Dialect.VIT_JAX: _Names(
        "Transformer",
        "Transformer/posembed_input/pos_embedding",
        "MultiHeadDotProductAttention_1",
        "LayerNorm_2",
        "MlpBlock_3",
        token_has_position=True,
        pooling=False,
    ),
    Dialect.VMOE: _Names(
        "Encoder",
        "Encoder/posembed_input/pos_embedding",
        "SelfAttention",
        "LayerNorm_1",
        "Mlp",
        token_has_position=True,
        experts=True,
        pooling=False,
    ),
}
_BLOCK = re.compile(r"encoder/layers_(\d+)/(.+)")


def named_arrays(
    reader: CheckpointReader,
    dialect: Dialect,
    *,
    dtype: np.dtype | None = None,
    model: ModelConfig | None = None,
) -> list[Named]:
    """Every array of a checkpoint's model, sorted by name.

    Args:
      reader: the checkpoint.
      dialect: whose names.
      dtype: of the arrays; None: each leaf's own.
      model: see `model.dense_model`.

    Raises:
      ValueError: these projects do not compute this model, or have no name for a part of it.
    """
    config = dense_model(reader, model)
    specs = {
        path.removeprefix(TARGET): spec
        for path, spec in reader.specs().items()
        if path.startswith(TARGET)
    }
    _check(reader, config, specs, dialect)
    names, found = _NAMES[dialect], []
    for path, spec in specs.items():
        leaf = _Leaf(reader, path, spec, np.dtype(spec.dtype if dtype is None else dtype))
        name, shape = _place(path, spec.shape, names, config)
        if path == "pos_embedding" and "cls" in specs and names.token_has_position:
            rows, width = spec.shape[1] + 1, spec.shape[2]
            found.append(Named(name, (1, rows, width), leaf.dtype, leaf.after_zeros))
            continue
        found.append(Named(name, shape, leaf.dtype, leaf.blocks))
    return sorted(found, key=lambda array: array.name.split("/"))


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf that is read in blocks."""

    reader: CheckpointReader
    path: str
    spec: LeafSpec
    dtype: np.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        """Its values in C order."""
        for index in _blocks(self.spec):
            value = self.reader.read(TARGET + self.path, index)
            if not np.isfinite(value).all():
                raise ValueError(
                    f"{self.reader.path}: {self.path} has NaN or infinite values: the checkpoint is"
                    " of a run that diverged, or damaged. Take an earlier one"
                )
            yield cast(self.path, value, self.dtype, index)

    def after_zeros(self) -> Iterator[np.ndarray]:
        """The same after a row of zeros: the class token's position, which is in the token."""
        yield np.zeros(self.spec.shape[-1], self.dtype)
        yield from self.blocks()


def _blocks(spec: LeafSpec) -> Iterator[Index]:
    """Regions of at most `BLOCK_BYTES`, or one row, in C order."""
    if not spec.shape:
        yield ()
        return
    whole = tuple(slice(0, size) for size in spec.shape)
    rows = max(1, BLOCK_BYTES * spec.shape[0] // max(spec.nbytes, 1))
    for start in range(0, spec.shape[0], rows):
        yield (slice(start, min(start + rows, spec.shape[0])), *whole[1:])


def _check(
    reader: CheckpointReader, config: VitConfig, specs: Mapping[str, LeafSpec], dialect: Dialect
) -> None:
    names = _NAMES[dialect]
    roles = {spec.role for spec in specs.values()}
    why = [
        f"it has {name} {getattr(config, name)!r}, these compute {value!r}"
        for name, value in ARITHMETIC.items()
        if getattr(config, name) != value
    ]
    if config.pre_norm:
        why.append("it has a norm before the first block")
    if config.layer_scale:
        why.append("the outputs of its sublayers are scaled")
    if not config.patch_bias:
        why.append("its patch embedding has no bias")
    if not config.final_norm:
        why.append("it has no norm after the last block")
    if config.pool == "map" and not names.pooling:
        why.append("it pools by attention: write big_vision's names")
    if Role.EXPERT in roles and not names.experts:
        why.append("it has experts: write V-MoE's names, or merge them first")
    if Role.SHARED_EXPERT in roles:
        why.append("it has a shared expert")
    if Role.ROUTER_BIAS in roles:
        why.append("its router has a bias")
    if why:
        raise ValueError(
            f"{reader.path} cannot be written under the names of {dialect}: {'; '.join(why)}."
            " Nothing was written"
        )


def _place(
    path: str, shape: tuple[int, ...], names: _Names, config: VitConfig
) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the array that a leaf becomes; the shape has the same values in C order."""
    if path == "pos_embedding":
        return names.positions, shape
    if path.startswith("map_head/"):
        rest = path.removeprefix("map_head/").replace("layer_norm/", "LayerNorm_0/")
        name, shape = _part(rest, shape, names, config)
        return f"MAPHead_0/{name}", shape
    if match := _BLOCK.fullmatch(path):
        rest = match[2].replace("pre_attention_layer_norm/", "LayerNorm_0/")
        rest = rest.replace("pre_mlp_layer_norm/", f"{names.mlp_norm}/")
        name, shape = _part(rest, shape, names, config)
        return f"{names.stack}/encoderblock_{match[1]}/{name}", shape
    if path.startswith("encoder/"):
        return f"{names.stack}/{path.removeprefix('encoder/')}", shape
    return path, shape


def _part(
    path: str, shape: tuple[int, ...], names: _Names, config: VitConfig
) -> tuple[str, tuple[int, ...]]:
    """The same of a part of a block, or of attention pooling."""
    heads, size = config.num_heads, config.emb_dim // config.num_heads
    if path.startswith("attention/"):
        rest = path.removeprefix("attention/")
        if rest == "out/kernel":
            shape = (heads, size, shape[-1])
        elif not rest.startswith("out/"):
            shape = (*shape[:-1], heads, size)
        return f"{names.attention}/{rest}", shape
    for ours, theirs in (
        ("mlp/router/router_weights/w/", "Moe/Router/dense/"),
        ("mlp/expert/wi/", "Moe/Mlp/Dense_0/"),
        ("mlp/expert/wo/", "Moe/Mlp/Dense_1/"),
        ("mlp/wi/", f"{names.mlp}/Dense_0/"),
        ("mlp/wo/", f"{names.mlp}/Dense_1/"),
    ):
        if path.startswith(ours):
            return theirs + path.removeprefix(ours), shape
    return path, shape
