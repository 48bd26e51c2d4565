"""A third family of models, far from T5: one stack called 'tower', whose layers mix a token with
the mean of those before it, then an MLP or an MoE layer. It stands in no list of the library:
importing this module registers it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.toy_family.features import LineFeatures
from upcycle_jax.layers.embedding import Embed
from upcycle_jax.layers.mlp import MlpBlock
from upcycle_jax.layers.norm import RMSNorm
from upcycle_jax.models import losses, registry, shared
from upcycle_jax.models.base import Family, Stack
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.moe.layer_stats import LAYER_STATS
from upcycle_jax.moe.routing import Router, TokensChoose


@dataclasses.dataclass(frozen=True)
class ToyMoe(MoeSettings):
    """MoE layers of a tower."""

    router: Router = dataclasses.field(default_factory=TokensChoose)
    sparse_layers: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """A `ModelConfig`."""

    vocab_size: int = 32
    width: int = 8
    num_layers: int = 2
    mlp_dim: int = 16
    sharpness: float = 1.0
    dtype: str = "float32"
    moe: ToyMoe | None = None

    @property
    def activation_dtype(self):
        return jnp.dtype(self.dtype)

    @property
    def remat_policy(self):
        return "none"

    @property
    def dense(self):
        return dataclasses.replace(self, moe=None)

    @property
    def for_inference(self):
        return self

    @property
    def without_dropout(self):
        return self

    @property
    def unrolled(self):
        return self

    @property
    def forward_settings(self):
        return {"sharpness": self.sharpness}


class Layer(nn.Module):
    """Mixing, then an MLP or an MoE layer, each added to what came in."""

    config: ToyConfig
    sparse: bool

    @nn.compact
    def __call__(self, x, valid, *, train):
        config = self.config
        before = jnp.cumsum(x, axis=1) / (1 + jnp.arange(x.shape[1]))[None, :, None]
        y = RMSNorm(name="norm")(x + before)
        if self.sparse:
            mlp = MoeLayer(config.moe, config.moe.router, hidden=config.mlp_dim, name="mlp")
            return x + mlp(y, valid, train=train)
        return x + MlpBlock(config.mlp_dim, name="mlp")(y, not train)


class Tower(nn.Module):
    """All layers."""

    config: ToyConfig

    @nn.compact
    def __call__(self, x, valid, *, train):
        sparse = self.config.moe.sparse_layers if self.config.moe else ()
        for i in range(self.config.num_layers):
            x = Layer(self.config, i in sparse, name=f"encoderblock_{i}")(x, valid, train=train)
        return x


class Network(nn.Module):
    """Tokens `[B, T]` to logits `[B, T, vocab]`."""

    config: ToyConfig

    @nn.compact
    def __call__(self, line, *, train=False):
        config = self.config
        embed = Embed(config.vocab_size, config.width, name="embed")
        valid = line > 0
        inputs = jnp.pad(line, ((0, 0), (1, 0)))[:, :-1]
        x = Tower(config, name="tower")(embed(inputs) * valid[..., None], valid, train=train)
        return config.sharpness * embed.attend(x)


class ToyModel:
    """A `Model`."""

    features = LineFeatures()

    def __init__(self, config: ToyConfig):
        self.config, self.module = config, Network(config)

    @property
    def vocab_size(self):
        return self.config.vocab_size

    @property
    def stacks(self):
        config, moe = self.config, self.config.moe
        sparse = moe.sparse_layers if moe else ()
        router = moe.router if moe else None
        stack = Stack(
            "tower", config.num_layers, sparse, router, True, moe, "line", called="encoderblock"
        )
        return {"tower": stack}

    @property
    def dense(self):
        return ToyModel(self.config.dense)

    def _boxed(self, rng):
        return self.module.init({"params": rng}, jnp.ones((1, 1), jnp.int32))["params"]

    def param_specs(self):
        return shared.param_specs(jax.eval_shape(self._boxed, jax.random.key(0)), self.stacks)

    def init_params(self, rng):
        return nn.meta.unbox(self._boxed(rng))

    def input_specs(self, batch_size, task_feature_lengths, *, packed=False):
        return self.features.specs(batch_size, task_feature_lengths, packed=packed)

    def check_batch(self, batch):
        pass

    def loss_denominator(self, batch):
        return shared.loss_denominator("NUM_REAL_TARGET_TOKENS", self._weights(batch))

    def _weights(self, batch):
        return shared.loss_weights(batch["line"], None)

    def _run(self, params, batch, *, train):
        logits, variables = self.module.apply(
            {"params": params}, batch["line"], train=train, mutable=[LAYER_STATS]
        )
        tokens = losses.token_losses(logits, batch["line"])
        return tokens, shared.moe_reports(variables, self.stacks)

    def loss_fn(self, params, batch, dropout_rng, *, denominator, aux_scale=1.0):
        tokens, reports = self._run(params, batch, train=True)
        return shared.training_loss(
            self.stacks,
            tokens,
            self._weights(batch),
            reports,
            denominator=denominator,
            aux_scale=aux_scale,
        )

    def eval_fn(self, params, batch):
        tokens, reports = self._run(params, batch, train=False)
        return shared.evaluation_metrics(self.stacks, tokens, self._weights(batch), reports)


def from_specs(specs: Any, stated: Any) -> ToyConfig | None:
    """A dense tower has an embedding called `embed` and two kernels in each MLP."""
    table, kernel = (
        specs.get(f"target/{path}")
        for path in ("embed/embedding", "tower/encoderblock_0/mlp/wi_0/kernel")
    )
    if table is None or kernel is None:
        return None
    depth = sum(path.endswith("/norm/scale") for path in specs if path.startswith("target/tower"))
    return ToyConfig(*table.shape, num_layers=depth, mlp_dim=kernel.shape[1], **stated)


registry.register(
    Family(
        name="toy tower",
        config=ToyConfig,
        moe=ToyMoe,
        build=ToyModel,
        from_specs=from_specs,
        settings={"sharpness": lambda value: isinstance(value, float)},
    )
)
