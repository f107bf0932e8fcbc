"""Positive nuclei, regions and summaries: right values, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import shapely

from patchcl_qupath.answers import mixture
from patchcl_qupath.answers.positivity import (
    Positivity,
    allred_score,
    check_positive,
    find_positivity,
    h_score,
    positive_percent,
)
from patchcl_qupath.answers.regions import Regions
from patchcl_qupath.answers.summary import Extent, summarise
from patchcl_qupath.config import (
    CORRECTED,
    TO_CORRECT,
    Config,
    ResultConfig,
    from_dict,
    parse_positive,
    to_dict,
)
from patchcl_qupath.datatypes import DrawnRegion, Nuclei, StainKind, StainVectors, centroids_of
from patchcl_qupath.errors import ConfigError, ImageError
from patchcl_qupath.segmentation.measurements import measurement_names
from patchcl_qupath.slides.stain_vectors import H_DAB, H_E, dab_of, hematoxylin_of
from patchcl_qupath.storage.parquet import from_table, to_table
from patchcl_qupath.storage.records import AllredScore, PositivityRecord


def graded(negative: int, *grades: int) -> dict[str, int]:
    """Numbers of nuclei by class, with three grades."""
    names = ("Negative", "1+", "2+", "3+")
    return {f"Nucleus: {n}": c for n, c in zip(names, (negative, *grades), strict=True)}


def test_scores_of_a_patient() -> None:
    """40 negative, 30, 20 and 10 of 1+ to 3+: H = 30 + 2 x 20 + 3 x 10."""
    counts = graded(40, 30, 20, 10)
    assert positive_percent(counts) == 60
    assert h_score(counts) == 100
    assert allred_score(counts) == AllredScore(proportion=4, intensity=1)  # mean grade 100/60
    assert h_score(graded(0, 0, 0, 5)) == 300
    assert h_score({"Nucleus: Positive": 3, "Nucleus: Negative": 1}) is None
    assert allred_score({"Nucleus: Positive": 3, "Nucleus: Negative": 1}) is None
    assert positive_percent({"Nucleus: Positive": 3, "Nucleus: Negative": 1}) == 75
    assert positive_percent({"Tumor": 3, "Negatively": 2}) is None
    assert h_score(graded(0, 0, 0, 0)) is None
    assert positive_percent({}) is None
    assert positive_percent({"Positive": 1, "Tumor: Negative": 1, "Tumor": 7}) == 50


@pytest.mark.parametrize(
    ("counts", "proportion", "intensity"),
    [
        (graded(10, 0, 0, 0), 0, 0),
        (graded(999, 1, 0, 0), 1, 1),
        (graded(990, 0, 10, 0), 2, 2),  # 1 %, as in QuPath
        (graded(90, 0, 0, 10), 3, 3),
        (graded(20, 3, 7, 0), 4, 2),  # a third; mean grade 1.7
        (graded(20, 4, 6, 0), 4, 1),  # 1.6
        (graded(10, 0, 20, 0), 5, 2),
        (graded(0, 0, 2, 1), 5, 2),  # a mean of 7/3 is not above it
        (graded(0, 0, 5, 3), 5, 3),
    ],
)
def test_allred_table(counts: dict[str, int], proportion: int, intensity: int) -> None:
    found = allred_score(counts)
    assert found == AllredScore(proportion=proportion, intensity=intensity)
    assert found.score == proportion + intensity


def rule(*thresholds: float) -> Positivity:
    record = PositivityRecord(measurement="DAB: Mean", thresholds=thresholds)
    return Positivity(record=record, base_class="Nucleus")


def test_a_nucleus_at_a_threshold_is_above_it() -> None:
    values = np.array([0.19999, 0.2, 0.4, 0.59, 0.6, 7, np.nan, -1], np.float32)
    short = [name.removeprefix("Nucleus: ") for name in rule(0.2, 0.4, 0.6).classes(values)]
    assert short == ["Negative", "1+", "2+", "2+", "3+", "3+", "Negative", "Negative"]
    positive = rule(0.2).classes(values) == "Nucleus: Positive"
    assert positive.tolist() == [False, True, True, True, True, True, False, False]


def test_a_nucleus_at_any_threshold_is_above_it() -> None:
    """Values have the digits of 32 bits: that of 0.35 is below the threshold, and the same."""
    for hundredths in range(1, 201):
        threshold = hundredths / 100
        at = np.float32(threshold)
        values = np.array([np.nextafter(at, np.float32(0)), at], np.float32)
        assert rule(threshold).codes(values).tolist() == [0, 1]
        assert rule(threshold / 2, threshold, 9).codes(values).tolist() == [1, 2]


@pytest.mark.parametrize(
    "text", ["0.2", "dab=", "dab=x", "dab=0.2,0.4", "dab=0.4,0.2,0.6", "=0.2", "dab=nan", "Auto"]
)
def test_thresholds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"nucleus-dab-mean=0\.2"):
        ResultConfig(positive=text)


def test_settings_of_classes() -> None:
    assert parse_positive("") is None
    assert parse_positive("auto") is None
    assert parse_positive("a=b=0.2,0.4,0.6") == ("a=b", (0.2, 0.4, 0.6))
    assert from_dict({"result": {"positive": "auto"}}).result.kind(1) == "detection"
    assert from_dict({"result": {"object_type": "annotation"}}).result.kind(1) == "annotation"
    with pytest.raises(ConfigError, match="cannot be the class of nuclei with --positive"):
        ResultConfig(positive="auto", class_name="Tumor: Negative")
    ResultConfig(class_name="Positive")  # without classes of its own, any name


def test_two_spellings_of_a_class_are_one() -> None:
    """Each region was counted once for each of them, and tables had another name than QuPath."""
    classes = ["Tumor:Positive", "Stroma ", "Tumor: Positive", "Stroma"]
    settings = from_dict({"result": {"summarise": classes, "class_name": "Tumor:Nucleus "}}).result
    assert settings.summarise == ("Tumor: Positive", "Stroma")
    assert settings.class_name == "Tumor: Nucleus"
    assert from_dict(to_dict(Config(result=settings))).result == settings
    with pytest.raises(ConfigError, match="must be a name such as Nucleus"):
        ResultConfig(class_name=" : ")
    for name in (TO_CORRECT, CORRECTED, "Ignore*"):
        with pytest.raises(ConfigError, match=r"cannot be the class of nuclei: it is that of ROIs"):
            ResultConfig(class_name=name)


def find(
    positive: str,
    names: Sequence[str],
    values: Any = (),
    stains: Any = H_DAB,
    hematoxylin: Any = None,
) -> Positivity:
    """Of nuclei whose hematoxylin is the same, unless it is given."""
    same = np.zeros(len(values)) if hematoxylin is None else hematoxylin
    return find_positivity(
        positive,
        image="a.svs",
        base_class="Nucleus",
        stains=stains,
        names=names,
        values=lambda name: [np.asarray(same if "Hema" in name else values, np.float32)],
    )


@pytest.mark.parametrize(
    ("spelling", "names", "found"),
    [
        ("nucleus-dab-mean", ["Hematoxylin: Mean", "DAB: Mean"], "DAB: Mean"),
        ("DAB: Mean", ["Hematoxylin: Mean", "DAB: Mean"], "DAB: Mean"),
        ("dab_mean", ["Nucleus: DAB OD mean", "Cell: DAB OD mean"], "Nucleus: DAB OD mean"),
        ("nucleus-dab-od-max", ["DAB: Nucleus: Mean", "DAB: Nucleus: Max"], "DAB: Nucleus: Max"),
        ("cell-dab-mean", ["DAB: Nucleus: Mean", "DAB: Cell: Mean"], "DAB: Cell: Mean"),
        ("area", ["Length µm", "Area µm^2"], "Area µm^2"),
    ],
)
def test_measurements_have_shell_friendly_names(
    spelling: str, names: list[str], found: str
) -> None:
    assert find(f"{spelling}=0.2", names).record.measurement == found


def test_an_unknown_measurement_is_named() -> None:
    names = measurement_names(H_DAB)
    with pytest.raises(ImageError, match=r"^a: .*no measurement dab-men .*do you mean dab-mean\?"):
        check_positive("dab-men=0.2", "a", H_DAB, names, with_cells=False)
    with pytest.raises(ImageError, match=r"no measurement dab .*do you mean dab-mean\?"):
        check_positive("dab=0.2", "a", H_DAB, names, with_cells=False)
    with pytest.raises(ImageError, match="no measurement membrane-dab-mean"):
        check_positive("membrane-dab-mean=0.2", "a", H_DAB, names, with_cells=True)
    check_positive("hematoxylin-mean=0.2", "a", H_E, measurement_names(H_E), with_cells=False)


def test_no_threshold_is_found_without_nuclei() -> None:
    record = find("auto", []).record
    assert (record.thresholds, record.found) == ((0.2,), False)
    assert str(record.note).startswith("too few nuclei (0)")  # a threshold without note is given


def test_cells_are_measured_where_there_are_cells() -> None:
    names = measurement_names(H_DAB)
    for measurement in ("cytoplasm-dab-mean", "cell-dab-max"):
        check_positive(f"{measurement}=0.2", "a", H_DAB, names, with_cells=True)
        with pytest.raises(ImageError, match=rf"^a: {measurement} .* pass --expand 5"):
            check_positive(f"{measurement}=0.2", "a", H_DAB, names, with_cells=False)


@pytest.mark.parametrize("positive", ["auto", "nucleus-dab-mean=0.2"])
def test_an_image_without_dab_is_refused(positive: str) -> None:
    with pytest.raises(ImageError) as error:
        check_positive(positive, "a.svs", H_E, measurement_names(H_E), with_cells=False)
    assert str(error.value).startswith("a.svs: --positive needs DAB")
    assert "--stain h-dab" in str(error.value)
    assert "\n" not in str(error.value)


def test_dab_may_have_another_name() -> None:
    brown = StainVectors(
        kind=StainKind.H_DAB, names=("Hematoxylin", "Ki-67"), vectors=H_DAB.vectors
    )
    check_positive("auto", "a.svs", brown, measurement_names(brown), with_cells=False)
    names = ["Hematoxylin: Mean", "Ki-67: Mean"]
    assert find("auto", names, [0.1], brown).record.measurement == "Ki-67: Mean"


def two_modes(low: float, high: float, share: float, count: int) -> Any:
    """Optical densities around two values, log-normal as far as the offset goes."""
    rng = np.random.default_rng(1)
    positive = np.arange(count) < share * count
    spread = np.where(positive, 0.35, 0.25)
    centre = np.log(np.where(positive, high, low) + 0.05)
    return np.exp(rng.normal(centre, spread)) - 0.05, positive


@pytest.mark.parametrize(
    ("low", "high", "share"), [(0.05, 0.6, 0.3), (0.1, 0.8, 0.6), (0.03, 0.4, 0.02), (0.06, 1, 0.9)]
)
def test_a_threshold_between_two_modes(low: float, high: float, share: float) -> None:
    values, positive = two_modes(low, high, share, 5000)
    threshold, note = mixture.threshold_between(values.astype(np.float32))
    assert note is None
    assert low < threshold < high
    assert np.mean((values >= threshold) == positive) > 0.98
    found = mixture.fit(np.log(np.maximum(values, 0) + 0.05))
    assert np.exp(found.means) - 0.05 == pytest.approx([low, high], rel=0.1)
    assert found.weights == pytest.approx([1 - share, share], abs=0.02)


def test_nothing_is_brown_below_a_density_of_a_tenth() -> None:
    """Nuclei without DAB are around 0, and the two modes cross at 0.02."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-0.02, 0.03, 4000), rng.normal(0.3, 0.1, 1000)])
    assert mixture.threshold_between(values.astype(np.float32)) == (0.1, None)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (two_modes(0.05, 0.6, 0.3, 30)[0], "too few nuclei (30)"),
        (two_modes(0.03, 0.03, 0.5, 900)[0], "hardly any nucleus has DAB"),
        (two_modes(0.3, 0.3, 0.5, 900)[0], "has one mode, not two"),
        # Pale and dark nuclei without DAB; weak and strong ones of a slide without negatives.
        (
            np.random.default_rng(0).normal([0.03, 0.15], [0.02, 0.025], (2500, 2)).ravel(),
            "has two modes, both below it",
        ),
        (two_modes(0.4, 1.5, 0.5, 5000)[0], "has two modes, both above it"),
        (np.full(100, 0.3), "has one mode, not two"),
        (np.full(100, np.nan), "too few nuclei (0)"),
        (np.linspace(0.1, 0.5, 500), "has one mode, not two"),
        # Some are below 0, and are one value to the mixture.
        (np.random.default_rng(0).normal(0.12, 0.1, 5000), "has one mode, not two"),
        (np.random.default_rng(0).normal(0.15, 0.1, 300), "has one mode, not two"),
    ],
)
def test_without_two_modes_there_is_a_note(values: Any, note: str) -> None:
    threshold, found = mixture.threshold_between(np.asarray(values, np.float32))
    assert threshold == 0.2
    assert note in str(found)
    record = find("auto", ["DAB: Mean"], values).record
    assert (record.thresholds, record.found, record.note) == ((0.2,), False, found)


def test_nuclei_that_are_dark_without_dab_are_no_positive_ones() -> None:
    """With stain vectors of another slide, DAB is a share of hematoxylin."""
    names, (values, positive) = ["Hematoxylin: Mean", "DAB: Mean"], two_modes(0.1, 0.5, 0.4, 5000)
    noise = np.random.default_rng(2).normal(0, 0.03, 5000)
    record = find("auto", names, values, hematoxylin=2 * values + noise).record
    assert (record.thresholds, record.found) == ((0.2,), False)
    assert "rises with their hematoxylin" in str(record.note)
    for other in (0.5 - 0.2 * positive + noise, 0.5 + 0.02 * positive + noise):
        in_turn = find("auto", names, values, hematoxylin=other).record
        assert in_turn.found
        assert 0.1 < in_turn.thresholds[0] < 0.5


def test_stains_are_known_by_their_vectors() -> None:
    """A person may give them in another order, or other names."""
    turned = replace(H_DAB, names=("Ki-67", "Haematoxylin"), vectors=H_DAB.vectors[::-1])
    assert (dab_of(turned), hematoxylin_of(turned)) == ("Ki-67", "Haematoxylin")
    assert (dab_of(H_DAB), hematoxylin_of(H_DAB)) == ("DAB", "Hematoxylin")
    assert (dab_of(H_E), hematoxylin_of(H_E)) == (None, "Hematoxylin")
    (hematoxylin, dab), eosin = H_DAB.vectors, H_E.vectors[1]
    third = StainVectors(
        kind=StainKind.OTHER, names=("DAB", "Red", "Blue"), vectors=(dab, eosin, hematoxylin)
    )
    assert (dab_of(third), hematoxylin_of(third)) == ("DAB", "Blue")
    unnamed = replace(third, kind=StainKind.H_DAB, names=("Red", "Brown", "Blue"))
    unnamed = replace(unnamed, vectors=(eosin, dab, hematoxylin))
    assert (dab_of(unnamed), hematoxylin_of(unnamed)) == ("Brown", "Blue")


SQUARE = shapely.box(0, 0, 100, 100)
WITHIN = shapely.box(20, 20, 60, 60)
BESIDE = shapely.box(80, 0, 200, 50)  # meets SQUARE


def region(geometry: shapely.Geometry, class_name: str = "Tumor", **named: Any) -> DrawnRegion:
    return DrawnRegion(geometry=geometry, class_name=class_name, **named)


def members(regions: Regions, i: int, xy: Any) -> list[int]:
    """Which centroids (N, 2) lie in a region, by their numbers."""
    region, point = regions.pairs(xy)
    return sorted(point[region == i].tolist())


def parent(regions: Regions, xy: Any) -> Any:
    """The smallest region (N,) that holds each centroid (N, 2); -1 where none does."""
    return regions.smallest(*regions.pairs(xy), len(xy))


def test_a_nucleus_belongs_to_the_smallest_region() -> None:
    regions = Regions([region(SQUARE), region(WITHIN, "Stroma"), region(BESIDE)])
    xy = np.array([[10, 10], [30, 30], [90, 10], [150, 10], [60, 60], [300, 300]], float)
    assert parent(regions, xy).tolist() == [0, 1, 2, 2, 1, -1]  # a boundary belongs to its region
    assert members(regions, 0, xy) == [0, 1, 2, 4]
    assert members(regions, 1, xy) == [1, 4]
    assert members(regions, 2, xy) == [2, 3]
    assert regions.partly_overlapping() == [(0, 2)]
    assert regions.label(1) == "Stroma at x 40, y 40 px"
    none = Regions([])
    assert parent(none, xy).tolist() == [-1] * 6
    assert none.partly_overlapping() == []
    assert parent(regions, np.empty((0, 2))).tolist() == []


def test_regions_of_many_corners_and_holes() -> None:
    """As one by one, in numbers that a loop would be slow for."""
    ring = shapely.Point(500, 500).buffer(300, 500) - shapely.Point(500, 500).buffer(100, 500)
    drawn = [ring, shapely.box(0, 0, 400, 900), SQUARE | shapely.box(700, 0, 900, 300)]
    regions = Regions([region(one) for one in drawn])
    xy = np.random.default_rng(0).uniform(0, 1000, (20_000, 2))
    inside = np.stack([shapely.contains_xy(one, xy) for one in drawn])
    for i in range(3):
        assert members(regions, i, xy) == np.flatnonzero(inside[i]).tolist()
    areas = np.where(inside, shapely.area(drawn)[:, None], np.inf)
    expected = np.where(inside.any(axis=0), areas.argmin(axis=0), -1)
    assert np.array_equal(parent(regions, xy), expected)


def test_cores_that_overlap_are_told_of() -> None:
    """As after dearraying with too large a diameter: a nucleus would count for two patients."""
    cores = [region(shapely.Point(x, 100).buffer(60), "", is_core=True) for x in (100, 210, 400)]
    regions = Regions([*cores, region(shapely.box(0, 0, 250, 100))])
    both = np.array([[155.0, 100.5]])
    assert [i for i in range(4) if members(regions, i, both)] == [0, 1]
    assert regions.partly_overlapping() == [(0, 1)]


def test_a_nucleus_whose_centroid_is_beside_a_core_is_in_none() -> None:
    """As in QuPath; a run within cores leaves it out."""
    cores = [shapely.Point(100, 100).buffer(50), shapely.Point(300, 100).buffer(50)]
    regions = Regions([region(core, "", is_core=True) for core in cores] + [region(SQUARE)])
    xy = np.array([[100, 155], [245, 100], [200, 100], [100, 100], [-3, 50]], float)
    assert parent(regions, xy).tolist() == [-1, -1, -1, 0, -1]


def nuclei(*centres: tuple[float, float], classes: Sequence[str] | None = None) -> Nuclei:
    """Squares of 4 px, of areas 1, 2, 3, ..."""
    count = len(centres)
    return Nuclei(
        np.array([shapely.Point(xy).buffer(2, cap_style="square") for xy in centres], object),
        {
            "Area µm^2": np.arange(1, count + 1, dtype=np.float32),
            "DAB: Mean": np.full(count, 0.25, np.float32),
            "DAB: Max": np.full(count, 1, np.float32),
        },
        np.array([f"{k:036d}" for k in range(count)]),
        classes=None if classes is None else np.array(classes),
    )


def test_summaries_of_nested_regions() -> None:
    classes = ["Nucleus: Positive", "Nucleus: Negative", "Nucleus: Positive", "Nucleus: Negative"]
    found = nuclei((10, 10), (30, 30), (40, 40), (500, 500), classes=classes)
    drawn = [
        region(SQUARE, id="a"),
        region(WITHIN, "Stroma", name="s"),
        region(shapely.box(900, 0, 950, 9)),
    ]
    extents = [
        Extent(area_mm2=4, tissue_mm2=2.0),
        Extent(area_mm2=1, tissue_mm2=0.5, x=50, y=50),
        Extent(area_mm2=0.25),
        Extent(area_mm2=0.1, tissue_mm2=0.0),
    ]
    image, tumor, stroma, empty = summarise(
        [found[:1], found[:0], found[1:]],
        image="a.svs",
        extents=extents,
        regions=Regions(drawn),
        class_names=("Nucleus: Negative", "Nucleus: Positive"),
    )
    assert (image.kind, image.name) == ("image", "a.svs")
    assert (image.nuclei, image.own, image.per_mm2) == (4, 1, 2)
    assert image.positive_percent == 50
    assert image.classes["Nucleus: Positive"].nuclei == 2
    assert image.classes["Nucleus: Positive"].per_mm2 == 1
    assert (tumor.kind, tumor.id, tumor.class_name) == ("region", "a", "Tumor")
    assert (tumor.nuclei, tumor.own) == (3, 1)
    assert (tumor.label, stroma.label) == ("Tumor at x 50, y 50 px", "s")
    assert tumor.per_mm2 == 6
    assert tumor.positive_percent == pytest.approx(200 / 3)
    assert (stroma.name, stroma.nuclei, stroma.own, stroma.per_mm2) == ("s", 2, 2, 8)
    assert stroma.positive_percent == 50
    assert list(image.measurements) == ["Area µm^2", "DAB: Mean"]
    area = image.measurements["Area µm^2"]
    assert (area.lower, area.median, area.upper) == (1.75, 2.5, 3.25)
    area = stroma.measurements["Area µm^2"]  # of the first and second of the second batch
    assert (area.lower, area.median, area.upper) == (2.25, 2.5, 2.75)
    assert (empty.nuclei, empty.per_mm2, empty.positive_percent) == (0, 0, None)
    assert list(empty.classes) == list(image.classes)
    assert empty.measurements == {}
    assert msgspec.convert(msgspec.to_builtins(tumor), type(tumor)) == tumor


def test_summaries_without_classes_and_without_nuclei() -> None:
    (image,) = summarise([nuclei((1, 1))], image="a", extents=[Extent()])
    assert (image.nuclei, image.per_mm2, image.classes) == (1, None, {})
    assert image.positive_percent is None
    (image,) = summarise([], image="a", extents=[Extent(area_mm2=1.0)])
    assert (image.nuclei, image.per_mm2, image.measurements) == (0, 0, {})
    (image,) = summarise([], image="a", extents=[Extent()])
    assert (image.nuclei, image.per_mm2) == (0, None)


def test_classes_are_a_column_of_their_own() -> None:
    found = nuclei((1, 1), (9, 9), classes=["Nucleus: 1+", "Nucleus: Negative"])
    table = to_table(found)
    assert table.column_names[:3] == ["id", "geometry", "Classification"]
    back = from_table(table)
    assert back.classes is not None
    assert back.classes.tolist() == ["Nucleus: 1+", "Nucleus: Negative"]
    assert list(back.measurements) == list(found.measurements)
    assert "Classification" not in to_table(nuclei((1, 1))).column_names
    empty = from_table(to_table(found[:0]))
    assert empty.classes is not None
    assert len(empty.classes) == 0
    assert to_table(found[:0]).schema == table.schema


def test_centroids() -> None:
    assert centroids_of(nuclei((3, 4)).polygons).tolist() == [[3, 4]]
    assert centroids_of(np.empty(0, object)).shape == (0, 2)
