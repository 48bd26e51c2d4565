"""The integer arithmetic of span corruption against hand-worked cases and published settings."""

import pytest

from upcycle_jax.data.objectives import arithmetic


def test_counts_of_a_hand_worked_segment():
    # 20 tokens at density 0.15: 3 noise tokens, in round(3 / 3) = 1 span. Inputs: 17 kept + 1
    #   sentinel + EOS; targets: 3 + 1 + EOS.
    assert arithmetic.span_counts(20) == arithmetic.SpanCounts(
        noise_tokens=3, spans=1, inputs=19, targets=5
    )


def test_t5_pretraining_lengths():
    # T5's own setting: 512 inputs come from 568 tokens and give 114 targets.
    lengths = arithmetic.span_lengths(512)
    assert (lengths.raw, lengths.inputs, lengths.targets) == (568, 512, 114)


@pytest.mark.parametrize("inputs_length", [3, 4, 16, 63, 64, 511, 1024])
def test_lengths_are_the_longest_that_fit(inputs_length):
    lengths = arithmetic.span_lengths(inputs_length)
    assert lengths.inputs <= inputs_length
    assert arithmetic.span_counts(lengths.raw + 1).inputs > inputs_length


@pytest.mark.parametrize("length", range(1, 60))
@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.95])
def test_counts_always_leave_text_and_noise(length, density):
    counts = arithmetic.span_counts(length, noise_density=density)
    assert 1 <= counts.spans <= counts.noise_tokens <= max(length, 2) - counts.spans


def test_bad_settings_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match=r"noise_density is 1\.5.*below 1"):
        arithmetic.span_counts(10, noise_density=1.5)
    with pytest.raises(ValueError, match=r"mean_noise_span_length is 0\.5.*1 or more"):
        arithmetic.span_counts(10, mean_noise_span_length=0.5)
    with pytest.raises(ValueError, match=r"'inputs'\] is 2: .*at least 3"):
        arithmetic.span_lengths(2)
