"""What ki-doctor --train is asked: the geometry, the settings as ki-train would have them, and the machine."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ki_edge.checkpoints import Checkpoint
from ki_edge.config import PRESETS, Pi05Config
from ki_edge.errors import ArgumentError, ContractError
from ki_edge.planning.memory import BACKBONE_SIDE, BASE, Samples, Setup, need
from ki_edge.planning.recipes import RECIPES, with_recipe
from ki_edge.planning.settings import TrainSettings
from ki_edge.planning.speed import CARDS, Card
from ki_edge.policy.contract import PolicyContract

from .gpu import Gpu, check_gpu
from .host import Host
from .system import check_memory

CAMERAS, PROMPT, POSTFIX = 3, 200, 64  # of a sample, where no contract tells
LOW_CPU = ("avx512_bf16", "amx_tile")  # what /proc/cpuinfo calls instructions for products in bfloat16
AMPERE = (8, 0)  # the first GPUs that have them


@dataclass(frozen=True)
class Device:
    """Where it would be trained. `memory`, `base`: bytes of one device, and what of it is not the model's; `bfloat16`:
    whether it has such products; `card`: a GPU whose rate is known; `shared`: devices are processes of one machine."""

    name: str
    memory: int
    base: float
    bfloat16: bool
    card: Card | None = None
    shared: bool = False


@dataclass(frozen=True)
class Asked:
    """`what`: the model, for people; `known`: whether its contract told cameras and tokens."""

    config: Pi05Config
    what: str
    known: bool
    settings: TrainSettings
    setup: Setup
    samples: Samples
    device: Device | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of --train, which are named as those of ki-train; what is not given is as ki-train has it."""
    group = parser.add_argument_group(
        "--train: would a training fit this machine (of a preset, or the CHECKPOINT given)"
    )
    group.add_argument("--train", action="store_true", help="estimate memory and time of a training")
    group.add_argument("--preset", choices=tuple(PRESETS), help="geometry of the model (pi05, without a CHECKPOINT)")
    group.add_argument("--recipe", choices=sorted(RECIPES), help="settings by name; flags that are given count more")
    group.add_argument("--steps", type=int, help="optimiser steps (20000)")
    group.add_argument("--batch", type=int, help="samples a step, over all devices (32)")
    group.add_argument("--accumulate", type=int, help="batches that a device computes for a step (1)")
    group.add_argument("--devices", type=int, help="GPUs, also of several machines, or processes on a CPU (1)")
    group.add_argument("--strategy", choices=("auto", "ddp", "fsdp2"), default="auto", help="of several devices (auto)")
    group.add_argument("--bfloat16", action="store_true", help="products in bfloat16 (where the device has them)")
    group.add_argument("--float32", action="store_true", help="no products in bfloat16")
    group.add_argument("--optimizer", choices=("adamw", "adamw8bit"), help="adamw or adamw8bit")
    group.add_argument("--ema", type=float, help="0: no moving average (0.998)")
    group.add_argument("--checkpointing", action="store_true", help="layers are computed twice")
    group.add_argument("--no-insulation", action="store_true", help="the flow's gradient reaches the backbone")
    group.add_argument("--no-fast-loss", action="store_true", help="the backbone learns no FAST tokens")
    group.add_argument("--freeze", action="append", metavar="GROUP,...", help="parameters that stay")
    group.add_argument("--lora", action="append", metavar="GROUP=RANK,...", help="adapters instead")
    group.add_argument("--expert-only", action="store_true", help="all but the action expert is frozen")
    group.add_argument("--cameras", type=int, help="pictures of a sample (the checkpoint's, or 3)")
    group.add_argument("--prompt-tokens", type=int, help="of a sample (the most that the checkpoint takes, or 200)")
    group.add_argument("--fast-tokens", type=int, help="of a sample (the most that the checkpoint takes, or 64)")
    group.add_argument("--flow-draws", type=int, help="of a sample (4)")


def read_request(options: argparse.Namespace, host: Host) -> Asked:
    """ArgumentError for impossible numbers, CheckpointError for a folder that is no checkpoint."""
    config, what, contract = _geometry(options)
    settings = with_recipe(options.recipe, _given(options))
    devices = 1 if options.devices is None else options.devices
    device = find_device(host, devices)
    low = settings.bfloat16
    if not (options.bfloat16 or options.float32):
        low = device is None or device.bfloat16
    setup = Setup(
        strategy="single" if devices == 1 else "ddp" if options.strategy == "auto" else options.strategy,
        devices=devices, bfloat16=low, optimizer=settings.optimizer, average=settings.ema > 0,
        checkpointing=settings.checkpointing, insulated=settings.knowledge_insulation,
        freeze=BACKBONE_SIDE if settings.expert_only else settings.freeze, lora=settings.lora,
    )  # fmt: skip
    if devices > 1 and options.strategy == "auto" and device is not None:
        states = need(config, Samples(), setup)
        if states.states + states.gradients > 0.6 * device.memory:  # as ki-train chooses
            setup = replace(setup, strategy="fsdp2")
    samples = _samples(options, settings, devices, contract)
    return Asked(config, what, contract is not None, settings, setup, samples, device)


def find_device(host: Host, devices: int = 1) -> Device | None:
    """The GPU of this machine, or its share of processor and memory; None where its memory is not known."""
    gpu: Gpu | None = check_gpu(host)[0]
    if gpu is not None and gpu.memory is not None:
        card = next((card for card in CARDS if _model(card) in gpu.name), None)
        return Device(gpu.name, gpu.memory, BASE["gpu"], gpu.capability >= AMPERE, card)
    memory = check_memory(host)[0]
    if memory is None:
        return None
    flags = (host.read("/proc/cpuinfo") or "").split()
    name = "this machine's memory" + (f", shared by {devices} processes" if devices > 1 else "")
    return Device(name, memory.total // max(1, devices), BASE["cpu"], any(n in flags for n in LOW_CPU), shared=True)


def _model(card: Card) -> str:
    """ "RTX 4090" of "24 GB (RTX 4090)"; of an H100 the name without its form, which drivers write otherwise."""
    return card.name.partition("(")[2].rstrip(")").removesuffix(" SXM")


def _geometry(options: argparse.Namespace) -> tuple[Pi05Config, str, PolicyContract | None]:
    if options.bundle is None:
        name = options.preset or "pi05"
        return PRESETS[name], f"the preset {name}", None
    if options.preset:
        raise ArgumentError("--preset and a CHECKPOINT: give one of them, both say the geometry")
    config, path = Checkpoint.open(options.bundle).config, Path(options.bundle) / "contract.json"
    try:
        contract = PolicyContract.load(path) if path.is_file() else None
    except ContractError:  # whoever trains is told; the estimate does without
        contract = None
    return config, str(options.bundle), contract


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "batch", "accumulate", "optimizer", "ema", "flow_draws")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    given |= {name: True for name in ("checkpointing", "expert_only", "bfloat16") if getattr(options, name)}
    off = {"knowledge_insulation": "no_insulation", "fast_loss": "no_fast_loss", "bfloat16": "float32"}
    given |= {name: False for name, flag in off.items() if getattr(options, flag)}
    if options.freeze:
        given["freeze"] = tuple(group for text in options.freeze for group in text.split(","))
    if options.lora:
        given["lora"] = tuple(_rank(part) for text in options.lora for part in text.split(","))
    return given


def _samples(
    options: argparse.Namespace, settings: TrainSettings, devices: int, contract: PolicyContract | None
) -> Samples:
    parts = devices * settings.accumulate
    if settings.batch % parts:
        raise ArgumentError(
            f"batch {settings.batch}: expected a multiple of {parts}, {devices} devices with {settings.accumulate} "
            "batches each"
        )
    told = {"cameras": CAMERAS, "prompt_tokens": PROMPT, "fast_tokens": POSTFIX}
    if contract is not None:
        told |= {"cameras": len(contract.cameras), "prompt_tokens": contract.max_token_len}
        told |= {} if contract.fast is None else {"fast_tokens": contract.fast.max_tokens}
    told |= {name: value for name in told if (value := getattr(options, name)) is not None}
    tokens = 0 if settings.expert_only or not settings.fast_loss else told["fast_tokens"]
    return Samples(settings.batch // parts, told["cameras"], told["prompt_tokens"], tokens, settings.flow_draws)


def _rank(text: str) -> tuple[str, int]:
    group, _, rank = text.partition("=")
    if not (rank.isascii() and rank.isdigit() and 0 < int(rank[:9]) <= 4096):
        raise ArgumentError(f"--lora {text!r:.60}: expected GROUP=RANK, such as backbone=16")
    return group, int(rank)
