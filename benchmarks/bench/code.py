"""The code that a function depends on: its own, and that of all it refers to in the package.

Found by names in the syntax tree, without comments and docstrings. What is reached through the
attributes of an object counts if the object's class is named, as in an annotation.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import patchcl_qupath

_PACKAGE = patchcl_qupath.__name__
_ROOT = Path(patchcl_qupath.__file__).parent
# Settings count by their values; the others change no result.
_WITHOUT_EFFECT = ("config", "errors", "logs", "memory", "progress", "timing")

Reference = tuple[str, str]  # a module of the package, and a name in it


@dataclass(frozen=True)
class _Module:
    """A module's definitions by name; what its imported names refer to; its other statements.

    An imported name refers to a module, and to a name in it, which is empty for a whole module.
    """

    definitions: dict[str, ast.stmt]
    imported: dict[str, Reference]
    others: tuple[ast.stmt, ...]


def code_digest(*roots: str) -> str:
    """Hexadecimal digest of the code that functions and classes, as ``module.name``, depend on."""
    digest = hashlib.sha256()
    for reference, text in sorted(reached(*roots).items()):
        digest.update(repr((reference, text)).encode())
    return digest.hexdigest()


def script_digest(path: Path) -> str:
    """Hexadecimal digest of all code in a file."""
    return hashlib.sha256(ast.dump(_tree(path)).encode()).hexdigest()


@functools.cache
def reached(*roots: str) -> dict[Reference, str]:
    """The code of each definition that the ``roots`` depend on, and of these themselves."""
    found: dict[Reference, str] = {}
    wanted: list[Reference] = []
    for root in roots:
        module, _, name = root.rpartition(".")
        assert name in _parsed(module).definitions, f"there is no {root}"
        wanted.append((module, name))
    while wanted:
        module, name = reference = wanted.pop()
        if reference in found or module in _WITHOUT_EFFECT:
            continue
        parsed = _parsed(module)
        if not name:  # a module that is handed on as a whole
            wanted += [(module, each) for each in parsed.definitions]
        if name in parsed.imported:  # and offered from here
            wanted.append(parsed.imported[name])
        nodes = [*parsed.others, *filter(None, [parsed.definitions.get(name)])]
        found[reference] = " ".join(map(ast.dump, nodes))
        for node in nodes:
            wanted += _referred(node, module, parsed)
    return found


def _referred(node: ast.stmt, module: str, parsed: _Module) -> list[Reference]:
    """What a statement refers to by name, in its module or in imported ones."""
    found: list[Reference] = []
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and each.id in parsed.definitions:
            found.append((module, each.id))
        elif isinstance(each, ast.Name) and each.id in parsed.imported:
            if parsed.imported[each.id][1]:
                found.append(parsed.imported[each.id])
        elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
            whole, name = parsed.imported.get(each.value.id, ("", ""))
            if whole and not name:
                found.append((whole, each.attr))
    return found


@functools.cache
def _parsed(module: str) -> _Module:
    """A module of the package, named from its root, such as ``training.patchcl``."""
    path = _file(module)
    assert path is not None, f"there is no module {module}"
    tree = _tree(path)
    definitions: dict[str, ast.stmt] = {}
    others = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            assigned = node.targets if isinstance(node, ast.Assign) else [node.target]
            for each in (each for one in assigned for each in ast.walk(one)):
                if isinstance(each, ast.Name):
                    definitions[each.id] = node
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            others.append(node)
    return _Module(definitions, _imported(tree), tuple(others))


def _imported(tree: ast.Module) -> dict[str, Reference]:
    """What names that are imported anywhere in a module refer to in the package."""
    found: dict[str, Reference] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(_PACKAGE):
            continue
        source = (node.module or "").removeprefix(_PACKAGE).removeprefix(".")
        for alias in node.names:
            inner = f"{source}.{alias.name}".removeprefix(".")
            name = alias.asname or alias.name
            if _file(inner):
                found[name] = (inner, "")
            elif source:
                found[name] = (source, alias.name)
    return found


def _file(module: str) -> Path | None:
    """The file of a module or folder of the package; None for other names."""
    base = _ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _tree(path: Path) -> ast.Module:
    """The code of a file without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return tree
