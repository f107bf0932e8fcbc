"""The Groovy scripts, and copies of them in a project, where QuPath's menu lists them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from patchcl_qupath.storage.files import atomic_write

_PACKAGE = Path(__file__).resolve().parents[1]
# Installed, they are in the package (see pyproject.toml); in a checkout, beside it.
FOLDER = next(f for f in (_PACKAGE / "groovy", _PACKAGE.parent / "groovy") if f.is_dir())
NAMES = (
    "run_patchcl.groovy",
    "import_nuclei.groovy",
    "export_regions.groovy",
    "export_labels.groovy",
)
_COMMAND = "String command = ''"  # in the settings of run_patchcl.groovy


def copy_scripts(project: Path) -> list[str]:
    """Copy the scripts to the ``scripts`` folder beside a .qpproj; -> what was done, line by line.

    ``run_patchcl.groovy`` learns where this very patchcl-qp is. A script there that differs is
    kept beside the new one as ``NAME.groovy.bak``: a person may have changed it.
    """
    done = []
    for name in NAMES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        text = text.replace(_COMMAND, _COMMAND[:-1] + _escaped(_this_command()) + "'")
        path = project.parent / "scripts" / name
        if path.exists():
            if path.read_text(encoding="utf-8", errors="replace") == text:
                done.append(f"{path} is up to date")
                continue
            done.append(f"{path} was another version, now {_keep(path).name}")
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
        done.append(f"{path} written")
    return done


def _keep(path: Path) -> Path:
    """Rename a script, never over an older one that was kept."""
    number = 0
    while (kept := path.with_name(f"{path.name}.bak{number or ''}")).exists():
        number += 1
    return path.rename(kept)


def _this_command() -> str:
    """The patchcl-qp of this environment, '' if it was not installed as a command."""
    name = "patchcl-qp.exe" if os.name == "nt" else "patchcl-qp"
    command = Path(sys.executable).parent / name
    return str(command) if command.is_file() else ""


def _escaped(text: str) -> str:
    """Text for between single quotes in Groovy."""
    return text.replace("\\", "\\\\").replace("'", "\\'")
