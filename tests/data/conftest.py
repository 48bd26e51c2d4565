"""Small real text for the data tests: one pair of domains, written once per session."""

import inspect
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
