"""README and guide agree with the program: commands run; options, messages and settings exist.

Commands in blocks of ``bash`` run page by page, in order, with a model trained for seconds at a
coarse resolution. What a person does in QuPath between them is replaced by files as QuPath writes
them. A block that cannot be run has a comment above it with the reason; its options must exist.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import pytest
import shapely
from click.testing import CliRunner
from conftest import copy_sample

from patchcl_qupath.cli import main
from patchcl_qupath.config import PatchCLConfig, SelfTrainConfig, load_config
from patchcl_qupath.datatypes import ImageEntry, Polygons
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import ConfidenceNetwork, NucleusNetwork
from patchcl_qupath.project import Project, open_project
from patchcl_qupath.storage.parquet import read_nuclei

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
QUICK = """
[slide]
mpp = 1.0
[patchcl]
max_steps = 60
cooldown_steps = 30
crops = 16
batch = 2
[selftrain]
first_steps = 40
steps = 120
batch = 4
crop_px = 64
cdcl_steps = 10
[cdcl]
steps = 10
crop_px = 64
distillation_steps = 10
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the reason why it is not run, if it is not."""

    page: str
    language: str
    text: str
    not_run: str | None

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command; a backslash at the end of a line continues it."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks(page: str) -> Iterator[Block]:
    pattern = r"(?m)(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$"
    for reason, language, text in re.findall(pattern, TEXTS[page], re.DOTALL | re.MULTILINE):
        yield Block(page, language, text, reason or None)


BLOCKS = [block for page in TEXTS for block in blocks(page)]
RUN = {page: [b for b in blocks(page) if b.language == "bash" and not b.not_run] for page in TEXTS}


@dataclass
class Reader:
    """Runs the commands of a page, in a folder of its own."""

    quick: Path  # settings
    model: Model  # trained with them
    shown: str  # settings that the page shows
    nuclei: dict[str, Polygons] = field(default_factory=dict)  # of each image, by its first run

    def do(self, words: list[str]) -> None:
        """Run one command, in the current folder."""
        if words[0] == "make":
            for recipe in target(words[1]):
                if recipe[0].endswith("/patchcl-qp"):
                    self.do(["patchcl-qp", *recipe[1:]])
        elif words != ["source", ".venv/bin/activate"]:
            assert words[0] == "patchcl-qp", f"{words} is not run by this test"
            self.call(words[1], words[2:])

    def call(self, name: str, words: list[str]) -> None:
        paths = [sorted(map(str, Path().glob(w))) if "*" in w else [w] for w in words]
        arguments = [path for found in paths for path in found]
        given = parsed(name, arguments)
        if "project_path" in given:
            self.before(name, given)
        if "config" in given and not given["config"]:
            arguments += ["--config", str(self.quick)]
        done = CliRunner().invoke(main, [name, *arguments], catch_exceptions=False)
        assert done.exit_code == 0, f"{[name, *arguments]}: {done.output}"
        if name == "run":
            project = open_project(given["project_path"], backend="files")
            for entry in project.images():
                found = read_nuclei(project.layout.results(entry.id) / "nuclei.parquet").polygons
                assert len(found)
                self.nuclei.setdefault(entry.name, found)

    def before(self, name: str, given: dict[str, Any]) -> None:
        """Create what a page presupposes, and what a person does in QuPath."""
        project = open_project(given["project_path"], backend="files")
        models = project.layout.root / "models"
        if name == "run" and not (models / f"{given['name']}.pt").exists():
            self.model.save(models, given["name"])
        if given.get("config"):
            given["config"].write_text(self.shown.replace("[slide]", "[slide]\nmpp = 1.0"))
        square = shapely.box(950, 2050, 1450, 2550)
        if name == "suggest" and any("removed" in result_of(project, e) for e in project.images()):
            self.call("run", [str(given["project_path"])])
        for entry in project.images():
            if name == "run":
                regions = [(square, kind) for kind in given["within"]]
                write_geojson(project.layout.regions(entry.id), regions)
            if name == "refine":
                nuclei = self.nuclei[entry.name]
                inside = [(nucleus, "Nucleus") for nucleus in nuclei if square.intersects(nucleus)]
                drawn = [(square, given["labels_from"]), *inside[1:]]  # the first is deleted
                write_geojson(project.layout.labels(entry.id), drawn)
            if name == "score":
                drawn = [(nucleus, "Nucleus") for nucleus in self.nuclei[entry.name]]
                write_geojson(given["ground_truth"] / f"{Path(entry.name).stem}.geojson", drawn)


def result_of(project: Project, entry: ImageEntry) -> dict[str, Any]:
    """The record of an image's nuclei."""
    return json.loads(
        (project.layout.results(entry.id) / "result.json").read_text(encoding="utf-8")
    )


def write_geojson(path: Path, drawn: list[tuple[shapely.Geometry, str]]) -> None:
    """Write annotations and their classes, as QuPath exports them."""
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(area)),
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for area, name in drawn
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def parsed(name: str, arguments: list[str]) -> dict[str, Any]:
    """The parameters of a command line; raises for wrong usage."""
    top = click.Context(main, **main.context_settings)  # its names of the help option
    return main.commands[name].make_context(name, [*arguments], parent=top).params


@functools.cache
def help_of(script: str) -> str:
    """The --help of a script of the repository."""
    return subprocess.check_output([sys.executable, ROOT / script, "--help"], text=True)


def target(name: str) -> list[list[str]]:
    """Words of each command of a target of the Makefile."""
    found = re.search(rf"(?m)^{name}:.*\n((?:\t.*\n)*)", MAKEFILE)
    assert found, f"no make {name}"
    return [shlex.split(line.replace("$(BIN)", ".venv/bin")) for line in found[1].splitlines()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings for fast training, in a folder with a model trained with them."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "quick.toml").write_text(QUICK)
    sample = copy_sample(folder / "sample_project")
    command = ["train", str(sample), "--config", str(folder / "quick.toml")]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "quick.toml"


@pytest.mark.parametrize("page", [page for page in RUN if RUN[page]])
def test_commands_run(
    page: str, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_sample(tmp_path / "sample_project")
    if page == "README.md":
        copy_sample(tmp_path)
    elif page == "tutorial.md":
        copy_sample(tmp_path / "slides")
    else:
        copy_sample(tmp_path / "my_project")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # --device sets it
    model = Model.load(quick.parent / "sample_project" / "patchcl" / "models" / "patchcl.pt")
    model = replace(model, calibration=None)  # after so few steps few nuclei are probable
    shown = "".join(block.text for block in blocks(page) if block.language == "toml")
    reader = Reader(quick, model, shown)
    for block in RUN[page]:
        for words in block.commands:
            reader.do(words)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.not_run])
def test_commands_that_are_not_run_exist(block: Block) -> None:
    assert block.commands
    for words in block.commands:
        if words[0] == "patchcl-qp":
            parsed(words[1], words[2:])
        elif words[0] == "make":
            target(words[1])
        elif words[0] == "python":
            there = help_of(words[1])
            assert not [word for word in words[2:] if word not in there and not word.isdigit()]
        else:
            assert words[0] in ("git", "cd", "pip", "dask")


def test_every_block_has_a_language() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "text", "toml", "yaml"}
    assert len(BLOCKS) == sum(text.count("\n```") for text in TEXTS.values()) / 2


@pytest.mark.parametrize("page", TEXTS)
def test_commands_and_options_in_the_text_exist(page: str) -> None:
    text = re.sub(r"(?ms)^```.*?^```$", "", TEXTS[page])
    code = "\n".join(re.findall(r"`([^`]+)`", text))
    assert set(re.findall(r"(?m)^patchcl-qp ([a-z]+)", code)) <= set(main.commands)
    options = {
        option
        for command in main.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    ours = re.sub(r"python [^`]*", "", code)  # benchmarks have options of their own
    assert set(re.findall(r"--[a-z][a-z-]+", ours)) <= options | {"--help"}
    for name in re.findall(r"(?m)^make (\w+)", code):
        target(name)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_exist(link: str) -> None:
    assert (ROOT / link).exists()


def test_modules_in_how_it_works_exist() -> None:
    modules = re.findall(r"`([\w/]+\.py)`", TEXTS["how-it-works.md"])
    assert len(modules) > 20
    folders = (ROOT / "patchcl_qupath", ROOT)
    missing = [name for name in modules if not any((at / name).exists() for at in folders)]
    assert missing == []


def test_every_setting_has_a_meaning_and_the_reference_is_up_to_date() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    rows = re.findall(r"(?m)^\| (`\w+`) \|.*\|([^|]*)\|$", TEXTS["settings.md"])
    assert len(rows) > 40
    assert [name for name, meaning in rows if not meaning.strip()] == []
    for name, page in reference["PAGES"].items():
        assert TEXTS[name] == page(), f"run `python docs/reference.py`: {name} is out of date"


def test_settings_that_are_shown_are_settings(tmp_path: Path) -> None:
    shown = [block for block in BLOCKS if block.language == "toml"]
    assert shown
    for block in shown:
        (tmp_path / "settings.toml").write_text(block.text)
        load_config(tmp_path / "settings.toml")


def test_errors_are_those_of_the_program() -> None:
    """Each part of a message between two ellipses is in one string of the source."""
    strings = []
    for path in (ROOT / "patchcl_qupath").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                strings.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    source = "\n".join(strings)
    messages = re.findall(r"(?m)^- `([^`]+)`", TEXTS["errors.md"])
    assert len(messages) > 40
    parts = [part for message in messages for part in re.sub(r"\s+", " ", message).split("…")]
    assert [part for part in parts if part.strip() not in source] == []


def test_figures_are_used_and_small() -> None:
    figures = {f"figures/{path.name}" for path in (ROOT / "docs" / "figures").iterdir()}
    shown = {
        link for text in TEXTS.values() for link in re.findall(r"\]\((figures/[\w-]+\.jpg)", text)
    }
    assert figures == shown
    assert sum((ROOT / "docs" / figure).stat().st_size for figure in figures) < 1_500_000


def test_numbers_of_weights() -> None:
    networks = ConfidenceNetwork.of(PatchCLConfig()), NucleusNetwork(SelfTrainConfig().widths)
    for network in networks:
        count = sum(weight.numel() for weight in network.parameters())
        for page in ("README.md", "how-it-works.md"):
            assert f"{count:,} weights" in TEXTS[page].replace("\n", " ")
