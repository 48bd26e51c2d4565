"""The folders of every family under transformers 4.57, which has packages of its own: it is
installed for this test, into a folder of its own.
"""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.checkpoints.random_decoders import FAMILIES, GEMMA, TOKENS, UNIT, Held, of, our_logits
from upcycle_jax.checkpoints.huggingface.base import WritingOptions
from upcycle_jax.checkpoints.huggingface.verdict import UNUSABLE
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface

PACKAGES = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")

PROGRAM = """
import pathlib, sys, numpy as np, torch, transformers
assert transformers.__version__ == "4.57.6", transformers.__version__
tokens = torch.tensor(np.load(sys.argv[1]), dtype=torch.long)
for folder in map(pathlib.Path, sys.argv[2:]):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        np.save(folder / "logits.npy", model.eval()(tokens).logits.numpy())
"""

REWRITTEN = {
    "llama, every second layer": of(
        num_layers=4, moe=dataclasses.replace(UNIT, num_sparse_layers=2)
    ),
    "gemma": of(GEMMA, moe=UNIT),
    "olmo": of(norm="layer_norm_without_parameters", moe=UNIT),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with transformers 4.57 and what it asks for in other versions."""
    target = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{PACKAGES[0]} cannot be installed: {done.stderr.strip()[-300:]}")
    return target


@pytest.mark.slow
def test_transformers_4_computes_the_same(packages, tmp_path):
    pytest.importorskip("torch", reason="torch is needed as the oracle")
    models = FAMILIES | REWRITTEN
    folders = {}
    for number, (name, config) in enumerate(models.items()):
        options = WritingOptions(model_type=name if config is FAMILIES.get(name) else None)
        folders[name] = write_huggingface(Held(config), tmp_path / str(number), options=options)
        said = json.loads((folders[name] / "verdicts.json").read_text())["verdicts"]
        assert said[1]["verdict"] not in UNUSABLE, (name, said)
    np.save(tmp_path / "tokens.npy", TOKENS)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "tokens.npy", *folders.values()],
        env=os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, config in models.items():
        theirs = np.load(folders[name] / "logits.npy")
        assert theirs.std() > 0.1
        ours = our_logits(config, Held(config).leaves)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=name)
