"""CSV files of a run: one file a table, and columns.csv, which describes the columns.

A float is written with as many digits as give the same float back, NaN as `nan`; what was not
sampled stays empty.
"""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.csv import CSVWriter

from geodiag.export.selection import Choice
from geodiag.metrics.schema import METRICS, SCHEMAS

COLUMNS = "columns.csv"
_KEYS = {
    "rank": "Process that recorded the row; of merged ranks, the first.",
    "attempt": "Counts up with every rollback and resume, which repeat steps.",
    "step": "Optimizer step, from 0.",
    "routing_mode": "off, warmup, on or drain: what anticipatory routing did.",
    "layer": "Layer, from 0.",
    "site": "attn, ffn or block: the residual site in the layer.",
    "expert": "Expert of the layer, from 0.",
    "map": "Which residual map: pre, post or res.",
    "i": "Row of the map.",
    "j": "Column of the map.",
    "value": "Entry of the map, mean over tokens.",
    "token": "Place of the traced token in the probe batch.",
    "token_id": "Its id in the vocabulary.",
    "experts": "The experts it chose, heaviest first, with blanks between.",
    "domain": "Domain of the data, as the loader names it.",
    "kind": "Kind of the event.",
    "message": "What happened, in words.",
    "data": "Details, as JSON.",
    "time": "Seconds since 1970.",
}


class CsvFiles:
    """Writes tables piece by piece; see `geodiag.export.run_export.Files`."""

    def __init__(self, folder: Path, choice: Choice) -> None:
        self._folder, self._choice = folder, choice
        self._open: dict[str, CSVWriter] = {}
        self.rows_by_file: dict[str, int] = {}

    @property
    def tags(self) -> None:
        return None

    @property
    def values(self) -> int:
        return sum(self.rows_by_file.values())

    def write(self, table: str, rows: pa.Table) -> None:
        if not len(rows) and not self._choice.asked:
            return
        rows, name = as_text(rows), f"{table}.csv"
        if table not in self._open:
            self._open[table] = CSVWriter(str(self._folder / name), rows.schema)
            self.rows_by_file[name] = 0
        self._open[table].write_table(rows)
        self.rows_by_file[name] += len(rows)

    def finish(self) -> None:
        self.abandon()
        with (self._folder / COLUMNS).open("w", newline="", encoding="utf-8") as f:
            out = csv.writer(f, lineterminator="\n")
            out.writerow(["table", "column", "type", "unit", "meaning"])
            out.writerows(
                [t, *_about(t, name)] for t in self._open for name in self._choice.tables[t]
            )

    def abandon(self) -> None:
        for writer in self._open.values():
            writer.close()


def as_text(rows: pa.Table) -> pa.Table:
    """Return the rows with columns that CSV can hold: categories and lists become text."""
    columns = []
    for column in rows.columns:
        if pa.types.is_dictionary(column.type):
            column = column.cast(pa.string())
        elif pa.types.is_list(column.type):
            column = pc.binary_join(column.cast(pa.list_(pa.string())), " ")
        columns.append(column)
    return pa.table(columns, names=rows.column_names)


def _about(table: str, name: str) -> list[str]:
    kind = SCHEMAS[table].field(name).type
    type_name = str(kind)
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind):
        type_name = "text"
    elif pa.types.is_list(kind):
        type_name = "numbers"
    type_name = {"float": "float32", "double": "float64"}.get(type_name, type_name)
    if (table, name) in METRICS:
        metric = METRICS[table, name]
        return [name, type_name, metric.unit, metric.help]
    return [name, type_name, "s" if name == "time" else "", _KEYS[name]]
