"""How to run: the options of a control loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ki_edge import flow
from ki_edge.arguments import MAX_SEED, count
from ki_edge.errors import ArgumentError

Mode = Literal["sync", "async", "rtc"]
MODES: tuple[str, ...] = get_args(Mode)
MOST = 1 << 31  # episodes, or steps of one
SLOWEST, FASTEST = 1e-3, 1e4  # actions a second


@dataclass(frozen=True)
class LoopOptions:
    """How to run.

    `mode`: "sync" waits for every inference; "async" goes on with the chunk that it has while the next is computed;
    "rtc" also tells the policy which actions will be executed meanwhile, so that chunks join without a jump.
    `delay`: run in lock-step on a simulated clock, every inference takes exactly so many actions; None: real time.
    """

    episodes: int = 1
    seed: int = 0
    mode: Mode = "sync"
    rate: float | None = None  # actions a second; None: the contract's, else the robot's
    paced: bool = True  # False: as fast as the robot takes them, for simulators; sync alone
    delay: int | None = None
    crossfade: int = 0  # actions over which a new chunk is blended in; async alone
    execute: int | None = None  # actions of a chunk before the next inference; None: the contract's
    num_steps: int | None = None  # of denoising; None: the bundle's
    prompt: str | None = None  # instead of the robot's own
    max_steps: int | None = None  # ticks of an episode; None: until the robot says that it is over
    max_seconds: float | None = None  # of the whole run, then it stops
    self_check: float | None = None  # seconds between two checks of the policy's heads against each other; None: none
    self_check_limit: float | None = None  # of their disagreement, beyond which the robot holds; None: only told
    starve_limit: int | None = None  # ticks without a fresh action until the robot is stopped; None: two seconds
    stale_after: float = 0.5  # seconds that a reading may be old
    limits: str | Path | None = None  # a limits.json
    trip_after: int | None = None  # commands in a row that the guards had to change until it is stopped; None: a second
    stop_file: str | Path | None = None  # the run stops when it appears
    stop_keys: bool = False  # and by q or the space bar on the terminal
    close_robot: bool = True  # at the end of `run`; False: the caller goes on with the robot, and closes it

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ArgumentError(f"mode {self.mode!r:.60}: expected one of {', '.join(MODES)}")
        for name in ("episodes", "execute", "max_steps", "starve_limit", "trip_after"):
            value = getattr(self, name)
            if value is not None or name == "episodes":
                count(value, name, MOST)
        for name in ("delay", "crossfade"):
            if getattr(self, name) is not None:
                count(getattr(self, name), name, MOST, least=0)
        if self.num_steps is not None:
            flow.check_steps(self.num_steps)
        count(self.seed, "seed", MAX_SEED - MOST, least=0)
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise ArgumentError(f"prompt: expected text, got {type(self.prompt).__name__}")
        _number(self.rate, "rate", SLOWEST, FASTEST)
        _number(self.max_seconds, "max_seconds", 0.0, 1e9)
        _number(self.stale_after, "stale_after", 1e-3, 1e9)
        _number(self.self_check, "self_check", 0.0, 1e9)
        _number(self.self_check_limit, "self_check_limit", 0.0, 1e9)
        self._check_agreement()

    def _check_agreement(self) -> None:
        if self.crossfade and self.mode != "async":
            raise ArgumentError(f"crossfade {self.crossfade} blends chunks of mode async; the mode is {self.mode}")
        if self.self_check_limit is not None and self.self_check is None:
            raise ArgumentError("self_check_limit is of a self-check: say every how many seconds (--self-check)")
        if not self.paced and self.mode != "sync" and self.delay is None:
            raise ArgumentError(
                f"unpaced: mode {self.mode} computes beside a robot that moves at a rate; leave the pace on, or give "
                "a delay, with which the clock is simulated"
            )


def _number(value: float | None, name: str, least: float, most: float) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ArgumentError(f"{name} {value!r:.60}: expected a number from {least:g} to {most:g}")
