"""Every option of every processor step of LeRobot's π0.5 and π0: the values with which a policy can be exported.

What is read elsewhere has only its type here; what the runtime cannot do has the values that need nothing done. A step
or an option that is not in this table changes the policy in a way that is not known, so it is refused by name
(lerobot/processor/*.py and policies/pi0*/processor_pi0*.py, releases 0.4.0 to 0.6.1 and main of August 2026).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ki_edge.errors import CheckpointError

RENAME, RELATIVE, NORMALIZER = "rename_observations_processor", "relative_actions_processor", "normalizer_processor"
PI05_PROMPT, TOKENIZER = "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor"
PI0_PROMPTS = ("pi0_new_line_processor", "smolvla_new_line_processor")
UNNORMALIZER, ABSOLUTE = "unnormalizer_processor", "absolute_actions_processor"
EPSILON = 1e-8

Allowed = tuple[object, ...] | Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """One of the table's types, like its siblings below."""
    return isinstance(value, str) and value != ""


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


def is_features(value: Any) -> bool:
    """{name: {"type": text, "shape": [integers]}}"""
    return isinstance(value, dict) and all(is_feature(feature) for feature in value.values())


def is_feature(value: Any) -> bool:
    if not isinstance(value, dict) or not is_text(value.get("type")):
        return False
    shape = value.get("shape")
    return isinstance(shape, list) and all(type(size) is int and size >= 1 for size in shape)


def is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The same, or null."""

    def allowed(value: Any) -> bool:
        return value is None or check(value)

    allowed.__name__ = f"{check.__name__} or null"
    return allowed


WANTED: Mapping[str, str] = {
    "is_text": "a name",
    "is_names": "a list of names",
    "is_text_map": "an object that maps names to names",
    "is_features": "an object of features with type and shape",
    "is_size": "a positive integer",
    "is_truth": "true or false",
}
NORMALIZATION: Mapping[str, Allowed] = {
    "eps": (EPSILON,),
    "features": is_features,
    "norm_map": is_text_map,
    "normalize_observation_keys": or_null(is_names),
}
# step -> option -> values that can be exported
OPTIONS: Mapping[str, Mapping[str, Allowed]] = {
    RENAME: {"rename_map": is_text_map},
    "to_batch_processor": {},
    "identity_processor": {},
    # The device is the runtime's choice. A cast to a narrower type would change the pictures and the state.
    "device_processor": {"device": or_null(is_text), "float_dtype": (None, "float32", "float")},
    RELATIVE: {"enabled": is_truth, "exclude_joints": or_null(is_names), "action_names": or_null(is_names)},
    NORMALIZER: NORMALIZATION,
    PI05_PROMPT: {"max_state_dim": is_size, "task_key": ("task",), "include_state_in_prompt": (True,)},
    **{name: {} for name in PI0_PROMPTS},
    TOKENIZER: {
        "max_length": is_size,
        "task_key": ("task",),
        "padding_side": ("right",),
        "padding": ("max_length", "longest", "do_not_pad", True, False),  # padding is masked: it has no effect
        "truncation": (True, False),  # a prompt that is too long is refused, never cut
        "tokenizer_name": or_null(is_text),
    },
    UNNORMALIZER: NORMALIZATION,
    ABSOLUTE: {"enabled": is_truth},
}  # fmt: skip
# options without which a step says nothing of what it must say
REQUIRED: Mapping[str, tuple[str, ...]] = {
    NORMALIZER: ("features", "norm_map"),
    UNNORMALIZER: ("features", "norm_map"),
    TOKENIZER: ("max_length",),
}
KEYS = frozenset({"registry_name", "class", "config", "state_file", "artifacts"})  # of a step's entry


def check_options(where: str, step: str, config: Mapping[str, Any]) -> None:
    """CheckpointError for an option of `step` that is missing, not known, or has a value that cannot be exported."""
    known = OPTIONS[step]
    for name in REQUIRED.get(step, ()):
        if name not in config:
            raise CheckpointError(f"{where}: the step '{step}' records no {name}, so what it does is not known")
    for name, value in config.items():
        if name not in known:
            raise CheckpointError(
                f"{where}: the option {name} of the step '{step}' ({value!r:.60}) is not known, so what it does to the "
                f"policy would be lost; known are {', '.join(known) or 'none'}"
            )
        allowed = known[name]
        if isinstance(allowed, tuple):
            if not any(type(value) is type(one) and value == one for one in allowed):
                given = ", ".join(map(repr, allowed))
                raise CheckpointError(f"{where}: {name} is {value!r:.60} in the step '{step}'; expected {given}")
        elif not allowed(value):
            wanted = allowed.__name__
            for check in sorted(WANTED, key=len, reverse=True):
                wanted = wanted.replace(check, WANTED[check])
            raise CheckpointError(f"{where}: {name} must be {wanted}, not {value!r:.60} (step '{step}')")
