"""The accounting of a train step against what jax traces and what XLA compiles, for the shipped
tiny and small models.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import pytest

from upcycle_jax import config, trees
from upcycle_jax.models import accounting
from upcycle_jax.moe import looped_experts
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.planning import compilation, traced_memory
from upcycle_jax.planning.compilation import Workload
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train_state import from_state_dict, state_specs
from upcycle_jax.training.train_step import make_train_step
from upcycle_jax.training.trainer import Trainer


@pytest.fixture(autouse=True)
def all_experts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's cost analysis counts the body of a loop once; experts of a small model on one CPU
    device are looped over.
    """
    monkeypatch.setattr(looped_experts, "LARGE", math.inf)


def workload(
    name: str,
    *,
    num_microbatches: int | None = None,
    remat: str = "none",
    scan: bool = False,
    bindings: Sequence[str] = (),
) -> Workload:
    """16 rows of 64 and 32 tokens on eight devices, experts over four of them; float32, which is
    what CPU collectives carry.
    """
    sparse = name.endswith("_upcycled")
    bindings = [
        *bindings,
        "DROPOUT_RATE=0.0",
        "ACTIVATION_DTYPE='float32'",
        f"REMAT_POLICY={remat!r}",
        f"SCAN_LAYERS={scan}",
    ] + (["GROUP_SIZE=64", "NUM_EXPERTS=8"] if sparse else [])
    return Workload(
        model=config.load([f"models/t5_1_1_{name}.gin"], bindings).macro("MODEL"),
        trainer=Trainer(
            optimizer=Adafactor(),
            learning_rate_fn=create_learning_rate_scheduler(),
            num_microbatches=num_microbatches,
        ),
        partitioner=Partitioner(num_expert_partitions=4 if sparse else 1),
        batch_size=16,
        task_feature_lengths={"inputs": 64, "targets": 32},
    )


def dot_flops(jaxpr: Any) -> float:
    """FLOPs of all matrix products in a traced program: 2 * elements of the result * contracted
    elements; loops counted as they run.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * inner
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for parameter in equation.params.values():
            for inner_jaxpr in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner_jaxpr = getattr(inner_jaxpr, "jaxpr", inner_jaxpr)
                if hasattr(inner_jaxpr, "eqns"):
                    total += times * dot_flops(inner_jaxpr)
    return total


@pytest.mark.parametrize("name", ["tiny", "tiny_upcycled", "small", "small_upcycled"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_microbatches": 2},
        {"remat": "minimal"},
        {"remat": "full"},
        {"remat": "full", "scan": True},
    ],
    ids=["plain", "microbatches", "minimal", "full", "scanned_full"],
)
def test_flops_are_those_of_the_traced_matrix_products(name, settings):
    """All of them, one by one: with what `remat_policy` computes again, and loops over layers
    counted as often as they run.
    """
    if name.startswith("small") and settings.get("remat") != "full":
        pytest.skip("the larger size is traced with everything on")
    work = workload(name, **settings)
    specs = state_specs(work.model, work.trainer.optimizer)
    state = from_state_dict(
        {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for path, spec in specs.items()}
    )
    batch = work.model.input_specs(work.batch_size, work.task_feature_lengths)
    traced = jax.make_jaxpr(make_train_step(work.model, work.trainer, seed=0))(state, batch)
    assert compilation.all_flops(work).hardware == pytest.approx(dot_flops(traced.jaxpr), rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "tiny_upcycled",
        pytest.param("small", marks=pytest.mark.slow),
        pytest.param("small_upcycled", marks=pytest.mark.slow),
    ],
)
def test_flops_and_bytes_against_the_compiled_step(name):
    """XLA counts elementwise operations and what each device repeats, and so does
    `StepFlops.device`.
    """
    work = workload(name)
    compiled, state = compilation.compile_train_step(work), compilation.state_bytes(work)
    assert compilation.all_flops(work).device == pytest.approx(compiled.flops, rel=0.1)
    # Arguments are the state and a few kilobytes of tokens.
    assert state.parameters + state.optimizer == pytest.approx(compiled.argument_bytes, rel=0.01)
    # Float32 gradients of everything live at once, among other temporaries.
    assert compiled.temporary_bytes > 0.9 * state.parameters
    assert compiled.traffic is not None
    exchanged = sum(item.nbytes for item in compiled.traffic if item.kind == "all-to-all")
    assert compilation.exchange_bytes(work) == exchanged and (exchanged > 0) == name.endswith(
        "_upcycled"
    )


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dropless", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_exchange_against_the_compiled_step(dropless, remat):
    """What dropless routers send is counted for an even load, which is two rounds here; the
    compiled program shows one.
    """
    routers = (
        [f"MoeConfig.{stack}_router=@DroplessTopK()" for stack in ("encoder", "decoder")]
        if dropless
        else []
    )
    work = workload("tiny_upcycled", remat=remat, bindings=routers)
    sent = [
        item
        for item in compilation.compile_train_step(work).traffic or ()
        if item.kind == "all-to-all"
    ]
    assert [item.open_ended for item in sent] == [dropless]
    assert compilation.exchange_bytes(work) == sent[0].nbytes * (2 if dropless else 1)


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "tiny_upcycled",
        pytest.param("small", marks=pytest.mark.slow),
        pytest.param("small_upcycled", marks=pytest.mark.slow),
    ],
)
def test_memory_and_flops_on_one_device(name):
    """State, gradients and activations against `memory_analysis`, where nothing is split and XLA's
    partitioner adds no copies.
    """
    work = dataclasses.replace(workload(name), partitioner=Partitioner(devices=(jax.devices()[0],)))
    compiled = compilation.compile_train_step(work)
    assert compilation.all_flops(work).device == pytest.approx(compiled.flops, rel=0.1)
    assert compilation.memory(work).needed == pytest.approx(
        compiled.argument_bytes + compiled.temporary_bytes, rel=0.1
    )


@pytest.mark.parametrize("name", ["tiny", "tiny_upcycled"])
def test_what_a_plan_counts_is_the_part_that_matrix_products_leave(name):
    """Two answers for two compilers: all that autodiff keeps (CPU), and what is left without
    elementwise results (TPU).
    """
    work = dataclasses.replace(workload(name), partitioner=Partitioner(devices=(jax.devices()[0],)))
    everything = compilation.memory(work).activations
    assert everything / 3 < traced_memory.activation_bytes(work) < everything


@pytest.mark.parametrize("name", ["tiny", "tiny_upcycled", "small", "small_upcycled"])
def test_a_forward_pass_against_the_compiled_one(name):
    """Without a backward pass and an optimizer, matrix products alone are within a tenth of what
    XLA counts.
    """
    work = workload(name)
    params = trees.unflatten(
        {
            path: jax.ShapeDtypeStruct(spec.shape, spec.dtype)
            for path, spec in work.model.param_specs().items()
        }
    )
    batch = work.model.input_specs(work.batch_size, work.task_feature_lengths)
    counted = jax.jit(work.model.logits).lower(params, batch).compile().cost_analysis()["flops"]
    lengths = {"batch_size": 16, "inputs_length": 64, "targets_length": 32}
    assert accounting.forward_flops(
        work.model.config, **lengths, train=False
    ).total == pytest.approx(counted, rel=0.1)
