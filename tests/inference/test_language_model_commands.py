"""`eval` and `infer` with a decoder-only language model, which is a folder that transformers wrote:
no model file says what it is.
"""

import json
import math
import pathlib
import sys

import numpy as np
import pytest

from tests.checkpoints.huggingface.decoder import oracle
from upcycle_jax import eval as eval_command
from upcycle_jax import infer as infer_command
from upcycle_jax.inference import running

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_tasks

pytestmark = pytest.mark.usefixtures("shared_programs")
Runner = running.Runner
BOS, EOS, NEW = 2, 1, 8
LENGTHS = {"inputs": 40, "targets": NEW}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model over the 259 ids of bytes, and its folder."""
    settings = {"vocab_size": 259, "bos_token_id": BOS, "eos_token_id": EOS}
    model = oracle.random_model("llama", settings)
    folder = tmp_path_factory.mktemp("lm") / "folder"
    model.save_pretrained(folder)
    return model, folder


def flags(run, folder, out, *bindings):
    given = (
        f"CHECKPOINT_PATH='{folder}'",
        f"{'EVAL' if run == 'eval_lm' else 'INFER'}_OUTPUT_DIR='{out}'",
        f"BOS_ID={BOS}",
        "ACTIVATION_DTYPE='float32'",
        "BATCH_SIZE=8",
        f"TASK_FEATURE_LENGTHS={LENGTHS}",
        "MIXTURE_OR_TASK_NAME='small_parity'",
    )
    return [f"--gin_file=runs/{run}.gin", *(f"--gin.{text}" for text in (*given, *bindings))]


def infer(folder, out, *bindings):
    """Exit code, and the rows that were written."""
    code = infer_command.main(flags("infer_lm", folder, out, *bindings))
    found = sorted(out.glob("*.jsonl-*"))
    return code, [json.loads(line) for path in found for line in path.read_text().splitlines()]


def ids_of(text):
    return [byte + 3 for byte in text.encode()]


def log_probability(model, prompt, target):
    """Of the target after BOS and the prompt."""
    ids = [BOS, *prompt, *target]
    logits = oracle.logits_of(model, [ids])[0].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return sum(logits[len(prompt) + i, token] for i, token in enumerate(target))


def test_perplexities_are_those_of_the_scores(written, tmp_path, capsys):
    model, folder = written
    score = "MODE='score'"
    code, scored = infer(folder, tmp_path / "scores", score)
    assert code == 0 and len(scored) == small_tasks.NUM_EXAMPLES
    # The task's inputs end with EOS, too.
    want = log_probability(model, [*ids_of("small_parity 3"), EOS], [*ids_of("odd"), EOS])
    assert scored[3]["score"] == pytest.approx(want, abs=1e-3)

    code = eval_command.main(flags("eval_lm", folder, tmp_path, "NUM_EXAMPLES=2"))
    assert code == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    # 6 times "even", 5 times "odd", each a word and EOS.
    text_bytes, words = 6 * 4 + 5 * 3, 11
    total = -sum(line["score"] for line in scored)
    expected = {
        "perplexity": math.exp(total / (text_bytes + 11)),
        "bits_per_byte": total / text_bytes / math.log(2),
        "byte_perplexity": math.exp(total / text_bytes),
        "word_perplexity": math.exp(total / words),
    }
    for name, value in expected.items():
        assert row[f"teacher_forced/{name}"] == pytest.approx(value, rel=1e-3), name
    assert row["mean_score"] == pytest.approx(np.mean([r["score"] for r in scored[:2]]), abs=1e-3)


def generated(model, prompt):
    """The text that transformers produces."""
    torch, _ = oracle.torch_and_transformers()
    with torch.no_grad():
        out = model.generate(
            torch.tensor([[BOS, *prompt]]),
            attention_mask=torch.ones((1, 1 + len(prompt)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, 1 + len(prompt) :].tolist()
    return small_tasks.VOCABULARY.decode(out)


def test_predictions_are_generated_interrupted_or_not(written, tmp_path, monkeypatch):
    model, folder = written
    code, whole = infer(folder, tmp_path / "whole")
    assert code == 0 and len(whole) == small_tasks.NUM_EXAMPLES
    for number in (0, 10):
        prompt = [*ids_of(f"small_parity {number}"), EOS]
        assert whole[number]["prediction"] == generated(model, prompt)

    predict, calls = Runner.predict, []

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, *arguments)

    monkeypatch.setattr(Runner, "predict", stops)
    often = "CHECKPOINT_PERIOD=1"
    with pytest.raises(KeyboardInterrupt):
        infer(folder, tmp_path / "resumed", often)
    assert infer(folder, tmp_path / "resumed", often) == (0, whole)
    assert len(calls) == 3


def test_answers_are_ranked_after_solved_examples(written, tmp_path):
    model, folder = written
    code, rows = infer(
        folder,
        tmp_path,
        "MODE='rank'",
        "RANK_OPTIONS=('even', 'odd')",
        "FEW_SHOT=@FewShot()",
        "FewShot.num_shots=1",
        "FewShot.separator='; '",
    )
    assert code == 0
    prompt = rows[7]["inputs"]["inputs_pretokenized"]
    shot, query = prompt.split("; ")
    assert query == "small_parity 7" and shot.startswith("small_parity ") and " " in shot
    scores = {
        text: log_probability(model, [*ids_of(prompt), EOS], [*ids_of(text), EOS])
        for text in ("even", "odd")
    }
    assert rows[7]["options"] == pytest.approx(scores, abs=1e-3)
    assert rows[7]["prediction"] == max(scores, key=scores.get)
