"""Performing a plan: `online` and `offline` under one name, with `result_step` and `record`, which
both need.
"""

from upcycle_jax.surgery.offline import apply_offline, record, result_step
from upcycle_jax.surgery.online import apply_online

__all__ = ["apply_offline", "apply_online", "record", "result_step"]
