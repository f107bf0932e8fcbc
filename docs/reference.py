"""Writes the pages that are generated from the program: docs/commands.md, docs/library.md,
docs/settings.md.

    python docs/reference.py

Commands are their --help; settings are those of config.py, with their descriptions.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_args

import click
import msgspec

import patchcl_qupath
from patchcl_qupath import cli, config, library

DOCS = Path(__file__).parent

COMMANDS = """\
# Commands

The output of `patchcl-qp COMMAND --help`. Each command takes the path of a `.qpproj` file or of its
folder. The exit status is 0 for success, 1 if something failed (the other images are finished), 2
for wrong usage, and 130 after Ctrl-C.
"""

SETTINGS = """\
# Settings

The defaults are those of the [results](measured.md), and rarely need to be changed. To change some,
write them into a file, for instance `settings.toml`:

```toml
[slide]
min_tissue_um2 = 5000

[segment]
min_area_um2 = 8
max_area_um2 = 300

[result]
class_name = "Nucleus"
```

Then pass the file:

```bash
patchcl-qp run my_project --config settings.toml
```

Settings that are not in the file keep their defaults; unknown names are errors. Names carry their
unit: `um` is µm, and `px` are pixels at the [working resolution](glossary.md#slides),
`slide.mpp`. All settings of a run are stored in `patchcl/runs/<run>/run.json`, those of a model
beside its weights in `patchcl/models`.

A model keeps `recipe` and the settings of `patchcl` and `selftrain` with which it was trained: a
file with others is refused. To change these, pass `--retrain`, or another name with `--model`.
Settings of `slide` and `segment` apply to the run. `refine` takes `engine` and those of `cdcl`, and
of `segment` where the file has that table; all others are those of the model that it begins with.

To use a model on another project, copy its two files, `NAME.pt` and `NAME.json`, from
`patchcl/models` into that folder of the other project, and pass `--model NAME` to `run`.
"""


LIBRARY = """\
# Library

Most commands of `patchcl-qp` as functions, for notebooks and scripts:

```python
import patchcl_qupath as pq

project = pq.open_project("my_project")
model = pq.train(project)
for outcome in pq.segment(project, model):
    print(outcome.image, outcome.nuclei, outcome.problem)
nuclei = pq.read_nuclei(project, "slide.svs")
```

In a script, put the calls below `if __name__ == "__main__":`, because five or more workers are
divided among processes, which import the script. All errors are subclasses of
`patchcl_qupath.errors.PatchCLError`. What `export`, `score` and `refine`
print as a note is a `UserWarning`; `segment` has the notes of an image in `note` of its outcome,
and writes no report: `write_report` does.

Where other programs use the cores, too, start Python on Linux with `OMP_WAIT_POLICY=PASSIVE` in the
environment, as the command does for itself. Otherwise torch's threads wait by spinning, and
training takes three times as long, or more. It is read when torch is imported.

[A notebook](nuclei.ipynb) opens the sample's nuclei in geopandas, SpatialData and LazySlide.
"""


def library_page() -> str:
    """Each function of the library, in the order of its module."""
    functions = [getattr(library, name) for name in patchcl_qupath.__all__ if name != "Config"]
    parts = [LIBRARY]
    for function in sorted(functions, key=lambda each: int(each.__code__.co_firstlineno)):
        text = inspect.getdoc(function) or ""
        words, _, example = text.partition("\n\n>>>")
        signature = re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(inspect.signature(function)))
        signature = re.sub(r", (?=\w+: )", ",\n    ", signature)
        parts.append(f"## {function.__name__}\n\n```text\n{function.__name__}{signature}\n```\n")
        parts.append(re.sub("``([^`]+)``", r"`\1`", words) + "\n")
        parts.append(f"```text\n>>>{example}\n```\n")
    return "\n".join(parts)


def commands_page() -> str:
    """The help of each command."""
    top = click.Context(cli.main, info_name="patchcl-qp", **cli.main.context_settings)
    parts = [COMMANDS]
    for name, command in cli.main.commands.items():
        context = click.Context(
            command, parent=top, info_name=name, terminal_width=92, max_content_width=92
        )
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def settings_page() -> str:
    """Each table of the settings, with the descriptions in config.py."""
    parts = [SETTINGS, "## Top-level settings\n", _table(config.Config)]
    for name, table in config.TABLES.items():
        parts.append(f"## [{name}]\n\n{inspect.getdoc(table)}\n")
        parts.append(_table(table))
    return "\n".join(parts)


def _table(table: type[config.Settings]) -> str:
    rows = ["| setting | default | unit | range | meaning |", "|---|---|---|---|---|"]
    for setting in dataclasses.fields(table):
        if setting.name in config.TABLES:
            continue
        meta = get_args(config.setting_types(table)[setting.name])[1]
        default = toml(getattr(table(), setting.name))
        unit = meta.extra["unit"]
        rows.append(
            f"| `{setting.name}` | `{default}` | {unit} | {_range(meta)} | {meta.description} |"
        )
    return "\n".join(rows) + "\n"


def _range(meta: msgspec.Meta) -> str:
    """The limits of a value, as one writes them."""
    low = (
        f"≥ {meta.ge:g}" if meta.ge is not None else f"> {meta.gt:g}" if meta.gt is not None else ""
    )
    high = f"≤ {meta.le:g}" if meta.le is not None else ""
    return ", ".join(filter(None, [low, high]))


def toml(value: object) -> str:
    """A default as one writes it in TOML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value!r}"


PAGES = {
    "commands.md": commands_page,
    "library.md": library_page,
    "settings.md": settings_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
