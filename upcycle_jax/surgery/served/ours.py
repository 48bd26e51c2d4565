"""The checkpoint's own language model, run layer by layer: the weights of one layer are read, used
and let go.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import trees
from upcycle_jax.checkpoints import CheckpointReader
from upcycle_jax.layers.causal_attention import GroupedQueryAttention
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.models import layer_names
from upcycle_jax.models.decoder import network
from upcycle_jax.models.decoder.config import STACK, DecoderConfig
from upcycle_jax.models.decoder.layerwise import steps
from upcycle_jax.models.decoder.network import LanguageModel, Positions
from upcycle_jax.moe import roles
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.state_tree import TARGET
from upcycle_jax.types import PyTree


@flax.struct.dataclass
class LayerActivations:
    """What happens in one layer, float32.

    Attributes:
      attention: output of the attention, `[B, L, d]`.
      router: logits of the router, `[B, L, E]`; None in a dense layer.
      mlp: output of the MLP or the MoE layer, `[B, L, d]`.
      output: the residual stream after the layer, `[B, L, d]`.
    """

    attention: jax.Array | np.ndarray
    router: jax.Array | np.ndarray | None
    mlp: jax.Array | np.ndarray
    output: jax.Array | np.ndarray


class OurModel:
    """A language model in a checkpoint, in float32, as it predicts.

    Args:
      reader: the checkpoint.
      config: of its model.
      tokens: int32 `[B, L]`.
    """

    def __init__(self, reader: CheckpointReader, config: DecoderConfig, tokens: np.ndarray):
        self.config = config.for_inference.in_float32(renormalised=False)
        self._reader, self._tokens = reader, jnp.asarray(tokens, jnp.int32)

    def _params(self, path: str) -> dict[str, jax.Array]:
        """Every parameter below a path, float32, by what follows it."""
        start = f"{TARGET}{path}/"
        names = [name for name in self._reader.specs() if name.startswith(start)]
        return {
            name.removeprefix(start): jnp.asarray(self._reader.read(name), jnp.float32)
            for name in names
        }

    @functools.cached_property
    def _inputs(self) -> tuple[jax.Array, Positions]:
        model = LanguageModel(self.config.dense)
        params = {"token_embedder": self._params("token_embedder")}

        def inputs(params: PyTree, tokens: jax.Array) -> tuple[jax.Array, Positions]:
            found: Any = model.apply({"params": params}, tokens, None, None, method="inputs")
            return found[0], found[1]

        return jax.jit(inputs)(params, self._tokens)

    @property
    def embedded(self) -> jax.Array:
        """The residual stream before the first layer, `[B, L, d]`."""
        return self._inputs[0]

    def layer(self, index: int, streams: jax.Array) -> LayerActivations:
        """One layer.

        Args:
          index: which one.
          streams: residual streams before it, `[N, B, L, d]`.

        Returns:
          Activations with a leading N.
        """
        module = network.layer(self.config, index, parent=None)
        params = trees.unflatten(self._params(layer_names.layer(STACK, index)))
        return _run_layer(module, params, streams, self._inputs[1])

    def logits(self, streams: jax.Array) -> jax.Array:
        """Logits `[N, B, L, V]` of residual streams after the last layer, `[N, B, L, d]`."""
        last = steps(self.config)[-1]
        params = trees.unflatten(
            {
                f"{place}/{rest}": leaf
                for subtree, place in last.params.items()
                for rest, leaf in self._params(subtree).items()
            }
        )
        return jnp.stack([last.program(params, {"x": x})[0]["logits"] for x in streams])


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    module: network.DecoderLayer, params: PyTree, streams: jax.Array, where: Positions
) -> LayerActivations:
    def run(x: jax.Array) -> LayerActivations:
        seen: dict[str, jax.Array] = {}

        def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            out = call(*args, **kwargs)
            if context.method_name != "__call__":
                return out
            part, name = context.module, context.module.name
            if isinstance(part, GroupedQueryAttention):
                seen["attention"] = out
            elif name == "mlp" and isinstance(part, MlpBlock | MoeLayer):
                seen["mlp"] = out
                if isinstance(part, MoeLayer):
                    seen["router"] = _router_logits(params, args[0])
            return out

        with nn.intercept_methods(watch):
            output = module.apply({"params": params}, x, where, train=False)
        router = seen.get("router")
        assert isinstance(output, jax.Array)
        return LayerActivations(seen["attention"], router, seen["mlp"], output)

    return jax.lax.map(run, streams)


def _router_logits(params: PyTree, x: jax.Array) -> jax.Array:
    """Of what goes into an MoE layer: the layer itself regroups tokens first."""
    router: Mapping[str, Any] = params["mlp"][roles.ROUTER]
    return x.astype(jnp.float32) @ router["router_weights"]["w"]["kernel"]
