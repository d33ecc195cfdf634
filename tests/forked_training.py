"""A training run that is killed at a chosen moment and resumed, of a tiny model; and a process for it.

``python forked_training.py FOLDER`` kills one run in FOLDER at each moment of ``MOMENTS``, resumes it, and compares
what it ends with to an undisturbed run, bit for bit. Exits with 1 where they differ.
"""

import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import tiny_text_model
import torch

import tuned_lens_fast as tl
from tuned_lens_fast.training import folder, loop, ridge

STEPS = 5


def documents():
    """Token ids of thirty documents."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(5, 120, (30,), generator=generator).tolist()
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def trained(model, out=None, **changes):
    """A small run: the lens and the report."""
    lens = changes.pop("lens", None) or tl.TunedLens.from_model(model)
    asked = {
        "steps": STEPS, "tokens_per_step": 128, "sequence_length": 32, "init_tokens": 512, "eval_tokens": 64,
        "eval_every": 2, "checkpoint_every": 2, "quiet": True,
    }  # fmt: skip
    return lens, tl.train(model, lens, changes.pop("documents", documents()), out=out, **asked | changes)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, number, after=False):
    """Die at the ``number``-th call of a function, before or after it."""
    function, calls = getattr(owner, name), []

    def dying(*args, **options):
        calls.append(None)
        if len(calls) == number and not after:
            die()
        found = function(*args, **options)
        if len(calls) == number:
            die()
        return found

    setattr(owner, name, dying)


def half_written(number):
    """Die when the ``number``-th checkpoint is half on the disk."""
    save, calls = torch.save, []

    def dying(state, path):
        save(state, path)
        calls.append(None)
        if len(calls) == number:
            with open(path, "rb+") as file:
                file.truncate(path.stat().st_size // 2)
            die()

    torch.save = dying


#: Where a run dies, by name.
MOMENTS = {
    "in the ridge regression": lambda: at_call(ridge.Moments, "solved", 2),
    "in the first checkpoint": lambda: half_written(1),
    "between a gradient and its step": lambda: at_call(loop.Run, "_update", 2),
    "behind a step without a checkpoint": lambda: at_call(loop.Run, "_update", 3, after=True),
    "in a later checkpoint": lambda: half_written(3),
    "behind a checkpoint": lambda: at_call(folder.TrainingFolder, "save", 3, after=True),
    "before the lens is written": lambda: at_call(tl.TunedLens, "save", 1),
    "behind the lens": lambda: at_call(tl.TunedLens, "save", 1, after=True),
    "before the report says that it is finished": lambda: at_call(folder.TrainingFolder, "finish", 1),
}


def forked(work):
    """How a child ended that did ``work``."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitpid(child, 0)[1]


def main(root):
    torch.set_num_threads(1)  # a fork has no other threads to wait for
    warnings.simplefilter("error")
    loop.draw = lambda report, path: path.touch()  # half a second each
    model, _ = tiny_text_model.make()
    changes = {"optimizer": "adam", "rank": 3}
    lens, report = trained(model, root / "undisturbed", **changes)
    failures = []
    for name, kill in MOMENTS.items():
        out = root / "killed"

        def dying(kill=kill, out=out):
            kill()
            trained(model, out, **changes)

        def resumed(out=out):
            again, its = trained(model, out, **changes)
            for mine, wanted in zip(
                again.layer_translators.parameters(), lens.layer_translators.parameters(), strict=True
            ):
                assert torch.equal(mine, wanted)
            assert its.losses == report.losses
            of_its, of_wanted = ([{**one, "seconds": 0} for one in r.evaluations] for r in (its, report))
            assert of_its == of_wanted
            assert not list(out.glob(".*")), "what the killed process was writing is still there"
            saved = torch.load(out / "params.pt", weights_only=True)
            assert all(torch.equal(saved[key], value) for key, value in lens.layer_translators.state_dict().items())

        if forked(dying) != signal.SIGKILL or forked(resumed) != 0:
            failures.append(name)
        shutil.rmtree(out)
    print(f"{len(MOMENTS)} kills, {len(failures)} that did not end as an undisturbed run: {failures}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
