"""The flags of ki-run, in groups."""

from __future__ import annotations

from collections.abc import Callable

from ki_edge.commands import Parser
from ki_runtime.backends.registry import HELP as BACKENDS_HELP

from .options import MODES, LoopOptions
from .rerun_viewer import LIVE

MODE_HELP = (
    "sync: the robot waits for each inference; async: it goes on with the last chunk; rtc: and chunks join without a "
    "jump; default: %(default)s"
)
ROBOT_HELP = "gym:ID, replay:FILE, lerobot:TYPE, openpi:MODULE:CLASS, MODULE:CLASS, or one of an installed package"
CONTRACT_HELP = "with --policy: the contract where the server does not tell it; or a name of openpi's, e.g. pi05_droid"
TRUST_HELP = "load engines that were built elsewhere and bring code of their own to run"
SEQUENTIAL_HELP = "keep one graph in memory at a time and load it for every inference: for small boards, and slow"


def build_parser() -> Parser:
    """The command line."""
    defaults = LoopOptions()
    parser = Parser(prog="ki-run", description="Run a bundle on a robot, or on a recording of one.")
    add = parser.add_argument
    add("bundle", nargs="?", metavar="BUNDLE", help="folder written by ki-export")
    add("--policy", metavar="URL", help="ws://HOST:PORT of a policy server, of openpi's kind, instead of a bundle")
    add("--contract", metavar="FILE", help=CONTRACT_HELP)
    add("--robot", required=True, metavar="NAME", help=ROBOT_HELP)
    add("--robot-config", metavar="FILE", help="JSON that describes the robot, see docs/robots.md")
    add("--episodes", type=int, default=defaults.episodes, metavar="N", help="default %(default)s")
    add("--seed", type=int, default=defaults.seed, metavar="S", help="episode i uses seed S + i; default %(default)s")
    add("--prompt", metavar="TEXT", help="instruction, instead of the robot's own")
    add("--max-steps", type=int, metavar="N", help="end an episode after N commands")
    add("--max-seconds", type=float, metavar="S", help="stop the run after S seconds")
    add("--disturb", type=int, metavar="N", help="simulated arm: the target moves after N commands of an episode")
    add("--record", metavar="DIR", help="keep a LeRobotDataset, films, plots and run.html in this folder")
    add(
        "--record-every-tick",
        action="store_true",
        help="for it observe at every tick, where the robot is not waited for",
    )
    add("--rerun", nargs="?", const=LIVE, metavar="FILE.rrd", help="show the run in rerun, or write it for rerun")
    add("--json", action="store_true", help="print the report as JSON")
    add("--verbose", action="store_true", help="also say whether PyTorch was loaded, which a robot does not need")
    _add_loop(parser.add_argument_group("the loop").add_argument)
    _add_safety(parser.add_argument_group("safety, see docs/safety.md").add_argument, defaults)
    _add_levels(parser.add_argument_group("high-level words, see docs/text.md").add_argument)
    _add_check(parser.add_argument_group("the self-check, see docs/self-check.md").add_argument)
    _add_engine(parser.add_argument_group("the engine").add_argument)
    return parser


def _add_levels(add: Callable[..., object]) -> None:
    add("--subtask-every", type=float, metavar="S", help="write the next subtask every S seconds, and act on it")
    add("--subtask-question", metavar="TEXT", help="what is asked for it; {task} is the task; default: the task alone")


def _add_check(add: Callable[..., object]) -> None:
    add("--self-check", type=float, metavar="S", help="compare flow and FAST actions every S seconds, in spare time")
    add("--self-check-limit", metavar="X|FILE", help="hold where they disagree by more than this")
    add("--self-check-save", metavar="FILE", help="keep the limit that follows from this run, which was a normal one")


def _add_loop(add: Callable[..., object]) -> None:
    add("--mode", choices=MODES, default="sync", help=MODE_HELP)
    add("--rate", type=float, metavar="HZ", help="commands a second; default: the contract's, else the robot's")
    add("--unpaced", dest="paced", action="store_false", help="as fast as the robot takes commands, for simulators")
    add("--delay", type=int, metavar="N", help="lock-step on a simulated clock: an inference takes exactly N commands")
    add("--crossfade", type=int, default=0, metavar="K", help="mode async: blend a new chunk in over K actions")
    add(
        "--execute", type=int, metavar="K", help="actions to execute before the next inference; default: the contract's"
    )
    add("--num-steps", type=int, metavar="N", help="denoising steps; default: the bundle's")


def _add_safety(add: Callable[..., object], defaults: LoopOptions) -> None:
    add("--limits", metavar="FILE", help="limits of the commands in robot units; tightens those of the robot")
    add("--show-limits", action="store_true", help="print the limits and where they come from, and run nothing")
    add("--trip-after", type=int, metavar="N", help="stop after N violations of limits in a row; default: 1 s")
    add("--starve-limit", type=int, metavar="N", help="stop after N ticks without a fresh action; default: 2 s")
    add("--stale-after", type=float, default=defaults.stale_after, metavar="S", help="hold where readings are older")
    add("--stop-file", metavar="FILE", help="stop when this file appears")
    add("--stop-keys", action="store_true", help="stop at q or the space bar in the terminal")


def _add_engine(add: Callable[..., object]) -> None:
    add("--backend", default="auto", metavar="NAME", help=BACKENDS_HELP)
    add("--threads", type=int, metavar="N", help="CPU threads of the engine; default: its own choice")
    add("--trust-engines", action="store_true", help=TRUST_HELP)
    add("--sequential", action="store_true", help=SEQUENTIAL_HELP)
    add("--verify", action="store_true", help="check the bundle's hashes before running")
    add(
        "--digest",
        metavar="HEX",
        help="run only the bundle with this digest, which its export printed; checks all hashes",
    )
