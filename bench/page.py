"""Sizes and speeds of the page that --html writes, in a headless Chromium.

    tuned-lens-fast decode MODEL --file TEXT --out stats.safetensors
    python bench/page.py stats.safetensors --tokenizer MODEL
    python bench/page.py --page ANY.html
    python bench/page.py --page ANY.html --view "s=rank&p=0.29.8" --picture FILE.png

measures pages of the first 64, 512, ... positions, or a page that is there: its bytes, the time from opening it to its
first picture, and the time from frame to frame while it scrolls, in one process of Chromium without a GPU. The first
opening, which starts the browser's own processes, is not counted. The last line takes a picture of a view instead: what
follows # in the page's address.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from selenium import webdriver
from transformers import AutoTokenizer

from tuned_lens_fast.plotting import heatmap_page
from tuned_lens_fast.stats import LensStats

#: The first picture of a page that does not say it: two frames after all of it is loaded.
OPENED = """
const done = arguments[0], said = () => performance.getEntriesByName("first picture")[0]?.startTime;
const wait = (left) => {
  if (document.readyState !== "complete") requestAnimationFrame(() => wait(2));
  else if (said() !== undefined) done(said());
  else if (left || document.documentElement.dataset.theme) requestAnimationFrame(() => wait(left - 1));
  else done(performance.now());
};
wait(2);
"""
#: Scrolls on by a third of a screen's hundredth a frame, 150 frames; what lies between frames, in ms.
SCROLLED = """
const done = arguments[0], box = document.querySelector(".scroll") ?? document.scrollingElement, times = [];
const step = (now) => {
  times.push(now);
  if (times.length > 150) { done(times.slice(1).map((time, i) => time - times[i])); return; }
  box.scrollLeft = (box.scrollLeft + 41) % (box.scrollWidth - box.clientWidth);
  requestAnimationFrame(step);
};
requestAnimationFrame(step);
"""


def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1440,900"):
        options.add_argument(f"--{argument}")
    started = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    started.set_script_timeout(120)
    return started


def measured(driver, path, repeats):
    """Bytes, ms to the first picture and ms a frame: medians of ``repeats``, frames also the 95th percentile."""
    opened, frames = [], []
    for _ in range(repeats):
        driver.get("about:blank")
        driver.get(path.resolve().as_uri())
        opened.append(driver.execute_async_script(OPENED))
        time.sleep(1)
        frames += driver.execute_async_script(SCROLLED)
    frames.sort()
    return {
        "bytes": path.stat().st_size,
        "first_picture_ms": round(statistics.median(opened)),
        "frame_ms": round(statistics.median(frames), 1),
        "frame_95_ms": round(frames[int(0.95 * len(frames))], 1),
    }


def photographed(driver, page, view, picture):
    """``picture``: the window with the page in it, at that view."""
    driver.set_window_rect(width=1500, height=1080)
    driver.get(f"{page.resolve().as_uri()}#{view}")
    driver.execute_async_script(OPENED)
    time.sleep(1)
    driver.save_screenshot(str(picture))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stats", type=Path, nargs="?", help="what decode --out FILE.safetensors wrote")
    parser.add_argument("--tokenizer", help="a folder, or an id on the hub")
    parser.add_argument("--positions", default="64,512,2048,8192")
    parser.add_argument("--page", type=Path, action="append", default=[], help="a page that is there")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--view", default="", help="of the page in --picture")
    parser.add_argument("--picture", type=Path, help="a PNG to write in place of measuring")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages = [*args.page]
        if args.stats is not None:
            stats, tokenizer = LensStats.load(args.stats), AutoTokenizer.from_pretrained(args.tokenizer)
            read = torch.cat([stats.targets[:1], stats.targets[:-1]])  # what was read first is not in the file
            for positions in map(int, args.positions.split(",")):
                if positions > len(read):
                    continue
                start = time.perf_counter()
                text = heatmap_page(stats[:, :positions], tokenizer, read[:positions])
                print(f"{positions} positions made in {time.perf_counter() - start:.2f} s", flush=True)
                pages.append(Path(folder, f"{positions}.html"))
                pages[-1].write_text(text, encoding="utf-8")
        driver = browser()
        try:
            if args.picture is not None:
                photographed(driver, pages[0], args.view, args.picture)
                return
            measured(driver, pages[0], 1)
            for page in pages:
                print(json.dumps({"page": page.name, **measured(driver, page, args.repeats)}), flush=True)
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
