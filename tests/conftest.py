"""Every test sees eight CPU devices, and what one test has compiled others need not compile again.
This must run before jax is imported, hence at import time and not in a fixture.
"""

import atexit
import os
import shutil
import tempfile

_FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    # Programs run once on a few tokens: most of the time goes into compiling them. Without LLVM's
    # passes, in one module each, emitted without MLIR, they compile about six times as fast. What
    # XLA itself rewrites and fuses stays as it is. To compile as users do: XLA_FLAGS, which wins.
    "--xla_backend_optimization_level": 0,
    "--xla_cpu_parallel_codegen_split_count": 1,
    "--xla_cpu_use_fusion_emitters": "false",
    # XLA ends a process whose eight devices do not meet in a collective within 40 s, which threads
    # that are starved on a busy machine may miss.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 60,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 300,
}
os.environ["JAX_PLATFORMS"] = "cpu"
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_name}={_value}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
# Nobody reads where in Python an operation of a compiled program comes from; writing it down takes
# a twentieth of the time of a run.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and the processes that tests start inherit it; it lives as long as this session.
    _compiled = tempfile.mkdtemp(prefix="upcycle_jax_compiled_")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    # Most programs compile within a tenth of a second, and many tests have the same ones.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import functools  # noqa: E402
import gc  # noqa: E402
import logging  # noqa: E402

import pytest  # noqa: E402


def pytest_collection_finish():
    """Tracing makes many objects that live on: looking through all of them takes a twentieth of a
    run.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish():
    """The interpreter looks through all objects once more when it ends, and a worker has many."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny():
    """Makes configs of a tiny T5: `tiny()` is dense, `tiny(num_experts=4, ...)` has an MoE layer
    with those settings in each stack.
    """
    from upcycle_jax.models.t5.config import MoeConfig, T5Config

    shape = {
        "vocab_size": 64,
        "emb_dim": 16,
        "num_heads": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "head_dim": 8,
        "mlp_dim": 32,
        "dropout_rate": 0.0,
    }

    def make(*, model=None, **moe):
        return T5Config(**shape | (model or {}), moe=MoeConfig(**moe) if moe else None)

    return make


@pytest.fixture(scope="module")
def drawn_parameters():
    """Models draw their parameters with NumPy: no program initialises them, which takes two seconds
    to compile. For runs that have to begin somewhere, wherever that is.
    """
    import numpy as np

    from upcycle_jax import trees
    from upcycle_jax.models.stacked import StackedModel

    def draw(model, rng):
        random, params = np.random.default_rng(0), {}
        for path, spec in model.param_specs().items():
            scale = 0.1 if len(spec.shape) == 1 else spec.shape[-2] ** -0.5
            around = float(path.endswith("scale"))
            values = around + scale * random.normal(size=spec.shape)
            params[path] = (0 * values if path.endswith("bias") else values).astype(spec.dtype)
        return trees.unflatten(params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StackedModel, "init_params", draw)
        yield


@pytest.fixture(scope="module")
def shared_programs():
    """Calls of `eval` and `infer` with equal models and settings predict, score and evaluate with
    one object, which has its programs from the first of them.
    """
    from upcycle_jax.inference import evaluation, running

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "Runner", functools.cache(running.Runner))
        patch.setattr(evaluation, "Evaluator", functools.cache(evaluation.Evaluator))
        yield


@pytest.fixture(autouse=True)
def log_as_libraries_do():
    """Commands that ran in an earlier test have pointed the library's log at a console that is
    gone.
    """
    log = logging.getLogger("upcycle_jax")
    log.handlers, log.propagate = [], True
