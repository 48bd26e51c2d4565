"""Decoder-only language models: Llama, Qwen, OLMo, Gemma and kin, dense or with MoE layers."""
