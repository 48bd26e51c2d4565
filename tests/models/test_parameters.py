"""Parameter names, shapes, dtypes, axes and counts."""

import os
import pathlib

import jax
import pytest

from upcycle_jax.costs import parameters
from upcycle_jax.models import layout
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel

GOLDEN = pathlib.Path(__file__).parent / "golden"

# d, ff, heads, layers of each stack; then dense, 32-expert and router counts. Base, large and xl
# are Table 1 of the paper.
SIZES = {
    "small": ((512, 1024, 6, 8), 76_961_152, 467_162_496, 131_072),
    "base": ((768, 2048, 12, 12), 247_577_856, 2_003_188_992, 294_912),
    "large": ((1024, 2816, 16, 24), 783_150_080, 7_220_096_000, 786_432),
    "xl": ((2048, 5120, 32, 24), 2_849_757_184, 26_255_546_368, 1_572_864),
    "xxl": ((4096, 10240, 64, 24), 11_135_332_352, 104_755_343_360, 3_145_728),
}


def config(size, moe=None):
    emb_dim, mlp_dim, heads, layers = SIZES[size][0]
    return T5Config(
        vocab_size=32128,
        emb_dim=emb_dim,
        num_heads=heads,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        head_dim=64,
        mlp_dim=mlp_dim,
        moe=moe,
    )


@pytest.mark.parametrize("size", SIZES)
def test_counts(size):
    _, dense, upcycled, routers = SIZES[size]
    assert (
        sum(leaf.size for leaf in EncoderDecoderModel(config(size)).param_specs().values()) == dense
    )
    counts = parameters.count(EncoderDecoderModel(config(size, MoeConfig())))
    assert (counts.total, counts.routers) == (upcycled, routers)
    # Both routers give a token two experts: of every MoE layer, 30 of 32 experts are inactive, so
    # two dense MLPs' worth is active where dense has one.
    layers = SIZES[size][0][3]
    assert counts.active == dense + routers + layers * 3 * SIZES[size][0][0] * SIZES[size][0][1]


def test_param_specs_allocate_nothing():
    before = len(jax.live_arrays())
    specs = EncoderDecoderModel(config("xxl", MoeConfig())).param_specs()
    # The key of the abstract initialisation is all that may remain.
    assert len(jax.live_arrays()) <= before + 1
    assert specs["encoder/layers_1/mlp/expert/wi_0/kernel"].nbytes == 32 * 4096 * 10240 * 4


@pytest.mark.parametrize("name", ["dense", "upcycled", "tied_relu"])
def test_golden_tree(name, tiny):
    """Regenerate with REGENERATE_GOLDEN=1 after a wanted change, and read the difference."""
    settings = {
        "dense": tiny(),
        "upcycled": tiny(num_experts=4),
        "tied_relu": tiny(model={"mlp_activations": ("relu",), "logits_via_embedding": True}),
    }
    specs = EncoderDecoderModel(settings[name]).param_specs()
    lines = [
        f"{path} {leaf.dtype.name}"
        f" {' '.join(f'{axis}={size}' for axis, size in zip(leaf.axes, leaf.shape, strict=True))}"
        for path, leaf in specs.items()
    ]
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("REGENERATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text("\n".join(lines) + "\n")
    assert lines == golden.read_text().splitlines()


def test_initialised_parameters_are_what_the_specs_say(single, key):
    from upcycle_jax import trees

    model = EncoderDecoderModel(
        single(num_experts=4, num_decoder_sparse_layers=0, decoder_sparse_layout="MIXED")
    )
    params = trees.flatten(jax.jit(model.init_params)(key))
    assert not trees.diff(model.param_specs(), params, compare_dtype=True)
    assert all(isinstance(leaf, jax.Array) for leaf in params.values())
    # Experts start different from one another, and routers at N(0, 0.02).
    experts = params["encoder/layers_0/mlp/expert/wi_0/kernel"]
    assert abs(experts[0] - experts[1]).max() > 0.01
    assert 0.01 < params["encoder/layers_0/mlp/router/router_weights/w/kernel"].std() < 0.03


def test_expert_width_can_differ(tiny):
    specs = EncoderDecoderModel(tiny(num_experts=4, expert_mlp_dim=8)).param_specs()
    assert specs["encoder/layers_1/mlp/expert/wi_0/kernel"].shape == (4, 16, 8)
    assert specs["encoder/layers_0/mlp/wi_0/kernel"].shape == (16, 32)


@pytest.mark.parametrize(
    ("layers", "count", "where", "expected"),
    [
        (12, 6, "MIXED", (1, 3, 5, 7, 9, 11)),
        (12, None, "MIXED", (1, 3, 5, 7, 9, 11)),
        (12, 4, "MIXED", (2, 5, 8, 11)),
        (12, 1, "MIXED", (11,)),
        (6, 2, "BOTTOM", (0, 1)),
        (6, 2, "TOP", (4, 5)),
        (6, 2, "MIDDLE", (2, 3)),
        (6, 3, "MIDDLE", (2, 3, 4)),
        (5, 2, "MIDDLE", (2, 3)),
        (6, 0, "TOP", ()),
        (6, None, (5, 0), (0, 5)),
        (6, 6, "MIXED", (0, 1, 2, 3, 4, 5)),
    ],
)
def test_layouts(layers, count, where, expected):
    assert layout.sparse_layers(layers, count, where, stack="encoder") == expected


@pytest.mark.parametrize(
    ("count", "where", "message"),
    [
        (5, "MIXED", r"divides the 12 encoder layers, got 5; valid: \[1, 2, 3, 4, 6, 12\]"),
        (13, "TOP", "num_encoder_sparse_layers=13 does not fit a stack of 12 layers"),
        (
            2,
            "SIDEWAYS",
            "unknown encoder sparse layout 'SIDEWAYS': use one of MIXED, BOTTOM, MIDDLE, TOP",
        ),
        (None, (3, 12), r"encoder sparse layers \(3, 12\) must be distinct indices from 0 to 11"),
        (None, (3, 3), "must be distinct"),
        (3, (1, 2), r"num_encoder_sparse_layers=3 contradicts the explicit layout \(1, 2\)"),
    ],
)
def test_bad_layouts(count, where, message):
    with pytest.raises(ValueError, match=message):
        config("base", MoeConfig(num_encoder_sparse_layers=count, encoder_sparse_layout=where))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"emb_dim": 0}, "emb_dim must be at least 1, got 0"),
        ({"mlp_activations": ("swish",)}, "unknown MLP activations .*swish"),
        ({"layer_norm_epsilon": 0.0}, r"layer_norm_epsilon must be .*0\.0"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon must be .*'1e-6'"),
        ({"relative_attention_num_buckets": 3}, "num_buckets must be at least 4"),
        ({"relative_attention_max_distance": 16}, "above half of it, got 32 and 16"),
        ({"relative_attention_max_distance": 64.0}, "max_distance must be .* 64.0"),
        ({"dtype": "float16"}, "'float32' or 'bfloat16', got 'float16'"),
        ({"dropout_rate": 1.5}, r"dropout_rate must be at least 0 and below 1, got 1.5"),
    ],
)
def test_bad_models(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(model=settings)


def test_bad_loss_normalizer(tiny):
    with pytest.raises(ValueError, match="'NUM_REAL_TARGET_TOKENS', got 'TOKENS'"):
        EncoderDecoderModel(tiny(), loss_normalizing_factor="TOKENS")
