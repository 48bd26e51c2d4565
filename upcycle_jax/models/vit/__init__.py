"""Vision transformers that classify images, dense or with MoE layers."""
