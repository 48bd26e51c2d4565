"""Who may write where: one writer per folder, held by the living."""

from upcycle_jax.leases.lease import (
    TRAINING_LEASE,
    InUseError,
    Lease,
    LeaseLostError,
    hold,
    look,
    refuse_if_held,
)

__all__ = [
    "TRAINING_LEASE",
    "InUseError",
    "Lease",
    "LeaseLostError",
    "hold",
    "look",
    "refuse_if_held",
]
