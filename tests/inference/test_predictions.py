"""Which settings of a job of predictions decide what it writes."""

import dataclasses
import json
import types

import pytest

from upcycle_jax.data import DatasetConfig
from upcycle_jax.data.prompts import FewShot
from upcycle_jax.inference.decoding import Greedy, Sampling
from upcycle_jax.inference.predictions import NOT_IN_IDENTITY, Infer
from upcycle_jax.models.t5.config import T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.partitioning import Partitioner

MODEL = EncoderDecoderModel(
    T5Config(
        vocab_size=8,
        emb_dim=4,
        num_heads=1,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=4,
        mlp_dim=8,
    )
)
WIDER = EncoderDecoderModel(dataclasses.replace(MODEL.config, mlp_dim=16))
DATA = DatasetConfig("task", {"inputs": 8, "targets": 4}, batch_size=2)

OTHER = {
    "model": WIDER,
    "dataset_cfg": dataclasses.replace(DATA, batch_size=4),
    "checkpoint_path": "another/checkpoint_7",
    "output_dir": "elsewhere",
    "partitioner": Partitioner(num_model_partitions=2),
    "decoder": Sampling(top_p=0.5),
    "rank_options": ("yes", "no"),
    "few_shot": FewShot(num_shots=1),
    "verify": False,
    "files": {"config.gin": "A = 1"},
    "mode": "score",
    "checkpoint_period": 5,
    "shard_id": 1,
    "num_shards": 2,
    "num_examples": 3,
    "include_all_inputs": True,
    "random_seed": 1,
}
"""Field -> a value that is not that of `job`."""


def job(**settings):
    return Infer(
        **{
            "model": MODEL,
            "dataset_cfg": DATA,
            "checkpoint_path": "run/checkpoint_7",
            "output_dir": "out",
        }
        | settings
    )


def identity(infer, data=None):
    reader = types.SimpleNamespace(path=infer.checkpoint_path, fingerprint=lambda: "f00d")
    return infer.identity(reader, data or {"seed": 0, "versions": {"seqio": "1"}})


def test_every_field_is_of_the_identity_or_of_the_named_list():
    names = [field.name for field in dataclasses.fields(Infer)]
    assert sorted(OTHER) == sorted(names)
    for name in names:
        mode = {"mode": "rank"} if name == "rank_options" else {}
        changes = identity(job(**mode)) != identity(job(**mode | {name: OTHER[name]}))
        assert changes == (name not in NOT_IN_IDENTITY), name


@pytest.mark.parametrize(
    ("mode", "name"), [("score", "decoder"), ("rank", "decoder"), ("predict", "rank_options")]
)
def test_what_a_mode_does_not_ask_does_not_count(mode, name):
    assert identity(job(mode=mode)) == identity(job(mode=mode, **{name: OTHER[name]}))


def test_the_data_counts_but_not_the_versions_of_libraries():
    assert identity(job(), {"seed": 0, "versions": {"seqio": "2"}}) == identity(job())
    assert identity(job(), {"seed": 1}) != identity(job())


def test_the_text_of_an_identity_is_that_of_earlier_versions():
    """Jobs that an earlier version has begun go on."""
    model = json.dumps(repr(MODEL.config.for_inference))
    assert json.dumps(identity(job(decoder=Greedy()))) == (
        '{"mode": "predict", "checkpoint": "run/checkpoint_7", "fingerprint": "f00d",'
        ' "decoder": "Greedy()", "rank_options": null, "few_shot": "None",'
        f' "model": {model}, "task_feature_lengths": {{"inputs": 8, "targets": 4}},'
        ' "split": "train", "batch_size": 2, "checkpoint_period": 100, "num_examples": null,'
        ' "include_all_inputs": false, "random_seed": 0, "data": {"seed": 0}}'
    )
