"""LensStats: slicing keeps fields aligned, files come back, tables are tidy."""

import builtins
import os

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from tuned_lens_fast.stats import LensStats

OURS = {"format": "tuned_lens_fast.LensStats 1"}


def make(*lead, layers=3, k=2):
    shape = (layers, *lead)
    n = torch.Size(shape).numel()
    count = torch.arange(n).reshape(shape)
    return LensStats(
        lse=count.float(),
        layers=torch.arange(layers) * 10,
        targets=torch.arange(n // max(layers, 1)).reshape(lead) - 1,
        rank=count,
        entropy=count.float() / 7,
        top_ids=torch.stack([count * 2 + i for i in range(k)], -1),
        top_log_probs=-torch.rand(*shape, k),
        watch_log_probs=-torch.rand(*shape, 3),
    )


def same(a, b):
    assert dict(a.items()).keys() == dict(b.items()).keys()
    for name, value in a.items():
        assert torch.equal(value, getattr(b, name)), name


@pytest.mark.parametrize(
    "index",
    [
        1,
        -1,
        slice(1, None),
        (slice(None), 2),
        (0, 1),
        (..., -1),
        (1, ..., slice(0, 2)),
        [2, 0],
        torch.tensor([True, False, True]),
        (slice(None), torch.tensor([3, 0])),
        torch.tensor(2),
    ],
)
@pytest.mark.parametrize("lead", [(4,), (4, 5)])
def test_slicing_is_a_tensors(index, lead):
    stats = make(*lead)
    cut = stats[index]
    assert torch.equal(cut.lse, stats.lse[index])
    assert torch.equal(cut.rank, stats.rank[index])
    assert torch.equal(cut.top_ids[..., 0], stats.top_ids[..., 0][index])
    assert torch.equal(cut.watch_log_probs[..., 2], stats.watch_log_probs[..., 2][index])
    # layers and targets, spread out over all statistics, are cut like one.
    by_layer = stats.layers.reshape(-1, *[1] * len(lead)).expand(stats.lse.shape)
    assert torch.equal(
        cut.layers.reshape(-1, *[1] * (cut.lse.ndim - cut.layers.ndim)).expand(cut.lse.shape)
        if cut.layers.ndim
        else cut.layers.expand(cut.lse.shape),
        by_layer[index],
    )
    assert torch.equal(cut.targets.expand(cut.lse.shape), stats.targets.expand(stats.lse.shape)[index])
    assert cut.kl is None


def test_a_single_layer_is_cut_by_position():
    stats = make(4, 5)
    same(stats[1][2, 3], stats[1, 2, 3])
    assert stats[1].layers.item() == 10
    assert [s.layers.item() for s in make(4)] == [0, 10, 20]


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ((0, 0, 0, 0), IndexError),
        (3, IndexError),
        ((0, 4), IndexError),
        ((..., 0, ...), IndexError),
        (None, TypeError),
        ("a", TypeError),
        (1.0, TypeError),
        (True, TypeError),
        (([0, 1], [0, 1]), TypeError),
        (torch.zeros(3, 4, dtype=torch.bool), TypeError),
        (torch.zeros(3), TypeError),
    ],
)
def test_bad_indices(index, error):
    with pytest.raises(error):
        make(4)[index]


@pytest.mark.parametrize("lead", [(4,), (), (2, 3), (0,)])
def test_saved_and_loaded(tmp_path, lead):
    stats = make(*lead)
    stats.save(tmp_path / "a.safetensors")
    same(LensStats.load(tmp_path / "a.safetensors"), stats)
    stats[..., :].save(tmp_path / "a.safetensors")  # over an old file
    stats[1:].save(str(tmp_path / "b.safetensors"))  # views
    same(LensStats.load(str(tmp_path / "b.safetensors")), stats[1:])
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    make(4).save(path)
    before = path.read_bytes()

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tuned_lens_fast.stats.lens_stats.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(5).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_unwritable_and_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        make(4).save(tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        LensStats.load(tmp_path / "a.safetensors")


def test_files_that_are_not_ours(tmp_path):
    path = tmp_path / "a.safetensors"
    make(4).save(path)
    whole = path.read_bytes()
    for bad in (b"", whole[:-5], whole[:20], b"\xff" * 64):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"a\.safetensors is not a complete safetensors file"):
            LensStats.load(path)
    save_file({"lse": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"holds None with 'lse', wanted"):
        LensStats.load(path)
    save_file({"lse": torch.zeros(2), "layers": torch.zeros(2), "__class__": torch.zeros(1)}, path, metadata=OURS)
    with pytest.raises(ValueError, match="__class__"):
        LensStats.load(path)
    names = {f"{'x' * 1000}{i}": torch.zeros(1) for i in range(500)}
    save_file(names, path, metadata={"format": "y" * 10**5})
    with pytest.raises(ValueError, match="and 496 more, wanted") as caught:
        LensStats.load(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("index", [0, (1, 2), (..., 0), (0, 1), slice(0, 0), (slice(None), slice(0, 0)), (0, [1, 2])])
@pytest.mark.parametrize("lead", [(4,), (4, 5)])
def test_parts_are_saved_and_loaded(tmp_path, index, lead):
    part = make(*lead)[index]
    part.save(tmp_path / "a.safetensors")
    same(LensStats.load(tmp_path / "a.safetensors"), part)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"layers": torch.arange(2)}, r"layers has shape \[2\], lse \[3, 4\]"),
        ({"layers": torch.arange(6).reshape(3, 2)}, r"layers has shape \[3, 2\]"),
        ({"layers": torch.arange(3.0)}, r"layers is torch\.float32, wanted torch\.int64"),
        ({"layers": torch.tensor(1)}, r"targets has shape \[4\], wanted \[3, 4\]"),
        ({"lse": torch.zeros(3, 4, dtype=torch.int64)}, r"lse is torch\.int64, wanted torch\.float32"),
        ({"lse": torch.zeros(3, 4).double()}, r"lse is torch\.float64"),
        ({"lse": torch.zeros(3)}, r"targets has shape \[4\], wanted \[\]"),
        ({"targets": torch.arange(5)}, r"targets has shape \[5\], wanted \[4\]"),
        ({"entropy": torch.zeros(3, 5)}, r"entropy has shape \[3, 5\], wanted \[3, 4\]"),
        ({"entropy": torch.zeros(3, 4, 1)}, r"entropy has shape \[3, 4, 1\]"),
        ({"rank": torch.zeros(3, 4)}, r"rank is torch\.float32, wanted torch\.int64"),
        ({"rank": torch.zeros(3, 4, dtype=torch.int32)}, r"rank is torch\.int32"),
        ({"top_ids": torch.zeros(3, 4, dtype=torch.int64)}, r"top_ids has shape \[3, 4\]"),
        (
            {"top_ids": torch.zeros(3, 4, 1, dtype=torch.int64)},
            r"top_log_probs has shape \[3, 4, 2\], wanted \[3, 4, 1\]",
        ),
        ({"watch_log_probs": torch.tensor(1.0)}, r"watch_log_probs has shape \[\]"),
        ({"watch_log_probs": torch.zeros(3, 1, 4, 2)}, r"watch_log_probs has shape"),
    ],
)
def test_fields_that_do_not_belong_together(tmp_path, change, problem):
    path = tmp_path / "a.safetensors"
    save_file({**dict(make(4).items()), **change}, path, metadata=OURS)
    with pytest.raises(ValueError, match=rf"a\.safetensors holds statistics that do not belong together: {problem}"):
        LensStats.load(path)


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [f"<{i}>" for i in ids]


def test_table_of_one_sequence():
    stats = make(4)
    table = stats.to_pandas(Tokenizer())
    assert list(table.columns) == [
        *("layer", "position", "target", "target_token", "lse", "rank", "entropy"),
        *("top_id_0", "top_token_0", "top_id_1", "top_token_1", "top_log_prob_0", "top_log_prob_1"),
        *("watch_log_prob_0", "watch_log_prob_1", "watch_log_prob_2"),
    ]
    assert len(table) == 12
    row = table[(table.layer == 10) & (table.position == 3)].iloc[0]
    assert row.lse == stats.lse[1, 3]
    assert row.top_id_1 == stats.top_ids[1, 3, 1]
    assert row.top_token_1 == f"<{stats.top_ids[1, 3, 1]}>"
    assert row.target == stats.targets[3]
    assert pd.isna(table.target_token[0])  # its target is -1
    assert row.target_token == f"<{stats.targets[3]}>"
    assert pd.api.types.is_integer_dtype(table["rank"])


@pytest.mark.parametrize(
    ("lead", "dims"),
    [
        ((), ["layer"]),
        ((2, 3), ["layer", "batch", "position"]),
        ((2, 3, 4), ["layer", "dim_0", "dim_1", "position"]),
        ((0,), ["layer", "position"]),
    ],
)
def test_table_of_other_shapes(lead, dims):
    stats = make(*lead)
    table = stats.to_pandas()
    assert list(table.columns[: len(dims)]) == dims
    assert len(table) == stats.lse.numel()
    assert (table.lse.to_numpy() == stats.lse.flatten().numpy()).all()
    assert not table.duplicated(dims).any()


def test_table_of_a_single_layer():
    table = make(4)[1].to_pandas()
    assert list(table.columns[:2]) == ["layer", "position"]
    assert (table.layer == 10).all()


def test_without_pandas_the_way_out_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install pandas"):
        make(4).to_pandas()


def test_summary():
    text = repr(make(4, layers=40))
    assert "[40, 4]" in text
    assert "median rank" in text
    assert "mean entropy" in text
    assert "…" in text
    assert "390" in text
    assert len(text.splitlines()) < 20
    assert "lse" in repr(make(4)[0])
    assert "lse" in repr(make(0))
    stats = make(4)
    stats.rank.zero_()
    assert " - " in repr(stats)


def test_to_a_device():
    moved = make(4).to("meta")
    assert all(value.device.type == "meta" for _, value in moved.items())
