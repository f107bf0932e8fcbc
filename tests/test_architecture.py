"""The import contracts in pyproject.toml hold, and the command line starts quickly."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_import_contracts_are_kept():
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_logo=True))"
    linter = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert linter.returncode == 0, linter.stdout + linter.stderr


def test_contributing_names_files_that_exist():
    rows = re.findall(r"(?m)^\| .* \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    names = {name for row in rows for name in re.findall(r"`(?:python )?([\w./]+\.\w+|\w+/)`", row)}
    assert len(names) > 20
    places = (ROOT, ROOT / "patchcl_qupath", ROOT / "tests")
    assert [name for name in names if not any((place / name).exists() for place in places)] == []


def test_help_imports_nothing_heavy():
    code = "import sys; from patchcl_qupath.cli import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "dask", "distributed", "zarr", "scipy", "numpy"} & set(modules)
