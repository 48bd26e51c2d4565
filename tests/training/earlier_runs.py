"""Small runs whose checkpoints and losses are kept in `earlier/`: `python earlier_runs.py OUT`
makes them again.

What is in `earlier/` was written by an earlier version of the library, and is not to be written
again by a later one: `test_earlier_runs.py` shows that a checkpoint of then continues now, step by
step with the same losses, and that the compiled programs do the same work. Not a test module.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import train, trees, upcycle
from upcycle_jax.config import load
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train_state import from_state_dict, initial_state, state_specs
from upcycle_jax.training.train_step import jitted_train_step
from upcycle_jax.training.trainer import Trainer

SMALL = (
    "--gin.T5Config.emb_dim=16",
    "--gin.T5Config.num_heads=2",
    "--gin.T5Config.mlp_dim=32",
    "--gin.VOCAB_SIZE=384",
    "--gin.LOSS_NORMALIZING_FACTOR='NUM_REAL_TARGET_TOKENS'",
)
# The default of the version that made the files; a later one has another.
ROUTED_PADDING = "--gin.MoeConfig.ignore_padding_tokens=False"
RUN = (
    "--gin.MIXTURE_OR_TASK_NAME='squares'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    "--gin.BATCH_SIZE=8",
    "--gin.train.train_eval_dataset_cfg=None",
    "--gin.STATS_PERIOD=1",
    "--gin.SAVING_PERIOD=2",
    "--gin.WARMUP_STEPS=10",
    "--gin.SHUFFLE_TRAIN_EXAMPLES=False",
)
DENSE, SPARSE = "t5_1_1_tiny", "t5_1_1_tiny_upcycled"
LENGTHS = {"inputs": 32, "targets": 16}
METRICS = ("loss", "cross_ent_loss", "accuracy", "learning_rate", "gradient_norm")


def write_text(folder: pathlib.Path) -> None:
    """The text that the runs learn: arithmetic, made here."""
    lines = [f"{n} times {n} is {n * n}, and {n} more is {n * n + n}." for n in range(400)]
    (folder / "squares.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_flags(model: str, folder: pathlib.Path, model_dir: pathlib.Path, steps: int) -> list[str]:
    """The command line of a run with `model` in `model_dir`, on the text in `folder`."""
    return [
        f"--gin_file=models/{model}.gin",
        "--gin_file=runs/pretrain.gin",
        *SMALL,
        *RUN,
        *([ROUTED_PADDING] if model == SPARSE else []),
        f"--gin.TEXT_FILES={{'squares': ['{folder}/squares.txt']}}",
        f"--gin.MODEL_DIR='{model_dir}'",
        f"--gin.TRAIN_STEPS={steps}",
    ]


def upcycle_flags(dense: pathlib.Path, sparse: pathlib.Path) -> list[str]:
    """The command line of the conversion."""
    return [
        f"--gin_file=models/{SPARSE}.gin",
        "--gin_file=runs/upcycle.gin",
        *SMALL,
        f"--gin.INITIAL_CHECKPOINT_PATH='{dense}'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{sparse}'",
    ]


def scalars(model_dir: pathlib.Path) -> dict[str, dict[str, float]]:
    """Metrics of train steps by step and name, as MODEL_DIR has them."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted((model_dir / "train").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kept = {name: row[name] for name in METRICS if name in row}
            found.setdefault(str(row["step"]), {}).update(kept)
    return found


def arithmetic() -> str:
    """A digest of what this machine's compiler makes of products, exponentials and sums, and of
    its flags: where it is that of the record, results must be equal to the last bit.
    """
    flags = sorted(f for f in os.environ.get("XLA_FLAGS", "").split() if "timeout" not in f)
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    out = jax.jit(lambda x, y: jax.nn.softmax(jnp.tanh(x @ y) @ x).sum(axis=0))(x, y)
    return hashlib.sha256(" ".join(flags).encode() + np.asarray(out).tobytes()).hexdigest()


@functools.cache
def _drawn(model: EncoderDecoderModel, optimizer: Adafactor) -> dict[str, np.ndarray]:
    """The first state by path, which is the same on every mesh: drawn once, on one device."""
    one = Partitioner(devices=(jax.devices()[0],))
    shardings = one.shardings(state_specs(model, optimizer))
    with one.activate():
        state = initial_state(model, optimizer, seed=0, shardings=shardings)
    return jax.device_get(trees.flatten(state.state_dict()))


@functools.cache
def programs(devices: int, names: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """Work and results of the compiled train step of tiny models, by model file.

    Args:
      devices: of the mesh: 1, or 8 with four expert partitions.
      names: of the model files.
    """
    found: dict[str, dict[str, object]] = {}
    for name in names:
        groups = () if name == DENSE else ("--gin.GROUP_SIZE=32", ROUTED_PADDING)
        bindings = [flag.removeprefix("--gin.") for flag in (*SMALL, *groups)]
        model = load([f"models/{name}.gin"], bindings).macro("MODEL")
        partitioner = Partitioner(
            devices=tuple(jax.devices()[:devices]), num_expert_partitions=4 if devices == 8 else 1
        )
        trainer = Trainer(
            optimizer=Adafactor(),
            learning_rate_fn=create_learning_rate_scheduler(base_learning_rate=1.0),
        )
        random = np.random.default_rng(0)
        batch = {
            feature: random.integers(1, 300, spec.shape, dtype=np.int32)
            for feature, spec in sorted(model.input_specs(8, LENGTHS).items())
        }
        shardings = partitioner.shardings(state_specs(model, trainer.optimizer))
        with partitioner.activate():
            state = from_state_dict(jax.device_put(_drawn(model, trainer.optimizer), shardings))
            step = jitted_train_step(
                model, trainer, partitioner=partitioner, shardings=shardings, seed=0
            )
            batch = jax.device_put(batch, partitioner.batch_sharding)
            compiled = step.lower(state, batch).compile()
            losses = []
            for _ in range(3):
                state, output = compiled(state, batch)
                losses.append(float(output.loss).hex())
        cost = compiled.cost_analysis()
        words = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute")
        text = compiled.as_text()
        found[name] = {
            "flops": cost["flops"],
            "collectives": {word: text.count(f" {word}(") for word in words},
            "losses": losses,
        }
    return found


def main(out: str) -> None:
    """Writes everything into `out`."""
    target = pathlib.Path(out)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        write_text(folder)
        assert train.main(train_flags(DENSE, folder, folder / "dense", 4)) == 0
        sparse = folder / "sparse" / "checkpoint_2"
        dense = folder / "dense" / "checkpoint_2"
        assert upcycle.main(upcycle_flags(dense, sparse)) == 0
        assert train.main(train_flags(SPARSE, folder, folder / "sparse", 6)) == 0
        kept = {"dense": "checkpoint_2", "sparse": "checkpoint_4"}
        for run, checkpoint in kept.items():
            shutil.copytree(folder / run / checkpoint, target / run / checkpoint)
        record = {
            "arithmetic": arithmetic(),
            "runs": {run: scalars(folder / run) for run in kept},
            "programs": {"1": programs(1, (DENSE, SPARSE)), "8": programs(8, (SPARSE,))},
        }
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        (target / "record.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
