"""Every shipped gin file is parsed, checked, built at tiny size and stepped once."""

import dataclasses
import functools
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.random_data import RandomData
from upcycle_jax import trees
from upcycle_jax.config import load, search
from upcycle_jax.models.decoder.config import DecoderMoeConfig
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.surgery import recipe as surgery_recipe
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train_state import from_state_dict, state_specs
from upcycle_jax.training.train_step import make_train_step
from upcycle_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("drawn_parameters")
FOLDER = search.shipped_folder()


def is_of_another_family(name: str) -> bool:
    """Whether a model file is of decoder-only models, or of vision transformers."""
    parts = re.compile("include 'models/parts/(decoder|vit)")
    return parts.search((FOLDER / name).read_text(encoding="utf-8")) is not None


SHIPPED = search.shipped_files()
# The others are built and stepped in test_lm_gin_files.py and test_vit_gin_files.py.
MODELS = [
    name
    for name in SHIPPED
    if re.fullmatch(r"models/[^/]+\.gin", name) and not is_of_another_family(name)
]
RUNS = [name for name in SHIPPED if re.fullmatch(r"runs/[^/]+\.gin", name)]
RECIPES = [name for name in SHIPPED if re.fullmatch(r"recipes/[^/]+\.gin", name)]
DECODER_RECIPES = [
    name
    for name in RECIPES
    if "include 'recipes/parts/decoder_moe.gin'" in (FOLDER / name).read_text(encoding="utf-8")
]
# Flaxformer's stock MoE models: how many parameters its own files make.
FLAXFORMERS = {
    "models/tokens_choose_tiny.gin": 2_462_976,
    "models/tokens_choose_small.gin": 272_061_824,
    "models/tokens_choose_base.gin": 2_031_500_544,
    "models/tokens_choose_large.gin": 7_323_905_024,
    "models/tokens_choose_xl.gin": 26_633_033_728,
    "models/tokens_choose_xxl.gin": 106_265_292_800,
    "models/switch_tiny.gin": 1_860_352,
    "models/switch_small.gin": 316_495_232,
    "models/switch_base.gin": 3_790_748_928,
    "models/switch_large.gin": 26_309_291_008,
    "models/switch_xl.gin": 18_136_684_544,
    "models/switch_xxl.gin": 394_675_073_024,
    "models/switch_c.gin": 1_571_327_875_360,
    "models/st_moe_base.gin": 700_641_024,
    "models/st_moe_xl.gin": 8_889_972_736,
    "models/st_moe_32b.gin": 269_104_613_376,
}
PAPER = "papers/sparse_upcycling"
PAPERS = [name for name in SHIPPED if re.fullmatch(rf"{PAPER}/(?!vit_)[^/]+\.gin", name)]

SMALL = [
    "VOCAB_SIZE=512",
    "ACTIVATION_DTYPE='float32'",
    "T5Config.emb_dim=16",
    "T5Config.num_heads=2",
    "T5Config.num_encoder_layers=1",
    "T5Config.num_decoder_layers=1",
    "T5Config.head_dim=8",
    "T5Config.mlp_dim=32",
]
# Which layers of a whole model are sparse, tests below say; here the only layer of each stack is.
SPARSE = ["NUM_EXPERTS=2", "ENCODER_SPARSE_LAYOUT=(0,)", "DECODER_SPARSE_LAYOUT=(0,)"]
LENGTHS = {"inputs": 16, "targets": 8}
ROWS = 8


def small(name: str) -> list[str]:
    """Bindings that shrink the model of a file."""
    if name in FLAXFORMERS:
        # What its sizes differ in beside their shape: with these every size is one small model.
        one_layer = ["NUM_ENCODER_SPARSE_LAYERS=1", "NUM_DECODER_SPARSE_LAYERS=1"]
        return [*SMALL, *SPARSE, "GROUP_SIZE=64", *one_layer]
    return [*SMALL, *SPARSE] if "upcycled" in name or "moe_" in name else SMALL


def batch_of(model, rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: random.integers(1, 300, spec.shape, dtype=np.int32)
        for name, spec in model.input_specs(rows, LENGTHS).items()
    }


@functools.cache
def one_step(config, smoothing: float, z_loss: float, normalizing) -> float:
    """The loss of one train step, from random parameters. Files that differ in size and schedule
    only give one and the same small model: it is stepped once.
    """
    model = EncoderDecoderModel(
        config, label_smoothing=smoothing, z_loss=z_loss, loss_normalizing_factor=normalizing
    )
    trainer = Trainer(optimizer=Adafactor(), learning_rate_fn=create_learning_rate_scheduler())
    random = np.random.default_rng(0)
    state = {
        path: (random.normal(size=spec.shape) * path.startswith("target/")).astype(spec.dtype)
        for path, spec in state_specs(model, trainer.optimizer).items()
    }
    with one_device().activate():
        step = jax.jit(make_train_step(model, trainer, seed=0))
        after, output = step(from_state_dict(state), batch_of(model))
    assert int(after.step) == 1
    return float(output.loss)


@functools.cache
def traced(model) -> None:
    """Traces the loss of a train step, dropout included."""
    specs = model.param_specs()
    params = {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for path, spec in specs.items()}
    step = functools.partial(model.loss_fn, denominator=jax.numpy.float32(1))
    jax.eval_shape(step, trees.unflatten(params), batch_of(model), jax.random.key(0))


def test_there_are_dense_and_upcycled_models_of_every_size():
    sizes = ("tiny", "small", "base", "large", "xl", "xxl")
    assert {
        f"models/t5_1_1_{size}{kind}.gin" for size in sizes for kind in ("", "_upcycled")
    } <= set(MODELS)


@pytest.mark.parametrize(
    "name", [name for name in SHIPPED if "/parts/" not in name and "recipes/" not in name]
)
def test_files_open_with_what_they_need(name):
    """A comment that says what is REQUIRED, before the first binding."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    head = "\n".join(line for line in text.splitlines()[:40] if line.startswith("#"))
    assert text.startswith("#") and "REQUIRED" in head


@pytest.mark.parametrize("name", MODELS)
def test_models_build_and_step(name):
    """Without dropout, as in the paper's pre-training: one step is of both. With it they are traced
    below, as the paper's fine-tuning.
    """
    model = load([name], [*small(name), "DROPOUT_RATE=0.0"]).macro("MODEL")
    assert (model.config.moe is not None) == ("upcycled" in name or name in FLAXFORMERS)
    if name in FLAXFORMERS and "st_moe_base" not in name:
        # Their parts are those of stepped models: a trace is enough.
        if "_base" in name:
            traced(model)
        return
    loss = one_step(
        model.config, model.label_smoothing, model.z_loss, model.loss_normalizing_factor
    )
    assert math.isfinite(loss) and loss > 0


@pytest.mark.parametrize("name", [name for name in MODELS if "upcycled" in name])
def test_upcycled_models_are_the_papers(name):
    """Section 3.1 and appendix A of arXiv 2212.05055: every second layer, E = 32, C = 2, experts
    choose / top-2.
    """
    full = load([name]).macro("MODEL").config
    for stack in ("encoder", "decoder"):
        layers = full.num_encoder_layers if stack == "encoder" else full.num_decoder_layers
        assert full.sparse_layers(stack) == tuple(range(1, layers, 2))
    assert full.moe.num_experts == (4 if "tiny" in name else 32)
    assert (full.moe.train_expert_capacity_factor, full.moe.eval_expert_capacity_factor) == (
        2.0,
        2.0,
    )
    assert (
        type(full.moe.encoder_router).__name__ == "ExpertsChoose"
        and full.moe.decoder_router.num_selected_experts == 2
    )


def parameters(config):
    """The number of parameters of an encoder-decoder, by hand."""
    d, width = config.emb_dim, config.num_heads * config.head_dim
    mlp = (len(config.mlp_activations) + 1) * d  # for each hidden unit
    total = config.vocab_size * d * (1 if config.logits_via_embedding else 2)
    for stack, attentions in (("encoder", 1), ("decoder", 2)):
        layers, sparse = config.num_layers(stack), len(config.sparse_layers(stack))
        norms = attentions + 1
        total += layers * (attentions * 4 * d * width + norms * d) + d + 32 * config.num_heads
        total += (layers - sparse) * mlp * config.mlp_dim
        total += sparse * config.moe.num_experts * (mlp * config.mlp_dim + d)
        if config.moe.extra_mlp:
            total += sparse * (mlp * config.mlp_dim + d)
    return total


def test_all_of_flaxformers_moe_models_are_there():
    assert set(FLAXFORMERS) == {name for name in MODELS if "t5_1_1" not in name}


@pytest.mark.parametrize("name", FLAXFORMERS)
def test_flaxformers_models_have_its_totals(name):
    model = load([name]).macro("MODEL")
    config, count = model.config, FLAXFORMERS[name]
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert parameters(config) == count and f": {count} parameters" in text.partition(".\n")[0]
    assert config.dropout_rate == 0.0 and model.loss_normalizing_factor == "NUM_REAL_TARGET_TOKENS"


@pytest.mark.parametrize(
    ("kind", "selected", "prioritized", "activations", "sparse", "names"),
    [
        ("tokens_choose", 2, True, ("gelu", "linear"), (3, 7, 11), {"mlp/expert/wi_0/kernel"}),
        ("switch", 1, False, ("relu",), (1, 3, 5, 7, 9, 11), {"mlp/expert/wi/kernel"}),
        (
            "st_moe",
            2,
            False,
            ("gelu", "linear"),
            (3, 7, 11),
            {"mlp/expert/wo/kernel", "extra_mlp/wi_1/kernel", "pre_extra_mlp_layer_norm/scale"},
        ),
    ],
)
def test_flaxformers_models_are_its_own(kind, selected, prioritized, activations, sparse, names):
    """Routers, layers and names as its gin files and modules have them."""
    model = load([f"models/{kind}_base.gin"]).macro("MODEL")
    config = model.config
    encoder, decoder = (config.moe.router(stack) for stack in ("encoder", "decoder"))
    assert encoder.num_selected_experts == decoder.num_selected_experts == selected
    assert (encoder.batch_prioritized, decoder.batch_prioritized) == (prioritized, False)
    assert config.mlp_activations == activations
    assert config.sparse_layers("encoder") == config.sparse_layers("decoder") == sparse
    assert config.logits_via_embedding == (kind == "switch")
    assert not encoder.renormalize and not decoder.renormalize
    assert (config.moe.train_expert_capacity_factor, config.moe.eval_expert_capacity_factor) == (
        1.25,
        2.0,
    )
    specs = model.param_specs()
    assert sum(spec.size for spec in specs.values()) == parameters(config)
    assert {f"decoder/layers_{sparse[0]}/{path}" for path in names} <= set(specs)


@pytest.mark.parametrize("name", [name for name in MODELS if "upcycled" in name])
def test_an_upcycled_file_differs_from_the_dense_one_in_its_experts_only(name):
    dense, sparse = (
        load([file]).macro("MODEL").config for file in (name.replace("_upcycled", ""), name)
    )
    assert dataclasses.replace(sparse, moe=None) == dense


def data_for(model) -> RandomData:
    """Batches of random tokens in place of the run's data."""
    return RandomData(functools.partial(batch_of, model, ROWS), ROWS, LENGTHS)


def one_device() -> Partitioner:
    return Partitioner(devices=(jax.devices()[0],))


def run_once(
    name: str,
    model_name: str,
    model_dir: pathlib.Path,
    steps: int,
    *bindings: str,
    evaluates: bool = True,
):
    """Builds a run file with everything in it, then runs it on random tokens and one device."""
    required = [
        f"MODEL_DIR='{model_dir}'",
        f"TRAIN_STEPS={steps}",
        f"BATCH_SIZE={ROWS}",
        "MIXTURE_OR_TASK_NAME='random'",
    ]
    loaded = load([model_name, name], [*small(model_name), *required, *bindings])
    call = loaded.build("train")
    assert "train.model = %MODEL" in loaded.operative_text()
    data = data_for(call.keywords["model"])
    evaluated = data if evaluates else None
    return call(
        train_dataset_cfg=data, train_eval_dataset_cfg=evaluated, partitioner=one_device()
    ).run()


@pytest.mark.parametrize("name", ["models/t5_1_1_base.gin", "models/t5_1_1_base_upcycled.gin"])
def test_the_operative_configuration_of_a_run_builds_the_same_run(name, tmp_path):
    """What MODEL_DIR/config.gin holds can be given as --gin_file."""
    required = [
        "MODEL_DIR='x'",
        "TRAIN_STEPS=7",
        "MIXTURE_OR_TASK_NAME='y'",
        "INITIAL_CHECKPOINT_PATH='z'",
        "RECIPE=@Recipe()",
    ]
    first = load([name, "runs/continue_pretrain.gin"], required)
    before = dict(first.build("train").keywords)
    (tmp_path / "config.gin").write_text(first.operative_text())
    second = load([str(tmp_path / "config.gin")])
    after = dict(second.build("train").keywords)
    models = before.pop("model"), after.pop("model")
    assert (
        models[0].config == models[1].config
        and models[0].loss_normalizing_factor == models[1].loss_normalizing_factor
    )
    trainers = before.pop("trainer"), after.pop("trainer")
    assert (
        str(trainers[0].optimizer) == str(trainers[1].optimizer)
        and trainers[0].learning_rate_fn == trainers[1].learning_rate_fn
    )
    assert after.pop("files", None) is None and before.items() <= after.items()
    assert second.operative_text().splitlines()[2:] == first.operative_text().splitlines()[2:]


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory):
    """One step of dense pre-training with the shipped run file."""
    folder = tmp_path_factory.mktemp("dense")
    result = run_once("runs/pretrain.gin", "models/t5_1_1_tiny.gin", folder, 1, evaluates=False)
    assert result.step == 1
    return folder / "checkpoint_1"


@pytest.mark.parametrize(
    ("model", "recipe", "start"),
    [
        ("models/t5_1_1_tiny.gin", "None", "continue"),
        ("models/t5_1_1_tiny_upcycled.gin", "@Recipe()", "upcycle"),
    ],
)
def test_runs_build_and_step(model, recipe, start, dense_checkpoint, tmp_path):
    """Pre-training is in the fixture; the same file continues dense to dense, and dense to
    sparse.
    """
    bindings = [f"INITIAL_CHECKPOINT_PATH='{dense_checkpoint}'", f"RECIPE={recipe}"]
    evaluates = start == "upcycle"
    result = run_once(
        "runs/continue_pretrain.gin",
        model,
        tmp_path / "run",
        2,
        *bindings,
        evaluates=evaluates,
    )
    assert (result.step, result.start) == (2, start)
    assert (tmp_path / "run" / "checkpoint_2").is_dir()


def test_offline_conversion_runs(dense_checkpoint, tmp_path):
    name, output = "models/t5_1_1_tiny_upcycled.gin", tmp_path / "sparse" / "checkpoint_1"
    paths = [f"INITIAL_CHECKPOINT_PATH='{dense_checkpoint}'", f"OUTPUT_CHECKPOINT_PATH='{output}'"]
    # The command's own tests look at what the sparse model computes.
    loaded = load([name, "runs/upcycle.gin"], [*small(name), *paths, "FUNCTION_CHECK='off'"])
    lines = []
    loaded.build("upcycle", model=loaded.macro("MODEL"))().run(report=lines.append)
    assert output.is_dir() and any("mlp/expert" in line for line in lines)


PAPER_REQUIRED = ["MODEL_DIR='x'", "INITIAL_CHECKPOINT_PATH='y'"]
PAPER_KINDS = (
    "dense",
    "upcycled",
    "moe_from_scratch",
    "depth_tiled",
    "dense_superglue",
    "upcycled_superglue",
)


def paper_run(name: str, *bindings: str):
    """The arguments that a paper file gives to `train`."""
    required = PAPER_REQUIRED if "scratch" not in name else PAPER_REQUIRED[:1]
    if "superglue" in name:
        required = [*required, "TRAIN_STEPS=1700000"]
    loaded = load([name], [*required, *bindings])
    call = loaded.build("train").keywords
    shipped = [
        line for line in loaded.unused() if line.startswith(str(FOLDER)) and "/models/" not in line
    ]
    return call, shipped


def test_every_size_has_every_run_of_the_paper():
    assert set(PAPERS) == {
        f"{PAPER}/{size}_{kind}.gin" for size in ("base", "large", "xl") for kind in PAPER_KINDS
    }


@pytest.mark.parametrize("name", PAPERS)
def test_paper_files_build_and_step(name):
    """The run is built whole, with every binding used; its model, at small size, is stepped, and
    its schedule traced. Models for fine-tuning are those with dropout, which a trace shows, and the
    deeper one is stepped from a checkpoint below.
    """
    call, unused = paper_run(
        name, *small(name), *(["T5Config.num_decoder_layers=2"] if "depth" in name else [])
    )
    assert unused == []
    model = call["model"]
    if "superglue" in name or "depth_tiled" in name:
        traced(model)
    else:
        loss = one_step(
            model.config, model.label_smoothing, model.z_loss, model.loss_normalizing_factor
        )
        assert math.isfinite(loss) and loss > 0
    rate = jax.jit(call["trainer"].learning_rate_fn)(jax.numpy.int32(0))
    assert math.isfinite(rate) and rate > 0


@pytest.mark.parametrize("name", [name for name in PAPERS if "superglue" not in name])
def test_pre_training_is_the_papers(name):
    """Sections 3.1 and 4.1, table 1: see the comments of the files."""
    call, _ = paper_run(name)
    model, data, trainer = call["model"], call["train_dataset_cfg"], call["trainer"]
    parameters = {"base": 2_003_188_992, "large": 7_220_096_000, "xl": 26_255_546_368}
    size = name.rpartition("/")[2].partition("_")[0]
    count = sum(spec.size for spec in model.param_specs().values())
    if "upcycled" in name or "scratch" in name:
        assert count == parameters[size]
        assert (model.config.moe.num_experts, model.config.moe.train_expert_capacity_factor) == (
            32,
            2.0,
        )
        assert (
            not model.config.moe.encoder_router.renormalize
            and not model.config.moe.decoder_router.renormalize
        )
    else:
        assert model.config.moe is None
    # A third more layers: 16 and 32. The rest is as wide as the dense model.
    layers = {"base": 12, "large": 24, "xl": 24}[size] * (4 if "depth" in name else 3) // 3
    assert (model.config.num_encoder_layers, model.config.num_decoder_layers) == (layers, layers)
    assert [
        float(trainer.learning_rate_fn(step)) for step in (0, 10**6, 2 * 10**6)
    ] == pytest.approx([0.01, 1e-3, 7.0711e-4], rel=1e-4)
    assert (
        model.config.dropout_rate == 0.0 and data.mixture_or_task_name == "c4_v220_span_corruption"
    )
    # Routing groups of 4096 tokens divide both stacks' tokens.
    assert all(
        data.batch_size * length % 4096 == 0 for length in data.task_feature_lengths.values()
    )
    restore = call["checkpoint_cfg"].restore
    if "scratch" in name:
        assert restore is None
    else:
        assert (restore.recipe is None) == name.endswith("_dense.gin")
        assert (getattr(restore.recipe, "depth", None) is not None) == ("depth" in name)


@pytest.mark.parametrize(
    ("name", "rate", "expert_dropout"),
    [
        ("base_dense", 1e-3, None),
        ("large_dense", 1e-3, None),
        ("base_upcycled", 1e-4, 0.1),
        ("large_upcycled", 1e-3, 0.3),
        ("xl_upcycled", 1e-3, 0.3),
    ],
)
def test_fine_tuning_is_the_papers(name, rate, expert_dropout):
    """Appendix A: learning rate, dropout and expert dropout by size."""
    call, _ = paper_run(f"{PAPER}/{name}_superglue.gin")
    assert [float(call["trainer"].learning_rate_fn(step)) for step in (0, 10**6)] == pytest.approx(
        [rate, rate]
    )
    config = call["model"].config
    assert config.dropout_rate == 0.1
    assert expert_dropout is None or config.expert_dropout_rate == expert_dropout
    assert (
        call["train_dataset_cfg"].mixture_or_task_name,
        call["train_dataset_cfg"].batch_size,
    ) == ("super_glue_v102_proportional", 128)


def test_depth_tiling_starts_from_a_dense_checkpoint(dense_checkpoint, tmp_path):
    """The base file at small size: two layers of the encoder made of one, then a step."""
    name = f"{PAPER}/base_depth_tiled.gin"
    required = [
        f"MODEL_DIR='{tmp_path}/run'",
        f"INITIAL_CHECKPOINT_PATH='{dense_checkpoint}'",
        "TRAIN_STEPS=2",
        f"BATCH_SIZE={ROWS}",
    ]
    call = load([name], [*SMALL, *required, "T5Config.num_encoder_layers=2"]).build("train")
    data = data_for(call.keywords["model"])
    result = call(
        train_dataset_cfg=data, train_eval_dataset_cfg=None, partitioner=one_device()
    ).run()
    assert (result.step, result.start) == (2, "upcycle")


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm", "ul2"])
@pytest.mark.parametrize("name", ["pretrain", "eval", "infer"])
def test_the_objective_of_text_files_is_a_macro(name, objective):
    required = ["MODEL_DIR='x'", "TRAIN_STEPS=7"] if name == "pretrain" else ["CHECKPOINT_PATH='x'"]
    required += {"eval": ["EVAL_OUTPUT_DIR='z'"], "infer": ["INFER_OUTPUT_DIR='z'"]}.get(name, [])
    bindings = [
        *required,
        "MIXTURE_OR_TASK_NAME='mine'",
        "TEXT_FILES='mine/*.txt'",
        f"OBJECTIVE='{objective}'",
    ]
    root = {"pretrain": "train", "eval": "evaluate", "infer": "infer"}[name]
    call = load(["models/t5_1_1_tiny.gin", f"runs/{name}.gin"], bindings).build(root).keywords
    assert call["train_dataset_cfg" if name == "pretrain" else "dataset_cfg"].objective == objective


@pytest.mark.parametrize("name", DECODER_RECIPES)
def test_recipes_of_language_models_build(name):
    """They name their MoE layers, and need no model file."""
    given = ["INITIAL_CHECKPOINT_PATH='a'", "OUTPUT_CHECKPOINT_PATH='b'"]
    text = (FOLDER / name).read_text(encoding="utf-8")
    for macro in ("EXPERT_MLP_DIM", "SHARED_EXPERT_MLP_DIM"):
        given += [f"{macro}=16"] if f"\n{macro} = %gin.REQUIRED" in text else []
    loaded = load(["runs/upcycle.gin", name], given)
    built = loaded.build("upcycle").keywords
    assert type(built["recipe"]) in surgery_recipe.PARTS
    assert type(built["moe"]) is DecoderMoeConfig and built["moe"].router.unit_weights
    assert loaded.build("verify").keywords["moe"] == built["moe"]
    assert not [
        line
        for line in loaded.unused()
        if line.startswith(str(FOLDER / name)) and ": verify." not in line
    ]


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in DECODER_RECIPES])
def test_recipes_build(name):
    paths = ["INITIAL_CHECKPOINT_PATH='a'", "OUTPUT_CHECKPOINT_PATH='b'"]
    parents = (
        ["PARENTS=(0, 1)"]
        if "PARENTS = %gin.REQUIRED" in (FOLDER / name).read_text(encoding="utf-8")
        else []
    )
    loaded = load(["models/t5_1_1_tiny_upcycled.gin", "runs/upcycle.gin", name], [*paths, *parents])
    recipe = loaded.build("upcycle").keywords["recipe"]
    assert type(recipe) in surgery_recipe.PARTS
    assert not [
        line
        for line in loaded.unused()
        if line.startswith(str(FOLDER / name)) and ": verify." not in line
    ]
