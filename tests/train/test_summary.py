"""What a run says before it starts."""

from ki_edge.train.record import Origin
from ki_edge.train.run import Request, open_run

SHORT = {"steps": 4, "batch": 4, "warmup": 1, "flow_draws": 1, "bfloat16": False}


def said(tmp_path, dataset, config, settings=(), **origin):
    lines = []
    request = Request(
        tmp_path / "run", Origin(datasets=(str(dataset),), horizon=4, **origin), {**SHORT, **dict(settings)},
        config=config, workers=0,
    )  # fmt: skip
    open_run(request, lines.append).close()
    return lines


def test_model_devices_losses_and_data_are_told(record_dataset, small_config, tmp_path):
    record_dataset(tmp_path / "episodes", size=8, lengths=(6, 4))
    lines = said(tmp_path, tmp_path / "episodes", small_config)
    assert any("M parameters learn, from nothing (tiny), in one process on " in line for line in lines)
    assert any(line.startswith("knowledge insulation: flow and FAST; 4 steps of 4 samples") for line in lines)
    assert "episodes: 10 samples, each seen 1.6 times" in lines
    assert not any("warm-up of" in line and "not over" in line for line in lines)


def test_what_looks_like_a_mistake_is_told(record_dataset, small_config, tmp_path):
    record_dataset(tmp_path / "episodes", size=8)
    lines = said(tmp_path, tmp_path / "episodes", small_config, {"warmup": 100, "freeze": ("vision",)})
    assert any("the warm-up of 100 steps is not over when the run is" in line for line in lines)
    assert any("the vision tower is frozen at random numbers" in line for line in lines)
