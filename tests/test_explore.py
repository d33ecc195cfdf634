"""explore: what the server gives is what the run's files hold, only to those who have the address, and errors are said.

The page that it serves is test_browser.py's.
"""

import contextlib
import gzip
import html
import json
import math
import os
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
import tiny_text_model
import torch
from test_page import Page

import tuned_lens_fast as tl
from tuned_lens_fast import cli
from tuned_lens_fast.data.parts import load_run
from tuned_lens_fast.data.table import stats_of, table_of
from tuned_lens_fast.plotting import encode
from tuned_lens_fast.plotting.serve import Run, Server, texts_of
from tuned_lens_fast.plotting.tokens import token_texts

pyarrow = pytest.importorskip("pyarrow")
TEXTS = ["a text of some length, <b> and </script>", "short", "x"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return (folder, *tiny_text_model.save(folder))


@pytest.fixture(scope="module")
def run(saved, tmp_path_factory):
    """A run of three documents, in chunks of 16 positions, and what is in it."""
    _, model, tokenizer = saved
    folder = tmp_path_factory.mktemp("run") / "run"
    ids = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in TEXTS]
    lens = tl.LogitLens.from_model(model)
    question = {"top_k": 3, "watch": [97], "chunk": 16}
    tl.decode_documents(model, lens, ids, out=folder, ids=["one", "</script>", "c"], tokenizer=tokenizer, **question)
    return folder, [tl.decode_model(model, lens, one, **question) for one in ids], ids


@contextlib.contextmanager
def served(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(url, data=None):
    """Status, content, address in the end."""
    try:
        with urllib.request.urlopen(url, data) as answer:
            return answer.status, answer.read(), answer.url
    except urllib.error.HTTPError as error:
        return error.code, error.read(), url


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5), (6, 7)])
def test_a_table_is_read_back(start, stop):
    shape = 4, 1, 7
    generator = torch.Generator().manual_seed(0)
    stats = tl.LensStats(
        lse=torch.randn(*shape, generator=generator),
        layers=torch.tensor([0, 3, 4, 9]),
        targets=torch.tensor([[1, 2, 3, -100, 5, 6, -100]]),
        log_prob=torch.randn(*shape, generator=generator),
        rank=torch.randint(1, 9, shape, generator=generator),
        top_ids=torch.randint(-1, 9, [*shape, 2], generator=generator),
        top_log_probs=torch.randn(*shape, 2, generator=generator),
    )
    none = (stats.targets == -100).expand(shape)
    stats.log_prob[none], stats.rank[none] = math.nan, 0
    positions = torch.arange(7)[None]
    table = table_of(stats, pyarrow.array([5]), positions, positions, torch.ones(1, 7, dtype=torch.bool), None)
    table = table.filter(pyarrow.compute.field("position") >= start).filter(pyarrow.compute.field("position") < stop)
    found = stats_of(table.take(torch.randperm(len(table)).numpy()), stats.layers, start, stop)
    for name, wanted in stats[:, 0, start:stop].items():
        if name != "targets":
            torch.testing.assert_close(getattr(found, name), wanted, rtol=0, atol=0, equal_nan=True)


def test_a_run_is_served_as_it_is(run, saved, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK", 8)
    folder, stats, ids = run
    server = Server(("127.0.0.1", 0), str(folder), texts_of(Run(folder, saved[2])))
    with served(server) as url:
        listed = get(url)[1].decode()
        assert "&lt;/script&gt;" in listed
        assert "</script>" not in listed
        for number, text in enumerate(server.texts):
            at = ["one", "</script>", "c"].index(text.documents[0].document)
            wanted, read = stats[at], ids[at]
            page = Page(get(f"{url}{number}/")[1].decode())
            assert page.header["served"]
            (said,) = page.header["runs"]
            assert (said["positions"], said["layers"]) == (len(read), ["0", "1", "2", "output"])
            assert said["name"].endswith(f"document {text.documents[0].document}")
            names = [s["name"] for s in said["statistics"]]
            assert names == ["log_prob", "rank", "entropy", "max_prob", "kl"]
            page.bytes = lambda name, at=f"{url}{number}/part/": get(at + name)[1]
            known, texts = page.tokens()
            assert [known[i] for i in said["watched"]] == [97]
            assert dict(zip(known, texts, strict=True)) == token_texts(saved[2], known)
            found = page.arrays("text-0", (np.int32, [len(read)]), (np.int32, [len(read)]))
            assert [known[i] for i in next(found)] == read.tolist()
            assert next(found)[-1] == -1
            for start in range(0, len(read), 8):
                part = wanted[:, start : start + 8]
                shape = [*part.lse.shape]
                kinds = [(np.int32 if name == "rank" else np.float32, shape) for name in names]
                lists = [(np.float32, [1, *shape]), (np.float32, [3, *shape]), (np.int32, [3, *shape])]
                *values, watched, log_probs, tops = page.arrays(f"block-0-{start // 8}", *kinds, *lists)
                for name, value in zip(names, values, strict=True):
                    tolerance = 1e-3 if name == "kl" else 2e-4  # in batches, models round otherwise
                    torch.testing.assert_close(
                        torch.tensor(value).double(),
                        getattr(part, name).double(),
                        rtol=2e-3,
                        atol=tolerance,
                        equal_nan=True,
                    )
                assert np.array(known)[tops].tolist() == part.top_ids.movedim(-1, 0).tolist()
                torch.testing.assert_close(
                    torch.tensor(log_probs), part.top_log_probs.movedim(-1, 0), rtol=2e-3, atol=2e-4
                )
                torch.testing.assert_close(
                    torch.tensor(watched), part.watch_log_probs.movedim(-1, 0), rtol=2e-3, atol=2e-4
                )


def test_only_what_is_asked_for_is_read(run):
    folder, _, _ = run
    text = Run(folder).documents["one"]
    read = text.run.rows.to_table
    asked = []

    class Rows:
        schema = text.run.rows.schema

        def to_table(self, columns, filter):
            table = read(columns=columns, filter=filter)
            asked.append(table.num_rows)
            return table

    text.run.rows = Rows()
    stats = text.read(["kl"], 3, 5)
    assert asked == [2 * 4]
    assert stats.kl.shape == (4, 2)


@pytest.fixture(scope="module")
def other_run(saved, tmp_path_factory):
    """Another lens's, with documents in another order, one of them cut short, one of its own, and larger ids."""
    _, model, tokenizer = saved
    folder = tmp_path_factory.mktemp("run") / "other"
    lens = tl.TunedLens.from_model(model)
    with torch.no_grad():
        lens[0].bias.add_(1.0)
    ids = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in ("\uffff", TEXTS[0], TEXTS[1][:-1])]
    tl.decode_documents(model, lens, ids, out=folder, ids=["new", "one", "</script>"], tokenizer=tokenizer, top_k=2)
    return folder, ids


def test_two_runs_side_by_side(run, other_run, saved):
    first, second = Run(run[0], saved[2]), Run(other_run[0], saved[2])
    texts = {text.name: text for text in texts_of(first, second)}
    assert [len(text.documents) for text in texts.values()] == [2 if name != "document c" else 1 for name in texts]
    assert texts["document </script>"].positions == len(run[2][1])
    both = texts["document one"]
    said = both.header["runs"]
    assert [each["positions"] for each in said] == [len(run[2][0])] * 2
    assert [each["k"] for each in said] == [3, 2]
    assert "LogitLens" in said[0]["name"]
    assert "TunedLens" in said[1]["name"]
    for column, of in enumerate((first, second)):
        assert both.part(f"block-{column}-0") == of.documents["one"].block(0)
        assert both.part(f"text-{column}") == of.documents["one"].text()
    assert both.part("block-0-0") != both.part("block-1-0")
    assert both.part("text-2") is None
    largest = max((first, second), key=lambda each: len(each.tokens.numbers))
    assert both.part("tokens") == largest.token_part
    assert first.tokens.number(torch.tensor([97])) == second.tokens.number(torch.tensor([97]))
    second.documents = {"elsewhere": second.documents["one"]}
    with pytest.raises(ValueError, match=r"compare: no document of '.*TunedLens.*' is one of '.*LogitLens"):
        texts_of(first, second)


def test_the_address_is_a_secret(run):
    server = Server(("127.0.0.1", 0), "run", texts_of(Run(run[0])))
    with served(server) as url:
        root = url[: url.index("/", 8)]
        for path in ("/", "//", "/wrong/", "/wrong/0/", f"/{server.secret[:-1]}/0/", "/%2e%2e/etc/passwd"):
            assert get(root + path)[0] == 403
        assert get(url + "0/")[0] == 200
        for path in (
            "9/",
            "0",
            "-1/",
            "0/part/",
            "0/part/block-0-99",
            "0/part/block-0-x",
            "0/part/block-1-0",
            "0/part/block-0",
            "0/part/block-0-0-0",
            "0/part/text",
            "0/part/text-1",
            "0/part/../../etc",
            "0/part/a/b",
            "9" * 99 + "/",
        ):
            assert get(url + path)[0] == 404, path
        assert get(url, b"text=a")[0] == 403, "there is no model to read it"


def test_prompts(saved, capsys, monkeypatch):
    folder = str(saved[0])
    monkeypatch.setattr(Server, "serve_forever", lambda self, **_: monkeypatch.undo() or asked.append(talk(self)))
    asked = []

    def talk(server):
        with served(server) as url:
            assert "<textarea" in get(url)[1].decode()
            prompt = "a <b> </script> b"
            status, page, address = get(url, urllib.parse.urlencode({"text": prompt}).encode())
            assert (status, address) == (200, url + "0/")
            page = Page(page.decode())
            ids = saved[2](prompt)["input_ids"]
            assert page.header["runs"][0]["positions"] == len(ids)
            assert html.escape(prompt) in get(url)[1].decode()
            status, page, _ = get(url, b"text=")
            assert (status, re.search('<p class="problem">(.*)</p>', page.decode())[1]) == (
                400, "text: it is empty, so there is nothing to decode"
            )  # fmt: skip
            request = urllib.request.Request(url, b"text=a", {"Content-Length": str(2**23)})
            assert get(request)[0] == 413
        return url

    assert cli.main(["explore", folder]) == 0
    (url,) = asked
    assert f"{url}  (Ctrl-C ends it)" in capsys.readouterr().err


def test_a_prompt_through_two_lenses(saved, tmp_path, monkeypatch):
    folder, model, _ = saved
    tl.TunedLens.from_model(model).save(tmp_path / "lens")

    def talk(server, **_):
        texts.append(server.decode("a prompt"))

    texts = []
    monkeypatch.setattr(Server, "serve_forever", talk)
    assert cli.main(["explore", str(folder), "--lens", str(tmp_path / "lens"), "--compare", "logit"]) == 0
    assert [each["name"] for each in texts[0].header["runs"]] == ["lens lens", "logit lens"]
    assert texts[0].part("block-1-0")


def ended(monkeypatch):
    def interrupted(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)


def test_ending_it_and_other_addresses(run, capsys, monkeypatch):
    ended(monkeypatch)
    assert cli.main(["explore", str(run[0])]) == 0
    said = capsys.readouterr().err
    assert re.search(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/  \(Ctrl-C ends it\)\nended\n$", said)
    assert "warning" not in said
    assert cli.main(["explore", str(run[0]), "--host", "0.0.0.0"]) == 0
    assert "warning: whoever can reach 0.0.0.0" in capsys.readouterr().err


def test_what_cannot_be_explored_is_one_sentence(run, saved, tmp_path, capsys, monkeypatch):
    ended(monkeypatch)
    folder = run[0]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            (
                [str(folder), "--port", port],
                1,
                f"host, port: cannot listen at '127.0.0.1', port {port}: Address already in use",
            )
        ]
        partial = tmp_path / "partial"
        partial.mkdir()
        first, *others = sorted(name for name in os.listdir(folder) if name.startswith("part-"))
        for name in (*others, "_run.json"):
            (partial / name).write_bytes((folder / name).read_bytes())
        cases += [
            (
                [str(partial)],
                1,
                f"run: .*partial: . of . parts, 3 documents, missing: {first[:18]}.*; the command that made the run",
            ),
            ([str(tmp_path / "absent")], 1, "model: there is no folder"),
            ([str(tmp_path)], 1, "model: cannot load"),
            ([str(saved[0]), "--lens", str(tmp_path / "absent")], 1, "no lens at"),
            ([str(folder), "--port", "70000"], 2, "--port: got 70000"),
            ([str(folder), "--compare", str(folder)], 2, "--compare: got .*which is the first one too"),
            ([str(folder), "--compare", str(tmp_path)], 2, "--compare: got .* wanted a folder that decode --out wrote"),
            ([str(saved[0]), "--compare", "logit"], 2, "--compare: got 'logit', which is the first one too"),
            ([str(saved[0]), "--compare", str(tmp_path / "absent")], 1, "no lens at"),
            ([str(folder), "--host", "256.0.0.1"], 1, "host, port: cannot listen at '256.0.0.1'"),
        ]
        for argv, code, problem in cases:
            try:
                found = cli.main(["explore", *argv])
            except SystemExit as stop:
                found = stop.code
            said = capsys.readouterr().err.splitlines()
            assert found == code, said
            assert re.match(f"tuned-lens-fast: error: .*{problem}", said[-1]), said


def test_without_a_tokenizer_tokens_are_ids(run):
    made = Run(run[0])
    ids, texts = json.loads(gzip.decompress(made.token_part))
    assert [*zip(ids, texts, strict=True)][:3] == [(-1, "NaN"), (0, "#0"), (1, "#1")]
    largest = max(int(row) for row in load_run(run[0]).to_table(columns=["token_id"])["token_id"].to_pylist())
    assert ids[-1] >= largest
