"""The device mesh, the one table from logical axes to mesh axes, and the shardings that follow from
it.

Mesh axes:
  data: replicas of the model; batches and token groups are split over it (with `fsdp`, so are
    parameters).
  expert: experts are split over it; outside MoE layers it is a second data axis.
  model: tensor parallelism inside attention, MLPs, experts and the vocabulary.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from upcycle_jax import axes, checks, trees

DATA, EXPERT, MODEL = "data", "expert", "model"
MESH_AXES = (DATA, EXPERT, MODEL)

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

STANDARD_RULES: Rules = (
    # Parameters.
    (axes.VOCAB, MODEL),
    (axes.EMBED, None),
    (axes.MLP, MODEL),
    (axes.EXPERT, EXPERT),
    (axes.EXPERT_MLP, MODEL),
    (axes.HEADS, MODEL),
    (axes.JOINED_KV, MODEL),
    (axes.RELPOS_BUCKETS, None),
    (axes.POSITIONS, None),
    (axes.CLASSES, None),
    (axes.UNMODELED, None),
    # Activations.
    (axes.BATCH, (DATA, EXPERT)),
    (axes.LENGTH, None),
    (axes.ACTIVATION_EMBED, None),
    (axes.ACTIVATION_MLP, MODEL),
    (axes.ACTIVATION_HEADS, MODEL),
    (axes.ACTIVATION_VOCAB, MODEL),
    (axes.EXPERT_GROUP, (DATA, EXPERT)),
    (axes.EXPERT_REPLICA_GROUP, DATA),
    (axes.ACTIVATION_EXPERT, EXPERT),
    (axes.ACTIVATION_EXPERT_MLP, MODEL),
)
"""Logical axis -> mesh axes. `embed` of parameters moves to the data axis under `fsdp`."""


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Builds the mesh and places arrays on it.

    Attributes:
      num_expert_partitions: size of the mesh's expert axis. Experts are divided over it: raising it
        leaves fewer experts (and less memory) on each device and makes the two all-to-alls of an
        MoE layer span more devices.
      num_model_partitions: size of the mesh's model axis (T5X's `num_partitions`).
      fsdp: split the `embed` axis of parameters over the data axis as well: less memory, more
        communication.
      rules: logical axis -> mesh axis. The default is `STANDARD_RULES`.
      devices: devices to use, or None for all.
    """

    num_expert_partitions: checks.Size = 1
    num_model_partitions: checks.Size = 1
    fsdp: bool = False
    rules: Rules = STANDARD_RULES
    devices: tuple[checks.Device, ...] | None = None

    def __post_init__(self) -> None:
        checks.check_fields(self)

    def mesh_shape(self, num_devices: int) -> tuple[int, int, int]:
        """Sizes of the mesh's axes over so many devices.

        Raises:
          ValueError: the device count is not a multiple of the two partition counts.
        """
        split = self.num_expert_partitions * self.num_model_partitions
        if split < 1 or num_devices % split:
            raise ValueError(
                f"{num_devices} devices cannot form a mesh of {self.num_expert_partitions} expert x"
                f" {self.num_model_partitions} model partitions: the product must divide the number"
                " of devices. Change NUM_EXPERT_PARTITIONS or NUM_MODEL_PARTITIONS."
            )
        return num_devices // split, self.num_expert_partitions, self.num_model_partitions

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The `('data', 'expert', 'model')` mesh over all devices.

        Raises:
          ValueError: the device count is not a multiple of the two partition counts.
        """
        devices = list(self.devices) if self.devices is not None else jax.devices()
        shape = self.mesh_shape(len(devices))
        axis_types = (AxisType.Auto,) * len(MESH_AXES)
        try:
            return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=axis_types)
        except NotImplementedError:
            # A TPU torus whose sides do not multiply to these sizes, e.g. 32 experts on 4x4x4: a
            # side then serves two mesh axes.
            placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(placed, MESH_AXES, axis_types=axis_types)

    @functools.cached_property
    def logical_rules(self) -> dict[str, tuple[str, ...]]:
        """The rule table as a dictionary of tuples, with `fsdp` applied."""
        table: dict[str, tuple[str, ...]] = {}
        for name, mesh_axes in self.rules:
            if name in table:
                raise ValueError(f"logical axis {name!r} has two rules")
            table[name] = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())
        if self.fsdp:
            table[axes.EMBED] += (DATA,)
        return table

    @property
    def num_data_shards(self) -> int:
        """How many ways the batch is split: the mesh's data and expert axes together."""
        return int(self.mesh.shape[DATA] * self.mesh.shape[EXPERT])

    def spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
        """The partition spec of an array with these logical axes.

        Raises:
          ValueError: an axis has no rule, or two axes of the array want the same mesh axis.
        """
        entries: list[Any] = []
        used: dict[str, str | None] = {}
        for name in logical_axes:
            if name is not None and name not in self.logical_rules:
                raise ValueError(
                    f"logical axis {name!r} has no sharding rule; known axes:"
                    f" {sorted(self.logical_rules)}"
                )
            mesh_axes = self.logical_rules[name] if name is not None else ()
            for mesh_axis in mesh_axes:
                if mesh_axis in used:
                    raise ValueError(
                        f"logical axes {used[mesh_axis]!r} and {name!r} of one array both map to"
                        f" mesh axis {mesh_axis!r}"
                    )
                used[mesh_axis] = name
            entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
        return PartitionSpec(*entries)

    def sharding(self, leaf: trees.LeafSpec) -> NamedSharding:
        """The sharding of one array.

        Raises:
          ValueError: a dimension is not divisible by the mesh axes that it is split over.
        """
        spec = self.spec(leaf.axes)
        for size, name, entry in zip(leaf.shape, leaf.axes, spec, strict=True):
            parts = int(
                np.prod(
                    [
                        self.mesh.shape[a]
                        for a in ((entry,) if isinstance(entry, str) else entry or ())
                    ]
                )
            )
            if size % parts:
                divisors = [n for n in range(1, size + 1) if size % n == 0 and n <= parts]
                raise ValueError(
                    f"axis {name!r} of size {size} (array {leaf}) is not divisible by the {parts}"
                    f" partitions of mesh axis {entry!r}; the largest partition count that fits is"
                    f" {divisors[-1]} (NUM_EXPERT_PARTITIONS and NUM_MODEL_PARTITIONS set them)"
                )
        return NamedSharding(self.mesh, spec)

    def shardings(self, specs: Mapping[str, trees.LeafSpec]) -> dict[str, NamedSharding]:
        """Shardings of a flat tree of specs; errors name the path."""
        out = {}
        for path, leaf in specs.items():
            try:
                out[path] = self.sharding(leaf)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return out

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of a model feature `[batch, ...]`."""
        return NamedSharding(self.mesh, PartitionSpec((DATA, EXPERT)))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of a value that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @contextlib.contextmanager
    def activate(self) -> Iterator[Mesh]:
        """Makes `constrain` effective: call (and so trace) jitted model code inside it."""
        rules = [(name, entry or None) for name, entry in self.logical_rules.items()]
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(rules):
            yield self.mesh


def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
    """Constrains the sharding of an activation by its logical axes; does nothing outside
    `Partitioner.activate`.
    """
    constrained: jax.Array = nn.with_logical_constraint(x, tuple(logical_axes))
    return constrained


def active_batch_shards() -> int:
    """How many ways the mesh of the surrounding `Partitioner.activate` splits a batch; 1 outside of
    it.
    """
    shape = active_mesh_shape()
    return shape.get(DATA, 1) * shape.get(EXPERT, 1)


def on_batch_shards(function: Callable[[Any, Any], Any], rows: Any, whole: Any) -> Any:
    """`function(rows, whole)`, called once on every device with the rows that this device has;
    without a mesh that splits rows, just that.

    For what XLA cannot divide (on CPUs `top_k`): it would gather the operands on every device.
    Inside nothing crosses devices.

    Args:
      function: row i of each result follows from row i of each argument and from `whole`. Closes
        over no arrays.
      rows: a tree of arrays `[rows, ...]`, split over the mesh's data and expert axes.
      whole: a tree of arrays that every device has.

    Returns:
      A tree of arrays `[rows, ...]`, split in the same way.

    Raises:
      ValueError: the rows are not a multiple of `active_batch_shards()`.
    """
    if active_batch_shards() == 1:
        return function(rows, whole)
    divided = PartitionSpec((DATA, EXPERT))
    return jax.shard_map(function, in_specs=(divided, PartitionSpec()), out_specs=divided)(
        rows, whole
    )


def active_mesh_shape() -> dict[str, int]:
    """Sizes of the surrounding mesh's axes; empty without one."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def active_platform() -> str:
    """Where the program will run: on the devices of the surrounding mesh, which may be those of
    another machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
