"""Prompts and watched tokens as people have them, against ids and masks made by hand."""

import json

import pytest
import tiny_text_model
import torch

import tuned_lens_fast as tl
from tuned_lens_fast.cli import main
from tuned_lens_fast.cli.loading import gguf_in
from tuned_lens_fast.plotting import compare_page, figure, heatmap_page, print_table

TEXT = "a tuned lens"


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = tiny_text_model.make()
    tokenizer.pad_token = "<b>"
    return model, tokenizer, tl.LogitLens.from_model(model)


def same(found, wanted):
    assert [name for name, _ in found.items()] == [name for name, _ in wanted.items()]
    for (name, a), (_, b) in zip(found.items(), wanted.items(), strict=True):
        assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)), name


def test_one_text_in_every_form(tiny):
    model, tokenizer, lens = tiny
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    wanted = tl.decode_model(model, lens, ids, top_k=2)
    assert wanted.lse.shape == (tiny_text_model.LAYERS + 1, len(TEXT))
    for form in (TEXT, ids.tolist(), tokenizer(TEXT), ids.numpy(), {"input_ids": ids}):
        same(tl.decode_model(model, lens, form, top_k=2, tokenizer=tokenizer), wanted)
    batch = tl.decode_model(model, lens, ids[None], top_k=2)
    for form in ([TEXT], [ids.tolist()], tokenizer([TEXT]), tokenizer(TEXT, return_tensors="pt")):
        same(tl.decode_model(model, lens, form, top_k=2, tokenizer=tokenizer), batch)


def test_texts_of_different_lengths_are_padded_on_the_right(tiny):
    model, tokenizer, lens = tiny
    texts = [TEXT, "b", "the whole of it"]
    rows = tokenizer(texts)["input_ids"]
    forms = [
        texts,
        tuple(texts),
        rows,
        [torch.tensor(row) for row in rows],
        tokenizer(texts),
        tokenizer(texts, padding=True, return_tensors="pt"),
        tokenizer(texts, padding=True),
    ]
    for form in forms:
        stats = tl.decode_model(model, lens, form, tokenizer=tokenizer)
        assert stats.lse.shape == (tiny_text_model.LAYERS + 1, 3, max(map(len, texts)))
        for i, row in enumerate(rows):
            alone = tl.decode_model(model, lens, torch.tensor(row))
            torch.testing.assert_close(stats.kl[:, i, : len(row)], alone.kl, atol=1e-4, rtol=1e-4)
            assert torch.equal(stats.targets[i, : len(row)], alone.targets)
            assert (stats.targets[i, len(row) - 1 :] == -100).all()


@pytest.mark.parametrize(
    ("form", "change", "error", "message"),
    [
        (TEXT, {"tokenizer": None}, ValueError, "input_ids: got text, which takes a tokenizer="),
        ([TEXT, "b"], {"tokenizer": None}, ValueError, "input_ids: got text, which takes a tokenizer="),
        ("", {}, ValueError, r"input_ids: prompt 0 has shape \[0\]"),
        ([TEXT, ""], {}, ValueError, r"input_ids: prompt 1 has shape \[0\]"),
        ([], {}, ValueError, r"got shape \[0\], no tokens"),
        ([1, "b"], {}, TypeError, "input_ids: got .*wanted ids, texts"),
        ([[1], 2], {}, TypeError, "input_ids: got .*wanted ids, texts"),
        (b"abc", {}, TypeError, "input_ids: got a bytes"),
        ([1.5], {}, TypeError, "input_ids: got torch.float32"),
        ([10**30], {}, TypeError, "input_ids: got"),
        ({"ids": [1]}, {}, ValueError, "got a mapping with 'ids', wanted one with 'input_ids'"),
        ([[1, 2], [3]], {"attention_mask": torch.ones(2, 2)}, ValueError, "attention_mask: got one beside prompts"),
        (
            {"input_ids": [1], "attention_mask": [1]},
            {"attention_mask": torch.ones(1)},
            ValueError,
            "brings one of its own",
        ),
    ],
)
def test_refuses(tiny, form, change, error, message):
    model, tokenizer, lens = tiny
    with pytest.raises(error, match=message):
        tl.decode_model(model, lens, form, **({"tokenizer": tokenizer} | change))


def test_texts_go_to_disk(tiny, tmp_path):
    pandas = pytest.importorskip("pandas")
    model, tokenizer, lens = tiny
    groups = {"ab": ["a", "b"], "c": "c"}
    out = tl.decode_model(model, lens, ["ab", "c"], tokenizer=tokenizer, watch=groups, out=tmp_path / "run")
    rows = pandas.read_parquet(out)
    wanted = tl.decode_model(model, lens, ["ab", "c"], tokenizer=tokenizer, watch=groups)
    assert rows["token"].tolist() == ["a", "b", "c"] * (tiny_text_model.LAYERS + 1)
    first = rows[rows.document == 0]
    found = torch.tensor([row.tolist() for row in first.watch_log_probs]).view(-1, 2, 2)
    torch.testing.assert_close(found, wanted.watch_log_probs[:, 0])
    with pytest.raises(ValueError, match="holds a run with another watch"):
        tl.decode_model(model, lens, ["ab", "c"], tokenizer=tokenizer, watch={"x": ["a", "b"], "c": "c"}, out=out)


def test_generate_takes_text(tiny):
    model, tokenizer, lens = tiny
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    wanted = lens.generate(model, 1, ids, do_sample=False, max_new_tokens=3)
    assert torch.equal(lens.generate(model, 1, TEXT, False, 1.0, 3, tokenizer=tokenizer), wanted)
    with pytest.raises(ValueError, match="several lengths"):
        lens.generate(model, 1, ["a", "bc"], tokenizer=tokenizer)


def probabilities(model, tokenizer, lens):
    with torch.no_grad():
        states = tl.residual_stream(model, torch.tensor(tokenizer(TEXT)["input_ids"]))
        return torch.stack([lens(h, 0).double().softmax(-1) for h in states])


@pytest.mark.parametrize("chunk", [None, 5])
def test_watched_by_text_and_in_groups(tiny, chunk):
    model, tokenizer, lens = tiny
    p = probabilities(model, tokenizer, lens)
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    asked = {"tokenizer": tokenizer, "chunk": chunk}
    stats = tl.decode_model(model, lens, TEXT, watch=["a", c], **asked)
    assert stats.watch == ("a", str(c))
    torch.testing.assert_close(stats.watch_log_probs.double(), p[..., [a, c]].log(), atol=1e-4, rtol=1e-4)
    # A token counts once in a group, and may be in several; the number of tokens is not that of groups.
    stats = tl.decode_model(model, lens, TEXT, watch={"x": ["a", b, "a"], "y": "b", "all": range(260)}, **asked)
    wanted = torch.stack([p[..., a] + p[..., b], p[..., b], p.sum(-1)], -1)
    torch.testing.assert_close(stats.watch_log_probs.double(), wanted.log(), atol=1e-4, rtol=1e-4)
    assert stats.watch == ("x", "y", "all")


def test_watched_by_a_lens_alone(tiny):
    model, tokenizer, lens = tiny
    states = tl.residual_stream(model, torch.tensor(tokenizer(TEXT)["input_ids"]))[:-1]
    found = lens.decode(states, watch={"x": ["a", "b"]}, tokenizer=tokenizer)
    wanted = probabilities(model, tokenizer, lens)[:-1, :, tokenizer.convert_tokens_to_ids(["a", "b"])].sum(-1).log()
    torch.testing.assert_close(found.watch_log_probs[..., 0].double(), wanted, atol=1e-4, rtol=1e-4)
    assert lens.decode(states, watch="a", tokenizer=tokenizer).watch == ("a",)


@pytest.mark.parametrize(
    ("watch", "error", "message"),
    [
        ({"x": []}, ValueError, "watch: the group 'x' has no tokens"),
        ({1: [2]}, TypeError, "watch: got a group called 1"),
        ({"x": ["ab"]}, ValueError, r"watch: 'ab' is 2 tokens \('a', 'b'\), wanted one"),
        ({"x": [10**6]}, IndexError, "watch: got 1000000"),
        ({"x": 1.5}, TypeError, "watch: got 1.5"),
        (["a", "a"], ValueError, "of which some are the same"),
    ],
)
def test_refuses_to_watch(tiny, watch, error, message):
    model, tokenizer, lens = tiny
    with pytest.raises(error, match=message):
        tl.decode_model(model, lens, TEXT, watch=watch, tokenizer=tokenizer)


def test_names_are_kept(tiny, tmp_path):
    model, tokenizer, lens = tiny
    stats = tl.decode_model(model, lens, TEXT, watch={"yes": ["a", "b"], "ø\n": ["c"]}, tokenizer=tokenizer)
    stats.save(tmp_path / "s.safetensors")
    again = tl.LensStats.load(tmp_path / "s.safetensors")
    same(again, stats)
    assert again.watch == stats[1:, :3].watch == stats.to("cpu").watch == stats[2][1].watch == ("yes", "ø\n")
    assert [*stats.to_pandas()][-2:] == ["watch_log_prob_yes", "watch_log_prob_ø\n"]
    tl.decode_model(model, lens, [5, 6], watch=[5]).save(tmp_path / "old.safetensors")  # as files without names are
    assert tl.LensStats.load(tmp_path / "old.safetensors").watch is None
    stats.watch = ("one",)
    stats.save(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="2 tokens were watched, with names for 1"):
        tl.LensStats.load(tmp_path / "bad.safetensors")


def header_of(page):
    start = page.index('id="header">') + len('id="header">')
    return json.loads(page[start : page.index("</script>", start)])


def test_a_batch_of_one_is_drawn(tiny):
    from rich.console import Console

    model, tokenizer, lens = tiny
    asked = {"tokenizer": tokenizer, "top_k": 2, "watch": {"yes": ["a", "b"]}}
    one, many = tl.decode_model(model, lens, [TEXT], **asked), tl.decode_model(model, lens, [TEXT, "b"], **asked)
    flat, ids = one[:, 0], torch.tensor(tokenizer([TEXT])["input_ids"])
    page = heatmap_page(flat, tokenizer, ids[0])
    assert header_of(page)["runs"][0]["watchedNames"] == ["yes"]
    assert heatmap_page(one, tokenizer, ids) == heatmap_page(one, tokenizer, [TEXT]) == page
    assert heatmap_page(one, tokenizer, None) == heatmap_page(flat, tokenizer, None)
    assert compare_page([("x", one, ids)], tokenizer) == compare_page([("x", flat, ids[0])], tokenizer)
    assert one.show(tokenizer, ids)._repr_html_() == flat.show(tokenizer, ids[0])._repr_html_()
    with Console(width=100, no_color=True, record=True, file=open("/dev/null", "w")) as console:
        print_table(console, one, tokenizer, ids)
    printed = console.export_text()
    assert f"log-probabilities at position {len(TEXT) - 1}, nats" in printed
    assert f"{flat.watch_log_probs[-1, -1, 0]:.2f}" in printed.split("yes")[1]
    for draw in (
        lambda: heatmap_page(many, tokenizer, None),
        lambda: figure(many, tokenizer),
        lambda: print_table(Console(), many, tokenizer, ids),
        lambda: many.show(tokenizer),
    ):
        with pytest.raises(ValueError, match=r"stats: got shape \[4, 2, 12\], wanted .* of a batch, stats\[:, i\]"):
            draw()


def test_a_figure_of_what_was_watched(tiny):
    pytest.importorskip("matplotlib")
    model, tokenizer, lens = tiny
    one = tl.decode_model(model, lens, [TEXT], tokenizer=tokenizer, watch={"yes": ["a", "b"]})
    drawing = figure(one, tokenizer, [TEXT], statistic="yes")
    (image,) = drawing.axes[0].images
    torch.testing.assert_close(torch.tensor(image.get_array().data), one.watch_log_probs[:, 0, :, 0].double())
    with pytest.raises(ValueError, match=r"wanted one of .*max_prob.*, yes"):
        figure(one, tokenizer, statistic="no")


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str(folder), *tiny_text_model.save(folder)


def decoded(capsys, *argv):
    assert main(["decode", *argv, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_command_line_watches_groups(saved, capsys, tmp_path):
    folder, model, tokenizer = saved
    group = '{"a=b,": ["a", "="], "c": "c"}'
    page = tmp_path / "page.html"
    found = decoded(capsys, folder, TEXT, "--watch", group, "--watch", "{", "--html", str(page))
    watch = {"a=b,": ["a", "="], "c": "c", "{": "{"}
    wanted = tl.decode_model(model, tl.LogitLens.from_model(model), TEXT, tokenizer=tokenizer, watch=watch)
    assert found["watch"] == [*watch]
    torch.testing.assert_close(torch.tensor(found["watch_log_probs"]), wanted.watch_log_probs, atol=1e-4, rtol=1e-4)
    (run,) = header_of(page.read_text(encoding="utf-8"))["runs"]
    assert (run["watched"], run["watchedNames"]) == ([-1] * 3, [*watch])


def test_command_line_generates_and_chats(saved, capsys, tmp_path):
    folder, model, tokenizer = saved
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert decoded(capsys, folder, TEXT, "--generate", "5")["token_ids"] == ids[0].tolist()
    assert main(["decode", folder, TEXT, "--chat"]) == 1
    assert "chat: the model's tokenizer has no chat template" in capsys.readouterr().err
    tiny_text_model.save(tmp_path)
    tokenizer = type(tokenizer).from_pretrained(tmp_path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    found = decoded(capsys, str(tmp_path), "hi", "--chat")
    assert found["token_ids"] == tokenizer("<user>hi\n<a>")["input_ids"]


def test_command_line_refuses_before_a_model_loads(saved, capsys, tmp_path, monkeypatch):
    folder, model, _ = saved
    monkeypatch.setattr("tuned_lens_fast.cli.decode.load_model", lambda args: pytest.fail("it loads the model"))
    lens = tl.TunedLens.from_model(model)
    lens.save(tmp_path / "lens")
    config = json.loads((tmp_path / "lens" / "config.json").read_text())
    for change, message in (({"d_model": 33}, "d_model 33, this one has 32"), ({"num_hidden_layers": 9}, "layers 9")):
        (tmp_path / "lens" / "config.json").write_text(json.dumps(config | change))
        assert main(["decode", folder, TEXT, "--lens", str(tmp_path / "lens")]) == 1
        assert message in capsys.readouterr().err
    assert main(["decode", folder, TEXT, "--layers", "0,3"]) == 1
    assert "layers: got 3, wanted 0 to 2" in capsys.readouterr().err
    for argv, message in (
        (["--watch", '{"a": [1]}'], "--watch: 'a' is [1], wanted a token's text or a list of such"),
        (["--watch", '{"a": "a"}', "--watch", "a"], "--watch: 'a' is there twice"),
        (["--generate", "0"], "wanted a whole number from 1"),
    ):
        with pytest.raises(SystemExit):
            main(["decode", folder, TEXT, *argv])
        assert message in capsys.readouterr().err


def test_a_folder_of_one_gguf_file_is_one(tmp_path):
    assert gguf_in(str(tmp_path / "none")) is None
    (tmp_path / "b.gguf").touch()
    (tmp_path / "config.json").touch()
    assert gguf_in(str(tmp_path)) == "b.gguf"
    (tmp_path / "a.GGUF").touch()
    with pytest.raises(ValueError, match=r"several GGUF files, choose with --gguf-file: 'a.GGUF', 'b.gguf'"):
        gguf_in(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert gguf_in(str(tmp_path)) is None


def test_a_finished_run_says_so(saved, capsys, tmp_path):
    pytest.importorskip("pyarrow")
    folder, _, _ = saved
    argv = ["decode", folder, TEXT, "--out", str(tmp_path / "run"), "--watch", '{"x": ["a", "b"]}']
    assert main(argv) == 0
    assert "already complete" not in capsys.readouterr().err
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "run is already complete" in said
    assert "positions/s" not in said
    from tuned_lens_fast.plotting.serve import Run, texts_of

    (text,) = texts_of(Run(tmp_path / "run"))
    (info,) = text.header["runs"]
    assert (info["watched"], info["watchedNames"]) == ([-1], ["x"])
