"""The steps of the GPU benchmark and their order (see gpu.py)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from boards import CASES
from gpu_measure import latency, parity, warm_up
from gpu_process import Budget, Command, Contender, Failed, Record, environment_facts, gpu_memory_mb

from ki_export.bench.machine import cores

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS, BACKENDS = ("fp16", "bf16", "fp32"), ("ort-cuda", "trt", "trt-rtx")
RECORDED = ("ort-cuda",)  # record CUDA graphs if they are asked to, and are measured in both ways
TINY = ROOT / "examples" / "fetch" / "checkpoint"  # of a rehearsal
MANY_CORES = 8  # from which on exports run side by side
SMALL, FULL = 2, 18  # layers
SMALL_BATCH = 2  # observations at once in the parity of the small model
RESERVE_S = 60.0  # kept for the rounds while contenders are opened
OPEN_S = {"ort-cuda": 120.0, "trt": 300.0, "trt-rtx": 150.0, "eager": 90.0, "compile": 240.0}


@dataclass(frozen=True)
class Plan:
    """A step: `least`: seconds that must be left to begin it, a guess."""

    name: str
    least: float
    what: str
    run: Any
    needs: tuple[str, ...] = ()


class Benchmark:
    """The steps over one working folder. `device`: "cuda", or "cpu" in a rehearsal."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        self.options, self.device, self.folder = options, device, options.output
        self.backends = BACKENDS if device == "cuda" else ("ort",)
        self.site: Path | None = self.folder / "site" if options.wheels else None
        self.budget = Budget(60.0 * options.minutes, self.folder / "gpu.json")
        self.open: dict[str, Contender] = {}
        self._drawing: Command | None = None
        self._exports: dict[tuple[str, str], Command] = {}

    def plan(self) -> Iterable[Plan]:
        """All steps in their order."""
        if self.options.wheels:
            yield Plan("wheels", 10, f"install the wheels of {self.options.wheels}, no network", self._wheels)
        yield Plan("environment", 5, "GPU, driver, versions, date", self._environment)
        yield Plan("full checkpoint begun", 180, "3.6 B random parameters, 7.2 GB, drawn meanwhile", self._begin)
        yield from self._small()
        yield from self._full()

    def _small(self) -> Iterable[Plan]:
        yield Plan("small checkpoint", 30, "random weights, real widths, 2 layers", self._small_checkpoint)
        run = partial(self._begin_exports, "small", self.options.precisions)
        yield Plan("small bundles begun", 60, "side by side where there are cores", run, ("small checkpoint",))
        for precision in self.options.precisions:
            yield self._bundle("small", precision, 20)
        run = partial(self._parity, "small", self.options.precisions)
        yield Plan(
            "parity small",
            60,
            "actions of every bundle and backend against PyTorch float32",
            run,
            ("small checkpoint",),
        )

    def _full(self) -> Iterable[Plan]:
        first, *rest = self.options.precisions
        yield Plan(
            "full checkpoint", 90, "or the one that was given", self._full_checkpoint, ("full checkpoint begun",)
        )
        yield self._bundle("full", first, 120)
        for name, facts in self._contenders("full", first):
            limit = OPEN_S.get(facts.get("backend") or ("compile" if facts.get("mode") else "eager"), 120.0)
            needs = (f"full bundle {first}",) if facts["kind"] == "bundle" else ("full checkpoint",)
            run = partial(self._open, name, facts, limit)
            yield Plan(f"open {name}", 20 + RESERVE_S, f"load and warm up, at most {limit:.0f} s", run, needs)
        for cameras, tokens in CASES:
            run = partial(self._latency, cameras, tokens)
            yield Plan(f"latency, {cameras} cameras, {tokens} tokens", 20, f"{self.options.rounds} rounds in turn", run)
        for precision in (first, *rest):
            if precision != first:
                yield self._bundle("full", precision, 120)
            run = partial(self._parity, "full", (precision,))
            yield Plan(f"parity full {precision}", 60, "as for the small one", run, (f"full bundle {precision}",))

    def _bundle(self, model: str, precision: str, least: float) -> Plan:
        name = f"{model} bundle {precision}"
        least = 1.0 if self._has(model, precision) else least
        what = f"ki-export --precision {precision}"
        return Plan(name, least, what, partial(self._export, model, precision), (f"{model} checkpoint",))

    def _contenders(self, model: str, precision: str) -> Iterable[tuple[str, dict[str, Any]]]:
        """What is timed: the bundle on each backend, PyTorch on the same tokens and as openpi runs it."""
        yield from self._bundle_contenders(model, precision)
        torch = {"kind": "torch", "path": str(self._place(model)), "dtype": "bfloat16", "device": self.device}
        yield "PyTorch bfloat16, eager, padded as openpi does", {**torch, "padded": True}
        yield "PyTorch bfloat16, eager", torch
        if self.options.compile_mode != "none":
            yield (
                f"PyTorch bfloat16, torch.compile {self.options.compile_mode}",
                {**torch, "mode": self.options.compile_mode},
            )
        yield from self._recorded(model, precision)

    def _bundle_contenders(self, model: str, precision: str) -> Iterable[tuple[str, dict[str, Any]]]:
        path = self.folder / f"{model}-{precision}"
        batch = SMALL_BATCH if model == "small" else 1  # engines for more than one row are another, slower build
        for backend in self.backends:
            facts = {"kind": "bundle", "path": str(path), "backend": backend, "batch": batch}
            yield f"bundle {precision}, {backend}", facts

    def _recorded(self, model: str, precision: str) -> Iterable[tuple[str, dict[str, Any]]]:
        """Once more what records CUDA graphs if it is asked to. A second copy of the model, so for the end."""
        for name, facts in self._bundle_contenders(model, precision):
            if facts["backend"] in RECORDED:
                yield f"{name}, recorded", {**facts, "record": True}

    # ------------------------------------------------------------------ steps

    def _wheels(self) -> str:
        wheels = sorted(str(path) for path in self.options.wheels.glob("*.whl"))
        if not wheels:
            raise Failed(f"no wheels in {self.options.wheels}")
        command = ["-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", str(self.site), *wheels]
        Command(command, self.folder / "wheels.log", None).finish(self.budget.left)
        return ", ".join(Path(wheel).name for wheel in wheels)

    def _environment(self) -> dict[str, Any]:
        return environment_facts(self.site)

    def _begin(self) -> str:
        """Full-size weights take a core and minutes, so they are drawn while the small model is measured."""
        if not (self._place("full") / "model.safetensors").exists():
            self._drawing = self._draw("full", FULL)
        return "begun"

    def _draw(self, model: str, depth: int) -> Command:
        command = [str(ROOT / "benchmarks" / "random_checkpoint.py"), str(self._place(model)), "--depth", str(depth)]
        return Command(command, self.folder / f"{model}-checkpoint.log", self.site)

    def _small_checkpoint(self) -> str:
        place = self._place("small")
        if not (place / "model.safetensors").exists():
            self._draw("small", SMALL).finish(self.budget.left)
        return str(place)

    def _full_checkpoint(self) -> str:
        if self._drawing is not None:
            self._drawing.finish(self.budget.left)
        return str(self._place("full"))

    def _place(self, model: str) -> Path:
        if self.device == "cpu":
            return TINY
        given: Path | None = self.options.checkpoint
        return given if model == "full" and given is not None else self.folder / f"{model}-checkpoint"

    def _begin_exports(self, model: str, precisions: Iterable[str]) -> str:
        """Tracing keeps one core busy, so several exports run side by side where there are cores."""
        if cores() >= MANY_CORES:
            for precision in precisions:
                self._begin_export(model, precision)
        return "begun"

    def _export(self, model: str, precision: str) -> str:
        begun = self._begin_export(model, precision)
        if begun is not None:
            begun.finish(self.budget.left)
        return str(self.folder / f"{model}-{precision}")

    def _begin_export(self, model: str, precision: str) -> Command | None:
        """The export that runs or is begun now; None if an earlier benchmark in this folder left the bundle."""
        if (model, precision) not in self._exports:
            if self._has(model, precision):
                return None
            self._exports[model, precision] = self._exporting(model, precision)
        return self._exports[model, precision]

    def _has(self, model: str, precision: str) -> bool:
        """Whether an earlier run left this bundle, made of the same checkpoint as it is now."""
        manifest, checkpoint = self.folder / f"{model}-{precision}" / "manifest.json", self._place(model)
        if not manifest.exists():
            return False
        of = json.loads(manifest.read_text(encoding="utf-8"))["provenance"]["checkpoint"]
        newest = max((path.stat().st_mtime for path in checkpoint.glob("*.safetensors")), default=0.0)
        return bool(of == checkpoint.name) and manifest.stat().st_mtime >= newest

    def _exporting(self, model: str, precision: str) -> Command:
        output, log = self.folder / f"{model}-{precision}", self.folder / f"{model}-{precision}.log"
        target = "ort" if precision == "fp32" else "trt"
        command = ["-m", "ki_export.cli", str(self._place(model)), "-o", str(output), "--target", target, "--force"]
        return Command([*command, "--precision", precision, "--model-only", "--no-verify"], log, self.site)

    def _open(self, name: str, facts: dict[str, Any], limit_s: float) -> dict[str, float | None]:
        contender = self._start(name, facts)
        before, limit = gpu_memory_mb(), min(limit_s, self.budget.left - RESERVE_S)
        try:
            seconds = contender.open(limit)
            warm_up(contender, *CASES[0], limit)
        except Failed:
            contender.close()
            raise
        after = gpu_memory_mb()
        contender.memory = None if before is None or after is None else after - before
        self.open[name] = contender
        return {"seconds": seconds, "memory_mb": contender.memory}

    def _start(self, name: str, facts: dict[str, Any]) -> Contender:
        log = self.folder / f"{'-'.join(name.replace(',', ' ').split())}.log"
        return Contender(name, facts, log, self.site)

    def _latency(self, cameras: int, tokens: int) -> dict[str, Any]:
        main = (cameras, tokens) == CASES[0]
        racing = [each for each in self.open.values() if main or "mode" not in each.facts]
        if not racing:
            raise Failed("no contender could be opened")
        for contender in racing if not main else ():
            warm_up(contender, cameras, tokens, RESERVE_S)
        measured = latency(racing, cameras, tokens, self.options.rounds)
        for name, why in measured["failed"].items():
            self.budget.records.append(Record(f"latency of {name}", "failed", 0.0, why))
        return measured

    def _parity(self, model: str, precisions: Iterable[str]) -> list[dict[str, Any]]:
        torch = {"kind": "torch", "path": str(self._place(model)), "device": self.device, "padded": True}
        reference = self._start(f"PyTorch float32 {model}", {**torch, "dtype": "float32"})
        kinds = (self._bundle_contenders, self._recorded)
        wanted = [each for precision in precisions for kind in kinds for each in kind(model, precision)]
        wanted += [("PyTorch bfloat16, as openpi", {**torch, "dtype": "bfloat16"})] if "fp16" in precisions else []
        rows = []
        try:
            reference.open(self.budget.left)
            for name, facts in wanted:
                rows += self._compare(model, reference, name, facts)
        finally:
            reference.close()
        return rows

    def _compare(self, model: str, reference: Contender, name: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """One contender's row; none, and a record, if it fails."""
        ready = self.open.get(name) if model == "full" else None
        contender = ready or self._start(f"{name} {model}", facts)
        try:
            if ready is None:
                contender.open(min(OPEN_S["trt"], self.budget.left))
            rows = parity(model, reference, [contender], self.options.observations, self.folder)
            return [{**row, "contender": name} for row in rows]
        except Failed as error:
            self.budget.records.append(Record(f"parity {model}, {name}", "failed", 0.0, str(error)))
            return []
        finally:
            if ready is None:
                contender.close()

    def run(self) -> tuple[dict[str, Any], list[Record]]:
        """All steps; their results by name, and what happened to each."""
        try:
            for plan in self.plan():
                least = plan.least if self.device == "cuda" else 1.0
                self.budget.step(plan.name, least, plan.run, plan.needs)
        finally:
            for contender in self.open.values():
                contender.close()
            for command in (*self._exports.values(), *([self._drawing] if self._drawing else [])):
                command.close()
        return self.budget.results, self.budget.records
