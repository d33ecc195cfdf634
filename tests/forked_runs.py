"""A server of runs to kill: it has imported everything and made a tiny model, so that a run starts as fast as a fork.

Reads lines of JSON, ``{"out": folder}``, and for each answers with a child's process id on one line
and, when the child has ended, with its wait status on the next. The child decodes ``documents()`` into the folder.
Run it as ``python forked_runs.py``.
"""

import json
import os
import sys

import tiny_text_model
import torch

import tuned_lens_fast as tl


def documents():
    """Token ids of eight documents; the longest take several chunks."""
    torch.manual_seed(2)
    lengths = [400, 250, *torch.randint(1, 130, (6,)).tolist()]
    return [torch.randint(0, 256, (length,)) for length in lengths]


def decode(model, tokenizer, out, **changes):
    """The run that is killed and resumed."""
    question = {"top_k": 3, "watch": [65, 66], "chunk": 130, "tokenizer": tokenizer} | changes
    return tl.decode_documents(model, tl.LogitLens.from_model(model), documents(), out=out, **question)


def main():
    torch.set_num_threads(1)  # a fork has no other threads to wait for
    model, tokenizer = tiny_text_model.make()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 1
            try:
                decode(model, tokenizer, json.loads(line)["out"])
                code = 0
            except KeyboardInterrupt:
                code = 130
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
