"""What a checkpoint is, before anything is exported: format, geometry, contract, what is missing, what it will cost.

Only headers and JSON files are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.counts import count_weights
from ki_edge.checkpoints.layout.keys import parameter_shapes
from ki_edge.config import Pi05Config
from ki_edge.policy.contract import Camera, PolicyContract
from ki_export.policies import PolicyRequest

from .devices import DEVICES, Device, Stage, floor_ms, stages
from .examination import PLACEHOLDER, Examination, examine
from .opening import CheckpointRef, Say

PROMPT = 30  # tokens of a common instruction
CASES = ((2, PROMPT), (3, 200))  # cameras present, tokens of the prompt; of a model without a contract
SMALLEST = 0.1  # ms: below it an inference is all overhead, of which a roofline knows nothing
STEPS = 10
CELL = 40  # characters of a table cell
PRODUCTS = {"16 bit": 2, "8 bit": 1}  # of which vendors give the rate
# Bytes of a number in what is multiplied, and in the embedding table, which engines keep in 16 bits.
TYPES = {"fp32": (4.0, 4), "16 bit": (2.0, 2), "8 bit": (1.0, 2), "4 bit": (0.5625, 2)}


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
            "memory_gb": {name: memory(config, *widths) / 1e9 for name, widths in TYPES.items()},
            "floor_ms": {device.name: _floors(config, device, _cases(contract)) for device in DEVICES},
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
            for name, value in policy.values.items():
                first, *more = _cell(name, value)
                lines += [f"  {name:22} {first:40}  {policy.known[name]}", *(f"{'':25}{line}" for line in more)]
        if not self.missing:
            what = "the policy" if policy is not None else "the model alone"
            return [*lines, "", f"nothing is missing: ki-export can export {what}"]
        return [*lines, "", "missing:", *self.found.missing_lines()]


def memory(config: Pi05Config, width: float, table: int) -> int:
    """Bytes of the matrices that acting maps: at `width` bytes a number, the whole embedding at `table`."""
    count = count_weights(config)
    return int(width * (count.vision + count.backbone + count.expert).matrices) + table * count.embedding.matrices


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
    lines = ["", f"weights in memory while it runs: {sizes}"]
    floors = found["floor_ms"]
    if all(cells[0]["16 bit"] < SMALLEST for cells in floors.values()):
        return [*lines, "too small a model for a least time: overhead decides, ki-bench measures it"]
    horizon = "" if found["geometry"]["action_horizon"] else f", if a chunk has {PLACEHOLDER} actions"
    head = [f"{cell['cameras']} cameras, {cell['prompt']} tokens" for cell in next(iter(floors.values()))]
    lines.append(f"least time of one inference in ms, {STEPS} steps, weights in 16 / 8 bits{horizon}")
    lines.append(f"  {'':24} {' '.join(f'{text:>23}' for text in head)}")
    for device, cells in floors.items():
        texts = [f"{_ms(cell['16 bit'])} / {_ms(cell['8 bit'])}" for cell in cells]
        lines.append(f"  {device:24} {' '.join(f'{text:>23}' for text in texts)}")
    return [*lines, "  (for each stage the larger of operations / peak and bytes / bandwidth; no engine is faster)"]


def _ms(value: float) -> str:
    return f"<{SMALLEST}" if value < SMALLEST else f"{value:.1f}"


def _cases(contract: PolicyContract | None) -> Sequence[tuple[int, int]]:
    """Cameras and tokens for which times are told: the policy's own, with a common and the longest prompt."""
    if contract is None:
        return CASES
    cameras = sum(camera.key is not None for camera in contract.cameras)
    return [
        (cameras, tokens) for tokens in dict.fromkeys((min(PROMPT, contract.max_token_len), contract.max_token_len))
    ]


def _types(checkpoint: Checkpoint) -> Counter[str]:
    needed = parameter_shapes(checkpoint.config)
    return Counter(checkpoint.source.tensors[key].dtype for key in needed)


def _floors(config: Pi05Config, device: Device, cases: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    cells = []
    for cameras, prompt in cases:
        found: tuple[Stage, ...] = stages(config, cameras=cameras, prompt=prompt, steps=STEPS)
        cells.append(
            {
                "cameras": cameras,
                "prompt": prompt,
                **{name: sum(floor_ms(s, device, width) for s in found) for name, width in PRODUCTS.items()},
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


def _cell(name: str, value: Any) -> Sequence[str]:
    """The lines of a contract's field in a table cell."""
    if name == "cameras":
        return [_camera(**(vars(camera) if isinstance(camera, Camera) else camera)) for camera in value]
    if value is None:
        return ["not set"]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, Mapping):
        return [f"{key} {item}" for key, item in value.items()]
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return [text if len(text) <= CELL else text[: CELL - 1] + "…"]


def _camera(slot: str, key: str | None, required: bool = True) -> str:
    if key is None:
        return f"{slot} (always empty)"
    return (slot if key == slot else f"{slot} from {key}") + ("" if required else " (may be absent)")
