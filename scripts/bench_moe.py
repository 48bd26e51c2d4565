"""Prints the speed of MoE layers as ratios to the FLOP-equal dense MLP, measured in one process:
experts choose, top-K, both with one-hot einsum dispatch, and dropless top-K; with tokens per
second, compile time and XLA's temporaries, which are the peak beside arguments.

    python scripts/bench_moe.py                                   # d 512, ff 1024, E 8 and 32, 4096
    tokens, C = 2, float32 python scripts/bench_moe.py --sizes base large --dtype=bfloat16
    --groups=8     # on an accelerator

Targets: at most 1.15x of the dense MLP on a CPU (1.10x on a GPU), at least 3x faster than one-hot
einsum. Run it on a quiet machine.
"""

import argparse

import benchmarks
from benchmarks import LayerShape

SIZES = {"small": (512, 1024), "base": (768, 2048), "large": (1024, 2816), "xl": (2048, 5120)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["small"], choices=SIZES)
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--tokens", type=int, default=4096, help="per group")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no_one_hot", action="store_true", help="leave the einsum form out")
    args = parser.parse_args()
    print(f"{benchmarks.hardware()}\n")
    for size in args.sizes:
        d, ff = SIZES[size]
        for num_experts in args.experts:
            shape = LayerShape(
                d=d,
                ff=ff,
                num_experts=num_experts,
                tokens=args.tokens,
                groups=args.groups,
                dtype=args.dtype,
            )
            for backward in (False, True):
                what = "forward + backward" if backward else "forward"
                print(
                    f"**{what}: {args.groups} x {args.tokens} tokens, d {d}, ff {ff}, E"
                    f" {num_experts}, C = 2, {args.dtype}**\n"
                )
                measured = benchmarks.layer(
                    shape, backward=backward, one_hot=not args.no_one_hot, rounds=args.rounds
                )
                print(benchmarks.layer_table(measured), flush=True)


if __name__ == "__main__":
    main()
