"""Import contracts hold, functions are short, and the command line starts quickly."""

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 79  # of a function; the code of a script outside of its functions counts as one


def test_import_contracts_are_kept():
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_logo=True))"
    linter = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert linter.returncode == 0, linter.stdout + linter.stderr


def test_contributing_names_files_that_exist():
    rows = re.findall(r"(?m)^\| .* \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    names = {name for row in rows for name in re.findall(r"`(?:python )?([\w./]+\.\w+|\w+/)`", row)}
    assert len(names) > 20
    places = (ROOT, ROOT / "patchcl_qupath", ROOT / "tests", ROOT / "benchmarks")
    assert [name for name in names if not any((place / name).exists() for place in places)] == []


def test_pinned_versions_are_resolved_for_every_extra():
    # uv refuses an extra that does not exist, and "spatial" is not pinned.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    script = (ROOT / ".ci" / "resolve").read_text(encoding="utf-8")
    named = set(re.findall(r"--extra (\w+)", script))
    assert named == project["optional-dependencies"].keys() - {"spatial"}


def test_help_imports_nothing_heavy():
    code = "import sys; from patchcl_qupath.cli import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "dask", "distributed", "zarr", "scipy", "numpy"} & set(modules)


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function, with its docstring and comments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


GROOVY_TEXT = re.compile(  # comments and strings, in which brackets do not count
    r"//[^\n]*|/\*.*?\*/|'''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"",
    re.DOTALL,
)
GROOVY_CLASS = re.compile(r"[\w@ ]*\b(?:class|interface|enum|trait) \w+")
GROOVY_METHOD = re.compile(
    r"(?!(?:if|for|while|switch|catch|return|throw)\b)[\w.<>?,@\[\] ]+ (\w+) ?\("
)


def groovy_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each method of a Groovy file; last, "script", all other code."""
    text = GROOVY_TEXT.sub(lambda match: "''" + "\n" * match[0].count("\n"), text)
    text = re.sub(r"(?m)^\s*(?:''|import .*|package .*)$", "", text)
    script = 0
    for statement in groovy_statements(text.splitlines()):
        header, brace, _ = " ".join(statement).partition("{")
        if GROOVY_CLASS.match(header):
            first = next(k for k, line in enumerate(statement) if "{" in line)
            for member in groovy_statements(statement[first + 1 : -1]):
                if named := re.search(r"(\w+) ?\(", " ".join(member)):
                    yield named[1], len(member)
        elif brace and (named := GROOVY_METHOD.match(header)):
            yield named[1], len(statement)
        else:
            script += len(statement)
    yield "script", script


def groovy_statements(lines: list[str]) -> Iterator[list[str]]:
    """The lines of each statement or definition, with its annotations, to its last bracket."""
    statement: list[str] = []
    depth = 0
    for line in lines:
        if not statement and not line.strip():
            continue
        statement.append(line)
        depth += sum((c in "([{") - (c in ")]}") for c in line)
        if depth == 0 and not re.fullmatch(r"\s*@\w+(\(.*\))?\s*", line):
            yield statement
            statement = []
    assert not statement, f"brackets do not match from: {statement[0]}"


def test_groovy_functions_are_measured() -> None:
    text = """/**
 * Text (with {brackets.
 */
import a.B

String name = '{'   // {
if (name) {
    log('(')
    return
}
call(name) {
    other()
}

@CompileStatic
static Map<String, Integer> two(String a,
                                String b) {
    return [a: [b]]
}

/** Text. */
class C extends D {

    String name

    C(String name) {
        this.name = name
    }

    @Override
    private void run() {

    }
}

void last() { }
"""
    found = list(groovy_functions(text))
    assert found == [("two", 5), ("C", 3), ("run", 4), ("last", 1), ("script", 8)]


def test_functions_are_short() -> None:
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    too_long, counted = [], {".py": 0, ".groovy": 0}
    for path in (ROOT / name for name in names):
        if path.suffix in counted and path.exists():
            functions = python_functions if path.suffix == ".py" else groovy_functions
            for name, lines in functions(path.read_text("utf-8")):
                counted[path.suffix] += 1
                if lines > MAX_LINES:
                    too_long.append(f"{path.relative_to(ROOT)}: {name} has {lines} lines")
    assert not too_long
    assert counted[".py"] > 500
    assert counted[".groovy"] > 50


def test_the_story_of_an_image_is_short() -> None:
    """What a reader follows from a project's image to polygons."""
    text = (ROOT / "patchcl_qupath" / "pipeline.py").read_text("utf-8")
    assert dict(python_functions(text))["image"] < 25


def test_functions_that_scripts_have_in_common_are_alike() -> None:
    """Each script is one file, which people copy: what several need stands in each.

    None reads the property by itself, of which QuPath's Undo leaves the last import.
    """
    texts = {path: path.read_text("utf-8") for path in sorted((ROOT / "groovy").glob("*.groovy"))}
    in_common = {
        r"List<String> marksOfImports\(": 5,
        r"boolean isUnread\(": 4,
        r"boolean isWhole\(Path": 4,
        r"void moveOver\(Path": 5,
        r"Class<\?> dialogs\(": 2,
    }
    for name, count in in_common.items():
        function = rf"(?ms)^( *)static {name}.*?^\1}}$"
        copies = [
            textwrap.dedent(found[0])
            for text in texts.values()
            for found in re.finditer(function, text)
        ]
        assert (len(copies), len(set(copies))) == (count, 1), name
    marks = r"(?ms)^( *)static List<String> marksOfImports\(.*?^\1}$"
    for path, text in texts.items():
        assert "getProperty('patchcl.imported')" not in re.sub(marks, "", text), path.name
