"""A tiny T5, and what a step of it costs."""

import jax
import pytest

from upcycle_jax.costs import step
from upcycle_jax.costs.shapes import StepShape
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.partitioning import Partitioner


@pytest.fixture
def tiny(tiny):
    """Makes models of tiny configs."""
    return lambda **settings: EncoderDecoderModel(tiny(**settings))


@pytest.fixture
def costs_of():
    """Costs of a step of a model on rows of so many input and target tokens, on one device."""

    def count(model, rows, inputs, targets, partitioner=None, num_microbatches=1):
        shape = StepShape(
            batch_size=rows,
            lengths={"inputs": inputs, "targets": targets},
            num_microbatches=num_microbatches,
        )
        one = partitioner or Partitioner(devices=(jax.devices()[0],))
        return step.of_step(model, shape, one)

    return count
