"""How fast a training step is, and where its time goes; what is measured and how: docs/training-at-size.md, "Speed".

    python benchmarks/train.py
    python benchmarks/train.py --preset base --batch 2 --rounds 3
    python benchmarks/train.py --preset tiny --batch 16 --data my_run

Forms of the loss run in turn, a round after the other; each figure is a median over the rounds, each ratio is of one
run. Float32, random weights and samples, no padding. `--cpu-time` counts the processor's time of one thread instead of
the clock's, for a machine that others use too. Exit status 1 if a bar is missed or two forms differ.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from train_forms import (
    Sample,
    flow_alone,
    joint_pass,
    one_pass,
    random_sample,
    two_passes,
    two_passes_insulated,
)

from ki_edge.commands import run_command, show, show_json
from ki_edge.config import PRESETS
from ki_edge.model import Pi05
from ki_edge.model.loss import embed_fast_sequence, postfix_cross_entropy, predicting_tokens
from ki_edge.proc import cpu_info, peak_memory

TWO_PASSES = 1.6  # times the one pass that the seed documents' form takes at the least
SAME = 1e-4  # relative: two forms add in another order
ONE, TWO, TWO_INSULATED = "one pass", "two passes, as the seed documents", "two passes, insulated"
FLOW, JOINT = "flow alone, not insulated", "openpi's step in plain form"
RATIOS = ((TWO, ONE), (TWO_INSULATED, ONE), (JOINT, FLOW), (ONE, FLOW))
SKIPPED = 2  # first steps of the loader, which start its workers
Form = Callable[[Pi05, Sample], Tensor]
clock = time.perf_counter


def time_forms(
    forms: Mapping[str, tuple[Pi05, Form]], sample: Sample, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of forward and backward pass by form, and each form's loss. The first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    losses = {}
    for _ in range(rounds + 1):
        for name, (model, form) in forms.items():
            model.zero_grad(set_to_none=True)
            started = clock()
            loss = form(model, sample)
            loss.backward()  # type: ignore[no-untyped-call]
            seconds[name].append(clock() - started)
            losses[name] = loss.item()
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}, losses


def time_parts(model: Pi05, sample: Sample, rounds: int) -> dict[str, float]:
    """Median seconds of the parts of a whole step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    found: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name, seconds in _parts(model, sample, optimizer, average):
            found.setdefault(name, []).append(seconds)
    return {name: statistics.median(each[1:]) for name, each in found.items()}


def _parts(
    model: Pi05, sample: Sample, optimizer: torch.optim.Optimizer, average: list[Tensor]
) -> Iterator[tuple[str, float]]:
    """(part, seconds) of one step, in its order: what `compute_loss` does, then what the engine does."""
    clock = _Clock()
    optimizer.zero_grad(set_to_none=True)
    x, mask, bias = embed_fast_sequence(model, sample.observation)
    yield "pictures and embeddings", clock.lap()
    length = mask.shape[1]
    rope = model._rope(torch.arange(x.shape[1])[None].expand(len(x), -1))
    hidden, cache = model.backbone(x, rope, bias, wanted=predicting_tokens(sample.observation, length))
    yield "backbone", clock.lap()
    logits = model.backbone.unembed(hidden)
    fast = postfix_cross_entropy(logits, sample.observation).mean()
    yield "FAST head", clock.lap()
    prefix = [(k[:, :, :length].detach(), v[:, :, :length].detach()) for k, v in cache]
    v_t = model.velocity(sample.x_t, model.modulation(sample.time), prefix, mask)
    loss = fast + (v_t - sample.target).square().mean()
    yield "expert", clock.lap()
    loss.backward()  # type: ignore[no-untyped-call]
    yield "backward", clock.lap()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    yield "clipping and AdamW", clock.lap()
    with torch.no_grad():
        torch._foreach_lerp_(average, list(model.parameters()), 0.01)
    yield "moving average", clock.lap()


class _Clock:
    def __init__(self) -> None:
        self._since = clock()

    def lap(self) -> float:
        """Seconds since the last one."""
        now = clock()
        seconds, self._since = now - self._since, now
        return seconds


def time_loader(options: argparse.Namespace) -> dict[str, float]:
    """Samples a second that the loader has ready while nobody trains, by number of workers."""
    from ki_edge.planning.settings import TrainSettings
    from ki_edge.train.data.opening import open_data
    from ki_edge.train.data.start import Start
    from ki_edge.train.step.training_data import Share

    found = {}
    for workers in (0, 1, 2):
        settings = TrainSettings(steps=options.loader_steps + SKIPPED, batch=options.batch, warmup=1)
        data = open_data(
            options.data, Start.from_nothing(PRESETS[options.preset]), settings, workers=workers, map_file=options.map
        )
        try:
            batches = data.steps(0, Share())
            for _ in islice(batches, SKIPPED):
                pass
            started = time.perf_counter()
            count = sum(len(one) for step in islice(batches, options.loader_steps) for one in step)
            found[f"{workers} workers"] = count / (time.perf_counter() - started)
        finally:
            data.close()
    return found


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Everything, as JSON values."""
    torch.manual_seed(0)
    config = replace(PRESETS[options.preset], vocab_size=options.vocabulary or PRESETS[options.preset].vocab_size)
    sample = random_sample(config, options.batch, options.cameras, options.prompt, options.postfix)
    model = Pi05(config)
    _spread(model)
    plain = Pi05(config, knowledge_insulation=False)
    plain.load_state_dict(model.state_dict())
    insulated = {ONE: (model, one_pass), TWO: (model, two_passes), TWO_INSULATED: (model, two_passes_insulated)}
    seconds, losses = time_forms(insulated, sample, options.rounds)
    without, other = time_forms({FLOW: (plain, flow_alone), JOINT: (plain, joint_pass)}, sample, options.rounds)
    seconds |= without
    parts = time_parts(model, sample, options.rounds)
    step = sum(parts.values())
    return {
        "machine": f"{cpu_info('model name') or platform.processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "preset": options.preset,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shape": {name: getattr(options, name) for name in ("batch", "cameras", "prompt", "postfix", "rounds")},
        "seconds": seconds, "losses": {**losses, **other},
        "ratios": {f"{one} / {other}": seconds[one] / seconds[other] for one, other in RATIOS},
        "parts": parts, "samples_per_s": options.batch / step, "peak_memory": peak_memory(),
        "loader": time_loader(options) if options.data else {},
    }  # fmt: skip


def _spread(model: Pi05) -> None:
    """Weights of the size of trained ones: PyTorch's own embeddings make logits that say nothing."""
    with torch.no_grad():
        model.backbone.embed_tokens.weight.mul_(0.02)


def missed(found: Mapping[str, object]) -> list[str]:
    """Bars that were missed, and forms that differ."""
    ratios, losses = found["ratios"], found["losses"]
    assert isinstance(ratios, dict) and isinstance(losses, dict)
    ratio = ratios[f"{TWO} / {ONE}"]
    wrong = [] if ratio >= TWO_PASSES else [f"two passes take {ratio:.2f} times one, at least {TWO_PASSES:g} expected"]
    for group in ((ONE, TWO, TWO_INSULATED), (FLOW, JOINT)):
        values = [losses[name] for name in group]
        if max(values) - min(values) > SAME * abs(values[0]):
            wrong.append(f"losses differ: {', '.join(f'{name} {losses[name]:.6f}' for name in group)}")
    return wrong


def lines(found: Mapping[str, object]) -> Iterator[str]:
    """For people, as Markdown."""
    seconds, ratios, parts, loader = (found[name] for name in ("seconds", "ratios", "parts", "loader"))
    assert (
        isinstance(seconds, dict) and isinstance(ratios, dict) and isinstance(parts, dict) and isinstance(loader, dict)
    )
    yield f"{found['machine']}; PyTorch {found['torch']}; {found['preset']}, {found['parameters']:,} parameters"
    yield str(found["shape"])
    yield ""
    yield "| forward and backward pass | ms |"
    yield "|---|---|"
    yield from (f"| {name} | {1e3 * value:.0f} |" for name, value in seconds.items())
    yield ""
    yield "| ratio | |"
    yield "|---|---|"
    yield from (f"| {name} | {value:.2f} |" for name, value in ratios.items())
    yield ""
    yield "| part of a step | ms | share |"
    yield "|---|---|---|"
    total = sum(parts.values())
    yield from (f"| {name} | {1e3 * value:.0f} | {100 * value / total:.0f} % |" for name, value in parts.items())
    yield ""
    yield f"{found['samples_per_s']:.1f} samples/s; peak memory {float(str(found['peak_memory'] or 0)) / 1e6:.0f} MB"
    for name, value in loader.items():
        yield f"loader, {name}: {value:.1f} samples/s, {value / float(str(found['samples_per_s'])):.1f} times the model"


def main() -> int:
    """Measure, print, hold to the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--postfix", type=int, default=48, help="tokens")
    parser.add_argument("--vocabulary", type=int, help="rows of the embedding (the preset's)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of PyTorch (all)")
    parser.add_argument("--data", action="append", metavar="DATASET", help="also measure the loader on these")
    parser.add_argument("--map", metavar="FILE", help="which feature of them is which, as for ki-train")
    parser.add_argument("--loader-steps", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, instead of the clock's")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        globals()["clock"], options.threads = time.process_time, 1
    if options.threads:
        torch.set_num_threads(options.threads)

    def run() -> int:
        found = measure(options)
        wrong = missed(found)
        if options.json:
            show_json(found)
        else:
            show([*lines(found), *(f"MISSED: {line}" for line in wrong)])
        return 1 if wrong else 0

    return run_command("benchmarks/train.py", run, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
