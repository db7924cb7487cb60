"""The flags of ki-train, in groups; each field of TrainSettings has one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ki_edge.commands import Parser
from ki_edge.errors import ArgumentError
from ki_edge.planning.recipes import RECIPES
from ki_edge.planning.settings import GROUPS, OPTIMIZERS, TrainSettings

STEPS = {
    "steps": "optimiser steps",
    "batch": "samples a step, over all processes and accumulated batches",
    "accumulate": "batches that a process computes one after the other for a step",
    "seed": "of all random numbers",
}
LOSS = {
    "flow_weight": "weight of the flow loss",
    "fast_weight": "weight of the FAST tokens' loss",
    "text_weight": "weight of the text samples' loss",
    "flow_draws": "noise and time draws a sample, over one prefix",
    "rtc_max_delay": "let up to so many first actions of a chunk be given, as a robot that does not wait needs it",
    "rtc_offset": "how far those lie beside the demonstration's, in normalised actions, so that a policy must look",
}
OPTIMISER = {
    "learning_rate": "peak of the schedule",
    "warmup": "steps of linear warm-up before the cosine",
    "decay_steps": "steps after which the cosine is at its end; 0: all",
    "final_rate": "share of the learning rate left at the end",
    "optimizer": "adamw, or adamw8bit with moments of eight bits",
    "beta1": "of AdamW",
    "beta2": "of AdamW",
    "weight_decay": "of AdamW, on matrices",
    "clip": "largest gradient norm",
    "ema": "decay of the moving average that is saved as the checkpoint; 0: the weights themselves",
}
DATA = {
    "held_out": "share of the episodes that is not trained on but evaluated",
    "max_long": "share of samples that may have too many tokens",
}
SAVING = {
    "save_every": "steps between checkpoints",
    "log_every": "steps between rows of the log",
    "eval_every": "steps between evaluations; 0: none",
    "keep": "which checkpoints stay: the last so many, the best so many",
}
KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
CHOICES = {"optimizer": OPTIMIZERS}


def add_settings(group: argparse._ArgumentGroup, texts: dict[str, str]) -> None:
    """A flag for each of these settings; what is not given is None."""
    known = {field.name: field for field in fields(TrainSettings)}
    for name, text in texts.items():
        field = known[name]
        group.add_argument(
            "--" + name.replace("_", "-"), type=KINDS[str(field.type)], choices=CHOICES.get(name),
            help=f"{text} ({field.default})",
        )  # fmt: skip


def add_data(parser: Parser) -> None:
    """What is trained on, and how it is read."""
    group = parser.add_argument_group("data")
    group.add_argument("--map", type=Path, metavar="FILE", help="which feature is which camera, state, action (JSON)")
    group.add_argument("--horizon", type=int, help="actions of a chunk (the model's)")
    group.add_argument("--augment", action="store_true", default=None, help="crops, rotations, colours, as openpi has")
    group.add_argument("--cache", type=Path, metavar="DIR", help="keep decoded pictures there")
    group.add_argument("--cache-gb", type=float, default=20.0, help="as many of them as fit into so much (20)")
    group.add_argument("--workers", type=int, help="processes that read and decode (by the cores)")
    add_settings(group, DATA)
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--tokenizer", type=Path, metavar="FILE", help="PaliGemma's tokenizer.model")
    tokens.add_argument("--fast", metavar="FOLDER", help="a FAST codec, or `fit`: one fitted on the data")
    tokens.add_argument("--fast-vocabulary", type=int, help="FAST ids of a fitted codec")
    tokens.add_argument(
        "--fast-placement", choices=("openpi", "pi052"), help="where FAST ids are in PaliGemma's vocabulary"
    )


def add_learning(parser: Parser) -> None:
    """Model, steps, loss, optimiser."""
    model = parser.add_argument_group("model")
    model.add_argument("--recipe", choices=sorted(RECIPES), help="settings by name; flags that are given count more")
    model.add_argument(
        "--preset", choices=("tiny", "small", "base", "pi05"), help="widths and depths of a new model (tiny)"
    )
    model.add_argument("--init", metavar="CHECKPOINT", help="go on from these weights: any that ki-export reads")
    model.add_argument("--contract", help="of --init, where it records none: a preset or a file, as ki-export takes")
    model.add_argument("--base", metavar="CHECKPOINT", help="under the adapter that --init names")
    model.add_argument(
        "--lerobot-version", metavar="VERSION", help="that trained what --init names, as ki-export takes"
    )
    add_settings(parser.add_argument_group("steps"), STEPS)
    loss = parser.add_argument_group("loss")
    add_settings(loss, LOSS)
    loss.add_argument("--no-insulation", action="store_true", default=None, help="no stop-gradient before the expert")
    loss.add_argument("--no-fast-loss", action="store_true", default=None, help="the backbone learns no FAST tokens")
    optimiser = parser.add_argument_group("optimiser")
    add_settings(optimiser, OPTIMISER)
    listed = ", ".join(GROUPS)
    optimiser.add_argument("--freeze", action="append", metavar="GROUP,...", help=f"parameters that stay: {listed}")
    optimiser.add_argument("--rate", action="append", metavar="GROUP=FACTOR,...", help="of a group's learning rate")
    optimiser.add_argument(
        "--lora", action="append", metavar="GROUP=RANK,...", help="train adapters of a group instead"
    )
    optimiser.add_argument("--expert-only", action="store_true", default=None, help="freeze all but the action expert")


def add_machine(parser: Parser) -> None:
    """Processes, precision, memory."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--strategy", choices=("auto", "ddp", "fsdp2"), default="auto", help="of several processes (auto)"
    )
    group.add_argument(
        "--checkpointing", action="store_true", default=None, help="compute layers twice, to save memory"
    )
    group.add_argument("--bfloat16", action="store_true", default=None, help="products in bfloat16 (where it is fast)")
    group.add_argument("--float32", action="store_true", default=None, help="no products in bfloat16")
    group.add_argument("--threads", type=int, default=0, help="CPU threads (all)")


def add_saving(parser: Parser) -> None:
    """Checkpoints, logs, evaluation."""
    group = parser.add_argument_group("saving and looking")
    add_settings(group, SAVING)
    group.add_argument(
        "--eval-robot", metavar="ROBOT", help="let the exported bundle work on it, such as gym:FetchReach-v4"
    )
    group.add_argument("--eval-episodes", type=int, help="of a robot's evaluation (20)")
    group.add_argument("--track", action="append", metavar="NAME", help="also log to tensorboard, trackio or wandb")
    group.add_argument("--resume", action="store_true", help="go on where the run in OUT stopped, with its settings")
    group.add_argument("--accept-changes", action="store_true", help="resume although something is not as it was")
    group.add_argument("--fresh", action="store_true", help="start over although OUT holds a run")


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gives. ArgumentError for a group or a number that is none."""
    names = [*STEPS, *LOSS, *OPTIMISER, *DATA, *SAVING]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.bfloat16 and arguments.float32:
        raise ArgumentError("--bfloat16 and --float32: say one of them")
    off = {"knowledge_insulation": "no_insulation", "fast_loss": "no_fast_loss", "bfloat16": "float32"}
    given |= {name: False for name, flag in off.items() if getattr(arguments, flag)}
    given |= {
        name: True for name in ("augment", "bfloat16", "checkpointing", "expert_only") if getattr(arguments, name)
    }
    if arguments.freeze:
        given["freeze"] = tuple(name for text in arguments.freeze for name in text.split(","))
    if arguments.rate:
        given["rates"] = tuple(_pair(part, "--rate", float) for text in arguments.rate for part in text.split(","))
    if arguments.lora:
        given["lora"] = tuple(_pair(part, "--lora", int) for text in arguments.lora for part in text.split(","))
    return given


def _pair(text: str, flag: str, kind: Callable[[str], Any]) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, kind(value)
    except ValueError:
        raise ArgumentError(f"{flag} {text}: expected GROUP={'RANK' if kind is int else 'FACTOR'}") from None
