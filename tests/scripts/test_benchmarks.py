"""What the benchmarks compare is the same computation; how fast it is, tests do not say. Layers
are measured in the dry run of `test_device_check`.
"""

import benchmarks
import jax
import pytest
from benchmarks import Measurement, StepComparison


def test_the_dense_baseline_has_as_many_flops():
    # C = 2: every token is worth two experts of ff 32, or one MLP of 64. XLA also counts
    # activations, hence the tolerance.
    x = jax.random.normal(jax.random.key(0), (1, 512, 64))
    dense = benchmarks.MlpBlock(128)
    params = dense.init(jax.random.key(0), x)
    flops = jax.jit(dense.apply).lower(params, x).compile().cost_analysis()["flops"]
    assert flops == pytest.approx(2 * 512 * 64 * 128 * 3, rel=0.1)


def test_step_table_divides_the_time_ratio_by_the_flop_ratio():
    dense = Measurement("dense", 0.1, 1.0, 1.0, 0, 1000.0, 0.15)
    upcycled = Measurement("upcycled", 0.18, 1.8, 1.0, 0, 555.0, 0.3)
    table = benchmarks.step_table([StepComparison("tiny", dense, upcycled, 1.5, (0.3, 0.25))])
    row = "| tiny | 1.80x | 1.50x | 1.20 | 100 | 180 | 150, 300 | 555 | 30% dense, 25% upcycled |"
    assert table.splitlines()[2] == row


def test_each_program_is_compared_with_the_baseline_that_ran_beside_it():
    # The baseline takes 1, 2 and 4 units, the other always twice as long: a drifting machine does
    # not change the ratio.
    clock = iter([0, 1, 1, 3, 3, 5, 5, 9, 9, 13, 13, 21])
    program = benchmarks.Program(lambda: 0, 0.0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks.time, "perf_counter", lambda: next(clock))
        base, other = benchmarks.compare(
            {"base": program, "other": program}, baseline="base", tokens=10, rounds=3
        )
    assert (base.seconds, base.ratio, base.tokens_per_second) == (2, 1.0, 5)
    assert (other.seconds, other.ratio) == (4, 2.0)


@pytest.mark.parametrize(
    ("size", "optimizer"),
    [("tiny", "Adafactor"), ("tiny_lm", "AdamW"), ("vit_tiny", "Adafactor")],
)
def test_steps_are_measured_with_the_optimizer_that_the_run_files_give_the_family(size, optimizer):
    # runs/pretrain.gin has T5's Adafactor, pretrain_lm.gin AdamW behind a clipped norm of 1,
    # pretrain_images.gin Adafactor whose updates are not scaled by the parameter's size.
    trainer = benchmarks.shipped_trainer(size)
    assert type(trainer.optimizer).__name__ == optimizer
    assert trainer.max_gradient_norm == (1.0 if optimizer == "AdamW" else None)
    scaled = getattr(trainer.optimizer, "multiply_by_parameter_scale", None)
    assert scaled is {"tiny": True, "tiny_lm": None, "vit_tiny": False}[size]
