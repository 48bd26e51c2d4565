"""Which tensors the parameters of a decoder-only model are, in the folders of each `model_type`:
the one table that reader and writer share.

A linear layer there holds `W [out, in]`; here its kernel is `[in, out]`. Nothing is computed: every
parameter is a tensor, transposed, or rows of a tensor (fused projections), or tensors stacked along
the expert axis. Names and shapes are those of transformers 5.24; 4.57 has the same ones on disk.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from upcycle_jax.checkpoints.huggingface.base import Rows, Source, Sources, consecutive, row_axis
from upcycle_jax.layers.mlp import input_kernel_names
from upcycle_jax.models.decoder.config import DecoderConfig

Shape = tuple[int, ...]

EMBEDDING, LOGITS = "token_embedder/embedding", "decoder/logits_dense/kernel"


@dataclasses.dataclass(frozen=True)
class MoeNames:
    """Tensors of an MoE layer, below its transformer layer.

    Attributes:
      router: `[E, d]`.
      gate: first matrix of each expert `{e}`, `[f, d]`. A name without `{e}` holds all of them,
        `[E, f, d]`; where `up` has the same name, `[E, 2f, d]` with the rows of the gate first.
      up: second matrix, which the activation does not touch.
      down: `[d, f]`, or `[E, d, f]`.
      shared: `gate`, `up` and `down` of the shared expert, likewise; None where the type has none.
      shared_gate: `[1, d]`, whose sigmoid scales the shared expert; None where the type has none.
    """

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{e}.gate_proj.weight"
    up: str = "mlp.experts.{e}.up_proj.weight"
    down: str = "mlp.experts.{e}.down_proj.weight"
    shared: tuple[str, str, str] | None = None
    shared_gate: str | None = None


@dataclasses.dataclass(frozen=True)
class Names:
    """Tensors of a model type; those of layers are named below `layer`, without '.weight' and
    '.bias'. Names that are equal stand for one tensor that holds all of them, in the order q, k, v
    or gate, up.

    Attributes:
      base: what the names of all tensors but `head` begin with; missing where the model was saved
        without its head.
      embedding: `[V, d]`.
      layer: of layer `{n}`.
      final_norm: the norm before the logits.
      head: `[V, d]`.
      attention: query, key, value, out.
      by_head: the fused query, key and value are interleaved head by head.
      gated: gate, up, down of a gated MLP.
      plain: input and output of a plain MLP.
      moe: of MoE layers; None where the type is dense.
    """

    base: str = "model."
    embedding: str = "embed_tokens"
    layer: str = "layers.{n}"
    final_norm: str = "norm"
    head: str = "lm_head"
    attention: tuple[str, str, str, str] = (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
    )
    by_head: bool = False
    gated: tuple[str, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    plain: tuple[str, str] = ("mlp.up_proj", "mlp.down_proj")
    moe: MoeNames | None = None


_LLAMA = Names()
_PHI3 = Names(
    attention=(*(("self_attn.qkv_proj",) * 3), "self_attn.o_proj"),
    gated=("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
)
_GPT_NEOX = Names(
    base="gpt_neox.",
    embedding="embed_in",
    final_norm="final_layer_norm",
    head="embed_out",
    attention=(*(("attention.query_key_value",) * 3), "attention.dense"),
    by_head=True,
    plain=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
_MIXTRAL = MoeNames(
    router="block_sparse_moe.gate.weight",
    gate="block_sparse_moe.experts.{e}.w1.weight",
    up="block_sparse_moe.experts.{e}.w3.weight",
    down="block_sparse_moe.experts.{e}.w2.weight",
)
_QWEN2_MOE = MoeNames(
    shared=(
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert.down_proj.weight",
    ),
    shared_gate="mlp.shared_expert_gate.weight",
)
_GRANITE_MOE = MoeNames(
    router="block_sparse_moe.router.layer.weight",
    gate="block_sparse_moe.input_linear.weight",
    up="block_sparse_moe.input_linear.weight",
    down="block_sparse_moe.output_linear.weight",
)
_SHARED_MLP = (
    *("shared_mlp.input_linear.weight", "shared_mlp.input_linear.weight"),
    "shared_mlp.output_linear.weight",
)

NAMES: Mapping[str, Names] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "phi3": _PHI3,
    "gpt_neox": _GPT_NEOX,
    "mixtral": Names(moe=_MIXTRAL),
    "qwen2_moe": Names(moe=_QWEN2_MOE),
    "qwen3_moe": Names(moe=MoeNames()),
    "olmoe": Names(moe=MoeNames()),
    "flex_olmo": Names(moe=MoeNames()),
    "granitemoe": Names(moe=_GRANITE_MOE),
    "granitemoeshared": Names(moe=dataclasses.replace(_GRANITE_MOE, shared=_SHARED_MLP)),
}
"""Names of each `model_type`, as transformers writes them to disk by default."""


def _in_memory(names: Names, block: str) -> Names:
    """Names that transformers 5 has in memory: experts stacked, gate and up fused."""
    assert names.moe is not None
    fused, router = f"{block}.experts.gate_up_proj", names.moe.router
    if router == _GRANITE_MOE.router:
        router = f"{block}.router.weight"
    elif router == _MIXTRAL.router:
        router = f"{block}.gate.weight"
    down = f"{block}.experts.down_proj"
    moe = dataclasses.replace(names.moe, router=router, gate=fused, up=fused, down=down)
    return dataclasses.replace(names, moe=moe)


IN_MEMORY: Mapping[str, Names] = {
    "gpt_neox": dataclasses.replace(_GPT_NEOX, head="lm_head"),
    **{
        kind: _in_memory(names, "block_sparse_moe" if kind.startswith("granite") else "mlp")
        for kind, names in NAMES.items()
        if names.moe is not None
    },
}
"""Names of the types that transformers 5 has other names for in memory: it writes these with
`save_original_format=False`, and reads both.
"""

_NORMS = {
    "pre": {
        "pre_self_attention_layer_norm": "input_layernorm",
        "pre_mlp_layer_norm": "post_attention_layernorm",
    },
    "post": {
        "post_self_attention_layer_norm": "post_attention_layernorm",
        "post_mlp_layer_norm": "post_feedforward_layernorm",
    },
    "both": {
        "pre_self_attention_layer_norm": "input_layernorm",
        "post_self_attention_layer_norm": "post_attention_layernorm",
        "pre_mlp_layer_norm": "pre_feedforward_layernorm",
        "post_mlp_layer_norm": "post_feedforward_layernorm",
    },
}
"""`DecoderConfig.norm_place` -> our norms of a layer -> theirs, alike in every type."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter and what it is made of.

    Attributes:
      path: of the parameter, without `target/`.
      shape: of the parameter.
      sources: the tensors.
    """

    path: str
    shape: Shape
    sources: Sources


def places(
    model_type: str, config: DecoderConfig, *, in_memory: bool = False
) -> dict[str, Sources]:
    """What is behind every parameter, by path without `target/`.

    >>> config = DecoderConfig(96, 32, 2, 4, 8, 48, num_kv_heads=2)
    >>> places("llama", config)["decoder/layers_1/mlp/wi_0/kernel"].tensor
    'model.layers.1.mlp.gate_proj.weight'
    >>> places("phi3", config)["decoder/layers_1/self_attention/key/kernel"].rows
    Rows(shape=(16,), strides=(1,), offset=32)

    Args:
      model_type: as in config.json.
      config: of the model.
      in_memory: with the names of `IN_MEMORY`.

    Raises:
      ValueError: the type has no MoE layers, no such shared expert, or is unknown.
    """
    names = _names(model_type, in_memory=in_memory)
    return {place.path: place.sources for place in layout(model_type, config, names)}


def tensor_shapes(
    model_type: str, config: DecoderConfig, *, in_memory: bool = False
) -> dict[str, Shape]:
    """The shape of every tensor, by name; arguments as for `places`."""
    return shapes_of(layout(model_type, config, _names(model_type, in_memory=in_memory)))


def shapes_of(places: Iterable[Place]) -> dict[str, Shape]:
    """The shape of every tensor that parameters are made of, by name."""
    shapes: dict[str, Shape] = {}
    for place in places:
        stacked = isinstance(place.sources, tuple)
        parts = place.sources if isinstance(place.sources, tuple) else (place.sources,)
        for part in parts:
            shape = list(place.shape[1:] if stacked else place.shape)
            if part.transposed:
                shape[-2:] = shape[:-3:-1]
            if part.tensor in shapes:  # more rows of a tensor that holds several parameters
                axis = row_axis(len(shape))
                shape[axis] += shapes[part.tensor][axis]
            shapes[part.tensor] = tuple(shape)
    return shapes


def _names(model_type: str, *, in_memory: bool) -> Names:
    """
    Raises:
      ValueError: the type is unknown.
    """
    names = IN_MEMORY.get(model_type) if in_memory else None
    names = names or NAMES.get(model_type)
    if names is None:
        raise ValueError(f"model_type {model_type!r} is not among {', '.join(NAMES)}")
    return names


def layout(model_type: str, config: DecoderConfig, names: Names | None = None) -> Iterator[Place]:
    """Every parameter of a model, in the order in which files hold them.

    Args:
      model_type: as in config.json.
      config: of the model.
      names: of the tensors; None: as transformers writes them to disk.

    Raises:
      ValueError: see `places`.
    """
    names = names or _names(model_type, in_memory=False)
    embedding = (config.vocab_size, config.emb_dim)
    yield Place(EMBEDDING, embedding, Source(f"{names.base}{names.embedding}.weight"))
    for number in range(config.num_layers):
        yield from _layer(names, config, number, model_type)
    yield from _norm(config, "decoder/decoder_norm", names.base + names.final_norm, config.emb_dim)
    if not config.logits_via_embedding:
        yield Place(LOGITS, embedding[::-1], Source(f"{names.head}.weight", transposed=True))
        if config.logits_bias:
            path = LOGITS.replace("kernel", "bias")
            yield Place(path, embedding[:1], Source(f"{names.head}.bias"))


def _layer(names: Names, config: DecoderConfig, number: int, model_type: str) -> Iterator[Place]:
    ours = f"decoder/layers_{number}"
    theirs = f"{names.base}{names.layer.format(n=number)}."
    for norm, their_norm in _NORMS[config.norm_place].items():
        yield from _norm(config, f"{ours}/{norm}", theirs + their_norm, config.emb_dim)
    yield from _attention(names, config, f"{ours}/self_attention", theirs)
    if number in config.sparse_layers:
        if names.moe is None:
            raise ValueError(f"a model of type {model_type!r} has no MoE layers")
        yield from _moe(names.moe, config, f"{ours}/mlp", theirs, model_type)
        return
    inputs = input_kernel_names(config.mlp_activations)
    *first, last = names.gated if len(inputs) == 2 else names.plain
    biases = config.mlp_bias
    into = [(f"{ours}/mlp/{name}", theirs + x) for name, x in zip(inputs, first, strict=True)]
    yield from _linear(into, [config.mlp_dim] * len(into), config.emb_dim, biases)
    out = (f"{ours}/mlp/wo", theirs + last)
    yield from _linear([out], [config.emb_dim], config.mlp_dim, biases)


def _norm(config: DecoderConfig, ours: str, theirs: str, size: int) -> Iterator[Place]:
    if config.norm == "layer_norm_without_parameters":
        return
    yield Place(f"{ours}/scale", (size,), Source(f"{theirs}.weight"))
    if config.norm == "layer_norm":
        yield Place(f"{ours}/bias", (size,), Source(f"{theirs}.bias"))


def _attention(names: Names, config: DecoderConfig, ours: str, theirs: str) -> Iterator[Place]:
    d, heads, kv = config.emb_dim, config.num_heads, config.kv_heads
    sizes = [count * config.head_dim for count in (heads, kv, kv)]
    *inputs, out = (theirs + name for name in names.attention)
    ends = [(f"{ours}/{x}", y) for x, y in zip(("query", "key", "value"), inputs, strict=True)]
    by_head = heads if names.by_head else None
    yield from _linear(ends, sizes, d, config.qkv_bias, by_head=by_head)
    yield from _linear([(f"{ours}/out", out)], [d], sizes[0], config.attention_out_bias)
    if config.qk_norm is not None:
        whole = config.qk_norm == "projection"
        for name, letter, size in (("query_norm", "q", sizes[0]), ("key_norm", "k", sizes[1])):
            shape = (size if whole else config.head_dim,)
            source = Source(f"{theirs}self_attn.{letter}_norm.weight")
            yield Place(f"{ours}/{name}/scale", shape, source)


def _linear(
    ends: Sequence[tuple[str, str]],
    sizes: Sequence[int],
    inputs: int,
    biases: bool,
    *,
    by_head: int | None = None,
) -> Iterator[Place]:
    """Linear layers that read the same: one tensor each, or all in one.

    Args:
      ends: our path and their name of each, without 'kernel' and 'weight'.
      sizes: outputs of each.
      inputs: inputs of all.
      biases: they have biases.
      by_head: in one tensor they are interleaved, so many heads of equal size.
    """
    fused = len(ends) > 1 and len({name for _, name in ends}) == 1
    start = 0
    for position, ((path, name), size) in enumerate(zip(ends, sizes, strict=True)):
        rows = consecutive(start, size) if fused else None
        if fused and by_head is not None:
            head = size // by_head
            rows = Rows((by_head, head), (len(ends) * head, 1), position * head)
        start += size
        weight = Source(f"{name}.weight", transposed=True, rows=rows)
        yield Place(f"{path}/kernel", (inputs, size), weight)
        if biases:
            yield Place(f"{path}/bias", (size,), Source(f"{name}.bias", rows=rows))


def _moe(
    names: MoeNames, config: DecoderConfig, ours: str, theirs: str, model_type: str
) -> Iterator[Place]:
    moe = config.moe
    assert moe is not None
    d, f, experts = config.emb_dim, config.expert_mlp_dim, moe.num_experts
    router = Source(theirs + names.router, transposed=True)
    yield Place(f"{ours}/router/router_weights/w/kernel", (d, experts), router)
    for kernel, shape, name, rows in _three(names.gate, names.up, names.down, d, f):
        parts = [
            Source(theirs + name.format(e=e), transposed=True, rows=rows) for e in range(experts)
        ]
        sources = tuple(parts) if "{e}" in name else parts[0]
        yield Place(f"{ours}/expert/{kernel}/kernel", (experts, *shape), sources)
    width = moe.shared_expert_mlp_dim
    if width is None:
        return
    gated = moe.shared_expert_gate
    if names.shared is None or (names.shared_gate is not None) != gated:
        gate = "with a gate" if gated else "without a gate"
        raise ValueError(f"a model of type {model_type!r} has no shared expert {gate}")
    for kernel, shape, name, rows in _three(*names.shared, d, width):
        source = Source(theirs + name, transposed=True, rows=rows)
        yield Place(f"{ours}/shared_expert/{kernel}/kernel", shape, source)
    if names.shared_gate is not None:
        source = Source(theirs + names.shared_gate, transposed=True)
        yield Place(f"{ours}/shared_expert_gate/kernel", (d, 1), source)


def _three(
    gate: str, up: str, down: str, d: int, f: int
) -> Iterator[tuple[str, Shape, str, Rows | None]]:
    """Kernel, its shape, name and rows of the three matrices of a gated MLP."""
    first = consecutive(0, f) if gate == up else None
    second = consecutive(f, f) if gate == up else None
    yield "wi_0", (d, f), gate, first
    yield "wi_1", (d, f), up, second
    yield "wo", (f, d), down, None
