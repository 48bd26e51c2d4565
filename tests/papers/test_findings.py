"""The paper's claims beside stored studies: the rule by hand, the data, a study made by hand."""

import json
import pathlib

import pytest

from upcycle_jax import paper
from upcycle_jax.config import load, search
from upcycle_jax.papers import findings as lib
from upcycle_jax.papers.findings import Expect, Verdict, combined, verdict_of
from upcycle_jax.studies.intervals import Interval, mean_interval


@pytest.mark.parametrize(
    ("low", "high", "expect", "verdict"),
    [
        (-0.03, -0.01, "lower", "agree"),
        (-0.03, 0.01, "lower", "cannot tell"),
        (0.01, 0.03, "lower", "differ"),
        (0.01, 0.03, "higher", "agree"),
        (-0.01, 0.03, "higher", "cannot tell"),
        (-0.03, -0.01, "higher", "differ"),
        # Equal within 0.02: inside, reaching over an end, and wholly outside of the margin.
        (-0.015, 0.01, "equal", "agree"),
        (-0.03, 0.01, "equal", "cannot tell"),
        (0.01, 0.05, "equal", "cannot tell"),
        (0.025, 0.05, "equal", "differ"),
        (-0.05, -0.025, "equal", "differ"),
    ],
)
def test_the_rule(low, high, expect, verdict):
    interval = Interval((low + high) / 2, (high - low) / 2, 3)
    assert verdict_of(interval, Expect(expect), 0.02) == verdict


def test_one_seed_decides_nothing_and_no_study_is_not_run():
    assert verdict_of(mean_interval([-0.5]), Expect.LOWER) == Verdict.CANNOT_TELL
    assert verdict_of(mean_interval([]), Expect.LOWER) == Verdict.CANNOT_TELL
    assert verdict_of(None, Expect.LOWER) == Verdict.NOT_RUN


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        (["agree", "agree"], "agree"),
        (["agree", "cannot tell"], "cannot tell"),
        (["agree", "not run"], "cannot tell"),
        (["cannot tell", "differ", "agree"], "differ"),
        (["not run", "not run"], "not run"),
        ([], "not run"),
    ],
)
def test_claims_of_several_comparisons(parts, verdict):
    assert combined(map(Verdict, parts)) == verdict


def test_the_data_hold_together():
    claims = lib.claims()
    assert len({one.name for one in claims}) == len(claims) > 25
    assert all(one.kind in lib.KINDS and one.claim and one.paper for one in claims)
    named = {part.name for one in claims for part in one.comparisons}
    assert named == {one.name for one in claims}  # Every comparison has its claim, and each a test.
    shipped = {
        pathlib.PurePosixPath(name).stem: name
        for name in search.shipped_files()
        if name.startswith("sweeps/findings/")
    }
    assert lib.studies().keys() == shipped.keys()
    for study, file in shipped.items():
        # What is compared exists in the study.
        cells = load([file], ["SWEEP_DIR='/x'", "SEEDS=[0]"]).build("Sweep")().cells()
        groups = [(cell.stage, dict(cell.labels)) for cell in cells]
        for one in claims:
            for part in one.comparisons:
                for side in (part.left, part.right) if part.study == study else ():
                    stage, *labels = side.split(" ")
                    wanted = dict(label.split("=") for label in labels)
                    found = [g for g in groups if g[0] == stage and wanted.items() <= g[1].items()]
                    assert len(found) == 1, (part, found)
                assert part.at in ("start", "steps", "compute")
                assert (part.margin > 0) == (part.expect == Expect.EQUAL)


def write_core(folder, losses):
    """A stored core study: runs of 10 steps after step 5; `losses` maps a stage to its losses
    before and after, one pair for each seed.
    """
    cells, stages = [], {"dense": {"label": "dense", "compared": False}}
    for stage, pairs in losses.items():
        stages[stage] = {"label": stage, "compared": True}
        for seed, pair in enumerate(pairs):
            name = f"{stage}-seed={seed}"
            cell = {"name": name, "stage": stage, "labels": {"seed": str(seed)}}
            cells.append(cell | {"start_step": 5, "end_step": 15, "command": "", "needs": []})
            run = folder / "cells" / name
            (run / "training_eval" / "task").mkdir(parents=True)
            manifest = {"start_step": 5, "train_flops_per_step": 10, "parameters": 1}
            (run / "manifest.json").write_text(
                json.dumps(manifest | {"status": "finished", "step": 15})
            )
            rows = [
                {"step": step, "cross_ent_loss": loss, "accuracy": 0.5}
                for step, loss in zip((5, 15), pair, strict=True)
            ]
            (run / "training_eval" / "task" / "metrics.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
    plan = {"name": "core", "title": "", "scale": "", "baseline": "dense_continued", "seeds": [0]}
    plan |= {"axes": {}, "stages": stages, "cells": cells}
    (folder / "sweep.json").write_text(json.dumps(plan))


def test_a_stored_study_decides(tmp_path, capsys):
    # Upcycled minus dense after training: -0.10, -0.11, -0.12; their mean is -0.11, s = 0.01, and
    # the half width 4.303 x 0.01 / sqrt(3) = 0.0248. Before: +0.2 for every seed. From scratch the
    # differences are +0.1, -0.1 and 0: nothing can be told.
    write_core(
        tmp_path / "core_encoder_decoder",
        {
            "dense_continued": [(2.0, 1.9), (2.0, 1.9), (2.0, 1.9)],
            "upcycled": [(2.2, 1.80), (2.2, 1.79), (2.2, 1.78)],
            "upcycled_renormalized": [(2.0, 1.80), (2.0, 1.79), (2.0, 1.78)],
            "moe_from_scratch": [(6.0, 1.7), (6.0, 1.89), (6.0, 1.78)],
        },
    )
    found = {one.claim.name: one for one in lib.findings(tmp_path)}
    core = found["beats_dense"].measured[0]
    assert found["beats_dense"].verdict == Verdict.AGREE and core.finished and core.steps == 10
    assert core.difference.mean == pytest.approx(-0.11)
    assert core.difference.half_width == pytest.approx(0.0248, abs=1e-4)
    assert found["beats_dense_compute"].verdict == Verdict.AGREE
    assert found["drop_at_start"].verdict == Verdict.AGREE
    assert found["beats_scratch"].verdict == Verdict.CANNOT_TELL
    assert found["vision_beats_dense"].verdict == Verdict.NOT_RUN

    assert paper.main(["findings", f"--results={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "-0.1100 \u00b1 0.0248 (3" in out and "OLMoE" in out
    assert f"{tmp_path}/core_encoder_decoder/report/report.md" in out
    assert "./scripts/studies.sh core_vision (about 1.6 hours)" in out
    assert max(map(len, out.splitlines())) <= 140
    assert paper.main(["findings", f"--results={tmp_path}", "--format=json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["beats_dense"]["ours"][0]["high"] == pytest.approx(-0.0852, abs=1e-4)
    assert paper.main(["findings", f"--results={tmp_path}", "--format=markdown"]) == 0
    assert "| agree" in capsys.readouterr().out
