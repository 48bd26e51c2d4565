"""Prints the upcycled model's train step against the dense model's and against the ratio of their
FLOPs, measured in one process, and the share of the FLOP/s of one large matrix product.

    python scripts/bench_train_step.py      # tiny, small and base T5, tiny and small language
    model, small and base vision transformer (its batch is as many images), each with the
    optimizer that runs/pretrain.gin, pretrain_lm.gin or pretrain_images.gin gives it
    python scripts/bench_train_step.py --sizes base --batch_size=64 --inputs=512 --targets=128
    --dtype=bfloat16

Run it on a quiet machine.
"""

import argparse

import benchmarks

from upcycle_jax.layers import cpu_attention

SIZES = ["tiny", "small", "base", "tiny_lm", "small_lm", "vit_s16", "vit_b16"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--targets", type=int, default=64)
    parser.add_argument("--group_size", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bindings", nargs="*", default=[], help="of gin, e.g. VOCAB_SIZE=384")
    parser.add_argument(
        "--plain_attention", action="store_true", help="on CPUs: attention as elsewhere"
    )
    args = parser.parse_args()
    if args.plain_attention:
        cpu_attention.is_faster = lambda *_: False
    print(
        f"{benchmarks.hardware()}; {args.batch_size} rows of {args.inputs} + {args.targets}, E"
        f" {args.experts}, {args.dtype}\n"
    )
    measured = []
    for size in args.sizes:
        models, lengths = benchmarks.model_pair(
            size,
            num_experts=args.experts,
            group_size=args.group_size,
            inputs=args.inputs,
            targets=args.targets,
            dtype=args.dtype,
            bindings=args.bindings,
        )
        measured.append(
            benchmarks.train_steps(
                size,
                models,
                benchmarks.shipped_trainer(size),
                batch_size=args.batch_size,
                lengths=lengths,
                rounds=args.rounds,
            )
        )
    print(benchmarks.step_table(measured))


if __name__ == "__main__":
    main()
