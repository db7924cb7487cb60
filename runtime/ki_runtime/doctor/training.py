"""Whether a training fits this machine, and how long it takes: the estimates of `ki_edge.planning` against it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from ki_edge.planning.memory import BACKBONE_SIDE, Need, need
from ki_edge.planning.speed import UTILISATION, speed, step_products

from .finding import in_bytes
from .host import Host
from .training_request import Asked, Device, add_arguments, read_request

__all__ = ["add_arguments", "examine_training", "training_lines"]
SMALLER: dict[str, dict[str, Any]] = {  # what takes less memory, in the order in which it costs least
    "--checkpointing": {"checkpointing": True},
    "--checkpointing --optimizer adamw8bit": {"checkpointing": True, "optimizer": "adamw8bit"},
    "--checkpointing --optimizer adamw8bit --ema 0": {
        "checkpointing": True, "optimizer": "adamw8bit", "average": False,
    },
    "--checkpointing --lora backbone=16,vision=16 --freeze embeddings": {
        "checkpointing": True, "lora": (("backbone", 16), ("vision", 16)), "freeze": ("embeddings",),
    },
    "--checkpointing --expert-only": {"checkpointing": True, "freeze": BACKBONE_SIDE},
}  # fmt: skip


def examine_training(options: argparse.Namespace, host: Host | None = None) -> dict[str, Any]:
    """The estimate for what the command line says, as JSON values; `fits` None where the memory is not known.

    ArgumentError for impossible numbers, CheckpointError for a folder that is no checkpoint.
    """
    host = host or Host()
    asked = read_request(options, host)
    device, found = asked.device, need(asked.config, asked.samples, asked.setup)
    fits = None if device is None else _fits(found, device)
    times = asked.setup.devices * asked.settings.accumulate
    return {
        "model": asked.what, "parameters": found.parameters.total, "learning": found.parameters.learning,
        "setup": asdict(asked.setup), "samples": asdict(asked.samples), "told_by_contract": asked.known,
        "batch": asked.settings.batch, "steps": asked.settings.steps,
        "bytes": {**_parts(found), "total": found.total},
        "device": None if device is None else asdict(device), "fits": fits,
        "largest_batch": None if device is None else _largest(asked, device) * times,
        "would_fit": {} if device is None or fits else _smaller(asked, device),
        "time": None if device is None else _time(asked, found, device, host),
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
    whence = "as the checkpoint's contract has it at most" if found["told_by_contract"] else "assumed"
    yield (
        f"a sample: {samples['cameras']} cameras, {samples['prompt']} prompt and {samples['postfix']} FAST tokens "
        f"({whence}), {samples['draws']} flow draws"
    )
    for name, size in found["bytes"].items():
        if size:
            yield f"  {name:12} {in_bytes(size)}"
    if found["device"] is None:
        yield "this machine's memory is not known"
        return
    yield from _verdict(found)
    if found["fits"] or found["would_fit"]:
        yield from _time_lines(found)


def _verdict(found: Mapping[str, Any]) -> Iterator[str]:
    device, samples, devices = found["device"], found["samples"], found["setup"]["devices"]
    verdict = "fits" if found["fits"] else "does not fit"
    each = " for each" if devices > 1 else ""
    yield f"{device['name']}: {in_bytes(device['memory'])}{each}, {in_bytes(device['base'])} not the model's: {verdict}"
    largest = found["largest_batch"]
    yield f"largest --batch that fits as it is: {largest or 'none'}" + (
        f" ({largest // devices} on each device)" if largest and devices > 1 else ""
    )
    for flags, batch in found["would_fit"].items():
        fewer = f", with {batch} samples at once of the {samples['batch']} asked for (--accumulate takes the others)"
        yield f"would fit: {flags}" + ("" if batch == samples["batch"] else fewer)
    if not found["fits"] and not found["would_fit"]:
        yield "nothing fits here: more devices with --strategy fsdp2, or a smaller --preset"


def _time_lines(found: Mapping[str, Any]) -> Iterator[str]:
    time = found["time"]
    if time is None:
        yield "time: this GPU's rate is not in the table, so there is no estimate"
        return
    hours = time["hours"]
    yield (
        f"about {time['samples_per_s']:.3g} samples/s, {hours:.3g} h for {found['steps']} steps of {found['batch']}: "
        f"{time['products'] / 1e9:,.3g} G operations a sample, at {100 * time['utilisation']:.0f} % of "
        f"{time['rate'] / 1e9:,.4g} G a second ({time['source']})"
    )


def _time(asked: Asked, found: Need, device: Device, host: Host) -> dict[str, Any] | None:
    """Samples a second of all devices, and hours of the whole run; None where the rate is not known."""
    products = step_products(asked.config, asked.samples, asked.setup)
    if device.card is not None:
        rate, source = device.card.peak, f"{device.card.name}'s data sheet, in bfloat16"
        each = speed(asked.config, asked.samples, asked.setup, found, device.card).samples_per_s
    elif device.shared:
        rate, source = host.products(), "measured here with NumPy, in float32"
        each = rate * UTILISATION / products  # processes share the cores
    else:
        return None
    return {
        "samples_per_s": each, "hours": asked.settings.steps * asked.settings.batch / each / 3600,
        "products": products, "rate": rate, "utilisation": UTILISATION, "source": source,
    }  # fmt: skip


def _parts(found: Need) -> dict[str, float]:
    names = ("weights", "gradients", "moments", "average", "gathered", "copies", "activations", "logits")
    return {name: getattr(found, name) for name in names}


def _fits(found: Need, device: Device) -> bool:
    return found.total + device.base <= device.memory


def _largest(asked: Asked, device: Device) -> int:
    """Samples of a device at once; 0 if not even one fits."""
    one, two = (need(asked.config, replace(asked.samples, batch=batch), asked.setup).total for batch in (1, 2))
    if one + device.base > device.memory:
        return 0
    return 1 + int((device.memory - device.base - one) // max(1.0, two - one))


def _smaller(asked: Asked, device: Device) -> dict[str, int]:
    """What would fit: flags -> samples at once, those that were asked for or as many as fit."""
    found: dict[str, int] = {}
    for flags, changes in SMALLER.items():
        tokens = 0 if "expert" in flags else asked.samples.postfix
        other = replace(asked, setup=replace(asked.setup, **changes), samples=replace(asked.samples, postfix=tokens))
        most = min(asked.samples.batch, _largest(other, device))
        if most:
            found[flags] = most
        if most == asked.samples.batch:  # what comes after it costs more
            break
    return found
