"""What a GGUF file says beside its parameters, as a Hugging Face folder says it."""

from typing import Any

from upcycle_jax.checkpoints.gguf.files import GgufFile
from upcycle_jax.checkpoints.gguf.tokenizer import tokenizer_files

_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
"""Keys of config.json -> those of the metadata, below tokenizer.ggml."""

_FURTHER_ENDS = ("eot_token_id", "eom_token_id")
"""Keys, likewise, of tokens that end a turn of a chat, at which llama.cpp stops as well."""


def config_keys(file: GgufFile) -> dict[str, Any]:
    """What config.json says of its type, positions and special tokens; of any content, like the
    file.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    keys = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _TOKENS.items()}
    ends = [keys["eos_token_id"], *(metadata.get(f"tokenizer.ggml.{key}") for key in _FURTHER_ENDS)]
    different = list(dict.fromkeys(one for one in ends if isinstance(one, int)))
    if len(different) > 1:
        keys["eos_token_id"] = different
    keys["model_type"] = architecture
    keys["max_position_embeddings"] = metadata.get(f"{architecture}.context_length")
    return {name: value for name, value in keys.items() if value is not None}


def carried_texts(file: GgufFile, vocab_size: int) -> dict[str, str]:
    """Content of the tokenizer's files, by name; `vocab_size` are the rows of the embedding.

    Raises:
      ValueError: see `tokenizer.tokenizer_files`.
    """
    return tokenizer_files(file.metadata, file.path, vocab_size)
