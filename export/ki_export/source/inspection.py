"""What a checkpoint is, before anything is exported: format, geometry, contract, what is missing, what it will cost.

Only headers and JSON files are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.counts import count_weights
from ki_edge.checkpoints.layout.keys import parameter_shapes
from ki_edge.config import Pi05Config
from ki_edge.policy.contract import Camera
from ki_export.policies import PolicyRequest

from .devices import DEVICES, Device, Stage, floor_ms, stages
from .examination import PLACEHOLDER, Examination, examine
from .opening import CheckpointRef, Say

CASES = ((2, 30), (3, 200))  # cameras present, tokens of the prompt
STEPS = 10
CELL = 40  # characters of a table cell
TYPES = {"fp32": 4, "16 bit": 2, "8 bit": 1}


def inspect(
    where: CheckpointRef, request: PolicyRequest, say: Say = lambda _: None, *, model_only: bool = False
) -> Inspection:
    """What a checkpoint is. The errors of `examine` for what is wrong; what is merely missing is listed."""
    return Inspection(examine(where, request, say, model_only=model_only))


@dataclass(frozen=True, eq=False)
class Inspection:
    """A checkpoint that was examined, for people and programs to read."""

    found: Examination

    @property
    def checkpoint(self) -> Checkpoint:
        return self.found.checkpoint

    @property
    def missing(self) -> list[str]:
        return list(self.found.missing)

    def to_json(self) -> dict[str, Any]:
        """Everything that `lines` prints, as JSON values."""
        checkpoint, config = self.checkpoint, self.checkpoint.config
        policy = self.found.policy
        contract = None if policy is None else policy.contract
        return {
            "checkpoint": str(checkpoint.path),
            "format": checkpoint.format,
            "origin": dict(checkpoint.origin),
            "variant": config.variant,
            "geometry": {**config.to_dict(), **({} if self.found.horizon_from else {"action_horizon": None})},
            "parameters": sum(prod(shape) for shape in parameter_shapes(config).values()),
            "dtypes": dict(sorted(_types(checkpoint).items())),
            "bytes": sum(path.stat().st_size for path in checkpoint.source.files),
            "contract": None if contract is None else contract.to_json(),
            "origins": {} if policy is None else dict(policy.known),
            "missing": self.missing,
            "command": self.found.command,
            "memory_gb": {name: memory(config, width) / 1e9 for name, width in TYPES.items()},
            "floor_ms": {device.name: _floors(config, device) for device in DEVICES},
        }

    def lines(self) -> list[str]:
        """For people."""
        found = self.to_json()
        return [*_model_lines(found, self.checkpoint.config), *self._policy_lines(), *_cost_lines(found)]

    def _policy_lines(self) -> list[str]:
        policy = self.found.policy
        lines = []
        if policy is not None:
            lines += ["", "policy contract"]
            lines += [f"  {name:22} {_short(value):40} {policy.known[name]}" for name, value in policy.values.items()]
        if not self.missing:
            what = "a policy of it" if policy is not None else "a bundle of the model alone"
            return [*lines, f"  complete: ki-export can make {what}"]
        alone = "" if policy is None else " (a model alone can be exported with --model-only)"
        lines += [f"missing for {'a model' if policy is None else 'a policy'}{alone}:"]
        return [*lines, *(f"  - {sentence}" for sentence in self.missing), f"  then: {self.found.command}"]


def memory(config: Pi05Config, width: int) -> int:
    """Bytes of the matrices that acting maps, at `width` bytes a number: those it reads, and the whole embedding."""
    count = count_weights(config)
    return width * (count.vision + count.embedding + count.backbone + count.expert).matrices


def _model_lines(found: Mapping[str, Any], config: Pi05Config) -> list[str]:
    stored = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    vision, backbone, expert = config.vision, config.backbone, config.expert
    names = {"pi05": "π0.5", "pi0": "π0"}
    origin, horizon = found["origin"], found["geometry"]["action_horizon"] or "an unknown number of"
    return [
        f"checkpoint  {found['checkpoint']}",
        *([f"from        {origin['repo']} at {origin['revision']}"] if origin else []),
        f"format      {found['format']}, a {names[config.variant]} of {_count(found['parameters'])} parameters",
        f"stored      {_count(found['bytes'])}B; tensors: {stored}",
        f"vision      {vision.depth} layers of width {vision.width}, {vision.image_size} pixels, "
        f"{vision.patches} tokens a camera",
        f"backbone    {backbone.depth} layers of width {backbone.width}, {config.vocab_size} tokens",
        f"expert      {expert.depth} layers of width {expert.width}, {horizon} actions of {config.action_dim} numbers",
    ]


def _cost_lines(found: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{_count(1e9 * size)}B in {name}" for name, size in found["memory_gb"].items())
    head = " | ".join(f"{cameras} cameras, {prompt} tokens: 16 bit / 8 bit" for cameras, prompt in CASES)
    horizon = "" if found["geometry"]["action_horizon"] else f", if the horizon is {PLACEHOLDER}"
    lines = ["", f"weights while acting: {sizes}", f"least time of one inference, {STEPS} steps, ms{horizon} ({head})"]
    for device, floors in found["floor_ms"].items():
        cells = [f"{cell['16 bit']:.3g} / {cell['8 bit']:.3g}" for cell in floors]
        lines.append(f"  {device:24} {' | '.join(cells)}")
    return [
        *lines,
        "  (roofline: the larger of operations / peak and bytes / bandwidth of each stage)",
    ]


def _types(checkpoint: Checkpoint) -> Counter[str]:
    needed = parameter_shapes(checkpoint.config)
    return Counter(checkpoint.source.tensors[key].dtype for key in needed)


def _floors(config: Pi05Config, device: Device) -> list[dict[str, Any]]:
    cells = []
    for cameras, prompt in CASES:
        found: tuple[Stage, ...] = stages(config, cameras=cameras, prompt=prompt, steps=STEPS)
        cells.append(
            {
                "cameras": cameras,
                "prompt": prompt,
                **{name: sum(floor_ms(s, device, TYPES[name]) for s in found) for name in ("16 bit", "8 bit")},
            }
        )
    return cells


def _count(number: float) -> str:
    """With a unit of 1000s."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.4g} G"


def _short(value: Any) -> str:
    """A contract's field in a table cell."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping | Camera):
        value = ", ".join(str(item.slot if isinstance(item, Camera) else item.get("slot", item)) for item in value)
    text = str(value)
    return text if len(text) <= CELL else text[: CELL - 1] + "…"
