"""ki-inspect: what a checkpoint is and what an export of it lacks; and the arguments that it shares with ki-export."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ki_edge.commands import Parser, run_command, show, show_json, tell
from ki_edge.policy.presets import SHORT

if TYPE_CHECKING:
    from ki_export.policies import PolicyRequest

    from .opening import CheckpointRef

NAME = "ki-inspect"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, also if something is missing; 2 for any error."""
    options = _parser().parse_args(arguments)
    return run_command(NAME, lambda: _inspect(options), "nothing was changed")


def _inspect(arguments: argparse.Namespace) -> int:
    from .inspection import inspect

    say = lambda line: tell(f"{NAME}: {line}")  # noqa: E731
    found = inspect(named(arguments), request(arguments), say, model_only=arguments.model_only)
    if arguments.json:
        show_json(found.to_json())
    else:
        show(found.lines())
    return 0


def named(arguments: argparse.Namespace) -> CheckpointRef:
    """The checkpoint that the arguments of `add_checkpoint` name."""
    from .opening import CheckpointRef

    return CheckpointRef(arguments.checkpoint, arguments.revision, arguments.base, arguments.horizon)


def request(arguments: argparse.Namespace) -> PolicyRequest:
    """What the arguments of `add_checkpoint` say of its policy."""
    from ki_export.policies import PolicyRequest

    return PolicyRequest(
        contract=arguments.contract,
        assets=arguments.norm_stats,
        tokenizer=arguments.tokenizer,
        fast=arguments.fast_codec,
        prompt=arguments.prompt,
        lerobot_version=arguments.lerobot_version,
    )


def add_checkpoint(parser: Parser) -> None:
    """The arguments by which both commands are told of a checkpoint."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of openpi (PyTorch or JAX), LeRobot, a PEFT adapter or ki-train; or ORG/NAME of the Hub",
    )
    add = parser.add_argument_group("where the checkpoint is").add_argument
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub repository; its commit is recorded")
    add("--base", metavar="DIR_OR_ID", help="base checkpoint of a PEFT adapter, instead of the one it names")
    add("--horizon", type=int, metavar="N", help="actions of a chunk, where the checkpoint does not record them")
    add = parser.add_argument_group("what a checkpoint may not record of its policy").add_argument
    add(
        "--contract",
        metavar="NAME|FILE",
        help="the policy contract: cameras, state, actions and normalisation of the robot that it was trained for. "
        f"{', '.join(SHORT)}, the name of a public configuration of openpi, or a JSON file; of a checkpoint that was "
        "trained on several robots, the name of one",
    )
    add("--norm-stats", type=Path, metavar="PATH", help="norm_stats.json, or a folder that holds one")
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer.model or .json, or their folder (the Hub's cache)")
    add("--fast-codec", type=Path, metavar="DIR", help="folder of the codec of FAST action tokens")
    add("--prompt", metavar="TEXT", help="instruction for observations that have none")
    add(
        "--lerobot-version",
        metavar="0.4|0.5",
        help="LeRobot that it was trained with, 0.5 for any newer (asked for where it matters and is not recorded)",
    )
    add("--model-only", action="store_true", help="the model alone, without tokenizer, statistics and contract")


def _parser() -> Parser:
    parser = Parser(
        prog=NAME,
        description="Tell what a checkpoint is, what its policy contract says and where that comes from, what is "
        "missing for an export, and how fast it can run at best. Loads no weights and writes nothing.",
    )
    add_checkpoint(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
