"""The advisor on runs that are drawn from the law, and on runs where it does not apply."""

import json

import numpy as np
import pytest

from upcycle_jax import plan
from upcycle_jax.planning.upcycling_law import PowerLaw, UpcyclingLaw
from upcycle_jax.studies import advice

PER_STEP, START, EXTRA = 1000, 20_000, 20_000
DENSE = PowerLaw(30.0, 0.25, 1.2)
UPCYCLED = UpcyclingLaw(63.5, 0.0, 0.32, 0.0, 1.22)
SCRATCH = PowerLaw(120.0, 0.33, 1.14)
PARENT = START * PER_STEP


def write_run(folder, start, losses, *, moe, seed, parameters=100_000):
    steps = start + np.arange(0, EXTRA + 1, 1000)
    noise = np.random.default_rng(seed + 10 * moe + start).normal(size=steps.size)
    values = losses * np.exp(2e-4 * noise)
    manifest = {"start_step": start, "parameters": parameters, "train_flops_per_step": 1}
    manifest |= {"status": "finished", "step": int(steps[-1])}
    manifest |= {"model": {"moe": {"num_experts": 8} if moe else None}}
    (folder / "training_eval" / "task").mkdir(parents=True)
    (folder / "train").mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rate = {"timing/steps_per_second": 4.0, "timing/target_tokens_per_second": 4.0 * PER_STEP}
    (folder / "train" / "metrics.jsonl").write_text(
        json.dumps({"step": int(steps[-1]), **rate}) + "\n"
    )
    rows = [
        {"step": int(step), "cross_ent_loss": float(loss), "accuracy": 0.5}
        for step, loss in zip(steps, values, strict=True)
    ]
    (folder / "training_eval" / "task" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three seeds of each kind, drawn from known laws."""

    def make(upcycled=UPCYCLED, parameters=100_000):
        root = tmp_path_factory.mktemp("runs")
        extra = np.maximum(np.arange(0, EXTRA + 1, 1000), 1) * float(PER_STEP)
        for seed in range(3):
            write_run(
                root / f"dense{seed}",
                START,
                DENSE.loss(PARENT + extra),
                moe=False,
                seed=seed,
                parameters=parameters,
            )
            write_run(root / f"up{seed}", START, upcycled.loss(PARENT, extra), moe=True, seed=seed)
            write_run(root / f"scratch{seed}", 0, SCRATCH.loss(extra), moe=True, seed=seed)
        return root

    return make


def known(first, second):
    """Where the known laws cross."""
    from upcycle_jax.planning.upcycling_law import ahead

    return ahead(first, second, start=1e5, end=1e10)[0]


def test_crossings_of_known_laws_lie_in_the_intervals(study, capsys):
    passes = known(lambda d: UPCYCLED.loss(PARENT, d), lambda d: DENSE.loss(PARENT + d))
    scratch = known(SCRATCH.loss, lambda d: UPCYCLED.loss(PARENT, d))
    runs = advice.read(study())
    assert (len(runs.dense), len(runs.upcycled), len(runs.scratch)) == (3, 3, 3)
    (one,) = advice.advise(runs, resamples=20)
    assert one.parent == PARENT and not one.reasons
    assert one.passes_dense.begin == pytest.approx(passes, rel=0.1)
    assert one.passes_dense.low <= passes <= one.passes_dense.high and one.passes_dense.seen
    assert one.scratch_passes.low <= scratch <= one.scratch_passes.high
    text = advice.text(runs, [one])
    assert "upcycling passes dense continuation after" in text and "of the parent" in text
    assert ("[extrapolated" in text) == (not one.scratch_passes.seen)


def test_an_over_trained_parent_is_no_case_for_the_law(study, capsys):
    # 20,000 steps of 1000 tokens on 10,000 parameters: 2000 tokens per parameter.
    root = study(parameters=10_000)
    assert plan.main([f"--advise={root}"]) == 0
    out = capsys.readouterr().out
    assert "THE LAW DOES NOT APPLY" in out and "2,000 tokens per parameter" in out
    assert "passes" not in out.split("Parents of")[1]
    assert plan.main([f"--advise={root}", "--format=json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["advice"]
    assert one["passes_dense"] is None and len(one["reasons"]) == 1


def test_runs_that_no_longer_learn_are_no_case_for_the_law(study):
    (one,) = advice.advise(advice.read(study(UpcyclingLaw(1.0, 0.0, 0.0, 0.0, 1.0))))
    assert any("hardly lowers the loss" in why for why in one.reasons)


def test_what_is_missing_is_said(tmp_path, capsys):
    assert plan.main([f"--advise={tmp_path}/none"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert plan.main([f"--advise={tmp_path}"]) == 2
    assert "no dense and no upcycled run" in capsys.readouterr().err
