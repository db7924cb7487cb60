"""A real Chromium without a window, over its own debugging protocol: no package beside websockets."""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from urllib.request import Request, urlopen

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60  # seconds for what a page is to show


def chromium():
    """The program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """A page. `errors`: what its console said: exceptions, violations of its policy, failed requests."""

    def __init__(self, socket):
        self._socket, self._number = socket, 0
        self.errors = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            found = json.loads(self._socket.recv(timeout=PATIENCE))
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            if found.get("method") == "Runtime.exceptionThrown":
                self.errors.append(found["params"]["exceptionDetails"])
            if found.get("method") == "Log.entryAdded" and found["params"]["entry"]["level"] == "error":
                self.errors.append(found["params"]["entry"]["text"])

    def look(self, *, width=1000, height=900, scheme="light"):
        """As a screen of this width, in pixels, and of this scheme of colours."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=media)

    def value(self, expression):
        """Of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression):
        """Until it is true, or not empty: its value."""
        until = time.monotonic() + PATIENCE
        while not (found := self.value(expression)):
            assert time.monotonic() < until, (
                f"not in {PATIENCE} s: {expression}\n{self.value('document.body.innerText')}"
            )
            time.sleep(0.05)
        return found

    def picture(self):
        """A PNG of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@contextmanager
def opened(address, folder):
    """A tab that shows an address. `folder`: for the browser's profile, an empty one."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    with subprocess.Popen(
        [chromium(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as browser:
        try:
            port = folder / "DevToolsActivePort"
            until = time.monotonic() + PATIENCE
            while not port.is_file() or not port.read_text().strip():
                assert browser.poll() is None and time.monotonic() < until, "the browser does not start"
                time.sleep(0.05)
            asked = Request(f"http://127.0.0.1:{port.read_text().split()[0]}/json/new?about:blank", method="PUT")
            with urlopen(asked, timeout=PATIENCE) as reply:
                target = json.loads(reply.read())["webSocketDebuggerUrl"]
            with connect(target, max_size=1 << 26, compression=None) as socket:
                tab = Tab(socket)
                tab.call("Page.navigate", url=address)
                tab.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(address)})")
                yield tab
        finally:
            browser.terminate()
