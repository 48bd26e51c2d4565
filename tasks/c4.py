"""C4 span corruption, the paper's pre-training task. The data come from TFDS: prepare them, or name
their folder with --tfds_data_dir.

Registers `c4_span_corruption` and, for decoder-only models, `c4_language_modeling` (TFDS
c4/en:3.1.0, the version that TFDS prepares today) with this project's own preprocessors; and, where
the package `t5` is installed, T5's own `c4_v220_span_corruption` (c4/en:2.2.0, on which the paper's
checkpoints were trained). Vocabulary: T5's 32,000 pieces and 100 sentinels at gs://t5-data, unless
VOCABULARY names a local copy.
"""

import functools
import importlib.util

import seqio

from upcycle_jax.data import sources
from upcycle_jax.data.config import LANGUAGE_MODELING

T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"

for _objective in ("span_corruption", LANGUAGE_MODELING):
    _features = sources.row_features if sources.in_rows(_objective) else sources.output_features
    seqio.TaskRegistry.add(
        f"c4_{_objective}",
        source=seqio.TfdsDataSource(tfds_name="c4/en:3.1.0"),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            sources.tokenize,
            *sources.objective_steps(_objective),
        ],
        output_features=_features(seqio.SentencePieceVocabulary(T5_VOCABULARY)),
        metric_fns=[],
    )

if importlib.util.find_spec("t5") is not None:
    importlib.import_module("t5.data.tasks")
