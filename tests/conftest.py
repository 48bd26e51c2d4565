"""Every test sees eight CPU devices. This must run before jax is imported, hence at import time and
not in a fixture.
"""

import os

_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import logging  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def log_as_libraries_do():
    """Commands that ran in an earlier test have pointed the library's log at a console that is
    gone.
    """
    log = logging.getLogger("upcycle_jax")
    log.handlers, log.propagate = [], True
