"""Span corruption over two real and clearly different domains that need no download: Python source, and documentation prose.

The default data of the quickstart and of tests. Both are made of what is installed, so they differ between environments: their sha256
is part of a run's data fingerprint. Byte vocabulary with 100 sentinels (359 ids).
"""

import seqio

from upcycle_jax.data import sources
from upcycle_jax.tasks import python_environment

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)

for _name, _load in (
    ("python_source_span_corruption", python_environment.python_source),
    ("documentation_prose_span_corruption", python_environment.documentation_prose),
):
    seqio.TaskRegistry.add_provider(_name, sources.language_model_task(_name, sources.CorpusSource(_load), VOCABULARY))

seqio.MixtureRegistry.add(
    "embedded_text_span_corruption",
    [("python_source_span_corruption", 1.0), ("documentation_prose_span_corruption", 1.0)],
)
