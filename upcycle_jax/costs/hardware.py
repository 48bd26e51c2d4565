"""What accelerators can do at best: the table that utilisation, plans of cost and ahead-of-time
compilation share.

Figures are those of the makers' pages (`Accelerator.source`), per chip. They are peaks: nothing
reaches them.
"""

import dataclasses
import difflib
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of chip.

    Attributes:
      name: the name used here, e.g. 'tpu_v5e'.
      peak_flops: bfloat16 FLOPs per second of one chip, dense matrix products with float32
        accumulation.
      hbm_bytes: memory of one chip.
      hbm_bandwidth: bytes per second between that memory and the chip.
      interconnect_bandwidth: bytes per second that one chip can send to its neighbours, over all of
        its links, in one direction: half of what makers print as bidirectional.
      devices_per_chip: jax devices that one chip shows as (2 on TPU v2 and v3, whose cores are
        devices of their own).
      torus_axes: axes of the torus that links form, two links of a chip along each; 0 where a
        switch joins all chips.
      slice_chips: chips that such links join at most, in one job.
      tile: rows and columns of the tiles that the last two axes of an array's layout are padded to;
        None where they are not (https://openxla.org/xla/tiled_layout).
      network_bandwidth: bytes per second that one chip can send to other slices, over the network
        of the data centre, in one direction; None where the maker prints none.
      aliases: other names in use.
      device_kinds: `jax.Device.device_kind` of this chip.
      source: where the figures are from.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    interconnect_bandwidth: float
    devices_per_chip: int = 1
    torus_axes: int = 0
    slice_chips: int = 1
    tile: tuple[int, int] | None = None
    network_bandwidth: float | None = None
    aliases: tuple[str, ...] = ()
    device_kinds: tuple[str, ...] = ()
    source: str = ""

    @property
    def device_peak_flops(self) -> float:
        """Peak of one jax device."""
        return self.peak_flops / self.devices_per_chip

    @property
    def device_hbm_bytes(self) -> int:
        """Memory of one jax device."""
        return self.hbm_bytes // self.devices_per_chip

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second over one link of a chip in one direction; over all, of a switch."""
        return self.interconnect_bandwidth / (2 * self.torus_axes or 1)


TPU_TILE = (8, 128)
_TPU = "https://cloud.google.com/tpu/docs/"
_A100 = "https://www.nvidia.com/en-us/data-center/a100/"

ACCELERATORS: tuple[Accelerator, ...] = (
    Accelerator(
        name="tpu_v2",
        peak_flops=45e12,
        hbm_bytes=16 * GIB,
        hbm_bandwidth=700e9,
        interconnect_bandwidth=4 * 62e9,  # four links of 496 Gbit/s
        torus_axes=2,
        tile=TPU_TILE,
        slice_chips=256,
        devices_per_chip=2,
        aliases=("v2",),
        device_kinds=("TPU v2",),
        source=f"{_TPU}v2; links: https://doi.org/10.1145/3360307, table 3",
    ),
    Accelerator(
        name="tpu_v3",
        peak_flops=123e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=900e9,
        interconnect_bandwidth=4 * 82e9,  # four links of 656 Gbit/s
        torus_axes=2,
        tile=TPU_TILE,
        slice_chips=1024,
        devices_per_chip=2,
        aliases=("v3",),
        device_kinds=("TPU v3",),
        source=f"{_TPU}v3; links: https://doi.org/10.1145/3360307, table 3",
    ),
    Accelerator(
        name="tpu_v4",
        peak_flops=275e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1228e9,
        interconnect_bandwidth=6 * 50e9,  # six links
        torus_axes=3,
        tile=TPU_TILE,
        slice_chips=4096,
        aliases=("v4",),
        device_kinds=("TPU v4",),
        source=f"{_TPU}v4; links: https://arxiv.org/abs/2304.01433, table 4",
    ),
    Accelerator(
        name="tpu_v5e",
        peak_flops=197e12,
        hbm_bytes=16 * GIB,
        hbm_bandwidth=819e9,
        interconnect_bandwidth=200e9,
        torus_axes=2,
        tile=TPU_TILE,
        slice_chips=256,
        network_bandwidth=3.125e9,  # 6.4 Tbit/s of 256 chips
        aliases=("v5e", "v5litepod", "tpu_v5_lite"),
        device_kinds=("TPU v5 lite", "TPU v5e"),
        source=f"{_TPU}v5e",
    ),
    Accelerator(
        name="tpu_v5p",
        peak_flops=459e12,
        hbm_bytes=95 * GIB,
        hbm_bandwidth=2765e9,
        interconnect_bandwidth=600e9,
        torus_axes=3,
        tile=TPU_TILE,
        slice_chips=6144,
        network_bandwidth=6.25e9,  # 50 Gbit/s
        aliases=("v5p",),
        device_kinds=("TPU v5", "TPU v5p"),
        source=f"{_TPU}v5p",
    ),
    Accelerator(
        name="tpu_v6e",
        peak_flops=918e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1638e9,
        interconnect_bandwidth=400e9,
        torus_axes=2,
        tile=TPU_TILE,
        slice_chips=256,
        network_bandwidth=12.5e9,  # 25.6 Tbit/s of 256 chips
        aliases=("v6e", "trillium", "tpu_v6_lite"),
        device_kinds=("TPU v6 lite", "TPU v6e"),
        source=f"{_TPU}v6e",
    ),
    Accelerator(
        name="a100_40gb",
        peak_flops=312e12,
        hbm_bytes=40 * GIB,
        hbm_bandwidth=1555e9,
        interconnect_bandwidth=300e9,
        slice_chips=8,
        device_kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        source=_A100,
    ),
    Accelerator(
        name="a100",
        peak_flops=312e12,
        hbm_bytes=80 * GIB,
        hbm_bandwidth=2039e9,
        interconnect_bandwidth=300e9,
        slice_chips=8,
        aliases=("a100_80gb",),
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        source=_A100,
    ),
    Accelerator(
        name="h100",
        peak_flops=989e12,
        hbm_bytes=80 * GIB,
        hbm_bandwidth=3350e9,
        interconnect_bandwidth=450e9,
        slice_chips=8,
        aliases=("h100_sxm", "h100_80gb"),
        device_kinds=("NVIDIA H100 80GB HBM3",),
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    Accelerator(
        name="h200",
        peak_flops=989e12,
        hbm_bytes=139 * GIB,  # what jax sees of the 141 GB on the data sheet
        hbm_bandwidth=4800e9,
        interconnect_bandwidth=450e9,
        slice_chips=8,
        aliases=("h200_sxm",),
        device_kinds=("NVIDIA H200",),
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def names() -> tuple[str, ...]:
    """The names of all accelerators, aliases left out."""
    return tuple(chip.name for chip in ACCELERATORS)


def accelerator(name: str) -> Accelerator:
    """The accelerator of a name, an alias or a `device_kind`, whatever the case.

    Raises:
      ValueError: there is none; the message lists those that are known.
    """
    wanted = _plain(name)
    for chip in ACCELERATORS:
        if wanted in {_plain(known) for known in (chip.name, *chip.aliases, *chip.device_kinds)}:
            return chip
    near = difflib.get_close_matches(wanted, names(), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"no accelerator {name!r} is known; known: {', '.join(names())}.{hint}")


def of_device(device: Any) -> Accelerator | None:
    """The accelerator that a jax device is part of, or None for CPUs and whatever the table does
    not have: nothing is guessed.
    """
    kind = str(getattr(device, "device_kind", ""))
    return next((chip for chip in ACCELERATORS if kind in chip.device_kinds), None)
