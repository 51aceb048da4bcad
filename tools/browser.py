"""Headless Chromium, driven through its DevTools protocol over a pipe: for tests and screenshots. Needs no package.

Chromium reads commands from file descriptor 3 and writes answers to 4, as JSON that ends with a zero
byte (``--remote-debugging-pipe``).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
APT_LINE = "sudo apt-get install -y --no-install-recommends chromium"


def find_chromium() -> str | None:
    """Return the program of an installed Chromium; None if there is none."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Page:
    """One page of a running Chromium."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._buffer = b""
        self._num_sent = 0
        self._session = ""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self._call("Page.enable")

    def open(self, address: str) -> None:
        """Navigate to an address; the page may still be loading afterwards."""
        # first away: an address that differs after the # alone would not load anew
        self._call("Page.navigate", {"url": "about:blank"})
        self._call("Page.navigate", {"url": address})

    def text(self) -> str:
        """Return the visible text of the page."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, *texts: str, seconds: float = 60) -> str:
        """Wait until the page shows all ``texts``; return its text."""
        deadline = time.monotonic() + seconds
        while True:
            shown = self.text()
            missing = [each for each in texts if each not in shown]
            if not missing:
                return shown
            if time.monotonic() > deadline:
                raise TimeoutError(f"the page does not show {missing} after {seconds:g} s, but: {shown[:3000]}")
            time.sleep(0.2)

    def click(self, selector: str, *, seconds: float = 0) -> bool:
        """Click the first element that a CSS selector finds within so many seconds; return whether there is one."""
        script = f"(e => e ? (e.click(), true) : false)(document.querySelector({json.dumps(selector)}))"
        deadline = time.monotonic() + seconds
        while not (is_clicked := bool(self.evaluate(script))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return is_clicked

    def type(self, selector: str, text: str) -> None:
        """Put text into the first input that a CSS selector finds, as if it were typed."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self._call("Input.insertText", {"text": text})

    def resize(self, width: int, height: int) -> None:
        """Give the visible part of the page a size in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", size)

    def screenshot(self, path: Path) -> None:
        """Write the visible part of the page as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", {"format": "png"})["data"]))

    def _call(self, method: str, parameters: Mapping[str, Any] | None = None, *, seconds: float = 60) -> dict[str, Any]:
        self._num_sent += 1
        message = {"id": self._num_sent, "method": method, "params": dict(parameters or {})}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            answer = self._next_message(deadline, method)
            if answer.get("id") == self._num_sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _next_message(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._read, 1 << 20) if ready else b""
            if not piece:
                raise TimeoutError(f"Chromium did not answer {method}")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def headless_page(program: str, *, width: int = 1400, height: int = 900) -> Iterator[Page]:
    """Start Chromium without a window and with an empty profile, and yield a page; end it afterwards."""
    commands, answers = os.pipe(), os.pipe()  # (read end, write end)

    def use_3_and_4() -> None:
        # through numbers above 4, since a pipe may already be 3 or 4
        for source, target in ((os.dup2(commands[0], 103), 3), (os.dup2(answers[1], 104), 4)):
            os.dup2(source, target)
            os.close(source)

    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        options += ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},{height}"]
        options += ["--no-proxy-server", "--disable-background-networking"]
        browser = subprocess.Popen(
            [program, *options, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=use_3_and_4,
            close_fds=False,
            start_new_session=True,
        )
        os.close(commands[0])
        os.close(answers[1])
        try:
            yield Page(answers[0], commands[1])
        finally:
            browser.terminate()
            browser.wait(20)
            os.close(answers[0])
            os.close(commands[1])
