"""What pandas, polars, DuckDB and Python's csv read out of a file is what was written, whatever the text in it."""

import csv
import json
import os
import tempfile
from pathlib import Path

import duckdb
import pandas
import polars
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuned_lens_fast.data.table_file import write_table

WILD = [
    *("=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "\nx", "a\r\nb", "a\x85b", "a\u2028b", "a\u2029b", "a\x0bb"),
    *("", " ", "  x  ", '"', '""', "'", "'=1", "a,b", "a;b", "a|b", "NA", "nan", "null", "None", "true", "1", "1e5"),
    *("\x00", "\x1b[31m", "\u202eabc", "\ufeff", "\\", "\\n", "#x", "2026-01-01", "Ġthe", "▁日本", "🙂", "é", "<b>"),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(WILD) | st.text(max_size=5), min_size=1, max_size=30)


def table(texts):
    return pa.table(
        {
            "document": pa.array(texts),
            "layer": pa.array(range(len(texts)), pa.int32()),
            "token": pa.array(texts).dictionary_encode(),
            "kl": pa.array([0.1 * i for i in range(len(texts))], pa.float32()),
            "top_ids": pa.array([[i, 2 * i] for i in range(len(texts))], pa.list_(pa.int32())),
        }
    )


def readers(path):
    """What each reader finds in a file: columns by name."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    yield {name: [row[name] for row in rows] for name in rows[0]}
    yield pandas.read_csv(path).to_dict("list")
    yield polars.read_csv(path).to_dict(as_series=False)
    with duckdb.connect() as database:
        yield database.read_csv(str(path)).pl().to_dict(as_series=False)


def compare(texts, path):
    write_table(path, table(texts))
    # A spreadsheet, too, ends no row inside of a cell that has no end of line in it.
    assert path.read_bytes().count(b"\n") == len(texts) + 1
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(texts) + 1
    for found in readers(path):
        assert [*found] == ["document", "layer", "token", "kl", "top_id_0", "top_id_1"]
        for name in ("document", "token"):
            assert [json.loads(cell) for cell in found[name]] == texts
            assert all(cell.startswith('"') and cell.isprintable() for cell in found[name])
        assert [*map(int, found["layer"])] == [*range(len(texts))]
        assert [*map(int, found["top_id_1"])] == [2 * i for i in range(len(texts))]
        assert [*map(float, found["kl"])] == pytest.approx([0.1 * i for i in range(len(texts))])


def test_every_wild_text_alone_and_all_of_them(tmp_path):
    compare(WILD, tmp_path / "x.csv")
    for text in WILD:
        compare([text], tmp_path / "x.csv")


def test_the_ways_back_that_the_docs_name(tmp_path):
    path = tmp_path / "x.csv"
    texts = [text for text in WILD if "\0" not in text]
    write_table(path, table(texts))
    decoded = polars.read_csv(path).with_columns(polars.col("token").str.json_decode(polars.String))
    assert decoded["token"].to_list() == texts
    with duckdb.connect() as database:
        rows = database.sql(f"SELECT token::JSON ->> '$' FROM '{path}'").fetchall()
    assert [text for (text,) in rows] == texts


@settings(max_examples=15, deadline=None)
@given(texts=TEXTS)
def test_any_text(texts):
    with tempfile.TemporaryDirectory() as folder:
        compare(texts, Path(folder) / "x.csv")


def test_parquet_has_the_table_as_it_is(tmp_path):
    written = table(WILD)
    write_table(tmp_path / "x.parquet", written)
    assert polars.read_parquet(tmp_path / "x.parquet")["token"].to_list() == WILD
    assert pandas.read_parquet(tmp_path / "x.parquet").top_ids.map(list).tolist()[3] == [3, 6]


def test_missing_and_special_numbers(tmp_path):
    path = tmp_path / "x.csv"
    numbers = [1.5, None, float("nan"), float("inf"), 1e-30, 3.4028235e38]
    write_table(path, pa.table({"token": ["a", None, "b", "c", "d", "e"], "kl": pa.array(numbers, pa.float32())}))
    frame = pandas.read_csv(path)
    assert frame.token.isna().tolist() == [False, True, False, False, False, False]
    assert frame.kl.astype("float32").tolist()[3:] == pa.array(numbers[3:], pa.float32()).to_pylist()
    assert frame.kl.isna().tolist() == [False, True, True, False, False, False]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_text("old")
    monkeypatch.setattr("pyarrow.csv.write_csv", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_table(path, table(["a"]))
    assert os.listdir(tmp_path) == ["x.csv"]
    assert path.read_text() == "old"
