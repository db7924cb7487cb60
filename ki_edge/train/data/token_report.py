"""How well a model's tokens fit its data: how many a sample takes, and how exactly FAST spells its actions.

OUT/training/fast.json and fast.png; the page of a run shows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import CheckpointError, DatasetError
from ki_edge.files.writing import write_file, writing

from .recipe import Recipe, Robot

Float64 = npt.NDArray[np.float64]
UNSPELLED = -1  # tokens of a chunk that the codec has no symbols for


@dataclass(frozen=True, eq=False)
class SetTokens:
    """Of one dataset: tokens of each measured frame's prompt and postfix, i64 [N], and what FAST makes of its actions.

    `error`: f64 [N', a], the largest of each spelled chunk, in robot units; `normalised`: the same in the model's.
    `ranges`: f64 [a], from the least to the most of each number, in robot units.
    `frames`: that the dataset trains on, of which N were measured. `held`: frames that are evaluated on, and how many
    of them have no postfix.
    """

    name: str
    frames: int
    prompt: npt.NDArray[np.int64]
    postfix: npt.NDArray[np.int64]
    action_names: tuple[str, ...]
    error: Float64
    normalised: Float64
    ranges: Float64
    held: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class TokenReport:
    """Of all datasets. `max_prompt`, `max_postfix`: the most tokens that a sample may have."""

    sets: tuple[SetTokens, ...]
    max_prompt: int
    max_postfix: int
    about: Mapping[str, Any]

    @classmethod
    def measure(cls, recipe: Recipe, robots: Sequence[Robot], frames: Sequence[int]) -> TokenReport:
        """Over the frames that the recipe was fitted on; `frames`: how many each dataset trains on."""
        sets = [_measured(recipe, source, robot, frames[source]) for source, robot in enumerate(robots)]
        ids, codec = recipe.encoder.ids, recipe.codec
        about = {
            "fast_ids": codec.vocab_size,
            "highest_id": ids.offset,
            "vocabulary": recipe.config.vocab_size,
            "steps_a_unit": codec.scale,
            "longest_prompt_allowed": recipe.encoder.max_prompt,
            "longest_postfix_allowed": recipe.encoder.max_postfix,
        }
        return cls(tuple(sets), recipe.encoder.max_prompt, recipe.encoder.max_postfix, about)

    def check(self, most: float) -> list[str]:
        """A line for each dataset of which a few samples do not fit. DatasetError where more than a share `most` do."""
        lines = []
        for one in self.sets:
            prompts, postfixes = int((one.prompt > self.max_prompt).sum()), int((one.postfix > self.max_postfix).sum())
            unspelled = int((one.postfix == UNSPELLED).sum())
            outside = (one.prompt > self.max_prompt) | (one.postfix > self.max_postfix) | (one.postfix == UNSPELLED)
            if not outside.any():
                continue
            which = "all" if len(one.prompt) == one.frames else f"{len(one.prompt)} drawn of {one.frames}"
            parts = [
                f"{prompts} prompts of up to {one.prompt.max()} tokens (at most {self.max_prompt})" if prompts else "",
                f"{postfixes} chunks of up to {one.postfix.max()} FAST tokens (at most {self.max_postfix})"
                if postfixes
                else "",
                f"{unspelled} chunks that the FAST codec cannot spell" if unspelled else "",
            ]
            share = f"{100 * outside.mean():.3g} % of {which} frames"
            told = f"{one.name}: {share} do not fit: {', '.join(part for part in parts if part)}"
            if outside.mean() > most:
                cures = {
                    "shorten the instructions": prompts,
                    "give a smaller --horizon": postfixes,
                    "let FAST be fitted to these data with --fast fit": postfixes + unspelled,
                }
                cure = ", or ".join(name for name, count in cures.items() if count)
                raise DatasetError(f"{told}; --max-long allows {100 * most:g} %: {cure}")
            lines.append(f"{told}; such an instruction loses its last words, such a chunk has no FAST loss")
        return lines + [
            f"{one.name}: {one.held[1]} of {one.held[0]} held-out frames have actions that FAST, fitted on the others, "
            "cannot spell: they count in no held-out FAST number; more episodes, or another --seed, would cover them"
            for one in self.sets
            if one.held[1]
        ]

    def lines(self) -> list[str]:
        """A line for each dataset, for the user."""
        return [
            f"{one.name}: prompts of {_spread(one.prompt)}, FAST of {_spread(one.postfix[one.postfix >= 0])} tokens; "
            f"what FAST changes at most in a chunk, mean over chunks (of the range): {_errors(one)}"
            for one in self.sets
        ]

    def to_json(self) -> dict[str, Any]:
        """What fast.json holds: facts, an object a dataset, one a number of an action, how often which length is."""
        datasets = [
            {
                "dataset": one.name,
                "frames": one.frames,
                "measured": len(one.prompt),
                **{f"prompt_{name}": value for name, value in _lengths(one.prompt).items()},
                **{f"fast_{name}": value for name, value in _lengths(one.postfix[one.postfix >= 0]).items()},
                "too_long": int(((one.prompt > self.max_prompt) | (one.postfix > self.max_postfix)).sum()),
                "not_spelled": int((one.postfix == UNSPELLED).sum()),
                "held_out": one.held[0],
                "held_out_not_spelled": one.held[1],
            }
            for one in self.sets
        ]
        numbers = [
            {
                "dataset": one.name,
                "number": name,
                "mean_error": float(one.error[:, at].mean()),
                "largest_error": float(one.error[:, at].max()),
                "range": float(one.ranges[at]),
                "mean_error_normalised": float(one.normalised[:, at].mean()),
                "largest_error_normalised": float(one.normalised[:, at].max()),
            }
            for one in self.sets
            if len(one.error)
            for at, name in enumerate(one.action_names)
        ]
        lengths = np.concatenate([one.postfix[one.postfix >= 0] for one in self.sets])
        counts = np.bincount(lengths) if len(lengths) else np.zeros(1, np.int64)
        return {**self.about, "datasets": datasets, "actions": numbers, "chunks_by_fast_tokens": counts.tolist()}

    def save(self, folder: Path) -> None:
        """fast.json and fast.png. CheckpointError if they cannot be written."""
        with writing(folder, CheckpointError):
            folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "fast.json", json.dumps(self.to_json(), indent=1) + "\n", CheckpointError)
        self._plot(folder / "fast.png")

    def _plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.2 * len(self.sets)), layout="constrained")
        axes = figure.subplots(len(self.sets), 2, squeeze=False)
        for (left, right), one in zip(axes, self.sets, strict=True):
            spelled = one.postfix[one.postfix >= 0]
            if len(spelled):
                left.hist(spelled, bins=np.arange(spelled.min(), spelled.max() + 2) - 0.5, color="#3465a4")
            left.axvline(self.max_postfix, color="#cc0000", linewidth=1)
            left.set(title=f"{one.name}: FAST tokens of a chunk", xlabel=f"tokens (red: at most {self.max_postfix})")
            if len(one.normalised):
                at = np.arange(len(one.action_names))
                right.bar(at, one.normalised.max(axis=0), color="#cccccc", label="largest")
                right.bar(at, one.normalised.mean(axis=0), color="#3465a4", label="mean over chunks")
                right.set_xticks(at, one.action_names, rotation=45 if len(at) > 6 else 0)
                right.legend()
            right.set(title=f"{one.name}: largest error of a chunk, normalised")
        with writing(path, CheckpointError):
            figure.savefig(path, dpi=110)


def _measured(recipe: Recipe, source: int, robot: Robot, frames: int) -> SetTokens:
    states = recipe.normalize_state(source, robot.state)
    chunks = recipe.normalize_actions(source, robot.chunks)
    lengths, found, kept = [], [], []
    for number, (task, state, chunk) in enumerate(zip(robot.frame_tasks, states, chunks, strict=True)):
        lengths.append(recipe.encoder.measure(robot.tasks[task], state, chunk))
        decoded = recipe.encoder.reconstruct(chunk)
        if decoded is not None:
            found.append(decoded)
            kept.append(number)
    prompt, postfix = np.array(lengths, np.int64).T
    names = robot.action_names or tuple(f"action {at}" for at in range(chunks.shape[2]))
    error = normalised = np.zeros((0, chunks.shape[2]))
    if kept:
        back = np.stack(found)
        normalised = np.abs(back - chunks[kept]).max(axis=1)
        error = np.abs(recipe.unnormalize_actions(source, back) - robot.chunks[kept]).max(axis=1)
    held = recipe.normalize_actions(source, robot.held_chunks) if robot.held_chunks is not None else ()
    unspelled = sum(not recipe.encoder.spells(chunk) for chunk in held)
    ranges = np.ptp(robot.chunks, axis=(0, 1)).astype(np.float64)
    return SetTokens(robot.name, frames, prompt, postfix, names, error, normalised, ranges, (len(held), unspelled))


def _lengths(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    if not len(counts):
        return {}
    p99 = float(np.quantile(counts, 0.99))
    return {"tokens_mean": round(float(counts.mean()), 2), "tokens_p99": round(p99, 2), "tokens_max": int(counts.max())}


def _spread(counts: npt.NDArray[np.int64]) -> str:
    found = _lengths(counts)
    return f"{found['tokens_mean']:.1f} (longest {found['tokens_max']})" if found else "no"


def _errors(one: SetTokens) -> str:
    if not len(one.error):
        return "none could be spelled"
    parts = [
        f"{name} {value:.3g} ({100 * value / width:.2g} %)" if width else f"{name} {value:.3g}"
        for name, value, width in zip(one.action_names, one.error.mean(axis=0), one.ranges, strict=True)
    ]
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
