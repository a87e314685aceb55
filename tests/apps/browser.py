"""Chromium without a window, driven over a pipe by its own protocol: no package is needed."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOUND = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
PATIENCE_S = 60.0
KEYS = {
    "Tab": {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9},
    "Enter": {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
}


class Browser:
    """One tab; `problems` gathers errors of its console, broken policies and opened dialogs."""

    def __init__(self, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += [f"--user-data-dir={profile}", "--window-size=1200,900", "--remote-debugging-pipe"]
        # the protocol's pipes are 3 and 4, by definition
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, str(FOUND), *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        self._rest = b""
        self._number = 0
        self._session = ""
        self.problems: list[str] = []
        self._loaded = False
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        found = self._call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = found["sessionId"]
        for room in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{room}.enable")

    def go(self, address: str) -> None:
        """Open an address, and wait until all of it is there."""
        self._loaded = False
        self._call("Page.navigate", url=address)
        self.wait()

    def wait(self) -> None:
        """Wait for the page that is on its way."""
        end = time.monotonic() + PATIENCE_S
        while not self._loaded and time.monotonic() < end:
            self._read(1.0)
        assert self._loaded, "the page was not loaded"

    def press(self, key: str, *, leaves: bool = False) -> None:
        """A key; `leaves`: it leads to another page, which is waited for."""
        self._loaded = not leaves
        self._call("Input.dispatchKeyEvent", type="keyDown", **KEYS[key])
        self._call("Input.dispatchKeyEvent", type="keyUp", **KEYS[key])
        self.wait()

    def write(self, text: str) -> None:
        """Text where the focus is."""
        self._call("Input.insertText", text=text)

    def ask(self, script: str) -> Any:
        """The value of an expression in the page; of a promise what comes of it."""
        found = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression is true: some things are done with the first frame."""
        end = time.monotonic() + PATIENCE_S
        while not self.ask(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def cookies(self) -> list[dict[str, Any]]:
        """Of the page's address, those too that no script may read."""
        return self._call("Network.getCookies")["cookies"]

    def picture(self, path: Path, width: int, height: int) -> None:
        """A PNG of the page."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        data = self._call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End it, the kind way first."""
        with contextlib.suppress(OSError, AssertionError):
            self._session = ""
            self._call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            for answer in self._read(1.0):
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    return dict(answer["result"])
        raise AssertionError(f"the browser does not answer {method}")

    def _read(self, seconds: float) -> list[dict[str, Any]]:
        if select.select([self._in], [], [], seconds)[0]:
            got = os.read(self._in, 1 << 20)
            assert got, "the browser has ended"
            self._rest += got
        *whole, self._rest = self._rest.split(b"\0")
        messages = [json.loads(text) for text in whole]
        for message in messages:
            self._note(message.get("method", ""), message.get("params", {}))
        return messages

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Runtime.consoleAPICalled":
            self.problems.append(str(told.get("args")))
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(told.get("exceptionDetails")))
        elif event == "Log.entryAdded":
            self.problems.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif event == "Page.javascriptDialogOpening":
            self.problems.append(f"a script has opened a dialog: {told.get('message')}")


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser, ended at the end."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()
