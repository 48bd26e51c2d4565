"""TPU topologies without TPUs: devices to compile for, and what a chip holds."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

from upcycle_jax.costs import hardware


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one jax device of a TPU generation has.

    Attributes:
      name: the generation, as in topology names.
      memory_bytes: high-bandwidth memory of one device; XLA keeps a few per cent of it for itself.
      peak_flops: bfloat16 FLOPs per second of one device.
      memory_bandwidth: bytes per second between that memory and one device.
      link_bandwidth: bytes per second that one device sends over all of its links.
      accelerator: prefix of Cloud TPU's accelerator type.
      cores_per_device: TensorCores per device; accelerator types of v2 to v5p count cores.
      options: for libtpu's topology description.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    accelerator: str
    cores_per_device: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def accelerator_type(self, num_devices: int) -> str:
        """Cloud TPU's name of a slice, e.g. 'v5litepod-256'."""
        return f"{self.accelerator}-{num_devices * self.cores_per_device}"


def _chip(name: str, accelerator: str, **others: Any) -> Chip:
    """A generation of the table of accelerators."""
    known = hardware.accelerator(name)
    return Chip(
        name,
        memory_bytes=known.device_hbm_bytes,
        peak_flops=known.device_peak_flops,
        memory_bandwidth=known.hbm_bandwidth / known.devices_per_chip,
        link_bandwidth=known.interconnect_bandwidth / known.devices_per_chip,
        accelerator=accelerator,
        **others,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v2", "v2"),
        _chip("v3", "v3"),
        _chip("v4", "v4", cores_per_device=2, options=(("chip_config_name", "megacore"),)),
        _chip("v5e", "v5litepod"),
        _chip("v5p", "v5p", cores_per_device=2),
        _chip("v6e", "v6e"),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice to compile for.

    Attributes:
      name: e.g. 'v5e:16x16'.
      chip: its devices' generation.
      devices: abstract jax devices, which compile and cannot run.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def accelerator_type(self) -> str:
        """Cloud TPU's name, e.g. 'v5litepod-256'."""
        return self.chip.accelerator_type(len(self.devices))


def prepare_environment() -> None:
    """Makes jax stay on the CPU and libtpu not look for TPU machines. Call before jax is
    imported.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # No TPU is opened, so several compilations may run at once; libtpu would otherwise hold a lock
    # of the whole machine.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
    # Any values do; without them libtpu prints a page about what it could not find.
    for name, value in (
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")


def topology(name: str) -> Topology:
    """Describes a slice by generation and shape, 'v5e:4x8'.

    Raises:
      ValueError: libtpu is not installed, the generation is unknown or has no slice of this shape.
    """
    match = re.fullmatch(r"([\w]+):(\d+(?:x\d+){1,2})", name)
    if match is None or match[1] not in CHIPS:
        raise ValueError(
            f"topology {name!r} is not GENERATION:SHAPE with one of {', '.join(CHIPS)}, e.g."
            " v5e:4x8 or v4:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for TPUs needs libtpu: pip install 'upcycle_jax[precompile]' (about 500 MB;"
            " best in an environment of its own)"
        )
    import jax
    from jax.experimental import topologies

    chip = CHIPS[match[1]]
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **dict(chip.options)
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu knows no topology {name!r}: {str(error).splitlines()[0]}. Shapes are those of"
            " Cloud TPU's slices, e.g. 4x4, 4x8, 8x8, 8x16, 16x16 of v5e and v6e, 2x2x2, 2x2x4,"
            " 4x4x4 of v4 and v5p"
        ) from error
    return Topology(name, chip, tuple(described.devices))
