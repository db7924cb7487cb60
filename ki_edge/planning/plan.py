"""The full-size model on many devices: tables of memory, communication and speed, computed and never typed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ki_edge.config import PI05, Pi05Config

from .memory import BASE, Need, Samples, Setup, need
from .speed import CARDS, MACHINE, UTILISATION, Card, exchanged, speed, step_products

DEVICES = (8, 64, 256, 1024)
MOST_BATCH = 64  # samples of a device
FULL = Samples(batch=1, cameras=3, prompt=200, postfix=64, draws=1)
LORA = (("backbone", 16), ("vision", 16))
WAYS = (
    ("everything, DDP", Setup("ddp", 8)),
    ("everything, DDP, 8-bit AdamW", Setup("ddp", 8, optimizer="adamw8bit")),
    ("everything, FSDP2", Setup("fsdp2", 8)),
    ("vision frozen, FSDP2", Setup("fsdp2", 8, freeze=("vision",))),
    ("LoRA rank 16 on backbone and vision, DDP", Setup("ddp", 8, freeze=("embeddings",), lora=LORA)),
    ("expert alone, DDP", Setup("ddp", 8, freeze=("vision", "projector", "backbone", "embeddings"))),
)  # fmt: skip


def largest_batch(config: Pi05Config, samples: Samples, setup: Setup, memory: float, base: float = BASE["gpu"]) -> int:
    """The most samples that a device computes at once; 0 if not even one fits."""
    found = 0
    for batch in range(1, MOST_BATCH + 1):
        if need(config, replace(samples, batch=batch), setup).total + base > memory:
            break
        found = batch
    return found


def bytes_table(config: Pi05Config = PI05) -> Iterator[str]:
    """Bytes of a parameter, by what holds it, on each of 8 devices."""
    yield _row(
        "way, on 8 devices",
        "learning",
        "weights, GB",
        "gradients",
        "moments",
        "average",
        "bytes/parameter",
        "exchanged, GB",
    )
    yield _row(*["---"] * 8)
    for name, setup in WAYS:
        found = need(config, FULL, setup)
        each = (found.weights, found.gradients, found.moments, found.average)
        cells = [f"{part / 1e9:.1f}" for part in each]
        learning = f"{found.parameters.learning / 1e6:,.0f} M"
        bytes_each = f"{sum(each) / found.parameters.total:.1f}"
        yield _row(name, learning, *cells, bytes_each, f"{exchanged(found, setup) / 1e9:.1f}")


def device_table(config: Pi05Config = PI05) -> Iterator[str]:
    """What a sample takes beside the states, and how many fit a card."""
    heads = ("way, on 8 devices", "states, GB", "gathered, copies", "a sample", "computed again")
    yield _row(*heads, *(card.name for card in CARDS))
    yield _row(*["---"] * (len(heads) + len(CARDS)))
    for name, setup in WAYS:
        found, again = need(config, FULL, setup), replace(setup, checkpointing=True)
        sample = _sample(found)
        less = _sample(need(config, FULL, again))
        held = (found.states + found.gradients, found.gathered + found.copies)
        sizes = [f"{size / 1e9:.1f}" for size in held] + [f"{size / 1e9:.2f}" for size in (sample, less)]
        yield _row(name, *sizes, *(_fits(config, setup, card) for card in CARDS))


def scale_table(config: Pi05Config = PI05) -> Iterator[str]:
    """Many devices: the largest batch that fits each, bytes exchanged, samples a second."""
    heads = (
        "card",
        "devices",
        "way",
        "states of each, GB",
        "batch of each",
        "of all",
        "exchanged, GB",
        "samples/s",
        "limit",
    )
    yield _row(*heads)
    yield _row(*["---"] * len(heads))
    for card in CARDS:
        for devices in DEVICES:
            for name, setup in (WAYS[0], WAYS[2]):
                wide = replace(setup, devices=devices, checkpointing=True)
                batch = largest_batch(config, FULL, wide, card.memory)
                if not batch:
                    continue
                samples = replace(FULL, batch=batch)
                found = need(config, samples, wide)
                fast = speed(config, samples, wide, found, card)
                limit = "links" if fast.exchange > fast.compute else "products"
                held = f"{(found.states + found.gradients) / 1e9:.1f}"
                sent = f"{exchanged(found, wide) / 1e9:.1f}"
                total = f"{batch * devices:,}"
                yield _row(
                    card.name, f"{devices:,}", name, held, str(batch), total, sent, f"{fast.samples_per_s:,.0f}", limit
                )


def assumptions(config: Pi05Config = PI05) -> Iterator[str]:
    """What the tables assume, a line each."""
    products = step_products(config, FULL, Setup())
    again = step_products(config, FULL, Setup(checkpointing=True))
    yield (
        f"- a sample: {FULL.cameras} pictures, {FULL.prompt} tokens of prompt, {FULL.postfix} of postfix, {FULL.draws} "
        f"draw of the flow; products in bfloat16, everything else in float32, AdamW, a moving average"
    )
    yield f"- {products / 1e12:.1f} TFLOP a sample, {again / 1e12:.1f} with layers computed again"
    yield f"- {BASE['gpu'] / 1e9:g} GB of a card are not the model's: CUDA's context, NCCL, fragments"
    for card in CARDS:
        yield (
            f"- {card.name}: {card.peak / 1e12:.0f} TFLOP/s at the most, {100 * UTILISATION:.0f} % of them reached; "
            f"{card.near / 1e9:g} GB/s between the {MACHINE} devices of a machine, {card.far / 1e9:g} GB/s beyond"
        )
    yield "- exchange and products overlap: a step takes as long as the longer of the two; nobody waits for the loader"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _sample(found: Need) -> float:
    return found.activations + found.logits


def _fits(config: Pi05Config, setup: Setup, card: Card) -> str:
    plain = largest_batch(config, FULL, setup, card.memory)
    again = largest_batch(config, FULL, replace(setup, checkpointing=True), card.memory)
    return f"{plain or 'no'}, again {again or 'no'}" if again else "does not fit"
