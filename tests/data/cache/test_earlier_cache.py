"""Caches that an earlier version wrote are read here as they were read then: the same batches, the
same fingerprint, and a position of then is continued.

`earlier/` holds a task of labelled examples, one of text under UL2's denoisers, and their mixture;
`record.json` what `record` gave with that version.
"""

import hashlib
import json
import pathlib

import pytest

from upcycle_jax.data import DatasetConfig, configure
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures

HERE = pathlib.Path(__file__).parent / "earlier"
STREAMS = {"padded": {"pack": False}, "packed": {"pack": True}, "words": {"mixture": "words"}}


@pytest.fixture(autouse=True)
def caches():
    configure(cache_dirs=[str(HERE)])
    yield
    configure()


def config(*, mixture="both", pack=False, split="train"):
    return DatasetConfig(
        f"earlier_{mixture}",
        {"inputs": 24, "targets": 24},
        batch_size=4,
        seed=5,
        pack=pack,
        split=split,
        use_cached=True,
    )


def digest(batch):
    """A hash of a batch's features, in order."""
    found = hashlib.sha256()
    for name, array in batch.items():
        found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


def record(opened, folder):
    """What is read: batches of the streams and of the evaluation, and the position after some.

    Args:
      opened: makes a dataset of a configuration.
      folder: where positions are written.
    """
    found = {}
    for name, settings in STREAMS.items():
        iterator = opened(config(**settings)).train_iterator()
        batches = [digest(next(iterator)) for _ in range(4)]
        iterator.save(folder / name)
        position = json.loads((folder / name / "position.json").read_text())
        del position["fingerprint"]["versions"]
        passes = opened(config(**settings, split="validation")).eval_batches(2)
        found[name] = {
            "batches": batches,
            "following": [digest(next(iterator)) for _ in range(2)],
            "position": position,
            "evaluation": {
                task: [digest(batch) for batch in start()] for task, start in passes.items()
            },
        }
    return found


def test_earlier_caches_are_read_as_they_were_then(tmp_path):
    def opened(config):
        return open_dataset(config, EncoderDecoderFeatures())

    expected = json.loads((HERE / "record.json").read_text())
    assert record(opened, tmp_path) == expected
    for name, settings in STREAMS.items():
        position = expected[name]["position"]
        position["fingerprint"]["versions"] = {}
        (tmp_path / name / "position.json").write_text(json.dumps(position))
        iterator = opened(config(**settings)).train_iterator()
        iterator.restore(tmp_path / name)
        assert [digest(next(iterator)) for _ in range(2)] == expected[name]["following"]
