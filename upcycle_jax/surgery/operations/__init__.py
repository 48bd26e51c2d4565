"""What can happen to one leaf (`base`), and every operation that a recipe can ask for."""

from upcycle_jax.surgery.operations.base import (
    Aux,
    Expectation,
    Movement,
    Operation,
    Reach,
    Region,
    Shape,
)
from upcycle_jax.surgery.operations.enlarging import CopiesOfColumns, CopiesOfExperts
from upcycle_jax.surgery.operations.experts import AddNoise, RandomExperts
from upcycle_jax.surgery.operations.hidden_units import HiddenUnits
from upcycle_jax.surgery.operations.means import JoinSharedExpert, Mean, MergeExperts
from upcycle_jax.surgery.operations.movements import (
    Constant,
    Copy,
    FirstUnits,
    FromParents,
    LastUnits,
    PickExpert,
    Tile,
    TileFirstUnits,
    Zeros,
)
from upcycle_jax.surgery.operations.positions import InterpolatePositions
from upcycle_jax.surgery.operations.routers import Given, RouterNormal, RouterUniform

__all__ = [
    "AddNoise",
    "Aux",
    "Constant",
    "CopiesOfColumns",
    "CopiesOfExperts",
    "Copy",
    "Expectation",
    "FirstUnits",
    "FromParents",
    "Given",
    "HiddenUnits",
    "InterpolatePositions",
    "JoinSharedExpert",
    "LastUnits",
    "Mean",
    "MergeExperts",
    "Movement",
    "Operation",
    "PickExpert",
    "RandomExperts",
    "Reach",
    "Region",
    "RouterNormal",
    "RouterUniform",
    "Shape",
    "Tile",
    "TileFirstUnits",
    "Zeros",
]
