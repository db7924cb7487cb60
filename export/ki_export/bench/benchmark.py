"""One benchmark from beginning to end: `bench(bundle, options)`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.config import Pi05Config
from ki_edge.policy.contract import PolicyContract
from ki_runtime.policy.sampler import Sampler

from .machine import OtherLoad, describe
from .options import PICTURE_SIZE, BenchOptions, Case
from .others import compare, main_actions, open_others
from .peaks import PeakContenders, Peaks, biggest
from .report import FAST_FIRST, FAST_TOKEN, INFERENCE, PREFIX, STEP, Pictures, Report, Stage
from .rounds import Contender, Samples, Say, Spread, measure, policy
from .setting import Setting, fresh_process, prepare
from .stages import FORCED, bundle_contender, draw_inputs, draw_noise, fast_contender, resizing
from .work import Work

BUSY = 0.05  # other processes' share of the CPU from which on figures are suspect
FAST, PICTURES = "FAST", "pictures"
PARTS = ("prefix", "step")


def bench(bundle: str | Path | Bundle, options: BenchOptions, say: Say = lambda _: None) -> Report:
    """Measure a bundle on this machine; `say` gets a line for each thing that takes time.

    ArgumentError for cases that the bundle has no room for, BundleError and BackendError as `Sampler.open`,
    all three and CheckpointError for `options.others`.
    """
    setting = prepare(bundle, options)
    say("a fresh process that acts once")
    memory, startup = fresh_process(setting)
    sampler = Sampler.open(
        setting.bundle, setting.backend, threads=setting.threads, sequential=options.sequential, say=say
    )
    works = _main_works(setting)
    peaks = PeakContenders(biggest(works), setting.threads)
    rivals = open_others(setting, say)
    contenders = {**_contenders(setting, sampler), **peaks.contenders()}
    contenders.update({name: rival.run for name, rival in rivals.items()})
    if setting.contract is not None:
        contenders[PICTURES] = resizing(setting.contract, options.picture_size or PICTURE_SIZE)
    say("warming up")
    with OtherLoad() as others:
        samples = measure(contenders, options.rounds, options.warm_up_s, say)
    limits = peaks.peaks(samples)
    report = Report(
        machine=describe(),
        bundle=setting.bundle.path.name,
        precision=setting.bundle.manifest.precision,
        model=_model_facts(setting.config),
        backend=setting.backend,
        threads=setting.threads,
        rounds=options.rounds,
        warm_up_policy=policy(options.warm_up_s),
        warm_up={name: found.warm_up for name, found in samples.items()},
        startup=startup,
        memory=memory,
        peaks=limits,
        stages=tuple(_stages(setting, samples, limits)),
        pictures=None if setting.contract is None else _pictures(setting.contract, options, samples[PICTURES]),
        others=tuple(compare(main_actions(setting, sampler), rivals, samples, _name(setting.cases[0]))),
        other_load=None if math.isnan(others.share) else others.share,
        warnings=(),
    )
    return replace(report, warnings=tuple(_warnings(report, works)))


def _main_works(setting: Setting) -> list[Work]:
    """Of each graph in the main case; other cases differ in sizes alone."""
    works, main = setting.works, setting.cases[0]
    found = [works.prefix(main), works.step(main)]
    return [*found, works.fast(main, 1 + FORCED), works.fast(main, 1)] if setting.options.fast else found


def _contenders(setting: Setting, sampler: Sampler) -> dict[str, Contender]:
    noise = draw_noise(setting.config)
    found = {}
    for case in setting.cases:
        inputs = draw_inputs(setting.config, setting.space, case)
        found[_name(case)] = bundle_contender(sampler, inputs, noise, case.steps)
    if setting.options.fast:
        inputs = draw_inputs(setting.config, setting.space, setting.cases[0])
        found[FAST] = fast_contender(setting.bundle, setting.backend, setting.threads, inputs)
    return found


def _stages(setting: Setting, samples: Mapping[str, Samples], peaks: Peaks) -> list[Stage]:
    """Of each size: prefix and step, over the runs of all step counts, then inference with each step count."""
    found, works = [], setting.works
    for cases_of_size in _by_size(setting.cases):
        case = cases_of_size[0]
        pooled = {key: [x for each in cases_of_size for x in samples[_name(each)].times[key]] for key in PARTS}
        prefix = _stage(PREFIX, case, works.tokens(case), pooled["prefix"], works.prefix(case), peaks)
        step = _stage(STEP, case, works.tokens(case), pooled["step"], works.step(case), peaks)
        found += [prefix, step]
        for each in cases_of_size:
            found.append(_inference(each, prefix, step, Spread.of(samples[_name(each)].times["total"])))
    if setting.options.fast:
        case, times = setting.cases[0], samples[FAST].times
        for name, key, new in ((FAST_FIRST, "first", 1 + FORCED), (FAST_TOKEN, "token", 1)):
            found.append(_stage(name, case, works.tokens(case), times[key], works.fast(case, new), peaks))
    return found


def _stage(name: str, case: Case, tokens: int, values: Sequence[float], work: Work, peaks: Peaks) -> Stage:
    limit, by = peaks.limit_ms(work.flops, work.bytes)
    return Stage(name, case, tokens, Spread.of(values), work.flops, work.bytes, limit, by)


def _inference(case: Case, prefix: Stage, step: Stage, time: Spread) -> Stage:
    kinds = {*prefix.flops, *step.flops}
    return Stage(
        name=INFERENCE,
        case=case,
        tokens=prefix.tokens,
        time=time,
        flops={kind: prefix.flops.get(kind, 0) + case.steps * step.flops.get(kind, 0) for kind in sorted(kinds)},
        bytes=prefix.bytes + case.steps * step.bytes,
        limit_ms=prefix.limit_ms + case.steps * step.limit_ms,
        limited_by=prefix.limited_by if prefix.limited_by == step.limited_by else "both",
    )


def _pictures(contract: PolicyContract, options: BenchOptions, samples: Samples) -> Pictures:
    cameras = sum(camera.key is not None for camera in contract.cameras)
    return Pictures(cameras, options.picture_size or PICTURE_SIZE, Spread.of(samples.times["total"]))


def _warnings(report: Report, works: Sequence[Work]) -> list[str]:
    """What makes the figures less than they seem."""
    found = []
    if report.other_load is not None and report.other_load > BUSY:
        found.append(f"others used {100 * report.other_load:.0f} % of the CPU meanwhile: measure on an idle machine")
    restless = [name for name, warm_up in report.warm_up.items() if not warm_up.settled]
    if restless:
        others = f" and {len(restless) - 2} more" if len(restless) > 2 else ""
        found.append(f"not settled when the warm-up ended: {'; '.join(restless[:2])}{others}")
    if report.backend != "ort":
        found.append(f"the peak is ONNX Runtime's, the bundle ran on {report.backend}")
    uncounted = sorted({name for work in works for name in work.uncounted})
    if uncounted:
        found.append(f"operators whose work is not counted: {', '.join(uncounted)}")
    return found


def _model_facts(config: Pi05Config) -> dict[str, int]:
    return {
        "layers": config.backbone.depth,
        "width": config.backbone.width,
        "expert_width": config.expert.width,
        "horizon": config.action_horizon,
        "patches": config.vision.patches,
    }


def _by_size(all_cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that differ in their steps alone, together; the main case's first."""
    groups: dict[tuple[int, int], list[Case]] = {}
    for case in all_cases:
        groups.setdefault((case.cameras, case.tokens), []).append(case)
    return list(groups.values())


def _name(case: Case) -> str:
    return f"cameras {case.cameras}, prompt {case.tokens}, steps {case.steps}"
