"""What a Hugging Face folder computes: logits of the model that is inferred from it against those
of transformers' torch model; and a model that contradicts it is refused wherever it could run.
"""

import dataclasses
import types

import jax
import numpy as np
import pytest

from upcycle_jax import state_tree, surgery, trees
from upcycle_jax.checkpoints import create_checkpoint, loading, model_settings, open_checkpoint
from upcycle_jax.checkpoints.to_orbax import convert_to_orbax
from upcycle_jax.models import registry
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.from_specs import from_specs
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.surgery import convert_and_prove
from upcycle_jax.surgery.parents import join

torch = pytest.importorskip("torch", reason="the oracle needs torch")
transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")

SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
}
INPUTS, TARGETS = 150, 40


def folder(path, *, kind="T5", edit=None, **config):
    """Saves a random model and returns its logits, as transformers computes them after loading."""
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{kind}Config")(**SIZES, dropout_rate=0.0, **config)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(configuration)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            factor = 2.0 if "relative" in name else 0.3
            parameter.copy_(torch.randn(parameter.shape) * factor + float("norm" in name))
    if edit:
        edit(model)
    model.save_pretrained(path)
    loaded = type(model).from_pretrained(path).eval()
    encoder, decoder = (torch.tensor(batch()[f"{s}_input_tokens"]).long() for s in
                        ("encoder", "decoder"))  # fmt: skip
    with torch.no_grad():
        return loaded(
            input_ids=encoder,
            attention_mask=torch.ones_like(encoder),
            decoder_input_ids=decoder,
        ).logits.numpy()


def batch():
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(2, 40, (2, n)).astype(np.int32) for n in (INPUTS, TARGETS))
    shifted = np.concatenate([np.zeros((2, 1), np.int32), targets[:, :-1]], axis=1)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
    }


def untie(model):
    model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
    model.config.tie_word_embeddings = False


@pytest.mark.parametrize(
    "config",
    [
        # That is what an mT5 computes as well.
        pytest.param(
            {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "edit": untie},
            marks=pytest.mark.slow,
        ),
        {"feed_forward_proj": "gelu", "layer_norm_epsilon": 0.3},
        {"feed_forward_proj": "gated-silu", "relative_attention_max_distance": 64},
        {
            "feed_forward_proj": "relu",
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
            "scale_decoder_outputs": False,
        },
        {"kind": "MT5", "edit": untie},
    ],
    ids=["t5 1.1", "erf and epsilon", "silu and distance", "buckets, tied, unscaled", "mt5"],
)
def test_logits_are_those_of_transformers(tmp_path, config):
    want = folder(tmp_path / "hf", **config)
    reader = open_checkpoint(tmp_path / "hf")
    model = EncoderDecoderModel(from_specs(reader.specs(), reader.model_settings()))
    params = trees.unflatten({path: reader.read(f"target/{path}") for path in model.param_specs()})
    got = np.asarray(jax.jit(model.logits)(params, batch()))
    assert want.std() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4 * want.std())


SILU = ("silu", "linear")


@pytest.fixture(scope="module")
def silu(tmp_path_factory):
    """An Orbax checkpoint that states gated silu and an epsilon of its own, and its model."""
    config = T5Config(
        vocab_size=16,
        emb_dim=8,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=4,
        mlp_dim=12,
        mlp_activations=SILU,
        layer_norm_epsilon=1e-3,
    )
    model = EncoderDecoderModel(config)
    specs = state_tree.parameter_specs(model.param_specs())
    path = tmp_path_factory.mktemp("silu") / "checkpoint_3"
    stated = model_settings.record(config.forward_settings)
    with create_checkpoint(path, specs, step=3, metadata=stated) as writer:
        for name, spec in specs.items():
            writer.write(name, None, np.ones(spec.shape, spec.dtype))
        writer.finalize()
    return path, config


def test_what_an_orbax_checkpoint_states_is_inferred(silu):
    path, config = silu
    reader = open_checkpoint(path)
    assert reader.model_settings() == config.forward_settings
    assert from_specs(reader.specs(), reader.model_settings()) == config


def test_a_conversion_and_a_copy_hand_the_settings_on(silu, tmp_path):
    path, config = silu
    source = open_checkpoint(path)
    copied = open_checkpoint(convert_to_orbax(source, tmp_path / "copied"))
    assert copied.model_settings() == config.forward_settings
    model = registry.infer(source.specs(), source.model_settings(), MoeConfig(num_experts=2))
    assert model.config.layer_norm_epsilon == config.layer_norm_epsilon
    assert model.config.dense == config
    specs = state_tree.specs(model.param_specs(), {})
    output = tmp_path / "sparse" / "checkpoint_3"
    done = convert_and_prove.convert(
        source, specs, output, surgery.Recipe(), model=model, check="off", report=lambda _: None
    )
    assert done.ok, done.proof.text()
    assert open_checkpoint(output).model_settings() == config.forward_settings
    # Where the source states nothing, as T5X's do, the result states its model's.
    source.model_settings = dict
    convert_and_prove.convert(
        source,
        specs,
        tmp_path / "other",
        surgery.Recipe(),
        model=model,
        check="off",
        report=lambda _: None,
    )
    assert open_checkpoint(tmp_path / "other").model_settings() == config.forward_settings


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mlp_activations": ("gelu", "linear")}, r"mlp_activations \('silu', 'linear'\), the"),
        ({"layer_norm_epsilon": 1e-6}, r"epsilon 0\.001, the model .* 1e-06.*T5Config\.layer_norm"),
        ({"relative_attention_max_distance": 64}, "max_distance 128, the model of this run has 64"),
    ],
)
def test_a_model_that_contradicts_the_checkpoint_is_refused(silu, tmp_path, change, match):
    path, config = silu
    reader = open_checkpoint(path)
    other = EncoderDecoderModel(dataclasses.replace(config, **change))
    sparse = EncoderDecoderModel(dataclasses.replace(other.config, moe=MoeConfig(num_experts=2)))
    with pytest.raises(ValueError, match=match):
        loading.check_params(reader, other)
    specs = state_tree.parameter_specs(sparse.param_specs())
    with pytest.raises(ValueError, match=match):
        convert_and_prove.convert(reader, specs, tmp_path / "out", surgery.Recipe(), model=sparse)
    assert not list(tmp_path.iterdir())
    plan = surgery.make_plan(reader.specs(), specs, surgery.Recipe())
    with pytest.raises(ValueError, match=match):
        convert_and_prove.verify(plan, reader, reader, model=sparse)
    loading.check_params(reader, EncoderDecoderModel(config))


def stating(path, **settings):
    return types.SimpleNamespace(path=path, model_settings=lambda: settings)


def test_parents_that_compute_differently_are_refused():
    parents = [
        stating("a", layer_norm_epsilon=1e-6),
        stating("b"),
        stating("c", mlp_activations=SILU),
    ]
    assert join(parents).model_settings() == {"layer_norm_epsilon": 1e-6, "mlp_activations": SILU}
    parents.append(stating("d", layer_norm_epsilon=1e-5))
    with pytest.raises(ValueError, match="a states layer_norm_epsilon 1e-06, d 1e-05"):
        join(parents).model_settings()


def test_a_record_of_another_mlp_is_refused(silu):
    specs = open_checkpoint(silu[0]).specs()
    with pytest.raises(ValueError, match="has a gated MLP: its record is of another model"):
        from_specs(specs, {"mlp_activations": ("relu",)})


@pytest.mark.parametrize(
    "settings",
    [
        [],
        {"unknown": 1},
        {"mlp_activations": "gelu"},
        {"mlp_activations": ["gelu", ["linear"]]},
        {"mlp_activations": []},
        {"layer_norm_epsilon": True},
        {"layer_norm_epsilon": "1e-6"},
        {"layer_norm_epsilon": float("nan")},
        {"relative_attention_max_distance": 1.5},
        {"relative_attention_max_distance": 0},
    ],
)
def test_damaged_records(settings):
    with pytest.raises(ValueError, match=r"^here: .* record"):
        model_settings.recorded({"model_settings": settings}, where="here")
    assert model_settings.recorded({}, where="here") == {}
