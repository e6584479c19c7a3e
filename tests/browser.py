"""A real browser without a screen, over its DevTools protocol on a pair of pipes: Debian's package `chromium`."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["MISSING", "Browser", "Page", "chromium"]

MISSING = "browser tests are skipped: there is no chromium; Debian's package `chromium` has it"
_SECONDS = 60


def chromium() -> str | None:
    """The path of the browser."""
    return shutil.which("chromium")


class Browser:
    """A chromium of its own, with an empty profile. Close it.

    Raises:
        RuntimeError: if it does not start, or does not answer for a minute.
    """

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="crossdock-browser-", ignore_cleanup_errors=True)
        to_browser, self._commands = os.pipe()
        self._answers, from_browser = os.pipe()
        options = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe "
            f"--disable-background-networking --hide-scrollbars --user-data-dir={self._profile.name}"
        )
        # The protocol's file descriptors are 3 and 4.
        script = f'exec "$0" {options} about:blank 3<&{to_browser} 4>&{from_browser}'
        self._log = open(Path(self._profile.name, "log"), "w+")  # noqa: SIM115 (open as long as the browser)
        self._process = subprocess.Popen(
            ["bash", "-c", script, executable],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def open(self, place: Path | str, width: int = 1400, height: int = 1000, *, dark: bool = False) -> Page:
        """A file or an address in a new tab, loaded, with everything recorded that it says and asks for."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.resize(width, height)
        page.call("Page.navigate", url=place if isinstance(place, str) else place.absolute().as_uri())
        while not page.loaded():
            self._receive(None)
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        answer = self._receive(self._last_id)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for descriptor in (self._commands, self._answers):
            os.close(descriptor)
        self._log.close()
        self._profile.cleanup()

    def _receive(self, answer_to: int | None) -> dict[str, Any]:
        """The answer to a command, or the next event; events that come before are kept."""
        deadline = time.monotonic() + _SECONDS
        while True:
            while b"\0" in self._buffer:
                text, _, self._buffer = self._buffer.partition(b"\0")
                message = json.loads(text)
                if "id" not in message:
                    self.events.append(message)
                    if answer_to is None:
                        return message
                elif message["id"] == answer_to:
                    return message
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._answers, 1 << 20) if ready else b""
            if not chunk:
                self._log.seek(0)
                raise RuntimeError(f"chromium {'has ended' if ready else 'does not answer'}: {self._log.read()}")
            self._buffer += chunk


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def resize(self, width: int, height: int = 1000) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def loaded(self) -> bool:
        """Whether everything that the page names is there."""
        loads = [event for event in self._browser.events if event["method"] == "Page.loadEventFired"]
        return any(event.get("sessionId") == self._session for event in loads)

    def complaints(self) -> list[str]:
        """What is in the console: errors, warnings, uncaught exceptions, and what the browser itself logs."""
        found = []
        for event in self._events():
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled":
                found.append(f"console.{params['type']}: {params['args']}")
            elif method == "Log.entryAdded":
                found.append(f"{params['entry']['level']}: {params['entry']['text']}")
        return found

    def requests(self) -> list[str]:
        """Addresses that the page has asked for, its own the first."""
        events = (event for event in self._events() if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in events]

    def screenshot(self, path: Path) -> None:
        """A PNG of the whole page."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def _events(self) -> list[dict[str, Any]]:
        self.evaluate("0")  # Whatever came before this answer has been received.
        return [event for event in self._browser.events if event.get("sessionId") == self._session]
