"""A real QuPath for tests: found as paquo finds it, run without a window, in its own process."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# No JVM starts here: paquo starts one only when paquo.java is imported.
_FIND = """
from paquo._config import settings, to_kwargs
from paquo.jpype_backend import find_qupath
print(find_qupath(**to_kwargs(settings)).app_dir)
"""


@functools.cache
def launcher() -> Path:
    """QuPath's command; skips the test where there is none."""
    found = subprocess.run([sys.executable, "-c", _FIND], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"no QuPath: {found.stderr.strip().splitlines()[-1]}")
    home = Path(found.stdout.strip()).parents[1]  # Linux: HOME/lib/app
    commands = [path for path in home.glob("bin/QuPath*") if "-" not in path.suffix]
    if not commands:
        pytest.skip(f"no QuPath: {home} has no bin/QuPath")
    return sorted(commands)[0]


def run_script(project: Path, script: Path, *options: str) -> str:
    """QuPath's log of a script, run on each image of a .qpproj.

    QuPath's exit status is 0 even where the script threw: read the log, or what the script left.
    """
    command = [launcher(), "script", *options, "-p", project, script]
    quick = {
        "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    }  # starts in half the time
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=120, env=os.environ | quick
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_project(folder: Path, slide: Path, images: list[str]) -> Path:
    """A .qpproj as QuPath 0.5 writes it: the same slide under several names, ids from 1."""
    folder.mkdir(parents=True)
    uri = re.sub("^file://", "file:", slide.resolve().as_uri())
    builder = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"
    entries = [
        {
            "serverBuilder": {
                "builderType": "uri",
                "providerClassName": builder,
                "uri": uri,
                "args": [],
            },
            "entryID": number,
            "randomizedName": f"{number}",
            "imageName": name,
            "metadata": {},
        }
        for number, name in enumerate(images, start=1)
    ]
    project = folder / "project.qpproj"
    content = {
        "version": "0.5.1",
        "createTimestamp": 1735689600000,
        "modifyTimestamp": 1735689600000,
        "uri": project.as_uri(),
        "lastID": len(entries),
        "images": entries,
    }
    project.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return project
