"""Which steps of a task are left for reading: known ones by what they are, others are frozen and
named.
"""

import functools
import importlib

import pytest

seqio = pytest.importorskip("seqio", reason="caches are written by SeqIO")

from upcycle_jax.data import sources  # noqa: E402
from upcycle_jax.data.cache.steps import divide  # noqa: E402
from upcycle_jax.data.objectives import preprocessors  # noqa: E402

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)


def task(*steps):
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: None, splits=("train",)
    )
    return seqio.Task(
        "t",
        source=source,
        preprocessors=list(steps),
        output_features=sources.output_features(VOCABULARY),
    )


CACHE = seqio.CacheDatasetPlaceholder()
EOS = seqio.preprocessors.append_eos_after_trim


def kinds(division):
    return [
        [denoiser["kind"] for denoiser in step.get("denoisers", ())] or step["step"]
        for step in division.steps
    ]


def test_objectives_are_known():
    assert kinds(divide(task(sources.tokenize, CACHE, preprocessors.span_corruption, EOS))) == [
        ["span"],
        "append_eos_after_trim",
    ]
    assert kinds(divide(task(sources.tokenize, CACHE, preprocessors.prefix_lm, EOS)))[0] == [
        "prefix"
    ]
    ul2 = divide(task(sources.tokenize, CACHE, preprocessors.ul2, EOS)).steps[0]["denoisers"]
    assert [denoiser["kind"] for denoiser in ul2] == ["span"] * 6 + ["prefix"]
    assert (
        ul2[2]["prefix_ids"] == [byte + 3 for byte in b"[NLG] "] and ul2[2]["noise_density"] == 0.5
    )
    dense = functools.partial(
        preprocessors.span_corruption, noise_density=0.3, documents_per_group=4
    )
    (denoiser,) = divide(task(sources.tokenize, CACHE, dense, EOS)).steps[0]["denoisers"]
    assert (denoiser["noise_density"], denoiser["mean_noise_span_length"]) == (0.3, 3.0)
    own = functools.partial(
        preprocessors.denoise,
        denoisers=(
            preprocessors.SpanDenoiser(0.2, 5.0, weight=2.0),
            preprocessors.PrefixDenoiser(),
        ),
    )
    assert [
        denoiser["weight"] for denoiser in divide(task(CACHE, own, EOS)).steps[0]["denoisers"]
    ] == [2.0, 1.0]


def mine(dataset):
    return dataset


def test_others_are_frozen_and_named():
    division = divide(task(sources.tokenize, CACHE, mine, EOS))
    assert (division.steps, division.frozen) == ((), ("mine", "append_eos_after_trim"))
    assert divide(task(sources.tokenize, EOS)).frozen == ("tokenize", "append_eos_after_trim")
    assert divide(task(CACHE, EOS, preprocessors.span_corruption)).frozen == (
        "append_eos_after_trim",
        "span_corruption",
    )  # noise after EOS
    assert (
        divide(task(sources.tokenize, CACHE)).frozen
        == ()
        == divide(task(sources.tokenize, CACHE)).steps
    )


def test_the_papers_tasks_are_known():
    pytest.importorskip("t5.data.mixtures", reason="t5 is an extra")
    for module in ("c4", "super_glue"):
        importlib.import_module(f"upcycle_jax.tasks.{module}")
    for name in ("c4_span_corruption", "c4_v220_span_corruption"):
        assert kinds(divide(seqio.TaskRegistry.get(name))) == [["span"], "append_eos_after_trim"]
    for mixture_task in seqio.get_subtasks(
        seqio.MixtureRegistry.get("super_glue_v102_proportional")
    ):
        division = divide(mixture_task)
        assert (
            kinds(division) in (["append_eos"], ["append_eos_after_trim"]) and not division.frozen
        )
