"""The two domains of the running environment: real, different, held apart, and the same each
time.
"""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from upcycle_jax.data import DatasetConfig
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import DecoderOnlyFeatures, EncoderDecoderFeatures
from upcycle_jax.tasks import python_environment

FEATURES = EncoderDecoderFeatures()
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def code():
    return python_environment.python_source()


@pytest.fixture(scope="module")
def prose():
    return python_environment.documentation_prose()


def test_there_is_enough_of_both(code, prose):
    for corpus in (code, prose):
        sizes = {
            split: part["bytes"]
            for split, part in corpus.fingerprint().items()
            if split != "origin"
        }
        assert sizes["train"] > 2e6 and sizes["validation"] > 5e4, sizes


def test_domains_are_clearly_different(code, prose):
    def share(corpus, word):
        text = b"".join(corpus.splits["validation"])
        return text.count(word) / len(text)

    assert share(code, b"self.") > 5 * share(prose, b"self.")
    assert share(prose, b" the ") > 2 * share(code, b" the ")


def test_train_and_validation_share_no_passage(code, prose):
    for corpus in (code, prose):
        assert not set(corpus.splits["train"]) & set(corpus.splits["validation"])


def test_a_files_docstrings_lie_on_the_side_of_its_source(code, prose):
    # json.load's docstring occurs in both domains; whichever split has its source has its prose.
    marked = b"file-like object containing a JSON document) to a Python object."

    def flat(text):
        return b" ".join(text.split())

    sides = [
        {
            split
            for split, passages in corpus.splits.items()
            if any(marked in flat(text) for text in passages)
        }
        for corpus in (code, prose)
    ]
    assert len(sides[0]) == 1 and sides[0] == sides[1]


def test_reading_again_gives_the_same_text(code, prose, tmp_path, monkeypatch):
    assert python_environment.python_source.__wrapped__().fingerprint() == code.fingerprint()
    assert (
        python_environment.documentation_prose.__wrapped__().fingerprint() == prose.fingerprint()
    )  # from the cache
    assert prose.fingerprint()["origin"]["packages"]["jax"]


def test_cache_is_written_read_and_survives_damage(tmp_path, monkeypatch):
    monkeypatch.setenv(python_environment.CACHE_VARIABLE, str(tmp_path / "cache"))
    documents = [python_environment.Document("text", key="k")]
    calls = []
    monkeypatch.setattr(
        python_environment,
        "_prose_documents",
        lambda packages: calls.append(packages) or iter(documents * 2),
    )
    monkeypatch.setattr(
        python_environment, "build_corpus", lambda name, documents, **settings: list(documents)
    )
    read = python_environment.documentation_prose.__wrapped__
    assert read() == read() == documents * 2 and len(calls) == 1
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(b"damaged")
    assert read() == documents * 2 and len(calls) == 2
    monkeypatch.setenv(python_environment.CACHE_VARIABLE, "/dev/null/nowhere")  # cannot be written
    assert read() == documents * 2


def test_source_is_parsed_not_imported(code, prose):
    # Modules that nothing here needs, whose source both domains hold.
    assert (
        not {"turtle", "antigravity", "scipy.datasets", "jax.experimental.jax2tf"}
        & sys.modules.keys()
    )


def test_docstrings_in_the_order_of_the_source():
    source = f'''"""Module text that is long enough to be kept by the reader, which wants sixty."""
class A:
    """Class text: {"x" * 60}."""
    def f(self):
        """Too short."""
'''
    prose = python_environment._prose_of_source(source, set())
    assert (
        prose
        == "Module text that is long enough to be kept by the reader, which wants sixty.\n\nClass"
        " text: " + "x" * 60 + "."
    )


def test_batches_come_from_both_domains_without_naming_a_module():
    config = DatasetConfig(
        "embedded_text_span_corruption", {"inputs": 128, "targets": 29}, batch_size=32, seed=0
    )
    assert open_dataset(config, FEATURES).task_names() == (
        "documentation_prose_span_corruption",
        "python_source_span_corruption",
    )
    assert open_dataset(config, FEATURES).vocabulary_size() == 359
    batch = next(open_dataset(config, FEATURES).train_iterator())
    assert (batch["encoder_input_tokens"] > 0).mean() > 0.99  # rows are full
    texts = [
        bytes(int(token) - 3 for token in row if 3 <= token < 259)
        for row in batch["encoder_input_tokens"]
    ]
    assert all(np.isin(list(text), range(128)).mean() > 0.5 for text in texts)
    assert sum(b"self" in text or b"def " in text or b" = " in text for text in texts) >= 4


def test_language_modelling_reads_whole_documents():
    config = DatasetConfig(
        "embedded_text_language_modeling",
        {"targets": 256},
        batch_size=8,
        seed=0,
        split="validation",
    )
    dataset = open_dataset(config, DecoderOnlyFeatures())
    assert dataset.task_names() == (
        "documentation_prose_language_modeling",
        "python_source_language_modeling",
    )
    batches = dataset.eval_batches(2)["python_source_language_modeling"]()
    # Files are longer than passages of 4096 characters, so few of 16 rows hold an end.
    ends = sum((batch["decoder_target_tokens"] == 1).sum() for batch in batches)
    whole = python_environment.python_source(whole_documents=True)
    cut = python_environment.python_source()
    assert ends < 4 and len(whole.splits["train"]) * 2 < len(cut.splits["train"])
    assert sum(map(len, whole.splits["validation"])) == pytest.approx(
        sum(map(len, cut.splits["validation"])), rel=0.05
    )


def test_one_import_name_only():
    done = subprocess.run(
        [sys.executable, "-c", "import tasks"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (
        done.returncode and "imported as 'tasks': import it as 'upcycle_jax.tasks'" in done.stderr
    )
