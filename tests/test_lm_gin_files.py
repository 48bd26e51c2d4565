"""Shipped gin files of decoder-only language models are built, counted and stepped."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from tests.random_data import RandomData
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.config import load, search
from upcycle_jax.models.decoder.config import DecoderMoeConfig
from upcycle_jax.moe.routing import DroplessTopK
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.optimizers import AdamW
from upcycle_jax.training.parameter_groups import settings_of

FOLDER = search.shipped_folder()
MODELS = [
    name
    for name in search.shipped_files()
    if re.fullmatch(r"models/[^/]+\.gin", name)
    and "include 'models/parts/decoder" in (FOLDER / name).read_text(encoding="utf-8")
]
DENSE = [name for name in MODELS if "upcycled" not in name]
# Counted by transformers from each model's config.json.
COUNTS = {
    "llama_2_7b": 6_738_415_616,
    "llama_3_2_1b": 1_235_814_400,
    "llama_3_8b": 8_030_261_248,
    "llama_3_8b_upcycled": 47_491_321_856,
    "mistral_7b": 7_241_732_096,
    "mistral_7b_upcycled": 46_702_792_704,  # Mixtral 8x7B has the same shapes
    "olmo_1b_0724": 1_279_787_008,
    "olmo_2_1b": 1_484_916_736,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
    "smollm2_135m_upcycled": 692_036_928,
    "tinyllama_1_1b": 1_100_048_384,
    "tinyllama_1_1b_upcycled": 6_429_272_064,
}
SMALL = [
    "VOCAB_SIZE=512",
    "ACTIVATION_DTYPE='float32'",
    "DecoderConfig.emb_dim=16",
    "DecoderConfig.num_heads=4",
    "DecoderConfig.num_kv_heads=2",
    "DecoderConfig.num_layers=1",
    "DecoderConfig.head_dim=8",
    "DecoderConfig.mlp_dim=32",
    "DecoderConfig.norm_epsilon=1e-5",
    "Rope.theta=10000.0",
]
ROWS, LENGTHS = 8, {"targets": 16}
TINY = "models/tiny_lm.gin"


def small(name: str) -> list[str]:
    """Bindings that shrink the model of a file."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    bindings = list(SMALL)
    if "layer_types" in text or "mistral" in name:
        bindings += ["DecoderConfig.layer_types=('sliding',)"]
        bindings += ["DecoderConfig.sliding_window=4"]
    return [*bindings, "NUM_EXPERTS=4"] if "upcycled" in name else bindings


def batch_of(model, seed: int = 0):
    return model.features.random(300, batch_size=ROWS, length=LENGTHS["targets"], seed=seed)


def parameters(config) -> int:
    """The number of parameters of a language model, by hand."""
    d, hd, moe = config.emb_dim, config.head_dim, config.moe
    q, kv = config.num_heads * hd, config.kv_heads * hd
    norm = {"layer_norm_without_parameters": 0, "rms": d}[config.norm]
    attention = d * q + 2 * d * kv + q * d + (q + 2 * kv if config.qkv_bias else 0)
    attention += {None: 0, "head": 2 * hd, "projection": q + kv}[config.qk_norm]
    mlp = 3 * d * config.mlp_dim
    sparse = len(config.sparse_layers)
    total = config.vocab_size * d * (1 if config.logits_via_embedding else 2) + norm
    total += config.num_layers * (attention + 2 * norm) + (config.num_layers - sparse) * mlp
    return total + (sparse * moe.num_experts * (mlp + d) if moe is not None else 0)


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_counts(name):
    """The count of the file's head, of its arithmetic, and of transformers."""
    model = load([name]).macro("MODEL")
    text, short = (FOLDER / name).read_text(encoding="utf-8"), name[7:-4]
    count = parameters(model.config)
    assert count == COUNTS.get(short, count)
    head = text[: text.index("# REQUIRED")].replace("\n# ", " ")
    assert f"{count:,} parameters" in head or short.startswith(("tiny_lm", "small_lm_"))
    assert (model.config.moe is not None) == ("upcycled" in name)


@pytest.mark.parametrize(
    "name",
    [
        "tiny_lm_upcycled",
        "small_lm",
        "olmo_1b_0724",
        pytest.param("llama_3_8b_upcycled", marks=pytest.mark.slow),
        pytest.param("qwen2_5_7b", marks=pytest.mark.slow),
        pytest.param("qwen3_0_6b_upcycled", marks=pytest.mark.slow),
        pytest.param("olmo_2_1b_upcycled", marks=pytest.mark.slow),
    ],
)
def test_counts_by_hand_are_those_of_the_model(name):
    model = load([f"models/{name}.gin"]).macro("MODEL")
    assert sum(spec.size for spec in model.param_specs().values()) == parameters(model.config)


def test_every_second_layer_is_sparse_where_half_of_them_are():
    """Counts of transformers for decoder_sparse_step = 2 without a shared expert."""
    qwen3 = load(["models/qwen3_0_6b_upcycled.gin"], ["NUM_SPARSE_LAYERS=14"]).macro("MODEL")
    assert qwen3.config.sparse_layers == tuple(range(1, 28, 2))
    assert parameters(qwen3.config) == 1_521_008_640
    qwen2 = load(["models/qwen2_5_0_5b_upcycled.gin"], ["NUM_SPARSE_LAYERS=12"]).macro("MODEL")
    # There each sparse layer has a gate [1, d] for the shared expert of width 0: 12 x 896.
    assert parameters(qwen2.config) + 12 * 896 == 1_592_381_824


def test_there_is_an_upcycled_model_of_every_size():
    assert {name.replace(".gin", "_upcycled.gin") for name in DENSE} == set(MODELS) - set(DENSE)
    for name in DENSE:
        dense, sparse = (
            load([file]).macro("MODEL") for file in (name, name.replace(".gin", "_upcycled.gin"))
        )
        assert sparse.dense == dense
        moe = sparse.config.moe
        assert moe.router == DroplessTopK(num_selected_experts=2, renormalize=True)
        assert sparse.config.sparse_layers == tuple(range(dense.config.num_layers))


@functools.cache
def traced(model) -> None:
    """Traces the loss and its gradient. Files that differ in size only give one small model."""
    params = jax.eval_shape(model.init_params, jax.random.key(0))
    loss = functools.partial(model.loss_fn, denominator=jnp.float32(1))
    jax.eval_shape(jax.grad(loss, has_aux=True), params, batch_of(model), jax.random.key(0))


@pytest.mark.parametrize("name", [*DENSE, "models/qwen3_0_6b_upcycled.gin"])
def test_models_build_and_trace(name):
    """MoE layers are the same in every file."""
    traced(load([name], [*small(name), "BOS_ID=1"]).macro("MODEL"))


def required(folder, steps, *bindings):
    return [
        f"MODEL_DIR='{folder}'",
        f"TRAIN_STEPS={steps}",
        f"BATCH_SIZE={ROWS}",
        f"TASK_FEATURE_LENGTHS={LENGTHS}",
        "MIXTURE_OR_TASK_NAME='random'",
        "WARMUP_STEPS=1",
        "EVAL_PERIOD=None",
        *bindings,
    ]


def built(files, bindings):
    """The arguments that gin files give to `train`."""
    return load(files, bindings).build("train")


def run(files, bindings):
    """Builds a run with everything in it, then runs it on random tokens and one device."""
    call = built(files, bindings)
    data = RandomData(functools.partial(batch_of, call.keywords["model"]), ROWS, LENGTHS)
    device = Partitioner(devices=(jax.devices()[0],))
    return call(train_dataset_cfg=data, train_eval_dataset_cfg=None, partitioner=device).run()


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory):
    """Two steps of dense pre-training with the shipped run file."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    result = run([TINY, "runs/pretrain_lm.gin"], required(folder, 2, *SMALL))
    assert (result.step, result.start) == (2, "scratch")
    return folder / "checkpoint_2"


TWO_EXPERTS = ["MOE=@DecoderMoeConfig()", "DecoderMoeConfig.num_experts=2"]


@pytest.mark.parametrize(
    ("bindings", "start"),
    [
        (["RECIPE=@Recipe()", *TWO_EXPERTS], "upcycle"),
        ([], "continue"),
    ],
)
def test_runs_continue_without_a_model_file(bindings, start, dense_checkpoint, tmp_path):
    given = [f"INITIAL_CHECKPOINT_PATH='{dense_checkpoint}'", "ACTIVATION_DTYPE='float32'"]
    folder = tmp_path / "run"
    result = run(["runs/continue_pretrain_lm.gin"], required(folder, 4, *given, *bindings))
    assert (result.step, result.start) == (4, start)
    experts = {
        spec.shape[0]
        for path, spec in open_checkpoint(folder).specs().items()
        if path.startswith("target/") and "/expert/" in path
    }
    assert experts == ({2} if start == "upcycle" else set())
    # What the run saved holds its own model, for evaluation and inference.
    for root, output in (("eval", "EVAL_OUTPUT_DIR"), ("infer", "INFER_OUTPUT_DIR")):
        paths = [f"CHECKPOINT_PATH='{folder}'", f"{output}='x'", "MIXTURE_OR_TASK_NAME='y'"]
        loaded = load([f"runs/{root}_lm.gin"], [*paths, "ACTIVATION_DTYPE='float32'", "BOS_ID=3"])
        model = loaded.macro("MODEL")
        specs = {f"target/{path}": spec for path, spec in model.param_specs().items()}
        assert not trees.diff(
            specs, {p: s for p, s in open_checkpoint(folder).specs().items() if p in specs}
        )
        assert model.features.bos_id == 3


def test_a_conversion_is_compared_on_rows_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("Some words of a document.\n" * 400)
    given = ["INITIAL_CHECKPOINT_PATH='x'", "OUTPUT_CHECKPOINT_PATH='y'", "VOCABULARY='bytes'"]
    given += ["MIXTURE_OR_TASK_NAME='upcycled_text'", f"TEXT_FILES=['{tmp_path}/*.txt']"]

    def first_batch(model, run, *more):
        loaded = load([model, f"runs/{run}.gin"], [*given, *more])
        return loaded.build("upcycle")().first_batch(loaded.macro("MODEL"))

    found = first_batch("models/tiny_lm_upcycled.gin", "upcycle_lm")
    assert found.origin == "first batch of upcycled_text, split validation"
    assert found.batch["decoder_target_tokens"].shape == (2, 1024)
    # Each kind of model has its own file; with another's, the error says so.
    text = "FUNCTION_CHECK_DATASET=@function_check/DatasetConfig()"
    message = "function_check_dataset upcycled_text is not for a {}: .*runs/upcycle_{}.gin"
    for model, run, more, kind, file in (
        ("vit_tiny_upcycled", "upcycle", [text], "VitModel", "images"),
        ("t5_1_1_tiny_upcycled", "upcycle_lm", [], "EncoderDecoderModel", "lm"),
    ):
        with pytest.raises(ValueError, match=message.format(kind, file)):
            first_batch(f"models/{model}.gin", run, *more)


@pytest.mark.parametrize("name", ["continue_pretrain_lm", "finetune_lm"])
def test_the_model_is_read_where_no_file_gives_it(name, dense_checkpoint):
    given = required("x", 9, f"INITIAL_CHECKPOINT_PATH='{dense_checkpoint}'")
    plain = built([f"runs/{name}.gin"], given).keywords
    assert plain["model"].config.vocab_size == 512 and plain["model"].config.moe is None
    assert plain["model"].config.dtype == "bfloat16"
    kept = ["RESTORE_STEP='keep'", "RESTORE_OPTIMIZER_STATE='keep'"] if "fine" in name else []
    sparse = built([f"runs/{name}.gin"], [*given, *kept, "RECIPE=@Recipe()"]).keywords["model"]
    assert sparse.config.moe == DecoderMoeConfig()
    filed = built([TINY, f"runs/{name}.gin"], given).keywords["model"]
    assert filed.config.mlp_dim == 64 and filed.config.dtype == "float32"


def test_language_models_are_trained_as_is_usual():
    """AdamW with decay on matrices and embeddings, a clipped norm, and the schedule of the file."""
    call = built([TINY, "runs/pretrain_lm.gin"], required("x", 12, "WARMUP_STEPS=2")).keywords
    trainer = call["trainer"]
    assert trainer.optimizer == AdamW(b1=0.9, b2=0.95, weight_decay=0.1, step_offset="start")
    assert trainer.max_gradient_norm == 1.0 and call["train_dataset_cfg"].pack
    specs = call["model"].param_specs()
    decays = {p: settings_of(p, s, trainer.parameter_groups).weight_decay for p, s in specs.items()}
    assert {path for path, decay in decays.items() if decay == 0.0} == {
        path for path in specs if path.endswith("scale")
    }
    rates = [float(trainer.learning_rate_fn(step)) for step in (1, 2, 7, 12)]
    # Half of the warm-up, its end, half of the cosine: 0.1 + 0.9 / 2, and its end.
    assert rates == pytest.approx([1.5e-4, 3e-4, 3e-4 * 0.55, 3e-5], rel=1e-5)


def test_groups_of_the_run_file():
    """Routers alone in the first 100 steps, at ten times the rate."""
    bindings = [
        "PARAMETER_GROUPS=(@vectors/ParameterGroup(), @embeddings/ParameterGroup(),"
        " @routers/ParameterGroup(), @frozen/ParameterGroup())",
        "ROUTER_LEARNING_RATE_FACTOR=10.0",
        "FROZEN_ROLES=('dense', 'expert')",
        "FROZEN_STEPS=100",
    ]
    files = ["models/tiny_lm_upcycled.gin", "runs/pretrain_lm.gin"]
    call = built(files, required("x", 900, *bindings)).keywords
    groups = call["trainer"].parameter_groups
    found = {
        path: settings_of(path, spec, groups) for path, spec in call["model"].param_specs().items()
    }
    router = found["decoder/layers_0/mlp/router/router_weights/w/kernel"]
    assert (router.learning_rate_factor, router.weight_decay, router.freezing) == (10.0, 0.1, ())
    expert = found["decoder/layers_0/mlp/expert/wi_0/kernel"]
    assert [bool(expert.is_frozen(step)) for step in (0, 99, 100)] == [True, True, False]
    assert found["token_embedder/embedding"].weight_decay == 0.0


def test_the_operative_configuration_builds_the_same_run(dense_checkpoint, tmp_path):
    given = required("x", 9, f"INITIAL_CHECKPOINT_PATH='{dense_checkpoint}'", "RECIPE=@Recipe()")
    first = load(["runs/continue_pretrain_lm.gin"], given)
    before = dict(first.build("train").keywords)
    (tmp_path / "config.gin").write_text(first.operative_text())
    after = dict(load([str(tmp_path / "config.gin")]).build("train").keywords)
    assert before["model"] == after["model"] and before["model"].config.moe is not None
    for part in ("optimizer", "learning_rate_fn", "parameter_groups", "max_gradient_norm"):
        assert getattr(before["trainer"], part) == getattr(after["trainer"], part)


PAPER = "papers/language_models"
PAPERS = [name for name in search.shipped_files() if re.fullmatch(rf"{PAPER}/[^/]+\.gin", name)]
# Experts, choices, billions of tokens, peak and last learning rate.
PUBLISHED = {
    "llama_3_meets_moe": (8, 2, 100, 3e-5, 3e-7),
    "nvidia_e8g1t2": (8, 2, 1000, 3e-4, 4.5e-7),
    "nvidia_e8g8t8": (64, 8, 1000, 3e-4, 4.5e-7),
    "drop_upcycling_8x1_5b": (8, 2, 500, 2e-4, 2e-5),
    "olmoe_upcycling": (8, 2, 610, 4e-4, 4e-5),
    "branch_train_mix": (4, 2, 80, 1e-4, 1e-5),
}


def paper_run(name):
    required = ["MODEL_DIR='x'", "INITIAL_CHECKPOINT_PATH='y'", "MIXTURE_OR_TASK_NAME='z'"]
    loaded = load([name], [*required, "DecoderConfig.num_layers=1"])
    return loaded.build("train").keywords, loaded.unused()


@pytest.mark.parametrize("name", PAPERS)
def test_published_recipes_are_as_published(name):
    call, unused = paper_run(name)
    assert not [line for line in unused if PAPER in line]
    model, data, trainer = call["model"], call["train_dataset_cfg"], call["trainer"]
    experts, choices, tokens, peak, last = PUBLISHED[name.rpartition("/")[2][:-4]]
    moe = model.config.moe
    assert (moe.num_experts, moe.router.num_selected_experts) == (experts, choices)
    rows = data.batch_size * data.task_feature_lengths["targets"]
    assert call["total_steps"] * rows / 1e9 == pytest.approx(tokens, rel=1e-3)
    rates = [float(trainer.learning_rate_fn(step)) for step in range(0, 3000, 50)]
    rates += [float(trainer.learning_rate_fn(call["total_steps"]))]
    assert max(rates) == pytest.approx(peak, rel=1e-3) and rates[-1] == pytest.approx(last)
    # What a recipe needs of its experts fits their shapes.
    recipe = call["checkpoint_cfg"].restore.recipe
    for path, spec in model.param_specs().items():
        if spec.role is trees.Role.EXPERT and "layers_0/" in path:
            recipe.expert_init.operation(path, spec)
    assert float(trainer.learning_rate_fn(0)) == pytest.approx(0.0, abs=1e-7)


def test_every_published_recipe_is_there():
    assert {name.rpartition("/")[2][:-4] for name in PAPERS} == set(PUBLISHED)
