"""Chromium, driven over WebDriver's HTTP interface: what the tests of the page need of it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from live_server import free_port

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRIVER = "chromedriver"

#: The key under which WebDriver names elements.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"

#: Keys that have no character.
ENTER, ESCAPE, UP = "\ue007", "\ue00c", "\ue013"

#: Is held from here on, until all such keys are released.
SHIFT, RELEASED = "\ue008", "\ue000"


def missing() -> str | None:
    """Why there is no browser to test with; None where there is one."""
    if not any(map(shutil.which, BROWSERS)):
        return f"no browser here ({', '.join(BROWSERS)})"
    return None if shutil.which(DRIVER) else f"no {DRIVER} here"


class BrowserError(Exception):
    """What the driver says went wrong."""


class Browser:
    """A window. Selectors are CSS."""

    def __init__(self, url: str, session: str) -> None:
        self._session = f"{url}/session/{session}"

    def open(self, url: str) -> None:
        self.call("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.call("execute/sync", script=script, args=list(arguments))

    def run_async(self, script: str) -> Any:
        """What a script hands to its last argument, a function."""
        return self.call("execute/async", script=script, args=[])

    def find(self, selector: str) -> list[str]:
        """Ids of elements."""
        found = self.call("elements", using="css selector", value=selector)
        return [one[ELEMENT] for one in found]

    def click(self, selector: str) -> None:
        """The last one that fits."""
        self.call(f"element/{self.find(selector)[-1]}/click")

    def type(self, selector: str, text: str) -> None:
        """Into the last one that fits."""
        self.call(f"element/{self.find(selector)[-1]}/value", text=text)

    def text(self, selector: str) -> str:
        """Of the last one that fits, as it is shown or not."""
        script = "return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''"
        return str(self.run(script, selector))

    def wait(self, condition: str, *arguments: Any, seconds: float = 30) -> Any:
        """Until an expression is true; returns its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.run(f"return ({condition})", *arguments)
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"never true: {condition}\n{self.text('main')[:2000]}")

    def new_tab(self) -> str:
        """Opens a tab; returns its handle. `switch` goes there."""
        return str(self.call("window/new", type="tab")["handle"])

    def switch(self, handle: str) -> None:
        self.call("window", handle=handle)

    @property
    def tab(self) -> str:
        return str(_call(f"{self._session}/window"))

    def size(self, width: int, height: int) -> None:
        """Of what the page sees, as on a device with such a screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)

    def dark(self, dark: bool) -> None:
        """What the system prefers."""
        value = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[value])

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the browser's developer tools."""
        return self.call("goog/cdp/execute", cmd=command, params=parameters)

    def accept(self) -> None:
        """Say yes to a question."""
        self.call("alert/accept")

    def screenshot(self) -> bytes:
        """A PNG."""
        return base64.b64decode(_call(f"{self._session}/screenshot"))

    def errors(self) -> list[str]:
        """What the console tells since the last call."""
        entries = self.call("se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def close_tab(self) -> None:
        """`switch` to another one then."""
        _call(f"{self._session}/window", method="DELETE")

    def reload(self) -> None:
        self.call("refresh")

    def call(self, path: str, **body: Any) -> Any:
        """A command."""
        return _call(f"{self._session}/{path}", body)


def _call(url: str, body: Any = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        told = json.load(error)["value"]
        raise BrowserError(f"{told['error']}: {told['message']}") from error


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A headless Chromium with a profile of its own in `folder`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (folder / "driver.log").open("w") as log:
        process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=log, stderr=log)
        try:
            for _ in range(200):
                try:
                    if _call(f"{url}/status")["ready"]:
                        break
                except OSError:
                    time.sleep(0.05)
            found = _call(f"{url}/session", {"capabilities": {"alwaysMatch": _wanted(folder)}})
            session = found["sessionId"]
            try:
                yield Browser(url, session)
            finally:
                _call(f"{url}/session/{session}", method="DELETE")
        finally:
            process.terminate()
            process.wait(20)


def _wanted(folder: Path) -> dict[str, Any]:
    flags = [
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
        *("--no-first-run", "--disable-background-networking", "--hide-scrollbars"),
        f"--user-data-dir={folder / 'profile'}",
    ]
    return {
        "goog:chromeOptions": {"args": flags},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
