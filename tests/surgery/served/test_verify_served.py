"""Folders and servers against the checkpoint that they come from: sound ones pass, and each fault
is named.
"""

import dataclasses
import functools
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints.random_decoders import FAMILIES, LLAMA3, UNIT, Held, of, our_logits
from upcycle_jax import verify
from upcycle_jax.checkpoints.huggingface.base import WritingOptions
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
from upcycle_jax.surgery.served import verify_served

pytest.importorskip("transformers", reason="transformers is what is compared with")

WINDOWED = of(
    moe=UNIT, rope=LLAMA3, layer_types=("sliding", "sliding"), sliding_window=9, head_dim=16
)
FLAGGED = of(qk_norm="head", moe=dataclasses.replace(UNIT, num_experts=5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of some models: their own checkpoints, and what faults are put into copies of."""
    root = tmp_path_factory.mktemp("served")
    models = {name: FAMILIES[name] for name in ("gpt_neox", "granitemoeshared")}
    for name, config in ({"mixtral": WINDOWED, "qwen3_moe": FLAGGED} | models).items():
        options = WritingOptions(model_type=name)
        write_huggingface(Held(config), root / name, options=options)
    return root


def check(capsys, path, *flags):
    """Exit code and output of the command."""
    code = verify.main([str(path), *map(str, flags)])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_neox", "granitemoeshared"])
def test_a_sound_folder(name, folders, capsys):
    code, said = check(capsys, folders / name, f"--served={folders / name}")
    assert code == 0, said
    assert f"config.json states this model, as {name}" in said
    assert "leaves hold the checkpoint's values" in said
    assert "every part of every layer is this model's" in said
    assert "what is served is this model" in said


def keys(**changed):
    """A fault in config.json."""

    def edit(folder):
        content = json.loads((folder / "config.json").read_text())
        rope = changed.pop("rope_theta", None)
        if rope is not None:
            content["rope_theta"] = content["rope_parameters"]["rope_theta"] = rope
        (folder / "config.json").write_text(json.dumps(content | changed))

    return edit


def tensors(change):
    """A fault in the tensors, which `change` makes in place."""

    def edit(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


EXPERT = "model.layers.1.block_sparse_moe.experts.2"


def swap(found):
    one, other = f"{EXPERT}.w1.weight", f"{EXPERT}.w3.weight"
    found[one], found[other] = found[other], found[one]


def randomise(found):
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    found[name] = np.random.default_rng(9).normal(size=found[name].shape).astype(np.float32)


def duplicate(found):
    for matrix in ("w1", "w2", "w3"):
        found[f"{EXPERT}.{matrix}.weight"] = found[
            f"model.layers.1.block_sparse_moe.experts.0.{matrix}.weight"
        ].copy()


def reorder(found):
    name = "model.layers.1.block_sparse_moe.gate.weight"
    found[name] = found[name][::-1].copy()


def scale(found):
    found["model.embed_tokens.weight"] *= 1.01


FAULTS = {
    "gate and up swapped": (
        "mixtral", tensors(swap),
        [f"{EXPERT}.w1.weight: 1536 of 1536 values differ", "it holds what belongs into up",
         "first part that differs is decoder/layers_1 experts"],
    ),
    "an expert missing": (
        "mixtral", tensors(lambda found: found.pop(f"{EXPERT}.w2.weight")),
        ["lacks 1 of", f"{EXPERT}.w2.weight"],
    ),
    "an expert random": (
        "mixtral", tensors(randomise),
        ["model.layers.0.block_sparse_moe.experts.3.w2.weight: 1536 of 1536 values differ",
         "first part that differs is decoder/layers_0 experts"],
    ),
    "an expert twice": (
        "mixtral", tensors(duplicate),
        ["it holds what belongs to expert 0",
         "first part that differs is decoder/layers_1 experts"],
    ),
    "a router's rows reversed": (
        "mixtral", tensors(reorder), ["first part that differs is decoder/layers_1 router"],
    ),
    "another embedding": (
        "mixtral", tensors(scale), ["first part that differs is embedding"],
    ),
    "another rope base": (
        "mixtral", keys(rope_theta=20000.0),
        ["config.json: the rope of layer 0 is {'kind': 'llama3',", "decoder/layers_0 attention",
         "these differ too: decoder/layers_1 attention"],
    ),
    "a dropped window": (
        "mixtral", keys(sliding_window=None),
        ["windows is (9, 9), read as (None, None)",
         "first part that differs is decoder/layers_0 attention"],
    ),
    "unnormalised gates": (
        "qwen3_moe", keys(norm_topk_prob=False),
        ["renormalised is True, read as False",
         "first part that differs is decoder/layers_0 experts"],
    ),
    "fewer experts for each token": (
        "qwen3_moe", keys(num_experts_per_tok=1),
        ["num_selected_experts is 2.0, read as 1.0", "decoder/layers_0 experts"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault, folders, tmp_path, capsys):
    name, edit, expected = FAULTS[fault]
    served = tmp_path / "served"
    shutil.copytree(folders / name, served)
    edit(served)
    code, said = check(capsys, folders / name, f"--served={served}")
    assert code == 1, said
    for text in expected:
        assert text in said, said
    assert "it is ANOTHER model" in said


@pytest.mark.parametrize("model_type", ["olmo", "gemma"])
def test_rewritten_folders_are_the_model(model_type, tmp_path, capsys):
    """A centred stream, and a folded embedding, are compared as what they stand for."""
    config = dataclasses.replace(FAMILIES[model_type], clip_qkv=None)
    source = Held(config)
    write_huggingface(source, tmp_path / "dense", options=WritingOptions(model_type=model_type))
    sparse = Held(dataclasses.replace(config, moe=UNIT), path=str(tmp_path / "held"))
    write_huggingface(sparse, tmp_path / "out", options=WritingOptions(model_type="mixtral"))
    lines = []
    folder = verify_served._Folder(tmp_path / "out", sparse, sparse.config)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20)).astype(np.int32)
    assert folder.check(tokens, lines.append), lines
    assert "as mixtral after rewriting" in lines[0]


@functools.cache
def logprobs(tokens):
    """Of every token but the first, by the model of the folder 'mixtral'. Tokens that are asked for
    again are not computed again.
    """
    logits = our_logits(WINDOWED, Held(WINDOWED).leaves, np.array([tokens], np.int32))
    logits = logits[0].astype(np.float64)
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [float(normal[i, t]) for i, t in enumerate(tokens[1:])]


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as OpenAI's completions do, with the log-probabilities of a model."""

    off = 0.0
    asked = None

    def do_GET(self):
        self.answer({"data": [{"id": "ours"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked = asked
        found = logprobs(tuple(asked["prompt"]))
        given = [None, *(value + self.off for value in found), -1.0]
        self.answer({"choices": [{"logprobs": {"token_logprobs": given}}]})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    """A server on this machine; it yields its class and its URL."""

    class Own(Server):
        pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield Own, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_an_endpoint(server, folders, tmp_path, capsys):
    kind, url = server
    (tmp_path / "tokens.json").write_text(json.dumps([[5, 9, 2, 40, 17, 3, 88, 4]] * 2))
    flags = [f"--endpoint={url}/v1", f"--tokens={tmp_path / 'tokens.json'}"]
    code, said = check(capsys, folders / "mixtral", *flags)
    assert code == 0, said
    assert "ours at the endpoint: log-probabilities of 14 tokens differ by" in said
    assert kind.asked["prompt"] == [5, 9, 2, 40, 17, 3, 88, 4]
    assert (kind.asked["echo"], kind.asked["model"]) == (True, "ours")
    kind.off = 0.2
    code, said = check(capsys, folders / "mixtral", *flags)
    assert code == 1, said
    assert "differ by 0.2 on average" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--endpoint=ftp://here"], "is no URL"),
        (["--endpoint=http://127.0.0.1:9"], "cannot be reached"),
        (["--served=/nowhere"], "/nowhere does not exist"),
        (["--served=.", "--length=1"], "--length must be at least 2"),
    ],
)
def test_bad_input_is_one_error(flags, message, folders, capsys):
    code, said = check(capsys, folders / "mixtral", *flags)
    assert (code, message in said) == (2, True), said


@pytest.mark.parametrize("content", ["[]", "[[1, 2], [3]]", '[["a", "b"]]', "{", "[1, 96]", "[1]"])
def test_bad_tokens(content, folders, tmp_path, capsys):
    (tmp_path / "tokens.json").write_text(content)
    flags = [f"--served={folders / 'mixtral'}", f"--tokens={tmp_path / 'tokens.json'}"]
    code, said = check(capsys, folders / "mixtral", *flags)
    assert code == 2, said
    assert "tokens.json" in said


def test_a_checkpoint_must_be_named(capsys):
    assert verify.main(["--served=/nowhere"]) == 2
    assert "name it, as in verify PATH" in capsys.readouterr().err
