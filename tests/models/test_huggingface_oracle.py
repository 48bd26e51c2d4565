"""The dense model against an independent implementation: Hugging Face's torch T5, with random
weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models.t5.model import EncoderDecoderModel

torch = pytest.importorskip("torch", reason="the oracle needs torch")
transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")

NORMS = {
    "encoder": {0: "pre_attention_layer_norm", 1: "pre_mlp_layer_norm"},
    "decoder": {
        0: "pre_self_attention_layer_norm",
        1: "pre_cross_attention_layer_norm",
        2: "pre_mlp_layer_norm",
    },
}


def torch_parameters(model, config):
    """The torch model's weights under our names: every Linear is transposed, the position table
    too.
    """
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    out = {"token_embedder/embedding": state["shared.weight"]}
    if not config.logits_via_embedding:
        out["decoder/logits_dense/kernel"] = state["lm_head.weight"].T
    for stack in ("encoder", "decoder"):
        table = state[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        out[f"{stack}/relpos_bias/rel_embedding"] = table.T
        out[f"{stack}/{stack}_norm/scale"] = state[f"{stack}.final_layer_norm.weight"]
        for i in range(config.num_layers(stack)):
            block, layer = f"{stack}.block.{i}.layer", f"{stack}/layers_{i}"
            for j, norm in NORMS[stack].items():
                out[f"{layer}/{norm}/scale"] = state[f"{block}.{j}.layer_norm.weight"]
            attentions = {"attention": "0.SelfAttention"}
            if stack == "decoder":
                attentions = {
                    "self_attention": "0.SelfAttention",
                    "encoder_decoder_attention": "1.EncDecAttention",
                }
            for ours, theirs in attentions.items():
                for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
                    out[f"{layer}/{ours}/{name}/kernel"] = state[
                        f"{block}.{theirs}.{letter}.weight"
                    ].T
            gated = len(config.mlp_activations) == 2
            for name in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
                out[f"{layer}/mlp/{name}/kernel"] = state[
                    f"{block}.{len(NORMS[stack]) - 1}.DenseReluDense.{name}.weight"
                ].T
    return trees.unflatten({path: jnp.asarray(value) for path, value in out.items()})


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_logits_equal_torch(version, tiny, make_batch):
    config = tiny(model={"num_decoder_layers": 3})
    if version == "1.0":
        config = dataclasses.replace(config, mlp_activations=("relu",), logits_via_embedding=True)
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.emb_dim,
            d_kv=config.head_dim,
            d_ff=config.mlp_dim,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu" if version == "1.1" else "relu",
            tie_word_embeddings=version == "1.0",
            dropout_rate=0.0,
        )
    ).eval()
    # Long enough for several logarithmic position buckets.
    batch = make_batch(batch_size=3, inputs=150, targets=40, lengths=[150, 30, 77])
    # Theirs has no padding in decoder inputs that masks a query: compare real positions.
    encoder_tokens = torch.tensor(np.asarray(batch["encoder_input_tokens"]), dtype=torch.long)
    with torch.no_grad():
        want = theirs(
            input_ids=encoder_tokens,
            attention_mask=(encoder_tokens > 0).long(),
            decoder_input_ids=torch.tensor(
                np.asarray(batch["decoder_input_tokens"]), dtype=torch.long
            ),
        ).logits.numpy()
    model = EncoderDecoderModel(config)
    params = torch_parameters(theirs, config)
    assert not trees.diff(model.param_specs(), trees.flatten(params))
    got = np.asarray(jax.jit(model.logits)(params, batch))
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    assert want[real].std() > 0.1
    np.testing.assert_allclose(got[real], want[real], atol=2e-5 * want[real].std())
