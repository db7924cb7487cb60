"""ki-train: demonstrations to checkpoint."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ki_edge.commands import Parser, run_command, show
from ki_edge.config import TINY

from .step.settings import TrainSettings

PRESETS = {"tiny": TINY}
HELP = {
    "steps": "optimiser steps",
    "batch": "frames a step",
    "learning_rate": "peak of the schedule",
    "warmup": "steps of linear warmup before the cosine",
    "final_rate": "share of the learning rate left at the end",
    "weight_decay": "of AdamW, on matrices",
    "clip": "largest gradient norm",
    "ema": "decay of the moving average that is saved as the checkpoint",
    "fast_weight": "weight of the token losses beside the flow loss",
    "flow_draws": "noise and time draws a frame",
    "rtc_max_delay": "let up to so many first actions of a chunk be given, as a robot that does not wait needs it",
    "rtc_offset": "how far those lie beside the demonstration's, in normalised actions, so that a policy must look",
    "pointing": "share of a batch that answers where the target is",
    "seed": "of all random numbers",
    "save_every": "steps between checkpoints",
    "log_every": "steps between log lines",
}


def build_parser() -> Parser:
    """The command line; what is not given comes from TrainSettings, or from the run that is resumed."""
    parser = Parser(prog="ki-train", description="Train a π0.5 policy with knowledge insulation.")
    parser.add_argument("demonstrations", type=Path, help="recorded episodes: a LeRobotDataset, .npz")
    parser.add_argument("-o", "--out", type=Path, required=True, help="checkpoint folder to write, or to go on with")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="widths and depths of the model")
    parser.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="start from these weights instead of random ones"
    )
    parser.add_argument("--horizon", type=int, help="actions of a chunk (the preset's)")
    parser.add_argument("--resume", action="store_true", help="go on where the run in OUT stopped, with its settings")
    parser.add_argument("--fresh", action="store_true", help="start over although OUT holds a run")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument(
        "--no-insulation", action="store_true", default=None, help="plain π0.5: no stop-gradient, no token losses"
    )
    parser.add_argument(
        "--float32", action="store_true", default=None, help="matrix products in float32 instead of bfloat16"
    )
    for field in fields(TrainSettings):
        if field.name in HELP:
            kind: Any = {"int": int, "float": float}[str(field.type)]
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, type=kind, help=f"{HELP[field.name]} ({field.default})")
    return parser


def train(arguments: argparse.Namespace) -> int:
    """Run what the command line asks for, with a progress bar."""
    from tqdm import tqdm

    from .plot import plot_losses
    from .run import open_trainer, recorded_settings

    given: dict[str, Any] = {name: value for name in HELP if (value := getattr(arguments, name)) is not None}
    switches = {"knowledge_insulation": arguments.no_insulation, "bfloat16": arguments.float32}
    given |= {name: False for name, off in switches.items() if off}
    config, out = PRESETS[arguments.preset], arguments.out
    settings = replace(recorded_settings(out) if arguments.resume else TrainSettings(), **given)
    with tqdm(unit="frame", desc="pictures", leave=False, disable=None, delay=1.0) as bar:

        def decoded(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        trainer = open_trainer(
            arguments.demonstrations, out, config, settings,
            init=arguments.init, horizon=arguments.horizon, progress=decoded,
            resume=arguments.resume, fresh=arguments.fresh, threads=arguments.threads,
        )  # fmt: skip
    with tqdm(total=trainer.settings.steps, initial=trainer.step, unit="step", smoothing=0.05) as bar:
        for record in trainer.run():
            bar.update(int(record["step"]) - bar.n)
            bar.set_postfix({name: f"{record[name]:.3f}" for name in ("flow", "fast", "pointing") if name in record})
    picture = out / "training" / "losses.png"
    plot_losses(trainer.log_path, picture)
    show([f"checkpoint {out} after {trainer.step} steps; loss plot {picture}"])
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of ki-train; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command("ki-train", lambda: train(arguments), "--resume goes on from the last save", needs="train")


if __name__ == "__main__":
    sys.exit(main())
