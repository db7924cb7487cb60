"""What a server does as Prometheus reads it: /metrics. The table of all names is in docs/monitoring.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from ki_edge.errors import BackendError

from .events import Handled, Status
from .packages import prometheus
from .words import DROPPED, ERRORS, MISSES, OUTCOMES, RULES, STAGES, guards, known, told

# Seconds: twelve steps from 1 ms to 10 s, finer around the 100 ms that a robot waits for.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
FACTS = ("name", "backend", "precision", "horizon", "rate", "version")  # of the policy, that label ki_serve_bundle_info
LONGEST = 200  # characters of one
MADE = re.compile(rb"(# \w+ )?\w+_created[ {]")

Memory = Callable[[], "tuple[int, int] | None"]  # -> (free, all) bytes of the device; None where there is none


class Metrics:
    """Counts what it is told, in a registry of its own. BackendError without prometheus-client.

    Every series is there from the start, with 0, so that a rate of it is right from the first event on.
    """

    def __init__(self) -> None:
        client = prometheus()
        self._client = client
        self.registry = client.CollectorRegistry()
        client.ProcessCollector(registry=self.registry)
        client.PlatformCollector(registry=self.registry)

        def counter(name: str, words: str, *label: str) -> Any:
            return client.Counter(f"ki_serve_{name}", words, label, registry=self.registry)

        self._requests = counter("requests", "Requests that are over, by what became of them.", "outcome")
        self._errors = counter("errors", "Requests whose client was told an error, by kind.", "kind")
        self._dropped = counter("dropped", "Requests that never ran, by why.", "reason")
        self._connections = counter("connections", "Clients that connected.")
        self._received = counter("received_bytes", "Bytes of requests.")
        self._sent = counter("sent_bytes", "Bytes of answers.")
        self._misses = counter("client_deadline_misses", "Control ticks that clients say they missed.")
        self._guards = counter("client_guards", "Commands that clients say a rule of their guards changed.", "rule")
        self._loads = counter("bundle_loads", "Bundles that began to answer, the first among them.")
        where = {"registry": self.registry}
        self._total = client.Histogram(
            "ki_serve_request_seconds", "From a frame that came to its answer.", buckets=SECONDS, **where
        )
        self._stages = client.Histogram(
            "ki_serve_stage_seconds", "Seconds of each stage of a request.", ["stage"], buckets=SECONDS, **where
        )
        self._batch = client.Histogram(
            "ki_serve_batch_size", "Of a request that ran: how many ran with it.", buckets=BATCHES, **where
        )
        for metric, words in (
            (self._requests, set(OUTCOMES.values()) | {"other"}),
            (self._errors, ERRORS),
            (self._dropped, DROPPED),
            (self._guards, RULES),
        ):
            for word in words:
                metric.labels(word)
        self._by_stage = {stage: self._stages.labels(stage) for stage in STAGES}

    def handled(self, request: Handled) -> None:
        outcome = request.outcome
        self._requests.labels(OUTCOMES.get(outcome, "other")).inc()
        if outcome in ERRORS or outcome not in OUTCOMES:
            self._errors.labels(known(outcome, ERRORS)).inc()
        if outcome in DROPPED:
            self._dropped.labels(outcome).inc()
        if outcome == "answered":
            self._total.observe(request.total / 1e3)
        for stage, milliseconds in request.stages.items():
            self._by_stage[known(stage, STAGES)].observe(milliseconds / 1e3)
        if request.batch:
            self._batch.observe(request.batch)
        self._received.inc(request.received)
        self._sent.inc(request.sent)
        for name, value in told(request.reported):
            if name == MISSES:
                self._misses.inc(value)
        for rule, value in guards(request.reported).items():
            self._guards.labels(rule).inc(value)

    def connected(self) -> None:
        self._connections.inc()

    def loaded(self) -> None:
        self._loads.inc()

    def add(self, standing: Standing) -> None:
        """Also tell how things stand, asked for at every scrape."""
        self.registry.register(standing)

    def to_text(self) -> tuple[str, bytes]:
        """(content type, text format), without the time at which each counter was made: half as many lines."""
        lines = self._client.generate_latest(self.registry).splitlines(keepends=True)
        return self._client.CONTENT_TYPE_LATEST, b"".join(line for line in lines if not MADE.match(line))


class Standing:
    """Gauges that are read from the server when they are asked for.

    `counts`: name -> (words, how many there were) of what else watches; `gauges` likewise, of what may fall.
    """

    def __init__(
        self,
        status: Callable[[], Status],
        memory: Memory,
        counts: Mapping[str, tuple[str, Callable[[], float]]],
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
    ) -> None:
        self._status, self._memory, self._counts, self._gauges = status, memory, counts, gauges
        self._core = prometheus().core

    def describe(self) -> list[Any]:
        """Nothing: so that registering it asks nothing of a server that has not started."""
        return []

    def collect(self) -> Iterator[Any]:
        status, core = self._status(), self._core

        def gauge(name: str, words: str, value: float) -> Any:
            return core.GaugeMetricFamily(f"ki_serve_{name}", words, value=value)

        yield gauge("clients", "Clients that are connected.", len(status.clients))
        yield gauge("queue_depth", "Requests that wait.", status.waiting)
        yield gauge("running", "Requests in the model.", status.running)
        yield gauge("accepting", "1 while new requests are taken.", float(status.accepting))
        info = core.GaugeMetricFamily("ki_serve_bundle_info", "Which policy answers; always 1.", labels=FACTS)
        info.add_metric([fact(status.policy, name) for name in FACTS], 1)
        yield info
        for name, (words, read) in self._gauges.items():
            yield gauge(name, words, read())
        for name, (words, read) in self._counts.items():
            yield core.CounterMetricFamily(f"ki_serve_{name}", words, value=read())
        if (found := self._device(status)) is not None:
            memory = core.GaugeMetricFamily("ki_serve_gpu_memory_bytes", "Of the first device.", labels=["kind"])
            memory.add_metric(["free"], found[0])
            memory.add_metric(["total"], found[1])
            yield memory

    def _device(self, status: Status) -> tuple[int, int] | None:
        if status.policy.get("device") == "CPU":  # looking for a GPU may have loaded CUDA: leave it at that
            return None
        with suppress(BackendError):  # a device that is lost is told by the requests that fail
            return self._memory()
        return None


def fact(policy: Mapping[str, Any], name: str) -> str:
    """A fact of the policy as a label; "" where it is not known."""
    value = policy.get(name)
    if name == "version" and value is None and isinstance(versions := policy.get("versions"), Mapping):
        value = versions.get("ki-edge", versions.get("ki_edge"))
    return "" if value is None else str(value)[:LONGEST]
