"""Real text of two clearly different domains that needs no download: Python source, and
documentation prose.

The default data of the quickstart and of tests. Both are made of what is installed, so they differ
between environments: their sha256 is part of a run's data fingerprint. Byte vocabulary with 100
sentinels (359 ids).

Registers, for each objective (span_corruption, prefix_lm, ul2, language_modeling):
`python_source_<objective>`, `documentation_prose_<objective>`, and their mixture at equal rates,
`embedded_text_<objective>`. Language modelling reads whole documents, the others passages of them.
"""

import functools

import seqio

from upcycle_jax.data import sources
from upcycle_jax.data.objectives import preprocessors
from upcycle_jax.tasks import python_environment

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)

_LOADERS = {
    "python_source": python_environment.python_source,
    "documentation_prose": python_environment.documentation_prose,
}
SOURCES = {domain: sources.CorpusSource(load) for domain, load in _LOADERS.items()}
WHOLE = {
    domain: sources.CorpusSource(functools.partial(load, whole_documents=True))
    for domain, load in _LOADERS.items()
}

for _objective in preprocessors.OBJECTIVES:
    for _domain, _source in (WHOLE if sources.in_rows(_objective) else SOURCES).items():
        _name = f"{_domain}_{_objective}"
        seqio.TaskRegistry.add_provider(
            _name, sources.language_model_task(_name, _source, VOCABULARY, objective=_objective)
        )
    seqio.MixtureRegistry.add(
        f"embedded_text_{_objective}", [(f"{_domain}_{_objective}", 1.0) for _domain in SOURCES]
    )
