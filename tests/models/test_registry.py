"""Families of models: found by the leaves of a checkpoint, and named nowhere above `models/`."""

import ast
import dataclasses
import pathlib
import re

import numpy as np
import pytest

from upcycle_jax.models import registry
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.trees import LeafSpec

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "upcycle_jax").rglob("*.py"))
SHARED_PLACES = ("upcycle_jax/config/registry.py", "upcycle_jax/config/stale.py")
"""Names of all families in gin files."""
OF_FAMILY = {
    "t5": (
        "upcycle_jax/models/t5/",
        "upcycle_jax/checkpoints/huggingface/t5/",
        "upcycle_jax/features/encoder_decoder.py",
        "upcycle_jax/papers/",
        "upcycle_jax/paper.py",
    ),
    "decoder": (
        "upcycle_jax/models/decoder/",
        "upcycle_jax/checkpoints/huggingface/decoder/",
        "upcycle_jax/checkpoints/gguf/",
        "upcycle_jax/features/decoder_only",
        # Compares a served language model with its checkpoint.
        "upcycle_jax/surgery/served/",
    ),
    "vit": (
        "upcycle_jax/models/vit/",
        "upcycle_jax/checkpoints/huggingface/vit/",
        "upcycle_jax/checkpoints/vit/",
        "upcycle_jax/features/images.py",
        # Its own evaluation.
        "upcycle_jax/few_shot.py",
        "upcycle_jax/papers/",
    ),
}
"""The family itself, its converter and its foreign checkpoints; also the paper, for those that it
is about.
"""
NAMES = {
    "t5": r"\b(T5Config|EncoderDecoderModel|MoeConfig\(|models\.t5)",
    "decoder": r"\b(DecoderConfig|DecoderModel|DecoderMoeConfig|models\.decoder)",
    "vit": r"\b(VitConfig|VitModel|VitMoeConfig|models\.vit)",
}
"""What belongs to a family, as a pattern."""
JOINTS = {
    "config",
    "dataset",
    "dataset_cfg",
    "model",
    "optimizer",
    "params",
    "recipe",
    "source_model",
    "train_dataset_cfg",
    "train_eval_dataset_cfg",
    "trainer",
}
"""Names of arguments and fields at which rooms meet: each has a type."""

CONFIG = T5Config(
    vocab_size=32,
    emb_dim=8,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=1,
    head_dim=4,
    mlp_dim=16,
)


def specs():
    params = EncoderDecoderModel(CONFIG).param_specs()
    return {f"target/{path}": spec for path, spec in params.items()}


def test_a_checkpoint_becomes_the_sparse_model_of_its_family():
    model = registry.infer(specs(), {"layer_norm_epsilon": 1e-5}, MoeConfig(num_experts=2))
    assert isinstance(model, EncoderDecoderModel)
    expected = dataclasses.replace(CONFIG, layer_norm_epsilon=1e-5)
    assert dataclasses.replace(model.config.dense, dropout_rate=CONFIG.dropout_rate) == expected
    assert model.config.moe == MoeConfig(num_experts=2)
    assert registry.infer(specs(), {}).config.moe == MoeConfig()


def test_leaves_of_no_family_and_moe_layers_of_another_are_refused():
    with pytest.raises(ValueError, match="not those of a dense T5 encoder-decoder.*name a model"):
        registry.infer({"target/x": LeafSpec((2,), np.dtype(np.float32))}, {})
    with pytest.raises(ValueError, match="whose MoE layers are a MoeConfig, got MoeSettings"):
        registry.infer(specs(), {}, MoeSettings(num_experts=2))


def test_a_configuration_of_no_family_is_no_model():
    assert isinstance(registry.build(CONFIG), EncoderDecoderModel)
    with pytest.raises(ValueError, match="the recorded model is MoeConfig, no T5Config"):
        registry.build(MoeConfig())


def outside(family: str) -> list[str]:
    """Files that are not a family's own."""
    names = [path.relative_to(ROOT).as_posix() for path in LIBRARY]
    return [name for name in names if not name.startswith((*OF_FAMILY[family], *SHARED_PLACES))]


def pairs_of_stacks(tree: ast.AST) -> list[int]:
    """Lines with 'encoder' and 'decoder' beside each other in one tuple, list, set or mapping."""
    found = []
    for node in ast.walk(tree):
        items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", ())
        words = {item.value for item in items if isinstance(item, ast.Constant)}
        if {"encoder", "decoder"} <= words:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("family", NAMES)
def test_no_family_is_named_above_the_models(family):
    found = []
    for name in outside(family):
        text = (ROOT / name).read_text(encoding="utf-8")
        if name == "upcycle_jax/models/registry.py":
            text = text.replace(f"models.{family}", "models.one")
        found += [f"{name} names {word}" for word in re.findall(NAMES[family], text)]
        if family == "t5":
            lines = pairs_of_stacks(ast.parse(text))
            found += [f"{name}:{line} names T5's stacks" for line in lines]
    assert not found, "\n".join(found)


def untyped(tree: ast.AST) -> list[str]:
    """Arguments and fields of `JOINTS` that are `Any`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            named = node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            named = node.target.id
        else:
            continue
        if named in JOINTS and node.annotation and ast.unparse(node.annotation) == "Any":
            found.append(f"line {node.lineno}: {named}")
    return found


def test_joints_have_types():
    found = []
    for path in LIBRARY:
        lines = untyped(ast.parse(path.read_text(encoding="utf-8")))
        found += [f"{path.relative_to(ROOT)}, {line}" for line in lines]
    assert not found, "\n".join(found)
