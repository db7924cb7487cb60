"""What LeRobot's processor steps say of the prompt and of relative actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ki_edge.errors import CheckpointError

from .lerobot_config import CONFIG, Notes
from .lerobot_options import ABSOLUTE, NORMALIZER, PI0_PROMPTS, PI05_PROMPT, RELATIVE, TOKENIZER, UNNORMALIZER
from .lerobot_processors import PREPROCESSOR, Processor, Step
from .request import PolicyRequest


def read_prompt(
    before: Processor, settings: Mapping[str, Any], request: PolicyRequest, notes: Notes
) -> tuple[str, ...]:
    """Prompt format, longest prompt and padding; returns the tokenizer's repository, or its path in the checkpoint."""
    pi0 = [name for name in PI0_PROMPTS if name in before.steps]
    prompts = pi0 + [PI05_PROMPT] * (PI05_PROMPT in before.steps)
    if len(prompts) != 1 or TOKENIZER not in before.steps:
        raise CheckpointError(
            f"{before.where}: found the prompt steps {prompts or 'none'}; expected one of {PI05_PROMPT}, "
            f"{', '.join(PI0_PROMPTS)}, and {TOKENIZER} after it"
        )
    before.in_order(prompts[0], TOKENIZER)
    notes.add(PREPROCESSOR, prompt_format="lerobot_pi0" if pi0 else "pi05")
    tokenizer = before.steps[TOKENIZER]
    notes.add(PREPROCESSOR, max_token_len=tokenizer.config["max_length"])
    if not pi0:
        before.in_order(NORMALIZER, PI05_PROMPT)
        _read_padding(before, settings, request, notes)
    name = tokenizer.config.get("tokenizer_name")
    return () if name is None else (name,)


def _read_padding(before: Processor, settings: Mapping[str, Any], request: PolicyRequest, notes: Notes) -> None:
    """Whether the prompt's state is padded, as by LeRobot up to 0.4; 0.5.1, which does not, has relative actions."""
    padded, size = settings.get("max_state_dim", 32), notes.values.get("state_dim", 0)
    if request.pad_state_first is not None:
        notes.add("--padded-state-prompt", pad_state_first=request.pad_state_first)
    elif size >= padded:
        notes.add(CONFIG, pad_state_first=False)
    elif RELATIVE in before.steps or "use_relative_actions" in settings:
        notes.add(PREPROCESSOR, pad_state_first=False)
    else:
        notes.missing.append(
            f"whether the prompt's {size} state numbers were padded to {padded} is not recorded (give "
            "--padded-state-prompt if it was trained with LeRobot 0.4 or older, --no-padded-state-prompt if with a "
            "newer one or converted from openpi)"
        )
    width = notes.values.get("model_action_dim")
    if notes.values.get("pad_state_first") and padded != width:
        raise CheckpointError(
            f"{before.folder / CONFIG}: the prompt's state is padded to {padded}, the actions to {width}"
        )


def read_relative(before: Processor, after: Processor, notes: Notes) -> None:
    """The delta mask, as LeRobot's RelativeActionsProcessorStep builds it, and the actions' names."""
    relative, absolute = before.steps.get(RELATIVE), after.steps.get(ABSOLUTE)
    enabled = {bool(step is not None and step.config.get("enabled")) for step in (relative, absolute)}
    if len(enabled) > 1:
        raise CheckpointError(
            f"{before.folder}: relative actions are on in one of its two processors, off in the other"
        )
    before.in_order(RELATIVE, NORMALIZER)
    after.in_order(UNNORMALIZER, ABSOLUTE)
    dim = notes.values.get("action_dim", 0)
    names = _names(relative)
    if names is not None and len(names) == dim:
        notes.add(PREPROCESSOR, action_names=names)
    if relative is None or enabled == {False}:
        notes.add(PREPROCESSOR, delta_mask=None)
        return
    if notes.values.get("state_dim", dim) < dim:
        raise CheckpointError(
            f"{before.where}: relative actions of {dim} numbers need as many of the state, which has "
            f"{notes.values['state_dim']}"
        )
    notes.add(PREPROCESSOR, delta_mask=relative_mask(dim, names, relative.config.get("exclude_joints") or ()))


def relative_mask(dim: int, names: tuple[str, ...] | None, excluded: Any) -> tuple[bool, ...]:
    """Which of `dim` actions are relative: all but those whose name contains an excluded word, whatever its case."""
    words = [str(word).lower() for word in excluded if word]
    given = [str(name).lower() for name in (names or ())[:dim]]
    mask = [not any(word in name for word in words) for name in given]
    return tuple(mask + [True] * (dim - len(mask)))


def _names(relative: Step | None) -> tuple[str, ...] | None:
    names = None if relative is None else relative.config.get("action_names")
    return None if names is None else tuple(names)
