"""What train.html says first: how far a run is, its best checkpoint, what to do next, and what is trained on what."""

import json

import pytest

from ki_edge.train.watching.log import RunLog
from ki_edge.train.watching.overview import overview
from ki_edge.train.watching.page import to_html

SETTINGS = {
    "steps": 40, "batch": 8, "seed": 3, "flow_weight": 10.0, "flow_draws": 5, "fast_weight": 1.0, "text_weight": 1.0,
    "knowledge_insulation": True, "fast_loss": True, "optimizer": "adamw", "learning_rate": 2.5e-5, "warmup": 4,
    "clip": 1.0, "ema": 0.0, "freeze": ["vision"], "lora": [["backbone", 16]], "rates": [["expert", 2.0]],
    "bfloat16": False, "augment": True,
}  # fmt: skip
FACTS = {
    "data.my_run.weight": 0.75, "data.my_run.episodes": 9, "data.my_run.frames": 300, "data.my_run.held_out": 2,
    "data.texts.weight": 0.25, "data.texts.samples": 12, "data.texts.held_out": 1, "data.texts.digest": "ab",
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """run(last step) -> OUT/training of a run of 40 steps, at four samples a second."""

    def made(last, name="my policy"):
        folder = tmp_path / name / "training"
        log = RunLog(folder)
        for step in range(10, last + 1, 10):
            log.append({"step": step, "flow": 1.0, "fast": 2.0, "text/texts": 1.5, "samples_per_s": 4.0})
        log.append_evaluation({"step": 10, "held_out_action_error_normalised": 0.125, "robot_success": 0.5})
        (folder.parent / "best").symlink_to("step_000010")
        return folder, {"settings": SETTINGS, "origin": {"init": "pi05_base"}, "facts": FACTS}

    return made


def shown(folder, run):
    from ki_edge.train.watching.log import read_rows

    return overview(folder, read_rows(folder / "log.jsonl"), read_rows(folder / "evaluation.jsonl"), run)


def test_a_run_that_goes_on(run):
    html = shown(*run(20))
    assert "Step 20 of 40, logged 2" in html and "after 40 s of training" in html  # 20 steps of 8 samples
    assert "at its speed 40 s are left" in html
    assert "Best checkpoint: step_000010 (success 50 %, held-out action error 0.125, normalised)." in html
    assert "go on with: <code>ki-train --resume -o &#x27;my policy&#x27;</code>" in html


def test_a_run_that_is_finished(run):
    html = shown(*run(40))
    assert "The run is finished." in html and "are left" not in html
    assert "Next: <code>ki-export &#x27;my policy/best&#x27; -o &#x27;my policy/bundle&#x27;</code>" in html


def test_what_is_trained_on_what(run):
    html = shown(*run(20))
    for words in (
        "data: my_run", "9 episodes, 300 frames, 2 episodes held out, 75 % of every batch",
        "12 text samples, 1 text samples held out, 25 % of every batch", "goes on from pi05_base", "vision",
        "backbone 16", "expert 2.0", "knowledge insulation", "flow 10 (5 draws a sample), FAST 1, text 1",
        "40 of 8 samples, seed 3", "rate 2.5e-05 after 4 steps of warm-up", "float32, pictures augmented",
    ):  # fmt: skip
        assert words in html, words


@pytest.mark.parametrize(
    "content",
    [
        {}, {"settings": 5, "origin": [], "facts": "x"},
        {"settings": {"steps": "many", "batch": None, "lora": [5, []]}},
        {"settings": {"steps": 40, "batch": 8}, "facts": {"data..weight": "a", "data.<b>.weight": True}},
    ],
)  # fmt: skip
def test_whatever_run_json_holds(run, content):
    folder, _ = run(20)
    (folder / "run.json").write_text(json.dumps(content))
    html = to_html(folder)
    assert "Step 20" in html and "<b>.weight" not in html


def test_the_page_has_links_to_its_parts_and_words_of_a_text_set_by_its_name(run):
    folder, content = run(20)
    (folder / "run.json").write_text(json.dumps(content))
    html = to_html(folder)
    assert '<a href="#s0">Losses</a>' in html and '<h2 id="s0">Losses</h2>' in html
    assert "words, texts" in html and "FAST, texts" not in html
