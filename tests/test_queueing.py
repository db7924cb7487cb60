"""The simulation under benchmarks/fleet.py against what is known in closed form of such queues."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COUNT = 400_000


@pytest.fixture(scope="module")
def queueing():
    spec = importlib.util.spec_from_file_location("queueing", BENCHMARKS / "queueing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("servers", "load"), [(1, 0.6), (2, 1.5), (8, 6.8), (50, 46.0)])
def test_mmc_is_erlangs(queueing, servers, load):
    """Mean wait, and the shares that wait at all and longer than half a service time, of 400,000 requests."""
    mean = 0.03
    rate = load / mean
    service = queueing.exponential(mean, 1)
    drawn = []

    def remembered(batch):
        drawn.append(service(batch))
        return drawn[-1]

    took = queueing.simulate(queueing.poisson(rate, COUNT, 2), remembered, servers)
    waits = took - np.array(drawn)
    assert waits.mean() == pytest.approx(queueing.mmc_wait(servers, rate, mean), rel=0.06)
    assert (waits > 1e-9).mean() == pytest.approx(queueing.erlang_c(servers, load), rel=0.04)
    longer = queueing.mmc_waits_longer(servers, rate, mean, mean / 2)
    assert (waits > mean / 2).mean() == pytest.approx(longer, rel=0.08)


@pytest.mark.parametrize(("variation", "use"), [(0.0, 0.5), (0.0, 0.85), (0.3, 0.8), (1.5, 0.7)])
def test_mg1_is_pollaczeks(queueing, variation, use):
    mean = 0.03
    took = queueing.simulate(queueing.poisson(use / mean, COUNT, 3), queueing.varying(mean, variation, 4), 1)
    wanted = queueing.mg1_wait(use / mean, mean, variation)
    assert took.mean() - mean == pytest.approx(wanted, rel=0.08)
    assert queueing.allen_cunneen(1, use / mean, mean, variation) == pytest.approx(wanted)


def test_erlang_c_of_tables(queueing):
    """Two servers by hand: C(2, a) = a^2 / (2 + a); and ten servers under a load of 8, from a printed table."""
    assert queueing.erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert queueing.erlang_c(2, 1.5) == pytest.approx(2.25 / 3.5)
    assert queueing.erlang_c(10, 8.0) == pytest.approx(0.4092, abs=5e-5)
    assert queueing.erlang_c(1, 0.3) == pytest.approx(0.3)


def test_a_queue_by_hand(queueing):
    """Five requests, two servers, batches of two: who runs with whom, and when."""
    arrivals = np.array([0.0, 0.1, 0.2, 0.3, 5.0])
    took = queueing.simulate(arrivals, lambda batch: 0.9 + 0.1 * batch, 2, largest=2)
    assert took == pytest.approx([1.0, 1.0, 1.9, 1.8, 1.0])  # the third and the fourth begin together, at 1.0
    alone = queueing.simulate(arrivals, lambda batch: 1.0, 1)
    assert alone == pytest.approx([1.0, 1.9, 2.8, 3.7, 1.0])


def test_periodic_robots_wait_less_than_poissons(queueing):
    """Ten robots on one server that is half used: no bursts. All of them at once: the last waits for nine others."""
    mean, period = 0.03, 0.6
    found = {}
    for together in (False, True):
        arrivals = queueing.periodic(10, period, 0.002, 2000, 5, together)
        assert arrivals.shape == (2000, 10)
        found[together] = queueing.simulate(np.sort(arrivals.ravel()), lambda _: mean, 1)
    random = queueing.simulate(queueing.poisson(10 / period, 20_000, 6), lambda _: mean, 1)
    assert found[False].mean() < random.mean()
    assert found[True].max() == pytest.approx(10 * mean, rel=0.1)


def test_least_servers(queueing):
    for wanted in (1, 2, 7, 100, 3_456):
        assert queueing.least_servers(lambda count, wanted=wanted: count >= wanted, 1) == wanted
    assert queueing.least_servers(lambda count: count >= 12, 12) == 12


def test_the_plan_is_printed():
    """The whole script, with few requests; its own service time instead of a measured one."""
    command = [sys.executable, BENCHMARKS / "fleet.py", "--requests", "3000", "--robots", "10,200"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert any(line.startswith("| 200 |") for line in rows) and math.isfinite(len(rows))


def test_the_page_has_the_cells_that_the_command_finds():
    """Drawn with fixed seeds: the same robots in a cell, and GPUs of a fleet, every time."""
    names = ["RTX 4090", "RTX 5090", "H200"]
    code = f"import fleet\nfor name in {names}: print(fleet.robots_of_cell(fleet.counted(name), 100_000))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    page = (BENCHMARKS.parent / "docs" / "serving_fleet.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    said = {(row[0], row[1]): row[-1] for row in rows if len(row) == 7}
    for name, robots in zip(names, map(int, done.stdout.split()), strict=True):
        for fleet in (1_000, 100_000):
            assert said[f"{fleet:,}", f"{name}, counted"] == f"{-(-fleet // robots) * 8:,}"
