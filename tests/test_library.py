"""The library's functions do what their examples show."""

import doctest

import pytest
import shapely
from conftest import copy_sample

import patchcl_qupath
from patchcl_qupath import library

FUNCTIONS = [name for name in patchcl_qupath.__all__ if name != "Config"]


def test_all_functions_are_offered_and_documented() -> None:
    assert sorted(patchcl_qupath.__all__) == patchcl_qupath.__all__
    for name in FUNCTIONS:
        function = getattr(patchcl_qupath, name)
        assert function is getattr(library, name)
        assert ">>>" in function.__doc__, f"{name} has no example"
    assert set(patchcl_qupath.__all__) <= set(dir(patchcl_qupath))
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = patchcl_qupath.magic


def test_examples_run(tmp_path, monkeypatch) -> None:
    """In the order of the module, each with what those before it left."""
    copy_sample(tmp_path / "sample_project")
    monkeypatch.chdir(tmp_path)
    truth = tmp_path / "ground_truth"
    truth.mkdir()
    nucleus = shapely.box(100, 100, 120, 120)
    (truth / "CMU-1-Small-Region.geojson").write_text(shapely.to_geojson(nucleus))
    names = {"pq": patchcl_qupath}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    parser = doctest.DocTestParser()
    order = sorted(FUNCTIONS, key=lambda name: getattr(library, name).__code__.co_firstlineno)
    for name in order:
        text = getattr(library, name).__doc__
        example = parser.get_doctest(text, names, name, library.__file__, 0)
        runner.run(example, clear_globs=False)
        names = example.globs
    assert runner.summarize().failed == 0
