"""Shipped gin files of vision transformers are built, counted and stepped."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from upcycle_jax.config import load, search
from upcycle_jax.moe.policy import layer_sizes
from upcycle_jax.moe.routing import ExpertsChoose, TokensChoose

FOLDER = search.shipped_folder()
MODELS = [name for name in search.shipped_files() if re.fullmatch(r"models/vit_[^/]+\.gin", name)]
SMALL = [
    "IMAGE_SIZE=32",
    "NUM_CLASSES=5",
    "VitConfig.patch_size=8",
    "VitConfig.emb_dim=16",
    "VitConfig.num_layers=1",
    "VitConfig.num_heads=2",
    "VitConfig.mlp_dim=24",
]
# The first of two layers is dense.
SPARSE = [*SMALL, "VitConfig.num_layers=2", "NUM_EXPERTS=2", "GROUP_SIZE=32"]


@functools.cache
def loss_after_a_step(model) -> tuple[float, float]:
    """The loss of a batch, and after a step down its gradient."""
    batch = model.features.random(None, batch_size=4)
    denominator = model.loss_denominator(batch)

    @jax.jit
    def step(params):
        def loss(params):
            return model.loss_fn(params, batch, None, denominator=denominator)[0]

        before, gradient = jax.value_and_grad(loss)(params)
        return before, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    before, params = step(jax.jit(model.init_params)(jax.random.key(0)))
    after, _ = step(params)
    return float(before), float(after)


@pytest.mark.parametrize("name", MODELS)
def test_models_build_and_step(name):
    sparse = "upcycled" in name or "vmoe" in name
    model = load([name], SPARSE if sparse else SMALL).macro("MODEL")
    assert (model.config.moe is not None) == sparse
    before, after = loss_after_a_step(model)
    # The head starts at zero, so that every class is as likely.
    assert before == pytest.approx(math.log(5), abs=1e-4) and after < before


@pytest.mark.parametrize("name", [name for name in MODELS if "tiny" not in name])
def test_the_head_of_a_file_says_how_large_its_model_is(name):
    config = load([name]).macro("MODEL").config
    p, d, f, classes = config.patch_size, config.emb_dim, config.mlp_dim, config.num_classes
    # Patch embedding and positions; blocks of four projections, two norms and an MLP; the last
    # norm and the head.
    mlp = 2 * d * f + f + d
    count = p * p * 3 * d + d + (224 // p) ** 2 * d
    count += config.num_layers * (4 * (d * d + d) + 4 * d + mlp) + 2 * d + classes * (d + 1)
    # Of a sparse block 31 more MLPs, and a router without a bias.
    count += len(config.sparse_layers) * (31 * mlp + 32 * d)
    text = (FOLDER / name).read_text(encoding="utf-8").partition("#\n")[0]
    assert f"{count:,}" in text
    assert (config.image_size, classes) == (224, 18_291)


# Width, depth, heads, hidden size: `decode_variant` of big_vision.
SIZES = {
    "ti": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "h": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
}


@pytest.mark.parametrize("name", [name for name in MODELS if re.search(r"\d\.gin$", name)])
def test_sizes_are_big_visions(name):
    size, patch = re.fullmatch(r"models/vit_(.+?)(\d\d)\.gin", name).groups()
    config = load([name]).macro("MODEL").config
    found = (config.emb_dim, config.num_layers, config.num_heads, config.mlp_dim)
    assert (found, config.patch_size) == (SIZES[size], int(patch))


@pytest.mark.parametrize("name", ["models/vit_ti16.gin", "models/vit_h14_upcycled.gin"])
def test_the_formula_counts_what_a_model_has(name):
    model = load([name]).macro("MODEL")
    count = sum(spec.size for spec in model.param_specs().values())
    text = (FOLDER / name).read_text(encoding="utf-8").partition("#\n")[0]
    assert f"{count:,}" in text


@pytest.mark.parametrize("name", [name for name in MODELS if "upcycled" in name])
def test_upcycled_models_are_the_papers(name):
    """Section 3.1 and appendix B.7 of arXiv 2212.05055: the last half of the blocks, E = 32, C = 2,
    experts choose, weights renormalised.
    """
    config = load([name]).macro("MODEL").config
    layers = config.num_layers
    assert config.sparse_layers == tuple(range(layers - layers // 2, layers))
    assert config.moe.num_experts == (4 if "tiny" in name else 32)
    assert config.moe.router == ExpertsChoose(renormalize=True)
    assert config.moe.train_expert_capacity_factor == 2.0


def test_v_moe_is_that_of_its_paper():
    """arXiv 2106.05974, section 2 and appendix A, and its public configurations."""
    config = load(["models/vit_b16_vmoe.gin"]).macro("MODEL").config
    moe = config.moe
    assert config.sparse_layers == (1, 3, 5, 7, 9, 11)
    assert moe.router == TokensChoose(num_selected_experts=2, batch_prioritized=True, noise_std=1.0)
    assert (moe.aux_loss_factor, moe.importance_loss_factor, moe.load_loss_factor) == (
        0.0,
        0.005,
        0.005,
    )
    assert (moe.fresh_experts, moe.capacity_rounding, moe.capacity_multiple) == ("equal", "ceil", 4)
    # 2 * 1.05 * 1568 / 32 = 102.9 slots, filled up to 104.
    assert layer_sizes(moe, moe.router, 8, 196, train=True).capacity == 104


def test_bfloat16_and_the_sigmoid_loss_step():
    bindings = [*SPARSE, "ACTIVATION_DTYPE='bfloat16'", "LOSS='sigmoid'"]
    model = load(["models/vit_tiny_upcycled.gin"], bindings).macro("MODEL")
    before, after = loss_after_a_step(model)
    # Five classes with logits 0: 5 log 2.
    assert before == pytest.approx(5 * math.log(2), abs=1e-3) and after < before
    assert model.config.activation_dtype == jnp.bfloat16
