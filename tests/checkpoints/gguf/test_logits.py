"""Models out of GGUF files compute what transformers computes from the same files."""

import jax
import numpy as np
import pytest

from tests.checkpoints.gguf_models import as_stored, metadata, tensors, write
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import unflatten

TOKENS = np.array([[3, 17, 0, 39, 5, 5, 21, 8], [1, 2, 30, 4, 0, 0, 7, 9]], np.int32)


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {"attention.layer_norm_rms_epsilon": 1e-2}),
        ("qwen2", {}),
        ("qwen3", {"rope.freq_base": 500.0}),
    ],
)
def test_logits(tmp_path, architecture, keys):
    torch = pytest.importorskip("torch", reason="torch is needed as the oracle")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is needed as the oracle"
    )
    loading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    stored = as_stored(architecture, tensors(architecture, tied=architecture == "llama"))
    path = tmp_path / "m.gguf"
    names = [f"t{number}" for number in range(40)]
    more = {"general.name": "a model", "tokenizer.ggml.tokens": names}
    write(path, architecture, stored, keys=metadata(architecture) | keys, kind="Q8_0", more=more)
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    config.head_dim = 16  # of Qwen3, whose key_length transformers does not read
    oracle = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    loaded = loading.load_gguf_checkpoint(path, return_tensors=True, model_to_load=oracle)
    missing, unexpected = oracle.load_state_dict(loaded["tensors"], strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"] if config.tie_word_embeddings else [])
    with torch.no_grad():
        theirs = oracle(torch.from_numpy(TOKENS).long()).logits.numpy()
    reader = open_checkpoint(path)
    params = unflatten({name.removeprefix(TARGET): reader.read(name) for name in reader.specs()})
    ours = jax.jit(DecoderModel(reader.model_config()).token_logits)(params, TOKENS)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
