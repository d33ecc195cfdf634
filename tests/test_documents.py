"""Documents from memory or from an Arrow file are the same documents, whatever holds them."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_text_model
import torch
from hypothesis import given
from hypothesis import strategies as st

import tuned_lens_fast as tl
from tuned_lens_fast.data.dataset import shares_of
from tuned_lens_fast.data.documents import read_documents
from tuned_lens_fast.data.parts import Batch

HELD = [[5, 6, 7], [1], [255, 0, 3, 3], [9, 9]]


@pytest.fixture(scope="module")
def model():
    return tiny_text_model.make()[0]


def on_disk(folder, kind):
    """An Arrow array that is mapped from a file, in two chunks of which the first is a slice."""
    chunks = [pa.array([[77], *HELD[:3], [88]], kind)[1:4], pa.array([], kind), pa.array(HELD[3:], kind)]
    path = folder / "tokens.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("input_ids", kind)])) as writer:
        for chunk in chunks:
            writer.write_batch(pa.record_batch([chunk], names=["input_ids"]))
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["input_ids"]


@pytest.mark.parametrize("value", [pa.int32(), pa.int64(), pa.uint16()], ids=str)
@pytest.mark.parametrize("of", [pa.list_, pa.large_list])
def test_what_an_arrow_file_holds(of, value, model, tmp_path):
    before = pa.total_allocated_bytes()
    column = on_disk(tmp_path, of(value))
    found = read_documents(model, column)
    assert pa.total_allocated_bytes() - before < 1000, "the values stay in the file"
    assert [ids.tolist() for ids in found] == HELD
    assert found.lengths() == [*map(len, HELD)]
    assert found.used() == sorted({token for ids in HELD for token in ids})
    assert found[-1].dtype == torch.int32
    assert [ids.tolist() for ids in found[1:3]] == HELD[1:3]
    with pytest.raises(IndexError):
        found[4]


def test_every_source_is_the_same_run(model, tmp_path):
    pq.write_table(pa.table({"input_ids": HELD}), tmp_path / "tokens.parquet")
    sources = [
        HELD,
        iter(HELD),
        (np.array(ids, np.int16) for ids in HELD),
        [torch.tensor(ids) for ids in HELD],
        on_disk(tmp_path, pa.list_(pa.int32())),
        pq.read_table(tmp_path / "tokens.parquet", memory_map=True)["input_ids"],
    ]
    lens = tl.LogitLens.from_model(model)
    for source in sources:
        tl.decode_documents(model, lens, source, out=tmp_path / "run")  # another text would be refused
    assert len(pq.read_table(tmp_path / "run")) == 4 * sum(map(len, HELD))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(range(12)), 3)[1:]
    assert [ids.tolist() for ids in read_documents(model, fixed)] == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        (pa.array([[1], [2, 260]]), IndexError, "documents: document 1: got 260, wanted ids from 0 to 259"),
        (pa.chunked_array([[[1], [2]], [[3], [4, -1]]]), IndexError, "documents: document 3: got -1"),
        (pa.array([[1], []], pa.list_(pa.int32())), ValueError, r"document 1 has shape \[0\]"),
        (pa.array([[1], None]), ValueError, "documents: got a pyarrow array with nulls"),
        (pa.array([[1, None]]), ValueError, "documents: got a pyarrow array with nulls"),
        (pa.array([["a"]]), TypeError, "documents: got a pyarrow array of list<.*string>, wanted one of lists of int"),
        (pa.array([1, 2]), TypeError, "documents: got a pyarrow array of int64"),
        (pa.array([], pa.list_(pa.int32())), ValueError, "documents: got none"),
    ],
)
def test_bad_arrays_are_named(documents, error, message, model, tmp_path):
    with pytest.raises(error, match=message):
        tl.decode_documents(model, tl.LogitLens.from_model(model), documents, out=tmp_path / "run")
    assert os.listdir(tmp_path) == []


@given(
    counts=st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=5), min_size=1, max_size=30),
    layers=st.integers(1, 3),
    answer=st.sampled_from([1, 2**16, 2**30]),
)
def test_shares(counts, layers, answer):
    """Every chunk is in one part, parts are as large as they should be, and a share ends with its batches."""
    planned = [(Batch([number], [*range(1, len(of) + 1)]), of) for number, of in enumerate(counts)]
    shares = shares_of(planned, layers, answer)
    assert [batch for share in shares for batch in share.batches] == [batch for batch, _ in planned]
    least = min(96 * 2**20 // (layers * answer), sum(map(sum, counts)) // 64)
    left = [*counts]
    for number, share in enumerate(shares):
        chunks = [count for _ in share.batches for count in left.pop(0)]
        assert share.ends[-1] == len(chunks)
        parts = [chunks[start:end] for start, end in zip([0, *share.ends], share.ends, strict=False)]
        assert [layers * sum(part) for part in parts] == share.rows
        for part in parts[:-1]:
            assert sum(part) >= least
            assert sum(part[:-1]) < max(1, least)
        assert number + 1 == len(shares) or sum(parts[-1]) >= least
        assert len(share.batches) == 1 or sum(chunks[: -len(share.batches[-1].boundaries)]) < max(1, least)
