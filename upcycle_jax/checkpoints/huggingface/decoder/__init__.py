"""Folders of decoder-only language models, dense and with MoE layers."""
