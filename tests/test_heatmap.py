"""The heatmap's page: what it draws, that it needs nothing from elsewhere, that no token becomes markup.

How it looks and what pointing and clicking do was looked at in a browser; these tests read the page.
"""

import html
import json
import math
import re
from html.parser import HTMLParser

import pytest
import tiny_text_model

import tuned_lens_fast as tl
from tuned_lens_fast.plotting import heatmap, heatmap_page
from tuned_lens_fast.plotting.tokens import fit, token_texts, visible

TITLE = "<b>model</b> </script> & lens"
TEXT = "a </script> <b>\n\t&amp; b"


class Page(HTMLParser):
    """The page as a browser takes it apart."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.at = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.at = tag

    def handle_endtag(self, tag):
        self.at = None

    def handle_data(self, data):
        self.texts.setdefault(self.at, []).append(data)

    def values(self, name):
        """What the last script gives to ``name``."""
        script = self.texts["script"][-1]
        return json.loads(re.search(rf"const {name} = (.*);\n", script)[1])


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    model, tokenizer = tiny_text_model.save(tmp_path_factory.mktemp("model"))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    return tl.decode_model(model, tl.LogitLens.from_model(model), ids, top_k=3), tokenizer, ids


def figure(page):
    """The trace and the layout that the page hands to plotly."""
    call = page[page.rindex("Plotly.newPlot(") :]
    start = call.index("[{")
    trace, end = json.JSONDecoder().raw_decode(call[start:])
    layout, _ = json.JSONDecoder().raw_decode(call[start + end :].lstrip(", \n"))
    return trace[0], layout


def test_it_needs_nothing_from_elsewhere(decoded):
    page = Page(heatmap_page(*decoded))
    assert len(max(page.texts["script"], key=len)) > 10**6, "plotly itself is in the page"
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href"} & attributes.keys(), (tag, attributes)


def test_no_text_becomes_markup(decoded):
    text = heatmap_page(*decoded, title=TITLE)
    page = Page(text)
    assert page.texts["h1"] == [TITLE]
    assert page.texts["title"] == [TITLE]
    assert "b" not in [tag for tag, _ in page.tags]
    assert sum(tag == "script" for tag, _ in page.tags) == text.count("</script>")
    trace, layout = figure(text)
    ticks = [html.unescape(tick) for tick in layout["xaxis"]["ticktext"]]
    assert "</scri…" in ticks or "</script>" in ticks
    assert "&amp;" in ticks
    assert "<b>" in ticks
    for label in [*layout["xaxis"]["ticktext"], *trace["customdata"][0], *trace["text"][0]]:
        assert not re.search(r"<(?!/?b>|br>)", label), "plotly itself knows a few tags"


def test_colours_are_the_statistics(decoded):
    stats, _, ids = decoded
    page = Page(heatmap_page(*decoded))
    choices = page.values("choices")
    assert page.texts["button"][0] == "entropy"
    assert len(page.texts["button"]) == len(choices) == 5
    names = ["entropy", "max_prob", "log_prob", "rank", "kl"]
    for name, choice in zip(names, choices, strict=True):
        for drawn, wanted in zip(choice["z"][0], getattr(stats, name).tolist(), strict=True):
            for a, b in zip(drawn, wanted, strict=True):
                if name == "rank":
                    b = math.log10(b) if b else math.nan
                assert (a is None and math.isnan(b)) or a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert choices[3]["colorbar.ticktext"][0][:2] == ["1", "10"]
    assert choices[2]["z"][0][0][-1] is None, "the last token has no next one"
    assert len(choices[0]["z"][0][0]) == len(ids)


def test_cells(decoded):
    stats, tokenizer, ids = decoded
    trace, layout = figure(heatmap_page(*decoded))
    texts = token_texts(tokenizer, range(len(tokenizer)))
    assert layout["yaxis"]["ticktext"] == ["0", "1", "2", "output"]
    for layer, row in enumerate(trace["text"]):
        for position, label in enumerate(row):
            top = int(stats.top_ids[layer, position, 0])
            hit = position + 1 < len(ids) and top == int(ids[position + 1])
            assert label.startswith("<b>") == hit
            shown = html.unescape(label.removeprefix("<b>").removesuffix("</b>") if hit else label)
            assert shown == texts[top] or (shown.endswith("…") and texts[top].startswith(shown[:-1]))
            hover = trace["customdata"][layer][position]
            for token, log_prob in zip(
                stats.top_ids[layer, position], stats.top_log_probs[layer, position], strict=True
            ):
                assert f"{math.exp(log_prob):.2%}  {html.escape(texts[int(token)], quote=False)}" in hover


def test_long_texts_are_cut_and_say_so(decoded, monkeypatch):
    monkeypatch.setattr(heatmap, "MAX_POSITIONS", 4)
    text = heatmap_page(*decoded)
    assert f"the first 4 of {len(decoded[2])} positions" in text
    assert len(figure(text)[0]["customdata"][0]) == 4


def test_one_position_and_nan(decoded):
    stats, tokenizer, ids = decoded
    one = stats[:, :1]
    one.entropy[0, 0] = math.nan
    one.top_ids[0, 0] = -1
    trace, _ = figure(heatmap_page(one, tokenizer, ids[:1]))
    assert trace["text"][0] == ["NaN"]
    assert trace["z"][0] == [None]


def test_what_cannot_be_drawn_is_refused(decoded, monkeypatch):
    stats, tokenizer, ids = decoded
    with pytest.raises(ValueError, match="at least one position"):
        heatmap_page(stats[:, :0], tokenizer, ids[:0])
    monkeypatch.setattr(heatmap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install plotly"):
        heatmap_page(stats, tokenizer, ids)


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
