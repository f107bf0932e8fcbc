"""Settings: what is read is what was written; what makes no sense is refused."""

import json
import math
from dataclasses import replace

import pytest

from patchcl_qupath.config import Config, PatchCLConfig, Recipe, from_dict, load_config, to_dict
from patchcl_qupath.errors import ConfigError


def test_settings_survive_json():
    config = from_dict({"slide": {"mpp": 0.25}, "patchcl": {"dilations": [1, 2], "seed": 3}})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert config.slide.mpp == 0.25
    assert config.patchcl.dilations == (1, 2)
    assert config.segment == Config().segment


def test_toml(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("[segment]\nmin_area_um2 = 12\n")
    assert load_config(file).segment.min_area_um2 == 12
    assert load_config(None) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[slides]\nmpp = 1", r"unknown table \[slides\]: the tables are slide,"),
        (
            "min_area_um2 = 8",
            r"min_area_um2 is in no table: put it under \[selftrain\] or \[segment\]$",
        ),
        ("mpp = 1", r"put it under \[slide\]$"),
        ("magic = 1", "unknown setting magic: the settings outside of tables are recipe and"),
        ("[slide]\nmmp = 1", "unknown setting slide.mmp: do you mean mpp"),
        ("[slide]\nmpp = 'fine'", "slide.mpp = 'fine': expected float"),
        ("[slide]\nmpp = -1", "slide.mpp = -1: expected float >= 0.05"),
        ("[slide]\ntile_px = 12.5", "slide.tile_px = 12.5: expected int"),
        ("[slide]\ntile_px = true", "slide.tile_px = True: expected int"),
        ("[patchcl]\ndilations = 3", "patchcl.dilations = 3: expected array"),
        ("slide = 3", "must be a table"),
        ("[slide", "cannot be read as TOML"),
    ],
)
def test_bad_settings_are_refused(tmp_path, text, message):
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_settings_in_another_encoding_are_refused(tmp_path):
    """As what PowerShell writes with >."""
    file = tmp_path / "settings.toml"
    file.write_text("[slide]\nmpp = 0.5\n", "utf-16")
    with pytest.raises(ConfigError, match="is not in UTF-8: save it in that encoding"):
        load_config(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*none\.toml: name one"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"cannot be read: "):  # a folder
        load_config(tmp_path)


def test_recipe_of_the_paper_has_its_settings() -> None:
    paper = from_dict({"recipe": "paper", "patchcl": {"seed": 3}})
    assert paper.recipe == "paper"
    assert paper.patchcl == PatchCLConfig.paper(seed=3)
    assert from_dict(to_dict(paper)) == paper
    for config in (Config(recipe=Recipe.PAPER), replace(Config(), recipe=Recipe.PAPER)):
        assert config == from_dict({"recipe": "paper"})
        assert config.patchcl == PatchCLConfig.paper()
        assert to_dict(config)["patchcl"]["crop_px"] == 300
    chosen = PatchCLConfig()
    assert Config(recipe=Recipe.PAPER, patchcl=chosen).patchcl is chosen
    assert Config(recipe=Recipe.PATCHCL).patchcl == PatchCLConfig()
    assert from_dict({}).recipe == "selftrain"
    with pytest.raises(ConfigError, match="it must be one of selftrain, patchcl, paper"):
        from_dict({"recipe": "magic"})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"selftrain": {"widths": [8, 8]}}, "widths = .*: expected array of length >= 3"),
        ({"selftrain": {"widths": [8, 0, 8]}}, "widths = .*: expected int >= 1"),
        ({"cdcl": {"patch_px": 6}}, "patch_px = 6: expected int that's a multiple of 4"),
        ({"cdcl": {"crop_px": 130}}, r"cdcl\.crop_px = 130: expected int that's a multiple of 4"),
        ({"cdcl": {"crop_px": 96, "patch_px": 100}}, r"cdcl\.patch_px must be at most"),
        ({"selftrain": {"crop_px": 130}}, r"selftrain\.crop_px = 130: expected .* multiple of 4"),
        ({"selftrain": {"min_area_um2": 220}}, r"selftrain\.min_area_um2 must be less than"),
        ({"segment": {"min_area_um2": 500}}, r"min_area_um2 must be less than segment\.max_area"),
        ({"slide": {"tile_px": 0}}, r"slide\.tile_px = 0: expected int >= \d+"),
        ({"patchcl": {"seed": 10**20}}, r"patchcl\.seed = 10{20}: expected int <= \d+"),
        ({"segment": {"open_radius_um": math.inf}}, r"open_radius_um = inf: it must be finite"),
        ({"segment": {"join_diameter": math.nan}}, r"join_diameter = nan: it must be finite"),
        ({"slide": {"mpp": 0}}, r"slide\.mpp = 0: expected float >= 0\.05"),
        ({"segment": {"min_solidity": 7}}, r"segment\.min_solidity = 7: expected float <= 1"),
        ({"segment": {"open_radius_um": 1e9}}, r"radius_um = 1000000000\.0: expected float <= 10"),
        ({"segment": {"max_diameter_um": 101}}, r"max_diameter_um = 101: expected float <= 100"),
        ({"selftrain": {"blur_um": 1e300}}, r"selftrain\.blur_um = 1e\+300: expected float <= 100"),
        ({"cells": {"expand_um": 30}}, r"cells\.expand_um = 30: expected float <= 25"),
        ({"slide": {"stain": "h&e"}}, "stain = 'h&e': it must be one of auto, h-e, h-dab"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    table: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(table)
