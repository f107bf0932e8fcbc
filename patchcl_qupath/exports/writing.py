"""Tables as CSV and as Parquet, written a batch at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from patchcl_qupath.storage.files import atomic_write

_ROW_GROUP = 65_536  # rows, at least
_MARK = b"\xef\xbb\xbf"  # of UTF-8, by which Excel knows it
# Excel knows months by the language of the system: OKT3 is a date in German.
_MONTH = (
    "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mär|mrz|mai|okt|dez|fév|avr|aoû|déc|mrt|mei|"
    "ene|abr|ago|dic|gen|mag|giu|lug|set|ott|fev|out|maj)[a-z]*"
)
# Texts that Excel would calculate, or change into a number, a date or a time: 0012, 1-2, 2e5, 5%,
# (5), $5, 5 €, 5 A, =A1, SEPT2, Jan 5, 2020, 5. März.
_CHANGED = (
    r"(?i)^\s*([=+\-@\t]|[($€£]*\s*[0-9][0-9\s.,:/e+\-]*[%)$€£]*(\s[ap]m?)?\s*$|true$|false$|"
    rf"[0-9]{{1,4}}[-/ .]*{_MONTH}([-/ .,]|$)|{_MONTH}[-/ .]*[0-9]{{1,4}}(,? *[0-9]{{1,4}})?$)"
)


def write_csv(
    path: Path, schema: pa.Schema, batches: Iterable[pa.Table], *, excel: bool = False
) -> int:
    """Write a table as CSV in UTF-8; returns the number of rows. Raises StorageError.

    ``excel``: with the mark by which Excel knows UTF-8, and texts such as 0012 so that Excel leaves
    them as they are.
    """
    rows = 0
    options = pa.csv.WriteOptions(include_header=False, quoting_style="needed")
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write((_MARK if excel else b"") + _header(schema.names))
        with pa.csv.CSVWriter(file, schema, write_options=options) as writer:
            for batch in batches:
                writer.write_table(_for_excel(batch) if excel else batch)
                rows += len(batch)
    return rows


def write_parquet(path: Path, schema: pa.Schema, batches: Iterable[pa.Table]) -> int:
    """Write a table as Parquet; returns the number of rows. Raises StorageError."""
    rows = 0
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for group in _joined(batches):
            writer.write_table(group)
            rows += len(group)
    return rows


def _joined(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables, small ones together: each becomes a row group, and readers look at all of these."""
    waiting: list[pa.Table] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _header(names: list[str]) -> bytes:
    """The first line: names of columns, quoted where it is needed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(names)
    return text.getvalue().encode()


def _for_excel(table: pa.Table) -> pa.Table:
    """Texts that Excel would change, as formulas whose value is the text."""
    for number, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            column = table[field.name].dictionary_encode().combine_chunks()
            texts = column.dictionary
            doubled = pc.replace_substring(texts, '"', '""')
            formulas = pc.binary_join_element_wise('="', doubled, '"', "")
            kept = pc.if_else(pc.match_substring_regex(texts, _CHANGED), formulas, texts)
            table = table.set_column(number, field, kept.take(column.indices))
    return table
