"""SeqIO tasks and mixtures, importable as `upcycle_jax.tasks` only: SeqIO registries break when a module has two names."""
