"""Prints how fast cached greedy decoding is against `generate` of transformers, on one random model
in one process: tokens per second of both, in turns, and the ratio.

    python scripts/bench_decoding.py
    python scripts/bench_decoding.py --model_type=mistral --window=32 --prompt=256
    python scripts/bench_decoding.py --model_type=mixtral --experts=8 --mlp_dim=256
    taskset -c 0 python scripts/bench_decoding.py --torch_threads=1

The model is written by transformers and read as a Hugging Face folder. Both produce the same number
of tokens for every prompt; how many of them are equal is printed, too. On a busy machine bind the
process to one core (`taskset`): threads of torch that wait for each other suffer most.
"""

import argparse
import dataclasses
import tempfile
from typing import Any

import benchmarks
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Work:
    """What is decoded.

    Attributes:
      batch: rows.
      prompt: tokens that are read of each.
      new: tokens that are produced.
    """

    batch: int
    prompt: int
    new: int


def random_model(args: argparse.Namespace) -> Any:
    """A model of transformers that no token ends."""
    settings: dict[str, Any] = {
        "vocab_size": args.vocab,
        "hidden_size": args.d,
        "intermediate_size": args.mlp_dim or 4 * args.d,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": args.prompt + args.new,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if args.window:
        settings["sliding_window"] = args.window
    if args.model_type == "mixtral":
        settings["num_local_experts"] = args.experts
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(args.model_type, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def read(model: Any) -> tuple[DecoderModel, PyTree]:
    """The same model here, and its parameters."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reader = open_checkpoint(folder)
        params = {
            path.removeprefix("target/"): jnp.asarray(reader.read(path)) for path in reader.specs()
        }
        config = reader.model_config()
    assert isinstance(config, DecoderConfig)
    return DecoderModel(config), trees.unflatten(params)


def theirs(model: Any, prompts: np.ndarray, work: Work) -> benchmarks.Program:
    """transformers' `generate`."""
    ids = torch.tensor(prompts)

    def call() -> np.ndarray:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=work.new,
                min_new_tokens=work.new,
            )
        return out[:, work.prompt :].numpy()

    return benchmarks.Program(call, 0.0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_type", default="llama", help="of transformers")
    sizes = {"vocab": 32000, "d": 256, "layers": 4, "heads": 8, "kv_heads": 4, "mlp_dim": 0}
    sizes |= {"experts": 8, "window": 0, "batch": 8, "prompt": 64, "new": 64, "rounds": 7}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--torch_threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.torch_threads)
    work = Work(args.batch, args.prompt, args.new)
    prompts = np.random.default_rng(0).integers(1, args.vocab, (work.batch, work.prompt))
    model = random_model(args)
    programs = {
        "transformers": theirs(model, prompts, work),
        "upcycle_jax": benchmarks.decoding_program(*read(model), prompts, new=work.new),
    }
    results = [program.call() for program in programs.values()]
    print(
        f"{benchmarks.hardware()}; torch {torch.__version__} ({args.torch_threads} threads),"
        f" transformers {transformers.__version__}\n{args.model_type}, d {args.d}, {args.layers}"
        f" layers, vocabulary {args.vocab}, {work.batch} prompts of {work.prompt} tokens,"
        f" {work.new} new ones; {np.mean(results[0] == results[1]):.1%} of them equal\n"
    )
    print(
        "| decoding | tokens/s | speed / transformers | compile s |\n| --- | ---: | ---: | ---: |"
    )
    measured = benchmarks.compare(
        programs, baseline="transformers", tokens=work.batch * work.new, rounds=args.rounds
    )
    for m in measured:
        print(
            f"| {m.name} | {m.tokens_per_second:,.0f} | {1 / m.ratio:.2f}x |"
            f" {m.compile_seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
