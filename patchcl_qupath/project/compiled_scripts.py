"""Groovy scripts as classes of a running JVM: compiled once, and kept in the user's cache.

Compiling takes seconds of each run; loading what was compiled, a tenth of one.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from patchcl_qupath.project.scripts import read_script
from patchcl_qupath.storage.files import digest

logger = logging.getLogger(__name__)

_NAME = "class.txt"  # the name of the script's class, which lies beside it


def compiled_script(name: str, java_class: Any) -> Any:
    """The class of a Groovy script, such as ``import_nuclei.groovy``.

    ``java_class`` is JPype's ``JClass``. A cache that is damaged, or cannot be written to, costs
    time and nothing else.
    """
    text = read_script(name)
    try:
        return _kept_script(cache_folder(), name, text, java_class)
    except (OSError, RuntimeError) as error:  # it cannot be written to, or the user has no home
        logger.debug("no classes are kept: %r", error)
    loader = java_class("groovy.lang.GroovyClassLoader")()
    return java_class(loader.parseClass(text, name))


def cache_folder() -> Path:
    """The folder of compiled scripts, of this user. Raises RuntimeError for one without a home."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "patchcl-qupath" / "groovy"


def _kept_script(cache: Path, name: str, text: str, java_class: Any) -> Any:
    """The class that is kept in the cache, or is from now on. Raises OSError."""
    folder = cache / digest([text, *_versions(java_class)])
    try:
        if folder.is_dir():
            return _load(folder, java_class)
    except Exception as error:  # Java's: a class file that is damaged
        logger.debug("damaged classes in %s: %r", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
    return _compile_into(folder, name, text, java_class)


def _versions(java_class: Any) -> list[str]:
    """The versions that classes are compiled for."""
    groovy = java_class("groovy.lang.GroovySystem").getVersion()
    java = java_class("java.lang.System").getProperty("java.version")
    qupath = java_class("qupath.lib.common.GeneralTools").getVersion()
    return [str(version) for version in (groovy, java, qupath)]


def _load(folder: Path, java_class: Any) -> Any:
    """The class that was compiled into a folder."""
    name = (folder / _NAME).read_text(encoding="utf-8")
    file = java_class("java.io.File")(str(folder))
    urls = java_class("java.net.URL")[:]([file.toURI().toURL()])
    parent = java_class("groovy.lang.GroovyClassLoader")()
    loader = java_class("java.net.URLClassLoader")(urls, parent)
    return java_class(loader.loadClass(name))


def _compile_into(folder: Path, name: str, text: str, java_class: Any) -> Any:
    """Compile a script into a folder that appears once it is complete. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        config = java_class("org.codehaus.groovy.control.CompilerConfiguration")()
        config.setTargetDirectory(java_class("java.io.File")(str(new)))
        parent = java_class("groovy.lang.GroovyClassLoader")()
        loader = java_class("groovy.lang.GroovyClassLoader")(parent, config)
        script = loader.parseClass(text, name)
        (new / _NAME).write_text(str(script.getName()), encoding="utf-8")
        with suppress(OSError):  # another process was faster
            new.rename(folder)
        return java_class(script)
    finally:
        shutil.rmtree(new, ignore_errors=True)
