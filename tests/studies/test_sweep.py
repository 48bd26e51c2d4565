"""What cells a study has, and that those of the shipped studies can be built."""

import pathlib
import textwrap

import pytest

from upcycle_jax.config import load, search
from upcycle_jax.studies import state
from upcycle_jax.studies.sweep import CACHE, Stage, Sweep, gin_text

ROOT = pathlib.Path(__file__).resolve().parents[2]


SHIPPED = [
    name for name in search.shipped_files() if name.startswith("sweeps/") and "/parts/" not in name
]


STAGE = {"name": "dense", "gin_files": ["a.gin"], "steps": 3}


def test_a_stage_is_multiplied_by_its_axes_and_by_those_of_what_it_starts_from():
    dense = Stage(name="dense", gin_files=["d.gin"], axes=["length"])
    wide = Stage(
        name="wide",
        gin_files=["w.gin"],
        steps=5,
        start_from="dense",
        axes=["NUM_EXPERTS", "seed"],
        bindings={"RECIPE": "@R()"},
    )
    fresh = Stage(name="fresh", gin_files=["w.gin"], steps=5, batches_after="dense")
    axes = {"length": {"short": {"steps": 10}, "long": {"steps": 20}}, "NUM_EXPERTS": [2, 4, 8]}
    sweep = Sweep(name="s", sweep_dir="/x/y/", stages=[dense, wide, fresh], axes=axes, seeds=[0, 7])
    cells = {cell.name: cell for cell in sweep.cells()}
    # dense: 2 lengths; wide: 2 x 3 experts x 2 seeds; fresh: 2 lengths, because its data goes on
    # after them.
    assert len(cells) == 2 + 12 + 2
    cell = cells["wide-length=long-NUM_EXPERTS=4-seed=7"]
    assert (cell.start_step, cell.end_step, cell.needs) == (20, 25, ("dense-length=long",))
    files, bindings = cell.gin
    assert files == ["w.gin"]
    assert bindings == [
        "RECIPE=@R()",
        "NUM_EXPERTS=4",
        "RANDOM_SEED=7",
        "INITIAL_CHECKPOINT_PATH='/x/y/cells/dense-length=long/checkpoint_20'",
        "MODEL_DIR='/x/y/cells/wide-length=long-NUM_EXPERTS=4-seed=7'",
        "TRAIN_STEPS=25",
    ]
    assert (
        "FIRST_BATCH=10" in cells["fresh-length=short"].gin[1]
        and cells["fresh-length=short"].needs == ()
    )
    assert sweep.compared == ["wide", "fresh"]


def test_a_list_of_points_keeps_the_cells_that_agree_with_one():
    stage = Stage(name="a", gin_files=["a.gin"], steps=1, axes=["X", "Y", "seed"])
    points = [{"X": 1, "Y": 10}, {"X": 2}]
    sweep = Sweep(
        name="s",
        sweep_dir="d",
        stages=[stage],
        axes={"X": [1, 2, 3], "Y": [10, 20]},
        seeds=[0, 1],
        points=points,
    )
    names = {cell.name.removeprefix("a-").rpartition("-")[0] for cell in sweep.cells()}
    assert names == {"X=1-Y=10", "X=2-Y=10", "X=2-Y=20"} and len(sweep.cells()) == 6


def test_conversions_are_cells_too():
    dense = Stage(**STAGE)
    convert = Stage(name="convert", gin_files=["c.gin"], command="upcycle", start_from="dense")
    train = Stage(name="train", gin_files=["t.gin"], steps=2, start_from="convert")
    cells = Sweep(name="s", sweep_dir="/r", stages=[dense, convert, train]).cells()
    assert "OUTPUT_CHECKPOINT_PATH='/r/cells/convert/checkpoint_3'" in cells[1].gin[1]
    assert (
        "INITIAL_CHECKPOINT_PATH='/r/cells/convert/checkpoint_3'" in cells[2].gin[1]
        and cells[2].end_step == 5
    )


def test_data_are_cached_once_for_all(tmp_path):
    sweep = Sweep(
        name="s", sweep_dir=str(tmp_path), stages=[Stage(**STAGE)], cached_tasks=["a", "b"]
    )
    cache, dense = sweep.cells()
    words = f"--gin_file=a.gin --tasks=a,b --output_cache_dir={tmp_path}/cache_tasks"
    assert cache.command_line() == f"python -m upcycle_jax.cache_tasks {words}"
    assert dense.needs == ("cache_tasks",)
    assert dense.words[-2:] == (
        "--gin.USE_CACHED_TASKS=True",
        f"--seqio_additional_cache_dirs={tmp_path}/cache_tasks",
    )
    assert not state.is_finished(cache)
    state.mark_finished(cache)
    assert state.is_finished(cache)
    # What the data are is said by bindings of the sweep and of the first stage that trains; the
    # axes do not matter to a cache.
    stage = Stage(**STAGE | {"bindings": {"VOCABULARY": "bytes"}, "axes": ["seed"]})
    own = Sweep(
        name="s",
        sweep_dir="/d",
        stages=[stage],
        cached_tasks=["mine"],
        bindings={"TEXT_FILES": {"own": ["*.txt"]}},
    )
    assert own.cells()[0].words[:4] == (
        "--gin_file=a.gin",
        "--gin.TEXT_FILES={'own': ['*.txt']}",
        "--gin.VOCABULARY='bytes'",
        "--tasks=mine",
    )
    with pytest.raises(ValueError, match="cached_tasks must be a list"):
        Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], cached_tasks="a")


def test_values_become_gin_text():
    assert gin_text({"a": ("@b/C()", "%D"), "e": "f"}) == "{'a': (@b/C(), %D), 'e': 'f'}"
    assert gin_text(("x",)) == "('x',)" and gin_text(None) == "None"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Stage(**STAGE | {"name": "a/b"}), "Stage.name is 'a/b': use letters"),
        (lambda: Stage(**STAGE | {"gin_files": "a.gin"}), "gin_files must be a list"),
        (lambda: Stage(**STAGE | {"command": "eval"}), "'eval': choose one of 'train', 'upcycle'"),
        (lambda: Stage(name="c", gin_files=["a"], command="upcycle"), "it needs start_from"),
        (lambda: Sweep(name="s", sweep_dir="", stages=[Stage(**STAGE)]), "sweep_dir is empty"),
        (lambda: Sweep(name="s", sweep_dir="d", stages=[]), "stages with different names"),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], seeds=[1, 1]),
            "seeds is \\[1, 1\\]",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE | {"axes": ["E"]})]),
            "names the axis 'E'",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE | {"start_from": "z"})]),
            "start_from of 'dense' is 'z'",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], axes={"X": [1, 1]}),
            "give at least one, each once",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], axes={"X": {"a": 3}}),
            "has an entry 'a' that must be a dictionary, got 3",
        ),
        (
            lambda: Sweep(
                name="s", sweep_dir="d", stages=[Stage(**STAGE)], axes={"X": [1]}, points=[{"X": 2}]
            ),
            "points names X=2",
        ),
        (
            lambda: Sweep(name="s", sweep_dir="d", stages=[Stage(**STAGE)], baseline="b"),
            "baseline is 'b'",
        ),
        (
            lambda: Sweep(
                name="s", sweep_dir="d", stages=[Stage(**STAGE | {"steps": None})]
            ).cells(),
            "steps = None: set Stage.steps",
        ),
    ],
)
def test_bad_studies_are_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        change()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps_name_cells_that_can_be_built(name):
    sweep = load([name], ["SWEEP_DIR='/x'", "SEEDS=[0]"]).build("Sweep")()
    cells = sweep.cells()
    assert (
        sweep.name == pathlib.PurePosixPath(name).stem
        and sweep.title
        and sweep.baseline in sweep.compared
    )
    assert f"| `{name.removeprefix('sweeps/')}` |" in (ROOT / "docs" / "experiments.md").read_text()
    for cell in cells:
        if cell.command == CACHE:
            continue
        files, bindings = cell.gin
        loaded = load(files, bindings)
        loaded.build(cell.command)
        idle = [
            line for line in loaded.unused() if line.startswith("--gin.") and "EXPERT" not in line
        ]
        assert not idle, f"{cell.name}: nothing uses {idle}"


def test_the_study_in_the_documentation_can_be_built(tmp_path):
    text = (ROOT / "docs" / "experiments.md").read_text()
    block = text.split("## Your own")[1].split("* An axis")[0]
    (tmp_path / "mine.gin").write_text(textwrap.dedent(block.strip("\n")))
    sweep = load([str(tmp_path / "mine.gin")], ["SWEEP_DIR='/x'"]).build("Sweep")()
    cells = sweep.cells()
    assert (
        len(cells) == 1 + 2 + 2 * 2 * 2 * 2
    )  # dense, its continuation per seed, experts x rates x budgets x seeds
    for cell in cells:
        files, bindings = cell.gin
        load(files, bindings).build(cell.command)
    assert {cell.end_step - cell.start_step for cell in cells if cell.stage == "upcycled"} == {
        100,
        400,
    }
