"""A suite of labelled tasks in text-to-text form that needs no download: classification, matching,
multiple choice, short answers.

Its labels are facts that the Python environment states (`python_labels`), so it differs between
environments: its sha256 is part of a run's data fingerprint. Byte vocabulary with 100 sentinels,
unless VOCABULARY names another. Inputs have at most 400 characters, answers 24.

Registers `offline_suite_package` (of which package is a paragraph of documentation; 7 classes),
`offline_suite_keyword` (which keyword is missing in code; 11), `offline_suite_match` (does a
description belong to a function; yes or no), `offline_suite_choice` (which of four descriptions
does; A to D), `offline_suite_default` (what is a parameter's default value; free text), and their
mixture at equal rates, `offline_suite_finetune`. The classes are bound in the post-processors,
where rank classification finds them.
"""

import functools

import seqio

from upcycle_jax.data import sources
from upcycle_jax.tasks import label_metrics, python_labels

VOCABULARY = seqio.ByteVocabulary(extra_ids=100)
MIXTURE = "offline_suite_finetune"

for _name, _labels in python_labels.LABELS.items():
    _classes = _labels.classes
    seqio.TaskRegistry.add(
        f"offline_suite_{_name}",
        source=sources.LabelledSource(_labels.pairs),
        preprocessors=[
            functools.partial(seqio.preprocessors.tokenize, with_eos=False),
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=sources.output_features(VOCABULARY),
        postprocess_fn=(
            functools.partial(label_metrics.label_to_class, label_classes=_classes)
            if _classes
            else None
        ),
        metric_fns=(
            [label_metrics.accuracy, label_metrics.macro_f1]
            if _classes
            else [label_metrics.exact_match, label_metrics.word_f1]
        ),
    )

seqio.MixtureRegistry.add(
    MIXTURE, [(f"offline_suite_{_name}", 1.0) for _name in python_labels.LABELS]
)
