"""What evaluate measures, against the definitions in float64; its intervals against the formula and a bootstrap."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
import tiny_text_model
import torch
from tiny_models import D_MODEL, LAYERS, VOCAB, tiny

import tuned_lens_fast as tl
from tuned_lens_fast import cli, progress
from tuned_lens_fast.engines.interface import BudgetError
from tuned_lens_fast.training.documents import sequences
from tuned_lens_fast.training.evaluation import MEASURES, Evaluation, Means, _Sums, draw, student_t, table

#: Two-sided 95% quantiles of Student's t, as printed in tables.
T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 7: 2.3646, 10: 2.2281, 30: 2.0423, 120: 1.9799}
LENGTHS = (9, 1, 17, 16, 30, 2)


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def lens(model):
    lens = tl.TunedLens.from_model(model)
    torch.manual_seed(1)
    for translator in lens:
        torch.nn.init.normal_(translator.weight, std=0.1)
        torch.nn.init.normal_(translator.bias, std=0.1)
    return lens.requires_grad_(False)


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]


def hidden(model, ids):
    """The states that enter the blocks, and what the head receives."""
    with torch.no_grad():
        output = model(ids[None], output_hidden_states=True)
    *entering, at_head = (h[0] for h in output.hidden_states)
    return entering, at_head


def by_definition(model, lens, documents, translators):
    """Each document's values ``[layers, positions]`` by measure; NaN where there is none."""
    norm, head = lens.unembed.norm, lens.unembed.head
    found = []
    for ids in documents:
        entering, at_head = hidden(model, ids)
        own = reference.logits(at_head, head)
        if translators == "model":
            z = own[None]
        else:
            z = reference.logits(reference.head_inputs(entering, translators, norm), head)
        targets = torch.cat([ids[1:], torch.tensor([-100])])
        stats = reference.statistics(z, targets=targets, reference=own)
        found.append(
            {
                "kl": stats["kl"],
                "ce": -stats["log_prob"],
                "entropy": stats["entropy"],
                "agreement": (z.argmax(-1) == own.argmax(-1)).double(),
            }
        )
    return found


def ratio(values):
    """Mean, low and high, by the formula that the docstring gives; values: ``[positions]`` of each document."""
    sums = np.array([np.nansum(v) for v in values])
    counts = np.array([np.isfinite(v).sum() for v in values])
    sums, counts = sums[counts > 0], counts[counts > 0]
    d, r = len(sums), sums.sum() / counts.sum()
    s = math.sqrt(d / (d - 1) * ((sums - r * counts) ** 2).sum()) / counts.sum()
    return r, r - T[d - 1] * s, r + T[d - 1] * s


def check(found, wanted):
    for measure in MEASURES:
        of_documents = [document[measure].numpy() for document in wanted]
        means = found[measure]
        for layer in range(len(means.mean)):
            want = ratio([values[layer] for values in of_documents])
            got = (means.mean[layer], means.low[layer], means.high[layer])
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4, err_msg=f"{measure} of layer {layer}")


@pytest.mark.parametrize("options", [{}, {"chunk": 7}, {"chunk": 64, "engine": "eager"}])
def test_means_and_intervals(model, lens, documents, options):
    found = tl.evaluate(model, lens, documents, **options)
    assert (found.documents, found.positions) == (len(LENGTHS), sum(LENGTHS))
    assert found.layers == [*range(LAYERS)]
    check(found.lens, by_definition(model, lens, documents, [*lens]))
    check(found.logit_lens, by_definition(model, lens, documents, [None] * LAYERS))
    check(found.model, by_definition(model, lens, documents, "model"))
    assert found.model["kl"].mean == [0.0]
    assert found.model["agreement"].mean == [1.0]
    assert found.left_out == {"lens": [0] * LAYERS, "logit_lens": [0] * LAYERS, "model": [0]}
    assert found.transfer is None


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_other_ends(model_type, documents):
    other = tiny(model_type)
    lens = tl.LogitLens.from_model(other)
    found = tl.evaluate(other, lens, documents)
    assert found.lens == found.logit_lens
    stats = [tl.decode_model(other, lens, ids, stats=["kl", "log_prob", "entropy"]) for ids in documents]
    kl = torch.cat([s.kl for s in stats], 1).double().mean(1)
    np.testing.assert_allclose([*found.lens["kl"].mean, 0], kl, rtol=1e-5, atol=1e-6)
    ce = torch.cat([s.log_prob for s in stats], 1).double().nanmean(1)
    np.testing.assert_allclose([*found.lens["ce"].mean, *found.model["ce"].mean], -ce, rtol=1e-5)


def test_a_budget_changes_nothing_but_the_pieces(model, lens, documents):
    wanted = tl.evaluate(model, lens, documents, transfer_tokens=20)
    with pytest.raises(BudgetError) as refused:
        tl.evaluate(model, lens, documents, memory_budget=100)
    found = tl.evaluate(model, lens, documents, memory_budget=2 * refused.value.smallest, transfer_tokens=20)
    for reading in ("lens", "logit_lens", "model"):
        for measure in MEASURES:
            a, b = getattr(found, reading)[measure], getattr(wanted, reading)[measure]
            np.testing.assert_allclose((a.mean, a.low, a.high), (b.mean, b.low, b.high), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.transfer.kl, wanted.transfer.kl, rtol=1e-4)


def test_no_more_is_held_for_more_text(model, lens, documents, monkeypatch):
    """Sums are of one batch at a time, and batches of no more positions than asked for."""
    seen = []
    add = _Sums.add
    monkeypatch.setattr(_Sums, "add", lambda self, total, count: seen.append(len(total)) or add(self, total, count))
    tl.evaluate(model, lens, [*documents] * 5, chunk=40)
    assert len(seen) >= 3 * 5
    assert max(seen) <= 40
    assert sum(seen) == 3 * 5 * len(documents)


def test_progress_adds_up(model, lens, documents):
    expected, reported = [], []
    with progress.listen(reported.append, expected.append):
        tl.evaluate(model, lens, documents, chunk=11, transfer_tokens=25)
    assert sum(expected) == sum(reported) > 0


def test_what_is_not_finite_is_left_out_and_counted(model, lens, documents):
    def lose(_module, _args, output):
        states = output[0] if isinstance(output, tuple) else output
        if states.shape[1] == 30:
            states[:, 20:] = torch.nan

    layer = model.model.layers[-1]
    wanted = by_definition(model, lens, documents, [*lens])
    for values in wanted[4].values():
        values[:, 20:] = torch.nan
    hook = layer.register_forward_hook(lose)
    try:
        found = tl.evaluate(model, lens, documents)
        matrix = tl.evaluate(model, lens, documents[4:], transfer_tokens=30).transfer
    finally:
        hook.remove()
    assert found.left_out == {"lens": [10] * LAYERS, "logit_lens": [10] * LAYERS, "model": [10]}
    check(found.lens, wanted)
    assert matrix.left_out == 10 * LAYERS**2
    np.testing.assert_allclose(np.diag(matrix.kl), wanted[4]["kl"].nanmean(1), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:documents. there is one only")
def test_where_nothing_is_finite(documents):
    model = tiny("llama")
    lens = tl.TunedLens.from_model(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    found = tl.evaluate(model, lens, documents[:1], transfer_tokens=5)
    assert found.left_out["lens"] == [LENGTHS[0]] * LAYERS
    assert found.to_dict()["lens"]["kl"] == {"mean": [None] * 3, "low": [None] * 3, "high": [None] * 3}
    assert found.to_dict()["transfer"]["kl"] == [[None] * LAYERS] * LAYERS


# --- intervals ---


def test_students_t():
    for freedom, quantile in T.items():
        assert student_t(freedom) == pytest.approx(quantile, abs=4e-3 if freedom == 3 else 1e-3)
    assert student_t(10**6) == pytest.approx(1.95996, abs=1e-5)
    assert math.isnan(student_t(0))


def test_the_interval_is_as_wide_as_a_bootstrap_over_documents():
    rng = np.random.default_rng(0)
    documents = 300
    counts = rng.integers(1, 200, documents).astype(float)
    totals = counts * rng.gamma(2.0, 1.0, documents)
    sums = _Sums(1)
    shape = (documents, len(MEASURES), 1)
    for part in np.array_split(np.arange(documents), 7):
        total, count = (torch.tensor(x[part])[:, None, None].expand(len(part), *shape[1:]) for x in (totals, counts))
        sums.add(total, count)
    means = sums.means()["kl"]
    drawn = rng.integers(0, documents, (4000, documents))
    spread = (totals[drawn].sum(1) / counts[drawn].sum(1)).std()
    assert means.mean[0] == pytest.approx(totals.sum() / counts.sum())
    assert (means.high[0] - means.low[0]) / 2 == pytest.approx(student_t(documents - 1) * spread, rel=0.05)


def test_documents_that_are_all_alike_have_no_spread(model, lens, documents):
    found = tl.evaluate(model, lens, documents[:1] * 3)
    for means in found.lens.values():
        np.testing.assert_allclose(means.high, means.low, atol=1e-6)


def test_one_document_has_no_interval(model, lens, documents, tmp_path):
    with pytest.warns(UserWarning, match="there is one only, so that no confidence interval"):
        found = tl.evaluate(model, lens, documents[:1])
    assert np.isfinite(found.lens["kl"].mean).all()
    assert np.isnan(found.lens["kl"].low).all()
    found.save(tmp_path / "x.json")
    values = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert values["lens"]["kl"]["low"] == [None] * LAYERS
    draw(found, tmp_path / "x.png")


# --- the transfer matrix ---


def test_the_transfer_matrix(model, lens, documents):
    found = tl.evaluate(model, lens, documents, transfer_tokens=20).transfer
    # The first 20 positions: two documents and a part of the third.
    some = [*documents[:2], documents[2][:10]]
    assert found.positions == 20
    assert found.left_out == 0
    for i in range(LAYERS):
        for j in range(LAYERS):
            kls = []
            for ids in some:
                entering, at_head = hidden(model, ids)
                kls.append(lens.decode([entering[j]], layers=[i], reference=at_head, stats=["kl"]).kl[0])
            assert found.kl[i][j] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-5)
            assert found.penalty[i][j] == pytest.approx(found.kl[i][j] - found.kl[j][j])
    whole = tl.evaluate(model, lens, documents, transfer_tokens=10**6)
    assert whole.transfer.positions == sum(LENGTHS)
    np.testing.assert_allclose(np.diag(whole.transfer.kl), whole.lens["kl"].mean, rtol=1e-5)


def test_a_lens_that_lacks_layers(model, documents):
    config = tl.TunedLensConfig("", D_MODEL, LAYERS, translated_layers=[1, 2])
    found = tl.evaluate(model, tl.TunedLens(tl.Unembed(model), config), documents, transfer_tokens=9)
    assert found.layers == [1, 2]
    assert len(found.lens["kl"].mean) == 2
    assert np.shape(found.transfer.kl) == (2, 2)


# --- errors ---


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"documents": []}, ValueError, "documents: got none"),
        ({"documents": [[]]}, ValueError, "document 0 has shape"),
        ({"documents": [[VOCAB]]}, IndexError, "document 0: got 101"),
        ({"transfer_tokens": -1}, ValueError, "transfer_tokens: got -1"),
        ({"transfer_tokens": True}, ValueError, "transfer_tokens: got True"),
        ({"engine": "banana"}, ValueError, "engine"),
        ({"chunk": 0}, ValueError, "chunk: got 0"),
        ({"lens": 3}, TypeError, "lens: got a int"),
    ],
)
def test_refused(model, lens, documents, changes, error, message):
    values = {"lens": lens, "documents": documents} | changes
    with pytest.raises(error, match=message):
        tl.evaluate(model, **values)


def test_a_lens_of_another_model(model, documents):
    other = tiny("llama", hidden_size=16, head_dim=4)
    with pytest.raises(ValueError, match="it belongs to another model"):
        tl.evaluate(model, tl.TunedLens.from_model(other), documents)


# --- the command ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = tiny_text_model.save(folder)
    lens = tl.TunedLens.from_model(model)
    torch.manual_seed(1)
    for translator in lens:
        torch.nn.init.normal_(translator.weight, std=0.1)
    lens.save(folder / "lens")
    return folder, model, tokenizer, lens


TEXTS = ("The cat sat on the mat.", "Twice.", "The dog did not.")


@pytest.fixture
def files(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(f"{text}\n")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return tmp_path


def command(saved, *argv):
    return cli.main(["eval", str(saved[0]), "--lens", str(saved[0] / "lens"), *map(str, argv)])


def test_the_command_measures_what_the_function_does(saved, files, capsys):
    _, model, tokenizer, lens = saved
    texts = [files / f"{i}.txt" for i in range(len(TEXTS))]
    assert command(saved, "--text", *texts, "--transfer", "--json", "--out", files / "out") == 0
    out, err = capsys.readouterr()
    printed = json.loads(out, parse_constant=pytest.fail)
    written = json.loads((files / "out" / "evaluation.json").read_text())
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    wanted = tl.evaluate(model, lens, ids, transfer_tokens=4096).to_dict()
    for name, value in wanted.items():
        if name in ("lens", "logit_lens", "model"):
            for measure in MEASURES:
                np.testing.assert_allclose(printed[name][measure]["mean"], value[measure]["mean"], rtol=1e-5)
        assert written[name] == printed[name]
    assert printed["documents"] == 3
    assert (files / "out" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    assert "wrote" in err
    rows = pq.read_table(files / "out" / "evaluation.parquet").to_pylist()
    assert len(rows) == (2 * len(printed["layers"]) + 1) * len(MEASURES)
    for row in rows:
        means = printed[row["lens"]][row["measure"]]
        at = 0 if row["lens"] == "model" else printed["layers"].index(row["layer"])
        assert [row[name] for name in ("mean", "low", "high")] == [means[name][at] for name in ("mean", "low", "high")]
        assert (row["documents"], row["positions"]) == (3, printed["positions"])
    assert command(saved, "--jsonl", files / "x.jsonl", "--text-column", "body", "--json") == 0
    assert json.loads(capsys.readouterr().out)["lens"] == printed["lens"]


def test_the_table(saved, files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert (
        command(saved, "--jsonl", files / "x.jsonl", "--text-column", "body", "--transfer", "--transfer-tokens", 9) == 0
    )
    out = capsys.readouterr().out
    assert "…" not in out
    for part in ("logit KL", "top 1", "output", "±", "95% confidence interval", "transfer, 9 positions"):
        assert part in out
    assert command(saved, "--text", files / "0.txt") == 0
    out = capsys.readouterr().out
    assert "±" not in out
    assert "one document has no confidence interval" in out


def test_what_is_left_out_is_not_in_the_table():
    nan = float("nan")
    means = {name: Means([1.0, nan], [nan, nan], [2.0, nan]) for name in MEASURES}
    own = {name: Means([0.5], [0.4], [0.6]) for name in MEASURES}
    left_out = {"lens": [0, 9], "logit_lens": [2, 0], "model": [1]}
    rows = table(Evaluation(4, 9, [0, 2], means, means, own, left_out, None)).to_pylist()
    assert rows[0] == {
        "layer": 0, "lens": "lens", "measure": "kl", "mean": 1.0, "low": None, "high": 2.0, "documents": 4,
        "positions": 9,
    }  # fmt: skip
    assert {row["positions"] for row in rows if row["lens"] == "lens" and row["layer"] == 2} == {0}
    assert {(row["layer"], row["positions"]) for row in rows if row["lens"] == "model"} == {(None, 8)}
    assert {row["mean"] for row in rows if row["layer"] == 2} == {None}


def test_without_matplotlib_and_pyarrow(saved, files, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command(saved, "--text", files / "0.txt", files / "1.txt", "--out", files / "out") == 0
    assert "evaluation.json, no table without pyarrow, no picture without matplotlib" in capsys.readouterr().err
    assert [path.name for path in (files / "out").iterdir()] == ["evaluation.json"]


def test_joined_texts_and_a_data_set(saved, files, capsys):
    folder, model, tokenizer, lens = saved
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    joined = sequences(model, ids, 16)
    jsonl = ["--jsonl", files / "x.jsonl", "--text-column", "body"]
    assert command(saved, *jsonl, "--sequence-length", 16, "--tokens", 40, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    wanted = tl.evaluate(model, lens, [joined[0], joined[1], joined[2][:8]]).to_dict()
    assert (found["documents"], found["positions"]) == (3, 40)
    np.testing.assert_allclose(found["lens"]["kl"]["mean"], wanted["lens"]["kl"]["mean"], rtol=1e-5)
    assert command(saved, *jsonl, "--sequence-length", "auto") == 1
    assert f"tokens, fewer than one sequence of {model.config.max_position_embeddings}" in capsys.readouterr().err
    assert cli.main(["eval", str(folder), *map(str, jsonl), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["lens"] == alone["logit_lens"]


@pytest.mark.slow
def test_a_data_set(saved, files, capsys):
    pytest.importorskip("datasets", reason="pip install datasets")
    (files / "data").mkdir()
    (files / "x.jsonl").rename(files / "data" / "test.jsonl")
    data_set = ["--dataset", files / "data", "--split", "test", "--text-column", "body"]
    assert command(saved, *data_set, "--json") == 0
    assert json.loads(capsys.readouterr().out)["documents"] == len(TEXTS)
    assert command(saved, *data_set[:2], "--split", "dev") == 1
    assert "dataset: cannot load" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--text", "{0}/0.txt", "--split", "test"], 2, "--split and --config are for --dataset"),
        (["--text", "{0}/0.txt", "--sequence-length", "long"], 2, "got 'long', wanted"),
        ([], 2, "one of the arguments --text --jsonl --dataset is required"),
        (["--text", "{0}/0.txt", "--jsonl", "{0}/x.jsonl"], 2, "not allowed with"),
        (["--text", "{0}/0.txt", "--text-column", "body"], 2, "--text-column is for --jsonl and --dataset"),
        (["--text", "{0}/0.txt", "--transfer-tokens", "3"], 2, "--transfer-tokens is for --transfer"),
        (["--text", "{0}/none.txt"], 1, "text: cannot read .*none.txt: No such file"),
        (["--text", "{0}"], 1, "text: cannot read .*Is a directory"),
        (["--text", "{0}/empty.txt"], 1, "text: .*empty.txt is empty"),
        (["--text", "{0}/bytes.txt"], 1, "text: .*bytes.txt is not UTF-8"),
        (["--text", "{0}/long.txt"], 1, "text: .*long.txt: got 600 positions"),
        (["--jsonl", "{0}/none.jsonl"], 1, "jsonl: cannot read"),
        (["--jsonl", "{0}/x.jsonl"], 1, "no column 'text'"),
        (["--text", "{0}/0.txt", "--out", "{0}/1.txt"], 1, "out: cannot write"),
        (["--text", "{0}/0.txt", "--lens", "{0}/nowhere"], 1, "no lens at"),
    ],
)
def test_errors_come_before_the_model_is_loaded(saved, files, capsys, monkeypatch, argv, code, message):
    (files / "empty.txt").touch()
    (files / "bytes.txt").write_bytes(b"\xff\xfe")
    (files / "long.txt").write_text("x" * 600)
    if "long" not in str(argv):
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loads"))
    else:
        monkeypatch.setattr("tuned_lens_fast.cli.evaluate.check_length", lambda model, n: _too_long(n))
    try:
        found = command(saved, *(part.format(files) for part in argv))
    except SystemExit as exit_:
        found = exit_.code
    assert found == code
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert pytest.importorskip("re").search(message, err)


def _too_long(positions):
    if positions > 512:
        raise ValueError(f"input_ids: got {positions} positions, and the model has learned only 512")
