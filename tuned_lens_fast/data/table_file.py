"""A table of statistics as one file, Parquet or CSV, that tables and spreadsheets read back as it was.

It stands at the end of the way from hidden state to statistics, beside the folder that ``parts`` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.messages import json_text

if TYPE_CHECKING:
    import pyarrow as pa


def write_table(path: Path, table: pa.Table) -> None:
    """Write ``table`` to ``path``, as CSV if it is named so, else as Parquet; the file is whole or not there.

    A cell of CSV holds no list: entry i of ``top_ids`` is in the column ``top_id_i``. Nor does it hold any text as it
    is: readers disagree about ends of lines inside of quotes, take "NA" for a missing value, and run what begins with
    "=", "+", "-" or "@" as a formula. So text is written as JSON, in quotes, with all that is no printable character
    escaped.
    """
    import pyarrow.csv
    import pyarrow.parquet

    with atomic_write(path) as aside:
        if path.suffix.lower() == ".csv":
            pyarrow.csv.write_csv(_flat(table), aside)
        else:
            pyarrow.parquet.write_table(table, aside, compression="zstd")


def _flat(table: pa.Table) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    columns: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_list(column.type):
            length = pc.max(pc.list_value_length(column)).as_py() or 0
            columns |= {f"{name.removesuffix('s')}_{i}": pc.list_element(column, i) for i in range(length)}
        elif pa.types.is_dictionary(column.type) or pa.types.is_string(column.type):
            text = column.cast(pa.string()).combine_chunks().dictionary_encode()
            written = pa.array([json_text(value) for value in text.dictionary.to_pylist()], pa.string())
            columns[name] = written.take(text.indices)
        else:
            columns[name] = column
    return pa.table(columns)
