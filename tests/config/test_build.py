import functools
import gc
import sys

import gin
import pytest

from upcycle_jax.config import ConfigError, load

BASE = """
WIDTH = 16
NET = @Net()
MODEL = @Model()
STEPS = %gin.REQUIRED
Net.width = %WIDTH
Model.net = %NET
Model.smoothing = 0.1
Data.name = 'train'
Data.lengths = {'inputs': %WIDTH, 'targets': 4}
eval/Data.name = 'eval'
run:
    model = %MODEL
    data = @Data()
    eval_data = @eval/Data()
    steps = %STEPS
"""


def test_builds_plain_objects(objects, write):
    built = load([write("base.gin", BASE)], ["STEPS=3"]).build("run")()
    net = objects["Net"](width=16)
    assert built["model"] == objects["Model"](net=net, smoothing=0.1)
    assert built["data"] == objects["Data"]("train", {"inputs": 16, "targets": 4})
    assert built["eval_data"] == objects["Data"]("eval", {"inputs": 16, "targets": 4})
    assert built["steps"] == 3
    # The classes themselves, not gin's subclasses of them.
    assert type(built["model"]) is objects["Model"] and type(built["model"].net) is objects["Net"]


def test_built_objects_hold_no_reference_to_gin_or_to_the_configuration(objects, write):
    text = BASE + "Model.schedule = @schedule\nschedule.base = 2.0\n"
    built = load([write("base.gin", text)], ["STEPS=3"]).build("run")
    seen, queue = set(), [built]
    while queue:
        item = queue.pop()
        if (
            id(item) in seen
            or isinstance(item, type)
            or item is sys.modules
            or type(item).__name__ == "module"
        ):
            continue
        seen.add(id(item))
        module = getattr(item, "__module__", None) or type(item).__module__
        assert not str(module).startswith("gin"), item
        assert not str(type(item).__module__).startswith(("gin", "upcycle_jax.config")), item
        if not hasattr(item, "__globals__"):
            queue.extend(gc.get_referents(item))
    assert built.keywords["model"].schedule(3) == 6.0
    assert isinstance(built.keywords["model"].schedule, functools.partial)


def test_two_models_live_in_one_process(objects, write):
    path = write("base.gin", BASE)
    wide = load([path], ["STEPS=1", "WIDTH=64"])
    narrow = load([path], ["STEPS=1", "WIDTH=8"])
    first, second = wide.macro("MODEL"), narrow.macro("MODEL")
    assert (first.net.width, second.net.width) == (64, 8)
    assert wide.macro("MODEL") is first


def test_later_files_override_earlier_ones_and_flags_come_last(objects, write):
    first = write("first.gin", "A = 1\nstrict.value = %A")
    second = write("second.gin", "A = 2")
    assert load([first, second]).build("strict")() == 2
    assert load([second, first]).build("strict")() == 1
    assert load([first, second], ["A=3"]).build("strict")() == 3
    assert load([first, second], ["A=3", "strict.value=4"]).build("strict")() == 4


def test_an_include_is_read_where_it_stands(objects, write):
    write("inner.gin", "A = 1\nB = 1")
    outer = write(
        "outer.gin", "A = 0\ninclude 'inner.gin'\nB = 2\nstrict.value = %A\nrun.steps = %B"
    )
    loaded = load([outer])
    assert (loaded.macro("A"), loaded.macro("B")) == (1, 2)


def test_required_does_not_take_back_a_value(objects, write):
    model = write("model.gin", "A = 5\nstrict.value = %A")
    assert load([model, write("run.gin", "A = %gin.REQUIRED")]).build("strict")() == 5


def test_everything_that_is_missing_is_listed_at_once(objects, write):
    text = BASE.replace("WIDTH = 16", "WIDTH = %gin.REQUIRED").replace("Data.name = 'train'", "")
    with pytest.raises(ConfigError) as caught:
        load([write("base.gin", text)]).build("run")
    message = str(caught.value)
    assert len(caught.value.problems) == 3, message
    assert "WIDTH must be set: --gin.WIDTH=... (declared in base.gin:2)" in message
    assert "STEPS must be set: --gin.STEPS=... (declared in base.gin:5)" in message
    assert "Data.name must be set" in message


def test_only_what_is_reachable_is_required(objects, write):
    loaded = load([write("base.gin", BASE)])
    assert loaded.macro("MODEL").net.width == 16
    assert loaded.build("run", steps=1)()["steps"] == 1


def test_arguments_of_the_program_win_over_bindings(objects, write):
    loaded = load([write("base.gin", BASE)], ["STEPS=3"])
    assert loaded.build("run", steps=9)()["steps"] == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "Modle.smoothing = 1",
            r"bad.gin:1: Modle.smoothing: 'Modle' is not a name.*Did you mean Model\?",
        ),
        (
            "Model.smoothin = 1",
            (
                r"bad.gin:1: Model.smoothin: Model has no parameter 'smoothin'. Did you mean"
                r" smoothing\?"
            ),
        ),
        ("X = @Modle()", r"bad.gin:1: X = @Modle\(\): 'Modle' is not .* Did you mean Model\?"),
        (
            "STEPS = 1\nstrict.value = %STEP",
            r"bad.gin:2: strict.value = %STEP: no macro STEP. Did you mean STEPS\?",
        ),
        ("X = [1, {'a': (%Y,)}]", r"bad.gin:1: X = %Y: no macro Y"),
        ("strict.value = ", r"bad.gin:1: Unable to parse value"),
        ("strict.value = (1,\n", r"bad.gin: .*unclosed bracket"),
        ("include 'nowhere.gin'", r"bad.gin:1: gin file 'nowhere.gin' is in none of"),
        ("import no_such_module_here", r"bad.gin:1: `import no_such_module_here`: No module named"),
    ],
)
def test_mistakes_are_named_with_their_place(objects, write, line, message):
    with pytest.raises(ConfigError, match=message):
        load([write("bad.gin", line)])


def test_several_mistakes_are_listed_at_once(objects, write):
    with pytest.raises(ConfigError, match="3 problems in the configuration") as caught:
        load([write("bad.gin", "Modle.x = 1\nModel.y = 2\nA = %B")])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("DIRECTORY=/tmp/run", r"""--gin.DIRECTORY="'/tmp/run'\""""),
        ("DIRECTORY=run", r"""'run' is not a gin value. .*--gin.DIRECTORY="'run'\""""),
        ("DIRECTORY=a b", r"""--gin.DIRECTORY="'a b'\""""),
        ("DIRECTORY", r"'DIRECTORY' is not NAME=VALUE"),
        ("DIRECTORY=", r"'' is not a gin value"),
        (
            "STPES=3",
            r"--gin.STPES: no gin file defines or reads a macro STPES. Did you mean STEPS\?",
        ),
        ("include 'x.gin'", r"is not NAME=VALUE"),
    ],
)
def test_mistakes_in_flags_are_explained(objects, write, binding, message):
    with pytest.raises(ConfigError, match=message):
        load([write("base.gin", BASE + "DIRECTORY = 'x'\n")], [binding])


def test_a_circle_of_macros_or_files_is_an_error(objects, write):
    with pytest.raises(ConfigError, match="circle: A -> B -> A"):
        load([write("a.gin", "A = %B\nB = [%A]\nstrict.value = %A")]).build("strict")
    write("x.gin", "include 'y.gin'")
    write("y.gin", "include 'x.gin'")
    with pytest.raises(ConfigError, match="circle: .*x.gin -> .*y.gin -> .*x.gin"):
        load(["x.gin"])


def test_the_error_of_a_constructor_names_the_file(objects, write):
    loaded = load([write("base.gin", "strict.value = -1\nX = @strict()")])
    with pytest.raises(ValueError, match="value must not be negative, got -1") as caught:
        loaded.macro("X")
    assert caught.value.__notes__ == ["while building strict, bound in base.gin:1"]


def test_own_modules_are_configured_after_an_import_line(objects, write, tmp_path, monkeypatch):
    write(
        "my_routers.py",
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Mine:\n    k: int = 1\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load(
        [write("mine.gin", "import my_routers\nX = @my_routers.Mine()\nmy_routers.Mine.k = 3")]
    )
    assert loaded.macro("X").k == 3
    assert "import my_routers" in loaded.operative_text()


def test_containers_are_not_shared(objects, write):
    loaded = load(
        [
            write(
                "base.gin",
                "L = {'a': [1]}\nData.lengths = %L\nData.name = 'x'\nA = @Data()\nB ="
                " @other/Data()",
            )
        ]
    )
    first, second = loaded.macro("A"), loaded.macro("B")
    first.lengths["a"].append(2)
    assert second.lengths == {"a": [1]} and loaded.macro("L") == {"a": [1]}


def test_unused_bindings_are_known(objects, write):
    loaded = load([write("base.gin", BASE + "IDLE = 1\nschedule.base = 3\n")], ["STEPS=1"])
    loaded.build("run")
    assert [line.split(": ")[1] for line in loaded.unused()] == ["IDLE", "schedule.base"]


def test_the_operative_text_builds_the_same(objects, write):
    text = BASE + "Model.schedule = @schedule\nschedule.base = 2.0\nIDLE = 1\neval/Data.batch = 2\n"
    loaded = load([write("base.gin", text)], ["STEPS=3"])
    first = loaded.build("run")()
    operative = loaded.operative_text()
    assert (
        "IDLE" not in operative
        and "Net.depth = 2" in operative
        and "eval/Data.batch = 2" in operative
    )
    again = load([write("operative.gin", operative)])
    second = again.build("run")()
    assert second.pop("model").net == first.pop("model").net
    assert second == first
    assert again.operative_text().split("\n", 2)[2] == operative.split("\n", 2)[2]


SCOPES = """
A = 1
NET = @Net()
B = @second/Net()
Net.width = 1
Net.depth = %A
first/Net.width = 2
first/inner/Net.width = 3
first/inner/Net.names = ('x', 'y')
second/Net.depth = 7
NET/Net.names = ('macro',)
Model.net = @Net()
first/Model.smoothing = 0.5
Data.name = 'd'
Data.lengths = {'k': [@first/Model(), @Model()], 'm': %NET, 'n': (%B, -1, 'a' 'b')}
first/Data.batch = 3
"""


@functools.cache
def _registered_with_gin(objects):
    """Registers once: gin's registry lasts as long as the process. Returns `run`."""
    return {name: gin.external_configurable(item, name, module="scopes") for name, item in objects}[
        "run"
    ]


@pytest.mark.parametrize("scope", ["", "first", "first/inner", "second", "unknown/first"])
def test_scopes_mean_what_they_mean_in_gin(objects, write, scope):
    """gin itself is the second implementation."""
    prefix = f"{scope}/" if scope else ""
    text = f"{SCOPES}\nrun.data = @{prefix}Data()\nrun.model = @{prefix}Model()\nrun.steps = 1\n"
    ours = load([write("scopes.gin", text)]).build("run")()
    theirs_run = _registered_with_gin(tuple(objects.items()))
    gin.clear_config()
    try:
        gin.parse_config(text)
        theirs = theirs_run()
    finally:
        gin.clear_config()
    assert repr(ours) == repr(theirs)


def test_a_default_is_the_value_of_a_macro_that_nothing_else_sets(write):
    """In whatever order files are read, and where a file asks for a value."""
    run = write("run.gin", "default/A = 3\nA = %gin.REQUIRED\nB = %A\n")
    model = write("model.gin", "A = 5\n")
    assert load([run]).macro("A") == 3
    assert load([model, run]).macro("A") == load([run, model]).macro("A") == 5
    assert load([run], ["A=7"]).macro("B") == 7
