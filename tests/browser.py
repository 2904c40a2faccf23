"""Chromium without a window, told what to do through its DevTools protocol, over a pipe."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Iterator, Optional

NAMES = (  # the first starts in a fraction of the others' time
    *("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser"),
    *("google-chrome", "google-chrome-stable", "chrome"),
)
_FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars
    --no-first-run --disable-background-networking --disable-component-update --disable-sync
    --disable-extensions --disable-quic --remote-debugging-pipe"""


def found() -> Optional[str]:
    """The program, where there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page in a browser."""

    def __init__(self, to: Any, back: Any) -> None:
        self._to, self._back, self._number, self._session = to, back, 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> Any:
        read = b""
        while not read.endswith(b"\0"):
            one = self._back.read(1)
            assert one, "the browser is gone"
            read += one
        return json.loads(read[:-1])

    def open(self, file: Path, width: int, *, scripts: bool = True) -> None:
        """A file, as wide as a window or, below 600 pixels, on a phone."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.go(file.resolve().as_uri())

    def go(self, url: str) -> None:
        """To an address, until it is loaded."""
        self.call("Page.navigate", url=url)
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """Of JavaScript, which runs even where the page's own scripts do not."""
        how = {"returnByValue": True, "awaitPromise": True}
        given = self.call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in given, given["exceptionDetails"]
        return given["result"].get("value")

    def picture(self, top: int, height: int) -> bytes:
        """A part of the page as a PNG file, to be looked at."""
        width = self.value("innerWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser of its own, with a folder for what it keeps."""
    program = found()
    assert program
    (read, to), (back, write) = os.pipe(), os.pipe()

    def join() -> None:  # the browser reads from 3 and writes to 4
        os.dup2(read, 1003)
        os.dup2(write, 1004)
        os.dup2(1003, 3)
        os.dup2(1004, 4)

    process = subprocess.Popen(
        [program, *_FLAGS.split(), f"--user-data-dir={profile}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=join,
        start_new_session=True,
    )
    os.close(read)
    os.close(write)
    try:
        with open(to, "wb") as writing, open(back, "rb") as reading:
            yield Page(writing, reading)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        process.wait()
