"""Folders of tiny random vision transformers, each written once by transformers."""

import pytest

from tests.checkpoints.huggingface.vit.oracle import random_model


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The folder of a case of `oracle.CASES`."""
    made = {}

    def one(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("vit") / name.replace(" ", "_")
            random_model(name).save_pretrained(made[name])
        return made[name]

    return one
