"""How fast Hugging Face folders are read and written, against a plain copy of the same bytes."""

import functools
import json
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable

import numpy as np

WIDTH, HIDDEN, VOCAB = 1024, 4096, 8192
LAYER_VALUES = 2 * WIDTH + (2 * 16 + 2 * 4) * 64 * WIDTH + 3 * WIDTH * HIDDEN


def write_folder(folder: pathlib.Path, megabytes: float, dtype: np.dtype) -> None:
    """A random Llama of about so many MiB as a Hugging Face folder."""
    from safetensors.numpy import save_file

    from upcycle_jax.checkpoints.huggingface.decoder.tensors import tensor_shapes
    from upcycle_jax.models.decoder.config import DecoderConfig

    layers = max(1, round(megabytes * 2**20 / dtype.itemsize / LAYER_VALUES))
    config = DecoderConfig(
        VOCAB, WIDTH, layers, 16, 64, HIDDEN, num_kv_heads=4, logits_via_embedding=True
    )
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    tensors = {
        name: (rng.standard_normal(shape, np.float32) * 0.02).astype(dtype)
        for name, shape in tensor_shapes("llama", config).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    keys = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(keys))


def plain_copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Reads a file and writes it, with fsync."""
    target.parent.mkdir()
    with open(source, "rb") as stream, open(target, "wb") as out:
        while block := stream.read(1 << 24):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


def measured(call: Callable[[], object]) -> tuple[float, float, float]:
    """Wall-clock seconds and CPU seconds of a call, and the MiB by which it raised what is
    resident (NaN where the system does not tell).
    """
    os.sync()
    before = _resident()
    cpu, begun = time.process_time(), time.perf_counter()
    call()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return seconds, cpu, _resident(peak=True) - before


def _resident(*, peak: bool = False) -> float:
    """MiB resident now, from where the peak counts anew; or that peak."""
    if not peak:
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return float("nan")
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main(folder: pathlib.Path, megabytes: float, rounds: int, max_memory: int) -> None:
    """Measures by turns, in this process, and prints a table for each dtype."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)

    from upcycle_jax.checkpoints.formats import open_checkpoint
    from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
    from upcycle_jax.checkpoints.to_orbax import convert_to_orbax

    for name in ("float32", "bfloat16"):
        root = folder / name
        write_folder(root / "hf", megabytes, np.dtype(name))
        weights = root / "hf" / "model.safetensors"

        def read(root: pathlib.Path = root) -> None:
            reader = open_checkpoint(root / "hf")
            convert_to_orbax(reader, root / "orbax", max_memory=max_memory)

        def write(root: pathlib.Path = root) -> None:
            reader = open_checkpoint(root / "orbax")
            write_huggingface(reader, root / "back", shard_bytes=max_memory)

        ways: dict[str, Callable[[], object]] = {
            "plain": functools.partial(plain_copy, weights, root / "plain" / weights.name),
            "read_folder": read,
            "write_folder": write,
        }
        made = {"plain": "plain", "read_folder": "orbax", "write_folder": "back"}
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, call in ways.items():
                # Right before, so that each finds memory that was in use a moment ago: what has
                # been free for seconds, a virtual machine may have to ask its host for again.
                shutil.rmtree(root / made[way], ignore_errors=True)
                found[way].append(measured(call))
        load = pathlib.Path("/proc/loadavg").read_text().split()[0]
        print(
            f"Hugging Face folder of {weights.stat().st_size / 2**20:.0f} MiB, {name}, {rounds}"
            f" rounds by turns, at most {max_memory / 2**20:.0f} MiB held; load average {load}"
        )
        print(f"{'way':<13} {'seconds':>8} {'CPU s':>7} {'ratio':>7} {'CPU ratio':>10} {'MiB':>6}")
        for way, rows in found.items():
            seconds, cpu, peak = (statistics.median(column) for column in zip(*rows, strict=True))
            ratio, cpu_ratio = (
                statistics.median(
                    copy[at] / row[at] for copy, row in zip(found["plain"], rows, strict=True)
                )
                for at in (0, 1)
            )
            print(
                f"{way:<13} {seconds:>8.2f} {cpu:>7.2f} {ratio:>7.2f} {cpu_ratio:>10.2f}"
                f" {peak:>6.0f}",
                flush=True,
            )
        shutil.rmtree(root)
