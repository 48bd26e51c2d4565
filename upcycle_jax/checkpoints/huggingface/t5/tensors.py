"""Where the tensors of a Hugging Face T5 belong: the one table that reader and writer share.

A linear layer there holds `W [out, in]`; here its kernel is `[in, out]`, so matrices are
transposed. The embedding and the layer norms are taken as they are, and the relative position table
`[buckets, heads]` is transposed.
"""

import dataclasses

EMBEDDING, LOGITS = "token_embedder/embedding", "decoder/logits_dense/kernel"
SHARED, LM_HEAD = "shared.weight", "lm_head.weight"
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Other names of the embedding: copies of it, or it itself where there is no `shared.weight`."""

IGNORED = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})
"""What no T5 uses, and transformers leaves out too: published T5 1.0 folders have it."""

STACKS = ("encoder", "decoder")
_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_SUBLAYERS = {
    "encoder": (
        ("SelfAttention", "attention", "pre_attention_layer_norm"),
        ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ),
    "decoder": (
        ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
        ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ),
}
"""Stack -> its sublayers in order: transformers' module, ours, our name of the norm before it."""


@dataclasses.dataclass(frozen=True)
class T5Dimensions:
    """The architecture of a dense T5, under transformers' names.

    `num_decoder_layers` is 0 for an encoder alone, which has no `lm_head` either.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    num_buckets: int
    gated: bool
    tied: bool


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor belongs.

    Attributes:
      name: the parameter's T5X path, without `target/`.
      shape: of the tensor.
      transposed: whether the parameter is the tensor's transpose.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = True


def table_name(stack: str) -> str:
    """The tensor of a stack's relative position table: in block 0, and nowhere else."""
    return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def input_kernels(stack: str, gated: bool) -> tuple[str, ...]:
    """The tensors of the first MLP's input kernels."""
    layer = f"{stack}.block.0.layer.{len(_SUBLAYERS[stack]) - 1}.DenseReluDense"
    return tuple(f"{layer}.{name}.weight" for name in (("wi_0", "wi_1") if gated else ("wi",)))


def places(dimensions: T5Dimensions) -> dict[str, Place]:
    """Every tensor of a T5 of these dimensions, the copies of its embedding left out.

    >>> t5 = T5Dimensions(64, 8, 4, 16, 2, 1, 1, 32, gated=True, tied=True)
    >>> place = places(t5)["decoder.block.0.layer.1.EncDecAttention.o.weight"]
    >>> place.name
    'decoder/layers_0/encoder_decoder_attention/out/kernel'
    >>> place.shape, place.transposed
    ((8, 8), True)
    """
    d, inner = dimensions.d_model, dimensions.num_heads * dimensions.d_kv
    matrix = (dimensions.vocab_size, d)
    out = {SHARED: Place(EMBEDDING, matrix, transposed=False)}
    if not dimensions.tied and dimensions.num_decoder_layers:
        out[LM_HEAD] = Place(LOGITS, matrix)
    kernels = dict.fromkeys(_input_names(dimensions.gated), (dimensions.d_ff, d))
    kernels["wo"] = (d, dimensions.d_ff)
    projections = {"q": (inner, d), "k": (inner, d), "v": (inner, d), "o": (d, inner)}
    table = (dimensions.num_buckets, dimensions.num_heads)
    for stack, layers in zip(
        STACKS, (dimensions.num_layers, dimensions.num_decoder_layers), strict=True
    ):
        if not layers:
            continue
        out[table_name(stack)] = Place(f"{stack}/relpos_bias/rel_embedding", table)
        out[f"{stack}.final_layer_norm.weight"] = Place(
            f"{stack}/{stack}_norm/scale", (d,), transposed=False
        )
        for block in range(layers):
            for position, (module, ours, norm) in enumerate(_SUBLAYERS[stack]):
                theirs, layer = f"{stack}.block.{block}.layer.{position}", f"{stack}/layers_{block}"
                out[f"{theirs}.layer_norm.weight"] = Place(
                    f"{layer}/{norm}/scale", (d,), transposed=False
                )
                for part, shape in (kernels if ours == "mlp" else projections).items():
                    name = part if ours == "mlp" else _ATTENTION[part]
                    out[f"{theirs}.{module}.{part}.weight"] = Place(
                        f"{layer}/{ours}/{name}/kernel", shape
                    )
    return out


def _input_names(gated: bool) -> tuple[str, ...]:
    return ("wi_0", "wi_1") if gated else ("wi",)
