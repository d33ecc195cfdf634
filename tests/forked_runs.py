"""The run that is killed, damaged and resumed, of a tiny model; and a process for it.

``python forked_runs.py --out FOLDER`` decodes ``documents()`` into the folder; with ``--folder FOLDER --kills 5
--damages 12 --workers 3`` it is the campaign of bench/kill_resume.py.
"""

import argparse
import sys
from pathlib import Path

import tiny_text_model
import torch

import tuned_lens_fast as tl


def documents():
    """Token ids of eight documents; the longest take several chunks."""
    random = torch.Generator().manual_seed(2)  # of its own: several threads ask for them at once
    lengths = [400, 250, *torch.randint(1, 130, (6,), generator=random).tolist()]
    return [torch.randint(0, 256, (length,), generator=random) for length in lengths]


def decode(model, tokenizer, out, **changes):
    """The run that is killed and resumed."""
    question = {"top_k": 3, "watch": [65, 66], "chunk": 130, "tokenizer": tokenizer} | changes
    return tl.decode_documents(model, tl.LogitLens.from_model(model), documents(), out=out, **question)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="for the campaign's runs")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--damages", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--engine", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no other threads to wait for
    tiny = tiny_text_model.make()
    if args.out is not None:
        decode(*tiny, args.out)
        return 0
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    from kill_resume import campaign

    return campaign(
        lambda out: decode(*tiny, out, engine=args.engine), args.folder, args.kills, args.damages, args.workers
    )


if __name__ == "__main__":
    sys.exit(main())
