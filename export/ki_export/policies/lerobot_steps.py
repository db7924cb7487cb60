"""What LeRobot's processor steps say of the prompt and of relative actions."""

from __future__ import annotations

from typing import Any

from ki_edge.errors import CheckpointError

from .lerobot_config import Notes
from .lerobot_options import ABSOLUTE, NORMALIZER, PI0_PROMPTS, PI05_PROMPT, RELATIVE, TOKENIZER, UNNORMALIZER
from .lerobot_processors import PREPROCESSOR, Processor, Step


def read_prompt(before: Processor, notes: Notes) -> tuple[str, ...]:
    """Prompt format and longest prompt; returns the tokenizer's repository, or its path in the checkpoint."""
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
    name = tokenizer.config.get("tokenizer_name")
    return () if name is None else (name,)


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
