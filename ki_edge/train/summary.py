"""What a run is going to do, in a few lines, and what in it looks like a mistake."""

from __future__ import annotations

from collections.abc import Iterator

from ki_edge.planning.settings import TrainSettings

from .data.mixed import MixedData
from .parallel.engine import Engine
from .record import Origin

NEW_MODELS = 2e-4  # a rate above it is for models from nothing


def summary(engine: Engine, data: MixedData, settings: TrainSettings, origin: Origin) -> Iterator[str]:
    """Model, devices, what is learnt, how often the data are seen; then warnings."""
    parameters = list(engine.model.parameters())
    learning, all_ = (sum(p.numel() for p in part) for part in ([p for p in parameters if p.requires_grad], parameters))
    where = f"{engine.world} processes of {engine.device.type} ({engine.strategy})" if engine.world > 1 else (
        f"one process on {engine.device.type}"
    )  # fmt: skip
    start = f"from {origin.init}" if origin.init else f"from nothing ({origin.preset or 'tiny'})"
    precision = "bfloat16" if settings.bfloat16 else "float32"
    yield f"{learning / 1e6:.1f} of {all_ / 1e6:.1f} M parameters learn, {start}, in {where}, products in {precision}"
    how = "knowledge insulation" if settings.knowledge_insulation else "no insulation"
    terms = "flow and FAST" if engine.tokens else "flow alone"
    yield (
        f"{how}: {terms}; {settings.steps} steps of {settings.batch} samples, learning rate {settings.learning_rate:g} "
        f"after {settings.warmup} steps of warm-up"
    )
    for name, samples, share in data.sizes():
        seen = settings.steps * settings.batch * share
        yield f"{name}: {samples} samples, each seen {seen / max(1, samples):.3g} times"
    yield from _doubts(settings, origin)


def _doubts(settings: TrainSettings, origin: Origin) -> Iterator[str]:
    if origin.init and settings.learning_rate > NEW_MODELS:
        yield (
            f"a learning rate of {settings.learning_rate:g} is for new models: a large checkpoint wants about 2.5e-5, "
            "as --recipe pi052 or opentau have it"
        )
    if settings.warmup >= settings.steps:
        yield (
            f"the warm-up of {settings.warmup} steps is not over when the run is: its rate ends at "
            f"{settings.rate(settings.steps - 1):.2g} of {settings.learning_rate:g}"
        )
    if not origin.init and "vision" in settings.freeze:
        yield "the vision tower is frozen at random numbers: --freeze vision is for --init"
