"""A person at QuPath's window: real keys and screenshots in a virtual display.

Needs Xvfb, xdotool, and a QuPath whose window starts; each that is missing skips the test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pytest
import qupath

_SIZE = "1400x900x24"
_AUTOMATE = (441, 36)  # where that menu is on the screen
_STARTED = 180.0  # s until the window of QuPath is there, on a machine that is busy


class Robot:
    """QuPath with an open project, in a display of its own.

    ``keys`` counts the key presses since it was last set to 0. ``pause`` is the time between two
    of them, in s.
    """

    def __init__(self, project: Path, image: str, home: Path, *, pause: float = 0.05) -> None:
        for program in ("Xvfb", "xdotool"):
            if shutil.which(program) is None:
                pytest.skip(f"no {program}: QuPath's window cannot be driven")
        self.project = project
        self.keys = 0
        self.pause = pause
        self.log = home / "window.log"
        command = [str(qupath.launcher()), "-q", "-p", str(project), "-i", image]
        display, self._screen = _virtual_display()
        self._environment = os.environ | {
            "DISPLAY": display,
            "JAVA_TOOL_OPTIONS": " ".join(
                [
                    "-Dprism.order=sw -XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
                    f"-Duser.home={home} -Djava.util.prefs.userRoot={home}",
                ]
            ),
        }
        self._others = [self._screen]
        if shutil.which("openbox"):  # a window manager, as on a desk: windows have borders
            self._others.append(
                subprocess.Popen(
                    ["openbox"],
                    env=self._environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        with self.log.open("wb") as log:
            self._qupath = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, cwd=home
            )

    def __enter__(self) -> Robot:
        title = "QuPath - "
        try:
            self.wait(lambda: self.window(title) or not self._runs(), _STARTED, title)
            if not self._runs():
                pytest.skip("this QuPath has no window that starts")
            time.sleep(1)
            self.accept_image_type()
            self.place(title, 0, 0, 1000, 860)
            self.focus(title)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def press(self, *names: str) -> None:
        """Press keys, as xdotool names them, one after the other."""
        for name in names:
            self._xdotool("key", name)
            self.keys += 1
            time.sleep(self.pause)

    def drag(self, *places: tuple[int, int]) -> None:
        """Drag the mouse from place to place on the screen, with the left button pressed."""
        first, *rest = places
        self._xdotool("mousemove", *map(str, first), "mousedown", "1")
        for place in rest:
            self._xdotool("mousemove", *map(str, place))
            time.sleep(0.1)
        self._xdotool("mouseup", "1")
        time.sleep(0.3)

    def window(self, title: str) -> str:
        """The id of a visible window; empty if there is none."""
        found = self._xdotool("search", "--onlyvisible", "--name", title)
        return found.split("\n")[0]

    def accept_image_type(self) -> None:
        """Answer QuPath's question at the first opening of an image, as it proposes."""
        while self.window("Set image type"):
            self.focus("Set image type")
            self.press("Return")
            time.sleep(1)

    def place(self, title: str, x: int, y: int, width: int, height: int) -> None:
        """Move and resize a window."""
        window = self.window(title)
        self._xdotool("windowmove", window, str(x), str(y))
        self._xdotool("windowsize", window, str(width), str(height))

    def focus(self, title: str) -> None:
        """Give a window the keys, as a click on its border does."""
        window = self.window(title)
        self._xdotool("windowactivate", "--sync", window)  # only with a window manager
        self._xdotool("windowfocus", window)
        time.sleep(0.3)

    def run_script(self, name: str) -> None:
        """Open a script of the project by the menu, and run it: by keys, if they reach the menu."""
        scripts = sorted(path.stem for path in self.project.parent.glob("scripts/*.groovy"))

        def is_loaded() -> bool:
            """Not only that of another script, of which the editor is open."""
            return self.window("Script Editor") and f"{name}.groovy to Script Editor" in self.text()

        for attempt in range(3):  # a window that is not ready loses keys
            self.press("Escape")
            if attempt == 0:
                to_menu = ["F10", *["Right"] * 7, "Down"]
            else:  # in an old JavaFX the tabs beside the image may take the arrows
                self.drag(_AUTOMATE)
                to_menu = []
            for key in (*to_menu, "Up", "Right", *["Down"] * scripts.index(name)):
                self.press(key)
                time.sleep(0.1)
            self.press("Down", "Down", "Return")
            try:
                self.wait(is_loaded, 20, "script editor")
                break
            except AssertionError:
                self.focus("QuPath - ")
        self.focus("Script Editor")
        self.press("ctrl+r")

    def picture(self, path: Path) -> None:
        """Save a screenshot, with ImageMagick."""
        subprocess.run(["import", "-window", "root", str(path)], env=self._environment, check=True)

    def wait(self, done: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until something is done. Fails with the log of QuPath."""
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise AssertionError(f"no {what} in {seconds:.0f} s:\n{self.text()}")
            time.sleep(0.05)

    def text(self) -> str:
        """QuPath's log so far."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return "\n".join(line for line in lines if "[" in line or "at " not in line)

    def _runs(self) -> bool:
        return self._qupath.poll() is None

    def _xdotool(self, *arguments: str) -> str:
        done = subprocess.run(
            ["xdotool", *arguments], env=self._environment, capture_output=True, text=True
        )
        return done.stdout.strip()

    def _end(self) -> None:
        for process in (self._qupath, *reversed(self._others)):
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _virtual_display() -> tuple[str, subprocess.Popen[bytes]]:
    """The name of a new display, and its server: it chooses a free number."""
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", _SIZE, "-nolisten", "tcp"]
    server = subprocess.Popen(
        command, pass_fds=[writing], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return f":{pipe.readline().strip()}", server
