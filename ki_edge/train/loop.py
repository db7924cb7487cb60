"""The training loop: KI loss, AdamW with warmup and cosine decay, clipping, a moving average, exact resume.

All randomness of step n comes from (seed, n), so a resumed run takes the same steps as an uninterrupted one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from ki_edge.errors import CheckpointError, DatasetError
from ki_edge.files.reading import parse_json
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_edge.model import Observation, Pi05
from ki_edge.model.checkpoint import save_checkpoint, write_safetensors

from .centering import CenteredPatches
from .delays import draw_delays, shifted
from .fingerprint import Fingerprint, check_same
from .recipe import Examples, Recipe, Tokens
from .settings import TrainSettings

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"
FACTS = "run"  # of the state file's metadata


class Trainer:
    """One run in the folder `out`: checkpoint (the moving average), training state, log."""

    def __init__(
        self, model: Pi05, examples: Examples, recipe: Recipe, settings: TrainSettings, out: Path, facts: Fingerprint
    ) -> None:
        self.facts = facts
        self.model, self.examples, self.recipe, self.settings, self.out = model.train(), examples, recipe, settings, out
        self.points = _points(examples, settings)
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        decay = [p for p in model.parameters() if p.ndim >= 2]
        other = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": other, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.step = 0
        self.log_path = out / "training" / LOG_FILE
        self.log_path.parent.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------ steps

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the last step; yields a record every `log_every` steps, saves every `save_every`.

        A run that is finished already writes its checkpoint again, which may not have been reached before.
        """
        settings, started, since = self.settings, time.perf_counter(), self.step
        if self.step >= settings.steps:
            self.save_checkpoint()
        with self.log_path.open("a", encoding="utf-8") as log:
            while self.step < settings.steps:
                terms = self.train_step()
                last = self.step == settings.steps
                if self.step % settings.log_every == 0 or last:
                    rate = (self.step - since) * settings.batch / (time.perf_counter() - started)
                    yield _log(log, {"step": self.step, **terms, "samples_per_s": round(rate, 1)})
                if self.step % settings.save_every == 0 or last:
                    self.save()

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns the loss terms."""
        rate = self.settings.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            terms = self._losses(np.random.default_rng([self.settings.seed, self.step]))
        total = sum(terms[name] * weight for name, weight in self._weights().items() if name in terms)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        if not bool(torch.isfinite(norm)):
            raise DatasetError(
                f"training diverged at step {self.step}: the gradient is not finite; lower the learning rate"
            )
        self.optimizer.step()
        self._update_average()
        self.step += 1
        return {**{name: value.item() for name, value in terms.items()}, "grad_norm": norm.item(), "rate": rate}

    def _weights(self) -> dict[str, float]:
        return {"flow": 1.0, "fast": self.settings.fast_weight, "pointing": self.settings.fast_weight}

    def _losses(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Mean loss terms of one batch. The pointing part is a batch of its own: no state, no actions."""
        examples, settings, points = self.examples, self.settings, self.points
        rows = np.sort(rng.choice(len(examples.images), settings.batch - points, replace=False))
        draws = (len(rows) * settings.flow_draws, *examples.actions.shape[1:])
        noise = torch.from_numpy(rng.standard_normal(draws, np.float32))
        times = torch.from_numpy((rng.beta(1.5, 1.0, draws[0]) * 0.999 + 0.001).astype(np.float32))
        observation = _observation(examples.images[rows], examples.prompt, rows, examples.postfix)
        actions, dims, delay = examples.actions[rows], self.recipe.contract.action_dim, None
        if settings.rtc_max_delay:
            delays = draw_delays(rng, draws[0], settings.rtc_max_delay)
            if settings.rtc_offset:
                actions = shifted(rng, actions, delays, settings.rtc_offset, dims)
            delay = torch.from_numpy(delays)
        real = None if examples.real is None else torch.from_numpy(examples.real[rows])
        losses = self.model.compute_loss(
            observation, torch.from_numpy(actions), noise=noise, time=times, delay=delay, real=real
        )
        terms = {"flow": losses.mean_flow(dims)}
        if losses.fast is not None:
            terms["fast"] = losses.fast.mean()
        if points:
            rows = np.sort(rng.choice(examples.pointable, points, replace=False))
            ask = np.zeros(points, np.int64)
            answers = _observation(examples.images[rows], examples.pointing_prompt, ask, examples.pointing, rows)
            terms["pointing"] = self.model.token_loss(answers).mean()
        return terms

    def _update_average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1.0 - decay)

    # ------------------------------------------------------------------ files

    def save(self) -> None:
        """Write the training state, then the checkpoint that `ki-export` takes; each replaces its old file at once."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state |= {f"average.{name}": value for name, value in self.average.items()}
        for index, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            for name in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    state[f"optimizer.{index}.{name}"] = self.optimizer.state[parameter][name]
        facts = {"step": str(self.step), FACTS: json.dumps(self.facts)}
        write_safetensors(state, self.out / "training" / STATE_FILE, facts)
        self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """The moving average as a checkpoint folder in openpi's layout, with contract and assets."""
        averaged = Pi05(self.recipe.config, knowledge_insulation=self.settings.knowledge_insulation)
        state, center = dict(self.average), CenteredPatches.center_of(self.model)
        if center is not None:
            state = CenteredPatches.fold(state, center)
        averaged.load_state_dict(state)
        self.recipe.save_assets(self.out)
        save_checkpoint(averaged, self.out)

    def resume(self) -> bool:
        """Continue from the saved training state, if there is one; False if not.

        ArgumentError names the settings or demonstrations that are not those of the run.
        """
        path = self.out / "training" / STATE_FILE
        if not path.is_file():
            return False
        step, recorded = read_facts(path)
        check_same(recorded, self.facts, self.out)
        state = load_file(path)
        for name, value in self.model.state_dict().items():
            for saved in (state.get(f"model.{name}"), state.get(f"average.{name}")):
                if saved is None or saved.shape != value.shape:
                    raise CheckpointError(f"{path}: its '{name}' does not fit this model: the file was changed")
        self.model.load_state_dict({n[6:]: t for n, t in state.items() if n.startswith("model.")})
        self.average = {n[8:]: t for n, t in state.items() if n.startswith("average.")}
        self.step = step
        for index, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            if f"optimizer.{index}.exp_avg" in state:
                moments = {name: state[f"optimizer.{index}.{name}"] for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        return True


def read_facts(path: Path) -> tuple[int, Fingerprint]:
    """The step of a training state, and what its run is made of. CheckpointError if it does not tell."""
    metadata = SafetensorsIndex(path).metadata
    step, text = metadata.get("step", ""), metadata.get(FACTS)
    if text is None or not (step.isascii() and step.isdigit() and len(step) < 16):
        raise CheckpointError(
            f"{path} does not say what its run was made of: start over with --fresh, or from its weights with --init"
        )
    facts = parse_json(text.encode(), str(path), CheckpointError)
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path}: the facts of its run are no object")
    return int(step), facts


def _points(examples: Examples, settings: TrainSettings) -> int:
    """How many frames of a batch answer the pointing question; DatasetError if there are too few frames for a batch."""
    points = round(settings.batch * settings.pointing) if settings.knowledge_insulation else 0
    points = points if len(examples.pointable) else 0
    frames = len(examples.images)
    if not 1 <= settings.batch - points <= frames or points > len(examples.pointable):
        raise DatasetError(
            f"a batch takes {settings.batch - points} frames for actions and {points} for pointing, but the "
            f"demonstrations have {frames} and {len(examples.pointable)}: choose another batch size or record more"
        )
    return points


def _observation(
    images: npt.NDArray[np.uint8],
    prompt: Tokens,
    prompt_rows: npt.NDArray[np.int64],
    postfix: Tokens,
    postfix_rows: npt.NDArray[np.int64] | None = None,
) -> Observation:
    rows = prompt_rows if postfix_rows is None else postfix_rows
    return Observation(
        images=torch.from_numpy(np.ascontiguousarray(images)),
        camera_mask=torch.ones(images.shape[:2], dtype=torch.bool),
        prompt_tokens=torch.from_numpy(prompt.ids[prompt_rows]),
        prompt_mask=torch.from_numpy(prompt.mask[prompt_rows]),
        fast_tokens=torch.from_numpy(postfix.ids[rows]),
        fast_mask=torch.from_numpy(postfix.mask[rows]),
    )


def _log(file: TextIO, record: dict[str, float]) -> dict[str, float]:
    file.write(json.dumps(record) + "\n")
    file.flush()
    return record
