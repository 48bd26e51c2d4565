"""Reports of studies from hand-made sweep folders: every number can be worked out from the rows
written here.
"""

import json
import pathlib
import re
import shlex

import matplotlib.pyplot as plt
import numpy as np
import pytest

from upcycle_jax.config import load
from upcycle_jax.report import main
from upcycle_jax.studies import figures, plots, study_page, study_results
from upcycle_jax.studies.run_results import Run, read_rows
from upcycle_jax.studies.study_results import Study

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORED = ROOT / "results" / "capacity_factor"
# The first is looked at in every run. The others are made by the same program: of their own are the
# figures of their kind of study, and the results, which change only when they are stored.
REPORTS = [
    pytest.param(path.parent, id=path.parent.name, marks=[pytest.mark.slow] if number else [])
    for number, path in enumerate(sorted((ROOT / "results").glob("findings/*/report")))
] + [
    pytest.param(folder, id=folder.name, marks=[pytest.mark.slow])
    for folder in (STORED, ROOT / "results" / "quickstart")
]
TASKS = ("code", "prose")

# Loss after 0, 10 and 20 extra steps of the task `code`, by stage and seed; `prose` lies 1 above.
LOSSES = {
    ("dense_continued", None, 0): [2.0, 1.8, 1.7],
    ("dense_continued", None, 1): [2.0, 1.9, 1.9],
    ("upcycled", "1", 0): [2.5, 1.8, 1.6],
    ("upcycled", "1", 1): [2.7, 1.9, 1.78],
    ("upcycled", "2", 0): [2.4, 1.6, 1.4],
    ("upcycled", "2", 1): [2.4, 1.7, 1.61],
    ("scratch", None, 0): [6.0, 4.0, 3.0, 2.9],
    ("scratch", None, 1): [6.0, 4.2, 3.1, 3.0],
}
FLOPS = {"dense_continued": 1e12, "upcycled": 2e12, "scratch": 2e12}


def write_cell(folder, *, start, losses, flops, moe, seed):
    (folder / "train").mkdir(parents=True)
    manifest = {
        "start_step": start,
        "parameters": 1234,
        "active_parameters": 600,
        "train_flops_per_step": flops,
        "status": "finished",
    }
    start_of_process = {
        "versions": {"jax": "1"},
        "devices": {"count": 1, "kind": "cpu", "platform": "cpu"},
    }
    manifest |= {
        "step": start + 10 * (len(losses) - 1),
        "data": {"sha": "x", "seed": seed},
        "starts": [start_of_process],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rates = [{"step": start + 10, "timing/steps_per_second": 4.0}]
    (folder / "train" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rates)
    )
    for shift, task in enumerate(TASKS):
        rows = [
            {
                "step": start + 10 * i,
                "cross_ent_loss": loss + shift,
                "accuracy": 0.1 * i + 0.01 * seed,
            }
            for i, loss in enumerate(losses)
        ]
        for row in rows if moe else ():
            load = [0.1, 0.2, 0.3, 0.4] if shift == 0 else [0.3, 0.2, 0.1, 0.4]
            row |= {
                "experts/encoder/layers_1/load": load,
                "experts/encoder/layers_1/router_probability": [0.25] * 4,
            }
            row |= {"experts/encoder/layers_1/similarity": 1.0 - 0.001 * row["step"]}
        path = folder / "training_eval" / task / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_sweep(root, losses=LOSSES, baseline="dense_continued"):
    cells = [
        {
            "name": "dense",
            "stage": "dense",
            "labels": {},
            "start_step": 0,
            "end_step": 100,
            "needs": [],
            "command": "python x",
        }
    ]
    write_cell(root / "cells" / "dense", start=0, losses=[5.0, 2.0], flops=1e12, moe=False, seed=0)
    manifest = root / "cells" / "dense" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 10', '"step": 100'))
    for (stage, label, seed), values in losses.items():
        labels = (
            {"seed": str(seed)} if label is None else {"capacity_factor": label, "seed": str(seed)}
        )
        name = "-".join([stage, *(f"{axis}={value}" for axis, value in labels.items())])
        start = 0 if stage == "scratch" else 100
        end = start + (30 if stage == "scratch" else 20)
        entry = {
            "name": name,
            "stage": stage,
            "labels": labels,
            "start_step": start,
            "end_step": end,
            "needs": ["dense"] if start else [],
            "command": "python y",
        }
        cells.append(entry)
        if values:
            write_cell(
                root / "cells" / name,
                start=start,
                losses=values,
                flops=FLOPS[stage],
                moe=stage != "dense_continued",
                seed=seed,
            )
    stages = {
        name: {"label": name.replace("_", " "), "compared": name != "dense"}
        for name in ("dense", *FLOPS)
    }
    plan = {
        "name": "study",
        "title": "A study",
        "scale": "Tiny.",
        "baseline": baseline,
        "seeds": [0, 1],
        "stages": stages,
        "cells": cells,
    }
    (root / "sweep.json").write_text(json.dumps(plan))
    machine = {"cpu": "abacus", "cores": 2, "memory_gib": 4}
    events = [
        {"time": 0, "event": "sweep", "load": [1, 1, 1], "machine": machine, "num_parallel": 2}
    ]
    events += [{"time": 1, "event": "load", "load": [load, 1, 1]} for load in (2.0, 3.0, 9.0)]
    (root / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    return root


@pytest.fixture
def undrawn(monkeypatch):
    """For pages of which words and numbers are looked at: no picture is drawn."""
    monkeypatch.setattr(plots, "png", lambda figure: plt.close(figure) or b"no picture")


@pytest.fixture
def page(undrawn):
    """Makes the page of a sweep folder."""
    return lambda folder: study_page.report(Study.load(folder))


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    return write_sweep(folder)


def cells(text, heading, first):
    section = text.split(heading, 1)[1]
    row = next(line for line in section.splitlines() if re.match(rf"\| {re.escape(first)} ", line))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_tables_hold_means_and_paired_intervals(sweep, page):
    text = page(sweep).markdown
    row = cells(text, "## Summary after 20 extra steps", "upcycled, capacity factor 2")
    assert row[1:7] == ["2", "step 100", "1,234", "600", "2,000.00", "0.25"]
    # Task means lie 0.5 above `code`: 1.9 and 2.11; s / sqrt(2) = 0.105, times 12.7062.
    assert row[7:9] == ["2.9000", "2.0050 ± 1.3342"]
    row = cells(text, "### Differences to the baseline", "upcycled, capacity factor 2")
    # Seed 0: 1.4 - 1.7 = -0.30; seed 1: 1.61 - 1.9 = -0.29. Mean -0.295, s / sqrt(2) = 0.005, times
    # 12.7062 = 0.0635.
    assert row[2] == "-0.2950 ± 0.0635"
    # 20 TFLOP: 20 dense steps, 10 steps of the MoE: 1.6 - 1.7 = -0.1; 1.7 - 1.9 = -0.2.
    assert row[3] == "-0.1500 ± 0.6353"
    # Initial drop: 2.4 - 2.0 for both seeds.
    assert row[1] == "+0.4000 ± 0.0000"
    # The scratch runs went on to step 30: compared at 20.
    assert (
        cells(text, "### Differences to the baseline", "scratch")[2] == "+1.2500 ± 0.6353"
    )  # 1.3 and 1.2


def test_words_follow_from_the_intervals(sweep, page):
    text = page(sweep).markdown
    findings = text.split("## What came out")[1].split("## Summary")[0]
    assert (
        "**upcycled, capacity factor 2** against **dense continued**: after 20 extra steps the loss"
        " is **lower** (-0.2950 ± 0.0635" in findings
    )
    # Seed 0: -0.1, seed 1: -0.12: s / sqrt(2) = 0.01, half width 0.127 > 0.11.
    assert (
        "**upcycled, capacity factor 1** against **dense continued**: after 20 extra steps the loss"
        " is lower in the mean, but" in findings
    )
    assert (
        "no difference can be claimed" in findings and "seed 0 -0.1000, seed 1 -0.1200" in findings
    )
    assert (
        "lowest first: upcycled, capacity factor 2 (2.0050) < upcycled, capacity factor 1 (2.1900)"
        in findings
    )


def test_a_reader_of_the_file_alone_learns_scale_seeds_hardware_and_load(sweep, page):
    text = page(sweep).markdown
    for part in (
        "Tiny.",
        "seeds 0, 1",
        "1 x cpu (cpu)",
        "abacus, 2 cores, 4 GiB",
        "between 2.0 and 9.0, median 3.0",
        "read the same text",
    ):
        assert part in text
    assert "NOT FINISHED" not in text


def test_an_unfinished_sweep_says_so_and_compares_where_all_have_been(tmp_path, page):
    losses = LOSSES | {("upcycled", "2", 1): None, ("upcycled", "2", 0): [2.4, 1.6]}
    text = page(write_sweep(tmp_path, losses)).markdown
    assert (
        "**NOT FINISHED**: `upcycled-capacity_factor=2-seed=0` (at step 110),"
        " `upcycled-capacity_factor=2-seed=1` (at step 100)." in text
    )
    assert "## Summary after 10 extra steps" in text
    row = cells(text, "### Differences to the baseline", "upcycled, capacity factor 2")
    assert row[2] == "-0.2000 (one seed)" and "of one seed: no claim" in text


def test_the_cell_that_writes_the_cache_of_the_data_is_no_run(sweep, page):
    plan = json.loads((sweep / "sweep.json").read_text())
    cache = {"name": "cache_tasks", "stage": "cache_tasks", "kind": "cache_tasks", "labels": {}}
    plan["cells"].insert(0, {**cache, "needs": [], "command": "python z"})
    without = page(sweep).markdown
    (sweep / "sweep.json").write_text(json.dumps(plan))
    assert page(sweep).markdown.replace("    python z\n", "") == without


def test_a_failed_cell_is_named_and_does_not_shorten_the_comparison(tmp_path, page):
    """It failed after 10 of 20 steps: the others are compared after 20, over the seeds that are
    left.
    """
    folder = write_sweep(tmp_path, LOSSES | {("upcycled", "2", 1): [2.4, 1.6]})
    name = "upcycled-capacity_factor=2-seed=1"
    events = [
        {"event": "start", "cell": name},
        {"event": "end", "cell": name, "code": 1},
        {"event": "end", "cell": "dense", "code": 0},
    ]
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(
            "".join(json.dumps({"time": 2, "load": [1, 1, 1], **event}) + "\n" for event in events)
        )
    text = page(folder).markdown
    assert (
        f"**FAILED**, and left out of every comparison: `{name}` (code 1, at step 110)." in text
        and "NOT FINISHED" not in text
    )
    assert cells(text, "## Summary after 20 extra steps", "upcycled, capacity factor 2")[1] == "1"
    assert (
        cells(text, "### Differences to the baseline", "upcycled, capacity factor 2")[2]
        == "-0.3000 (one seed)"
    )
    # The order of the means is that of the seed which both have: 1.6 + 0.5 and 1.4 + 0.5.
    order = (
        "over the seeds that all have (0), lowest first: upcycled, capacity factor 2 (1.9000) <"
        " upcycled, capacity factor 1 (2.1000)"
    )
    assert f"{order}. The first minus the second: -0.2000, of one seed: no claim." in text
    # Started again, it is not failed any more.
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(
            json.dumps({"time": 3, "load": [1, 1, 1], "event": "start", "cell": name}) + "\n"
        )
    assert f"**NOT FINISHED**: `{name}` (at step 110)" in page(folder).markdown


def test_a_loss_that_is_no_number_is_named_and_not_averaged(sweep, page):
    """The metric writers leave null for NaN, in vectors as well."""
    for task in TASKS:
        path = (
            sweep
            / "cells"
            / "upcycled-capacity_factor=2-seed=1"
            / "training_eval"
            / task
            / "metrics.jsonl"
        )
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[-1] |= {
            "cross_ent_loss": None,
            "accuracy": None,
            "experts/encoder/layers_1/load": [0.1, None, 0.3, 0.4],
        }
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = page(sweep)
    assert (
        "**NOT A NUMBER**: the loss of upcycled, capacity factor 2, seed 1 where runs are compared."
        in made.markdown
    )
    row = cells(made.markdown, "## Summary after 20 extra steps", "upcycled, capacity factor 2")
    assert row[1] == "1 of 2" and row[8] == "1.9000 (one seed)"

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    json.loads(made.files["figures.json"], parse_constant=refuse)


def test_a_run_killed_in_its_first_evaluation_is_not_finished(sweep, page):
    folder = sweep / "cells" / "scratch-seed=1" / "training_eval"
    (folder / "prose" / "metrics.jsonl").write_text("")
    assert "**NOT FINISHED**: `scratch-seed=1` (at step 0)." in page(sweep).markdown


def test_longer_runs_are_compared_at_their_own_ends_as_well(tmp_path, page):
    """Budgets of 10 and of 20 steps beside a dense continuation of 20: common are 10."""
    losses = {key: value[:2] if key[1] == "1" else value for key, value in LOSSES.items()}
    text = page(write_sweep(tmp_path, losses)).markdown
    row = cells(text, "### Differences to the baseline", "upcycled, capacity factor 2")
    assert (
        row[2] == "-0.2000 ± 0.0000" and row[-1] == "-0.2950 ± 0.0635 (20)"
    )  # 1.6 - 1.8, 1.7 - 1.9; at 20 as above
    assert cells(text, "### Differences to the baseline", "upcycled, capacity factor 1")[
        -1
    ].endswith("(10)")
    assert (
        "After 20 extra steps, the most that both have, it is **lower** (-0.2950 ± 0.0635" in text
    )


def test_runs_without_a_seed_in_common_are_no_claim(tmp_path, page):
    losses = {
        key: value
        for key, value in LOSSES.items()
        if key[0] != "scratch" and key[2] == (1 if key[1] == "1" else 0)
    }
    text = page(write_sweep(tmp_path, losses)).markdown
    assert (
        "The first minus the second: not known, because no seed has both." in text
        and "nan" not in text.split("## How it was made")[0]
    )


def test_different_data_are_named(sweep, page):
    path = sweep / "cells" / "scratch-seed=1" / "manifest.json"
    path.write_text(path.read_text().replace('"sha": "x"', '"sha": "y"'))
    assert "**the runs read 2 different data sets**" in page(sweep).markdown


def test_runs_that_are_tuned_from_runs_of_other_data(tmp_path, page):
    """Dense -> one continuation and one upcycled run for each seed -> each tuned on other data."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    write_sweep(folder, baseline="dense_tuned")
    plan = json.loads((folder / "sweep.json").read_text())
    plan["cells"] = [
        cell
        for cell in plan["cells"]
        if cell["stage"] != "scratch" and cell["labels"].get("capacity_factor") != "2"
    ]
    for cell in [cell for cell in plan["cells"] if cell["stage"] != "dense"]:
        stage = {"dense_continued": "dense_tuned", "upcycled": "upcycled_tuned"}[cell["stage"]]
        seed, last = int(cell["labels"]["seed"]), {"upcycled": 1.6}.get(cell["stage"], 1.7)
        entry = {"name": f"{stage}-{seed}", "stage": stage, "labels": {"seed": str(seed)}}
        entry |= {"start_step": 120, "end_step": 140, "needs": [cell["name"]], "command": "z"}
        plan["cells"].append(entry)
        plan["stages"][cell["stage"]]["compared"] = False
        plan["stages"][stage] = {"label": stage, "compared": True}
        losses, moe = [2.0, 1.8, last], stage == "upcycled_tuned"
        run = folder / "cells" / entry["name"]
        write_cell(run, start=120, losses=losses, flops=1e12, moe=moe, seed=seed)
        manifest = (run / "manifest.json").read_text().replace('"sha": "x"', '"sha": "y"')
        (run / "manifest.json").write_text(manifest)
    (folder / "sweep.json").write_text(json.dumps(plan))
    text = page(folder).markdown
    assert "all runs that are compared read the same text, and all that they start from" in text
    # Over the last tenth, 2 of 20 steps between losses after 10 and 20: 1.8 to 1.7 falls by 0.02,
    # 1.9 to 1.9 by nothing.
    assert (
        "`dense_continued`, 1,234 parameters, 20 steps, one for each seed; its loss fell by 0.0000"
        " to 0.0200 over" in text
    )
    # The tuned runs start from different checkpoints: no conversion lies between them.
    assert "## Initial drop" not in text
    assert "upcycled_tuned ends 0.1000 ± 0.0000 below dense_tuned" in text


def test_routing_over_training_is_the_mean_over_tasks(sweep):
    run = Run.load("x", sweep / "cells" / "scratch-seed=0")
    curve = run.vectors_over_time("load")["encoder/layers_1"]
    np.testing.assert_allclose(curve.values, [[0.2, 0.2, 0.2, 0.4]] * 4)
    data = figures.routing(run).data["encoder/layers_1/load"]
    assert data["extra_steps"] == [0, 10, 20, 30] and data["relative_to_even"][0] == [
        0.8,
        0.8,
        0.8,
        1.6,
    ]
    assert figures.routing(Run.load("x", sweep / "cells" / "dense")) is None


def test_captions_say_of_routers_what_the_manifests_say(sweep, page):
    """Loads are even by construction where experts choose, and there only."""
    path = sweep / "cells" / "scratch-seed=0" / "manifest.json"
    routers = {
        "encoder_router": {"type": "ExpertsChoose"},
        "decoder_router": {"type": "TokensChoose"},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"moe": routers}}))
    text = page(sweep).markdown
    said = [
        line.partition(",")[0]
        for line in text.splitlines()
        if line.endswith("so that their load is even by construction.*")
    ]
    assert said == ["*scratch"] and "upcycled, capacity factor 2, seed 0: what each expert" in text


def test_similarity_is_shown_where_runs_report_it(sweep):
    data = figures.similarity(Study.load(sweep)).data
    assert data["encoder/layers_1"]["upcycled, capacity factor 1"] == {
        "extra_steps": [0, 10, 20],
        "mean": pytest.approx([0.9, 0.89, 0.88]),
    }


def test_stored_results_are_small_say_nothing_of_places_and_give_the_same_report(
    sweep, tmp_path, page
):
    (sweep / "cells" / "dense" / "config.gin").write_text(
        f"# Read from: /some/where/gin_configs/a.gin\nMODEL_DIR = '{sweep}/cells/dense'\n"
    )
    (sweep / "cells" / "dense" / "checkpoint_100").mkdir()
    stored = study_results.store(sweep, tmp_path / "stored")
    config = (stored / "cells" / "dense" / "config.gin").read_text()
    assert config == "# Read from: gin_configs/a.gin\nMODEL_DIR = '{SWEEP_DIR}/cells/dense'\n"
    assert not list(stored.rglob("checkpoint*"))
    assert page(stored) == page(sweep)


def test_command_writes_the_page_twice_alike(sweep, tmp_path, capsys):
    for name in ("one", "two"):
        assert (
            main(
                [
                    f"--sweep={sweep}",
                    f"--store={tmp_path / 'stored'}",
                    f"--output_dir={tmp_path / name}",
                ]
            )
            == 0
        )
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {
        "report.md",
        "report.html",
        "figures.json",
        "differences.png",
        "learning_curves.png",
        "initial_drop.png",
    } <= set(names)
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        for name in names
    )
    page = (tmp_path / "one" / "report.html").read_text()
    assert 'src="' in page and set(re.findall(r'src="([^:]*):', page)) == {"data"}
    assert "capacity factor 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep={tmp}"], "holds no sweep.json"),
        (["--sweep={tmp}", "--store={tmp}/x"], "holds no sweep.json"),
    ],
)
def test_bad_folders_are_one_clear_line(tmp_path, capsys, words, message):
    assert (
        main([*(word.format(tmp=tmp_path) for word in words), f"--output_dir={tmp_path}/out"]) == 1
    )
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--run=a=b"], ["--run=a=b", "--sweep=c"]])
def test_flags_that_do_not_go_together(words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--output_dir=x"])
    assert "--sweep" in capsys.readouterr().err or "--dense" in capsys.readouterr().err


@pytest.mark.parametrize("stored", REPORTS)
def test_the_stored_report_is_what_the_stored_results_give(stored, tmp_path):
    """Text byte for byte, pages too; figures by their numbers, because PNG bytes depend on the
    versions of matplotlib and its fonts.
    """
    made = study_page.report(Study.load(stored))
    assert made.markdown == (stored / "report" / "report.md").read_text()
    assert made.files["figures.json"] == (stored / "report" / "figures.json").read_text()
    assert sorted(made.images) == sorted(path.name for path in (stored / "report").glob("*.png"))
    made.write(tmp_path)
    pages = [(folder / "report.html").read_text() for folder in (tmp_path, stored / "report")]
    bare = [re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "PNG", page) for page in pages]
    assert bare[0] == bare[1] and bare[0].count('src="PNG"') == len(made.images)


@pytest.mark.skipif(
    not (STORED / "sweep.json").is_file(), reason="results/capacity_factor is not in this checkout"
)
def test_the_stored_study_is_the_shipped_one():
    """Rerunning gin_configs/sweeps/capacity_factor.gin runs the command lines that the stored
    results came from.
    """
    sweep = load(["sweeps/capacity_factor.gin"], ["SWEEP_DIR='/x'"]).build("Sweep")()
    cells = {
        cell.name: [word.replace("/x/", "{SWEEP_DIR}/") for word in cell.words]
        for cell in sweep.cells()
    }
    stored = {
        cell["name"]: shlex.split(cell["command"])[3:]
        for cell in json.loads((STORED / "sweep.json").read_text())["cells"]
    }
    assert cells == stored
    rows = [json.loads(line) for line in (STORED / "table.jsonl").read_text().splitlines()]
    assert {row["cell"] for row in rows} == set(cells)
    for row in rows:
        for task, values in row["tasks"].items():
            last = read_rows(
                STORED / "cells" / row["cell"] / "training_eval" / task / "metrics.jsonl"
            )[-1]
            assert last["step"] == row["step"] and values == {name: last[name] for name in values}
