"""What a client asks: an observation in openpi's form, and under the key "ki_edge" what plain clients do not send.

id           text, comes back with the answer
head         "flow" (default), "fast" (actions decoded from FAST tokens) or "text" (words)
seed         integer, or noise: float32 [H, A], where the flow starts from
num_steps    of the denoising
prompt       in the observation's stead; of head "text" the question
rtc          {"actions": float [n, a] in robot units, "valid": rows of them that count, "delay": integer,
             "way": "guided" or "trained", "maximum", "schedule", "end"}: the chunk that the robot executes meanwhile
max_tokens, temperature, allow_loc    of head "text"
patience_ms  after which the answer is of no use: a request that waited longer is not run
begins       true with the first request of an episode
reported     {name: number}: what the client counted since its last request, for the server's metrics
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ki_edge.arguments import array_of, count, numbers
from ki_edge.errors import ArgumentError, ObservationError
from ki_edge.policy.chunking import MOST_ROWS, Guiding, PreviousChunk
from ki_runtime.remote.abilities import OWN, WAYS

HEADS = ("flow", "fast", "text")
MOST_ID, MOST_REPORTED, MOST_NAME = 64, 32, 64
MOST_TOKENS = 256
OF_HEADS = {
    "flow": ("seed", "noise", "num_steps", "rtc"),
    "fast": (),
    "text": ("seed", "max_tokens", "temperature", "allow_loc"),
}
OF_ALL = ("id", "head", "prompt", "patience_ms", "begins", "reported")
NAMES = (*OF_ALL, *dict.fromkeys(name for names in OF_HEADS.values() for name in names))  # of all of them
OF_RTC = ("actions", "valid", "delay", "way", "maximum", "schedule", "end")


@dataclass(frozen=True, eq=False)
class Question:
    """One call of the policy: `infer`, `infer_fast` or `infer_text`, by `head`, with these arguments."""

    observation: Mapping[str, Any]
    head: str = "flow"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> Hashable:
        """Questions of equal groups may run in one batch; None: this one runs alone."""
        if self.head != "flow":
            return None
        guiding = self.arguments.get("guiding")
        return self.arguments.get("num_steps"), self.arguments.get("way"), "previous" in self.arguments, guiding


@dataclass(frozen=True, eq=False)
class Asked:
    """A question and what its client said besides."""

    question: Question
    id: str
    patience: float | None  # seconds
    begins: bool
    reported: Mapping[str, float]


def read_question(content: Any, most_steps: int) -> Asked:
    """What an unpacked frame asks. ObservationError for one that is no map, ArgumentError for the rest."""
    if not isinstance(content, Mapping):
        raise ObservationError(f"an observation is a map, got {type(content).__name__}")
    extra = content.get(OWN, {})
    if not isinstance(extra, Mapping):
        raise ArgumentError(f"{OWN}: expected a map, got {type(extra).__name__}")
    head = extra.get("head", "flow")
    if not isinstance(head, str) or head not in HEADS:
        raise ArgumentError(f"{OWN}/head {head!r:.40}: expected one of {', '.join(HEADS)}")
    _check_names(extra, (*OF_ALL, *OF_HEADS[head]), OWN, f" of head {head}")
    observation = {key: value for key, value in content.items() if key != OWN}
    arguments = {name: READERS[name](extra[name]) for name in OF_HEADS[head] if name in READERS and name in extra}
    if "num_steps" in extra:
        arguments["num_steps"] = count(extra["num_steps"], "num_steps", most_steps)
    if "rtc" in extra:
        arguments |= _rtc(extra["rtc"])
    if "prompt" in extra:
        prompt = extra["prompt"]
        if not isinstance(prompt, str):
            raise ArgumentError(f"{OWN}/prompt: expected text, got {type(prompt).__name__}")
        if head == "text":
            arguments["prompt"] = prompt
        else:
            observation = {key: value for key, value in observation.items() if key != "task"} | {"prompt": prompt}
    patience = extra.get("patience_ms")
    return Asked(
        Question(observation, head, arguments),
        _id(extra.get("id")),
        None if patience is None else _number(patience, "patience_ms", least=0.0) / 1e3,
        _flag(extra.get("begins", False), "begins"),
        _reported(extra.get("reported", {})),
    )


def _rtc(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ArgumentError(f"{OWN}/rtc: expected a map, got {type(given).__name__}")
    _check_names(given, OF_RTC, f"{OWN}/rtc")
    if "actions" not in given or "delay" not in given:
        raise ArgumentError(f"{OWN}/rtc: expected the actions and the delay of the previous chunk")
    actions = numbers(given["actions"], "rtc actions")
    if "valid" in given and actions.ndim == 2:
        actions = actions[: count(given["valid"], "rtc valid", len(actions))]
    found: dict[str, Any] = {"previous": PreviousChunk(actions, given["delay"])}
    if (way := given.get("way")) is not None:
        if not isinstance(way, str) or way not in WAYS:
            raise ArgumentError(f"rtc way {way!r:.40}: expected guided or trained")
        found["way"] = way
    told = {name: given[name] for name in ("maximum", "schedule", "end") if given.get(name) is not None}
    if told:
        found["guiding"] = Guiding(**_guiding(told))
    return found


def _guiding(told: dict[str, Any]) -> dict[str, Any]:
    if "maximum" in told:
        told["maximum"] = _number(told["maximum"], "rtc maximum", least=0.0)
    if not isinstance(told.get("schedule", ""), str):
        raise ArgumentError(f"rtc schedule: expected text, got {type(told['schedule']).__name__}")
    if "end" in told:
        told["end"] = count(told["end"], "rtc end", MOST_ROWS, least=0)
    return told


def _check_names(given: Mapping[Any, Any], known: tuple[str, ...], where: str, what: str = "") -> None:
    unknown = [str(name)[:MOST_NAME] for name in given if name not in known]
    if unknown:
        raise ArgumentError(f"{where}: unknown {', '.join(unknown[:4])}{what}; known are {', '.join(known)}")


def _id(given: Any) -> str:
    if given is None:
        return uuid.uuid4().hex[:12]
    if not isinstance(given, str) or not 0 < len(given) <= MOST_ID or not given.isprintable():
        raise ArgumentError(f"{OWN}/id: expected a printable text of at most {MOST_ID} characters")
    return given


def _number(given: Any, name: str, least: float = -np.inf) -> float:
    """A finite number, at least so much. ArgumentError."""
    if isinstance(given, bool | np.bool_) or not isinstance(given, int | float | np.integer | np.floating):
        raise ArgumentError(f"{name}: expected a number, got {type(given).__name__}")
    try:
        found = float(given)
    except OverflowError:
        found = np.inf
    if not (np.isfinite(found) and found >= least):
        raise ArgumentError(f"{name} {found:g}: expected a finite number" + (f" from {least:g}" if least > -1 else ""))
    return found


def _flag(given: Any, name: str) -> bool:
    if not isinstance(given, bool | np.bool_):
        raise ArgumentError(f"{name}: expected true or false, got {type(given).__name__}")
    return bool(given)


def _reported(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping) or len(given) > MOST_REPORTED:
        raise ArgumentError(f"reported: expected a map of at most {MOST_REPORTED} numbers")
    found = {}
    for name, value in given.items():
        if not isinstance(name, str) or len(name) > MOST_NAME or not name.isprintable():
            raise ArgumentError(f"reported: expected names of at most {MOST_NAME} printable characters")
        found[name] = _number(value, f"reported {name}")
    return found


READERS: Mapping[str, Callable[[Any], Any]] = {
    "seed": lambda given: count(given, "seed", (1 << 63) - 1, least=0),
    "noise": lambda given: array_of(given, "noise"),
    "max_tokens": lambda given: count(given, "max_tokens", MOST_TOKENS),
    "temperature": lambda given: _number(given, "temperature", least=0.0),
    "allow_loc": lambda given: _flag(given, "allow_loc"),
}
