"""The page's parts: what is encoded decodes to the same numbers, and no text becomes markup.

What the page does with them is seen in a browser, in test_browser.py.
"""

import base64
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny_text_model
import torch

import tuned_lens_fast as tl
from tuned_lens_fast.plotting import compare_page, encode, figure, heatmap, heatmap_page
from tuned_lens_fast.plotting.tokens import fit, token_texts, visible

TITLE = "<b>model</b> </script> & lens"
TEXT = "a </script> <b>\n\t&amp; b"
STATISTICS = ["log_prob", "rank", "entropy", "max_prob", "kl", "reverse_kl", "js", "tv"]


class Page(HTMLParser):
    """The page as a browser takes it apart."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.parts, self.at = [], {}, {}, (None, None)
        self.feed(text)
        self.close()
        self.header = json.loads(self.parts.pop("header"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.at = tag, dict(attributes).get("id")

    def handle_endtag(self, tag):
        self.at = None, None

    def handle_data(self, data):
        tag, name = self.at
        self.texts.setdefault(tag, []).append(data)
        if tag == "script" and name:
            self.parts[name] = self.parts.get(name, "") + data

    def bytes(self, name):
        """A part as it is in the page."""
        return base64.b64decode(self.parts[name])

    def arrays(self, name, *arrays):
        """Arrays of (dtype, shape) that follow one another in a part."""
        raw, at = np.frombuffer(gzip.decompress(self.bytes(name)), np.uint8), 0
        for dtype, shape in arrays:
            count = math.prod(shape)
            planes = raw[at : at + 4 * count].reshape(4, count).astype(np.uint32)
            at += 4 * count
            words = planes[0] << 24 | planes[1] << 16 | planes[2] << 8 | planes[3]
            yield words.view(dtype).reshape(shape)
        assert at == len(raw)

    def tokens(self):
        return json.loads(gzip.decompress(self.bytes("tokens")))


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    model, tokenizer = tiny_text_model.save(tmp_path_factory.mktemp("model"))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    watch = tokenizer("ab")["input_ids"]
    stats = tl.decode_model(model, tl.LogitLens.from_model(model), ids, top_k=3, stats=STATISTICS, watch=watch)
    return stats, tokenizer, ids


def close(found, wanted):
    """To three digits, and all that is no finite number exactly."""
    found, wanted = torch.tensor(found), wanted.float()
    torch.testing.assert_close(found, wanted, rtol=2**-11, atol=0, equal_nan=True)


@pytest.mark.parametrize("block", [4, 19, 512])
def test_every_number_is_there(decoded, block, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK", block)
    stats, tokenizer, ids = decoded
    stats.kl[0, 3], stats.entropy[2, 1], stats.entropy[1, 1] = math.nan, math.inf, -math.inf
    page = Page(heatmap_page(stats, tokenizer, ids, watch=[97, 98]))
    (run,) = page.header["runs"]
    positions = stats.lse.shape[1]
    assert (run["positions"], run["layers"], run["k"]) == (positions, ["0", "1", "2", "output"], 3)
    assert [s["name"] for s in run["statistics"]] == STATISTICS
    known, texts = page.tokens()
    assert [known[i] for i in run["watched"]] == [97, 98]
    assert dict(zip(known, texts, strict=True)) == token_texts(tokenizer, known)
    read, target = page.arrays("text-0", (np.int32, [positions]), (np.int32, [positions]))
    assert [known[i] for i in read] == ids.tolist()
    assert [known[i] for i in target[:-1]] == ids[1:].tolist()
    assert target[-1] == -1
    for number, start in enumerate(range(0, positions, block)):
        part = stats[:, start : start + block]
        shape = [*part.lse.shape]
        kinds = [(np.int32 if name == "rank" else np.float32, shape) for name in STATISTICS]
        lists = [(np.float32, [2, *shape]), (np.float32, [3, *shape]), (np.int32, [3, *shape])]
        *values, watched, log_probs, tops = page.arrays(f"block-0-{number}", *kinds, *lists)
        for name, found in zip(STATISTICS, values, strict=True):
            if name == "rank":
                assert found.tolist() == part.rank.tolist()
            else:
                close(found, getattr(part, name))
        close(watched, part.watch_log_probs.movedim(-1, 0))
        close(log_probs, part.top_log_probs.movedim(-1, 0))
        assert np.array(known)[tops].tolist() == part.top_ids.movedim(-1, 0).tolist()


def test_rounding_keeps_signs_nan_infinity_and_the_largest_float():
    values = torch.tensor([0.0, -0.0, 1.0, -1.0009765, 3e38, math.inf, -math.inf, math.nan, 1e-40])
    raw = np.frombuffer(encode.planes(values), np.uint8).reshape(4, -1).astype(np.uint32)
    found = (raw[0] << 24 | raw[1] << 16 | raw[2] << 8 | raw[3]).view(np.float32)
    close(found[:-1], values[:-1])
    assert abs(found[-1]) < 2e-38, "a number too small to have a full mantissa stays small"
    assert np.signbit(found[1])
    odd = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    assert encode.planes(odd) == encode.planes(torch.tensor([math.nan])), "a NaN of low bits only"


def test_cells_to_jump_to(decoded):
    stats, tokenizer, ids = decoded
    (run,) = Page(heatmap_page(stats, tokenizer, ids)).header["runs"]
    finite = torch.where(stats.kl.isfinite(), stats.kl, -1)
    assert run["peaks"][0] == [*divmod(int(finite.argmax()), len(ids))]
    by_name = {s["name"]: s for s in run["statistics"]}
    change = stats.tv.diff(dim=0).abs()
    layer, position = divmod(int(change.argmax()), len(ids))
    assert by_name["tv"]["changes"][0] == [layer + 1, position]
    order = stats.rank.double().log10().diff(dim=0).abs()[:, :-1]
    layer, position = by_name["rank"]["changes"][0]
    assert order[layer - 1, position] == order.max()


def test_it_needs_nothing_from_elsewhere_and_runs_only_its_own_script(decoded):
    stats, tokenizer, ids = decoded
    text = heatmap_page(stats, tokenizer, ids)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href"} & attributes.keys(), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert len(text) < 100_000
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "unsafe" not in policy


class Hostile:
    """A tokenizer whose tokens are all that a page must not believe."""

    TEXTS = (
        "</script><script>hacked = 1</script>", '"><img src=x onerror="hacked=1">', "<!--<script>", "=1+1", "\ud800",
        "\u202egnp", "\x00\x1b[31m", "👩\u200d💻", "`${hacked=1}`", "\u2028", "東京", "&lt;", "", "-2+3\t", "'",
    )  # fmt: skip

    def convert_ids_to_tokens(self, ids):
        return self.TEXTS[ids]

    def decode(self, ids):
        return self.TEXTS[ids[0]]


def hostile(positions=15, layers=3):
    """Statistics of random numbers over the hostile tokens, with a NaN and infinities; and what was read."""
    count = len(Hostile.TEXTS)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, positions, count, generator=generator).log_softmax(-1)
    top = logits.topk(3, dim=-1)
    ids = torch.arange(positions) % count
    stats = tl.LensStats(
        lse=torch.zeros(layers, positions),
        layers=torch.arange(layers),
        kl=torch.rand(layers, positions, generator=generator),
        entropy=-(logits * logits.exp()).sum(-1),
        max_prob=top.values[..., 0].exp(),
        top_ids=top.indices,
        top_log_probs=top.values,
    )
    stats.kl[0, 0], stats.kl[1, 0], stats.kl[1, 1] = math.nan, math.inf, -math.inf
    stats.top_ids[0, 0], stats.top_log_probs[0, 0] = -1, math.nan
    return stats, Hostile(), ids


def test_no_text_becomes_markup(decoded):
    stats, tokenizer, ids = hostile()
    text = compare_page([(TITLE, stats, ids), ("\ud800\u202e<!--", stats, ids)], tokenizer, TITLE + "\udcff\n")
    page = Page(text)
    assert page.texts["title"] == [TITLE + r"\udcff↵"]
    assert [run["name"] for run in page.header["runs"]] == [TITLE, r"\ud800\u202e<!--"]
    assert not {"img", "b", "iframe"} & {tag for tag, _ in page.tags}
    assert sum(tag == "script" for tag, _ in page.tags) == text.count("</script>") == len(page.parts) + 2
    text.encode("utf-8")
    _, texts = page.tokens()
    assert {r"\ud800", r"\u202egnp", r"\x00\x1b[31m", "👩\\u200d💻", r"\u2028", "∅", "NaN"} <= {*texts}


def test_what_is_not_known_is_left_out(decoded):
    stats, tokenizer, ids = decoded
    page = Page(heatmap_page(stats, None, None))
    known, texts = page.tokens()
    assert all(text == ("NaN" if i < 0 else f"#{i}") for i, text in zip(known, texts, strict=True))
    read, target = page.arrays("text-0", (np.int32, [len(ids)]), (np.int32, [len(ids)]))
    assert {*read.tolist()} == {-1}
    assert [known[i] for i in target[:-1]] == ids[1:].tolist(), "stats has the targets"
    one = tl.LensStats(lse=stats.lse[:, :1], layers=stats.layers, entropy=stats.entropy[:, :1])
    (run,) = Page(heatmap_page(one, tokenizer, ids[:1])).header["runs"]
    assert (run["k"], run["peaks"], run["watched"]) == (0, [], [])


def test_what_cannot_be_drawn_is_refused(decoded):
    stats, tokenizer, ids = decoded
    with pytest.raises(ValueError, match="at least one position"):
        heatmap_page(stats[:, :0], tokenizer, ids[:0])
    with pytest.raises(ValueError, match="one of log_prob, rank"):
        heatmap_page(tl.LensStats(lse=stats.lse, layers=stats.layers), tokenizer, ids)
    with pytest.raises(ValueError, match=r"input_ids: got shape \[2\], wanted \[\d+\]"):
        heatmap_page(stats, tokenizer, ids[:2])
    with pytest.raises(ValueError, match=r"stats: got shape \[4, 2, \d+\], wanted \[layers, positions\]"):
        heatmap_page(batched(stats), tokenizer, ids)
    with pytest.raises(ValueError, match="runs: got none"):
        compare_page([], tokenizer)


def batched(stats):
    return tl.LensStats(lse=stats.lse[:, None].repeat(1, 2, 1), layers=stats.layers)


def test_notebooks(decoded, monkeypatch):
    stats, tokenizer, ids = decoded
    frame = stats.show(tokenizer, ids)._repr_html_()
    assert re.match(
        '<iframe sandbox="allow-scripts allow-downloads" srcdoc="[^"<>]*" style="[^"<>]*"></iframe>$', frame
    )
    page = Page(html.unescape(re.search('srcdoc="([^"]*)"', frame)[1]))
    assert page.header["runs"][0]["positions"] == len(ids)
    monkeypatch.setattr(heatmap, "NOTEBOOK_CELLS", 4 * 7 + 3)
    page = Page(stats.show().page)
    assert page.header["runs"][0]["positions"] == 7
    assert page.header["title"] == f"Lens: the first 7 of {len(ids)} positions"
    assert "LensStats of shape [4, " in stats._repr_html_()
    assert "show" in stats._repr_html_()
    assert "<pre>" in batched(stats)._repr_html_()


@pytest.mark.parametrize("backend", ["matplotlib", "plotly"])
@pytest.mark.parametrize("statistic", ["kl", "rank"])
def test_figures(decoded, backend, statistic):
    pytest.importorskip(backend)
    stats, tokenizer, ids = decoded
    drawing = figure(stats, tokenizer, ids, statistic=statistic, backend=backend)
    wanted = getattr(stats, statistic).double().numpy()
    if statistic == "rank":
        wanted = np.log10(np.where(wanted > 0, wanted, np.nan))
    texts = token_texts(tokenizer, [*stats.top_ids[..., 0].flatten().tolist(), *ids.tolist()])
    if backend == "matplotlib":
        axes = drawing.axes[0]
        values = axes.images[0].get_array().filled(np.nan)
        words = [text.get_text() for text in axes.texts]
        across = [tick.get_text() for tick in axes.get_xticklabels()]
        drawing.savefig(io.BytesIO(), format="png", dpi=30)
    else:
        values = drawing.data[0].z
        words = [html.unescape(text) for line in drawing.data[0].text for text in line]
        across = [html.unescape(text) for text in drawing.layout.xaxis.ticktext]
        labels = [*drawing.layout.xaxis.ticktext, *itertools.chain(*drawing.data[0].text)]
        assert not set("<>$") & set("".join(labels))
    np.testing.assert_array_equal(values, wanted)
    assert words == [fit(texts[i], 9) for i in stats.top_ids[..., 0].flatten().tolist()]
    assert across == [fit(texts[i], 9) for i in ids.tolist()]


def test_figures_refuse(decoded, monkeypatch):
    stats, tokenizer, ids = decoded
    with pytest.raises(ValueError, match="statistic: got 'mood', wanted one of log_prob, rank"):
        figure(stats, statistic="mood")
    with pytest.raises(ValueError, match="backend: got 'crayon'"):
        figure(stats, backend="crayon")
    with pytest.raises(ValueError, match="input_ids: got shape"):
        figure(stats, tokenizer, ids[:2])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install plotly"):
        figure(stats, backend="plotly")


def test_white_space_is_visible_and_control_characters_are_harmless():
    assert visible(" a b\n\t") == "·a·b↵⇥"
    assert visible("  ") == "␣␣"
    assert visible("\x1b[31m\u200b\u202e") == "\\x1b[31m\\u200b\\u202e"


def test_sentencepiece_tokens_keep_their_space():
    class SentencePiece:
        def convert_ids_to_tokens(self, token):
            return "▁the"

        def decode(self, ids):
            return "the"

    assert token_texts(SentencePiece(), [0, -1]) == {0: "·the", -1: "NaN"}


def test_fit():
    assert fit("token", 5) == "token"
    assert fit("tokens", 5) == "toke…"
    assert fit("東京都", 5) == "東京…"
    assert fit("東京都", 4) == "東…"
