"""The T5 shape that a checkpoint implies, for conversions where no model file is given."""

from collections.abc import Mapping

from upcycle_jax.checkpoints.reader import LeafSpecs
from upcycle_jax.layers.mlp import input_kernel_names
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.trees import LeafSpec


def infer_config(specs: Mapping[str, LeafSpec]) -> T5Config:
    """The dense configuration of a T5 checkpoint, read off its shapes and what it states of its
    forward pass; dtype and dropout are the defaults.

    Args:
      specs: of every leaf; a reader's own `specs()`, which know what the checkpoint states. Where
        it states nothing (T5X), a gated MLP is taken for T5 1.1's and a plain one for T5 1.0's.

    Raises:
      ValueError: the leaves are not those of a dense T5 1.0 or 1.1 encoder-decoder, or not of what
        the checkpoint states.
    """
    stated = dict(specs.model_settings()) if isinstance(specs, LeafSpecs) else {}
    embedding = specs.get("target/token_embedder/embedding")
    table = specs.get("target/encoder/relpos_bias/rel_embedding")
    query = specs.get("target/encoder/layers_0/attention/query/kernel")
    gated, plain = (
        specs.get(f"target/encoder/layers_0/mlp/{name}/kernel") for name in ("wi_0", "wi")
    )
    inner = gated or plain
    layers = {stack: _layers(specs, stack) for stack in ("encoder", "decoder")}
    if (
        embedding is None
        or table is None
        or query is None
        or inner is None
        or not all(layers.values())
    ):
        raise ValueError(
            "the source's leaves are not those of a dense T5 encoder-decoder, so its model cannot"
            " be inferred: name a model file, --gin_file=models/t5_1_1_<size>_upcycled.gin"
        )
    activations = stated.pop(
        "mlp_activations", ("gelu", "linear") if gated is not None else ("relu",)
    )
    if len(input_kernel_names(activations)) != 1 + (gated is not None):
        raise ValueError(
            f"the source states mlp_activations {activations!r}, but has"
            f" {'a gated' if gated else 'a plain'} MLP: its record is of another model"
        )
    if not all(len(s.shape) == 2 and s.size for s in (embedding, table, query, inner)):
        raise ValueError(
            f"the source's leaves have the shapes of no T5: its embedding is {embedding}, its"
            f" position table {table}, its first query {query}, its first MLP kernel {inner}"
        )
    heads = table.shape[0]
    return T5Config(
        vocab_size=embedding.shape[0],
        emb_dim=embedding.shape[1],
        num_heads=heads,
        num_encoder_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        head_dim=query.shape[1] // heads,
        mlp_dim=inner.shape[1],
        mlp_activations=activations,
        logits_via_embedding="target/decoder/logits_dense/kernel" not in specs,
        relative_attention_num_buckets=table.shape[1],
        **stated,
    )


def _layers(specs: Mapping[str, LeafSpec], stack: str) -> int:
    """How many layers a stack has.

    Raises:
      ValueError: they are not numbered one by one from 0.
    """
    start = f"target/{stack}/layers_"
    found = {name[len(start) :].partition("/")[0] for name in specs if name.startswith(start)}
    odd = sorted(found - {str(number) for number in range(len(found))})
    if odd:
        raise ValueError(
            f"the source has {len(found)} layers below target/{stack}, one of them layers_{odd[0]}:"
            " they are not numbered one by one from 0, so it is no T5 that can be inferred"
        )
    return len(found)


def infer_sparse_model(specs: Mapping[str, LeafSpec], moe: MoeConfig) -> EncoderDecoderModel:
    """The sparse model that a dense T5 checkpoint becomes with these MoE layers.

    Raises:
      ValueError: see `infer_config`.
    """
    config = infer_config(specs)
    return EncoderDecoderModel(
        T5Config(**{**config.__dict__, "moe": moe}),
        loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    )
