"""Times other tiles for the vocabulary pass on the GPU at hand, and keeps the fastest. Nothing runs this by itself.

    python -m tuned_lens_fast.kernels.search --d-model 4096 --vocab 128256 --out tiles.json
    TUNED_LENS_FAST_TILES=tiles.json python your_script.py

Every candidate that compiles must give the built-in tile's sums and top ten, and gathered targets' logits to the bit as
they are in its tiles; those that do are timed in turn, and the median decides. Tiles of overlapped.py and
cooperative.py are tried where --overlapped and --cooperative ask for them, and alone: they have run on no GPU yet. An
entry belongs to one GPU model, Triton version, dtype and d_model, with or without a top k, and is used for no other;
the file may hold many, and another search adds to it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from tuned_lens_fast.atomic_write import atomic_write
from tuned_lens_fast.engines.interface import Head
from tuned_lens_fast.engines.state import State, key_ids
from tuned_lens_fast.engines.statistics import LSE, STATISTICS
from tuned_lens_fast.kernels import launch
from tuned_lens_fast.kernels.launch import Tile
from tuned_lens_fast.kernels.target_logits import target_logits
from tuned_lens_fast.kernels.top_k import serves, top_k
from tuned_lens_fast.kernels.vocabulary_pass import vocabulary_pass

#: As far as two tiles' sums of the same products may be apart, in nats.
TOLERANCE = 2e-3
#: Share of rows whose top ten may differ: a tenth and an eleventh token as likely are told apart by rounding.
MOST_DIFFERENT = 2e-3
#: Of a program, on Hopper and Blackwell.
SHARED_BYTES = 227 * 1024


def overlapped_candidates(d_model: int) -> Iterator[Tile]:
    """For 16-bit operands on Hopper: tiles of overlapped.py with as many stages as fit, and with one fewer."""
    from tuned_lens_fast.kernels.overlapped import shared_bytes

    for depth in (64, 32):
        tiles = (Tile(128, 128, depth, warps=8, stages=n, tma=True, overlapped=True) for n in range(8, 1, -1))
        yield from itertools.islice((tile for tile in tiles if shared_bytes(tile, d_model) <= SHARED_BYTES), 2)


def cooperative_candidates(d_model: int) -> Iterator[Tile]:
    """For 16-bit operands on Hopper: tiles of cooperative.py in as many stages as fit, held back and in step."""
    from tuned_lens_fast.kernels.cooperative import serves, shared_bytes

    for depth in (64, 32):
        tiles = (Tile(128, 256, depth, warps=8, stages=n, tma=True, cooperative=True) for n in range(12, 1, -1))
        tile = next(tile for tile in tiles if shared_bytes(tile) <= SHARED_BYTES)
        lags = (lag for lag in (tile.stages - 1, 0) if serves(-(-d_model // depth), tile.stages, lag))
        yield from (replace(tile, lag=lag) for lag in lags)


def candidates(built_in: Tile, operand_bytes: int) -> Iterator[Tile]:
    """The built-in tile and others of such sizes as kernels can use; which of them compile is seen when they run."""
    yield built_in
    sizes = itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4))
    for rows, vocab, depth, warps, stages in sizes:
        if stages * (rows + vocab) * depth * operand_bytes > SHARED_BYTES or rows * vocab > 4096 * warps:
            continue  # beyond shared memory, or 128 accumulators a thread
        for flat in (False, True) if built_in.tma else (False,):
            tile = replace(
                built_in,
                block_rows=rows,
                block_vocab=vocab,
                block_depth=depth,
                warps=warps,
                stages=stages,
                flat=flat,
            )
            if tile != built_in:
                yield tile


def merged(head: Head, tile: Tile) -> Tile:
    """The tile as a decode with a top 10 takes it."""
    row_bytes = head.weight.shape[1] * head.weight.dtype.itemsize
    return replace(tile, merged=launch.merged_tiles(head.vocab, tile, 10, row_bytes))


def working(
    x: Tensor, head: Head, tiles: Sequence[Tile], *, with_top_k: bool
) -> dict[Tile, Callable[[], tuple[State, Tensor | None]]]:
    """One pass of x ``[rows, d_model]`` over the head, by each of those tiles that give the first one's answer.

    Raises:
        RuntimeError: the first tile, which says what is right, does not work.
    """
    calls: dict[Tile, Callable[[], tuple[State, Tensor | None]]] = {}
    expected: tuple[Tensor, Tensor] | None = None
    alike = Head(head.weight[:1].repeat(min(head.vocab, 4096), 1))  # of these, every token's logit is the largest
    targets = torch.arange(len(x), device=x.device) % alike.vocab
    for tile in tiles:
        whole = merged(head, tile) if with_top_k else tile
        try:
            own = target_logits(x, head, targets % head.vocab, tile)
            one_pass = functools.partial(
                vocabulary_pass, x, head, whole, target_logits=own, running=("t", "r"), group_maxima=with_top_k
            )
            sums, best = _answer(*one_pass(), x, head, whole)
            gathered = target_logits(x, alike, targets, whole)
            _, groups = vocabulary_pass(x, alike, whole, group_maxima=True)
            assert groups is not None
            same = torch.equal(gathered, groups[:, 0].amax(1))
        except Exception as error:  # beyond the GPU's resources, or Triton's
            if expected is None:
                raise RuntimeError(f"the built-in {tile} does not work here") from error
            print(f"{tile}: {type(error).__name__}", file=sys.stderr)
            continue
        expected = expected or (sums, best)
        if not bool(((sums - expected[0]).abs() <= TOLERANCE).all()):
            print(f"{tile}: wrong sums", file=sys.stderr)
        elif _differ(best, expected[1]) > MOST_DIFFERENT:
            print(f"{tile}: wrong top ids", file=sys.stderr)
        elif not same:
            print(f"{tile}: a gathered target's logit is not its tile's", file=sys.stderr)
        else:
            calls[tile] = one_pass
    return calls


def search(x: Tensor, head: Head, tiles: Sequence[Tile], *, with_top_k: bool, rounds: int = 10) -> dict[Tile, float]:
    """Median seconds of one pass by each of the tiles that :func:`working` lets through."""
    calls = working(x, head, tiles, with_top_k=with_top_k)
    seconds: dict[Tile, list[float]] = {tile: [] for tile in calls}
    for _ in range(rounds):
        for tile, call in calls.items():
            _wait(x)
            start = time.perf_counter()
            call()
            _wait(x)
            seconds[tile].append(time.perf_counter() - start)
    return {tile: statistics.median(some) for tile, some in seconds.items()}


def _answer(state: State, group_maxima: Tensor | None, x: Tensor, head: Head, tile: Tile) -> tuple[Tensor, Tensor]:
    """lse and entropy ``[2, rows]``, and every row's top ids ``[rows, 10]`` in ascending order, or fewer.

    -1 where the kernels hand a row back; ``[rows, 0]`` where no top k is wanted, or for too small a vocabulary.
    """
    formulas = LSE.formula, STATISTICS["entropy"].formula
    sums = torch.stack([formula(state) for formula in formulas if formula is not None])
    k = next((k for k in (10, 5, 1) if group_maxima is not None and serves(k, group_maxima.shape[2])), 0)
    if group_maxima is None or not k:
        return sums, torch.empty(len(x), 0, dtype=torch.int64)
    found = top_k(x, head, group_maxima, state, k, tile)
    assert found.top is not None
    assert found.unsure is not None
    return sums, key_ids(found.top).masked_fill(found.unsure[:, None], -1).sort(1).values


def _differ(ids: Tensor, others: Tensor) -> float:
    """Of the rows that neither handed back, the share whose top ids differ."""
    if ids.shape != others.shape:  # so small a vocabulary that one of them serves fewer
        return 0.0
    both = ((ids >= 0) & (others >= 0)).all(1)
    return float((ids != others).any(1)[both].float().mean()) if bool(both.any()) else 0.0


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def add_entry(path: Path, key: str, tile: Tile) -> None:
    """Write ``tile`` into the file of entries, beside what it holds."""
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[key] = asdict(tile)
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tuned_lens_fast.kernels.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--d-model", type=int, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--rows", type=int, default=8192, help="layers x positions (default: 8192)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--precision", choices=("ieee", "tf32"), default="ieee", help="of fp32 products (default: ieee)"
    )
    parser.add_argument("--without-top-k", action="store_true", help="for decodes that ask for no top k")
    parser.add_argument(
        "--overlapped", action="store_true", help="on Hopper, time the tiles of overlapped.py beside the built-in alone"
    )
    parser.add_argument("--cooperative", action="store_true", help="likewise, the tiles of cooperative.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write the fastest into")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("search: PyTorch sees no NVIDIA GPU", file=sys.stderr)
        return 1
    dtype, with_top_k = getattr(torch, options.dtype), not options.without_top_k
    device = torch.device("cuda", torch.cuda.current_device())
    built_in = launch.built_in_tile(launch.architecture(device), dtype, options.d_model, options.precision, with_top_k)
    built_in = replace(built_in, precision=options.precision)
    x = torch.randn(options.rows, options.d_model, device=device).to(dtype)
    weight = (torch.randn(options.vocab, options.d_model, device=device) * 3 * options.d_model**-0.5).to(dtype)
    tiles = list(candidates(built_in, dtype.itemsize))
    if options.overlapped or options.cooperative:
        if launch.architecture(device)[0] != 9 or dtype.itemsize != 2 or not built_in.tma:
            parser.error(
                "--overlapped, --cooperative: wanted a Hopper GPU, 16-bit operands and a multiple of 8 as --d-model"
            )
        tiles = [built_in]
        tiles += overlapped_candidates(options.d_model) if options.overlapped else []
        tiles += cooperative_candidates(options.d_model) if options.cooperative else []
    found = search(x, Head(weight), tiles, with_top_k=with_top_k)
    for tile, seconds in sorted(found.items(), key=lambda item: item[1])[:5]:
        print(f"{seconds * 1e3:8.3f} ms  {tile}{'  (built in)' if tile == built_in else ''}")
    key = launch.entry_key(device, dtype, options.d_model, options.precision, with_top_k)
    add_entry(options.out, key, min(found, key=found.__getitem__))
    print(f"{options.out}: {key}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
