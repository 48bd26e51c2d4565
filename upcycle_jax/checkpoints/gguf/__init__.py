"""GGUF files, as llama.cpp and its tools write them, read as if they were checkpoints of ours."""
