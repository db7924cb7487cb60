"""Recipes by name: their values, what is given explicitly wins, the docs print what the code holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from ki_edge.errors import ArgumentError
from ki_edge.planning.recipes import RECIPES, find_recipe, table, with_recipe
from ki_edge.planning.settings import TrainSettings

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def test_every_recipe_gives_settings_that_a_run_can_have():
    for name in RECIPES:
        settings = with_recipe(name, {})
        assert all(getattr(settings, field) == value for field, value in RECIPES[name].values.items()), name
        assert RECIPES[name].source and RECIPES[name].about


def test_what_is_given_explicitly_wins():
    settings = with_recipe("pi052", {"flow_draws": 2, "steps": 100})
    assert (settings.flow_draws, settings.steps, settings.flow_weight) == (2, 100, 10.0)
    assert with_recipe(None, {"steps": 100}) == TrainSettings(steps=100)
    resumed = TrainSettings(seed=3, flow_draws=7)
    assert with_recipe("ki", {}, resumed).seed == 3 and with_recipe("ki", {}, resumed).flow_draws == 7


def test_tiny_is_the_defaults():
    assert with_recipe("tiny", {}) == TrainSettings()


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(
        ArgumentError, match=r"recipe 'openvla': expected one of ki, pi05, opentau, pi052, openpi, tiny"
    ):
        find_recipe("openvla")


def test_rates_are_those_of_the_schedules_they_are_from():
    """optax.warmup_cosine_decay_schedule, as openpi calls it: the end comes after decay_steps in all."""
    settings = with_recipe("opentau", {"steps": 40_000})
    assert settings.rate(999) == pytest.approx(2.5e-5)
    assert settings.rate(15_500) == pytest.approx((2.5e-5 + 2.5e-6) / 2)
    assert settings.rate(30_000) == settings.rate(39_999) == pytest.approx(2.5e-6)
    constant = with_recipe("openpi", {"steps": 30_000})
    assert constant.rate(9_999) == constant.rate(29_999) == pytest.approx(5e-5)


def test_a_decay_that_ends_in_the_warm_up_is_refused():
    with pytest.raises(ArgumentError, match=r"decay_steps 100: expected more than warmup \(300\)"):
        TrainSettings(decay_steps=100)


def test_the_docs_have_the_table_and_every_source():
    text = DOCS.read_text(encoding="utf-8")
    assert "\n".join(table()) in text
    assert all(recipe.source in " ".join(text.split()) for recipe in RECIPES.values())


def test_recipes_are_known_without_torch():
    code = "import sys, ki_edge.planning.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
