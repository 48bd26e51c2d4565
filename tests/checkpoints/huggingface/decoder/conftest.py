"""Folders of tiny random models, each written once by transformers."""

import pytest

from tests.checkpoints.huggingface.decoder import oracle


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Given the name of a case: the model and its folder."""
    made = {}

    def one(name):
        if name not in made:
            model = oracle.random_model(*oracle.CASES[name])
            folder = tmp_path_factory.mktemp("models") / name.replace(" ", "_")
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return one
