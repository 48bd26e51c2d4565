"""Dense-to-sparse conversion: a recipe becomes a plan, the plan is applied online or offline, and
the result is proved from disk.

recipe (choices) -> make_plan (every target leaf, its origin) -> apply_online / apply_offline (the
same bits) -> prove (proof.json).
"""

from upcycle_jax.surgery import recipe as _recipe
from upcycle_jax.surgery.matching import make_plan
from upcycle_jax.surgery.offline import apply_offline, record, result_step
from upcycle_jax.surgery.online import apply_online
from upcycle_jax.surgery.parents import join
from upcycle_jax.surgery.plan import Plan, Row
from upcycle_jax.surgery.proof import Proof, prove
from upcycle_jax.surgery.recipe import *  # noqa: F403  (the parts of a recipe are listed there)

__all__ = [
    "Plan",
    "Proof",
    "Row",
    "apply_offline",
    "apply_online",
    "join",
    "make_plan",
    "prove",
    "record",
    "result_step",
]
__all__ += _recipe.__all__
