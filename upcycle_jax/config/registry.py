"""Names that gin files may use, and where each object lives. A new one is one line; nothing is
imported before it is used.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

_LIBRARY = "upcycle_jax"

PATHS: dict[str, str] = {
    # Models.
    "T5Config": "models.t5.config:T5Config",
    "MoeConfig": "models.t5.config:MoeConfig",
    "ExpertsChoose": "moe.routing:ExpertsChoose",
    "TokensChoose": "moe.routing:TokensChoose",
    "SwitchTop1": "moe.routing:SwitchTop1",
    "DroplessTopK": "moe.routing:DroplessTopK",
    "SigmoidTopK": "moe.routing:SigmoidTopK",
    "LossFreeTopK": "moe.routing:LossFreeTopK",
    "HashTop1": "moe.routing:HashTop1",
    "SoftMoe": "moe.routing:SoftMoe",
    "EncoderDecoderModel": "models.t5.model:EncoderDecoderModel",
    "DecoderConfig": "models.decoder.config:DecoderConfig",
    "DecoderMoeConfig": "models.decoder.config:DecoderMoeConfig",
    "Rope": "layers.rope:Rope",
    "DecoderModel": "models.decoder.model:DecoderModel",
    "VitConfig": "models.vit.config:VitConfig",
    "VitMoeConfig": "models.vit.config:VitMoeConfig",
    "VitModel": "models.vit.model:VitModel",
    # Partitioning.
    "Partitioner": "partitioning:Partitioner",
    # Surgery.
    "Recipe": "surgery:Recipe",
    "CopyExperts": "surgery:CopyExperts",
    "NoisyCopies": "surgery:NoisyCopies",
    "FreshExperts": "surgery:FreshExperts",
    "PartialCopies": "surgery:PartialCopies",
    "DropUpcycling": "surgery:DropUpcycling",
    "VirtualGroups": "surgery:VirtualGroups",
    "QwenExperts": "surgery:QwenExperts",
    "ParentExperts": "surgery:ParentExperts",
    "SplitExperts": "surgery:SplitExperts",
    "MoreExperts": "surgery:MoreExperts",
    "NormalRouter": "surgery:NormalRouter",
    "UniformRouter": "surgery:UniformRouter",
    "ZeroRouter": "surgery:ZeroRouter",
    "GivenRouter": "surgery:GivenRouter",
    "DepthTile": "surgery:DepthTile",
    "MergeRecipe": "surgery:MergeRecipe",
    # Data.
    "DatasetConfig": "data:DatasetConfig",
    "ImageDatasetConfig": "data.images:ImageDatasetConfig",
    "DecoderOnlyFeatures": "features:DecoderOnlyFeatures",
    "FewShot": "data.prompts:FewShot",
    "start_of_text": "data.text.tokenizer:start_of_text",
    # Training.
    "Adafactor": "training.optimizers:Adafactor",
    "AdamW": "training.optimizers:AdamW",
    "BigVisionAdafactor": "training.big_vision_adafactor:BigVisionAdafactor",
    "Sgd": "training.sgd:Sgd",
    "create_learning_rate_scheduler": "training.schedules:create_learning_rate_scheduler",
    "model_of_checkpoint": "training.model_of_checkpoint:model_of_checkpoint",
    "ParameterGroup": "training.parameter_groups:ParameterGroup",
    "Trainer": "training.trainer:Trainer",
    "Wandb": "training.tracking:Wandb",
    "LossSpikes": "training.spikes:LossSpikes",
    "CheckpointConfig": "training.config:CheckpointConfig",
    "RestoreCheckpointConfig": "training.config:RestoreCheckpointConfig",
    "SaveCheckpointConfig": "training.config:SaveCheckpointConfig",
    "train": "training.train:Train",
    # Inference.
    "Greedy": "inference.decoding:Greedy",
    "Sampling": "inference.decoding:Sampling",
    "BeamSearch": "inference.beam_search:BeamSearch",
    "evaluate": "inference.evaluation:Evaluate",
    "infer": "inference.predictions:Infer",
    "few_shot": "inference.few_shot_evaluation:EvaluateFewShot",
    # The paper's exhibits.
    "initial_drop": "papers.initial_drop:InitialDrop",
    # Studies.
    "Sweep": "studies.sweep:Sweep",
    "Stage": "studies.sweep:Stage",
    # Commands on checkpoints.
    "upcycle": "surgery.upcycle:Upcycle",
    "verify": "surgery.verify:Verify",
}
"""Name -> module (below `upcycle_jax`) and attribute."""

FUNCTIONS = ("train", "evaluate", "infer", "few_shot", "upcycle", "verify")
"""What commands call. Files of one are often given to a command that reads a part of it."""


@dataclasses.dataclass(frozen=True)
class Configurable:
    """An object that gin files may bind parameters of.

    Attributes:
      name: its name in gin files.
      target: the class or function itself, never a wrapper.
    """

    name: str
    target: Callable[..., Any]

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters that can be bound, in order."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {
            name: p
            for name, p in inspect.signature(self.target).parameters.items()
            if p.kind in kinds
        }

    @functools.cached_property
    def takes_any(self) -> bool:
        """Whether it has `**kwargs`."""
        return any(
            p.kind is inspect.Parameter.VAR_KEYWORD
            for p in inspect.signature(self.target).parameters.values()
        )

    @property
    def required(self) -> list[str]:
        """Parameters without a default."""
        return [name for name, p in self.parameters.items() if p.default is inspect.Parameter.empty]

    def accepts(self, parameter: str) -> bool:
        """Whether the parameter can be bound."""
        return parameter in self.parameters or self.takes_any


def names() -> frozenset[str]:
    """All names that gin files may use without an import."""
    return frozenset(PATHS)


def nearest(name: str, known: Any) -> str:
    """' Did you mean ...?' for the nearest known names, or an empty string."""
    by_lower = {str(candidate).lower(): str(candidate) for candidate in sorted(known)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(by_lower[key] for key in near)}?" if near else ""


def _load(path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(f"{_LIBRARY}.{module}"), attribute)


def lookup(name: str, imports: Mapping[str, Any]) -> Configurable | None:
    """The object of that name, or None where there is none.

    Args:
      name: a name of `PATHS`, or `module.attribute` where the gin file has imported the module.
      imports: what the gin file's import lines bind.
    """
    if name in PATHS:
        return Configurable(name, _load(PATHS[name]))
    head, *attributes = name.split(".")
    if head in imports and attributes:
        target = functools.reduce(
            lambda owner, attribute: getattr(owner, attribute, None), attributes, imports[head]
        )
        if callable(target):
            return Configurable(name, target)
    return None
