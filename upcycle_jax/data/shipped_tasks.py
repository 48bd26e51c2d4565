"""Which modules of this project register which SeqIO tasks and mixtures, so that one is found by
its name alone. A module is imported when a name of it is asked for.
"""

from upcycle_jax.data.config import OBJECTIVE_NAMES

MODULES = {
    "upcycle_jax.tasks.embedded_text": tuple(
        f"{domain}_{objective}"
        for objective in OBJECTIVE_NAMES
        for domain in ("embedded_text", "python_source", "documentation_prose")
    ),
    "upcycle_jax.tasks.offline_suite": (
        "offline_suite_finetune",
        *(f"offline_suite_{name}" for name in ("package", "keyword", "match", "choice", "default")),
    ),
    "upcycle_jax.tasks.c4": (
        "c4_span_corruption",
        "c4_language_modeling",
        "c4_v220_span_corruption",
    ),
    "upcycle_jax.tasks.images": ("imagenet2012", "cifar10", "cifar100"),
    "upcycle_jax.tasks.super_glue": (
        "super_glue_v102_proportional",
        *(
            f"super_glue_{name}_v102"
            for name in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "axb", "axg")
        ),
        "super_glue_wsc_v102_simple_train",
        "super_glue_wsc_v102_simple_eval",
    ),
}
"""Names by module; those of `super_glue` and `c4_v220_span_corruption` need the package t5."""


def module_of(name: str) -> str | None:
    """The module that registers `name`, or None."""
    return next((module for module, names in MODULES.items() if name in names), None)


def names() -> tuple[str, ...]:
    """All names."""
    return tuple(name for names in MODULES.values() for name in names)
