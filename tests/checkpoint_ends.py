"""Which decoders are read from files alone: ``python tests/checkpoint_ends.py`` counts them and names the others.

Of each model type that a lens can read a tiny model is saved, as transformers saves it. What ``from_checkpoint`` makes
of the folder has to give the very logits of the lens that is made of the model.
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import torch
from all_models import DECODERS, build

from tuned_lens_fast import Unembed


def problem(model_type: str) -> str | None:
    """Why it is not read from files; "" where no lens reads it at all, None where it is read."""
    model = build(model_type)
    try:
        whole = Unembed(model)
    except NotImplementedError:
        return ""
    width = whole.norm.hidden_width(whole.head)
    h = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            found = Unembed.from_checkpoint(folder)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None if torch.equal(found(h), whole(h)) else "other logits than the model's"


def main() -> None:
    problems = {model_type: problem(model_type) for model_type in sorted(DECODERS)}
    readable = {model_type: why for model_type, why in problems.items() if why != ""}
    print(f"{sum(why is None for why in readable.values())} of {len(readable)} are read")
    for model_type, why in readable.items():
        if why is not None:
            print(f"{model_type}: {why}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
