"""Scores of detection and separation of nuclei, on all sets of images with ground truth.

    python benchmarks/quality.py [--data DIR] [--sets NAME ...] [--rows NAME ...] [--seeds N]
                                 [--images N] [--config TOML] [--pseudo-labels] [--pictures DIR]
                                 [--cache DIR | --no-cache] [--json]
    python benchmarks/quality.py --compare BEFORE AFTER

DIR has a folder for each labelled set, with the folders images and labels, and the folder
no_nuclei. Of each set, all images are in one project; each row trains a model on it as
`patchcl-qp run` does, and its nuclei are scored as `patchcl-qp score` does: the means of Dice, AJI,
PQ and F1 over images, nuclei of each kind per 100 true ones, and the objects that the model finds
per mm² of fat, collagen (which have a few nuclei), ink and glass (which have none). "Foreseen" is
the rank correlation, over images, of the fraction of nuclei that their probabilities expect to be
wrong with 1 - F1. Means of the trainings, one for each seed, are printed, ± half of their range.
Labels are only used for scores, except by the rows of CDCL, which train with a few labelled images
or ROIs, and by paper-by-labels: it trains with the settings of the paper, without labels, and
prints the semantic Dice (of pixels, nuclei not separated) of the choices that the program makes,
and of those that labels would make.

A change counts if it helps, or does not hurt, on every set: save the output with --json of both
versions in files, and compare them. --pseudo-labels prints what the pseudo-labels are worth that
a training learns from, without training on them. What did not change since an earlier call is
taken from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch is imported

from bench.cache import Cache, default_folder
from bench.measure import Bench
from bench.rows import BASELINE, PSEUDO_LABELS, ROWS, TRAINED, measured
from bench.sets import MPP, ImageSet, empty_sets, labelled_sets
from bench.table import (
    MEAN,
    Column,
    Measures,
    Results,
    columns_of,
    compare,
    mean_of_sets,
    read_results,
    show,
    show_titles,
)
from patchcl_qupath.config import Config, load_config

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and with --json the same as one line."""
    options = parser().parse_args(arguments)
    if options.compare:
        compare(*map(read_results, options.compare))
        return
    sets = labelled_sets(options.data, options.sets, options.images)
    bench = Bench(
        cache=Cache(None if options.no_cache else options.cache),
        empty=tuple(empty_sets(options.data, options.images)),
        pictures=options.pictures,
    )
    rows = [PSEUDO_LABELS] if options.pseudo_labels else options.rows
    config = load_config(options.config)
    columns = columns_of(rows)
    show_titles(columns)
    table: Results = {}
    for row in rows:
        table |= results(bench, sets, row, config, options.seeds, columns)
    if options.json:
        images = {each.name: len(each.images) for each in sets}
        print(json.dumps({"images": images, "seeds": options.seeds, "rows": table}))


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--data", type=Path, default=DATA, help="folder of the labelled sets")
    add("--sets", nargs="+", choices=[*MPP], default=[*MPP], help="default: all")
    add("--rows", nargs="+", choices=ROWS, default=[BASELINE, *TRAINED])
    add("--images", type=int, help="use only the first N of each set")
    add("--seeds", type=int, default=1, help="number of trainings, by seed")
    add("--config", type=Path, help="TOML file with settings, as for patchcl-qp run")
    add("--pseudo-labels", action="store_true", help="print only what pseudo-labels are worth")
    add("--pictures", type=Path, help="draw the errors of each image into this folder")
    add("--cache", type=Path, default=default_folder(), help="folder; default: %(default)s")
    add("--no-cache", action="store_true", help="compute all, and keep nothing")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="of --json, in files")
    return made


def results(
    bench: Bench,
    sets: list[ImageSet],
    row: str,
    config: Config,
    seeds: int,
    columns: tuple[Column, ...],
) -> Results:
    """Measure a row on each set, print it as soon as it is there, and then the mean of the sets."""
    table: Results = {}
    for images in sets:
        trainings: dict[str, list[Measures]] = {}
        for seed, by_name in enumerate(measured(bench, images, row, config, seeds)):
            for name, measures in by_name.items():
                trainings.setdefault(name, []).append(measures)
                if seeds > 1 and row != BASELINE:
                    show(f"{name}, {seed}", images.name, [measures], columns)
        for name, of_set in trainings.items():
            show(name, images.name, of_set, columns)
            table.setdefault(name, {})[images.name] = of_set
    if len(sets) > 1:
        for name, by_set in table.items():
            show(name, MEAN, mean_of_sets(by_set), columns)
    return table


if __name__ == "__main__":
    main()
