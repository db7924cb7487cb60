"""The page in a real browser: what it shows, that nothing from outside becomes markup, narrow and dark screens."""

import io

import numpy as np
import pytest
from PIL import Image

from ki_runtime.monitoring.monitor import Monitor

from .browser import chromium, opened
from .monitored import CONTRACT, POLICY, ROBOT, answered, hosted, level, refused, status

pytest.importorskip("prometheus_client", reason="pip install 'ki-edge[serve]'")
pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium or Chrome on PATH")
KEY = "correct horse battery"
EVIL = "<img src=x onerror=\"document.title='owned'\">:1"


def told(**options):
    monitor = Monitor(**options)
    monitor._recent._clock = lambda: 1000.0  # however long a browser takes to start, this was just now
    monitor.loaded(CONTRACT, POLICY)
    for number in range(4):
        monitor.handled(answered(number))
        monitor.handled(answered(number, EVIL, reported={"guards.velocity": 1.0}))
    monitor.handled(refused(error=f"state: {EVIL} <script>document.title='owned'</script>"))
    return monitor


def text(tab, place):
    return tab.value(f"document.querySelector('{place}').innerText")


def brightness(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("L")).mean()


def test_the_page(tmp_path):
    monitor, robots = told(), [ROBOT, EVIL]
    with (
        hosted(monitor.pages(lambda: status(*robots, policy={**POLICY, "name": f"fetch {EVIL}"}))) as address,
        opened(address, tmp_path) as tab,
    ):
        tab.wait("document.querySelectorAll('#clients tbody tr').length === 2")
        assert text(tab, "#health") == "serving for 5 min" and text(tab, "#p50") == "44 ms"
        assert text(tab, "#queue") == "3, 2" and text(tab, "#batch") == "2.0" and text(tab, "#connected") == "2"
        assert f"state: {EVIL} <script>" in text(tab, "#error") and f"fetch {EVIL}" in text(tab, "#policy")
        assert EVIL in text(tab, "#clients") and tab.value("document.title") == "ki-serve"
        assert tab.value("document.querySelectorAll('img, main script').length") == 0

        tab.value("document.querySelector('#clients button').click()")
        tab.wait(
            "[...document.querySelectorAll('#pictures img')].filter(i => i.complete && i.naturalWidth).length === 2"
        )
        assert f"front of {ROBOT}" in text(tab, "#pictures")
        drawn = tab.value(
            "(() => { const c = document.createElement('canvas').getContext('2d');"
            "c.drawImage(document.querySelector('#pictures img'), 0, 0); return c.getImageData(9, 9, 1, 1).data[0] })()"
        )
        assert abs(drawn - level(3)) < 3
        robots.remove(ROBOT)  # the page follows
        tab.wait("document.querySelectorAll('#clients tbody tr').length === 1")
        tab.wait("document.querySelector('#pictures').childElementCount === 0")
        assert not tab.errors, tab.errors


def test_pages_of_any_width_in_light_and_dark(tmp_path):
    with hosted(told().pages(lambda: status(ROBOT, EVIL))) as address, opened(address, tmp_path) as tab:
        tab.wait("document.querySelectorAll('#clients tbody tr').length === 2")
        shown = {}
        for width, scheme in ((1000, "light"), (1000, "dark"), (360, "light")):
            tab.look(width=width, scheme=scheme)
            assert tab.wait("document.documentElement.scrollWidth") <= width
            shown[width, scheme] = brightness(tab.picture())
        assert shown[1000, "light"] > 220 and shown[1000, "dark"] < 60
        assert not tab.errors, tab.errors


def test_clients_are_shown_with_the_key(tmp_path):
    with hosted(told(key=KEY).pages(lambda: status(ROBOT))) as address, opened(address, tmp_path) as tab:
        tab.wait("!document.querySelector('#login').hidden")
        assert ROBOT not in text(tab, "body") and text(tab, "#connected") == "1" and text(tab, "#p50") == "44 ms"
        enter = "document.querySelector('#key').value = {!r}; document.querySelector('#login button').click()"
        tab.value(enter.format("wrong key"))
        tab.value("new Promise(done => setTimeout(done, 1500))")
        assert ROBOT not in text(tab, "body")
        tab.value(enter.format(KEY))
        tab.wait(f"document.querySelector('#clients').innerText.includes({ROBOT!r})")
        tab.value("document.querySelector('#clients button').click()")
        tab.wait("[...document.querySelectorAll('#pictures img')].filter(i => i.naturalWidth).length === 2")
        assert KEY not in tab.value("location.href + JSON.stringify(localStorage) + JSON.stringify(sessionStorage)")
        assert not tab.errors, tab.errors


def test_a_server_that_is_gone_is_said_to_be(tmp_path):
    with hosted(told().pages(lambda: status(ROBOT, accepting=False))) as address:
        browser = opened(address, tmp_path)
        tab = browser.__enter__()
        tab.wait("document.querySelector('#health').innerText === 'takes no requests'")
    try:
        tab.wait("document.querySelector('#health').innerText === 'does not answer'")
    finally:
        browser.__exit__(None, None, None)
