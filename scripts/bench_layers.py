r"""Prints what loops over layers (SCAN_LAYERS) and recomputation (REMAT_POLICY) do to a train step:
compile time, memory, FLOPs.

    python scripts/bench_layers.py --model=t5_1_1_small --batch_size=64
    python scripts/bench_layers.py --model=t5_1_1_large_upcycled --batch_size=8 \
        --forms unscanned scanned --gin.NUM_EXPERTS=8

Nothing is executed, so any size can be asked for; the programs are those of one device of this
machine's kind. `peak` is what the step needs beside its arguments, `activations` what its backward
pass keeps and computes again, from shapes alone (upcycle_jax/costs/activations.py), `FLOPs` the
matrix products it executes.
"""

import argparse

import benchmarks
import jax

from upcycle_jax import config
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.planning import compilation
from upcycle_jax.planning.compilation import Workload

FORMS = {
    "unscanned": (False, "none"),
    "unscanned, minimal": (False, "minimal"),
    "unscanned, full": (False, "full"),
    "scanned": (True, "none"),
    "scanned, minimal": (True, "minimal"),
    "scanned, full": (True, "full"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="t5_1_1_small")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    args, rest = parser.parse_known_args()
    bindings = [item.removeprefix("--gin.") for item in rest if item.startswith("--gin.")]
    if len(bindings) < len(rest):
        parser.error(
            f"unknown arguments {[item for item in rest if not item.startswith('--gin.')]}"
        )
    print(
        f"{benchmarks.hardware()}; {args.model}, {args.batch_size} rows of {args.inputs} +"
        f" {args.targets}, {args.dtype}\n"
    )
    print(
        "| form | compile s | peak MiB | activations MiB | FLOPs |\n| --- | ---: | ---: | ---: |"
        " ---: |",
        flush=True,
    )
    for form in args.forms:
        scan, remat = FORMS[form]
        settings = [
            "DROPOUT_RATE=0.0",
            f"ACTIVATION_DTYPE={args.dtype!r}",
            f"SCAN_LAYERS={scan}",
            f"REMAT_POLICY={remat!r}",
            *bindings,
        ]
        work = Workload(
            model=config.load([f"models/{args.model}.gin"], settings).macro("MODEL"),
            trainer=benchmarks.shipped_trainer(args.model),
            partitioner=Partitioner(devices=(jax.devices()[0],)),
            batch_size=args.batch_size,
            task_feature_lengths={"inputs": args.inputs, "targets": args.targets},
        )
        compiled = compilation.compile_train_step(work)
        print(
            f"| {form} | {compiled.seconds:.0f} | {compiled.temporary_bytes / 2**20:,.0f} |"
            f" {work.costs.all_activation_bytes / 2**20:,.0f} | {work.costs.hardware_flops:.3g} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
