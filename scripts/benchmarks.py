"""Measures speed as ratios. Programs that are compared run in one process, in turns, so that other
work on the machine slows all of them down alike.

The baseline of an MoE layer is the dense MLP with as many FLOPs: with capacity factor C (or top-K)
an expert's work is done C (K) times per token, so its hidden axis is C (K) times as wide.
"""

import contextlib
import dataclasses
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import config
from upcycle_jax.costs import step
from upcycle_jax.costs.shapes import StepShape
from upcycle_jax.inference.decoding import Greedy
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.models.base import Model, stack_lengths
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.models.generation import DecodingCache
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe import grouped_experts
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.dispatch import Assignment
from upcycle_jax.moe.experts import ExpertBank
from upcycle_jax.moe.layer import LAYER_STATS, MoeLayer
from upcycle_jax.moe.routing import DroplessTopK, ExpertsChoose, Router, TokensChoose
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.run_start import Starts
from upcycle_jax.training.train_state import initial_state, state_specs
from upcycle_jax.training.train_step import jitted_train_step
from upcycle_jax.training.trainer import Trainer
from upcycle_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One size to measure an MoE layer at.

    Attributes:
      d: width of the residual stream.
      ff: hidden size of an expert.
      num_experts: E.
      tokens: per group; one group.
      groups: groups.
      capacity_factor: C, and K of the top-K layer.
      dtype: of the computation.
    """

    d: int = 512
    ff: int = 1024
    num_experts: int = 8
    tokens: int = 4096
    groups: int = 1
    capacity_factor: int = 2
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One program.

    Attributes:
      name: what was measured.
      seconds: median of one execution.
      ratio: its time over the baseline's: the median of the ratios of neighbouring executions.
      compile_seconds: tracing and compilation.
      temporary_bytes: XLA's temporaries, the memory beside arguments and results.
      tokens_per_second: at the median.
      cpu_seconds: median of the processor time of one execution, all threads together: what to
        compare on a machine that others use too.
    """

    name: str
    seconds: float
    ratio: float
    compile_seconds: float
    temporary_bytes: int
    tokens_per_second: float
    cpu_seconds: float = float("nan")


@dataclasses.dataclass
class Program:
    """A compiled program; `call` executes it."""

    call: Callable[[], Any]
    compile_seconds: float
    temporary_bytes: int


def compare(
    programs: Mapping[str, Program], *, baseline: str, tokens: int, rounds: int
) -> list[Measurement]:
    """Runs the programs in turns. A program that is not the baseline runs directly after it in
    every round, and is compared with that execution: both then see the same state of the machine.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    ratios: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        for _ in range(2):
            jax.block_until_ready(program.call())
    for _ in range(rounds):
        for name in programs:
            if name == baseline and len(programs) > 1:
                continue
            for one in (baseline,) if name == baseline else (baseline, name):
                seconds, cpu_seconds = _timed(programs[one].call)
                times[one].append(seconds)
                cpu[one].append(cpu_seconds)
            ratios[name].append(times[name][-1] / times[baseline][-1])
    out = []
    for name, program in programs.items():
        seconds = statistics.median(times[name])
        ratio = 1.0 if name == baseline else statistics.median(ratios[name])
        out.append(
            Measurement(
                name,
                seconds,
                ratio,
                program.compile_seconds,
                program.temporary_bytes,
                tokens / seconds,
                statistics.median(cpu[name]),
            )
        )
    return out


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of an execution, and of the processor."""
    started, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - started, time.process_time() - cpu


def as_program(function: Callable[..., Any], *arguments: Any) -> Program:
    """A function of these arguments, compiled."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend that is benchmarked has the analysis
    return Program(lambda: compiled(*arguments), seconds, int(memory.temp_size_in_bytes))


def layer(
    shape: LayerShape,
    *,
    backward: bool,
    one_hot: bool = True,
    dropless: Sequence[grouped_experts.Dispatch] = ("auto",),
    rounds: int = 15,
) -> list[Measurement]:
    """An MoE layer with either router of the paper, and the dropless one, against the FLOP-equal
    dense MLP and, where asked, against one-hot einsum dispatch. The experts alone, on slots that
    are already filled, are what no dispatch can be faster than: as many FLOPs as the dense MLP, on
    smaller products and on E / C times its weights.

    Args:
      shape: the size.
      backward: forward and backward (gradients of parameters and input), or forward only.
      one_hot: also `MoeConfig.dispatch` 'one_hot', which needs two arrays of S * E * C elements per
        group. Its masks follow from token indices by one comparison, where T5X builds them from
        one-hot choices by cumulative sums: this baseline does a little less than T5X.
      dropless: forms of the dropless layer; 'auto' is what it takes here.
      rounds: executions of each.
    """
    x = jax.random.normal(
        jax.random.key(0), (shape.groups, shape.tokens, shape.d), jnp.dtype(shape.dtype)
    )
    dense = MlpBlock(shape.ff * shape.capacity_factor, dtype=jnp.dtype(shape.dtype))
    programs = {
        "dense MLP": _layer_program(dense, x, backward),
        "experts alone, slots full": _experts_program(shape, backward),
    }
    settings, dtype = _moe_settings(shape), jnp.dtype(shape.dtype)
    top_k = TokensChoose(num_selected_experts=shape.capacity_factor)
    routers: dict[str, Router] = {
        "experts choose": ExpertsChoose(),
        f"tokens choose top-{shape.capacity_factor}": top_k,
    }
    for name, router in routers.items():
        moe = MoeLayer(settings, router, hidden=shape.ff, dtype=dtype)
        programs[name] = _layer_program(moe, x, backward)
        if one_hot:
            masks = dataclasses.replace(settings, dispatch="one_hot")
            programs[f"{name}, one-hot einsum"] = _layer_program(
                moe.clone(config=masks), x, backward
            )
    dropless_top_k = DroplessTopK(num_selected_experts=shape.capacity_factor)
    for form in dict.fromkeys(grouped_experts.resolve(form) for form in dropless):
        sorting = dataclasses.replace(settings, dispatch=form)
        moe = MoeLayer(sorting, dropless_top_k, hidden=shape.ff, dtype=dtype)
        programs[f"dropless top-{shape.capacity_factor}, {form}"] = _layer_program(moe, x, backward)
    return compare(
        programs, baseline="dense MLP", tokens=shape.groups * shape.tokens, rounds=rounds
    )


def _moe_settings(shape: LayerShape) -> MoeSettings:
    return MoeSettings(
        num_experts=shape.num_experts,
        group_size=shape.tokens,
        train_expert_capacity_factor=float(shape.capacity_factor),
    )


def _layer_program(module: MlpBlock | MoeLayer, x: jax.Array, backward: bool) -> Program:
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), x)["params"])

    def forward(params: Any, x: jax.Array) -> Any:
        if isinstance(module, MoeLayer):
            return module.apply({"params": params}, x, train=True, mutable=[LAYER_STATS])[0]
        return module.apply({"params": params}, x)

    return _differentiated(forward, params, x, backward)


def _experts_program(shape: LayerShape, backward: bool) -> Program:
    """The experts on slots `[1, E, C, d]`, each with a token of its own, as a layer would apply
    them here.
    """
    dtype = jnp.dtype(shape.dtype)
    capacity = shape.groups * shape.tokens * shape.capacity_factor // shape.num_experts
    x = jax.random.normal(jax.random.key(0), (1, shape.num_experts * capacity, shape.d), dtype)
    expert = MlpBlock(shape.ff, dtype=dtype)
    keys = jax.random.split(jax.random.key(1), shape.num_experts)
    params = jax.jit(jax.vmap(lambda key: nn.meta.unbox(expert.init(key, x[0])["params"])))(keys)
    slots = (1, shape.num_experts, capacity)
    each = Assignment(jnp.arange(x.shape[1]).reshape(slots), jnp.ones(slots))

    def forward(params: Any, x: jax.Array) -> jax.Array:
        bank = ExpertBank({name: leaf["kernel"] for name, leaf in params.items()}, dtype=dtype)
        if bank.looped_over:
            return each.apply(bank, x)
        return bank.on_slots(x.reshape(*slots, shape.d))

    return _differentiated(forward, params, x, backward)


def _differentiated(
    forward: Callable[[Any, jax.Array], Any], params: Any, x: jax.Array, backward: bool
) -> Program:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(params, x).astype(jnp.float32)))

    return as_program(jax.grad(loss, argnums=(0, 1)) if backward else forward, params, x)


@dataclasses.dataclass(frozen=True)
class StepComparison:
    """An upcycled model's train step against the dense model's.

    Attributes:
      name: of the size.
      dense: the baseline.
      upcycled: the MoE.
      flop_ratio: model FLOPs of a step, upcycled over dense.
      peak_shares: of the dense and the upcycled step, model FLOP/s over those of one large matrix
        product in this process (`matmul_peak`).
      model_flops: of both steps.
    """

    name: str
    dense: Measurement
    upcycled: Measurement
    flop_ratio: float
    peak_shares: tuple[float, float] = (float("nan"), float("nan"))
    model_flops: tuple[int, int] = (0, 0)


def model_pair(
    size: str,
    *,
    num_experts: int,
    group_size: int,
    inputs: int,
    targets: int,
    dtype: str,
    bindings: Sequence[str] = (),
) -> tuple[list[Model], dict[str, int]]:
    """The dense and the upcycled model of a size, and the lengths of their features.

    Args:
      size: a model file without 'models/' and its ending; 'tiny', 'small', ... are those of T5 1.1.
      num_experts: E.
      group_size: tokens that are routed together, at most; of images, as many whole ones.
      inputs: tokens of a row's encoder; of a model with one stack, more tokens of that.
      targets: tokens of a row's decoder. Images have the model's size.
      dtype: of the computation.
      bindings: of gin, for both.
    """
    file = _model_file(size)
    shared = ["DROPOUT_RATE=0.0", f"ACTIVATION_DTYPE={dtype!r}", *bindings]
    dense = config.load([f"models/{file}.gin"], shared).macro("MODEL")
    lengths = {"inputs": inputs, "targets": targets}
    if dense.vocab_size is None:
        lengths = {"image": dense.config.image_size}
        (image,) = stack_lengths(dense, lengths).values()
        # Groups of 1, 2, 4, ... images, which divide the batches that are measured.
        group_size = image * 2 ** int(math.log2(max(group_size // image, 1)))
    elif "inputs" not in dense.features.task_features:
        lengths = {"targets": inputs + targets}
    sparse = [f"NUM_EXPERTS={num_experts}", f"GROUP_SIZE={group_size}"]
    upcycled = config.load([f"models/{file}_upcycled.gin"], shared + sparse).macro("MODEL")
    return [dense, upcycled], lengths


def shipped_trainer(size: str) -> Trainer:
    """The optimizer, schedule, clipping and parameter groups with which this house pre-trains
    models of the family: a step is measured as users run it.

    Args:
      size: as `model_pair` takes it.
    """
    file = f"models/{_model_file(size)}.gin"
    match config.load([file]).macro("MODEL"):
        case EncoderDecoderModel():
            run = "pretrain"
        case DecoderModel():
            run = "pretrain_lm"
        case _:
            run = "pretrain_images"
    loaded = config.load([file, f"runs/{run}.gin"], ["TRAIN_STEPS=100000"])
    trainer: Trainer = loaded.build("Trainer")()
    return trainer.started_at(Starts(run=0, state=0))


def _model_file(size: str) -> str:
    return size if "_" in size else f"t5_1_1_{size}"


@functools.cache
def matmul_peak(dtype: str, size: int = 4096) -> float:
    """FLOP/s of a product of two square matrices: what this machine reaches at best."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = as_program(jnp.dot, x, x)
    jax.block_until_ready(product.call())
    return 2 * size**3 / min(_timed(product.call)[0] for _ in range(5))


def train_steps(
    name: str,
    models: Sequence[Model],
    trainer: Trainer,
    *,
    batch_size: int,
    lengths: Mapping[str, int],
    rounds: int,
) -> StepComparison:
    """Measures the train step of a dense and of an upcycled model, as the loop jits it.

    Args:
      name: shown in the table.
      models: the dense one, then the upcycled one.
      trainer: optimizer and schedule.
      batch_size: rows.
      lengths: by task feature; those that a model has not are left out.
      rounds: executions of each.
    """
    lengths = {name: lengths[name] for name in models[0].features.task_features}
    programs = step_programs(models, trainer, batch_size=batch_size, lengths=lengths)
    tokens = batch_size * sum(stack_lengths(models[0], lengths).values())
    dense, upcycled = compare(programs, baseline="dense", tokens=tokens, rounds=rounds)
    shape = StepShape(batch_size=batch_size, lengths=lengths)
    one = Partitioner(devices=(jax.devices()[0],))
    costs = [step.of_step(model, shape, one) for model in models]
    peak = matmul_peak(models[0].config.dtype)
    shares = (
        costs[0].model_flops / dense.seconds / peak,
        costs[1].model_flops / upcycled.seconds / peak,
    )
    ratio = costs[1].forward_flops / costs[0].forward_flops
    flops = (costs[0].model_flops, costs[1].model_flops)
    return StepComparison(name, dense, upcycled, ratio, shares, flops)


def step_programs(
    models: Sequence[Model], trainer: Trainer, *, batch_size: int, lengths: Mapping[str, int]
) -> dict[str, Program]:
    """The train steps that `train_steps` measures, by 'dense' and 'upcycled'; see there."""
    return {
        key: _step_program(model, trainer, batch_size, lengths)
        for key, model in zip(("dense", "upcycled"), models, strict=True)
    }


def _step_program(
    model: Model, trainer: Trainer, batch_size: int, lengths: Mapping[str, int]
) -> Program:
    partitioner = Partitioner(devices=(jax.devices()[0],))
    shardings = partitioner.shardings(state_specs(model, trainer.optimizer))
    if model.vocab_size is None:
        rows = model.features.random(None, batch_size=batch_size)
    else:
        rng = np.random.default_rng(3)
        examples = [
            {name: rng.integers(1, model.vocab_size, length) for name, length in lengths.items()}
            for _ in range(batch_size)
        ]
        rows = model.features.pad(examples, lengths, batch_size)
    batch = {key: jax.device_put(value, partitioner.batch_sharding) for key, value in rows.items()}
    with partitioner.activate():
        state = initial_state(model, trainer.optimizer, seed=0, shardings=shardings)
        started = time.perf_counter()
        step = jitted_train_step(
            model, trainer, partitioner=partitioner, shardings=shardings, seed=0
        )
        compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - started
    held = [state]

    def call() -> jax.Array:
        held[0], output = compiled(
            held[0], batch
        )  # the state is donated: each execution goes on from the last
        return output.loss

    return Program(call, seconds, int(compiled.memory_analysis().temp_size_in_bytes))


def decoding_program(
    model: DecoderModel, params: PyTree, prompts: np.ndarray, *, new: int
) -> Program:
    """Reading prompts `[rows, length]` and `new` greedy steps as one program, which no token
    ends. It gives tokens `[rows, new]`.
    """

    def run(params: PyTree, prompts: jax.Array) -> jax.Array:
        def step(
            tokens: jax.Array, index: jax.Array, cache: DecodingCache
        ) -> tuple[jax.Array, DecodingCache]:
            return model.decode_step(params, tokens, index, cache)

        logits, cache = model.start_decoding(params, prompts, max_length=new)
        found = Greedy().decode(step, logits, cache, max_length=new, eos_id=-1)
        return found.tokens[:, 0]

    program = as_program(run, params, jnp.asarray(prompts))
    return dataclasses.replace(program, call=lambda: np.asarray(program.call()))


def layer_table(measured: Sequence[Measurement]) -> str:
    """A Markdown table of one comparison."""
    rows = [
        "| form | time / dense | ms | tokens/s | compile s | temporaries MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {m.name} | {m.ratio:.2f}x | {m.seconds * 1e3:.1f} | {m.tokens_per_second:,.0f} |"
        f" {m.compile_seconds:.1f} | {m.temporary_bytes / 2**20:.0f} |"
        for m in measured
    ]
    return "\n".join(rows) + "\n"


def step_table(measured: Sequence[StepComparison]) -> str:
    """A Markdown table of train steps."""
    rows = [
        (
            "| model | time, upcycled / dense | FLOPs, upcycled / dense | time ratio / FLOP ratio |"
            " dense ms | upcycled ms | CPU ms | tokens/s | share of a matrix product's FLOP/s |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {m.name} | {m.upcycled.ratio:.2f}x | {m.flop_ratio:.2f}x |"
        f" {m.upcycled.ratio / m.flop_ratio:.2f} | {m.dense.seconds * 1e3:.0f} |"
        f" {m.upcycled.seconds * 1e3:.0f} | {m.dense.cpu_seconds * 1e3:.0f},"
        f" {m.upcycled.cpu_seconds * 1e3:.0f} | {m.upcycled.tokens_per_second:,.0f} |"
        f" {m.peak_shares[0]:.0%} dense, {m.peak_shares[1]:.0%} upcycled |"
        for m in measured
    ]
    return "\n".join(rows) + "\n"


def hardware() -> str:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    cpu = f"{os.cpu_count()} cores, {platform.machine()} {_processor()}"
    return f"jax {jax.__version__}, {device.platform} {device.device_kind}, {cpu}, load {load}"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""
