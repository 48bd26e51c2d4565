"""Time, speed against a plain copy, peak memory and new bytes of four ways to upcycle one
checkpoint.

    python scripts/bench_surgery.py --megabytes 990 --experts 8 [--ways
    reference,streaming,encoded,noise,online,naive] [--folder DIR]

The plain copy reads the dense file, writes as many bytes as the materialised result has, and calls
fsync: the ratio of a way is that copy's time / its time, so 1.0 is as fast as the disk path allows
and more is faster. Every way runs in a process of its own.

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
    begun = time.perf_counter()
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
    seconds = time.perf_counter() - begun
    os.sync()
    synced = time.perf_counter() - begun
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
                "synced": synced,
                "peak_mib": peak / 1024,
                "new_mib": new / 2**20,
            }
        )
    )


def plain_copy(folder: pathlib.Path, total: int) -> float:
    """Seconds to read the dense files once and write `total` bytes of them, with fsync."""
    files = [path for path in (folder / "dense").rglob("*") if path.is_file()]
    begun, written = time.perf_counter(), 0
    with open(folder / "plain", "wb") as out:
        while written < total:
            for path in files:
                with open(path, "rb") as stream:
                    while written < total and (block := stream.read(1 << 24)):
                        written += out.write(block[: total - written])
        out.flush()
        os.fsync(out.fileno())
    (folder / "plain").unlink()
    return time.perf_counter() - begun


def main() -> None:
    """Parses flags and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=256, help="size of the dense checkpoint")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=5, help="of folders and proofs")
    parser.add_argument("--max_memory", type=int, default=1 << 30, help="bytes, of the same")
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
        total = sum(spec.nbytes for spec in trees(args.megabytes, args.experts)[1].values())
        copy = plain_copy(folder, total)
        print(
            f"dense {args.megabytes:.0f} MiB, {args.experts} experts, result {total / 2**20:.0f}"
            f" MiB; plain read+write+fsync {copy:.2f} s"
        )
        print(
            f"{'way':<10} {'seconds':>8} {'with sync':>10} {'ratio':>7} {'peak MiB':>9}"
            f" {'new MiB':>8}"
        )
        for way in ways:
            command = [
                sys.executable,
                __file__,
                "--one",
                way,
                "--folder",
                str(folder),
                "--megabytes",
                str(args.megabytes),
            ]
            done = subprocess.run(
                [*command, "--experts", str(args.experts)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(folder / way, ignore_errors=True)
            numbers = (
                found["seconds"],
                found["synced"],
                copy / found["synced"],
                found["peak_mib"],
                found["new_mib"],
            )
            print(
                "{:<10} {:>8.2f} {:>10.2f} {:>7.2f} {:>9.0f} {:>8.1f}".format(way, *numbers),
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
