"""The Groovy scripts, and copies of them in a project, where QuPath's menu lists them."""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

from patchcl_qupath.storage.files import atomic_write, writing

# pyproject.toml maps the folder groovy/ to this package, in wheels and in editable installs.
PACKAGE = "patchcl_qupath.groovy"
NAMES = (
    "run_patchcl.groovy",
    "import_nuclei.groovy",
    "export_regions.groovy",
    "export_labels.groovy",
    "summarise.groovy",
    "review.groovy",
)
_COMMAND = "String command = ''"  # in the settings of run_patchcl.groovy


def read_script(name: str) -> str:
    """The text of a Groovy script, such as ``import_nuclei.groovy``."""
    return (files(PACKAGE) / name).read_text(encoding="utf-8")


def copy_scripts(project: Path) -> list[str]:
    """Copy the scripts to the ``scripts`` folder beside a .qpproj; -> what was done, line by line.

    In the copy of ``run_patchcl.groovy``, ``command`` is the path of the running patchcl-qp. A
    script there that differs is kept beside the new one as ``NAME.groovy.bak``: a person may have
    changed it. Raises StorageError.
    """
    done = []
    for name in NAMES:
        text = read_script(name).replace(_COMMAND, _COMMAND[:-1] + _escaped(_this_command()) + "'")
        path = project.parent / "scripts" / name
        with writing(path):
            done += _copy(text, path)
    return done


def _copy(text: str, path: Path) -> list[str]:
    """Write a script; -> what was done. Raises OSError, StorageError."""
    done = []
    if path.exists():
        if path.read_text(encoding="utf-8", errors="replace") == text:
            return [f"{path} is up to date"]
        done.append(f"{path} was another version, now {_keep(path).name}")
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return [*done, f"{path} written"]


def _keep(path: Path) -> Path:
    """Rename a script, never over an older one that was kept."""
    number = 0
    while (kept := path.with_name(f"{path.name}.bak{number or ''}")).exists():
        number += 1
    return path.rename(kept)


def _this_command() -> str:
    """The patchcl-qp of this environment, '' if it was not installed as a command."""
    name = "patchcl-qp.exe" if os.name == "nt" else "patchcl-qp"
    # Outside of a virtual environment, Windows has a folder for commands beside Python's; and pip
    # installs into one of the user where it may not write there.
    of_user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    folders = (str(Path(sys.executable).parent), sysconfig.get_path("scripts"), of_user)
    found = (Path(folder, name) for folder in folders if Path(folder, name).is_file())
    return str(next(found, ""))


def _escaped(text: str) -> str:
    """Text for between single quotes in Groovy."""
    return text.replace("\\", "\\\\").replace("'", "\\'")
