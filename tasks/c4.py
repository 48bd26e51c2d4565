"""C4 span corruption, the paper's pre-training task. The data come from TFDS: prepare them, or name
their folder with --tfds_data_dir.

Registers `c4_span_corruption` (TFDS c4/en:3.1.0, the version that TFDS prepares today) with this
project's own preprocessors; and, where the package `t5` is installed, T5's own
`c4_v220_span_corruption` (c4/en:2.2.0, on which the paper's checkpoints were trained). Vocabulary:
T5's 32,000 pieces and 100 sentinels at gs://t5-data, unless VOCABULARY names a local copy.
"""

import functools
import importlib.util

import seqio

from upcycle_jax.data import sources
from upcycle_jax.data.objectives import preprocessors

T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"

seqio.TaskRegistry.add(
    "c4_span_corruption",
    source=seqio.TfdsDataSource(tfds_name="c4/en:3.1.0"),
    preprocessors=[
        functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
        sources.tokenize,
        seqio.CacheDatasetPlaceholder(),
        preprocessors.span_corruption,
        seqio.preprocessors.append_eos_after_trim,
    ],
    output_features=sources.output_features(seqio.SentencePieceVocabulary(T5_VOCABULARY)),
    metric_fns=[],
)

if importlib.util.find_spec("t5") is not None:
    importlib.import_module("t5.data.tasks")
