"""Small Hugging Face T5 folders, written without transformers and without the library's own table
of names.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

SIZES = {
    "vocab_size": 40,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
}


def t5_shapes(*, gated=True, head=True):
    """Every tensor of a T5 of `SIZES`, by name, as transformers stores it."""
    attention = {"q": (8, 12), "k": (8, 12), "v": (8, 12), "o": (12, 8)}
    mlp = {"wi_0": (20, 12), "wi_1": (20, 12)} if gated else {"wi": (20, 12)}
    modules = {"SelfAttention": attention, "DenseReluDense": mlp | {"wo": (12, 20)}}
    shapes = {"shared.weight": (40, 12)} | ({"lm_head.weight": (40, 12)} if head else {})
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        order = ["SelfAttention", "EncDecAttention", "DenseReluDense"]
        order = [order[0], order[2]] if stack == "encoder" else order
        shapes[f"{stack}.final_layer_norm.weight"] = (12,)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 2)
        for block in range(layers):
            for position, module in enumerate(order):
                layer = f"{stack}.block.{block}.layer.{position}"
                shapes[f"{layer}.layer_norm.weight"] = (12,)
                for part, shape in modules.get(module, attention).items():
                    shapes[f"{layer}.{module}.{part}.weight"] = shape
    return shapes


@pytest.fixture
def t5_folder():
    """Writes a T5 folder and returns its tensors.

    Args (of the function that it gives):
      path: folder to make.
      gated, tied, dtype, seed: of the model; a tied one has no lm_head.
      config: keys to change in config.json; None removes one.
      edit: is given the tensors and returns those to write.
      shards: file name -> names of its tensors, with their index; None for one file.
    """

    def write(
        path, *, gated=True, tied=False, dtype=np.float32, seed=0, config=None, edit=None,
        shards=None,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        shapes = t5_shapes(gated=gated, head=not tied)
        tensors = {name: rng.normal(size=s).astype(dtype) for name, s in sorted(shapes.items())}
        tensors = edit(tensors) if edit else tensors
        path.mkdir()
        if shards is None:
            save_file(tensors, path / "model.safetensors")
        else:
            for file, names in shards.items():
                save_file({name: tensors[name] for name in names}, path / file)
            index = {name: file for file, names in shards.items() for name in names}
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        keys = {
            "model_type": "t5",
            **SIZES,
            "feed_forward_proj": "gated-gelu" if gated else "relu",
            "tie_word_embeddings": tied,
        } | (config or {})
        keys = {key: value for key, value in keys.items() if value is not None}
        (path / "config.json").write_text(json.dumps(keys))
        return tensors

    return write
