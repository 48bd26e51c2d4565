"""From examples of tasks to batches of model features, one converter for each kind of model."""

from upcycle_jax.features.base import (
    Example,
    FeatureConverter,
    HostBatch,
    Lengths,
    check_lengths,
    num_rows,
)
from upcycle_jax.features.encoder_decoder import EncoderDecoderFeatures

__all__ = [
    "EncoderDecoderFeatures",
    "Example",
    "FeatureConverter",
    "HostBatch",
    "Lengths",
    "check_lengths",
    "num_rows",
]
