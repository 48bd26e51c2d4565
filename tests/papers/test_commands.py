"""Commands for what is missing: they resolve, and write where results are looked for."""

import dataclasses
import shlex

import pytest

from upcycle_jax import config
from upcycle_jax.config import flags
from upcycle_jax.models.config_json import to_json
from upcycle_jax.papers import vision_runs
from upcycle_jax.papers.command_lines import Places
from upcycle_jax.papers.commands import commands
from upcycle_jax.papers.exhibits import Method, exhibit, exhibits
from upcycle_jax.papers.runs import paper_setting
from upcycle_jax.surgery.recipe_json import to_json as recipe_json

LANGUAGE = [(one.name, series) for one in exhibits().values() for series in one.series("language")]


IDS = [
    f"{name} {series.head.part} {series.label} {series.head.metric} {series.head.x_unit}"
    for name, series in LANGUAGE
]


@pytest.mark.parametrize(("name", "series"), LANGUAGE, ids=IDS)
def test_every_missing_curve_names_commands_that_resolve(name, series):
    """The gin files exist, the flags parse, and everything that the command needs is there."""
    found = commands(series, Places("runs", "dense"))
    assert found or name == "table1"
    seen = set()
    for command in found:
        module = command.words[2]
        shape = (
            module,
            *(
                word
                for word in command.words
                if "MODEL_DIR" not in word and "PATH" not in word and "SEED" not in word
            ),
        )
        assert shlex.split(command.text()) == list(command.words)
        if shape in seen or len(seen) >= 4:  # points and seeds differ in paths only
            continue
        seen.add(shape)
        parsed = flags.parse("x", command.words[3:], description="")
        loaded = config.load(parsed.gin_file, parsed.gin_bindings)
        built = loaded.build("train" if module == "upcycle_jax.train" else "evaluate").keywords
        model = built["model"].config
        assert (model.moe is not None) == (series.head.method in (Method.UPCYCLED, Method.SCRATCH))
        if "C" in series.head.setting:
            assert (
                model.moe.train_expert_capacity_factor
                == model.moe.eval_expert_capacity_factor
                == float(series.head.setting["C"])
            )
        if series.head.setting.get("renormalize") == "yes":
            assert model.moe.encoder_router.renormalize and model.moe.decoder_router.renormalize
        if series.head.setting.get("router") == "switch":
            assert (
                model.moe.encoder_router.num_selected_experts == 1
                and model.moe.decoder_router.num_selected_experts == 2
            )
        if series.head.setting.get("router") == "top_2_bpr":
            assert (
                model.moe.encoder_router.batch_prioritized
                and not model.moe.decoder_router.batch_prioritized
            )


def test_runs_of_one_setting_share_a_folder():
    """Figure 9's C=2, appendix B.7's plain weights and figure 2's upcycled Base are one run."""

    def model_dirs(name):
        out = {}
        for series in exhibit(name).series("language"):
            out[series.label, series.head.metric] = next(
                w for w in commands(series)[0].words if "MODEL_DIR" in w
            )
        return out

    base = model_dirs("figure2")["Base upcycled", "c4_accuracy"]
    assert (
        model_dirs("figure9")["Base upcycled C=2", "c4_accuracy"]
        == base
        == model_dirs("b7")["Base upcycled renormalize=no", "superglue"]
    )
    assert model_dirs("figure9")["Base upcycled C=4", "c4_accuracy"] != base


def test_commands_write_where_results_are_looked_for():
    (series,) = (
        one for one in exhibit("figure2").series("language") if one.label == "Base upcycled"
    )
    (command,) = commands(series, Places("out", "in"))
    assert (
        command.text()
        == "python -m upcycle_jax.train --gin_file=papers/sparse_upcycling/base_upcycled.gin"
        " \"--gin.MODEL_DIR='out/base_upcycled'\""
        " \"--gin.INITIAL_CHECKPOINT_PATH='in/t5_1_1_base/checkpoint_1000000'\""
        " --gin.NUM_EXPERT_PARTITIONS=32 --gin.GROUP_SIZE=512"
    )


VISION = [(one.name, series) for one in exhibits().values() for series in one.series("vision")]


def test_every_vision_curve_names_commands_that_resolve():
    """One of each kind of setting is built; the others differ in numbers and paths."""
    seen = set()
    for name, series in VISION:
        found = commands(series, Places("runs", "dense"))
        assert found or name == "table1"
        head = series.head
        for command in found:
            assert shlex.split(command.text()) == list(command.words)
        shape = (head.method, tuple(head.setting), head.setting.get("router"))
        if not found or shape in seen:
            continue
        seen.add(shape)
        parsed = flags.parse("x", found[0].words[3:], description="")
        loaded = config.load(parsed.gin_file, parsed.gin_bindings)
        built = loaded.build("train").keywords
        moe = built["model"].config.moe
        assert (moe is not None) == (head.method in (Method.UPCYCLED, Method.SCRATCH))
        assert vision_runs.size(dataclasses.asdict(built["model"].config)) == head.size
        if moe is None:
            continue
        described = {"model": to_json(built["model"].config), "recipe": None}
        if built["checkpoint_cfg"].restore is not None:
            described["recipe"] = recipe_json(built["checkpoint_cfg"].restore.recipe)
        setting = vision_runs.setting(
            described["model"], described["recipe"] or {}, new=head.method == Method.SCRATCH
        )
        assert setting == paper_setting(head)


def test_figure_3_fine_tunes_what_was_cooled_down():
    """Twelve settings of the checkpoint that the run before leaves; the chosen cell is evaluated on
    images that had no part in the choice.
    """
    tuned = [
        series
        for name, series in VISION
        if name == "figure3" and series.head.metric == "imagenet_full_finetune"
    ]
    assert len(tuned) == 9
    for series in tuned:
        train, sweep, evaluation = commands(series, Places("runs", "dense"))
        sparse = series.head.method == Method.UPCYCLED
        parsed = flags.parse("x", sweep.words[3:], description="")
        cells = config.load(parsed.gin_file, parsed.gin_bindings).build("Sweep")().cells()
        assert len(cells) == 12
        model_dir = next(w for w in train.words if "MODEL_DIR" in w).partition("=")[2]
        for cell in cells[:1]:
            files, bindings = cell.gin
            call = config.load(files, bindings).build("train").keywords
            restore = call["checkpoint_cfg"].restore
            assert f"'{restore.path}'".startswith(model_dir[:-1] + "/checkpoint_")
            assert call["total_steps"] in (5000, 10000)
            assert call["train_eval_dataset_cfg"].split == "validation"
        assert call["model"].config.image_size == 384
        assert (call["model"].config.moe is not None) == sparse
        parsed = flags.parse("x", evaluation.words[3:], description="")
        call = config.load(parsed.gin_file, parsed.gin_bindings).build("evaluate").keywords
        assert call["dataset_cfg"].split == "test" and call["dataset_cfg"].use_cached
        assert call["dataset_cfg"].crop == "central"
