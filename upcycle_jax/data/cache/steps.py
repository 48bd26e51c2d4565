"""Which of a SeqIO task's steps run before its examples are cached, and what is left to do when
they are read.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from upcycle_jax.data import fingerprints
from upcycle_jax.data.cache.views import APPEND_EOS, APPEND_EOS_AFTER_TRIM, DENOISE
from upcycle_jax.data.objectives import numpy as numpy_objectives
from upcycle_jax.data.objectives import preprocessors

# Does what ours does (tests/data/objectives/test_tf_spans.py), but for documents above 65,536
# tokens, which it cuts. By name, as t5 need not be installed.
_T5_SPAN_CORRUPTION = "t5.data.preprocessors.span_corruption"
_IGNORED_KEYWORDS = frozenset({"documents_per_group", "merge_examples_to_reduce_padding"})


@dataclasses.dataclass(frozen=True)
class Division:
    """How a task's steps divide.

    Attributes:
      steps: what is left to do when an example is read, as `views` knows it.
      frozen: steps after the place for caching that can only run in SeqIO: they run once, and their
        random choices are the same in every epoch. Empty where all are known. With any, no step is
        left.
    """

    steps: tuple[dict[str, Any], ...]
    frozen: tuple[str, ...]


def _place(step: Any) -> str:
    return f"{getattr(step, '__module__', '')}.{getattr(step, '__name__', type(step).__name__)}"


def _unwrapped(step: Any) -> tuple[Any, dict[str, Any]]:
    """A step and the keywords that partial application gave it."""
    keywords: dict[str, Any] = {}
    while isinstance(step, functools.partial) and not step.args:
        keywords = {**step.keywords, **keywords}
        step = step.func
    return step, keywords


def _ids(text: str, vocabulary: seqio.Vocabulary) -> tuple[int, ...]:
    return tuple(vocabulary.encode(text)) if text else ()


def _denoise(
    denoisers: Sequence[preprocessors.Denoiser], features: Mapping[str, seqio.Feature]
) -> dict[str, Any] | None:
    vocabulary = features["targets"].vocabulary  # of the text, which denoisers take as targets
    described = []
    for denoiser in denoisers:
        if isinstance(denoiser, preprocessors.SpanDenoiser):
            noise: numpy_objectives.Noise = numpy_objectives.SpanNoise(
                noise_density=denoiser.noise_density,
                mean_noise_span_length=denoiser.mean_noise_span_length,
                prefix=denoiser.prefix,
                prefix_ids=_ids(denoiser.prefix, vocabulary),
                weight=denoiser.weight,
            )
        elif isinstance(denoiser, preprocessors.PrefixDenoiser):
            noise = numpy_objectives.PrefixSplit(
                prefix=denoiser.prefix,
                prefix_ids=_ids(denoiser.prefix, vocabulary),
                weight=denoiser.weight,
            )
        else:
            return None
        described.append(numpy_objectives.to_json(noise))
    return {"step": DENOISE, "denoisers": described}


def _known(step: Any, features: Mapping[str, seqio.Feature]) -> dict[str, Any] | None:
    """A step after the place for caching as it is done when an example is read; None for one that
    is not known here.
    """
    function, keywords = _unwrapped(step)
    keywords = {
        name: value
        for name, value in keywords.items()
        if name not in _IGNORED_KEYWORDS or not value
    }
    if function is seqio.preprocessors.append_eos and not keywords:
        return {"step": APPEND_EOS}
    if function is seqio.preprocessors.append_eos_after_trim and not keywords:
        return {"step": APPEND_EOS_AFTER_TRIM}
    corrupts = function is preprocessors.span_corruption or _place(function) == _T5_SPAN_CORRUPTION
    if corrupts and keywords.keys() <= {"noise_density", "mean_noise_span_length"}:
        return _denoise((preprocessors.SpanDenoiser(**keywords),), features)
    if function is preprocessors.prefix_lm and not keywords:
        return _denoise((preprocessors.PrefixDenoiser(),), features)
    if function is preprocessors.language_modeling and not keywords:
        rows = numpy_objectives.CausalRows(preprocessors.end_of_documents(features))
        return {"step": DENOISE, "denoisers": [numpy_objectives.to_json(rows)]}
    if function is preprocessors.ul2 and not keywords:
        return _denoise(preprocessors.UL2_DENOISERS, features)
    if function is preprocessors.denoise and keywords.keys() == {"denoisers"}:
        return _denoise(keywords["denoisers"], features)
    return None


def divide(task: seqio.Task) -> Division:
    """Divides a task's steps at its `CacheDatasetPlaceholder`; without one, nothing is left to do
    when an example is read.
    """
    places = [
        number
        for number, step in enumerate(task.preprocessors)
        if isinstance(step, seqio.CacheDatasetPlaceholder)
    ]
    if not places:
        return Division((), tuple(fingerprints.preprocessors(task)))
    after = task.preprocessors[places[0] + 1 :]
    known = [_known(step, task.output_features) for step in after]
    late_noise = any(step is not None and step["step"] == DENOISE for step in known[1:])
    if None in known or late_noise:
        return Division((), tuple(fingerprints.preprocessors(task)[places[0] + 1 :]))
    return Division(tuple(step for step in known if step is not None), ())


def vocabulary(vocab: seqio.Vocabulary) -> dict[str, Any]:
    """What a machine without SeqIO has to know of a vocabulary."""
    described = {
        **fingerprints.vocabulary(vocab),
        "eos_id": vocab.eos_id,
        "unk_id": vocab.unk_id,
        "extra_ids": int(vocab.extra_ids),
    }
    path = getattr(vocab, "sentencepiece_model_file", getattr(vocab, "path", None))
    return {**described, "path": str(path)} if path is not None else described
