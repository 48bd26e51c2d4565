"""Plans: arithmetic by hand for a tiny model, bounds against what XLA compiled, and the words of
verdicts and errors.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re

import pytest

from upcycle_jax import axes, config
from upcycle_jax.config.stand_ins import stand_ins
from upcycle_jax.costs.hardware import Accelerator
from upcycle_jax.planning import estimate
from upcycle_jax.planning.compilation import Workload
from upcycle_jax.planning.estimate import Hardware, Kind, Range
from upcycle_jax.planning.render import render
from upcycle_jax.text import Format

ROOT = pathlib.Path(__file__).resolve().parents[2]


GIB = 2**30


# A machine whose numbers are easy: 1 TFLOP/s, 1 GiB, 1 GB/s of memory traffic, 1 GB/s of links.
CHIP = Accelerator(
    name="easy", peak_flops=1e12, hbm_bytes=GIB, hbm_bandwidth=1e9, interconnect_bandwidth=1e9
)


TINY = [
    "VOCAB_SIZE=100",
    "T5Config.emb_dim=8",
    "T5Config.num_heads=2",
    "T5Config.num_encoder_layers=2",
    "T5Config.num_decoder_layers=2",
    "T5Config.head_dim=4",
    "T5Config.mlp_dim=16",
    "NUM_EXPERTS=4",
    "GROUP_SIZE=32",
    "BATCH_SIZE=8",
    "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
]


ONE_LAYER = (
    "T5Config.num_encoder_layers=1",
    "T5Config.num_decoder_layers=1",
    "ENCODER_SPARSE_LAYOUT=(0,)",
    "DECODER_SPARSE_LAYOUT=(0,)",
)
"""A sparse layer in each stack is enough where numbers of one model are compared."""


@functools.cache
def workload(*bindings, files=("models/t5_1_1_base_upcycled.gin", "runs/pretrain.gin")):
    loaded = config.load(files, [*TINY, *bindings] if "pods" not in files[0] else bindings)
    own = TINY if "pods" not in files[0] else ()
    return run_of(config.load(files, [*own, *bindings, *stand_ins(loaded)]))


def run_of(loaded):
    return Workload.of_run(loaded.build("train", train_eval_dataset_cfg=None)())


def make(work, chips=1, *, chip=CHIP, **given):
    return estimate.make_plan(
        "tiny",
        work,
        Hardware(chip, chips),
        **({"extra_steps": 1000, "dense_steps": 4000, "mfu": (0.25, 0.5)} | given),
    )


@pytest.fixture(scope="module")
def tiny():
    return make(workload())


def test_parameters_flops_and_device_days_by_hand(tiny):
    """d = 8, ff = 16, 2 heads of 4, 2 + 2 layers, one of each two an MoE of 4 experts; 8 rows of 8
    inputs and 4 targets.

    Parameters: embedding and logits 2 x 100 x 8 = 1600; attention 4 x 8 x 8 = 256 in 2 encoder
    layers, twice in 2 decoder layers: 6 x 256 = 1536; MLPs 3 x 8 x 16 = 384 in 4 layers = 1536;
    norms (2 x 2 + 2 x 3 + 2) x 8 = 96; two tables of 32 x 2 = 128.
    """
    dense, sparse = tiny.costs[Kind.DENSE], tiny.costs[Kind.UPCYCLED]
    assert dense.parameters == dense.active_parameters == 1600 + 1536 + 1536 + 96 + 128 == 4896
    # Two MoE layers: 3 more MLPs of 384 and a router of 8 x 4 each. Two experts a token, so one
    # more MLP is active.
    assert sparse.parameters == 4896 + 2 * (3 * 384 + 32) == 7264
    assert sparse.active_parameters == 4896 + 2 * (384 + 32) == 5728
    # Forward FLOPs. Encoder: 64 tokens, decoder: 32. A projection 8 x 8 is 128 FLOPs a token,
    # logits and sums 4 x 8 x length.
    encoder_attention = 2 * 64 * (4 * 128 + 4 * 8 * 8)
    decoder_attention = 2 * 32 * (4 * 128 + 4 * 8 * 4)
    cross_attention = 2 * (2 * 128 * (32 + 64) + 4 * 8 * 32 * 8)
    relative_positions = 2 * 2 * 32 * (8**2 + 4**2)
    mlps = (
        4 * 2 * 384 // 4 * (2 * 64 + 2 * 32)
    )  # 2 x 384 FLOPs a token and layer; 2 layers of each stack
    logits = 32 * 2 * 8 * 100
    forward = (
        encoder_attention + decoder_attention + cross_attention + relative_positions + mlps + logits
    )
    # Forward and two gradients; the product of a position table with one-hot rows needs only one.
    assert dense.flops in (3 * forward, 3 * forward - relative_positions)
    # Experts: encoder 2 groups of 32 tokens, C = 2 x 32 / 4 = 16 slots x 4 experts = 64 per group,
    # 128 in all; decoder 1 group: 64.
    dense_mlps = 2 * 384 * (64 + 32)
    experts, routers = 2 * 384 * (128 + 64), 2 * 8 * 4 * (64 + 32)
    # The decoder's load-balancing loss takes two sums of 32 tokens for 4 experts, one of which has
    # a gradient; the gradient of each slot's weight is a sum over 8.
    sums = 3 * 2 * 32 * 4 + 2 * 8 * (128 + 64)
    assert sparse.flops - dense.flops == 3 * (experts + routers - dense_mlps) + sums
    # 0.25 to 0.5 of 1e12 FLOP/s.
    assert dense.time.compute == Range(dense.flops / 0.5e12, dense.flops / 0.25e12)
    assert sparse.time.compute == Range(
        sparse.flops / (0.5e12 * 0.97), sparse.flops / (0.25e12 * 0.75)
    )
    # 4 bytes of each parameter and of its gradient, and the optimizer's, read and written at 1e9
    # bytes a second; one device sends nothing.
    state = dense.memory.state
    assert (
        state.parameters == 4 * 4896
        and dense.time.memory == 2 * (2 * 4 * 4896 + state.optimizer) / 1e9
        and dense.time.network == 0
    )
    days = tiny.equal_steps()[0].device_days
    assert days.low == pytest.approx(1000 * max(dense.time.compute.low, dense.time.memory) / 86400)
    assert days.high == pytest.approx(1000 * (dense.time.compute.high + dense.time.memory) / 86400)


def test_a_number_of_device_days_by_hand(tiny):
    """100,000 steps of 0.5 to 1 s on 64 devices: 100000 x 0.5 x 64 / 86400 = 37.04 to 74.07
    device-days.
    """
    cost = dataclasses.replace(
        tiny.costs[Kind.DENSE], time=estimate.StepTime(Range(0.5, 1.0), memory=0.0, network=0.0)
    )
    found = dataclasses.replace(
        tiny, hardware=Hardware(CHIP, 64), costs={**tiny.costs, Kind.DENSE: cost}
    ).spend(Kind.DENSE, Range(1e5, 1e5))
    assert (found.device_days.low, found.device_days.high) == (
        pytest.approx(37.037, abs=1e-3),
        pytest.approx(74.074, abs=1e-3),
    )
    assert found.tokens == Range(1e5 * 96, 1e5 * 96)  # 8 rows of 8 + 4 positions


def test_equal_costs_are_equal(tiny):
    """What the upcycled run's FLOPs (or device time) pay for, per kind."""
    ratio = tiny.costs[Kind.UPCYCLED].flops / tiny.costs[Kind.DENSE].flops
    dense, upcycled, scratch = tiny.equal_flops()
    assert dense.steps.low == dense.steps.high == pytest.approx(
        1000 * ratio
    ) and upcycled.steps == scratch.steps == Range(1000, 1000)
    assert dense.flops.low == pytest.approx(upcycled.flops.low)
    by_time = {spent.kind: spent for spent in tiny.equal_time()}
    assert by_time[Kind.UPCYCLED].steps == Range(1000, 1000)
    mine, other = tiny.costs[Kind.UPCYCLED].time.total, tiny.costs[Kind.DENSE].time.total
    assert by_time[Kind.DENSE].steps.low == pytest.approx(
        1000 * min(mine.low / other.low, mine.high / other.high)
    )
    assert by_time[Kind.DENSE].device_days == by_time[Kind.UPCYCLED].device_days
    # 1000 steps of the MoE over 4000 dense ones.
    assert tiny.extra_share == pytest.approx(ratio / 4)


def test_memory_and_network_follow_the_mesh():
    """Four expert partitions hold one expert each; gradients of experts are summed over no replica,
    all others over four.
    """

    def sparse(chips, *bindings):
        work = workload(*bindings)
        partitions = work.partitioner.num_expert_partitions
        abstract = estimate.AbstractPartitioner(num_expert_partitions=partitions, num_devices=chips)
        work = dataclasses.replace(work, partitioner=abstract)
        return (
            work,
            estimate.cost_of(Kind.UPCYCLED, work, Hardware(CHIP, chips), mfu=(0.25, 0.5)).memory,
        )

    # 8 and 4 groups, which four devices share evenly.
    groups = "GROUP_SIZE=8"
    (whole, one), (split, four) = sparse(4, groups), sparse(4, groups, "NUM_EXPERT_PARTITIONS=4")
    experts = 2 * 4 * 384
    assert one.state.parameters == 4 * 7264 and four.state.parameters == 4 * (
        7264 - experts * 3 // 4
    )
    # A ring sends 2 x 3 / 4 of each gradient: bfloat16, but for the embedding and the logits of 800
    # parameters each.
    assert estimate.gradient_bytes(whole) == (2 * 7264 + 2 * 1600) * 2 * 3 // 4
    assert estimate.gradient_bytes(split) == (2 * (7264 - experts) + 2 * 1600) * 2 * 3 // 4
    assert whole.costs.exchange_bytes == 0 < split.costs.exchange_bytes
    # The batch is split over the same four devices.
    alone = sparse(1, groups)[1].activations
    assert one.activations == four.activations == pytest.approx(alone / 4, abs=1)


def test_parameters_that_the_data_axis_divides_are_gathered_and_scattered():
    """Four devices, FSDP: each has a quarter of the parameters with an axis of the embedding.
    Without recomputation they are gathered once for each microbatch, and their gradients scattered
    once, 3 / 4 of them each time.
    """
    work = workload("NUM_MICROBATCHES=2", "GROUP_SIZE=8")
    mesh = estimate.AbstractPartitioner(fsdp=True, num_devices=4)
    work = dataclasses.replace(work, partitioner=mesh)
    specs = work.model.param_specs()
    divided = [leaf for leaf in specs.values() if axes.EMBED in leaf.axes]
    sizes = [math.prod(leaf.shape) * (4 if axes.VOCAB in leaf.axes else 2) for leaf in divided]
    assert estimate.divided_bytes(work) == sum(sizes)
    others = sum(math.prod(leaf.shape) * 2 for leaf in specs.values() if leaf not in divided)
    assert estimate.passes_over_divided(work) == 2 * 2
    assert estimate.gradient_bytes(work) == pytest.approx(
        4 * sum(sizes) * 3 / 4 + 2 * others * 3 / 4, abs=1
    )


def test_microbatches_and_rematerialisation_take_less_memory():
    def activations(*bindings):
        work = workload(*ONE_LAYER, *bindings)
        partitioner = estimate.AbstractPartitioner(num_devices=1)
        return dataclasses.replace(work, partitioner=partitioner).costs.activation_bytes

    plain = activations()
    assert activations("NUM_MICROBATCHES=2") == pytest.approx(plain / 2, rel=0.01)
    assert (
        activations("T5Config.remat_policy='full'")
        < activations("T5Config.remat_policy='minimal'")
        < plain
    )


def test_kept_activations_of_one_layer_by_hand():
    """Full rematerialisation keeps the residual stream, so each further encoder layer keeps one
    array [8, 8, 8] of bfloat16 more.
    """

    def activations(layers):
        stack = f"T5Config.num_encoder_layers={layers}"
        bound = (*ONE_LAYER[1:], stack, "T5Config.remat_policy='full'")
        work = dataclasses.replace(workload(*bound), partitioner=estimate.AbstractPartitioner())
        return work.costs.activation_bytes

    # A bfloat16 stream [8 rows, 8 positions, 8].
    assert activations(3) - activations(2) == activations(2) - activations(1) == 8 * 8 * 8 * 2


def compiled_pods():
    """Rows of docs/pods.md: configuration -> GiB that XLA's compiled step needs, FLOPs per device,
    slice, GiB that it sums, GiB that it exchanges.
    """
    rows = {}
    for line in (ROOT / "docs" / "pods.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if (
            len(cells) > 9
            and re.fullmatch(r"(base|large|xl)_(dense|upcycled)", cells[0])
            and re.match(r"[\d.]+ GiB", cells[7])
        ):
            rows[cells[0]] = (
                float(cells[7].split()[0]),
                float(cells[9]),
                cells[2].split()[0],
                float(cells[11].split()[0]),
                0.0 if cells[10] == "-" else float(cells[10].split()[0]),
            )
    return rows


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("base_dense", marks=pytest.mark.slow),
        "base_upcycled",
        pytest.param("large_dense", marks=pytest.mark.slow),
        pytest.param("large_upcycled", marks=pytest.mark.slow),
        pytest.param("xl_dense", marks=pytest.mark.slow),
        pytest.param("xl_upcycled", marks=pytest.mark.slow),
    ],
)
def test_estimates_hold_what_xla_compiled(name):
    """The shipped pods were compiled (docs/pods.md): what XLA needs lies between the two ends of
    the estimate.
    """
    needed, flops, topology, summed, exchanged = compiled_pods()[name]
    generation, shape = topology.split(":")
    chips = 1
    for side in shape.split("x"):
        chips *= int(side)
    work = workload(files=(f"papers/sparse_upcycling/pods/{name}.gin",))
    hardware = Hardware.parse(f"tpu_{generation}:{chips}")
    partitioner = estimate.AbstractPartitioner(
        num_expert_partitions=work.partitioner.num_expert_partitions,
        num_devices=hardware.num_devices,
    )
    work = dataclasses.replace(work, partitioner=partitioner)
    # What the doc calls other collectives are the sums of gradients.
    assert sum(estimate.summed_bytes(work).values()) / GIB == pytest.approx(summed, rel=0.03)
    assert work.costs.exchange_bytes / GIB == pytest.approx(exchanged, abs=5e-3)
    cost = estimate.cost_of(Kind.UPCYCLED, work, hardware, mfu=(0.25, 0.5))
    assert cost.memory.needed.low / GIB <= needed <= cost.memory.needed.high / GIB
    assert cost.flops / chips == pytest.approx(flops, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("llama_3_2_1b_dense", 5.95),
        ("llama_3_2_1b_upcycled", 12.07),
        ("qwen3_0_6b_dense", 4.30),
        ("qwen3_0_6b_upcycled", 5.47),
        ("llama_3_8b_upcycled", 30.96),
    ],
)
def test_estimates_of_language_models_are_near_what_xla_compiled(name, needed):
    """GiB per device of docs/pods.md, of Llama 3 8B those that are in use at once. Layers are
    computed again there: what one of them holds in its backward pass, logits, and the rows that
    dropless experts reserve decide.
    """
    files = (f"papers/language_models/pods/{name}.gin",)
    work = run_of(config.load(files, stand_ins(config.load(files))))
    partitioner = estimate.AbstractPartitioner(
        num_expert_partitions=work.partitioner.num_expert_partitions, fsdp=True, num_devices=64
    )
    work = dataclasses.replace(work, partitioner=partitioner)
    cost = estimate.cost_of(Kind.UPCYCLED, work, Hardware.parse("tpu_v5e:64"), mfu=(0.25, 0.5))
    assert cost.memory.needed.high / GIB == pytest.approx(needed, rel=0.15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpu_v5e", "is not KIND:CHIPS, e.g. tpu_v5e:256"),
        ("tpu_v5e:0", "is not KIND:CHIPS"),
        ("tpu_v9:8", "no accelerator 'tpu_v9' is known; known: tpu_v2.*Did you mean tpu_v"),
    ],
)
def test_hardware_that_does_not_exist_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Hardware.parse(text)


def test_two_devices_per_chip_on_v3():
    hardware = Hardware.parse("v3:32")
    assert (hardware.num_devices, hardware.chip.device_hbm_bytes) == (64, 16 * GIB)


@pytest.mark.parametrize(
    ("bindings", "given", "message"),
    [
        (
            ("NUM_EXPERT_PARTITIONS=3",),
            {},
            (
                "8 devices cannot form a mesh of 3 expert x 1 model partitions.*Change"
                " NUM_EXPERT_PARTITIONS or"
            ),
        ),
        (
            ("BATCH_SIZE=12",),
            {},
            "BATCH_SIZE of 12 rows does not split over the 8 data shards.*choose a multiple of 8",
        ),
        (
            ("NUM_EXPERT_PARTITIONS=8",),
            {},
            (
                "expert.*is not divisible by the 8 partitions.*the largest partition count that"
                " fits is 4"
            ),
        ),
        (("GROUP_SIZE=24",), {}, "64 tokens do not divide into groups of GROUP_SIZE=24"),
        ((), {"extra_steps": 0}, "extra_steps 0 and dense_steps 4000 must be at least 1"),
        ((), {"mfu": (0.5, 0.3)}, "mfu is 0.5,0.3: give the lowest and the highest"),
    ],
)
def test_what_does_not_divide_is_said(bindings, given, message):
    with pytest.raises(ValueError, match=message):
        make(workload(*bindings), 8, **given)


def test_microbatches_smaller_than_a_group_are_no_plan():
    with pytest.raises(ValueError, match="NUM_MICROBATCHES=4 changes routing.*GROUP_SIZE=8"):
        make(workload("NUM_MICROBATCHES=4"))


def test_a_dense_model_is_no_plan():
    files = ["models/t5_1_1_base.gin", "runs/pretrain.gin"]
    dense = run_of(config.load(files, stand_ins(config.load(files))))
    with pytest.raises(ValueError, match="MODEL is dense: give the model that it becomes"):
        make(dense)


def test_a_model_that_does_not_fit_says_what_to_change():
    """A chip of 32 KiB holds neither parameters of 29 KB with their gradients nor the
    activations.
    """
    small = dataclasses.replace(CHIP, hbm_bytes=32 * 1024)
    found = make(workload(), 4, chip=small)
    assert found.costs[Kind.UPCYCLED].memory.verdict == "DOES NOT FIT"
    text = render(found, Format.TEXT)
    assert "DOES NOT FIT: the upcycled model needs" in text
    for name in (
        "NUM_EXPERT_PARTITIONS = 4",
        "NUM_MODEL_PARTITIONS = 2",
        "NUM_MICROBATCHES = 2",
        "BATCH_SIZE",
        "REMAT",
    ):
        assert name in text, name


def test_text_fits_the_terminal_and_json_holds_everything(tiny):
    for style in (Format.TEXT, Format.MARKDOWN):
        text = render(tiny, style)
        limit = 140 if style == Format.TEXT else 10_000
        assert not [line for line in text.splitlines() if len(line) > limit]
        assert (
            "device-days" in text
            and "arXiv 2412.09952" in text
            and "FITS" in text
            and "MoE from scratch" in text
        )
    found = json.loads(render(tiny, Format.JSON))
    assert found["costs"]["upcycled"]["flops_per_step"] == tiny.costs[Kind.UPCYCLED].flops
    assert [row["kind"] for row in found["spending"]["equal_flops"]] == [str(kind) for kind in Kind]
