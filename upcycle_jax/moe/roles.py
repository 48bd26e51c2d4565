"""What the parameters of an MoE layer are: the one place that knows the names of its children."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from upcycle_jax.trees import LeafSpec, Role

EXPERT, SHARED_EXPERT, ROUTER, BIAS = "expert", "shared_expert", "router", "bias"
SHARED_GATE = "shared_expert_gate"
"""Children of an MoE layer; `bias` is the router's."""

_MOE_MLP = re.compile(rf"(.*\bmlp)/(?:{EXPERT}|{SHARED_EXPERT}|{ROUTER})/.+")


def marked(specs: Mapping[str, LeafSpec], moe_layers: Iterable[str]) -> dict[str, LeafSpec]:
    """Specs that say what each leaf is and which leaf of the dense model it comes from.

    Args:
      specs: by path, of parameters or of their optimizer slots.
      moe_layers: paths of the MoE layers, e.g. 'encoder/layers_1/mlp'. The dense model has a dense
        MLP of the same path there.
    """
    layers = frozenset(moe_layers)
    lengths = sorted({len(layer) for layer in layers}, reverse=True)
    found = {}
    for path, spec in specs.items():
        starts = (path[:length] for length in lengths if path[length : length + 1] == "/")
        layer = next((start for start in starts if start in layers), None)
        role, twin = (Role.DENSE, path) if layer is None else _in_layer(layer, path)
        found[path] = dataclasses.replace(spec, role=role, twin=twin)
    return found


def inferred(specs: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
    """Specs marked by their paths alone, for checkpoints whose model is unknown: an MLP (`.../mlp`)
    that has experts, a shared expert or a router is an MoE layer.
    """
    layers = {match[1] for path in specs if (match := _MOE_MLP.fullmatch(path))}
    return marked(specs, layers)


def _in_layer(layer: str, path: str) -> tuple[Role, str]:
    """Role and twin of a leaf below an MoE layer."""
    child, _, rest = path.removeprefix(f"{layer}/").partition("/")
    if child == EXPERT:
        return Role.EXPERT, f"{layer}/{rest}"
    if child == SHARED_EXPERT:
        return Role.SHARED_EXPERT, f"{layer}/{rest}"
    if child == ROUTER:
        is_bias = rest.partition("/")[0] == BIAS
        return (Role.ROUTER_BIAS if is_bias else Role.ROUTER), ""
    if child == SHARED_GATE:
        return Role.SHARED_GATE, ""
    return Role.DENSE, path
