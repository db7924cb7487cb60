"""What the kernel tells, and what others read of it."""

import pytest

from ki_edge import proc

MEMINFO = "MemTotal: 9 kB\nMemAvailable:   5 kB\nHugePages_Total: 3\nSwapTotal: 8 kB\nSwapFree: 3 kB\n"


def test_free_swap_counts() -> None:
    found = proc.parse_sizes(MEMINFO)
    assert found == {"MemTotal": 9216, "MemAvailable": 5120, "SwapTotal": 8192, "SwapFree": 3072}
    assert proc.with_swap(found) == 8 * 1024
    assert proc.with_swap({"MemAvailable": 5}) == 5 and proc.with_swap({}) is None


def test_memory_is_the_systems() -> None:
    psutil = pytest.importorskip("psutil")
    virtual, swap, own = psutil.virtual_memory(), psutil.swap_memory(), psutil.Process().memory_info()
    assert proc.available_memory() == pytest.approx(virtual.available, rel=0.2)
    assert proc.with_swap(proc.sizes(proc.MEMINFO)) == pytest.approx(virtual.available + swap.free, rel=0.2)
    peak = proc.peak_memory()
    assert peak is not None and peak >= 0.9 * own.rss


def test_where_the_system_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMINFO", "STATUS", "CPUINFO"):
        monkeypatch.setattr(proc, name, "/nowhere")
    assert proc.available_memory() is None and proc.peak_memory() is None and proc.cpu_info("model name") == ""
