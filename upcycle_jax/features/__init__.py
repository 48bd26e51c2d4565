"""From examples of tasks to batches of model features, one converter for each kind of model."""

from upcycle_jax.features.base import (
    Example,
    FeatureConverter,
    HostBatch,
    Lengths,
    check_all_read,
    check_lengths,
    check_task,
    num_rows,
    token_features,
)
from upcycle_jax.features.decoder_only import DecoderOnlyFeatures
from upcycle_jax.features.encoder_decoder import EncoderDecoderFeatures

__all__ = [
    "DecoderOnlyFeatures",
    "EncoderDecoderFeatures",
    "Example",
    "FeatureConverter",
    "HostBatch",
    "Lengths",
    "check_all_read",
    "check_lengths",
    "check_task",
    "num_rows",
    "token_features",
]
