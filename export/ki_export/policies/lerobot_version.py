"""What depends on the version of LeRobot that trained a policy: the margin of its pictures, the state in its prompt.

    before 0.4   (π0 only) a margin of -1 at the left and the top
    0.4          a margin of -3 around the picture; the prompt's state is padded, to 32 numbers (PADDED) unless its
                 saved step says otherwise; 0.4.0 to 0.4.2 add up the times of the flow in float32, as those before
    0.5          a margin of -1 around the picture; the prompt holds the state as it is; all versions since

One commit changed both (f0d2b37, March 2026), and no file names the version. Some of a folder's files have fields that
only one side writes; where none has, it is asked for if any of the two matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.files.reading import read_object
from ki_edge.policy.contract import MODEL_ACTION_DIM
from ki_edge.policy.images import Resize, inner_size

from .lerobot_cameras import EMPTY
from .lerobot_config import CONFIG, Notes
from .lerobot_options import PI05_PROMPT, RELATIVE
from .lerobot_processors import PREPROCESSOR, Processor
from .request import LEROBOT_VERSIONS, PolicyRequest

RESIZES: Mapping[str, Resize] = {"0.4": "torch_pad_04", "0.5": "torch_pad"}
TRAIN_CONFIG = "train_config.json"
OLD_SIZE, SIZE = "resize_imgs_with_padding", "image_resolution"  # of config.json, before 0.4 and since
PADDED = 32  # 0.4 makes the step anew from what it saved, which is nothing: config.json's max_state_dim is not heard
PEFT = ("use_peft", "freeze_vision_encoder")  # of config.json since 0.4.3
ADDED_TIMES = f"{CONFIG}, of LeRobot before 0.4.3"  # the source of a time convention that makes a difference of 1e-5
EITHER = f"{CONFIG}, the same in every version"  # the source of a field for which the version does not matter


def read_version(
    folder: Path, settings: Mapping[str, Any], before: Processor | None, request: PolicyRequest, notes: Notes
) -> None:
    """How pictures are resized and whether the prompt's state is padded, or the question that decides both.

    ArgumentError if `request.lerobot_version` is none that is known, CheckpointError if the folder tells another.
    """
    given = request.lerobot_version
    if given is not None and given not in LEROBOT_VERSIONS:
        raise ArgumentError(f"--lerobot-version {given}: expected one of {', '.join(LEROBOT_VERSIONS)}")
    if OLD_SIZE in settings and SIZE not in settings:
        _expect(given, "before 0.4", f"{CONFIG} has '{OLD_SIZE}'", folder)
        notes.add(CONFIG, resize="torch_pad_03")
        notes.add(ADDED_TIMES, time_convention="openpi")
        return
    recorded, source, sign = _recorded(folder, settings, before)
    if recorded is not None:
        _expect(given, recorded, sign, folder)
    padded = _padding(settings, before, notes)
    depends = _margins(settings)
    if padded is not None:
        depends.append(f"0.4 padded the prompt's {notes.values.get('state_dim', 0)} state numbers to {padded}")
    saved_early = not any(name in settings for name in PEFT)
    version, known = (recorded, source) if recorded is not None else (given, "--lerobot-version")
    if version is not None:
        _note(version, known, padded, notes)
    elif depends:
        hint = f", though {CONFIG} was saved by 0.4.0 to 0.4.2, after training or converting" if saved_early else ""
        notes.missing.append(
            f"which LeRobot it was trained with is not recorded{hint}, and {'; and '.join(depends)} "
            "(give --lerobot-version: 0.4; or 0.5 for any newer one, and for a policy that was trained with openpi and "
            "converted)"
        )
    else:
        _note("0.5", EITHER, None, notes)
    if saved_early and version != "0.5":
        notes.add(ADDED_TIMES, time_convention="openpi")


def _expect(given: str | None, recorded: str, sign: str, folder: Path) -> None:
    if given not in (None, recorded):
        when = recorded if recorded.startswith("before") else f"{recorded}{' or newer' if recorded == '0.5' else ''}"
        raise CheckpointError(
            f"--lerobot-version {given}: {folder} is of LeRobot {when}, since its {sign}: leave the flag out"
        )


def _recorded(folder: Path, settings: Mapping[str, Any], before: Processor | None) -> tuple[str | None, str, str]:
    """(version, the file that tells it, by what); (None, "", "") if none does."""
    if "use_relative_actions" in settings:  # April 2026
        return "0.5", CONFIG, f"{CONFIG} has 'use_relative_actions'"
    if before is not None and RELATIVE in before.steps:
        return "0.5", PREPROCESSOR, f"{PREPROCESSOR} has the step '{RELATIVE}'"
    if (folder / TRAIN_CONFIG).is_file():
        training = read_object(folder / TRAIN_CONFIG, CheckpointError)
        if "cudnn_deterministic" in training:  # 0.5.0, days after the change
            return "0.5", TRAIN_CONFIG, f"{TRAIN_CONFIG} has 'cudnn_deterministic'"
        if "peft" not in training:  # January 2026, in 0.4.3
            return "0.4", TRAIN_CONFIG, f"{TRAIN_CONFIG} has no 'peft', which 0.4.3 brought"
    return None, "", ""


def _note(version: str, source: str, padded: int | None, notes: Notes) -> None:
    pads = padded is not None and version == "0.4"
    notes.add(source, resize=RESIZES[version], pad_state_first=pads)
    if pads:
        width = notes.values.get("model_action_dim", MODEL_ACTION_DIM)
        notes.add(source, prompt_state_dim=None if padded == width else padded)


def _padding(settings: Mapping[str, Any], before: Processor | None, notes: Notes) -> int | None:
    """To how many numbers 0.4 padded the prompt's state; None if that changes nothing.

    Without a saved step it is made from config.json.
    """
    if before is None:
        in_prompt, size = settings.get("type") == "pi05", settings.get("max_state_dim", PADDED)
    else:
        in_prompt = PI05_PROMPT in before.steps
        size = before.steps[PI05_PROMPT].config.get("max_state_dim", PADDED) if in_prompt else PADDED
    return int(size) if in_prompt and notes.values.get("state_dim", 0) < size else None


def _margins(settings: Mapping[str, Any]) -> list[str]:
    """Which cameras have a margin, at most the first; [] if all pictures have the model's aspect ratio."""
    size = settings.get(SIZE) or [224, 224]
    for name, feature in (settings.get("input_features") or {}).items():
        if feature.get("type") != "VISUAL" or name.startswith(EMPTY):
            continue
        shape = feature.get("shape")
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
            return [f"0.4 gave pictures another margin, of which '{name}' may have one: its size is not recorded"]
        height, width = shape[1:] if shape[0] == 3 else shape[:2]
        if inner_size(height, width, size[0], size[1]) != tuple(size):
            return [f"0.4 gave pictures another margin, which '{name}' of {height}x{width} has"]
    return []
