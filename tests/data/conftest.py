"""Small real text for the data tests: one pair of domains, written once per session."""

import inspect
import json
import textwrap

import pytest

CODE_MODULES = (textwrap, inspect)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A folder with `code.txt` (Python source, 150 kB) and `words.txt` (made sentences, 60 kB)."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "code.txt").write_text(
        "\n".join(inspect.getsource(module) for module in CODE_MODULES)
    )
    words = " ".join(
        f"The {n}th sentence speaks of {n * n}, the square of {n}, and of nothing else."
        for n in range(800)
    )
    (folder / "words.txt").write_text(words)
    return folder


@pytest.fixture(scope="session")
def make_config(text_folder):
    """Builds a DatasetConfig over both domains: short examples, byte vocabulary, seed 0."""
    from upcycle_jax.data import DatasetConfig

    def make(**changes):
        settings = {
            "mixture_or_task_name": "small_text",
            "task_feature_lengths": {"inputs": 64, "targets": 16},
            "batch_size": 8,
            "seed": 0,
            "text_files": {
                "code": [str(text_folder / "code.txt")],
                "words": [str(text_folder / "words.txt")],
            },
        }
        return DatasetConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="module")
def short_shuffle():
    """Streams of text shuffle 50 segments at a time instead of 1000 per domain, all of which are
    tokenised and corrupted before the first batch. Returns how many.
    """
    from upcycle_jax.data import sources

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SHUFFLE_BUFFER", 50)
        yield sources.SHUFFLE_BUFFER


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with a small byte-level tokenizer as Hugging Face writes it. Id 0 is '!', and its
    last two ids are '<s>' (BOS) and '</s>' (EOS), which `tokenizer_config.json` states.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [inspect.getsource(textwrap)],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens(["<s>", "</s>"])
    # A file may keep what its last use has set.
    made.enable_truncation(3)
    made.enable_padding(length=9)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>"})
    )
    return folder
