"""The first screen of reports: its words, by hand."""

import numpy as np
import pytest

from upcycle_jax.studies import page, paid
from upcycle_jax.studies.run_results import Run


def run(losses, *, start=100, flops=1.0, parameters=1000, seconds=0.25, load=None, cores=2):
    """Evaluations every 10 steps."""
    manifest = {"start_step": start, "parameters": parameters, "train_flops_per_step": flops}
    manifest |= {"starts": [{"cores": cores}] if load else [{}]}
    row = {"step": start + 10, "timing/steps_per_second": 1 / seconds}
    row |= {"timing/load_average": load} if load else {}
    rows = [
        {"step": start + 10 * i, "cross_ent_loss": loss, "accuracy": 0.5}
        for i, loss in enumerate(losses)
    ]
    return Run("r", manifest, [row], {"task": rows})


def pair(*differences, **left):
    """One seed for each list of differences to a dense run of loss 2."""
    dense = [run([2.0] * len(differences[0])) for _ in differences]
    ours = [run([2 + d for d in one], parameters=4000, **left) for one in differences]
    return paid.Pair("upcycled", "dense", tuple(ours), tuple(dense))


def test_a_gain_is_told_with_its_interval_its_beginning_and_its_cost():
    # At the end -0.10, -0.11, -0.12: -0.11 with a half width of 4.303 x 0.01 / sqrt(3) = 0.0248.
    # Means at 0, 10, 20, 30 steps: +0.4, -0.1, +0.1, -0.11: ahead for good from 30 on.
    found = pair([0.4, -0.1, 0.1, -0.10], [0.4, -0.1, 0.1, -0.11], [0.4, -0.1, 0.1, -0.12])
    text = paid.sentence(found)
    assert text.startswith("**Yes: upcycled ends 0.1100 \u00b1 0.0248 below dense** after 30 extra")
    assert "(3 seeds), ahead from step +30 on" in text and "has 4.0x the parameters" in text


def test_at_equal_compute_a_dearer_step_counts():
    # Twice the FLOPs: the 20 of the dense run are 10 steps, where the difference is +0.2.
    text = paid.sentence(pair([0.4, 0.2, -0.1], flops=2.0))
    assert "at equal extra compute it is 0.2000 above" in text
    assert "costs 2.00x the FLOPs" in text and "one seed, so no error bar" in text


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((-0.10, -0.11), "Yes"),  # Half width 12.71 x 0.005 = 0.064.
        ((-0.01, -0.05), "It cannot be told"),  # 12.71 x 0.02 = 0.25
        ((0.10, 0.11), "No"),
        ((-0.1,), "Yes"),
    ],
)
def test_the_interval_decides(ends, verdict):
    text = paid.sentence(pair(*([0.4, end] for end in ends)))
    assert text.startswith(f"**{verdict}: ")
    assert ("behind at the last evaluation" in text) == (np.mean(ends) > 0)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (1.9, " and 2.00x the time"),
        (7.2, " (times are not compared: the load average was 7.2 on 2 cores)"),
        (None, " and 2.00x the time (the machine's load was not recorded)"),
    ],
)
def test_times_are_compared_on_a_quiet_machine(load, said):
    left, right = run([2, 1], seconds=0.5, load=load), run([2, 1], load=load)
    assert paid.time_words([left], [right]) == said
    if load is None:  # What the sweep recorded stands for it.
        assert "was 9.0 on 4 cores" in paid.time_words([left], [right], (9.0, 4))


def test_long_sections_are_folded():
    html = page.to_html("# T\n\n## Did it pay?\n\nYes.\n\n## Every run\n\nMany.\n")
    assert "<h2>Did it pay?</h2>" in html
    assert "<details><summary><b>Every run</b></summary>\n<p>Many.</p></details>" in html
