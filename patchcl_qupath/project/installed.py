"""The QuPath that is installed here: where it is, by paquo's settings, and of which version."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from patchcl_qupath.errors import ProjectError, one_line

OLDEST = (0, 4)  # the first QuPath whose objects have ids

_FILE = ".paquo.toml"
_LOCAL = "~/AppData/Local"  # of Windows, which may have it elsewhere


def find_qupath(qupath: Path | None = None) -> str:
    """The version and folder of the QuPath in a folder, or of the one in paquo's settings.

    Starts no Java. Raises ProjectError if there is none, or if it is too old or incomplete.
    """
    settings = paquo_settings(qupath)
    from paquo.jpype_backend import find_qupath as find

    try:
        app = find(**settings | {"java_opts": None}).app_dir
        names = [jar.name for jar in app.iterdir()]
    except ValueError as error:
        raise ProjectError(
            "there is no QuPath in the usual places: pass --qupath DIR, or set PAQUO_QUPATH_DIR"
        ) from error
    except OSError as error:
        given = settings["qupath_dir"] or settings["jvm_path_override"]
        if not given:
            raise ProjectError(
                f"the usual places cannot be searched for QuPath ({error}): pass --qupath DIR, or "
                "set PAQUO_QUPATH_DIR"
            ) from error
        raise ProjectError(
            f"{given} holds no complete QuPath with its Java: pass --qupath with the folder where "
            "QuPath is installed, or install it anew"
        ) from error
    versions = (re.match(r"qupath-core-(\d+)\.(\d+)[\w.-]*?\.jar$", name) for name in names)
    found = next((version for version in versions if version), None)
    if found is None:
        raise ProjectError(f"the QuPath in {app} is not complete: install it anew")
    name = found[0].removeprefix("qupath-core-").removesuffix(".jar")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise ProjectError(f"QuPath {name} in {app} is too old: install QuPath 0.4 or later")
    return f"{name} in {app}"


def paquo_settings(qupath: Path | None = None) -> dict[str, Any]:
    """Paquo's settings, as its functions take them, with the folder of QuPath if it is given.

    Folders have the ~ expanded that paquo's own settings begin with, and that it takes for a name.
    Raises ProjectError for settings that cannot be used, and where paquo is not installed.
    """
    try:
        import jpype  # noqa: F401  # paquo needs it, and it may not be loaded either
        from paquo._config import settings, to_kwargs

        found: dict[str, Any] = to_kwargs(settings)
        if qupath is not None:
            found["qupath_dir"] = str(qupath)
        for name in ("qupath_dir", "jvm_path_override"):
            found[name] = found[name] and str(Path(found[name]).expanduser())
        folders = found["qupath_search_dirs"]
        folders = [folders] if isinstance(folders, str) else folders
        found["qupath_search_dirs"] = [*_searchable(folders)]
        re.compile(found["qupath_search_dir_regex"])
    except ImportError as error:
        raise ProjectError(
            "paquo is not installed: pip install 'patchcl-qupath[qupath]'"
        ) from error
    except Exception as error:  # of the reader of TOML, or for a value of any kind
        raise ProjectError(
            f"paquo's settings cannot be used ({one_line(error)}): correct {_places()}"
        ) from error
    return found


def _searchable(folders: list[str]) -> Iterator[str]:
    """The folders that can be listed: paquo's search ends at one that cannot."""
    for folder in folders:
        # QuPath's installer asks Windows for its folder, which it has in this variable.
        local = os.environ.get("LOCALAPPDATA") if folder == _LOCAL else None
        with suppress(OSError, RuntimeError):  # there is none, or no home
            path = local or str(Path(folder).expanduser())
            os.scandir(path).close()
            yield path


def _places() -> str:
    """Where paquo's settings are, as far as there are any."""
    from dynaconf.utils.files import find_file

    file = find_file(_FILE) or _FILE
    variables = sorted(name for name in os.environ if name.startswith("PAQUO_"))
    return " or ".join([file, *variables])
