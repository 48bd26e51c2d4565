"""What transformers computes from a folder, watched from inside."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax.surgery.served.ours import LayerActivations


class CannotLoad(ValueError):
    """transformers does not load the folder."""


@dataclasses.dataclass(frozen=True)
class TheirRun:
    """A forward pass of transformers, float32.

    Attributes:
      version: of transformers.
      embedded: the residual stream before the first layer, `[B, L, d]`.
      layers: every layer, `[B, L, ...]`.
      logits: `[B, L, V]`.
    """

    version: str
    embedded: np.ndarray
    layers: tuple[LayerActivations, ...]
    logits: np.ndarray


def run(folder: Path, tokens: np.ndarray, num_experts: int | None) -> TheirRun:
    """Loads a folder in float32 and runs it.

    Args:
      folder: local; no code of it is run.
      tokens: int `[B, L]`.
      num_experts: E; None for a dense model.

    Raises:
      CannotLoad: transformers does not load it, or not all of it.
      ValueError: torch or transformers is not installed.
    """
    torch, transformers = _imported()
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            str(folder),
            attn_implementation="eager",  # The others ignore soft-caps.
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # Of any kind: it is their code, and their word on the folder.
        first = str(error).strip().splitlines()
        raise CannotLoad(
            f"transformers {transformers.__version__} does not load {folder}:"
            f" {type(error).__name__}: {first[0] if first else ''}"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise CannotLoad(
                f"transformers {transformers.__version__} finds {what.replace('_', ' ')} in"
                f" {folder}: {', '.join(sorted(map(str, info[what]))[:5])}"
            )
    watched = _Watched(model.eval(), num_experts)
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    shape = (*tokens.shape, -1)
    return TheirRun(
        version=transformers.__version__,
        embedded=watched.embedded,
        layers=watched.activations(shape),
        logits=_array(logits),
    )


def _imported() -> tuple[Any, Any]:
    os.environ.setdefault("USE_TF", "0")  # 4.57 imports TensorFlow, too, where it is installed.
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"--served loads the folder through transformers, which is not installed ({error}):"
            " pip install torch 'transformers>=4.57', or ask an endpoint (--endpoint)"
        ) from None
    return torch, transformers


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().to("cpu").float().numpy())


class _Watched:
    """Hooks on the layers of a model."""

    def __init__(self, served: Any, num_experts: int | None):
        self.embedded = np.zeros(0)
        self._num_experts = num_experts
        self._seen: list[dict[str, np.ndarray]] = []
        for number, layer in enumerate(served.base_model.layers):
            self._seen.append({})
            if number == 0:
                layer.register_forward_pre_hook(self._embedding, with_kwargs=True)
            self._watch(number, layer)

    def _embedding(self, module: Any, args: Any, kwargs: Any) -> None:
        self.embedded = _array(args[0] if args else kwargs["hidden_states"])

    def _watch(self, number: int, layer: Any) -> None:
        seen = self._seen[number]

        def keep(name: str) -> Any:
            def hook(module: Any, args: Any, out: Any) -> None:
                value = _array(out[0] if isinstance(out, tuple) else out)
                seen[name] = seen[name] + value if name in seen else value

            return hook

        def keep_router(module: Any, args: Any, out: Any) -> None:
            for one in out if isinstance(out, tuple) else (out,):
                shape: tuple[int, ...] = getattr(one, "shape", ())
                fits = len(shape) >= 2 and shape[-1] == self._num_experts
                if fits and one.is_floating_point():
                    seen["router"] = _array(one)
                    return

        attention = getattr(layer, "self_attn", None) or layer.attention
        attention.register_forward_hook(keep("attention"))
        mlp = getattr(layer, "block_sparse_moe", None) or layer.mlp
        mlp.register_forward_hook(keep("mlp"))
        if (shared := getattr(layer, "shared_mlp", None)) is not None:
            shared.register_forward_hook(keep("mlp"))
        router = getattr(mlp, "gate", None) or getattr(mlp, "router", None)
        if router is not None and self._num_experts is not None:
            router.register_forward_hook(keep_router)
        layer.register_forward_hook(keep("output"))

    def activations(self, shape: tuple[int, ...]) -> tuple[LayerActivations, ...]:
        """What was seen, `[B, L, ...]`."""
        return tuple(
            LayerActivations(
                attention=seen["attention"].reshape(shape),
                router=seen["router"].reshape(shape) if "router" in seen else None,
                mlp=seen["mlp"].reshape(shape),
                output=seen["output"].reshape(shape),
            )
            for seen in self._seen
        )
