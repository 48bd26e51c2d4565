"""Reports from hand-made runs: every number in a table can be worked out from the rows written
here.
"""

import html.parser
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from upcycle_jax.report import main
from upcycle_jax.studies import plots
from upcycle_jax.studies.page import compare
from upcycle_jax.studies.run_results import Run, read_rows

TASKS = ("code", "prose")


def write_run(folder, *, start, losses, flops, load=None):
    """Evaluations every 10 steps; `losses` are those of `code`, `prose` lies 1 above."""
    (folder / "train").mkdir(parents=True)
    (folder / "manifest.json").write_text(
        json.dumps({"start_step": start, "parameters": 1234, "train_flops_per_step": flops})
    )
    rate = [
        {"step": start + 10, "timing/steps_per_second": 4.0},
        {"step": start + 20, "timing/steps_per_second": 4.0},
    ]
    (folder / "train" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rate))
    for shift, task in enumerate(TASKS):
        rows = [
            {"step": start + 10 * i, "cross_ent_loss": loss + shift, "accuracy": 1 / (loss + shift)}
            for i, loss in enumerate(losses)
        ]
        for row in rows if load else ():
            row |= {
                "experts/encoder/layers_1/load": load,
                "experts/encoder/layers_1/router_probability": load[::-1],
            }
        path = folder / "training_eval" / task / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folders(tmp_path):
    return {
        "dense": write_run(tmp_path / "dense", start=100, losses=[2.0, 1.8, 1.7], flops=1e12),
        "upcycled": write_run(
            tmp_path / "upcycled",
            start=100,
            losses=[2.4, 1.7, 1.5],
            flops=2e12,
            load=[0.1, 0.2, 0.3, 0.4],
        ),
        "scratch": write_run(
            tmp_path / "scratch", start=0, losses=[6.0, 4.0, 3.0], flops=2e12, load=[0.25] * 4
        ),
    }


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of a page's words: no picture is drawn."""
    monkeypatch.setattr(plots, "png", lambda figure: plt.close(figure) or b"no picture")


def load_all(folders):
    return [Run.load(name, path) for name, path in folders.items()]


def cells(report, heading, first):
    """The cells of the row that starts with `first` in the table under `heading`."""
    section = report.markdown.split(heading, 1)[1]
    row = next(line for line in section.splitlines() if re.match(rf"\| {re.escape(first)} ", line))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_curve_is_the_mean_over_tasks_and_linear_between_evaluations(folders):
    curve = load_all(folders)[0].curve("cross_ent_loss")
    np.testing.assert_allclose(
        curve.values, [2.5, 2.3, 2.2]
    )  # (2.0 + 3.0) / 2, (1.8 + 2.8) / 2, (1.7 + 2.7) / 2
    assert curve.at(105) == pytest.approx(2.4)
    assert np.isnan(curve.at(121))


def test_tables_hold_what_the_rows_say(folders, undrawn):
    report = compare(load_all(folders), dense="dense", upcycled="upcycled", title="T", scale="tiny")
    summary = cells(report, "## Summary", "upcycled")
    # 20 extra steps of 2 TFLOP each; 0.25 s per step.
    assert summary[1:7] == ["step 100", "1,234", "20", "40.00", "2.9000", "2.0000"]
    assert summary[-2:] == ["0.250", "5"]
    assert cells(report, "loss against extra steps", "10")[1:] == ["2.3000", "2.2000", "4.5000"]
    # Equal compute: the cheapest run spends 20 TFLOP, which is 10 steps of the MoE. 4 TFLOP = dense
    # step 104, MoE step 102.
    assert cells(report, "loss against extra compute", "20.00")[1:] == [
        "2.2000",
        "2.2000",
        "4.5000",
    ]
    assert cells(report, "loss against extra compute", "4.00")[1:3] == [
        f"{2.5 - 0.2 * 0.4:.4f}",
        f"{2.9 - 0.7 * 0.2:.4f}",
    ]


def test_findings_name_drop_and_differences(folders, undrawn):
    text = compare(
        load_all(folders), dense="dense", upcycled="upcycled", title="T", scale="tiny"
    ).markdown
    assert "2.9000 against 2.5000 of the dense checkpoint (+0.4000)" in text
    assert (
        "Against **dense**: after 20 extra steps the loss of **upcycled** is 0.2000 lower" in text
    )
    assert "costs 2.00x the FLOPs and 1.00x the time" in text


def test_a_resumed_run_counts_a_step_once_and_a_torn_line_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "loss": 9.0}\n{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step":'
        ' 3, "lo'
    )
    assert read_rows(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_dense_runs_have_no_load_picture(folders):
    dense, upcycled, _ = load_all(folders)
    assert plots.expert_load(dense, TASKS) is None
    assert plots.expert_load(upcycled, TASKS).startswith(b"\x89PNG")


def test_the_same_data_give_the_same_bytes(folders):
    one, two = (
        compare(load_all(folders), dense="dense", upcycled="upcycled", title="T", scale="")
        for _ in range(2)
    )
    assert one == two


def test_command_writes_a_self_contained_page(folders, tmp_path, capsys):
    out = tmp_path / "report"
    runs = [f"--run={name}={path}" for name, path in folders.items()]
    assert (
        main(
            [
                *runs,
                "--dense=dense",
                "--upcycled=upcycled",
                f"--output_dir={out}",
                "--scale=A scaled-down run.",
            ]
        )
        == 0
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "expert_load.png",
        "learning_curves.png",
        "paid.png",
        "report.html",
        "report.md",
    ]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and 'src="learning' not in page
    assert "A scaled-down run." in page
    assert "upcycled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: ["--run=dense=" + str(f["dense"] / "train"), "--dense=dense"],
            "holds no manifest.json",
        ),
        (lambda f: ["--run=dense=" + str(f["dense"]), "--dense=other"], "no run is called 'other'"),
    ],
)
def test_bad_input_is_one_clear_line(folders, tmp_path, capsys, change, message):
    assert main([*change(folders), "--upcycled=upcycled", f"--output_dir={tmp_path / 'r'}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "name",
    [
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "a|b",
        "<div>\n\n<script>alert(1)</script>",
        # Each is one of those in other words.
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "<script>alert(1)</script>",
                "![x](data:text/html;base64,PHNjcmlwdD4=)",
                "&lt;script&gt;",
                "[x]: javascript:alert(1)",
                "<JAVASCRIPT:alert(1)>",
            )
        ),
    ],
)
def test_names_never_become_elements_of_the_page(folders, undrawn, tmp_path, name):
    runs = [Run.load("dense", folders["dense"]), Run.load(name, folders["upcycled"])]
    page = compare(runs, dense="dense", upcycled=name, title=f"T {name}", scale=f"S {name}")
    _, path = page.write(tmp_path / "page")
    found = Elements()
    found.feed(path.read_text())
    assert not found.tags & {"script", "div", "iframe"}
    assert not [key for key in found.attributes if key[0].startswith("on")]
    for key, value in found.attributes:
        if key in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "http")) or ":" not in value
    cells = len(page.summary.splitlines()[0].replace("\\|", "").split("|"))
    assert all(
        len(line.replace("\\|", "").split("|")) == cells for line in page.summary.splitlines()
    )


class Elements(html.parser.HTMLParser):
    """Collects the elements of a page and their attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
