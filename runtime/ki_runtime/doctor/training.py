"""Whether a training fits this machine: the estimate of `ki_edge.planning` against its memory, and what would fit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ki_edge.checkpoints import Checkpoint
from ki_edge.config import PRESETS, Pi05Config
from ki_edge.errors import ArgumentError
from ki_edge.planning.memory import BACKBONE_SIDE, BASE, Need, Samples, Setup, need
from ki_edge.planning.weights import GROUPS

from .finding import in_bytes
from .gpu import Gpu, check_gpu
from .host import Host
from .system import check_memory

SMALLER: dict[str, dict[str, Any]] = {  # what takes less memory, in the order in which it costs least
    "--checkpointing": {"checkpointing": True},
    "--checkpointing --optimizer adamw8bit": {"checkpointing": True, "optimizer": "adamw8bit"},
    "--checkpointing --optimizer adamw8bit --ema 0": {
        "checkpointing": True, "optimizer": "adamw8bit", "average": False,
    },
    "--checkpointing --lora backbone=16 --lora vision=16 --freeze embeddings": {
        "checkpointing": True, "lora": (("backbone", 16), ("vision", 16)), "freeze": ("embeddings",),
    },
    "--checkpointing --expert-only": {"checkpointing": True, "freeze": BACKBONE_SIDE},
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """Where it would be trained. `memory`, `base`: bytes of it, and what of it is not the model's."""

    name: str
    memory: int
    base: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of --train, which are named as those of ki-train."""
    group = parser.add_argument_group(
        "--train: would a training fit this machine (of a preset, or the CHECKPOINT given)"
    )
    group.add_argument("--train", action="store_true", help="estimate the memory of a training step")
    group.add_argument("--preset", choices=tuple(PRESETS), help="geometry of the model (pi05, without a CHECKPOINT)")
    group.add_argument("--batch", type=int, default=32, help="samples a step, over all devices (32)")
    group.add_argument("--accumulate", type=int, default=1, help="batches that a device computes for a step (1)")
    group.add_argument("--devices", type=int, help="GPUs, also of several machines (1)")
    group.add_argument("--strategy", choices=("auto", "ddp", "fsdp2"), default="auto", help="of several devices (auto)")
    group.add_argument("--float32", action="store_true", help="no products in bfloat16")
    group.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="adamw or adamw8bit")
    group.add_argument("--ema", type=float, default=0.998, help="0: no moving average (0.998)")
    group.add_argument("--checkpointing", action="store_true", help="layers are computed twice")
    group.add_argument("--no-insulation", action="store_true", help="the flow's gradient reaches the backbone")
    group.add_argument("--freeze", action="append", default=[], metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    group.add_argument("--lora", action="append", default=[], metavar="GROUP=RANK,...", help="adapters instead")
    group.add_argument("--expert-only", action="store_true", help="all but the action expert is frozen")
    group.add_argument("--cameras", type=int, default=3, help="pictures of a sample (3)")
    group.add_argument("--prompt-tokens", type=int, default=200, help="of a sample (200)")
    group.add_argument("--fast-tokens", type=int, default=64, help="of a sample; 0: no FAST loss (64)")
    group.add_argument("--flow-draws", type=int, default=4, help="of a sample (4)")


def examine_training(options: argparse.Namespace, host: Host | None = None) -> dict[str, Any]:
    """The estimate for what the command line says, as JSON values; `fits` None where the memory is not known.

    ArgumentError for impossible numbers, CheckpointError for a folder that is no checkpoint.
    """
    config, what = _geometry(options)
    device = find_device(host or Host())
    setup, samples = _setup(options, config, device), _samples(options)
    found = need(config, samples, setup)
    fits = None if device is None else _fits(found, device)
    smaller = {} if device is None or fits else _smaller(config, samples, setup, device)
    return {
        "model": what, "parameters": found.parameters.total, "learning": found.parameters.learning,
        "setup": asdict(setup), "samples": asdict(samples), "bytes": {**_parts(found), "total": found.total},
        "device": None if device is None else asdict(device), "fits": fits,
        "largest_batch": None if device is None else _largest(config, samples, setup, device) * _times(options, setup),
        "would_fit": smaller,
    }  # fmt: skip


def training_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The same for people."""
    setup, samples = found["setup"], found["samples"]
    total, learning = (f"{found[name] / 1e6:,.1f} M" for name in ("parameters", "learning"))
    yield f"training of {found['model']}: {total} parameters, {learning} learn"
    way = "one device" if setup["devices"] == 1 else f"{setup['devices']} devices, {setup['strategy']}"
    products = "bfloat16" if setup["bfloat16"] else "float32"
    yield (
        f"{way}, {samples['batch']} samples on each at once; products in {products}, "
        f"{setup['optimizer']}{', layers computed twice' if setup['checkpointing'] else ''}"
    )
    for name, size in found["bytes"].items():
        if size:
            yield f"  {name:12} {in_bytes(size)}"
    device = found["device"]
    if device is None:
        yield "this machine's memory is not known"
        return
    verdict = "fits" if found["fits"] else "does not fit"
    yield f"{device['name']}: {in_bytes(device['memory'])}, {in_bytes(device['base'])} of it not the model's: {verdict}"
    yield f"largest --batch that fits as it is: {found['largest_batch'] or 'none'}"
    for flags, batch in found["would_fit"].items():
        yield f"would fit: {flags}" + ("" if batch == samples["batch"] else f", with {batch} samples at once")
    if not found["fits"] and not found["would_fit"]:
        yield "nothing fits here: more devices with --strategy fsdp2, or a smaller --preset"


def find_device(host: Host) -> Device | None:
    """The GPU of this machine, or its processor; None where its memory is not known."""
    gpu: Gpu | None = check_gpu(host)[0]
    memory = check_memory(host)[0]
    if gpu is not None and gpu.memory is not None:
        return Device(gpu.name, gpu.memory, BASE["gpu"])
    return None if memory is None else Device("this machine's memory", memory.total, BASE["cpu"])


def _geometry(options: argparse.Namespace) -> tuple[Pi05Config, str]:
    if options.bundle is not None:
        if options.preset:
            raise ArgumentError("--preset and a CHECKPOINT: give one of them, both say the geometry")
        return Checkpoint.open(options.bundle).config, str(options.bundle)
    name = options.preset or "pi05"
    return PRESETS[name], f"the preset {name}"


def _setup(options: argparse.Namespace, config: Pi05Config, device: Device | None) -> Setup:
    devices = 1 if options.devices is None else options.devices
    freeze = tuple(group for text in options.freeze for group in text.split(","))
    if options.expert_only:
        freeze = BACKBONE_SIDE
    setup = Setup(
        strategy="single" if devices == 1 else "ddp" if options.strategy == "auto" else options.strategy,
        devices=devices, bfloat16=not options.float32, optimizer=options.optimizer, average=options.ema > 0,
        checkpointing=options.checkpointing, insulated=not options.no_insulation, freeze=freeze,
        lora=tuple(_rank(part) for text in options.lora for part in text.split(",")),
    )  # fmt: skip
    if devices > 1 and options.strategy == "auto" and device is not None:
        states = need(config, Samples(), setup)
        if states.states + states.gradients > 0.6 * device.memory:  # as ki-train chooses
            return replace(setup, strategy="fsdp2")
    return setup


def _samples(options: argparse.Namespace) -> Samples:
    parts = (options.devices or 1) * options.accumulate
    if options.batch < 1 or options.accumulate < 1 or options.batch % parts:
        raise ArgumentError(
            f"batch {options.batch}: expected a multiple of {parts}, {options.devices or 1} devices with "
            f"{options.accumulate} batches each"
        )
    tokens = 0 if options.expert_only else options.fast_tokens
    return Samples(options.batch // parts, options.cameras, options.prompt_tokens, tokens, options.flow_draws)


def _rank(text: str) -> tuple[str, int]:
    group, _, rank = text.partition("=")
    if not (rank.isascii() and rank.isdigit() and 0 < int(rank[:9]) <= 4096):
        raise ArgumentError(f"--lora {text!r:.60}: expected GROUP=RANK, such as backbone=16")
    return group, int(rank)


def _parts(found: Need) -> dict[str, float]:
    names = ("weights", "gradients", "moments", "average", "gathered", "copies", "activations", "logits")
    return {name: getattr(found, name) for name in names}


def _fits(found: Need, device: Device) -> bool:
    return found.total + device.base <= device.memory


def _times(options: argparse.Namespace, setup: Setup) -> int:
    return int(setup.devices * options.accumulate)


def _largest(config: Pi05Config, samples: Samples, setup: Setup, device: Device) -> int:
    """Samples of a device at once; 0 if not even one fits."""
    one, two = (need(config, replace(samples, batch=batch), setup).total for batch in (1, 2))
    if one + device.base > device.memory:
        return 0
    return 1 + int((device.memory - device.base - one) // max(1.0, two - one))


def _smaller(config: Pi05Config, samples: Samples, setup: Setup, device: Device) -> dict[str, int]:
    """What would fit: flags -> samples at once, those that were asked for or as many as fit."""
    found = {}
    for flags, changes in SMALLER.items():
        other = replace(setup, **changes)
        tokens = 0 if "expert" in flags else samples.postfix
        most = min(samples.batch, _largest(config, replace(samples, postfix=tokens), other, device))
        if most:
            found[flags] = most
        if most == samples.batch:  # what comes after it costs more
            break
    return found
