"""A dense tree of two layers, its sparse counterpart, and a checkpoint that lives in memory."""

import jax
import numpy as np
import pytest

from upcycle_jax import axes
from upcycle_jax.moe import roles
from upcycle_jax.trees import LeafSpec

D, F, VOCAB = 8, 12, 16


class MemoryReader:
    """The reader interface over a dictionary of arrays; counts what is read."""

    def __init__(self, arrays, path="memory"):
        self.arrays, self.path, self.format = dict(arrays), path, "memory"
        self.reads = []

    @property
    def step(self):
        return int(self.arrays.get("state/step", 0))

    def specs(self):
        return roles.inferred(
            {name: LeafSpec(a.shape, a.dtype) for name, a in sorted(self.arrays.items())}
        )

    def read(self, name, index=None):
        self.reads.append((name, index))
        return self.arrays[name] if index is None else self.arrays[name][index]

    def read_sharded(self, name, sharding):
        self.reads.append((name, None))
        return jax.make_array_from_callback(
            self.arrays[name].shape, sharding, lambda index: self.arrays[name][index]
        )

    def fingerprint(self):
        return "memory"

    def metadata(self):
        return {}


def slots_of(name, spec, *, factored):
    """Adafactor's slots of one parameter as T5X stores them; an expert axis is a batch axis."""
    lead = spec.shape[:-2] if factored else ()
    shapes = {"m": (1,), "v": (1,) if factored else spec.shape, "v_row": (1,), "v_col": (1,)}
    if factored:
        shapes |= {"v_row": (*lead, spec.shape[-2]), "v_col": (*lead, spec.shape[-1])}
    return {
        f"state/param_states/{name}/{slot}": LeafSpec(shape, np.float32)
        for slot, shape in shapes.items()
    }


def tree(
    *,
    layers=2,
    sparse=(),
    experts=4,
    width=None,
    d=D,
    f=F,
    optimizer="adafactor",
    dtype=np.float32,
    stack="encoder",
):
    """Specs of a small encoder; layers in `sparse` have experts."""
    width = f if width is None else width
    params = {"token_embedder/embedding": LeafSpec((VOCAB, d), dtype, (axes.VOCAB, axes.EMBED))}
    for n in range(layers):
        layer = f"{stack}/layers_{n}"
        params[f"{layer}/pre_mlp_layer_norm/scale"] = LeafSpec((d,), dtype, (axes.EMBED,))
        params[f"{layer}/attention/query/kernel"] = LeafSpec(
            (d, d), dtype, (axes.EMBED, axes.JOINED_KV)
        )
        for name in ("wi_0", "wi_1", "wo"):
            dense = (d, f) if name != "wo" else (f, d)
            if n not in sparse:
                names = (axes.EMBED, axes.MLP) if name != "wo" else (axes.MLP, axes.EMBED)
                params[f"{layer}/mlp/{name}/kernel"] = LeafSpec(dense, dtype, names)
                continue
            shape = (experts, d, width) if name != "wo" else (experts, width, d)
            names = (
                (axes.EXPERT, axes.EMBED, axes.EXPERT_MLP)
                if name != "wo"
                else (axes.EXPERT, axes.EXPERT_MLP, axes.EMBED)
            )
            params[f"{layer}/mlp/expert/{name}/kernel"] = LeafSpec(shape, dtype, names)
        if n in sparse:
            params[f"{layer}/mlp/router/router_weights/w/kernel"] = LeafSpec(
                (d, experts), np.float32, (axes.EMBED, axes.UNMODELED)
            )
    out = {f"target/{name}": spec for name, spec in params.items()}
    for name, spec in params.items():
        if optimizer == "adafactor":
            out |= slots_of(name, spec, factored=len(spec.shape) >= 2 and "router" not in name)
        elif optimizer == "adam":
            out |= {f"state/param_states/{name}/{slot}": spec for slot in ("mu", "nu")}
    out["state/step"] = LeafSpec((), np.int32)
    return roles.inferred(dict(sorted(out.items())))


def filled(specs, seed=0, step=1000):
    """Arrays for specs; placeholders of shape (1,) are zeros."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, spec in specs.items():
        if name == "state/step":
            out[name] = np.asarray(step, np.int32)
        elif name.startswith("state/") and spec.shape == (1,):
            out[name] = np.zeros(spec.shape, spec.dtype)
        else:
            out[name] = rng.normal(size=spec.shape).astype(spec.dtype)
    return out


@pytest.fixture
def small():
    """The helpers of this file, as one object (test files cannot import each other)."""

    class Small:
        pass

    out = Small()
    out.tree, out.filled, out.Reader, out.D, out.F, out.VOCAB = (
        tree,
        filled,
        MemoryReader,
        D,
        F,
        VOCAB,
    )
    out.dense = lambda seed=0, **options: MemoryReader(filled(tree(**options), seed))
    return out
