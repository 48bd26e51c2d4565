"""How much memory a train step's activations take, from its trace alone: nothing is compiled and no
device is needed.

Autodiff says which arrays the backward pass needs. Where layers are not rematerialised, XLA
computes cheap elementwise results again rather than keep them, so what counts is what is left when
only results of matrix products may be kept. Where REMAT_POLICY says what is kept, that is what
counts.

`models.step_memory` answers for the other compiler: it counts every array that autodiff keeps, as
XLA's programs for CPUs do (compared in tests/models/test_accounting_xla.py), and needs no trace.
Programs for TPUs keep less, which is what a plan is about (compared in
tests/planning/test_estimate.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from upcycle_jax import trees
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.planning.compilation import Workload


def activation_bytes(workload: Workload) -> int:
    """Bytes on one device that the backward pass of one microbatch needs from the forward pass.

    Arrays of the residual stream (their last axis is emb_dim) are whole on each model partition,
    all others are divided over them.
    """
    model, partitioner = workload.model, workload.partitioner
    microbatches = workload.trainer.num_microbatches or 1
    kept = _kept(
        model,
        workload.batch_size // microbatches,
        dict(workload.task_feature_lengths),
        packed=workload.packed,
    )
    total = 0.0
    for aval in kept:
        nbytes = int(np.prod(aval.shape, dtype=np.int64)) * aval.dtype.itemsize
        is_stream = bool(aval.shape) and aval.shape[-1] == model.config.emb_dim
        total += nbytes / (1 if is_stream else partitioner.num_model_partitions)
    return round(total / partitioner.num_data_shards)


def _kept(
    model: EncoderDecoderModel, batch_size: int, lengths: dict[str, int], *, packed: bool
) -> list[Any]:
    """Shapes of what is kept, whole batch; parameters, tokens and what follows from parameters
    alone are left out.
    """
    params = trees.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in model.param_specs().items()
        }
    )
    specs = model.input_specs(batch_size, lengths, packed=packed)
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in specs.items()}

    def loss(params: Any, batch: Any) -> jax.Array:
        return model.loss_fn(
            params, batch, None, denominator=jnp.ones((), jnp.float32), aux_scale=1.0
        )[0]

    if model.config.remat_policy == "none":
        loss = jax.checkpoint(loss, policy=jax.checkpoint_policies.dots_saveable)
    traced = jax.make_jaxpr(lambda params, batch: jax.vjp(lambda p: loss(p, batch), params))(
        params, batch
    ).jaxpr
    num_params = len(jax.tree.leaves(params))
    inputs = set(traced.invars)
    depends_on_batch = set(traced.invars[num_params:])
    for equation in traced.eqns:
        if any(isinstance(var, core.Var) and var in depends_on_batch for var in equation.invars):
            depends_on_batch.update(equation.outvars)
    outputs = [
        var
        for var in dict.fromkeys(v for v in traced.outvars if isinstance(v, core.Var))
        if var not in inputs
    ]
    return [var.aval for var in outputs if var in depends_on_batch]
