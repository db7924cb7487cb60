"""One process of a run for the tests: parallel_worker.py OUT. OUT/scenarios.json is a list of what to train.

Each scenario: `name`, `settings`, `strategy`, `composition` of the batches, `steps` [first, last], and optionally
`load` and `save` (folders of training state), `checkpoint`, `vocabulary`, `probe`, `evaluate`; or `golden` (a folder)
instead of steps. Writes OUT/NAME.safetensors (weights, average) and OUT/NAME.json (what each step reported).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from parallel_parts import MICRO, backward, evaluated, golden_model_and_batch, random_model, shared_out, train

from ki_edge.planning.settings import TrainSettings
from ki_edge.train.parallel.engine import Engine
from ki_edge.train.parallel.sharding import whole


def run(scenario: dict[str, Any], out: Path) -> None:
    """Train, and write what came of it."""
    settings = TrainSettings(**{"batch": 8, "steps": 20, "warmup": 5, "bfloat16": False, **scenario["settings"]})
    config = replace(MICRO, vocab_size=scenario.get("vocabulary", MICRO.vocab_size))
    engine = Engine(random_model(config), settings, strategy=scenario.get("strategy", "auto"))
    if "load" in scenario:
        engine.load_state(out / scenario["load"])
    before = evaluated(engine) if "evaluate" in scenario else {}
    records = train(
        engine, *scenario["steps"], config=config, probe=scenario.get("probe", 0), **scenario.get("composition", {})
    )
    after = evaluated(engine) if "evaluate" in scenario else {}
    if after:
        records += train(engine, engine.step, engine.step + 1, config=config)
    if "save" in scenario:
        engine.save_state(out / scenario["save"])
    if "checkpoint" in scenario:
        engine.save_checkpoint(out / scenario["checkpoint"])
    state = {f"weights.{name}": whole(p).clone() for name, p in engine.model.named_parameters()}
    state |= {f"average.{name}": whole(p).clone() for name, p in engine.average.values.items()}
    state |= {f"{when}.{name}": value for when, part in (("a", before), ("b", after)) for name, value in part.items()}
    if engine.main:
        save_file(state, out / f"{scenario['name']}.safetensors")
        (out / f"{scenario['name']}.json").write_text(json.dumps(records))


def golden(scenario: dict[str, Any], out: Path) -> None:
    """The norms of the recorded model's gradients."""
    model, batch = golden_model_and_batch(Path(scenario["golden"]))
    settings = TrainSettings(batch=2, bfloat16=False, **scenario["settings"])
    engine = Engine(model, settings, strategy=scenario.get("strategy", "auto"))
    backward(engine, shared_out(batch, engine.share()))
    norms = {name: whole(p.grad).norm().item() for name, p in engine.learning.items() if p.grad is not None}
    if engine.main:
        (out / f"{scenario['name']}.json").write_text(json.dumps(norms))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for each in json.loads((folder / "scenarios.json").read_text()):
        (golden if "golden" in each else run)(each, folder)
