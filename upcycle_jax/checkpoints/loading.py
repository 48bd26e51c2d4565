"""A checkpoint's leaves on the devices, each verified while it is read."""

from collections.abc import Mapping

import jax

from upcycle_jax import trees
from upcycle_jax.checkpoints.model_settings import check_model
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.checkpoints.steps import check_name
from upcycle_jax.checkpoints.verification import Verification
from upcycle_jax.models.base import Model
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.state_tree import TARGET
from upcycle_jax.text import shorten
from upcycle_jax.types import PyTree


def check_params(reader: CheckpointReader, model: Model) -> dict[str, trees.LeafSpec]:
    """Specs of the model's parameters by full path, which are those of the checkpoint. Reads no
    array.

    Raises:
      ValueError: the checkpoint is not one of this model, or named for another step than its own.
    """
    check_name(reader)
    specs = {f"{TARGET}{path}": spec for path, spec in model.param_specs().items()}
    found = {path: spec for path, spec in reader.specs().items() if path.startswith(TARGET)}
    difference = trees.diff(specs, found)
    if difference:
        shown = "\n".join(shorten(str(difference).splitlines(), 20))
        raise ValueError(
            f"{reader.path} (+) is not a checkpoint of this model (-):\n{shown}\nChoose the model"
            " file that the checkpoint was trained with"
        )
    check_model(reader, model.config)
    return specs


def load_leaves(
    reader: CheckpointReader,
    specs: Mapping[str, trees.LeafSpec],
    shardings: Mapping[str, jax.sharding.Sharding],
    *,
    verify: bool,
    remedy: str,
) -> dict[str, jax.Array]:
    """Leaves of a checkpoint, each on the devices that hold its part; no other leaf is read.

    Args:
      reader: of the checkpoint.
      specs: what to read, by full path; values are cast to the dtypes given here.
      shardings: of these leaves.
      verify: compare them with the checksums that were saved with them.
      remedy: what to do about a bad checkpoint, for the message.

    Raises:
      DamagedCheckpointError: a leaf is not what was saved.
      NonFiniteParameterError: a parameter holds NaN or infinite values.
    """
    verification = Verification(reader, checksums=verify)
    leaves = {}
    for path, spec in specs.items():
        leaf = reader.read_sharded(path, shardings[path])
        verification.check({path: leaf})
        leaves[path] = leaf if leaf.dtype == spec.dtype else leaf.astype(spec.dtype)
    verification.finish(remedy)
    return leaves


def load_params(
    reader: CheckpointReader, model: Model, partitioner: Partitioner, *, verify: bool = True
) -> PyTree:
    """The parameters of a checkpoint, float32, each on the devices that hold its part; optimizer
    state is not read.

    Args:
      reader: of the checkpoint.
      model: the model.
      partitioner: the mesh.
      verify: compare them with the checksums that were saved with them.

    Raises:
      DamagedCheckpointError: a parameter is not what was saved.
      NonFiniteParameterError: a parameter holds NaN or infinite values.
      ValueError: the checkpoint is not one of this model, or a dimension does not divide over the
        mesh.
    """
    specs = check_params(reader, model)
    flat = load_leaves(
        reader,
        specs,
        partitioner.shardings(specs),
        verify=verify,
        remedy="Choose another checkpoint",
    )
    return trees.unflatten({path.removeprefix(TARGET): leaf for path, leaf in flat.items()})
