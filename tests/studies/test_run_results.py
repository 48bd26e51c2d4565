"""The manifest of a run, as far as it can be believed."""

import json

import pytest

from upcycle_jax.studies.run_results import MANIFEST, read_manifest


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("[]", "it is no object"),
        ("[" * 10**5, "nested too deeply"),
        ("9" * 6000, "Exceeds the limit"),
        ('{"start_step": "x"}', "start_step is 'x'"),
        ('{"parameters": true}', "parameters is True"),
        ('{"train_flops_per_step": {}}', "train_flops_per_step is {}"),
        ('{"starts": [3]}', "starts is no list of objects"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, text, why):
    path = tmp_path / MANIFEST
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged .*{why}"):
        read_manifest(path)


def test_what_training_writes_is_read(tmp_path):
    content = {"start_step": 0, "step": 3, "parameters": 5, "starts": [{}], "total_steps": None}
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    assert read_manifest(tmp_path / MANIFEST) == content
