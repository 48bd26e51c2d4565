"""SeqIO tasks and mixtures, importable as `upcycle_jax.tasks` only: SeqIO registries break when a
module has two names.

`upcycle_jax.data.shipped_tasks` lists which module registers which names, so that a shipped task is
found without naming its module.
"""

if __name__ != "upcycle_jax.tasks":
    raise ImportError(
        f"this package was imported as '{__name__}': import it as 'upcycle_jax.tasks' (for example"
        " MIXTURE_OR_TASK_MODULE = 'upcycle_jax.tasks.embedded_text'), because a SeqIO task may be"
        " registered under one module name only; install the checkout with `pip install -e .`"
    )
