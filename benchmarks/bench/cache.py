"""What the benchmark has computed already, by a digest of all that it depends on.

Settings count by their values, code as ``bench.code`` finds it: a change of a comment costs
nothing, one of post-processing costs no training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.code import code_digest, script_digest
from patchcl_qupath.config import Config
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import device
from patchcl_qupath.storage.files import digest, read_json, write_json


def default_folder() -> Path:
    """The cache of this user."""
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return caches / "patchcl-qupath" / "quality"


class Cache:
    """A folder of values and models, each in a file named by the digest of its key.

    Without a folder nothing is kept. A key is a JSON-like value.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def value(self, key: Any, make: Callable[[], Any]) -> Any:
        """The JSON-like value of a key; made if it is not there."""
        if self._folder is None:
            return make()
        path = self._folder / "values" / f"{digest(key)}.json"
        stored = read_json(path)
        if stored is None:
            stored = {"key": key, "value": make()}
            write_json(path, stored)
        return stored["value"]

    def model(self, key: Any, config: Config, make: Callable[[], Model]) -> Model:
        """The model of a key, with the settings ``config``; made if it is not there."""
        if self._folder is None:
            return make()
        name = digest(key)
        path = self._folder / "models" / f"{name}.pt"
        if path.exists():
            return replace(Model.load(path), config=config)
        model = make()
        model.save(path.parent, name)
        return model


def _version(package: str) -> str:
    """The version of a package; "" without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def code(*roots: str, script: Path | None = None) -> dict[str, str]:
    """What the results of functions depend on, beside their arguments, for a key.

    ``roots`` are functions and classes of the package, such as ``pipeline.train``; ``script`` is a
    file of the benchmark with functions that are used, too.
    """
    own = {} if script is None else {"script": script_digest(script)}
    return {
        **own,
        "code": code_digest(*roots),
        "torch": torch.__version__,
        "openvino": _version("openvino"),
        "device": device().type,
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }
