"""Decoder-only language models: Llama, Qwen, OLMo, Gemma and their kin, dense or with MoE layers."""
