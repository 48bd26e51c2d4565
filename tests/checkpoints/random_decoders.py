"""Small decoder-only models with random parameters, one for each family, held in memory; and what
transformers makes of a folder.
"""

import dataclasses

import jax
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.checkpoints.reader import ReaderBase
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.moe.routing import DroplessTopK

BASE = DecoderConfig(96, 32, 2, 4, 8, 48, num_kv_heads=2)
TOKENS = np.random.default_rng(7).integers(3, 96, (2, 40)).astype(np.int32)
LLAMA3 = Rope(kind="llama3", factor=8.0, original_length=32)


def of(base=BASE, **fields):
    """A config with other fields."""
    return dataclasses.replace(base, **fields)


UNIT = DecoderMoeConfig(num_experts=4)
PLAIN = DecoderMoeConfig(num_experts=4, router=DroplessTopK(renormalize=False))
MIXED = {"layer_types": ("sliding", "full"), "sliding_window": 7}
ALL = {"layer_types": ("sliding", "sliding"), "sliding_window": 7}
OLMO2 = of(norm_place="post", qk_norm="projection")
GEMMA = of(
    norm="rms_plus_one",
    mlp_activations=("gelu", "linear"),
    embedding_multiplier=32**0.5,
    logits_via_embedding=True,
    head_dim=16,
)
GEMMA2 = of(GEMMA, norm_place="both", attention_scale=24**-0.5, **MIXED)
GRANITE = of(
    embedding_multiplier=3.0, attention_scale=0.2, residual_multiplier=0.4, logits_divisor=2.0
)

DENSE = {
    "llama": of(rope=LLAMA3, qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "mistral": of(**ALL),
    "qwen2": of(qkv_bias=True, logits_via_embedding=True, **MIXED),
    "qwen3": of(
        qk_norm="head", head_dim=16, rope=Rope(kind="yarn", factor=4.0, original_length=32)
    ),
    "smollm3": of(no_rope_layers=(1,), logits_via_embedding=True),
    "granite": GRANITE,
    "phi3": of(
        head_dim=8,
        rope=Rope(
            kind="longrope",
            fraction=0.5,
            factor=4.0,
            original_length=32,
            short_factors=(1.1, 1.2),
            long_factors=(2.0, 3.0),
        ),
        **ALL,
    ),
    "olmo": of(norm="layer_norm_without_parameters", clip_qkv=1.0),
    "olmo2": OLMO2,
    "olmo3": of(OLMO2, sliding_rope=Rope(theta=5e5), rope=Rope(theta=5e5), **MIXED),
    "gemma": GEMMA,
    "gemma2": of(GEMMA2, attention_softcap=2.0, logits_softcap=3.0),
    "gemma3_text": of(
        GEMMA2,
        qk_norm="head",
        sliding_rope=Rope(),
        rope=Rope(theta=1e6, kind="linear", factor=8.0),
    ),
    "gpt_neox": of(
        norm="layer_norm",
        num_kv_heads=None,
        mlp_activations=("gelu_exact",),
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        parallel_residual=True,
        rope=Rope(fraction=0.5),
    ),
}
"""By `model_type`."""

SPARSE = {
    "mixtral": of(moe=UNIT, rope=LLAMA3, head_dim=16, **ALL),
    "qwen2_moe": of(
        qkv_bias=True,
        moe=dataclasses.replace(
            PLAIN, expert_mlp_dim=24, shared_expert_mlp_dim=16, shared_expert_gate=True,
            num_sparse_layers=1,
        ),
    ),
    "qwen3_moe": of(
        qk_norm="head",
        head_dim=16,
        logits_via_embedding=True,
        moe=dataclasses.replace(UNIT, expert_mlp_dim=24, sparse_layout=(0,)),
    ),
    "olmoe": of(qk_norm="projection", clip_qkv=1.0, moe=PLAIN),
    "flex_olmo": of(OLMO2, moe=UNIT),
    "granitemoe": of(GRANITE, moe=UNIT),
    "granitemoeshared": of(GRANITE, moe=dataclasses.replace(UNIT, shared_expert_mlp_dim=16)),
}  # fmt: skip
"""By `model_type`."""

FAMILIES = DENSE | SPARSE


class Held(ReaderBase):
    """A checkpoint of a model, in memory.

    Args:
      config: of the model.
      leaves: its parameters, by path; None: random ones.
      path: where it says that it lies.
    """

    format = "held"

    def __init__(self, config, leaves=None, *, path="/nowhere/checkpoint_0", seed=0):
        self.path, self.config = path, config
        self.leaves = random_leaves(config, seed) if leaves is None else leaves

    def specs(self):
        return {
            f"target/{path}": trees.LeafSpec(leaf.shape, leaf.dtype)
            for path, leaf in sorted(self.leaves.items())
        }

    def read(self, name, index=None):
        return self.leaves[name.removeprefix("target/")][index or ()]

    def model_config(self):
        return self.config


def random_leaves(config, seed=0):
    """Every parameter random, norms too."""
    rng = np.random.default_rng(seed)
    out = {}
    for path, spec in DecoderModel(config).param_specs().items():
        value = rng.normal(size=spec.shape)
        if path.endswith("kernel"):
            value *= spec.shape[-2] ** -0.5
        elif path.endswith(("scale", "bias")):
            value *= 0.3
        if path.endswith("scale") and config.norm != "rms_plus_one":
            value += 1
        out[path] = value.astype(np.float32)
    return out


def our_logits(config, leaves, tokens=TOKENS):
    """Of the model as it predicts."""
    model = DecoderModel(config.for_inference.unrolled)
    params = trees.unflatten(dict(leaves))
    return np.asarray(jax.jit(model.token_logits)(params, tokens))


def load(folder):
    """transformers' model of a folder, which must hold all of its tensors and no others."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is needed as the oracle"
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def their_logits(folder, tokens=TOKENS):
    """What transformers computes from a folder."""
    torch = pytest.importorskip("torch", reason="torch is needed as the oracle")
    with torch.no_grad():
        return load(folder)(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
