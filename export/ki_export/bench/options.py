"""What is measured: the cases, how often, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ki_edge import flow
from ki_edge.errors import ArgumentError

CAMERAS, PROMPT_TOKENS = 2, 30  # of the main case, if there is room for them
PADDED_PROMPT = 200  # openpi's max_token_len of π0.5
CAMERA_SLOTS = 3  # openpi's: base, left wrist, right wrist
DTYPES = ("float32", "bfloat16")
PICTURE_SIZE = (480, 640)  # height, width of a camera
MAX_SIDE = 8192


@dataclass(frozen=True)
class Case:
    """One kind of inference: `cameras` present and `tokens` in the prompt; the rest of slots and prompt is padding."""

    cameras: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class BenchOptions:
    """How to measure. Empty tuples and None: the bundle's own, or this machine's.

    Every combination of `cameras`, `prompts` (tokens) and `steps` is measured. The first of each is the main case: it
    is drawn stage by stage, and compared with `others`: bundles, and checkpoints in PyTorch in each of `dtypes`.
    `picture_size`: height and width of a policy's pictures before they are resized, None: PICTURE_SIZE. `sequential`:
    one graph in memory at a time; loading it is part of each stage then.
    """

    backend: str = "auto"
    threads: int | None = None
    steps: tuple[int, ...] = ()
    cameras: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    rounds: int = 10
    warm_up_s: float = 20.0
    fast: bool = False
    others: tuple[Path, ...] = ()
    picture_size: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = DTYPES
    sequential: bool = False

    def __post_init__(self) -> None:
        for steps in self.steps:
            flow.check_steps(steps)
        for name in ("cameras", "prompts"):
            for count in getattr(self, name):
                if count < 1:
                    raise ArgumentError(f"{name} {count}: expected positive integers")
        if self.rounds < 1 or not self.warm_up_s >= 0:
            raise ArgumentError(f"rounds {self.rounds}, warm_up_s {self.warm_up_s}: expected 1 or more, 0 or more")
        if self.threads is not None and self.threads < 1:
            raise ArgumentError(f"threads {self.threads}: expected a positive integer")
        if self.picture_size is not None and not all(1 <= side <= MAX_SIDE for side in self.picture_size):
            raise ArgumentError(f"picture size {self.picture_size}: expected height and width from 1 to {MAX_SIDE}")
        unknown = [dtype for dtype in self.dtypes if dtype not in DTYPES]
        if unknown or not self.dtypes:
            raise ArgumentError(f"dtypes {list(self.dtypes)}: expected some of {', '.join(DTYPES)}")


def cases(options: BenchOptions, *, slots: int, padded: int, steps: int) -> list[Case]:
    """All combinations, the main case first. `slots`, `padded`, `steps`: the bundle's cameras, prompt length, steps.

    ArgumentError for more cameras or tokens than there is room for.
    """
    for cameras in options.cameras:
        if cameras > slots:
            raise ArgumentError(f"cameras {cameras}: this policy has {slots}")
    for tokens in options.prompts:
        if tokens > padded:
            raise ArgumentError(f"prompt {tokens} tokens: this policy's prompts have at most {padded}")
    present, prompts = options.cameras or (min(CAMERAS, slots),), options.prompts or (min(PROMPT_TOKENS, padded),)
    return [Case(*each) for each in dict.fromkeys(product(present, prompts, options.steps or (steps,)))]
