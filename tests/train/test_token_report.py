"""How well tokens fit the data: what is measured, what is shown, and when a run is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from ki_edge.errors import DatasetError
from ki_edge.train.data.recipe import Choice, Recipe
from ki_edge.train.data.start import Start
from ki_edge.train.data.token_report import TokenReport

from .test_tokens import robot


@pytest.fixture(scope="module")
def arms():
    return [robot(frames=60), robot("other", dims=2, seed=1, frames=20)]


@pytest.fixture(scope="module")
def recipe(small_config, arms):
    return Recipe.fit(Start.from_nothing(small_config), arms)


@pytest.fixture(scope="module")
def report(recipe, arms):
    return TokenReport.measure(recipe, arms, [600, 20])


def test_lengths_are_those_of_the_samples(recipe, arms, report):
    for source, (one, found) in enumerate(zip(arms, report.sets, strict=True)):
        for frame in range(len(one.state)):
            state, chunk = one.state[frame], one.chunks[frame]
            task = one.tasks[one.frame_tasks[frame]]
            numbers = recipe.normalize_state(source, state), recipe.normalize_actions(source, chunk)
            prompt, postfix = recipe.encode_actions(task, *numbers)
            assert (found.prompt[frame], found.postfix[frame]) == (len(prompt), len(postfix))


def test_errors_are_those_of_decoded_tokens(recipe, arms, report):
    """By number of an action, the largest of a chunk, in robot units and the model's."""
    one, found = arms[0], report.sets[0]
    for frame in (0, 7, 31):
        numbers = recipe.normalize_state(0, one.state[frame]), recipe.normalize_actions(0, one.chunks[frame])
        _, postfix = recipe.encode_actions("go home", *numbers)
        decoded = recipe.encoder.decode_actions(postfix, 4, 3)
        np.testing.assert_allclose(found.normalised[frame], np.abs(decoded - numbers[1]).max(axis=0), atol=1e-9)
        back = recipe.unnormalize_actions(0, decoded)
        np.testing.assert_allclose(found.error[frame], np.abs(back - one.chunks[frame]).max(axis=0), atol=1e-9)
    assert found.normalised.max() <= 0.5 / recipe.codec.scale * 2, "half a step of each of the chunk's frequencies"


def test_files(report, tmp_path):
    report.save(tmp_path / "training")
    content = json.loads((tmp_path / "training" / "fast.json").read_text())
    assert [row["dataset"] for row in content["datasets"]] == ["arm", "other"]
    first = content["datasets"][0]
    assert (first["frames"], first["measured"], first["too_long"], first["not_spelled"]) == (600, 60, 0, 0)
    assert first["fast_tokens_max"] == report.sets[0].postfix.max()
    assert first["fast_tokens_mean"] <= first["fast_tokens_p99"] <= first["fast_tokens_max"]
    assert [(row["dataset"], row["number"]) for row in content["actions"]] == [
        ("arm", "x"), ("arm", "y"), ("arm", "z"), ("other", "x"), ("other", "y"),
    ]  # fmt: skip
    assert sum(content["chunks_by_fast_tokens"]) == 80
    with Image.open(tmp_path / "training" / "fast.png") as picture:
        assert min(picture.size) > 300 and len(np.unique(np.asarray(picture))) > 10


def test_what_fits_is_told_in_a_line_each(report):
    assert report.check(0.0) == []
    first, second = report.lines()
    assert first.startswith("arm: prompts of ") and ", z " in first and second.startswith("other: ")


def with_limits(recipe, arms, prompt, postfix):
    from dataclasses import replace

    encoder = replace(recipe.encoder, max_prompt=prompt, max_postfix=postfix)
    return TokenReport.measure(replace(recipe, encoder=encoder), arms, [60, 20])


def test_too_many_that_do_not_fit_are_refused(recipe, arms):
    longest = max(found.postfix.max() for found in TokenReport.measure(recipe, arms, [60, 20]).sets[:1])
    found = with_limits(recipe, arms, 64, int(longest) - 1)
    share = float((found.sets[0].postfix > longest - 1).mean())
    (line,) = found.check(share)
    assert line.startswith("arm: ") and "such a chunk has no FAST loss" in line and "% of all frames" in line
    with pytest.raises(DatasetError, match=r"arm: .* chunks of up to .* FAST tokens \(at most .*--max-long allows 0 %"):
        found.check(0.0)
    prompts = with_limits(recipe, arms, 5, 64)
    with pytest.raises(DatasetError, match=r"arm: 100 % of all frames .*: shorten the instructions$") as problem:
        prompts.check(0.01)
    assert "60 prompts of up to" in str(problem.value) and "\n" not in str(problem.value)


def test_frames_that_were_drawn_are_said_to_be(report, recipe, arms):
    found = TokenReport.measure(recipe, arms, [600, 20])
    object.__setattr__(found, "max_postfix", 1)
    with pytest.raises(DatasetError, match="of 60 drawn of 600 frames do not fit"):
        found.check(0.01)


def test_a_foreign_codec_that_cannot_spell_is_counted(small_config, arms):
    """One that was fitted on other data lacks the symbols."""
    still = robot(frames=60)
    quiet = Recipe.fit(Start.from_nothing(small_config), [still])
    wild = robot(frames=60)
    wild.chunks[3] *= 100
    found = TokenReport.measure(quiet, [wild], [60]).sets[0]
    assert (found.postfix == -1).sum() == 1 and len(found.error) == 59
    report = TokenReport.measure(quiet, [wild], [60])
    assert "1 chunks that the FAST codec cannot spell" in report.check(0.02)[0]
    with pytest.raises(DatasetError, match=r"cannot spell; .*: let FAST be fitted to these data with --fast fit$"):
        report.check(0.01)


def test_a_codec_of_a_given_size(small_config, arms):
    recipe = Recipe.fit(Start.from_nothing(small_config), arms, (), Choice(vocabulary=120))
    assert TokenReport.measure(recipe, arms, [60, 20]).about["fast_ids"] <= 120
