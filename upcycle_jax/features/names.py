"""Names that examples and batches share, as SeqIO has them."""

INPUTS, TARGETS = "inputs", "targets"
"""Features of tasks."""
DOCUMENTS = "targets_segment_ids"
"""What an example may say besides its targets, int `[tokens of targets]`: equal for neighbouring
tokens of one document, larger than 0. Without it an example is one document.
"""

DECODER_ONLY = (
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
    "decoder_segment_ids",
    "decoder_positions",
)
"""Features of every batch of a decoder-only model."""
