"""A folder of Parquet holds what decode_model returns, reads anywhere, and refuses what does not belong in it."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq
import pytest
import tiny_text_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_text_model import LAYERS
from torch import nn

import tuned_lens_fast as tl
from tuned_lens_fast import progress
from tuned_lens_fast.data import fingerprint, parts
from tuned_lens_fast.data.dataset import pack
from tuned_lens_fast.engines import ENGINES

LENGTHS = (70, 3, 1, 25, 24, 200)


@pytest.fixture(scope="module")
def tiny():
    return tiny_text_model.make()


@pytest.fixture(scope="module")
def lens(tiny):
    return tl.LogitLens.from_model(tiny[0])


@pytest.fixture(scope="module")
def documents():
    torch.manual_seed(3)
    return [torch.randint(0, 256, (length,)) for length in LENGTHS]


@pytest.fixture(scope="module")
def folder(tiny, lens, documents, tmp_path_factory):
    """A run over all documents; the longest takes chunks, others share a batch."""
    model, tokenizer = tiny
    out = tmp_path_factory.mktemp("data") / "run"
    names = [f"text {i}" for i in range(len(documents))]
    path = tl.decode_documents(
        model, lens, documents, out=out, ids=names, tokenizer=tokenizer, top_k=2, watch=[7], chunk=90
    )
    assert path == out
    return out


def test_rows_are_those_of_decode_model(folder, tiny, lens, documents):
    model, tokenizer = tiny
    shares = json.loads((folder / "_run.json").read_text())["shares"]
    assert max(len(share["rows"]) for share in shares) == 3
    batches = [batch for share in shares for batch in share["batches"]]
    assert max(len(batch["documents"]) for batch in batches) == 2
    frame = pandas.read_parquet(folder)
    assert len(frame) == (LAYERS + 1) * sum(LENGTHS)
    for i, ids in enumerate(documents):
        rows = frame[frame.document == f"text {i}"].sort_values(["layer", "position"])
        wanted = tl.decode_model(model, lens, ids, top_k=2, watch=[7])
        shape = (LAYERS + 1, len(ids))
        assert (rows.layer.to_numpy().reshape(shape) == np.arange(LAYERS + 1)[:, None]).all()
        assert (rows.position.to_numpy().reshape(shape) == np.arange(len(ids))).all()
        assert (rows.token_id.to_numpy().reshape(shape) == ids.numpy()).all()
        assert rows.token.tolist() == tokenizer.convert_ids_to_tokens(ids.tolist()) * (LAYERS + 1)
        last = rows.position == len(ids) - 1
        for name in ("target", "log_prob", "rank"):
            assert (rows[name].isna() == last).all(), "null where there is no target, and only there"
        assert (rows.target[~last].to_numpy().reshape(LAYERS + 1, -1) == ids[1:].numpy()).all()
        assert (rows["rank"].to_numpy().reshape(shape)[:, :-1] == wanted.rank.numpy()[:, :-1]).all()
        for name in ("log_prob", "entropy", "max_prob", "kl", "lse"):
            np.testing.assert_allclose(
                rows[name].to_numpy().reshape(shape), getattr(wanted, name).numpy(), atol=1e-4, err_msg=name
            )
        for name in ("top_ids", "top_log_probs", "watch_log_probs"):
            np.testing.assert_allclose(
                np.stack(rows[name].to_list()).reshape(*shape, -1), getattr(wanted, name).numpy(), atol=1e-4
            )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_rows(side, tiny, lens, tmp_path):
    model, _ = tiny
    ids = torch.randint(0, 256, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, slice(None, 13) if side == "left" else slice(7, None)] = 0
    out = tl.decode_model(model, lens, ids, attention_mask=mask, chunk=6, out=tmp_path / "run")
    frame = pandas.read_parquet(out)
    assert len(frame) == (LAYERS + 1) * 27
    rows = frame[frame.document == 0].sort_values(["layer", "position"])
    assert rows.position.tolist() == [*range(7)] * (LAYERS + 1), "counted in the document"
    alone = tl.decode_model(model, lens, ids[0, 13:] if side == "left" else ids[0, :7])
    np.testing.assert_allclose(rows.entropy.to_numpy().reshape(LAYERS + 1, 7), alone.entropy.numpy(), atol=1e-4)


def test_what_is_not_asked_for_is_no_column(tiny, lens, tmp_path):
    model, _ = tiny
    ids = torch.randint(0, 256, (9,))
    out = tl.decode_model(model, lens, ids, targets=None, stats=["entropy"], layers=[2], out=tmp_path / "run")
    table = pq.read_table(out)
    assert table.column_names == ["document", "layer", "position", "token_id", "lse", "entropy"]
    assert table["layer"].unique().to_pylist() == [2, LAYERS]


def test_every_reader_reads_it(folder):
    rows = (LAYERS + 1) * sum(LENGTHS)
    glob = f"{folder}/*.parquet"
    by_pandas = pandas.read_parquet(folder)
    by_polars = polars.read_parquet(glob)
    assert len(by_pandas) == len(by_polars) == rows
    assert by_polars["document"].n_unique() == len(LENGTHS)
    ((count, mean, likeliest),) = duckdb.sql(
        f"SELECT count(*), avg(log_prob), sum(top_ids[1]) FROM '{glob}' WHERE document <> 'text 3'"
    ).fetchall()
    some = by_pandas[by_pandas.document != "text 3"]
    assert count == len(some)
    assert mean == pytest.approx(some.log_prob.astype(float).mean())
    assert likeliest == np.stack(some.top_ids.to_list())[:, 0].sum()
    others = by_polars.filter(polars.col("document") != "text 3")
    assert others["log_prob"].cast(polars.Float64).mean() == pytest.approx(mean)


def test_the_queries_of_the_docs(folder, tmp_path, monkeypatch):
    """The very text of docs/long-contexts.md, against the rows counted one by one."""
    text = (Path(__file__).parents[1] / "docs" / "long-contexts.md").read_text(encoding="utf-8")
    queries = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(queries) == 3
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    found = {}
    for query in queries:
        exec(query, found)

    by_place = {}
    for row in sorted(pq.read_table(folder).to_pylist(), key=lambda row: row["layer"]):
        by_place.setdefault((row["document"], row["position"]), []).append(row)
    settled = {}
    for place, rows in by_place.items():
        tops = [row["top_ids"][0] for row in rows]
        settled[place] = (tops[-1], max((i + 1 for i in range(len(tops)) if tops[i] != tops[-1]), default=0))
    answers = found["settled"].itertuples(index=False)
    assert {(row.document, row.position): (row.answer, row.settled) for row in answers} == settled
    assert len({layer for _, layer in settled.values()}) > 1

    for layer in range(LAYERS + 1):
        mean = np.mean([rows[layer]["kl"] for rows in by_place.values()], dtype=np.float64)
        assert found["kl"][layer] == pytest.approx(mean, rel=1e-5, abs=1e-7)

    first = {
        place: min(row["layer"] for row in rows if row["rank"] == 1)
        for place, rows in by_place.items()
        if any(row["rank"] == 1 for row in rows)
    }
    wanted = sorted(first, key=lambda place: (-first[place], *place))[:10]
    assert found["late"].rows() == [(*place, first[place]) for place in wanted]


def test_a_reader_can_skip(tiny, lens, tmp_path):
    """Row groups hold whole layers, and say which layers and positions."""
    model, _ = tiny
    tokens = [torch.randint(0, 256, (500,)) for _ in range(12)]
    out = tl.decode_documents(model, lens, tokens, out=tmp_path / "run")
    (path,) = out.glob("*.parquet")
    groups = pq.read_metadata(path)
    assert groups.num_row_groups == LAYERS + 1
    columns = pq.read_schema(path).names
    for i in range(groups.num_row_groups):
        layer = groups.row_group(i).column(columns.index("layer")).statistics
        assert (layer.min, layer.max) == (i, i)
        position = groups.row_group(i).column(columns.index("position")).statistics
        assert (position.min, position.max) == (0, 499)
    out = tl.decode_documents(model, lens, tokens[:1], out=tmp_path / "small")
    (path,) = out.glob("*.parquet")
    assert pq.read_metadata(path).num_row_groups == 1


def test_metadata(folder, tiny):
    for path in folder.glob("*.parquet"):
        made = json.loads(pq.read_metadata(path).metadata[parts.METADATA])
        assert made["model"] == type(tiny[0]).__name__
        assert re.fullmatch("LogitLens, [0-9a-f]{12}", made["lens"])
        assert made["tuned_lens_fast"] == tl.__version__
        assert made["torch"] == torch.__version__
        assert made["watch"] == [7]


def test_a_finished_run_returns_at_once(folder, tiny, lens, documents, monkeypatch):
    model, tokenizer = tiny
    names = [f"text {i}" for i in range(len(documents))]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "_lock"}
    rows = []
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model runs"))
    with progress.listen(rows.append, rows.append):
        tl.decode_documents(
            model,
            lens,
            (ids.tolist() for ids in documents),
            out=str(folder),
            ids=names,
            tokenizer=tokenizer,
            top_k=2,
            watch=torch.tensor([7]),
            memory_budget=2**30,
        )
    assert sum(rows) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "_lock"} == before


def test_the_first_plan_is_kept(tiny, lens, documents, tmp_path):
    model, _ = tiny
    out = tl.decode_documents(model, lens, documents, out=tmp_path / "run", chunk=90)
    wanted = pq.read_table(out).sort_by([(key, "ascending") for key in ("document", "layer", "position")])
    assert len(wanted) == (LAYERS + 1) * sum(LENGTHS)
    names = sorted(os.listdir(out))
    for path in sorted(out.glob("*.parquet"))[1::2]:
        path.unlink()
    reported, expected = [], []
    with progress.listen(reported.append, expected.append):
        tl.decode_documents(model, lens, documents, out=out)
    assert sum(reported) == sum(expected) > 0
    assert sorted(os.listdir(out)) == names
    found = pq.read_table(out).sort_by([(key, "ascending") for key in ("document", "layer", "position")])
    assert found["rank"].equals(wanted["rank"])
    np.testing.assert_allclose(found["kl"].to_numpy(), wanted["kl"].to_numpy(), atol=1e-5)


def test_another_run_is_refused(tiny, lens, documents, tmp_path):
    model, tokenizer = tiny
    out = tl.decode_documents(model, lens, documents, out=tmp_path / "run", tokenizer=tokenizer)

    def again(model=model, lens=lens, documents=documents, **changes):
        return tl.decode_documents(model, lens, documents, out=out, **{"tokenizer": tokenizer} | changes)

    again()
    edited = type(model)(model.config).eval()
    edited.load_state_dict(model.state_dict())
    again(model=edited, lens=tl.LogitLens.from_model(edited))
    edited.model.layers[1].mlp.up_proj.weight.data[0] += 1
    tuned = tl.TunedLens.from_model(model)
    with pytest.raises(
        ValueError, match=r"out: .* holds a run with another lens \(LogitLens, \w+ there, TunedLens, \w+ here\); name"
    ):
        again(lens=tuned)
    for changes, differs in (
        ({"model": edited, "lens": tl.LogitLens.from_model(edited)}, "model"),
        ({"documents": [*documents[:-1], documents[-1].flip(0)]}, "text"),
        ({"documents": documents[::-1]}, "text"),
        ({"ids": [5, 4, 3, 2, 1, 0]}, "ids"),
        ({"ids": [*"012345"]}, "ids"),
        ({"tokenizer": None}, "tokenizer"),
        ({"tokenizer": Shouting(tokenizer)}, "tokenizer"),
        ({"top_k": 3}, r"top_k \(0 there, 3 here\)"),
        ({"layers": [0]}, r"layers \(\[0, 1, 2\] there, \[0\] here\)"),
        ({"stats": ["kl"]}, "stats"),
        ({"watch": [1]}, "watch"),
        ({"targets": None}, "targets"),
    ):
        with pytest.raises(ValueError, match=f"out: .*run holds a run with another {differs}"):
            again(**changes)
    again()


def test_a_run_goes_on_with_the_engine_it_began_with(tiny, lens, documents, tmp_path, monkeypatch):
    model, _ = tiny
    out = tl.decode_documents(model, lens, documents, out=tmp_path / "run", engine="eager")
    for part in sorted(out.glob("*.parquet"))[1:]:
        part.unlink()
    recorded = json.loads((out / "_run.json").read_text())["identity"]["engine"]
    assert recorded == "eager"
    tl.decode_documents(model, lens, documents, out=out)
    assert len(pq.read_table(out)) == (LAYERS + 1) * sum(map(len, documents))
    ids = tl.decode_model(model, lens, documents[0], out=tmp_path / "one", engine="eager")
    tl.decode_model(model, lens, documents[0], out=ids)
    if tl.engines()["native"].startswith("ok"):
        with pytest.raises(ValueError, match=r"another engine \(eager there, native here\)"):
            tl.decode_documents(model, lens, documents, out=out, engine="native")
        monkeypatch.setattr(type(ENGINES["eager"]), "unavailable", lambda *_: None)
        monkeypatch.setattr(ENGINES["eager"], "unavailable", lambda *_: "gone", raising=False)
        with pytest.raises(ValueError, match=r"another engine \(eager there, native here\)"):
            tl.decode_documents(model, lens, documents, out=out)


def test_verbose_tells_the_batches_and_what_is_there(tiny, lens, documents, tmp_path, caplog):
    model, _ = tiny
    with caplog.at_level("INFO", logger="tuned_lens_fast.data.dataset"):
        out = tl.decode_documents(model, lens, documents, out=tmp_path / "run", chunk=6)
        first = caplog.messages[:]
        caplog.clear()
        sorted(out.glob("*.parquet"))[0].unlink()
        tl.decode_documents(model, lens, documents, out=out, chunk=6)
    parts = len(list(out.glob("*.parquet")))
    begun = rf"{len(documents)} documents in \d+ batches and {parts} parts, in chunks of up to 6 positions; "
    assert re.match(begun + "0 parts there", first[0])
    assert "memory budget" in first[1]
    assert re.match(begun + f"{parts - 1} parts there", caplog.messages[0])


class Shouting:
    """Agrees with another tokenizer on the first tokens, which are often the same special ones."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def convert_ids_to_tokens(self, ids):
        return [
            t if i < 10 else t.upper() + "!"
            for i, t in zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True)
        ]


def test_an_edit_anywhere_is_another_model():
    """A row of a large matrix, which a sample of its values passes over."""

    class Large(torch.nn.Module):
        config = SimpleNamespace(to_dict=dict)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(49152, 16))

    model = Large()
    before = fingerprint.of_model(model)
    assert fingerprint.of_model(model) == before
    for row in (7, 1234, 49151):
        model.weight.data[row] += 1
        after = fingerprint.of_model(model)
        assert after != before
        before = after


def test_the_default_dtype_does_not_matter(tiny, lens, tmp_path):
    wanted = tl.decode_model(tiny[0], lens, torch.arange(9), top_k=2, watch=[3])
    torch.set_default_dtype(torch.float64)
    try:
        out = tl.decode_model(tiny[0], lens, torch.arange(9), top_k=2, watch=[3], out=tmp_path / "run")
    finally:
        torch.set_default_dtype(torch.float32)
    frame = pandas.read_parquet(out).sort_values(["layer", "position"])
    for name in ("top_log_probs", "watch_log_probs"):
        found = np.stack(frame[name].to_list()).reshape(getattr(wanted, name).shape)
        np.testing.assert_allclose(found, getattr(wanted, name).numpy(), atol=1e-5)


def test_a_tuned_lens_is_told_from_another(tiny, documents, tmp_path):
    model, _ = tiny
    tuned = tl.TunedLens.from_model(model)
    out = tl.decode_documents(model, tuned, documents, out=tmp_path / "run")
    tuned[2].bias.data[7] += 1e-3
    with pytest.raises(ValueError, match="another lens"):
        tl.decode_documents(model, tuned, documents, out=out)


def test_a_norm_that_has_no_formula_is_told_from_another():
    norm = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8))
    norm[1].register_buffer("scale", torch.ones(8))
    lens = tl.LogitLens(tl.Unembed.from_modules(norm, nn.Linear(8, 11)))
    assert lens.unembed.norm.kind == "module"
    hashes = [fingerprint.of_lens(lens), fingerprint.of_lens(lens)]
    for tensor in (norm[0].bias, norm[1].scale):
        tensor.data[3] += 1
        hashes.append(fingerprint.of_lens(lens))
    assert hashes[0] == hashes[1]
    assert len({*hashes}) == 3


def test_other_things_are_left_alone(tiny, lens, documents, tmp_path):
    model, _ = tiny
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out: .* holds notes.txt, no part of this run"):
        tl.decode_documents(model, lens, documents, out=tmp_path)
    with pytest.raises(NotADirectoryError, match=r"notes.txt is a file, wanted a folder"):
        tl.decode_documents(model, lens, documents, out=tmp_path / "notes.txt")
    with pytest.raises(OSError, match=r"out: cannot write .*a/b: No such file"):
        tl.decode_documents(model, lens, documents, out=tmp_path / "a" / "b")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    out = tl.decode_documents(model, lens, documents, out=tmp_path / "run")
    (out / ".hidden").touch()
    tl.decode_documents(model, lens, documents, out=out)
    shutil.copy(next(out.glob("*.parquet")), out / "part-000099-000000.parquet")
    with pytest.raises(ValueError, match=r"holds part-000099-000000.parquet, no part of this run"):
        tl.decode_documents(model, lens, documents, out=out)
    assert (out / ".hidden").exists()


def test_tokens_without_text(tiny, lens, tmp_path):
    class Mute:
        def convert_ids_to_tokens(self, ids):
            return [None if token % 2 else str(token) for token in ids]

    out = tl.decode_documents(tiny[0], lens, [[1, 2, 3]], out=tmp_path / "run", tokenizer=Mute(), layers=[0])
    assert pandas.read_parquet(out).token.tolist() == ["", "2", ""] * 2


@pytest.mark.parametrize(
    ("documents", "options", "error", "message"),
    [
        ([], {}, ValueError, "documents: got none"),
        (7, {}, TypeError, "documents: got a int"),
        ([[1], []], {}, ValueError, r"document 1 has shape \[0\]"),
        ([[[1]]], {}, ValueError, r"document 0 has shape \[1, 1\]"),
        ([[1], ["a"]], {}, TypeError, "document 1 is a list, wanted token ids"),
        ([[1.5]], {}, TypeError, "document 0: got torch.float32"),
        ([[1], [-1]], {}, IndexError, "document 1: got -1"),
        ([[1]], {"ids": [1, 2]}, ValueError, "ids: got 2 for 1"),
        ([[1], [2]], {"ids": ["a", "a"]}, ValueError, "ids: some are there more than once"),
        ([[1], [2]], {"ids": ["a", 1]}, TypeError, "ids: got int, str"),
        ([[1]], {"ids": [2**70]}, ValueError, "ids: .*64 bits"),
        ([[1]], {"targets": "last"}, ValueError, "targets: got 'last'"),
        ([[1]], {"stats": ["mood"]}, ValueError, "stats: got 'mood'"),
        ([[1]], {"top_k": -1}, ValueError, "top_k: got -1"),
        ([[1]], {"layers": [9]}, IndexError, "layers: got 9"),
        ([[1]], {"memory_budget": 5}, ValueError, "memory_budget: got 5"),
        ([[1]], {"chunk": 0}, ValueError, "chunk: got 0"),
    ],
)  # fmt: skip
def test_bad_input_leaves_nothing(documents, options, error, message, tiny, lens, tmp_path):
    with pytest.raises(error, match=message):
        tl.decode_documents(tiny[0], lens, documents, out=tmp_path / "run", **options)
    assert os.listdir(tmp_path) == []


def test_what_is_no_model_is_named(lens, tmp_path):
    with pytest.raises(TypeError, match="model: got a str, wanted a causal language model"):
        tl.decode_documents("gpt2", lens, [[1]], out=tmp_path / "run")


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    most=st.integers(1, 1000),
    apart=st.none() | st.integers(1, 300),
)
def test_packing(lengths, most, apart):
    batches = pack(lengths, most, apart)
    assert sorted(number for batch in batches for number in batch) == [*range(len(lengths))]
    for batch in batches:
        sizes = [lengths[number] for number in batch]
        assert sizes[0] == max(sizes)
        assert len(sizes) == 1 or len(sizes) * sizes[0] <= most
        assert min(sizes) >= 0.75 * sizes[0]
        assert apart is None or len({size > apart for size in sizes}) == 1
    assert pack(lengths, most, apart) == batches
    starts = [lengths[batch[0]] for batch in batches]
    assert starts == sorted(starts, reverse=True), "longest first"
