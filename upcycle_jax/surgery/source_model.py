"""The model of a source, and the model that a recipe makes of it, where no model file is given."""

import dataclasses
from typing import Any

from upcycle_jax.checkpoints import model_settings
from upcycle_jax.layers.mlp import hidden_axis
from upcycle_jax.models import registry
from upcycle_jax.models.base import Model, ModelConfig
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.routing import Router
from upcycle_jax.state_tree import TARGET
from upcycle_jax.surgery.matching_base import refuse_experts
from upcycle_jax.surgery.model_record import model_from_json
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.prediction import selecting
from upcycle_jax.surgery.recipe import MergeRecipe, MoreExperts, Recipe
from upcycle_jax.trees import Role

_NAME_IT = "name a model file"


def own_config(source: Reader) -> ModelConfig | None:
    """The configuration that a checkpoint's own format states, e.g. in config.json; None where it
    states none.
    """
    stated: ModelConfig | None = getattr(source, "model_config", lambda: None)()
    return stated


def stated_config(source: Reader) -> ModelConfig | None:
    """The configuration that a checkpoint states of its own model: in its config.json, or in the
    record of the conversion that made it. None where it states none.
    """
    stated = own_config(source)
    if stated is not None:
        return stated
    recorded = source.metadata().get("model")
    if recorded is None:
        return None
    try:
        return model_from_json(recorded, max_layers=len(source.specs())).config
    except ValueError:  # Of another version: as good as none.
        return None


def inferred_model(
    source: Reader, recipe: Recipe | MergeRecipe, moe: MoeSettings | None = None
) -> Model:
    """The model that a recipe makes of a source.

    Args:
      source: the checkpoint.
      recipe: the choices.
      moe: the MoE layers of the result; None: the defaults of the source's family or, for a larger
        MoE, the source's with what the recipe changes.

    Raises:
      ValueError: the source does not tell its model, or is not what the recipe is for.
    """
    enlarges = isinstance(recipe, Recipe) and isinstance(recipe.expert_init, MoreExperts)
    if not enlarges and not isinstance(recipe, MergeRecipe):
        refuse_experts(source.specs())
        specs = {name.removeprefix("parent_0/"): spec for name, spec in source.specs().items()}
        return registry.infer(specs, model_settings.stated_by(source), moe)
    config = stated_config(source)
    what = "MergeRecipe" if isinstance(recipe, MergeRecipe) else "MoreExperts"
    if config is None:
        raise ValueError(
            f"{what} starts from a Mixture-of-Experts, and {getattr(source, 'path', 'the source')}"
            f" does not state its own model: {_NAME_IT} for the result"
        )
    if config.moe is None:
        raise ValueError(
            f"{what} starts from a Mixture-of-Experts, and {getattr(source, 'path', 'the source')}"
            " is dense"
        )
    if isinstance(recipe, MergeRecipe):
        return registry.build(_merged(config))
    assert isinstance(recipe.expert_init, MoreExperts)
    if moe is not None:
        return registry.with_moe(config, moe)
    return registry.with_moe(config, **_enlarged(source, config.moe, recipe.expert_init))


def _merged(config: ModelConfig) -> ModelConfig:
    """The dense model that a merge of experts gives: its MLPs are as wide as an expert and the
    shared expert together.

    Raises:
      ValueError: dense layers have another width, and the dense model's layers have one.
    """
    assert config.moe is not None
    width = (config.moe.expert_mlp_dim or config.mlp_dim) + (config.moe.shared_expert_mlp_dim or 0)
    if width == config.mlp_dim:
        return config.dense
    stacks = registry.build(config).stacks.values()
    if any(len(stack.sparse_layers) < stack.num_layers for stack in stacks):
        raise ValueError(
            f"merged layers would have MLPs of {width} hidden units, and the model's dense layers"
            f" have {config.mlp_dim}: no model of this family has both, so it cannot be merged"
        )
    return dataclasses.replace(config.dense, mlp_dim=width)  # type: ignore[type-var]


def resolved(recipe: Recipe | MergeRecipe, source: Reader) -> Recipe | MergeRecipe:
    """The recipe with what the source states: how many experts per token it chose."""
    if isinstance(recipe, MergeRecipe) or not isinstance(recipe.expert_init, MoreExperts):
        return recipe
    if recipe.expert_init.selected_before is not None:
        return recipe
    config = stated_config(source)
    found = [one.selected_per_token for one in _routers(config.moe if config else None).values()]
    before = next((count for count in found if count is not None), None)
    init = dataclasses.replace(recipe.expert_init, selected_before=before)
    return dataclasses.replace(recipe, expert_init=init)


def _enlarged(source: Reader, moe: MoeSettings, init: MoreExperts) -> dict[str, Any]:
    """What is different in the source's MoE layers when they have more experts."""
    changes: dict[str, Any] = {"num_experts": moe.num_experts * init.copies}
    for name, router in _routers(moe).items():
        count = router.selected_per_token
        wanted = init.selected or (count * init.copies if count is not None else None)
        changes[name] = selecting(router, wanted)
    if init.split:
        whole = _expert_width(source)
        if whole % init.copies:
            raise ValueError(
                f"the source's experts of {whole} hidden units do not split into"
                f" {init.copies} parts: choose other MoreExperts.copies"
            )
        changes["expert_mlp_dim"] = whole // init.copies
    return changes


def _expert_width(source: Reader) -> int:
    """Hidden units of an expert of a source that has experts."""
    return next(
        spec.shape[1 + hidden_axis(path, spec.axes, len(spec.shape) - 1)]
        for path, spec in source.specs().items()
        if spec.role is Role.EXPERT and path.startswith(TARGET) and path.endswith("/kernel")
    )


def _routers(moe: MoeSettings | None) -> dict[str, Router]:
    """The routers of MoE settings, by field."""
    if moe is None:
        return {}
    values = {field.name: getattr(moe, field.name) for field in dataclasses.fields(moe)}
    return {name: value for name, value in values.items() if isinstance(value, Router)}
