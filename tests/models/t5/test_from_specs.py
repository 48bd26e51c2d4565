"""The model that a checkpoint's leaves imply: from shapes that are claimed, and may be damaged."""

import numpy as np
import pytest

from upcycle_jax.models.t5.config import T5Config
from upcycle_jax.models.t5.from_specs import from_specs
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.trees import LeafSpec

CONFIG = T5Config(
    vocab_size=32,
    emb_dim=8,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=1,
    head_dim=4,
    mlp_dim=16,
)
MODEL = EncoderDecoderModel(CONFIG)
SPECS = {f"target/{name}": spec for name, spec in MODEL.param_specs().items()}


def test_the_leaves_of_a_model_give_its_shape():
    found = from_specs(SPECS, {})
    for name in ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "head_dim", "mlp_dim"):
        assert getattr(found, name) == getattr(CONFIG, name), name


@pytest.mark.parametrize("shape", [(), (8,), (0, 8), (8, 0), (2, 2, 2)])
@pytest.mark.parametrize(
    "name",
    [
        "token_embedder/embedding",
        "encoder/relpos_bias/rel_embedding",
        "encoder/layers_0/attention/query/kernel",
        "encoder/layers_0/mlp/wi_0/kernel",
    ],
)
def test_other_shapes_are_refused(name, shape):
    with pytest.raises(ValueError, match="the shapes of no T5"):
        from_specs({**SPECS, f"target/{name}": LeafSpec(shape, np.dtype(np.float32))}, {})


@pytest.mark.parametrize("number", ["3", "99999999999999999999", "02", "x", "²", ""])
def test_layers_are_counted_and_not_believed(number):
    """A model of 10^20 layers would never be built to its end."""
    with pytest.raises(ValueError, match="not numbered one by one from 0"):
        from_specs(
            {**SPECS, f"target/encoder/layers_{number}/x": LeafSpec((1,), np.dtype(np.float32))}, {}
        )
