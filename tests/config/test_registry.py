"""Every name that gin files may use leads to an object with that name."""

import inspect

import pytest

from upcycle_jax import surgery
from upcycle_jax.config import registry
from upcycle_jax.surgery import recipe


@pytest.mark.parametrize("name", sorted(registry.PATHS))
def test_names_lead_to_objects_that_can_be_bound(name):
    configurable = registry.lookup(name, {})
    assert configurable is not None
    # What a command runs is bound under its name; it may be a class of that name. `FewShot` is
    # another one's.
    called = {"few_shot": "EvaluateFewShot", "initial_drop": "InitialDrop"}.get(
        name, name.capitalize()
    )
    assert configurable.target.__name__ in (name, called)
    assert configurable.parameters or inspect.isclass(configurable.target)


def test_every_part_of_a_recipe_can_be_configured():
    assert {part.__name__ for part in recipe.PARTS} <= set(registry.PATHS)
    assert all(
        registry.lookup(part.__name__, {}).target is getattr(surgery, part.__name__)
        for part in recipe.PARTS
    )
