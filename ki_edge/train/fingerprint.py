"""What a training run is made of, recorded with its state: a resumed run must be made of the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError

from .demonstrations import FILES, Demonstrations

FREE = frozenset({"settings.save_every", "settings.log_every"})  # change nothing that is computed
BEFORE = {"settings.rtc_max_delay": 0, "settings.rtc_offset": 0.0}  # of runs from before there was such a setting
META = ("cameras", "state_names", "action_names", "horizon", "frames", "prompts", "control_hz")
INIT = "init"
SHOWN = 4
Fingerprint = Mapping[str, Any]  # "group.name" -> a JSON value


def gather(
    data: Demonstrations, config: Pi05Config, settings: Mapping[str, Any], init: Fingerprint | None
) -> Fingerprint:
    """Settings, geometry and demonstrations of a run; `init`: the digest of the weights that it starts from."""
    found: dict[str, Any] = {f"settings.{name}": value for name, value in settings.items()}
    found |= _flat("model", config.to_dict())
    found |= {f"demonstrations.{name}": data.meta.get(name) for name in META}
    found |= {f"demonstrations.{name}": digest for name, digest in data.digests().items()}
    return {**found, **(init or {})}


def differences(recorded: Fingerprint, now: Fingerprint) -> list[str]:
    """What a resumed run would change, a sentence each. Starting weights count only where they are given again."""
    recorded = {**BEFORE, **recorded}
    names = [name for name in {**recorded, **now} if name not in FREE and (name != INIT or name in now)]
    return [_say(name, recorded.get(name), now.get(name)) for name in names if recorded.get(name) != now.get(name)]


def check_same(recorded: Fingerprint, now: Fingerprint, where: Path) -> None:
    """ArgumentError names what is not as it was."""
    if found := differences(recorded, now):
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ArgumentError(
            f"{where} cannot be resumed: {'; '.join(found[:SHOWN])}{more}. Resume with what it was started with, or "
            "start another run, from its weights with --init"
        )


def as_json(facts: Fingerprint) -> Fingerprint:
    """Fingerprint as they are read back: tuples become lists."""
    return dict(json.loads(json.dumps(facts)))


def digest_weights(state: Mapping[str, Tensor]) -> Fingerprint:
    """The digest of starting weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().float().numpy().tobytes())
    return {INIT: digest.hexdigest()}


def _flat(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(f"{name}.{key}", inner)
    return found


def _say(name: str, recorded: object, now: object) -> str:
    group, _, rest = name.partition(".")
    if name == INIT:
        return "--init: the run started from other weights"
    if group == "demonstrations" and rest in FILES:
        return f"{rest} of the demonstrations has other contents"
    label = rest if group == "settings" else f"{rest} of the {group}"
    return f"{label}: the run has {str(recorded)[:60]}, now {str(now)[:60]}"
