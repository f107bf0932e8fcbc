"""The README is true: its files exist, its commands and options are those of the program."""

import re
from pathlib import Path

import click
import pytest

from patchcl_qupath.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_commands_and_options_exist():
    commands = set(re.findall(r"patchcl-qp (\w+)", README))
    assert {"run", "init", "status", "train"} <= commands <= set(main.commands)
    options = {
        option
        for command in main.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    ours = re.sub(r"`python [^`]*`", "", README)  # benchmarks have options of their own
    assert set(re.findall(r"--[a-z][a-z-]+", ours)) <= options


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)$|`make (\w+)`", README, re.MULTILINE):
        assert re.search(rf"^{max(target)}:", makefile, re.MULTILINE), target


def test_the_receptive_field_and_weights_are_as_said():
    from patchcl_qupath.config import PatchCLConfig
    from patchcl_qupath.network import ConfidenceNetwork

    network = ConfidenceNetwork.of(PatchCLConfig())
    weights = sum(weight.numel() for weight in network.parameters())
    assert f"{weights:,} weights" in README.replace("\n", " ")
