"""The files of examples/grafana against what a server really tells: every name and label, and real Prometheus."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from ki_runtime.monitoring.monitor import Monitor
from ki_runtime.monitoring.words import OUTCOMES

from .monitored import CONTRACT, POLICY, ROBOT, answered, get, hosted, refused, status

parser = pytest.importorskip("prometheus_client.parser", reason="pip install 'ki-edge[serve]'")
FOLDER = Path(__file__).parents[2] / "examples" / "grafana"
BOARD = json.loads((FOLDER / "ki-serve.json").read_text())
ALERTS = re.findall(r"^\s+expr: (.*)$", (FOLDER / "alerts.yml").read_text(), re.M)
QUERIES = [(panel["title"], target["expr"]) for panel in BOARD["panels"] for target in panel["targets"]]
QUERIES += [("alert", expression) for expression in ALERTS]
SCRAPED = {"instance", "job"}  # labels that Prometheus adds
# What a query's words are beside names of metrics and labels.
WORDS = {"sum", "min", "max", "rate", "histogram_quantile", "by", "ignoring", "or", "up"}


def busy():
    """A monitor that was told something of every kind."""
    monitor = Monitor(memory=lambda: (1 << 30, 1 << 34))
    monitor.loaded(CONTRACT, POLICY)
    monitor.connected(ROBOT)
    for number in range(20):
        monitor.handled(answered(number, reported={"deadline_misses": 1, "guards.velocity": 2}))
    for outcome in OUTCOMES:
        monitor.handled(refused(outcome))
    return monitor


def series(text):
    """Name -> labels -> values that there are."""
    found = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


@pytest.fixture(scope="module")
def told():
    _, kind, text = busy().pages(lambda: status(ROBOT))["/metrics"]({}, {})
    assert kind.startswith("text/plain")
    return series(text.decode())


def selectors(query):
    """(metric, [(label, operator, value)]) of a query."""
    for name, inside in re.findall(r"\b([a-z_]+)(?:\{([^}]*)\})", query):
        yield name, re.findall(r"(\w+)\s*(=~|!=|!~|=)\s*\"([^\"]*)\"", inside)
    bare = re.sub(r"\{[^}]*\}|\"[^\"]*\"|\b(?:by|ignoring) \([^)]*\)", "", query)
    for name in re.findall(r"\b[a-z]\w+\b", re.sub(r"\[[^\]]*\]", "", bare)):
        if name not in WORDS:
            yield name, []


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_every_name_and_label_of_a_query_exists(told, title, query):
    names = [name for name, _ in selectors(query) if name != "up"]
    assert names and query.count("(") == query.count(")") and query.count("{") == query.count("}")
    for name, matchers in selectors(query):
        assert name == "up" or name in told, f"{title}: no metric is called {name}"
        for label, operator, value in matchers:
            if label not in SCRAPED:
                values = told[name][label]
                assert operator not in ("=", "!=") or value in values, f"{title}: {label} is one of {values}"
                assert operator != "=~" or set(value.split("|")) <= values
    for grouped in re.findall(r"\b(?:by|ignoring) \(([^)]*)\)", query):
        for label in grouped.split(", "):
            assert label in SCRAPED or all(label in told[name] for name in names), f"{title}: nothing has {label}"


def test_the_names_are_found(told):
    """That the test above can see what it should."""
    query = 'sum by (le) (rate(ki_serve_a_bucket{x="1", y=~"b|c"}[5m])) / ki_serve_b'
    assert list(selectors(query)) == [
        ("ki_serve_a_bucket", [("x", "=", "1"), ("y", "=~", "b|c")]),
        ("ki_serve_a_bucket", []),
        ("ki_serve_b", []),
    ]
    with pytest.raises(AssertionError, match="no metric is called"):
        test_every_name_and_label_of_a_query_exists(told, "x", "sum(ki_serve_nothing)")
    with pytest.raises(AssertionError, match="outcome is one of"):
        test_every_name_and_label_of_a_query_exists(told, "x", 'sum(ki_serve_requests_total{outcome="lost"})')


def test_every_metric_of_ours_is_drawn(told):
    """But for those that only say how the monitoring itself fares."""
    drawn = {re.sub(r"_(bucket|sum|count)$", "", name) for _, query in QUERIES for name, _ in selectors(query)}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told if name.startswith("ki_serve_")}
    words = ("bundle_loads_total", "recorded_total", "recorded_episodes_total", "recording", "watching_failures_total")
    assert ours - drawn == {f"ki_serve_{name}" for name in words}


def test_panels_do_not_lie_over_each_other():
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_prometheus_itself_answers_every_query(tmp_path):
    if (program := shutil.which("prometheus")) is None:
        pytest.skip("prometheus is not on PATH (apt install prometheus)")
    monitor = busy()
    with hosted(monitor.pages(lambda: status(ROBOT))) as address:
        config = (FOLDER / "prometheus.yml").read_text().replace("localhost:8000", address.removeprefix("http://"))
        (tmp_path / "prometheus.yml").write_text(config.replace("scrape_interval: 5s", "scrape_interval: 1s"))
        shutil.copy(FOLDER / "alerts.yml", tmp_path)
        port = free_port()
        options = [f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen([program, *options, f"--web.listen-address=127.0.0.1:{port}"], stderr=log) as process,
        ):
            try:
                ask = f"http://127.0.0.1:{port}/api/v1/query?query="
                while not result(ask, "count_over_time(ki_serve_accepting[1m]) > 4"):
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    for number in range(5):
                        monitor.handled(answered(number, reported={"deadline_misses": 1, "guards.velocity": 2}))
                    time.sleep(0.3)
                drawn = draw(f"http://127.0.0.1:{port}", tmp_path / "board.png", "--minutes", "1")
                assert drawn.returncode == 0, drawn.stderr
                for title, query in QUERIES:
                    given = query.replace("$instance", ".*").replace("$__rate_interval", "1m")
                    found = result(ask, given)
                    assert title == "alert" or found, f"{title}: {given} has no data"
            finally:
                process.terminate()


def draw(*words):
    command = [sys.executable, FOLDER / "draw.py", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)


def test_panels_are_drawn_from_what_prometheus_has(tmp_path):
    """Its reply as one recorded from Prometheus 2.42, with the present time in it."""
    asked = []

    def reply(query, headers):
        asked.append(query["query"])
        values = [[time.time() - 20 + at, str(at) if at else "NaN"] for at in range(20)]
        found = [{"metric": {"outcome": "answered", "stage": "model"}, "values": values}]
        told = {"status": "success", "data": {"resultType": "matrix", "result": found}}
        return 200, "application/json", json.dumps(told).encode()

    with hosted({"/api/v1/query_range": reply}) as address:
        done = draw(address, tmp_path / "below" / "board.png", "--minutes", "5", "--instance", "robot7:.*")
    panels = [panel for panel in BOARD["panels"] if panel["type"] == "timeseries"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert done.returncode == 0 and f"{len(panels)} panels, {len(queries)} curves" in done.stdout
    assert len(asked) == len(queries) and all("$" not in query and 'instance=~"robot7:.*"' in query for query in asked)
    assert (tmp_path / "below" / "board.png").read_bytes()[:4] == b"\x89PNG"
    for pages in ({}, {"/api/v1/query_range": lambda query, headers: (200, "text/html", b"<html>")}):
        with hosted(pages) as address:
            done = draw(address, tmp_path / "none.png")
        assert done.returncode == 2 and done.stderr.startswith(f"draw.py: error: {address}: ")
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "none.png").exists()


def result(ask, query):
    try:
        code, _, body = get(ask + quote(query))
    except OSError:  # it starts
        return []
    found = json.loads(body) if body.startswith(b"{") else {}
    assert code != 400, f"{query}: {found.get('error')}"
    return found.get("data", {}).get("result", [])
