"""T5 1.1 encoder-decoders, dense or with MoE layers in both stacks."""
