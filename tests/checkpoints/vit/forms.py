"""Arrays of tiny vision transformers under the names of each project, and V-MoE's files as V-MoE
itself reads and writes them: msgpack with its extension types, all pieces held in memory.
"""

import itertools

import msgpack
import numpy as np

HEADS = 4


def in_vit_jax(arrays):
    """big_vision's arrays under vit_jax's names, with a position for the class token."""
    out = {}
    for name, value in arrays.items():
        name = name.replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        name = name.replace("LayerNorm_1", "LayerNorm_2").replace("MlpBlock_0", "MlpBlock_3")
        if name == "pos_embedding":
            token = np.full((1, 1, value.shape[2]), 0.25, np.float32)
            out["Transformer/posembed_input/pos_embedding"] = np.concatenate([token, value], 1)
        elif name == "cls":
            out["cls"] = value - np.float32(0.25)
        else:
            out[name] = value
    return out


def in_v_moe(arrays):
    """big_vision's arrays under V-MoE's names, for models without a class token."""
    out = {}
    for name, value in arrays.items():
        name = name.replace("Transformer/", "Encoder/").replace("MlpBlock_0", "Mlp")
        name = name.replace("MultiHeadDotProductAttention_0", "SelfAttention")
        name = "Encoder/posembed_input/pos_embedding" if name == "pos_embedding" else name
        out[name] = value
    return out


def scanned(arrays):
    """All blocks side by side, as big_vision's scan has them."""
    out, blocks = {}, {}
    for name, value in arrays.items():
        if "encoderblock_" in name:
            _, block, rest = name.split("/", 2)
            blocks.setdefault(rest, {})[int(block.removeprefix("encoderblock_"))] = value
        else:
            out[name] = value
    for rest, by_number in blocks.items():
        stacked = np.stack([by_number[number] for number in sorted(by_number)])
        out[f"Transformer/encoderblock/{rest}"] = stacked
    return out


def nested(arrays):
    """A tree of names whose parts are joined by '/'."""
    tree = {}
    for name, value in arrays.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _pack(value):
    return msgpack.packb(value, use_bin_type=True)


def _slices(bounds):
    return _pack([_pack([start, stop, None]) for start, stop in bounds])


def _array(flat):
    return msgpack.ExtType(1, _pack([list(flat.shape), flat.dtype.name, flat.tobytes()]))


def write_vmoe_files(prefix, arrays, *, shards=2, part=50, version="20220622"):
    """Writes arrays as V-MoE does: each cut in two along its first axis where that is even, the
    pieces dealt out to the shards, each in parts of so many values.
    """
    names = sorted(arrays, key=lambda name: name.split("/"))
    files = [{"__msgpack_array_chunk_a87ca2__": True} for _ in range(shards)]
    index, turn = {}, itertools.cycle(range(shards))
    for number, name in enumerate(names):
        value, pieces, places = arrays[name], [], []
        whole = [(0, size) for size in value.shape]
        halves = [whole]
        if value.shape and value.shape[0] % 2 == 0:
            half = value.shape[0] // 2
            halves = [[(0, half), *whole[1:]], [(half, 2 * half), *whole[1:]]]
        for bounds in halves:
            shard = next(turn)
            flat = value[tuple(slice(*pair) for pair in bounds)].reshape(-1)
            parts = [_array(flat[i : i + part]) for i in range(0, flat.size, part)]
            piece = [parts, msgpack.ExtType(6, _slices(bounds))]
            files[shard].setdefault(str(number), []).append(piece)
            pieces.append(_slices(bounds))
            places.append(shard)
        shape = _pack([list(value.shape), value.dtype.name, False, {}])
        index[name] = msgpack.ExtType(8, _pack([shape, pieces, places]))
    for shard, content in enumerate(files):
        path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")
        path.write_bytes(_pack(content))
    content = {"shard_count": shards, "index": nested(index)}
    if version is not None:
        content["version"] = version
    prefix.with_name(f"{prefix.name}.index").write_bytes(_pack(content))


def _unpack(data):
    return msgpack.unpackb(data, raw=True, strict_map_key=False)


def _bounds(data):
    return tuple(slice(*_unpack(one)) for one in _unpack(data))


def _extension(code, data):
    if code == 1:
        shape, name, raw = _unpack(data)
        return np.frombuffer(raw, np.dtype(name.decode())).reshape(shape)
    if code == 6:
        return _bounds(data)
    shape, slices, shards = _unpack(data)
    size, name, _, _ = _unpack(shape)
    return tuple(size), np.dtype(name.decode()), [_bounds(one) for one in slices], shards


def _load(path):
    return msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False)


def read_vmoe_files(prefix):
    """The arrays by name, as V-MoE restores them: `index` numbers its leaves in the order of
    sorted keys.
    """
    content = _load(prefix.with_name(f"{prefix.name}.index"))
    assert content["version"] == "20220622"
    count = content["shard_count"]
    files = [
        _load(prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{count:05d}"))
        for shard in range(count)
    ]
    out = {}
    for number, (name, entry) in enumerate(_flat(content["index"])):
        shape, dtype, slices, shards = entry
        out[name] = np.full(shape, np.nan, dtype)
        for bounds, shard in zip(slices, shards, strict=True):
            for parts, place in files[shard][str(number)]:
                if place == bounds:
                    size = [one.stop - one.start for one in bounds]
                    out[name][bounds] = np.concatenate(parts).reshape(size)
    return out


def _flat(tree):
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from ((f"{key}/{name}", leaf) for name, leaf in _flat(tree[key]))
        else:
            yield key, tree[key]
