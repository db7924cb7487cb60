"""/metrics: what it counts, and that no client can make it grow."""

import math
import threading

import pytest

from ki_edge.errors import BackendError, DeviceError
from ki_runtime.control.verdict import REACTIONS
from ki_runtime.gpu.cuda import Cuda
from ki_runtime.monitoring import device, packages
from ki_runtime.monitoring.monitor import Monitor
from ki_runtime.monitoring.words import OTHER, OUTCOMES, RULES

from .monitored import POLICY, ROBOT, answered, refused, status

parser = pytest.importorskip("prometheus_client.parser", reason="pip install 'ki-edge[serve]'")


class Told:
    """Values of /metrics by name and labels: told["ki_serve_requests_total", "answered"]."""

    def __init__(self, monitor, now=lambda: status(ROBOT)):
        self.page = monitor.pages(now)["/metrics"]

    def samples(self):
        code, _, text = self.page({}, {})
        assert code == 200
        families = parser.text_string_to_metric_families(text.decode())
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    def __getitem__(self, key):
        return self.samples()[key if isinstance(key, tuple) else (key,)]


def test_what_became_of_requests():
    monitor = Monitor()
    told = Told(monitor)
    assert told["ki_serve_requests_total", "answered"] == 0  # there before the first
    for outcome, times in {"answered": 5, "observation": 3, "policy": 2, "busy": 4, "replaced": 6, "gone": 1}.items():
        for number in range(times):
            monitor.handled(answered(number) if outcome == "answered" else refused(outcome))
    found = told.samples()
    outcomes = {key[1]: value for key, value in found.items() if key[0] == "ki_serve_requests_total"}
    assert outcomes == {"answered": 5, "refused": 3, "failed": 2, "dropped": 11, "other": 0}
    errors = {key[1]: value for key, value in found.items() if key[0] == "ki_serve_errors_total" and value}
    assert errors == {"observation": 3, "policy": 2, "busy": 4}  # who was replaced or is gone is told nothing
    dropped = {key[1]: value for key, value in found.items() if key[0] == "ki_serve_dropped_total" and value}
    assert dropped == {"busy": 4, "replaced": 6, "gone": 1}
    assert found["ki_serve_received_bytes_total",] == 21 * 10_000
    assert found["ki_serve_sent_bytes_total",] == 5 * 500 + 16 * 60


def test_latencies_are_seconds_in_buckets():
    monitor = Monitor()
    told = Told(monitor)
    for total in (0.4, 42.0, 42.0, 99.0, 20_000.0):
        monitor.handled(answered(total=total, stages={"wait": 3.0, "model": total}, batch=4))
    monitor.handled(refused())  # how long a refusal took is no answer's latency
    found = told.samples()
    buckets = {float(key[1]): value for key, value in found.items() if key[0] == "ki_serve_request_seconds_bucket"}
    assert [buckets[at] for at in (0.001, 0.02, 0.05, 0.1, 10.0, math.inf)] == [1, 1, 3, 4, 4, 5]
    assert found["ki_serve_request_seconds_sum",] == pytest.approx(20.1834)
    assert found["ki_serve_stage_seconds_count", "wait"] == found["ki_serve_stage_seconds_count", "model"] == 5
    assert found["ki_serve_stage_seconds_count", "read"] == 1 and found["ki_serve_stage_seconds_count", "write"] == 0
    assert found["ki_serve_batch_size_bucket", "4.0"] == 5 and found["ki_serve_batch_size_bucket", "3.0"] == 0


def test_how_things_stand_is_asked_for_at_every_scrape():
    now = [status()]
    told = Told(Monitor(), lambda: now[0])
    assert (told["ki_serve_clients"], told["ki_serve_queue_depth"], told["ki_serve_accepting"]) == (0, 3, 1)
    assert told["ki_serve_bundle_info", "ort", "5", "fetch", "", "20.0", "0.1.0"] == 1
    now[0] = status(ROBOT, "[::1]:2", waiting=7, running=1, accepting=False, policy={**POLICY, "name": "other"})
    found = told.samples()
    assert (found["ki_serve_clients",], found["ki_serve_queue_depth",], found["ki_serve_running",]) == (2, 7, 1)
    assert found["ki_serve_accepting",] == 0
    assert [key[3] for key in found if key[0] == "ki_serve_bundle_info"] == ["other"]  # the old one is gone


def test_no_client_can_add_a_series():
    monitor = Monitor()
    told = Told(monitor)
    before = set(told.samples())
    for number in range(300):
        client = f"10.0.{number}.1:{number}"
        monitor.connected(client)
        reported = {f"guards.rule{number}": 1.0, f"anything{number}": 1.0, "guards.velocity": 1.0}
        monitor.handled(answered(number, client, reported=reported, stages={f"stage{number}": 1.0}))
        monitor.handled(refused(f"outcome{number}", client=client))
        monitor.left(client, f"why {number}")
    found = told.samples()
    assert set(found) == before
    assert found["ki_serve_client_guards_total", OTHER] == found["ki_serve_client_guards_total", "velocity"] == 300
    assert found["ki_serve_stage_seconds_count", OTHER] == 300 and found["ki_serve_errors_total", OTHER] == 300
    assert found["ki_serve_connections_total",] == 300


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e300, "7", None, [1], {"a": 1}])
def test_nonsense_that_a_client_reports_is_not_counted(value):
    monitor = Monitor()
    told = Told(monitor)
    monitor.handled(answered(reported={"deadline_misses": value, "guards.velocity": value}))
    monitor.handled(answered(reported={"deadline_misses": 3}))
    assert told["ki_serve_client_deadline_misses_total"] == 3
    assert told["ki_serve_client_guards_total", "velocity"] == 0
    assert monitor.failure is None and told["ki_serve_watching_failures_total"] == 0


def test_the_rules_are_those_of_the_guards():
    assert (*REACTIONS, OTHER) == RULES
    assert set(OUTCOMES.values()) == {"answered", "refused", "failed", "dropped"}


def test_memory_of_process_and_device(monkeypatch):
    told = Told(Monitor(memory=lambda: (3 << 30, 8 << 30)))
    found = told.samples()
    assert found["process_resident_memory_bytes",] > 1e6 and found["process_cpu_seconds_total",] > 0
    assert found["ki_serve_gpu_memory_bytes", "free"] == 3 << 30

    cpu = Told(Monitor(memory=lambda: (1, 2)), lambda: status(policy={**POLICY, "device": "CPU"}))
    assert not [key for key in cpu.samples() if "gpu" in key[0]]

    def lost():
        raise DeviceError("the device is lost")

    assert not [key for key in Told(Monitor(memory=lost)).samples() if "gpu" in key[0]]
    monkeypatch.setattr(Cuda, "_process", None)
    assert device.device_memory() is None  # and opens none
    monkeypatch.setattr(Cuda, "_process", type("Open", (), {"memory": lambda self: (1, 2)})())
    assert device.device_memory() == (1, 2)


def test_two_servers_in_a_process_count_for_themselves():
    one, two = Monitor(), Monitor()
    one.handled(answered())
    assert Told(one)["ki_serve_requests_total", "answered"] == 1
    assert Told(two)["ki_serve_requests_total", "answered"] == 0


def test_counted_while_it_is_read():
    monitor = Monitor()
    told = Told(monitor)
    threads = [
        threading.Thread(target=lambda: [monitor.handled(answered(number)) for number in range(500)]) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        told.samples()
    assert told["ki_serve_requests_total", "answered"] == 1500 and monitor.failure is None


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(BackendError, match=r"pip install 'ki-edge\[serve\]'"):
        Monitor()
    assert set(Monitor(metrics=False).pages(status)) == {
        "/",
        "/page.css",
        "/page.js",
        "/icon.svg",
        "/status.json",
        "/picture",
    }
    assert Monitor(metrics=False, page=False).pages(status) == {}
    with pytest.raises(BackendError):
        packages.prometheus()


def test_a_fault_of_the_monitoring_is_not_the_servers():
    monitor = Monitor()
    told = Told(monitor)
    monitor.handled(answered(stages={"wait": "long"}))  # of a wrong type: what the seam does not allow
    monitor.handled(answered())
    assert isinstance(monitor.failure, TypeError) and told["ki_serve_watching_failures_total"] == 1
    assert told["ki_serve_requests_total", "answered"] == 2
