"""What `patchcl-qp doctor` finds is what the other commands use."""

import json
import sys

import pytest
import qupath
from click.testing import CliRunner

from patchcl_qupath import __version__, console
from patchcl_qupath.cli import main
from patchcl_qupath.models import engines
from patchcl_qupath.models.network import NucleusNetwork, device


def doctor(*options):
    result = CliRunner().invoke(main, ["doctor", *map(str, options)])
    assert result.exit_code == 0, result.output
    return result.stdout


def parts(*options):
    return {finding["part"]: finding for finding in json.loads(doctor("--json", *options))}


def test_what_is_here_is_named():
    found = parts()
    assert __version__ in found["program"]["found"]
    assert engines.choose("auto", NucleusNetwork) in found["engine"]["found"]
    table = doctor()
    assert all(part in table for part in found)


@pytest.mark.qupath
def test_a_qupath_that_paquo_finds_is_found():
    home = qupath.launcher().parents[1]
    assert str(home) in parts()["QuPath"]["found"]
    assert str(home) in parts("--qupath", home)["QuPath"]["found"]


def test_a_broken_qupath_says_what_to_do(tmp_path):
    found = parts("--qupath", tmp_path)["QuPath"]
    assert found["found"] is None
    assert f"{tmp_path} holds no complete QuPath" in found["note"]


def test_a_missing_engine_says_what_it_would_bring(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    found = parts()["engine"]
    assert found["found"].startswith("torch")
    if device().type == "cpu":
        assert "pip install openvino" in found["note"]


def test_memory_is_that_of_a_container(monkeypatch):
    monkeypatch.setattr("patchcl_qupath.doctor.memory_limit", lambda: 2_000_000_000)
    found = parts()["machine"]
    assert ", 2 of " in found["found"]
    assert found["note"].startswith("a run takes 1 to 2 GB")


def test_openslide_names_its_extra_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)  # as if it were not installed
    found = parts()["OpenSlide"]
    assert found["found"] is None
    assert found["note"].startswith("pip install 'patchcl-qupath[openslide]'")
    assert "MRXS" in found["note"]


def test_openslide_is_found_with_its_version():
    openslide = pytest.importorskip("openslide")
    found = parts()["OpenSlide"]
    assert openslide.__library_version__ in found["found"]
    assert "DICOM" in found["note"]


def test_brackets_in_a_table_are_no_markup(capsys):
    console.print_table(["part"], [["patchcl-qupath[cluster]"], ["a :smile: [red].svs"]])
    table = capsys.readouterr().out
    assert "patchcl-qupath[cluster]" in table
    assert "a :smile: [red].svs" in table
