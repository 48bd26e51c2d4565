"""Microbatches may not change what is routed together without a word."""

import pytest

from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.training.prepare import check_groups
from upcycle_jax.training.train_settings import TrainSettings


@pytest.fixture
def settings(bags, tmp_path):
    """A run of 8 rows of 16 and 4 tokens, with experts in every layer of both stacks."""

    def make(microbatches, *, trainer=None, dense=False, **moe):
        config = T5Config(
            vocab_size=64,
            emb_dim=8,
            num_heads=2,
            num_encoder_layers=2,
            num_decoder_layers=2,
            head_dim=4,
            mlp_dim=16,
            moe=None if dense else MoeConfig(**{"num_experts": 4, **moe}),
        )
        data = bags.Dataset(batch_size=8, task_feature_lengths={"inputs": 16, "targets": 4})
        return TrainSettings(
            model=EncoderDecoderModel(config),
            model_dir=tmp_path / "run",
            train_dataset_cfg=data,
            train_eval_dataset_cfg=data,
            partitioner=bags.one_device,
            trainer=bags.trainer(num_microbatches=microbatches, **(trainer or {})),
            total_steps=1,
        )

    return make


def test_groups_larger_than_a_microbatch_are_refused_with_the_size_that_does(settings):
    # 128 and 32 tokens are one group each; a microbatch has 32 and 8.
    message = (
        r"NUM_MICROBATCHES=4 changes routing: the encoder's batch is routed in groups of 128"
        r" tokens, a microbatch of 2 rows in groups of 32; the decoder's .* of 32 tokens, .* in"
        r" groups of 8\. Set GROUP_SIZE .*\(GROUP_SIZE=8 divides them\)"
    )
    with pytest.raises(ValueError, match=message):
        check_groups(settings(4))
    check_groups(settings(4, group_size=8))


def test_only_the_stack_with_experts_counts(settings):
    with pytest.raises(ValueError, match="GROUP_SIZE=32 divides"):
        check_groups(settings(4, num_decoder_sparse_layers=0))
    check_groups(settings(4, num_decoder_sparse_layers=0, group_size=32))


@pytest.mark.parametrize(("microbatches", "dense"), [(None, False), (1, False), (4, True)])
def test_without_microbatches_or_experts_there_is_nothing_to_refuse(microbatches, dense, settings):
    check_groups(settings(microbatches, dense=dense))


@pytest.mark.parametrize(
    "asked", [{"trainer": {"microbatch_groups": "of_microbatch"}}, {"t5x_mode": True}], ids=str
)
def test_other_groups_are_taken_where_asked_for_and_said(asked, settings, caplog):
    check_groups(settings(4, **asked))
    assert "NUM_MICROBATCHES=4 changes routing" in caplog.text
    assert "not those of the whole batch" in caplog.text


def test_a_setting_that_does_not_exist_is_refused(bags):
    with pytest.raises(ValueError, match="must be 'of_batch' or 'of_microbatch'"):
        bags.trainer(microbatch_groups="none")
