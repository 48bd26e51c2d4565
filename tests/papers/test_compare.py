"""This project's runs beside the paper's numbers: which run is which, and what is averaged."""

import json

import pytest

from upcycle_jax import config
from upcycle_jax.papers import compare as comparing
from upcycle_jax.papers.exhibits import exhibit
from upcycle_jax.papers.render import render
from upcycle_jax.papers.runs import find_runs
from upcycle_jax.text import Format

BASE = {"emb_dim": 768, "mlp_dim": 2048, "num_heads": 12, "head_dim": 64, "vocab_size": 32128}


DEPTH = {"num_encoder_layers": 12, "num_decoder_layers": 12}


CHOOSE = {"type": "ExpertsChoose", "renormalize": False, "jitter_noise": 0.0}


MOE = {
    "num_experts": 32,
    "train_expert_capacity_factor": 2.0,
    "encoder_router": CHOOSE,
    "num_encoder_sparse_layers": None,
    "num_decoder_sparse_layers": None,
    "encoder_sparse_layout": "MIXED",
    "decoder_sparse_layout": "MIXED",
}


COPIES = {"type": "Recipe", "expert_init": {"type": "CopyExperts"}, "depth": None}


def write_run(
    folder,
    accuracy,
    *,
    start=1_000_000,
    every=100_000,
    model=BASE | DEPTH,
    moe=None,
    seed=0,
    recipe=None,
    task="c4",
    **manifest,
):
    """A MODEL_DIR with evaluations every `every` steps."""
    rows = [
        {"step": start + every * i, "accuracy": value, "cross_ent_loss": 1.0}
        for i, value in enumerate(accuracy)
    ]
    evaluations = folder / "training_eval" / task / "metrics.jsonl"
    evaluations.parent.mkdir(parents=True)
    evaluations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = {
        "start_step": start,
        "parameters": 5,
        "train_flops_per_step": 1.0,
        "model": {**model, "moe": moe},
        "batch_size": 256,
        "seed": seed,
        "restored_from": {
            "start": "continue" if start else "scratch",
            "path": "/data/dense/checkpoint_1000000",
            "step": start,
        },
        "converted_by": recipe,
        "recipe": recipe,
    }
    (folder / "manifest.json").write_text(json.dumps(described | manifest))
    return folder


def compare(name, results, **given):
    return comparing.compare(
        exhibit(name),
        results=results,
        load_config=lambda file: config.load([file]).macro("MODEL").config,
        **given,
    )


def test_results_at_the_papers_scale_stand_beside_its_numbers(tmp_path):
    """Two seeds of the upcycled Base: 69.0 and 69.4 % after 200k steps, the paper 69.02."""
    write_run(tmp_path / "dense", [0.68, 0.681], task="c4_v220")
    write_run(tmp_path / "a", [0.5, 0.683, 0.690], moe=MOE, recipe=COPIES, seed=0)
    write_run(tmp_path / "b", [0.5, 0.685, 0.694], moe=MOE, recipe=COPIES, seed=1)
    found = compare("figure2", tmp_path)
    lines = {
        (curve.series.label, line.point.extra_steps): line
        for curve in found.curves
        for line in curve.lines
    }
    two = lines["Base upcycled", 200_000]
    # Mean 69.2, deviation 0.2 * sqrt(2), t(1 degree of freedom) = 12.706: 12.706 * 0.2828 /
    # sqrt(2) = 2.541.
    assert (two.point.value, two.ours.count) == (69.02, 2)
    assert two.ours.mean == pytest.approx(69.2) and two.ours.half_width == pytest.approx(
        2.541, abs=1e-3
    )
    assert two.delta == pytest.approx(0.18)
    assert lines["Base upcycled", 300_000].ours is None  # not trained so far
    assert lines["Base dense continuation", 100_000].ours.mean == pytest.approx(68.1)
    assert lines["Base dense checkpoint (start)", 0].ours.mean == pytest.approx(68.0)
    missing = [curve.series for curve in found.missing if curve.series.head.modality != "vision"]
    assert {series.label for series in missing} == {
        *(
            f"{size} {what}"
            for size in ("Large", "XL")
            for what in ("dense checkpoint (start)", "dense continuation", "upcycled")
        )
    }
    assert not found.scaled and found.num_runs == 3
    text = render(found, Format.TEXT)
    assert "69.20 ± 2.54 (n=2)" in text and "+0.18" in text and "3 evaluated runs in" in text


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"moe": MOE | {"train_expert_capacity_factor": 4.0}}, "another capacity factor"),
        ({"moe": MOE | {"num_experts": 8}}, "fewer experts"),
        ({"moe": MOE | {"encoder_router": CHOOSE | {"renormalize": True}}}, "renormalised"),
        ({"moe": MOE | {"encoder_sparse_layout": "TOP"}}, "the last layers"),
        ({"recipe": COPIES | {"expert_init": {"type": "DropUpcycling"}}}, "another initialisation"),
        ({"task": "my_text"}, "other data"),
        ({"model": BASE | DEPTH | {"vocab_size": 384}}, "another vocabulary"),
        ({"start": 0}, "from scratch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_runs_of_something_else_are_not_taken_for_the_papers(change, why, tmp_path):
    write_run(tmp_path / "run", [0.5, 0.7], **({"moe": MOE, "recipe": COPIES} | change))
    assert all(curve.is_missing for curve in compare("figure2", tmp_path).curves), why


def test_capacity_factors_are_told_apart(tmp_path):
    write_run(
        tmp_path / "c4", [0.5, 0.7], moe=MOE | {"train_expert_capacity_factor": 4.0}, recipe=COPIES
    )
    found = {curve.series.label: curve for curve in compare("figure9", tmp_path).curves}
    assert found["Base upcycled C=2"].is_missing
    # The paper's steps are not known there: the end of the curve stands beside the end of the run.
    assert found["Base upcycled C=4"].lines[-1].ours.mean == pytest.approx(70.0)


def test_other_scales_show_gains_paired_by_seed(tmp_path):
    """A tiny family: dense continuations end at 40 and 42 %, upcycled runs at 43 and 46 %; gains 3
    and 4 points.
    """
    tiny = BASE | DEPTH | {"emb_dim": 128, "vocab_size": 384}
    small = MOE | {"num_experts": 8}
    kwargs = {"start": 100, "every": 50, "model": tiny, "task": "prose"}
    for seed, (dense, sparse) in enumerate(((0.40, 0.43), (0.42, 0.46))):
        write_run(tmp_path / f"dense{seed}", [0.3, dense], seed=seed, parameters=1000, **kwargs)
        write_run(
            tmp_path / f"sparse{seed}",
            [0.2, sparse, 0.9],
            seed=seed,
            moe=small,
            recipe=COPIES,
            parameters=5000,
            **kwargs,
        )
    found = compare("figure2", tmp_path)
    assert all(curve.is_missing for curve in found.curves)
    rows = {row.label: row for row in found.scaled}
    sparse = rows["upcycled"]
    # The dense runs have 50 extra steps, so that is where the upcycled ones are compared, though
    # they went on.
    assert (sparse.extra_steps, sparse.num_experts, sparse.parameters, len(sparse.runs)) == (
        50,
        8,
        5000,
        2,
    )
    assert sparse.start.mean == pytest.approx(20.0) and sparse.end.mean == pytest.approx(44.5)
    # Gains 3 and 4: mean 3.5, half width 12.706 * sqrt(0.5) / sqrt(2) = 6.353.
    assert sparse.gain.mean == pytest.approx(3.5) and sparse.gain.half_width == pytest.approx(
        6.353, abs=1e-3
    )
    # The paper's gains at the last common point: Base 70.84 - 68.54, Large 73.93 (700k) - 72.18
    # (700k).
    assert sparse.paper_gain["Base"] == pytest.approx(2.30) and sparse.paper_gain[
        "Large"
    ] == pytest.approx(1.75)
    assert rows["dense"].gain is None
    assert "+3.50 ± 6.35 (n=2)" in render(found, Format.MARKDOWN)


def test_gains_are_counted_from_what_the_exhibit_shows_beside_them(tmp_path):
    """Figure 4 has the MoE from scratch and the upcycled model: 30 against 45 %, though a dense
    continuation is there too.
    """
    tiny, small = BASE | DEPTH | {"emb_dim": 128, "vocab_size": 384}, MOE | {"num_experts": 8}
    kwargs = {"every": 50, "model": tiny, "task": "prose"}
    write_run(tmp_path / "dense", [0.3, 0.40], start=100, **kwargs)
    write_run(tmp_path / "sparse", [0.2, 0.45], start=100, moe=small, recipe=COPIES, **kwargs)
    write_run(tmp_path / "scratch", [0.0, 0.30], start=0, moe=small, **kwargs)
    rows = {row.label: row for row in compare("figure4", tmp_path).scaled}
    assert (rows["scratch"].gain.mean, rows["scratch"].reference) == (
        pytest.approx(-15.0),
        "upcycled as in the paper",
    )
    assert rows["upcycled"].gain is None
    # The last point that both of the paper's curves have is 900k: 70.77 - 70.72.
    assert rows["scratch"].paper_gain["Base"] == pytest.approx(0.05)


def test_only_runs_that_differ_in_their_seed_are_averaged(tmp_path):
    """Two lengths of dense training (30 and 50 % after upcycling), and a run of another learning
    rate, which its config.gin tells.
    """
    tiny, small = BASE | DEPTH | {"emb_dim": 128, "vocab_size": 384}, MOE | {"num_experts": 8}
    kwargs = {"every": 50, "model": tiny, "task": "prose"}
    for start, dense, sparse in ((100, 0.2, 0.3), (900, 0.45, 0.5)):
        for seed in range(2):
            write_run(
                tmp_path / f"dense{start}-{seed}", [0.1, dense], start=start, seed=seed, **kwargs
            )
            recipe = COPIES | {"seed": seed}
            folder = write_run(
                tmp_path / f"sparse{start}-{seed}",
                [0.1, sparse],
                start=start,
                seed=seed,
                moe=small,
                recipe=recipe,
                **kwargs,
            )
            (folder / "config.gin").write_text(
                f"# by hand\nLEARNING_RATE = 1.0\nRANDOM_SEED = {seed}\nMODEL_DIR = '{folder}'\n"
            )
    folder = write_run(
        tmp_path / "sparse900-fast",
        [0.1, 0.9],
        start=900,
        seed=1,
        moe=small,
        recipe=COPIES,
        **kwargs,
    )
    (folder / "config.gin").write_text("LEARNING_RATE = 3.0\nRANDOM_SEED = 1\n")
    rows = {row.label: row for row in compare("figure2", tmp_path).scaled if row.reference}
    assert {label: (row.end.count, row.end.mean, row.gain.mean) for label, row in rows.items()} == {
        "upcycled (sparse100-0)": (2, pytest.approx(30.0), pytest.approx(10.0)),
        "upcycled (sparse900-0)": (2, pytest.approx(50.0), pytest.approx(5.0)),
        "upcycled (sparse900-fast)": (1, pytest.approx(90.0), pytest.approx(45.0)),
    }


def test_a_run_of_another_learning_rate_is_not_averaged_with_the_papers(tmp_path):
    for name, value, rate in (("a", 0.69, 1.0), ("b", 0.70, 1.0), ("c", 0.5, 9.0)):
        folder = write_run(tmp_path / name, [0.5, value], moe=MOE, recipe=COPIES, seed=ord(name))
        (folder / "config.gin").write_text(f"LEARNING_RATE = {rate}\nRANDOM_SEED = {ord(name)}\n")
    line, *_ = next(
        curve
        for curve in compare("figure2", tmp_path).curves
        if curve.series.label == "Base upcycled"
    ).lines
    assert (line.ours.count, line.ours.mean) == (2, pytest.approx(69.5))


def test_superglue_scores_are_matched_to_the_checkpoint_they_come_from(tmp_path):
    """Fine-tuning from extra step 200,000: three seeds, 77, 78 and 79."""
    write_run(tmp_path / "pretrained", [0.5, 0.7, 0.7], moe=MOE, recipe=COPIES)
    for seed in range(3):
        source = {
            "start": "continue",
            "path": f"{tmp_path}/pretrained/checkpoint_1200000",
            "step": 1_200_000,
        }
        folder = write_run(
            tmp_path / f"tuned{seed}",
            [0.5, 0.6],
            start=1_200_000,
            moe=MOE,
            seed=seed,
            task="super_glue_boolq_v102",
            restored_from=source,
        )
        scores = folder / "inference_eval" / "super_glue_v102_proportional" / "metrics.jsonl"
        scores.parent.mkdir(parents=True)
        scores.write_text(
            json.dumps({"step": 1_300_000, "average": 1.0})
            + "\n"
            + json.dumps({"step": 1_400_000, "average": 77.0 + seed})
            + "\n"
        )
    found = {curve.series.label: curve for curve in compare("figure3", tmp_path).curves}
    ours = {line.point.extra_steps: line.ours for line in found["Base upcycled"].lines}
    assert (
        ours[200_000].mean == pytest.approx(78.0)
        and ours[200_000].count == 3
        and ours[100_000] is None
    )
    # Fine-tuned runs are no pre-training results.
    assert all(line.ours is None for line in compare("figure4", tmp_path).curves[1].lines[2:])


def test_a_manifest_of_an_earlier_version_is_no_paper_run(tmp_path):
    """Without the model in the manifest nothing says which model it is."""
    folder = write_run(tmp_path / "old", [0.1, 0.2])
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["model"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (found,) = find_runs(tmp_path)
    assert found.size is None and not found.at_paper_scale
