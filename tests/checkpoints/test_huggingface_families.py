"""Folders of another family: read and written by what is registered for it, and by nothing else."""

import json

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.huggingface import families
from upcycle_jax.checkpoints.huggingface.base import (
    Export,
    FolderFamily,
    Source,
    leaves_of,
)
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface

KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)


class ToyLayout:
    config = None

    def __init__(self, folder, keys):
        self.settings = {"sharpness": keys["sharpness"]}

    def sources(self, weights):
        assert set(weights.tensors) == {"linear.weight"}
        return {"target/linear/kernel": Source("linear.weight", transposed=True, factor=2.0)}


def export(reader, options):
    if set(reader.specs()) != {"target/linear/kernel"}:
        return None
    config = {"model_type": "toy", **reader.model_settings()}
    tensors = {"target/linear/kernel": Source("linear.weight", transposed=True)}
    return Export(config, tensors, leaves_of(reader))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    toy = FolderFamily("toy", ("toy",), {"tay": "it is a toy's neighbour"}, ToyLayout, export)
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, toy])
    path = tmp_path / "toy"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "toy", "sharpness": 3.0}))
    save_file({"linear.weight": KERNEL}, path / "model.safetensors")
    return path


def test_a_folder_is_read_and_written_as_its_family_says(folder, tmp_path):
    reader = open_checkpoint(folder)
    np.testing.assert_array_equal(reader.read("target/linear/kernel"), 2 * KERNEL.T)
    assert reader.model_settings() == {"sharpness": 3.0}
    written = open_checkpoint(write_huggingface(reader, tmp_path / "out"))
    np.testing.assert_array_equal(written.read("target/linear/kernel"), 4 * KERNEL.T)


def test_a_type_of_no_family_is_refused_with_those_that_are_read(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "tay"}))
    said = (
        r"type 'tay'; only T5 models \(t5, mt5\) and .* and toy models \(toy\) can be read: it is"
    )
    with pytest.raises(ValueError, match=said):
        open_checkpoint(epath.Path(folder))
