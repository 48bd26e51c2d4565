"""A model that trains in milliseconds, and deterministic data for it, behind the interfaces of the
real ones.
"""

import dataclasses
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from upcycle_jax import trees
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.models.base import Stack
from upcycle_jax.models.metrics import Mean
from upcycle_jax.moe import roles
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training import description, early_programs, loop
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.trainer import Trainer

VOCAB, WIDTH, HIDDEN, LENGTH = 24, 8, 16, 6
F32 = np.dtype(np.float32)


@pytest.fixture(scope="session", autouse=True)
def compile_once():
    """Equal programs, of which runs that resume are full, are compiled once in the session, however
    small they are.
    """
    settings = {
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    yield
    _configure(before)


def _configure(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax looks at the settings once, at its first compilation


@pytest.fixture(scope="session", autouse=True)
def count_once():
    """Nor are equal steps traced anew, to count what they cost, by each run that starts."""
    count, found = description.step_costs, {}

    def counted(model, trainer, partitioner, **shape):
        lengths = tuple(sorted(shape["lengths"].items()))
        key = model, trainer, partitioner, *sorted((shape | {"lengths": lengths}).items())
        if key not in found:
            found[key] = count(model, trainer, partitioner, **shape)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(description, "step_costs", counted)
        yield


TRACED: dict[Any, Any] = {}
"""Jitted train steps and evaluations by all that they are made of."""


@pytest.fixture(scope="module", autouse=True)
def trace_once():
    """And the train step and the evaluation of equal runs are traced once: a run that resumes has
    those of the first. Runs in processes of their own (test_killed_run.py) have nothing in common.
    """
    make, evaluator = early_programs.jitted_train_step, loop.Evaluator

    def made(model, trainer, *, partitioner, shardings, seed):
        key = model, trainer, partitioner, tuple(sorted(shardings.items())), seed
        if key not in TRACED:
            TRACED[key] = make(
                model, trainer, partitioner=partitioner, shardings=shardings, seed=seed
            )
        return TRACED[key]

    def evaluates(model, partitioner, *, num_shards):
        key = model, partitioner, num_shards
        if key not in TRACED:
            TRACED[key] = evaluator(model, partitioner, num_shards=num_shards)
        return TRACED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early_programs, "jitted_train_step", made)
        patch.setattr(loop, "Evaluator", evaluates)
        yield


class BagModel:
    """Predicts each target from the mean of the inputs and the previous token; with experts, from
    their mean output.
    """

    def __init__(
        self,
        num_experts: int = 0,
        hidden: int = HIDDEN,
        dropout: float = 0.1,
        normalise: bool = True,
    ):
        self.config = types.SimpleNamespace(vocab_size=VOCAB, moe=None, forward_settings={})
        self.vocab_size, self.features = VOCAB, EncoderDecoderFeatures()
        # What mixes experts here is no MoE layer: nothing is routed in groups.
        self.stacks = {
            "decoder": Stack("decoder", 1, (), None, True, None, "decoder_target_tokens")
        }
        self.num_experts, self.hidden, self.dropout, self.normalise = (
            num_experts,
            hidden,
            dropout,
            normalise,
        )

    def _identity(self):
        return type(self), self.num_experts, self.hidden, self.dropout, self.normalise

    def __eq__(self, other):
        return isinstance(other, BagModel) and self._identity() == other._identity()

    def __hash__(self):
        return hash(self._identity())

    def param_specs(self):
        mlp, lead, names, width = "decoder/layers_0/mlp", (), (), "mlp"
        if self.num_experts:
            mlp, lead, names, width = (
                f"{mlp}/expert",
                (self.num_experts,),
                ("expert",),
                "expert_mlp",
            )
        specs = {
            "token_embedder/embedding": trees.LeafSpec((VOCAB, WIDTH), F32, ("vocab", "embed")),
            f"{mlp}/wi_0/kernel": trees.LeafSpec(
                (*lead, WIDTH, self.hidden), F32, (*names, "embed", width)
            ),
            f"{mlp}/wo/kernel": trees.LeafSpec(
                (*lead, self.hidden, WIDTH), F32, (*names, width, "embed")
            ),
        }
        if self.num_experts:
            router = "decoder/layers_0/mlp/router/router_weights/w/kernel"
            specs[router] = trees.LeafSpec((WIDTH, self.num_experts), F32, ("embed", "unmodeled"))
        return roles.inferred(dict(sorted(specs.items())))

    def init_params(self, rng):
        keys = {path: jax.random.fold_in(rng, i) for i, path in enumerate(self.param_specs())}
        return trees.unflatten(
            {
                path: 0.3 * jax.random.normal(keys[path], spec.shape)
                for path, spec in self.param_specs().items()
            }
        )

    def input_specs(self, batch_size, task_feature_lengths, *, packed=False):
        shape = (batch_size, task_feature_lengths["targets"])
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.int32)
            for name in ("encoder_input_tokens", "decoder_target_tokens")
        }

    def loss_denominator(self, batch):
        return (
            jnp.sum(batch["decoder_target_tokens"] > 0).astype(jnp.float32)
            if self.normalise
            else jnp.float32(1)
        )

    def _cross_entropy(self, params, batch, dropout_rng):
        embedding, mlp = params["token_embedder"]["embedding"], params["decoder"]["layers_0"]["mlp"]
        x = embedding[batch["encoder_input_tokens"]].mean(axis=1)
        if dropout_rng is not None and self.dropout:
            x = x * jax.random.bernoulli(dropout_rng, 1 - self.dropout, x.shape)
        if self.num_experts:
            gates = jax.nn.softmax(x @ mlp["router"]["router_weights"]["w"]["kernel"])
            h = jax.nn.gelu(jnp.einsum("bd,edf->bef", x, mlp["expert"]["wi_0"]["kernel"]))
            x = x + jnp.einsum("bef,efd,be->bd", h, mlp["expert"]["wo"]["kernel"], gates)
        else:
            x = x + jax.nn.gelu(x @ mlp["wi_0"]["kernel"]) @ mlp["wo"]["kernel"]
        logits = (x @ embedding.T)[:, None, :]
        targets = batch["decoder_target_tokens"]
        ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        weights = (targets > 0).astype(jnp.float32)
        return jnp.sum(ce * weights), jnp.sum(weights)

    def loss_fn(self, params, batch, dropout_rng, *, denominator, aux_scale=1.0):
        summed, count = self._cross_entropy(params, batch, dropout_rng)
        auxiliary = 1e-3 * sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)
        )  # depends on no batch, so it must count once
        loss = summed / denominator + aux_scale * auxiliary
        scale = jnp.float32(aux_scale)
        return loss, {
            "loss": Mean(loss, scale),
            "cross_ent_loss": Mean(summed, count),
            "target_tokens": Mean(count, scale),
        }

    def eval_fn(self, params, batch):
        summed, count = self._cross_entropy(params, batch, None)
        return {"loss": Mean(summed, count), "cross_ent_loss": Mean(summed, count)}


class ArithmeticIterator:
    """Batch k is drawn from `default_rng((seed, k))`."""

    def __init__(self, cfg):
        self.cfg, self.position = cfg, 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = self.cfg.batch(self.position)
        self.position += 1
        return batch

    def prepare(self, first_batch, num_batches):
        pass

    def save(self, directory):
        (epath.Path(directory) / "position.json").write_text(json.dumps(self.position))

    def restore(self, directory):
        self.position = json.loads((epath.Path(directory) / "position.json").read_text())

    def seek(self, num_batches):
        self.position = num_batches

    def fingerprint(self):
        return {
            "name": self.cfg.mixture_or_task_name,
            "seed": self.cfg.seed,
            "versions": {"numpy": np.__version__},
        }


@dataclasses.dataclass(frozen=True)
class ArithmeticDataset:
    """A `DatasetConfig` and the `Dataset` that it becomes, without TensorFlow. `poison` is a batch
    number whose tokens are out of range (NaN by jnp.take's fill).
    """

    mixture_or_task_name: str = "bags"
    batch_size: int = 8
    seed: int = 0
    pack: bool = False
    split: str = "train"
    vocabulary: int = VOCAB
    task_feature_lengths: Any = dataclasses.field(
        default_factory=lambda: {"inputs": LENGTH, "targets": LENGTH}
    )

    def batch(self, k):
        rng = np.random.default_rng((self.seed, k))
        tokens = rng.integers(1, VOCAB, (self.batch_size, LENGTH)).astype(np.int32)
        targets = np.sort(tokens, axis=1)
        targets[rng.random(targets.shape) < 0.2] = 0
        return {"encoder_input_tokens": tokens, "decoder_target_tokens": targets}

    @property
    def config(self):
        return self

    def vocabulary_size(self):
        return self.vocabulary

    def train_iterator(self, process_index=0, process_count=1):
        return ArithmeticIterator(self)

    def eval_batches(self, num_batches=None, process_index=0, process_count=1):
        def task(first):
            return lambda: (self.batch(first + i) for i in range(num_batches or 2))

        return {"bags_a": task(10_000), "bags_b": task(20_000)}


@open_dataset.register
def open_arithmetic(config: ArithmeticDataset, features):
    return config


@pytest.fixture(scope="session")
def bags():
    """Namespace of the fakes: Model, Dataset, trainer(...), one_device."""
    schedule = create_learning_rate_scheduler(base_learning_rate=1.0, warmup_steps=4)

    def trainer(**kwargs):
        return Trainer(
            **{
                "optimizer": Adafactor(min_dim_size_to_factor=8),
                "learning_rate_fn": schedule,
                **kwargs,
            }
        )

    return types.SimpleNamespace(
        Model=BagModel,
        Dataset=ArithmeticDataset,
        trainer=trainer,
        one_device=Partitioner(devices=(jax.devices()[0],)),
    )
