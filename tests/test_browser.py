"""The page in a headless Chromium, as a reader uses it: pointing, clicking, typing, two runs, files, the address.

The page's own drawing is compared with the numbers it was made of. Debian: apt-get install chromium chromium-driver.
"""

import csv
import io
import json
import math
import os
import re
import shutil
import threading
import time
import xml.etree.ElementTree as ElementTree
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from test_page import TITLE, Hostile, hostile

import tuned_lens_fast as tl
from tuned_lens_fast.plotting import compare_page, encode, heatmap_page
from tuned_lens_fast.plotting.serve import MemoryText, Server

pytest.importorskip("selenium", reason="needs selenium")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"),
]
WORDS = ["The", "·cat", "·sat", "·on", "·the", "·mat", ".", "↵", "·Then", "·it", "·slept", ","]
POSITIONS, LAYERS, K = 300, 5, 4


class Words:
    """A tokenizer of a few words."""

    def convert_ids_to_tokens(self, token):
        return None

    def decode(self, ids):
        return WORDS[ids[0]].replace("·", " ").replace("↵", "\n")


def decoded(seed, layers=range(LAYERS), positions=POSITIONS):
    """Statistics of random logits that drift towards the last layer's."""
    generator = torch.Generator().manual_seed(seed)
    final = 3 * torch.randn(positions, len(WORDS), generator=generator)
    drift = torch.linspace(1, 0, LAYERS)[list(layers), None, None]
    p = (final * (1 - drift) + drift * 2 * torch.randn(len(drift), *final.shape, generator=generator)).softmax(-1)
    ids = torch.randint(len(WORDS), [positions], generator=generator)
    target = ids.roll(-1)
    of_target = p[:, torch.arange(positions), target]
    top = p.topk(K, dim=-1)
    reference = p[-1]
    stats = tl.LensStats(
        lse=torch.zeros(p.shape[:2]),
        layers=torch.tensor([*layers]),
        targets=target.clone(),
        log_prob=of_target.log(),
        rank=1 + (p > of_target[..., None]).sum(-1),
        entropy=-(p * p.log()).sum(-1),
        max_prob=top.values[..., 0],
        kl=(reference * (reference.log() - p.log())).sum(-1),
        top_ids=top.indices,
        top_log_probs=top.values.log(),
        watch_log_probs=p[..., 5:6].log(),
    )
    stats.targets[-1], stats.log_prob[:, -1], stats.rank[:, -1] = -100, math.nan, 0
    return stats, ids


STATS, IDS = decoded(0)
OTHER, _ = decoded(1, layers=[0, 2, 4], positions=250)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Where pages lie and what they save."""
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def browser(files):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1300,800"):
        options.add_argument(f"--{argument}")
    several = "profile.default_content_setting_values.automatic_downloads"
    options.add_experimental_option("prefs", {"download.default_directory": str(files / "saved"), several: 1})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    started.set_script_timeout(10)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def one(files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BLOCK", 128)
        (files / "one.html").write_text(heatmap_page(STATS, Words(), IDS, "One", watch=[5]), encoding="utf-8")
    return files / "one.html"


@pytest.fixture(scope="module")
def two(files):
    runs = [("tuned", STATS, IDS), ("logit", OTHER, IDS[:250])]
    (files / "two.html").write_text(compare_page(runs, Words(), "Two", watch=[5]), encoding="utf-8")
    return files / "two.html"


class Shown:
    """A page in the browser."""

    def __init__(self, browser, path, fragment="t=light"):
        self.browser = browser
        browser.get("about:blank")
        browser.get(f"{path.as_uri()}#{fragment}")
        self.until("return ['all', 'problem'].includes(document.documentElement.dataset.ready)")

    def __call__(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, script, seconds=10):
        end = time.monotonic() + seconds
        while not (found := self(script)):
            assert time.monotonic() < end, script
            time.sleep(0.02)
        return found

    def settle(self):
        """What was asked for is drawn and the address says it."""
        self.browser.execute_async_script("setTimeout(() => requestAnimationFrame(arguments[0]), 250)")

    def element(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        """What the elements read, in one go: the page may make them anew at any time."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText.replaceAll('\\t', ' '))"
        )
        return self(script, selector)

    def click(self, text):
        self.browser.find_element(By.XPATH, f"//button[text()={json.dumps(text)}]").click()

    def keys(self, *keys):
        ActionChains(self.browser).send_keys(*keys).perform()

    def point(self, layer, position, pane=0):
        """The pointer on a cell, counted from the first in sight; returns the action, to be gone on with."""
        x, y, cell, tall = self(
            "const pane = page.panes[arguments[0]], box = pane.view.getBoundingClientRect(), view = page.view(pane);"
            "const top = box.top + HEAD + rowTop(view, view.rows.indexOf(arguments[1]));"
            "return [box.left, top, view.cell, view.rowHeight]",
            pane, layer,
        )  # fmt: skip
        action = ActionChains(self.browser, duration=0)
        action.w3c_actions.pointer_action.move_to_location(int(x + 58 + (position + 0.5) * cell), int(y + tall / 2))
        return action

    def pixel(self, layer, position):
        """The colour of a cell, beside its text."""
        return self(
            "const [pane] = page.panes, view = page.view(pane), ratio = devicePixelRatio;"
            "const x = LABELS + arguments[1] * view.cell - view.left + 3, y = HEAD + rowTop(view, arguments[0]) + 5;"
            "return [...pane.canvas.getContext('2d').getImageData(x * ratio, y * ratio, 1, 1).data].slice(0, 3)",
            layer, position,
        )  # fmt: skip

    def cursor(self):
        return self("return page.cursor && [page.cursor.layer, page.cursor.position]")

    def tip(self):
        self.until("return !document.getElementById('tip').hidden")
        return self.texts("#tip")[0]

    def errors(self):
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_colours_are_the_statistics(browser, one):
    matplotlib = pytest.importorskip("matplotlib")
    viridis = matplotlib.colormaps["viridis"]
    page = Shown(browser, one)
    spans = {"entropy": None, "top prob": (0, 1), "log-prob": (-12, 0), "KL": None}
    for label, span in spans.items():
        page.click(label)
        page.settle()
        assert page.texts("#statistics [aria-pressed=true]") == [label]
        name = {"top prob": "max_prob", "log-prob": "log_prob", "KL": "kl"}.get(label, label)
        values = getattr(STATS, name)
        above = values[values > 0].double().sort().values
        low, high = span or (0, float(above[int(0.96 * (len(above) - 1))]))
        for layer, position in [(0, 0), (1, 7), (3, 12), (4, 3)]:
            at = (float(values[layer, position]) - low) / (high - low)
            wanted = [255 * c for c in viridis(min(max(at, 0), 1))[:3]]
            found = page.pixel(layer, position)
            assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 9, (label, layer, position)
    page.click("rank")
    page.settle()
    brightness = [sum(page.pixel(int(STATS.rank[:, p].argmin()), p)) for p in range(10)]
    dark = [sum(page.pixel(int(STATS.rank[:, p].argmax()), p)) for p in range(10)]
    assert all(a >= b for a, b in zip(brightness, dark, strict=True)), "the first rank is the bright end"
    assert not page.errors()


def test_pointing_tells_and_clicking_pins(browser, one):
    page = Shown(browser, one, "t=light&s=kl")
    page.point(2, 3).perform()
    tip = page.tip()
    assert tip.startswith("layer 2, position 3")
    assert f"KL {float(f'{STATS.kl[2, 3]:.3g}'):g}" in tip
    assert f"rank {STATS.rank[2, 3]}" in tip
    for i in range(K):
        text, p = WORDS[STATS.top_ids[2, 3, i]], STATS.top_log_probs[2, 3, i].exp()
        lines = tip.splitlines()
        found = float(lines[lines.index(text, lines.index(next(x for x in lines if x.startswith("“")))) + 1][:-1])
        assert found == pytest.approx(100 * float(p), rel=2e-3), tip
    page.point(2, 3).click().perform()
    page.point(4, 6).click().perform()
    page.settle()
    assert page.texts("article.pin .where") == [
        "layer 2, position 3", "output, position 6"
    ]  # fmt: skip
    script = (
        "return [...document.querySelectorAll('article.pin')].map((card) => getComputedStyle(card).borderLeftColor)"
    )
    assert len({*page(script)}) == 2
    assert page.texts("article.pin:nth-child(2) .around .token") == [WORDS[i] for i in IDS[:16].tolist()]
    assert page.texts("article.pin .here") == [WORDS[IDS[3]], WORDS[IDS[6]]]
    drawn = len(browser.find_elements(By.CSS_SELECTOR, "#panel > .card:first-child svg path"))
    assert drawn == 2, "a curve a pin"
    page.point(2, 3).click().perform()
    page.settle()
    assert len(browser.find_elements(By.CSS_SELECTOR, "article.pin")) == 1, "a second click unpins"
    for _ in range(3):
        page.keys(Keys.ESCAPE)
    page.settle()
    assert not page.element("#panel").is_displayed()


def test_a_group_has_a_curve_in_a_pinned_cell(browser, files):
    written = heatmap_page(STATS, Words(), IDS, "Groups", watch={"<b>few": [5]})
    (files / "groups.html").write_text(written, encoding="utf-8")
    page = Shown(browser, files / "groups.html", "p=0.2.3")
    page.settle()
    assert page.texts("article.pin .keyed > span")[-1] == "watched: <b>few"
    *_, drawn = page(
        "return [...document.querySelectorAll('article.pin svg path')].map((path) => path.getAttribute('d'))"
    )
    heights = [-float(y) for y in re.findall(r"[ML][\d.-]+[ ,]([\d.-]+)", drawn)]
    wanted = STATS.watch_log_probs[:, 3, 0].exp().tolist()
    assert np.corrcoef(heights, wanted)[0, 1] > 0.999


def test_curves_go_through_the_layers(browser, one):
    page = Shown(browser, one, "p=0.2.3")
    values = page(
        "const [run] = page.runs;"
        "return page.texts.map((_, token) => run.layers.map((_, layer) => run.logProbOf(token, layer, 3) ?? null))"
    )
    ids = page("return page.ids")
    target = STATS.targets[3].item()
    for token, curve in zip(ids, values, strict=True):
        for layer, found in enumerate(curve):
            place = (STATS.top_ids[layer, 3] == token).nonzero()
            if token == target:
                wanted = STATS.log_prob[layer, 3]
            elif token == 5:
                wanted = STATS.watch_log_probs[layer, 3, 0]
            else:
                wanted = STATS.top_log_probs[layer, 3, place.item()] if len(place) else None
            assert (found is None) == (wanted is None), (token, layer)
            assert found is None or found == pytest.approx(float(wanted), rel=2**-11)


def test_finding(browser, one):
    page = Shown(browser, one)
    text = "".join(Words().decode([i]) for i in IDS.tolist()).lower()
    page.keys("/", "the cat")
    wanted = text.count("the cat")
    assert wanted > 0
    assert page.element("#matches").text == (f"{wanted} matches" if wanted > 1 else "1 match")
    starts = [sum(len(Words().decode([i])) for i in IDS[:n].tolist()) for n in range(POSITIONS + 1)]
    places = [n for n in range(POSITIONS) if text.startswith("the cat", starts[n] + text[starts[n] :].startswith(" "))]
    page.keys(Keys.ENTER)
    assert page.cursor()[1] == places[0]
    page.keys(Keys.ENTER)
    assert page.cursor()[1] == places[1 % len(places)]
    page.keys(Keys.ESCAPE, "N")
    assert page.cursor()[1] == places[0]
    page.keys("/", Keys.BACKSPACE * 7, "nowhere")
    assert page.element("#matches").text == "no match"


def test_jumping(browser, one):
    page = Shown(browser, one, "s=kl")
    order = STATS.kl.flatten().argsort(descending=True)
    page.keys("k")
    assert page.cursor() == [*divmod(int(order[0]), POSITIONS)]
    page.keys("k")
    assert page.cursor() == [*divmod(int(order[1]), POSITIONS)]
    page.keys("c")
    layer, position = divmod(int(STATS.kl.diff(dim=0).abs().argmax()), POSITIONS)
    assert page.cursor() == [layer + 1, position]
    tops = STATS.top_ids[:, :, 0]
    for wanted in (299, 17):
        page.keys("g", str(wanted), Keys.ENTER, "f")
        page.until(f"return page.cursor.position === {wanted}")
        page.settle()
        first = int((tops[:, wanted] == tops[-1, wanted]).nonzero()[0])
        assert page.cursor() == [first, wanted]
        left, room, cell = page(
            "return [page.panes[0].scroll.scrollLeft, page.panes[0].width - LABELS, page.state.cell]"
        )
        assert left <= wanted * cell < left + room, "it is in sight"
        page("document.getElementById('position').value = ''")


def test_keys(browser, one):
    page = Shown(browser, one, "t=light")
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert page.cursor() == [2, 1]
    assert page.tip().startswith("layer 2, position 1")
    assert "layer 2, position 1" in page.element("#status").get_attribute("textContent")
    page.keys(Keys.END, Keys.ENTER)
    assert page("return page.pins.map((pin) => [pin.layer, pin.position])") == [[2, POSITIONS - 1]]
    page.keys("5", "t", "+", "v")
    page.settle()
    state = page("return page.state")
    assert (state["statistic"], state["theme"], state["cell"], state["values"]) == ("kl", "dark", 88, True)
    page.keys("?")
    assert page.element("#help").is_displayed()
    page.keys(Keys.ESCAPE)
    assert not page.element("#help").is_displayed()
    assert not page.errors()


def test_two_runs(browser, two):
    page = Shown(browser, two)
    assert page.texts(".pane h2") == ["tuned", "logit"]
    page("page.panes[1].scroll.scrollLeft = 2000")
    page.settle()
    assert page("return page.panes.map((pane) => pane.scroll.scrollLeft)") == [2000, 2000]
    page("page.panes[0].scroll.scrollLeft = 0")
    page.settle()
    page.point(2, 4).perform()
    assert page.texts("#tip thead th") == ["", "tuned", "logit"]
    browser.find_element(By.CSS_SELECTOR, "#mode option[value=minus]").click()
    page.settle()
    assert page("return [page.panes.length, page.panes[0].run.layers, page.panes[0].run.positions]") == [
        1, ["0", "2", "output"], 250
    ]  # fmt: skip
    for name in ("kl", "log_prob", "watch0"):
        found = page(
            "const { run } = page.panes[0], s = run.statistics.find((one) => one.name === arguments[0]);"
            "return run.layers.map((_, layer) => Array.from({ length: 249 }, (_, at) => run.value(s, layer, at)))",
            name,
        )
        a, b = (s.watch_log_probs[..., 0] if name == "watch0" else getattr(s, name) for s in (STATS, OTHER))
        wanted = a[[0, 2, 4], :249] - b[:, :249]
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=2**-10, atol=0.02)
    page.click("rank")
    page.settle()
    page.point(2, 4).click().perform()
    assert page("return page.pins.map((pin) => [pin.run, pin.layer, pin.position])") == [[0, 4, 4]]
    assert not page.errors()


def test_the_address_restores_the_view(browser, two):
    page = Shown(browser, two, "t=light")
    page.keys("6")
    page.point(1, 2).click().perform()
    page.settle()  # a panel has opened
    page.point(2, 5, pane=1).click().perform()
    page.settle()
    page("page.panes[0].scroll.scrollLeft = 64 * 100")
    page.keys("/", "mat", Keys.ESCAPE)
    page.element("#stride option[value='2']").click()
    page.settle()
    address = browser.current_url.partition("#")[2]
    assert parse_qs(address)["p"] == ["0.1.2_1.2.5"]
    again = Shown(browser, two, address)
    assert again("return page.state") == page("return page.state")
    assert again("return page.pins.map((pin) => [pin.run, pin.layer, pin.position])") == [[0, 1, 2], [1, 2, 5]]
    assert again("return page.panes.map((pane) => pane.scroll.scrollLeft)") == [6400, 6400]
    assert again("return page.query") == "mat"
    state = again("return page.state")
    assert (state["statistic"], state["stride"]) == ("watch0", 2)
    for nonsense in ("s=x&x=-1&w=7&p=0.9.1_5_a.b.c_0.1&a=9&r=no&c=%FF&l=&y=NaN", "%%%", "x=1e99&p=0.0.99999999"):
        Shown(browser, two, nonsense)
        assert not again("return page.pins")
    assert not page.errors()


def saved(page, files, kind):
    folder = files / "saved"
    shutil.rmtree(folder, ignore_errors=True)
    page.element(f"#more option[value={kind}]").click()
    end = time.monotonic() + 10
    while not (found := [file for file in folder.glob(f"*.{kind}") if file.stat().st_size]):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found[0].read_bytes()


def test_what_is_in_sight_is_saved(browser, one, files):
    page = Shown(browser, one, "t=light&s=kl&x=10&l=4")
    page.settle()
    first, last = page("return inSight(page.view(page.panes[0]))")
    rows = [*csv.reader(io.StringIO(saved(page, files, "csv").decode("utf-8")))]
    assert rows[0][:7] == ["run", "layer", "position", "token", "next", "log_prob", "rank"]
    assert len(rows) == 1 + 2 * (last - first)
    for row in map(dict, (zip(rows[0], row, strict=True) for row in rows[1:])):
        layer = {"0": 0, "output": 4}[json.loads(row["layer"])]
        position = int(row["position"])
        assert first <= position < last
        assert json.loads(row["token"]) == WORDS[IDS[position]]
        assert float(row["kl"]) == pytest.approx(float(STATS.kl[layer, position]), rel=1e-3, abs=1e-9)
        assert json.loads(row["top_token_1"]) == WORDS[STATS.top_ids[layer, position, 1]]
    picture = ElementTree.fromstring(saved(page, files, "svg").decode("utf-8"))
    words = ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"0", "output", "KL(output || layer), nats", WORDS[IDS[first + 1]]} <= {*words}
    png = saved(page, files, "png")
    assert png.startswith(b"\x89PNG")
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    assert [width, height] == page("const { width, height } = page.pictureSize(); return [2 * width, 2 * height]")


def test_hostile_texts_are_shown_and_never_run(browser, files):
    stats, tokenizer, ids = hostile()
    path = files / "hostile <script> ' \" #.html"
    runs = [(TITLE, stats, ids), ('"><img src=x onerror=hacked=1>', stats, ids)]
    path.write_text(compare_page(runs, tokenizer, TITLE), encoding="utf-8")
    page = Shown(browser, path, "p=0.1.0_0.2.1_1.1.5_1.0.14&f=%3Cscript%3Ehacked=1")
    assert browser.title == page.element("h1").text == TITLE
    for layer in range(3):
        page.point(layer, layer).perform()
        page.tip()
    page.keys("?", Keys.ESCAPE)
    assert Hostile.TEXTS[0].replace(" ", "·") in "".join(page.texts("article.pin"))
    browser.find_element(By.CSS_SELECTOR, "#mode option[value=minus]").click()
    page.settle()
    shown = page("return document.body.innerText")
    for text in (Hostile.TEXTS[0], Hostile.TEXTS[1], r"\u202egnp", r"\x00\x1b[31m"):
        assert text in shown.replace("·", " "), text
    svg = page("return page.svg()")
    ElementTree.fromstring(svg)
    for row in csv.reader(io.StringIO(page("return page.csv()"))):
        for cell in row:
            assert not cell.startswith(("=", "+", "@", "\t", "\r")), cell
            assert not cell.startswith("-") or float(cell) < 0, cell
    assert page("return [typeof hacked, document.images.length, document.querySelectorAll('b i').length]") == [
        "undefined", 0, 0
    ]  # fmt: skip
    page("const s = document.createElement('script'); s.textContent = 'hacked = 1'; document.body.append(s)")
    assert page("return typeof hacked") == "undefined", "the policy lets no other script run"
    assert any("Content Security Policy" in error for error in page.errors())


def test_nan_and_infinity_are_drawn_as_such(browser, files):
    stats, tokenizer, ids = hostile()
    (files / "nan.html").write_text(heatmap_page(stats, tokenizer, ids), encoding="utf-8")
    page = Shown(browser, files / "nan.html", "s=kl&v=1")
    words = [
        text.text for text in ElementTree.fromstring(page("return page.svg()")).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"NaN", "∞", "\u2212∞"} <= {*words}
    page.point(0, 0).click().perform()
    page.settle()
    assert "KL NaN" in page.texts("article.pin table")[0]
    assert not page.errors()


def test_what_is_not_known_is_left_out(browser, files):
    bare = tl.LensStats(lse=STATS.lse[:, :1], layers=STATS.layers, entropy=STATS.entropy[:, :1])
    (files / "bare.html").write_text(heatmap_page(bare, None, None), encoding="utf-8")
    page = Shown(browser, files / "bare.html", "p=0.1.0")
    page.keys("k", "c", "f", "v", "/", "a", Keys.ENTER, Keys.ESCAPE, Keys.ARROW_DOWN)
    assert page.texts("article.pin .where") == ["layer 1, position 0"]
    assert not page.errors()


def test_a_page_of_another_format_says_so(browser, files, one):
    text = one.read_text(encoding="utf-8").replace('"format": 1', '"format": 2')
    (files / "newer.html").write_text(text, encoding="utf-8")
    Shown(browser, files / "newer.html")
    said = browser.find_element(By.TAG_NAME, "body").text
    assert said == (
        "This page has data of format 2, and its script reads format 1: make the page anew with one version of "
        "tuned-lens-fast."
    )


def test_a_notebooks_frame_is_sealed(browser, files):
    frame = STATS.show(Words(), IDS)._repr_html_()
    (files / "notebook.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{frame}", encoding="utf-8")
    browser.get((files / "notebook.html").as_uri())
    browser.switch_to.frame(0)
    end = time.monotonic() + 10
    while browser.execute_script("return document.documentElement.dataset.ready") != "all":
        assert time.monotonic() < end
    assert browser.execute_script("return page.runs[0].positions") == POSITIONS
    assert browser.execute_script("try { return parent.document.title } catch { return 'sealed' }") == "sealed"
    browser.switch_to.default_content()


def test_a_served_page_loads_what_is_in_sight(browser, files, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK", 16)
    text = MemoryText("one", "One", [("One", STATS)], IDS, Words())
    asked = []
    find = text.part
    monkeypatch.setattr(text, "part", lambda name: asked.append(name) or find(name))
    with Server(("127.0.0.1", 0), "texts", [text]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        browser.get(f"{server.url}#x=100&s=kl")
        page = Shown.__new__(Shown)
        page.browser = browser
        page.until("return document.documentElement.dataset.ready === 'all'")
        page("page.source.most = 4")
        assert {"tokens", "text-0", "block-0-6"} <= {*asked}
        assert "block-0-0" not in asked
        for at in (0, 250, 100):
            page("page.goTo(page.runs[0], 2, arguments[0])", at)
            page.until(f"return page.runs[0].loaded({at})")
            assert page("return page.runs[0].blocks.filter(Boolean).length") <= 6
        page.settle()
        found = page("return page.runs[0].value(page.statistic, 2, 100)")
        assert found == pytest.approx(float(STATS.kl[2, 100]), rel=2**-11)
        server.shutdown()
        thread.join()
    page("page.goTo(page.runs[0], 2, 200)")
    page.until("return document.getElementById('size').textContent.includes('does not answer any more')")


def test_pages_are_small(one):
    assert os.path.getsize(one) < 0.3e6 + 1000 * POSITIONS
