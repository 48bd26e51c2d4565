"""The T5 shape that a checkpoint implies, for conversions where no model file is given."""

from collections.abc import Mapping
from typing import Any

from upcycle_jax.layers.mlp import input_kernel_names
from upcycle_jax.models.t5.config import STACKS, T5Config
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec


def from_specs(specs: Mapping[str, LeafSpec], stated: Mapping[str, Any]) -> T5Config | None:
    """The dense configuration of a T5 checkpoint, read off its shapes and what it states of its
    forward pass; dtype and dropout are the defaults. None where the leaves are not a T5's.

    Args:
      specs: of every leaf, by full path.
      stated: the settings of the forward pass that the checkpoint states. Where it states nothing
        (T5X), a gated MLP is taken for T5 1.1's and a plain one for T5 1.0's.

    Raises:
      ValueError: shapes or numbers of layers are no T5's, or not of what the checkpoint states.
    """
    settings = dict(stated)
    embedding = specs.get(f"{TARGET}token_embedder/embedding")
    table = specs.get(f"{TARGET}encoder/relpos_bias/rel_embedding")
    query = specs.get(f"{TARGET}encoder/layers_0/attention/query/kernel")
    gated, plain = (
        specs.get(f"{TARGET}encoder/layers_0/mlp/{name}/kernel") for name in ("wi_0", "wi")
    )
    inner = gated or plain
    layers = {stack: _layers(specs, stack) for stack in STACKS}
    if (
        embedding is None
        or table is None
        or query is None
        or inner is None
        or not all(layers.values())
    ):
        return None
    activations = settings.pop(
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
        logits_via_embedding=f"{TARGET}decoder/logits_dense/kernel" not in specs,
        relative_attention_num_buckets=table.shape[1],
        **settings,
    )


def _layers(specs: Mapping[str, LeafSpec], stack: str) -> int:
    """How many layers a stack has.

    Raises:
      ValueError: they are not numbered one by one from 0.
    """
    start = f"{TARGET}{stack}/layers_"
    found = {name[len(start) :].partition("/")[0] for name in specs if name.startswith(start)}
    odd = sorted(found - {str(number) for number in range(len(found))})
    if odd:
        raise ValueError(
            f"the source has {len(found)} layers below target/{stack}, one of them layers_{odd[0]}:"
            " they are not numbered one by one from 0, so it is no T5 that can be inferred"
        )
    return len(found)
