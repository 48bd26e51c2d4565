"""Time, speed against a plain copy, peak memory and new bytes of four ways to upcycle one
checkpoint.

    python scripts/bench_surgery.py --megabytes 990 --experts 8 --rounds 5 [--ways
    reference,streaming,encoded,noise,online,naive] [--folder DIR]

The plain copy reads the dense files, writes as many bytes as the materialised result has, and calls
fsync. The ratio of a way is that copy's time / its time, which ends when everything is on disk:
1.0 is as fast as a copy and more is faster. Every way runs in a process of its own, by turns with
the copy; medians of the rounds, and of their ratios.

    python scripts/bench_surgery.py --megabytes 400 --ways read_folder,write_folder --rounds 5

reads a Hugging Face folder of a decoder-only model into an Orbax checkpoint, and writes it back, by
turns with a plain copy of the same bytes, in one process; medians of the rounds, and of their
ratios.

    python scripts/bench_surgery.py --megabytes 990 --experts 32 --ways proof --rounds 7

proves a conversion by reference, by turns with a plain read of the dense bytes, in one process.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import folder_speed
import numpy as np
import proof_speed

if TYPE_CHECKING:
    from upcycle_jax.trees import LeafSpec

FOLDER_WAYS = {"read_folder", "write_folder"}
PROOF = "proof"
WAYS = ("reference", "encoded", "streaming", "noise", "online", "naive")
D_MODEL, LAYERS = 1024, 4
"""Layers 1 and 3 become sparse; the MLP's width follows from the size asked for."""


def trees(megabytes: float, experts: int) -> "tuple[dict[str, LeafSpec], dict[str, LeafSpec]]":
    """Specs of the dense source and of the sparse target."""
    from upcycle_jax import axes
    from upcycle_jax.moe import roles
    from upcycle_jax.trees import LeafSpec

    hidden = max(64, int(megabytes * 2**20 / (4 * LAYERS * 3 * D_MODEL)) // 64 * 64)
    dense, sparse = (
        {"state/step": LeafSpec((), np.dtype(np.int32))},
        {"state/step": LeafSpec((), np.dtype(np.int32))},
    )
    for layer in range(LAYERS):
        for name in ("wi_0", "wi_1", "wo"):
            shape = (hidden, D_MODEL) if name == "wo" else (D_MODEL, hidden)
            path = f"target/encoder/layers_{layer}/mlp"
            dense[f"{path}/{name}/kernel"] = LeafSpec(shape, np.dtype(np.float32))
            if layer % 2:
                names = (axes.EXPERT, None, None)
                sparse[f"{path}/expert/{name}/kernel"] = LeafSpec(
                    (experts, *shape), np.dtype(np.float32), names
                )
            else:
                sparse[f"{path}/{name}/kernel"] = LeafSpec(shape, np.dtype(np.float32))
        if layer % 2:
            router = LeafSpec((D_MODEL, experts), np.dtype(np.float32))
            sparse[f"target/encoder/layers_{layer}/mlp/router/router_weights/w/kernel"] = router
    return dense, roles.inferred(sparse)


def write_dense(folder: pathlib.Path, megabytes: float, experts: int) -> None:
    """The dense checkpoint, of normal values (which do not compress much, like real weights)."""
    from upcycle_jax.checkpoints import create_checkpoint

    specs, _ = trees(megabytes, experts)
    writer = create_checkpoint(folder, specs, step=1, metadata={})
    rng = np.random.default_rng(0)
    for name, spec in specs.items():
        if spec.shape:
            writer.write(name, None, rng.standard_normal(spec.shape, np.float32))
    writer.finalize()


def run_way(way: str, folder: pathlib.Path, megabytes: float, experts: int) -> None:
    """One way, in this process; prints a line of JSON."""
    import jax

    from upcycle_jax import surgery
    from upcycle_jax.checkpoints import chunk_copy, create_checkpoint, open_checkpoint
    from upcycle_jax.surgery import offline

    _, specs = trees(megabytes, experts)
    source = open_checkpoint(folder / "dense")
    init = surgery.NoisyCopies() if way == "noise" else surgery.CopyExperts()
    plan = surgery.make_plan(source.specs(), specs, surgery.Recipe(expert_init=init))
    output = folder / way
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, cpu = time.perf_counter(), time.process_time()
    if way in ("reference", "encoded", "noise"):
        surgery.apply_offline(plan, source, output, materialize=way != "reference")
    elif way == "streaming":
        nothing = offline.SharedChunks({}, chunk_copy.CopyMode.ENCODED, "decoded")
        offline.shared_chunks = lambda *_, **__: nothing
        surgery.apply_offline(plan, source, output)
    elif way == "online":
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        made = surgery.apply_online(plan, source, dict.fromkeys(specs, here))
        jax.block_until_ready(made)
    else:
        tree = {name: source.read(name) for name in source.specs()}
        writer = create_checkpoint(output, specs, step=1, metadata={})
        for name, spec in specs.items():
            if name == "state/step":
                continue
            origin = name.replace("expert/", "")
            stacked = (
                np.repeat(tree[origin][None], experts, axis=0)
                if "/expert/" in name
                else tree.get(name, np.zeros(spec.shape, np.float32))
            )
            tree[name] = stacked
            writer.write(name, None, stacked)
        writer.finalize()
    os.sync()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    new = (
        sum(p.stat().st_size for p in output.rglob("*") if p.is_file() and p.stat().st_nlink == 1)
        if output.exists()
        else 0
    )
    print(
        json.dumps(
            {
                "way": way,
                "seconds": seconds,
                "cpu": cpu,
                "peak_mib": peak / 1024,
                "new_mib": new / 2**20,
            }
        )
    )


def plain_copy(folder: pathlib.Path, total: int) -> float:
    """Seconds to read the dense files and write `total` bytes of them, with fsync."""
    files = [path for path in (folder / "dense").rglob("*") if path.is_file()]
    os.sync()
    begun, written = time.perf_counter(), 0
    with open(folder / "plain", "wb") as out:
        while written < total:
            for path in files:
                with open(path, "rb") as stream:
                    while written < total and (block := stream.read(1 << 24)):
                        written += out.write(block[: total - written])
        out.flush()
        os.fsync(out.fileno())
    seconds = time.perf_counter() - begun
    (folder / "plain").unlink()
    return seconds


def by_turns(
    ways: list[str], folder: pathlib.Path, megabytes: float, experts: int, rounds: int
) -> None:
    """Measures every way beside the plain copy, `rounds` times by turns, and prints a table."""
    total = sum(spec.nbytes for spec in trees(megabytes, experts)[1].values())
    command = [sys.executable, __file__, "--folder", str(folder), "--megabytes", str(megabytes)]
    command += ["--experts", str(experts), "--one"]
    copies: list[float] = []
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        copies.append(plain_copy(folder, total))
        for way in ways:
            os.sync()
            done = subprocess.run([*command, way], stdout=subprocess.PIPE, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(folder / way, ignore_errors=True)
    load = pathlib.Path("/proc/loadavg").read_text().split()[0]
    print(
        f"dense {megabytes:.0f} MiB, {experts} experts, result {total / 2**20:.0f} MiB; medians of"
        f" {rounds} rounds by turns; load average {load}"
    )
    print(f"{'way':<10} {'seconds':>8} {'CPU s':>7} {'ratio':>7} {'peak MiB':>9} {'new MiB':>8}")
    print(f"{'plain copy':<10} {statistics.median(copies):>8.2f}")
    for way, rows in found.items():
        ratio = statistics.median(
            copy / row["seconds"] for copy, row in zip(copies, rows, strict=True)
        )
        seconds, cpu, peak, new = (
            statistics.median(row[key] for row in rows)
            for key in ("seconds", "cpu", "peak_mib", "new_mib")
        )
        print(
            f"{way:<10} {seconds:>8.2f} {cpu:>7.2f} {ratio:>7.2f} {peak:>9.0f} {new:>8.1f}",
            flush=True,
        )


def main() -> None:
    """Parses flags and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=256, help="size of the dense checkpoint")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are shown")
    parser.add_argument(
        "--max_memory", type=int, default=1 << 30, help="bytes to hold, for folders"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_way(args.one, pathlib.Path(args.folder), args.megabytes, args.experts)
        return
    folder = pathlib.Path(tempfile.mkdtemp(dir=args.folder))
    asked = set(args.ways.split(","))
    ways = [way for way in args.ways.split(",") if way not in FOLDER_WAYS | {PROOF}]
    try:
        if asked & FOLDER_WAYS:
            folder_speed.main(folder, args.megabytes, args.rounds, args.max_memory)
        if asked <= FOLDER_WAYS:
            return
        write_dense(folder / "dense", args.megabytes, args.experts)
        if PROOF in asked:
            proof_speed.main(folder, trees(args.megabytes, args.experts)[1], args.rounds)
        if not ways:
            return
        by_turns(ways, folder, args.megabytes, args.experts, args.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
