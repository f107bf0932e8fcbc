"""The sections of the report, as HTML."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from patchcl_qupath.project import Project
from patchcl_qupath.report.charts import Charts
from patchcl_qupath.report.figures import CONTOUR_UNITS
from patchcl_qupath.report.found import FoundImage, FoundModel, FoundRun
from patchcl_qupath.storage.records import FieldOfViewRecord

_OPEN = 3  # images at most that are shown at once, and not on demand


def title(project: Project) -> str:
    """The project's name: that of its folder, unless the file has one of its own."""
    stem = project.path.stem
    return escape(project.path.resolve().parent.name if stem == "project" else stem)


def sums(images: Sequence[FoundImage]) -> str:
    """The project in one line."""
    nuclei = sum(image.nuclei or 0 for image in images)
    tissue = sum(image.tissue_mm2 or 0 for image in images)
    done = sum(image.nuclei is not None for image in images)
    of = "" if done == len(images) else f" of {len(images)}"
    return (
        f"<b>{done}{of}</b> image{'s' * (len(images) != 1)} &middot; "
        f"<b>{tissue:,.2f}</b> mm&sup2; of tissue &middot; <b>{nuclei:,}</b> nuclei"
    )


def table(images: Sequence[FoundImage]) -> str:
    """One row an image; each column can be sorted by."""
    columns = ["tissue mm²", "nuclei", "nuclei per mm²", "median area µm²", "mean probability"]
    head = _column("image", "") + "".join(_column(name, "number") for name in columns)
    head += _column("seconds", "number") + _column("warnings", "number warned")
    densest = max([image.density or 0 for image in images], default=0) or 1
    rows = "".join(_row(image, densest) for image in images)
    return (
        '<h2 id="images">Images</h2>\n'
        '<div class="scroll" role="region" aria-labelledby="images" tabindex="0"><table>'
        "<caption>A press on a column&rsquo;s name sorts by it.</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
        '<p class="unseen" id="sorted" role="status"></p>'
    )


def _column(name: str, kind: str) -> str:
    return (
        f'<th scope="col" class="{kind}" aria-sort="none">'
        f'<button type="button">{escape(name)}</button></th>'
    )


def _row(image: FoundImage, densest: float) -> str:
    density = image.density
    bar = ""
    if density is not None:
        bar = (
            '<svg class="share" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect width="{100 * density / densest:.1f}" height="4"/></svg>'
        )
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in image.warnings)
    return (
        f'<tr><th scope="row" data-value="{escape(image.name)}">'
        f'<a href="#image-{escape(image.id)}">{escape(image.name)}</a></th>'
        + _number(image.tissue_mm2, ".2f")
        + _number(image.nuclei, ",d")
        + _number(density, ",.0f", bar)
        + _number(image.median_area, ".1f")
        + _number(image.probability, ".2f")
        + _number(image.seconds, ".1f")
        + f'<td class="warnings" data-value="{len(image.warnings)}">'
        + (f"<ul>{warnings}</ul>" if warnings else "")
        + "</td></tr>\n"
    )


def _number(value: float | None, form: str, more: str = "") -> str:
    if value is None:
        return '<td class="number" data-value="">&ndash;</td>'
    return f'<td class="number" data-value="{value:.9g}">{value:{form}}{more}</td>'


def images(found: Sequence[FoundImage], charts: Charts) -> str:
    """Pictures of each image; closed where there are many, so that the page stays light."""
    opened = " open" if len(found) <= _OPEN else ""
    parts = [
        "<h2>Image by image</h2>",
        '<div class="tools"><label><input type="checkbox" id="outlines" checked> Show outlines of '
        "nuclei</label>",
        f'<button type="button" id="all">{"Close" if opened else "Open"} all</button></div>',
    ]
    for image in found:
        told = [f'<p class="warning">{escape(warning)}</p>' for warning in image.warnings]
        if image.figures is not None:
            told.append(_guarded(lambda image=image: _pictures(image, charts)))  # type: ignore[misc]
        facts = "" if image.nuclei is None else f"{image.nuclei:,} nuclei"
        parts.append(
            f'<details class="card image" id="image-{escape(image.id)}"{opened}><summary>'
            f'<h3>{escape(image.name)}</h3><span class="soft">{facts}</span></summary>'
            f"<div>{''.join(told)}</div></details>"
        )
    return "\n".join(parts)


def _guarded(make: Callable[[], str]) -> str:
    """A part of the page; word of it where the files it is made of are damaged."""
    try:
        return make()
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return '<p class="warning">its files are damaged or of another version: run again</p>'


def _pictures(image: FoundImage, charts: Charts) -> str:
    assert image.figures is not None
    assert image.result is not None
    figures, name = image.figures, escape(image.name)
    keys = '<span class="key tissue"></span> tissue that was looked at'
    if image.result.regions:
        keys += ', within <span class="key region"></span> its regions'
    if image.result.failed_tiles:
        keys += '; <span class="key hole"></span> tiles that were left out'
    width, height = figures.mm
    maps = _figure(
        _img(image.pictures / "overview.jpg", f"{name}: the whole image, its tissue outlined"),
        f"{width:.2g} &times; {height:.2g} mm; {keys}",
    )
    if figures.fields_of_view is not None:
        highest = f"{figures.highest_density:,}"
        density = _img(
            image.pictures / "density.png",
            f"{name}: density of nuclei, in colours from 0 to {highest} per mm2 of tissue",
            "pixels",
        )
        scale = f'<div class="scale">0 <span></span> {highest} and more nuclei per mm&sup2;</div>'
        maps += _figure(density, scale)
    stain = figures.stain
    shape = charts.histogram(
        f"Areas of nuclei in {image.name}",
        "µm²",
        figures.area.counts,
        figures.area.highest,
        figures.area.median,
    )
    colour = charts.histogram(
        f"{stain.name} of nuclei in {image.name}",
        "optical density",
        stain.counts,
        stain.highest,
        stain.median,
    )
    told = f'<div class="maps">{maps}</div>'
    if fields := [_field(field, image) for field in figures.fields_of_view or ()]:
        told += f'<h4>Fields worth a look</h4><div class="fields">{"".join(fields)}</div>'
    return (
        f'{told}<div class="charts"><figure><h4>Area of nuclei</h4>{shape}</figure>'
        f"<figure><h4>{escape(stain.name)}, mean of each nucleus</h4>{colour}</figure></div>"
    )


def _field(field: FieldOfViewRecord, image: FoundImage) -> str:
    density, kind = f"{field.density:,}", escape(field.kind)
    where = f"x {field.x:,}, y {field.y:,} px"
    nuclei = f"{field.nuclei} nuclei"
    width, height = field.width, field.height
    alt = f"{kind} field of {escape(image.name)}: {nuclei}, at {where}"
    number = int(field.picture.removeprefix("field-").removesuffix(".jpg"))
    picture = _img(image.pictures / f"field-{number}.jpg", alt, size=(width, height))
    paths = "".join(_path(outline) for outline in field.contours)
    return _figure(
        f'<div class="field">{picture}<svg viewBox="0 0 {width * CONTOUR_UNITS} '
        f'{height * CONTOUR_UNITS}" aria-hidden="true"><path d="{paths}"/></svg></div>',
        f"<b>{kind.capitalize()}</b>: {nuclei}, {density} per mm&sup2;, mean entropy "
        f"{field.entropy:.2f} bit<br>{field.um} µm wide, at {where}",
    )


def _path(outline: Sequence[Any]) -> str:
    """[x, y, x, y, ...] as steps from point to point, which are shorter to write."""
    xy = [int(number) for number in outline]
    steps = [b - a for a, b in zip(xy, xy[2:], strict=False)]
    return f"M{xy[0]} {xy[1]}l{' '.join(map(str, steps))}z".replace(" -", "-")


def models(found: Sequence[FoundModel], charts: Charts) -> str:
    """How each model learnt."""
    parts = ["<h2>Models</h2>"] if found else []
    for model in found:
        opened = " open" if len(found) == 1 else ""
        used = f"{len(model.images)} image{'s' * (len(model.images) != 1)} of this project"
        told = _guarded(lambda model=model: _learning(model, charts))  # type: ignore[misc]
        parts.append(
            f'<details class="card"{opened}><summary><h3>{escape(model.name)}</h3>'
            f'<span class="soft">made the nuclei of {used}</span></summary>'
            f"<div>{told}</div></details>"
        )
    return "\n".join(parts)


def _learning(model: FoundModel, charts: Charts) -> str:
    training = model.record.training
    first = training.get("patchcl", training)
    told = _patch_contrast(model.name, first, charts)
    if first is not training and "loss" in training:
        told += (
            "<h4>Self-training: confident nuclei teach the network that parts them</h4>"
            f"<p>{len(training['loss']):,} steps, all that the settings ask for. "
            f"{float(training['known']):.0%} of the training pixels taught, "
            f"{float(training['sure_nucleus']):.0%} as nuclei.</p>"
        )
        told += _chart(
            "Loss", charts.curves(f"{model.name}: loss of self-training", "step", _lines(training))
        )
    if "cdcl" in training:
        steps: list[dict[str, Any]] = training["cdcl"]
        names = dict.fromkeys(name for step in steps for name in step)
        series = {str(n): [float(step.get(n, 0)) for step in steps] for n in names}
        told += (
            "<h4>CDCL: corrected fields refine it</h4>"
            f"<p>{len(steps):,} steps from model {escape(str(training['refined_from'])[:12])}; "
            "the teacher is listened to after a while, hence the jump.</p>"
        )
        told += _chart("Losses", charts.curves(f"{model.name}: losses of CDCL", "step", series))
    return told


def _lines(training: dict[str, Any]) -> dict[str, list[float]]:
    return {"loss": [float(value) for value in training["loss"]]}


def _chart(name: str, chart: str) -> str:
    return f'<div class="charts"><figure><h4>{name}</h4>{chart}</figure></div>'


def _patch_contrast(name: str, log: dict[str, Any], charts: Charts) -> str:
    """PatchCL: its curves, why it stopped, its channels."""
    told = "<h4>PatchCL: contrast of patches, without labels</h4>"
    if "loss" not in log:
        return ""
    steps, marks = int(log["steps"]), {}
    converged = log.get("converged_at")
    why = f"Training ended at step {steps:,}"
    if converged is not None:
        marks = {f"converged: step {int(converged):,}": float(converged)}
        why += (
            f": at step {int(converged):,} it had converged, as positive and negative patches were "
            "hardly farther apart than before (5 % at most); "
            f"{steps - int(converged):,} more steps followed at a falling learning rate"
        )
    elif "converged_at" in log:
        why += ", the last that the settings allow, before it had converged"
    told += f"<p>{why}.</p>"
    alike = [float(value) for value in log["positive_positive"]]
    unlike = [float(value) for value in log["positive_negative"]]
    apart = {
        "separation": [b - a for a, b in zip(alike, unlike, strict=True)],
        "positive to negative": unlike,
        "positive to positive": alike,
    }
    told += (
        '<div class="charts"><figure><h4>Loss</h4>'
        + charts.curves(f"{name}: loss of PatchCL", "step", _lines(log), marks)
        + "</figure><figure><h4>Separation of positive and negative patches</h4>"
        + charts.curves(f"{name}: distances of patches", "step", apart, marks)
        + "</figure></div>"
    )
    if "channels" in log:
        told += _channels(log["channels"], log["hematoxylin_correlation"])
    return told


def _channels(channels: dict[str, Any], correlation: Sequence[Any]) -> str:
    chosen = int(channels["chosen"])
    low = " (it is low on nuclei, and was turned round)" if channels["inverted"] else ""
    shown = [_figure(_embedded(channels["crop"], "A crop that was learnt from"), "the crop")]
    for i, (picture, r) in enumerate(zip(channels["confidences"], correlation, strict=True)):
        is_chosen = i == chosen
        words = f"channel {i + 1}, r = {float(r):.2f}" + (", <b>chosen</b>" if is_chosen else "")
        alt = f"Confidence of channel {i + 1}{', which was chosen' if is_chosen else ''}"
        shown.append(_figure(_embedded(picture, alt), words, "chosen" if is_chosen else ""))
    return (
        f"<h4>The {len(shown) - 1} confidence channels</h4>"
        f"<p>Channel {chosen + 1} was chosen{low}: of all, its confidence goes most closely with "
        "hematoxylin, either way (r is their correlation). White is sure, black is sure of the "
        f'opposite.</p><div class="channels">{"".join(shown)}</div>'
    )


def made(runs: Sequence[FoundRun]) -> str:
    """Versions and settings of the runs that made the nuclei."""
    parts = ['<h2 id="made">What made these nuclei</h2>']
    for run in runs:
        parts.append(
            f'<details class="card" open><summary><h3>Run {escape(run.id)}</h3></summary>'
            f"<div>{_guarded(lambda run=run: _facts(run))}</div></details>"  # type: ignore[misc]
        )
    if not runs:
        parts.append("<p>Nothing yet.</p>")
    return "\n".join(parts)


def _facts(run: FoundRun) -> str:
    result = run.result
    rows = {
        "images": ", ".join(run.images) if len(run.images) <= 10 else str(len(run.images)),
        "patchcl-qupath": result.version,
        "model": result.model,
        "engine": result.engine,
        "only within": ", ".join(result.within),
        "packages": ", ".join(f"{k} {v}" for k, v in run.versions.items()),
    }
    listed = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>"
        for key, value in rows.items()
        if value
    )
    config = escape(json.dumps(result.config, indent=2, ensure_ascii=False))
    return (
        f"<dl>{listed}</dl><details><summary>Settings</summary>"
        f'<pre tabindex="0">{config}</pre></details>'
    )


def _figure(inside: str, caption: str, kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f"<figure{of_kind}>{inside}<figcaption>{caption}</figcaption></figure>"


def _img(path: Path, alt: str, kind: str = "", size: tuple[int, int] | None = None) -> str:
    """A picture in the page itself. ``alt`` is escaped already."""
    mime = "image/png" if path.suffix == ".png" else "image/jpeg"
    return _data(path.read_bytes(), mime, alt, kind, size)


def _embedded(picture: Any, alt: str) -> str:
    """A JPEG that is in base64 already, or so its file says."""
    return _data(b64decode(str(picture), validate=True), "image/jpeg", alt, "", None)


def _data(content: bytes, mime: str, alt: str, kind: str, size: tuple[int, int] | None) -> str:
    more = f' class="{kind}"' if kind else ""
    more += f' width="{size[0]}" height="{size[1]}"' if size else ""
    return (
        f'<img loading="lazy" alt="{alt}"{more} src="data:{mime};base64,'
        f'{b64encode(content).decode()}">'
    )
