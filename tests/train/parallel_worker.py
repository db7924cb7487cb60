"""One process of a run for the tests: python parallel_worker.py OUT, with scenarios as JSON on stdin of the launcher.

Each scenario: name, settings, strategy, composition of the batches, steps [first, last], optionally `load` and `save`
(folders of training state), `double`. Writes OUT/NAME.safetensors (weights and average) and OUT/NAME.json (records).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from parallel_parts import random_model, train

from ki_edge.train.parallel.engine import Engine
from ki_edge.train.parallel.sharding import whole
from ki_edge.train.step.settings import TrainSettings


def run(scenario: dict[str, Any], out: Path) -> None:
    """Train, and write what came of it."""
    double = scenario.get("double", False)
    model = random_model().double() if double else random_model()
    settings = TrainSettings(**{"batch": 8, "steps": 20, "warmup": 5, "bfloat16": False, **scenario["settings"]})
    engine = Engine(model, settings, strategy=scenario.get("strategy", "auto"))
    if "load" in scenario:
        engine.load_state(out / scenario["load"])
    composition = scenario.get("composition", {})
    dtype = torch.float64 if double else torch.float32
    records = train(engine, *scenario["steps"], dtype=dtype, **composition)
    if "save" in scenario:
        engine.save_state(out / scenario["save"])
    state = {f"weights.{name}": whole(p).clone() for name, p in engine.model.named_parameters()}
    state |= {f"average.{name}": whole(p).clone() for name, p in engine.average.values.items()}
    if engine.main:
        save_file(state, out / f"{scenario['name']}.safetensors")
        (out / f"{scenario['name']}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for each in json.loads((folder / "scenarios.json").read_text()):
        run(each, folder)
