"""Predictions of decoder-only models are those of transformers' `generate`."""

import jax
import numpy as np
import pytest

from tests.checkpoints.huggingface.decoder import oracle
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.features import DecoderOnlyFeatures
from upcycle_jax.inference.decoding import Greedy
from upcycle_jax.models.decoder.model import DecoderModel

BOS, EOS, PAD = 1, 2, 0
LENGTHS, NEW = (9, 2, 6), 10
PROMPTS = [
    [BOS, *row[: length - 1]]
    for row, length in zip(
        np.random.default_rng(0).integers(3, 64, (3, 9)).tolist(), LENGTHS, strict=True
    )
]


def generated(model, eos=EOS, **settings):
    """`[B, NEW]` of transformers: padding stands before shorter prompts, and follows EOS."""
    torch, _ = oracle.torch_and_transformers()
    width = max(LENGTHS)
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=PAD,
            eos_token_id=eos,
            **settings,
        )[:, width:].numpy()
    return np.pad(out, ((0, 0), (0, NEW - out.shape[1])))


def predicted(folder, decoder, eos=EOS):
    reader = open_checkpoint(folder)
    params = {path.removeprefix("target/"): reader.read(path) for path in reader.specs()}
    model = DecoderModel(reader.model_config(), features=DecoderOnlyFeatures(bos_id=BOS))
    examples = [{"inputs": prompt[1:], "targets": []} for prompt in PROMPTS]
    batch = model.features.pad(examples, {"inputs": 12, "targets": NEW}, len(PROMPTS))
    run = jax.jit(
        lambda params, batch: model.predict_batch(
            params, batch, decoder=decoder, eos_id=eos, max_length=NEW
        )
    )
    return np.asarray(run(trees.unflatten(params), batch))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The model of a case, whose sequences may end, and its folder."""

    def one(name):
        torch, _ = oracle.torch_and_transformers()
        model = oracle.random_model(*oracle.CASES[name], seed=1)
        with torch.no_grad():
            model.get_output_embeddings().weight[EOS] *= 1.5
        folder = tmp_path_factory.mktemp("generate") / name
        model.save_pretrained(folder)
        return model, folder

    return one


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "smollm3", "mixtral"])
def test_greedy_predictions_are_those_of_generate(written, name):
    theirs, folder = written(name)
    np.testing.assert_array_equal(predicted(folder, Greedy()), generated(theirs))


def test_any_of_several_ids_ends_a_prediction(written):
    theirs, folder = written("llama")
    # The tokens that stand second without an end: each row ends there, at the latest.
    ends = [EOS, *sorted(set(generated(theirs, eos=None)[:, 1].tolist()) - {EOS})]
    want = generated(theirs, eos=ends)
    assert len(ends) > 2 and np.isin(want[:, :2], ends).any(axis=1).all()
    np.testing.assert_array_equal(predicted(folder, Greedy(), tuple(ends)), want)
