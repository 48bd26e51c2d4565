"""SeqIO tasks and mixtures, importable as `upcycle_jax.tasks` only: SeqIO registries break when a
module has two names.

`SHIPPED` says which module registers which names, so that a shipped task is found without naming
its module.
"""

if __name__ != "upcycle_jax.tasks":
    raise ImportError(
        f"this package was imported as '{__name__}': import it as 'upcycle_jax.tasks' (for example"
        " MIXTURE_OR_TASK_MODULE = 'upcycle_jax.tasks.embedded_text'), because a SeqIO task may be"
        " registered under one module name only; install the checkout with `pip install -e .`"
    )

_OBJECTIVES = ("span_corruption", "prefix_lm", "ul2")

SHIPPED = {
    "upcycle_jax.tasks.embedded_text": tuple(
        f"{domain}_{objective}"
        for objective in _OBJECTIVES
        for domain in ("embedded_text", "python_source", "documentation_prose")
    ),
    "upcycle_jax.tasks.offline_suite": (
        "offline_suite_finetune",
        *(f"offline_suite_{name}" for name in ("package", "keyword", "match", "choice", "default")),
    ),
    "upcycle_jax.tasks.c4": ("c4_span_corruption", "c4_v220_span_corruption"),
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
"""Names that each module registers; those of `super_glue` and `c4_v220_span_corruption` need the
package t5.
"""
