"""A plan on more chips, by hand: a chip with four links of 25 GB/s and slices of four."""

import dataclasses
import functools

import pytest

from upcycle_jax import config
from upcycle_jax.config.stand_ins import stand_ins
from upcycle_jax.costs.hardware import GIB, Accelerator
from upcycle_jax.planning import estimate, scale
from upcycle_jax.planning.compilation import Workload
from upcycle_jax.planning.estimate import Hardware
from upcycle_jax.planning.render import render
from upcycle_jax.text import Format

CHIP = Accelerator(
    name="easy",
    peak_flops=1e12,
    hbm_bytes=GIB,
    hbm_bandwidth=1e9,
    interconnect_bandwidth=1e11,
    torus_axes=2,
    slice_chips=4,
    network_bandwidth=1e9,
    source="a page",
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
    "NUM_EXPERT_PARTITIONS=4",
    "GROUP_SIZE=8",
    "BATCH_SIZE=8",
    "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
]


@functools.cache
def workload():
    """One for all chips: its models are traced once."""
    files = ("models/t5_1_1_base_upcycled.gin", "runs/pretrain.gin")
    run = config.load(files, [*TINY, *stand_ins(config.load(files, TINY))])
    return Workload.of_run(run.build("train", train_eval_dataset_cfg=None)())


def plan_on(chip, chips=4):
    return estimate.make_plan(
        "tiny", workload(), Hardware(chip, chips), extra_steps=1000, dense_steps=4000
    )


@pytest.fixture(scope="module")
def plan():
    return plan_on(CHIP)


def test_every_chip_has_the_same_work(plan):
    one, many = (scale.scaled(plan, chips) for chips in (4, 16))
    assert (one.slices.count, many.slices.count, many.slices.chips) == (1, 4, 4)
    assert many.workload.batch_size == 4 * one.workload.batch_size == 32
    assert one.workload.partitioner.mesh.shape == {"data": 1, "expert": 4, "model": 1}
    assert many.workload.partitioner.mesh.shape == {"data": 4, "expert": 4, "model": 1}
    # Tables of positions are looked up once, however many rows there are.
    assert one.compute == pytest.approx(many.compute, rel=0.02)
    assert one.exchange_bytes == many.exchange_bytes == plan.workload.costs.exchange_bytes > 0
    assert one.memory.needed == many.memory.needed


def test_times_of_links_by_hand(plan):
    found = scale.scaled(plan, 16)
    sent = found.exchange_bytes
    # 2 x 2 chips with rings: 2 * sent / (8 * 25e9). Over the network three of four parts leave.
    assert found.exchange_inside == pytest.approx(2 * sent / (8 * 25e9))
    assert found.exchange_across == pytest.approx(0.75 * sent / 1e9)
    # Experts of 1152 parameters on a device are summed over four slices; all others, of 7264 - 4 *
    # 1152 parameters with 1600 in float32 and the rest in bfloat16, in each slice over four devices
    # and then a quarter of them over four slices. 2 * 3 / 4 of each.
    experts, others = 2 * 2 * 384, 2 * (7264 - 2 * 4 * 384) + 2 * 1600
    assert found.sums_inside == pytest.approx(1.5 * others / 1e11)
    assert found.sums_across == pytest.approx(1.5 * (experts + others / 4) / 1e9)
    alone = scale.scaled(plan, 4)
    assert alone.sums_across == alone.exchange_across == 0
    assert alone.sums_inside == pytest.approx(estimate.gradient_bytes(alone.workload) / 1e11)


def test_rows_that_there_is_room_for(plan):
    memory = plan.costs[estimate.Kind.UPCYCLED].memory
    room = memory.state.with_gradients + 3.5 * memory.activations / 2
    small = dataclasses.replace(CHIP, hbm_bytes=round(room))
    # Two rows of a device take the activations: there is room for three.
    assert scale.scaled(plan_on(small), 4).most_rows == 3
    assert scale.scaled(plan_on(dataclasses.replace(CHIP, hbm_bytes=1000)), 4).most_rows == 0


def test_whether_experts_must_stay_in_a_slice(plan):
    slow = dataclasses.replace(CHIP, network_bandwidth=1e6)
    fast = dataclasses.replace(CHIP, network_bandwidth=1e12)
    assert scale.scaled(plan_on(slow), 16).verdict == "yes"
    assert scale.scaled(plan_on(fast), 16).verdict == "no"
    assert scale.scaled(plan, 4).verdict == "one slice"
    unknown = scale.scaled(plan_on(dataclasses.replace(CHIP, network_bandwidth=None)), 16)
    assert (unknown.verdict, unknown.sums_across) == ("not known", None)
    lone = scale.scaled(plan_on(dataclasses.replace(CHIP, slice_chips=2)), 16)
    assert lone.exchange_inside is None and lone.verdict.startswith("cannot")


def test_the_table_and_its_arithmetic(plan):
    found = [scale.scaled(plan, chips) for chips in (4, 16)]
    text = render(plan, Format.TEXT, found)
    assert "At scale, every easy with the same work" in text and "16 chips" in text
    assert "4 chips in a block of 2 x 2: 2 x " in text and "(8 x 2.5e+10 bytes/s of a link)" in text
    assert "(figures of links: a page)" in text
    assert not [line for line in text.splitlines() if len(line) > 140]
    assert "At scale" not in render(plan, Format.TEXT)
    assert '"at_scale"' in render(plan, Format.JSON, found)
    assert '"at_scale"' not in render(plan, Format.JSON)


def test_rows_that_do_not_divide_are_refused(plan):
    with pytest.raises(ValueError, match="6 devices cannot form a mesh of 4 expert"):
        scale.scaled(plan, 6)
    larger = dataclasses.replace(plan, hardware=Hardware(CHIP, 16))
    with pytest.raises(ValueError, match="--scale=3: 8 rows on 16 chips.*give a multiple of 2"):
        scale.scaled(larger, 3)
