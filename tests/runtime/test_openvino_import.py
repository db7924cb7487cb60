"""OpenVINO is imported without the package through which its import reports, whatever else happens meanwhile."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from ki_runtime.openvino import devices

ENGINE = """
try:
    import openvino_telemetry
    reports = True
except ImportError:
    reports = False
"""


NAMES = ("openvino", "openvino_telemetry")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """packages(engine): those two packages, of which the one tells whether it could import the other."""

    def make(engine=ENGINE):
        (tmp_path / "openvino.py").write_text(engine)
        (tmp_path / "openvino_telemetry.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()

    devices.openvino.cache_clear()
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield make
    devices.openvino.cache_clear()
    for name in NAMES:
        sys.modules.pop(name, None)  # those of this test
    sys.modules.update(before)


def test_it_cannot_import_what_reports(packages):
    packages()
    assert devices.openvino().reports is False
    assert "openvino_telemetry" not in sys.modules
    assert importlib.import_module("openvino_telemetry") is sys.modules["openvino_telemetry"]  # others may, afterwards
    assert devices.openvino() is sys.modules["openvino"]


def test_also_where_somebody_else_has_imported_it(packages):
    packages()
    theirs = importlib.import_module("openvino_telemetry")
    assert devices.openvino().reports is False
    assert sys.modules["openvino_telemetry"] is theirs


def test_a_second_thread_gets_the_whole_engine(packages):
    packages("import time\ntime.sleep(0.2)\n" + ENGINE)
    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(devices.openvino) for _ in range(4)]]
    assert [engine.reports for engine in found] == [False] * 4
    assert "openvino_telemetry" not in sys.modules


def test_an_import_that_fails_leaves_nothing(packages):
    packages("raise ImportError('libopenvino.so: no such file')")
    with pytest.raises(ImportError, match="no such file"):
        devices.openvino()
    assert "openvino_telemetry" not in sys.modules


def test_one_block_within_another(packages):
    packages()
    with devices.unreported():
        with devices.unreported():
            pass
        with pytest.raises(ImportError):
            importlib.import_module("openvino_telemetry")
    assert "openvino_telemetry" not in sys.modules
