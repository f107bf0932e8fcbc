"""Imports point one way: cli -> pipeline -> stages -> nouns."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "patchcl_qupath"
FLOORS = [  # a module imports from the floors below its own only
    {"cli"},
    {"console"},
    {"pipeline", "score", "doctor", "page", "suggest", "state"},
    {"fields", "tilework", "outcome", "gallery"},
    {"prepare", "truth"},
    {"project", "slide", "tiles", "segment", "runs", "evaluate", "report", "survey"}
    | {"patchcl", "selftrain", "cdcl"},
    {"model", "contrast", "pseudo", "teaching", "jobs"},
    {"engines"},
    {"network", "resample", "pyramid", "crops", "nuclei"},
    {"datatypes", "config", "stains", "storage", "geojson"},
    {"errors", "compiled"},
]
NOUNS = {(module, "datatypes") for module in ("storage", "geojson", "stains")}  # within a floor


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".") for name in names)


def test_imports_point_one_way():
    floor_of = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
    for path in PACKAGE.rglob("*.py"):
        importer = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if importer == "__init__":
            continue
        for name in imports(path):
            if name[0] != "patchcl_qupath" or name[1] in ("__version__", importer):
                continue
            below = floor_of[importer] < floor_of[name[1]]
            assert below or (importer, name[1]) in NOUNS, f"{importer} imports {name[1]}"


def test_only_runs_imports_distributed():
    importers = {
        path.name for path in PACKAGE.rglob("*.py") for n in imports(path) if n[0] == "distributed"
    }
    assert importers == {"runs.py"}


def test_help_imports_nothing_heavy():
    code = "import sys; from patchcl_qupath.cli import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "dask", "distributed", "zarr", "scipy", "numpy"} & set(modules)
