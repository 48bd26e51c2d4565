"""Routers. Each states its source, what it guarantees, and where it may not be used; `base` has the
interface that all share.
"""

from upcycle_jax.moe.routing.base import Group, Router, Routing
from upcycle_jax.moe.routing.experts_choose import ExpertsChoose
from upcycle_jax.moe.routing.fixed import HashTop1
from upcycle_jax.moe.routing.sigmoid import LossFreeTopK, SigmoidTopK
from upcycle_jax.moe.routing.soft import SoftMoe
from upcycle_jax.moe.routing.token_choice import DroplessTopK, SwitchTop1, TokenChoice, TokensChoose

__all__ = [
    "DroplessTopK",
    "ExpertsChoose",
    "Group",
    "HashTop1",
    "LossFreeTopK",
    "Router",
    "Routing",
    "SigmoidTopK",
    "SoftMoe",
    "SwitchTop1",
    "TokenChoice",
    "TokensChoose",
]
