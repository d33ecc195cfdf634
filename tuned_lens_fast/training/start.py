"""What ``tl.train`` does before the first step: it checks what is asked, finds the run that is there or begins one."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from torch import Tensor

from tuned_lens_fast.checkpoint import load_checkpoint
from tuned_lens_fast.conditions import machine, versions, warn_of_changes
from tuned_lens_fast.data import fingerprint
from tuned_lens_fast.engines import choose
from tuned_lens_fast.messages import listed, quoted
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.wrappers import name_or_path
from tuned_lens_fast.nn import TunedLens
from tuned_lens_fast.progress_bar import TrainingBar
from tuned_lens_fast.streaming import check_lens
from tuned_lens_fast.training.documents import prepare
from tuned_lens_fast.training.folder import LENS, TrainingFolder, training_folder
from tuned_lens_fast.training.loop import Run
from tuned_lens_fast.training.optimizers import DEFAULT_OPTIMIZER, RECIPES, SCHEDULES, check_muon
from tuned_lens_fast.training.report import TrainingReport
from tuned_lens_fast.training.states import Reader
from tuned_lens_fast.training.translators import Translators
from tuned_lens_fast.training.workers import Workers
from tuned_lens_fast.validation import check_budget, check_layer_numbers, check_model, kind, layers_of

#: Steps of training, and tokens of each: those of tuned-lens.
STEPS, TOKENS_PER_STEP = 250, 2**18
#: Tokens that the ridge regression is fitted on, and that held-out KL is measured on at most.
INIT_TOKENS, EVAL_TOKENS = 2**16, 2**14
#: Share of the tokens that is held out where there are no documents for it.
HELD_OUT = 0.05
#: Steps from one measurement to the next, and from one checkpoint to the next.
EVAL_EVERY, CHECKPOINT_EVERY = 50, 25
LOSSES, INITS = ("kl", "ce"), ("ridge", "zero", "lens")


def train(
    model: Any,
    lens: TunedLens,
    documents: Iterable[Tensor | Sequence[int]],
    *,
    out: str | os.PathLike[str] | None = None,
    held_out: float | Iterable[Tensor | Sequence[int]] = HELD_OUT,
    separator: int | Literal["eos"] | None = "eos",
    sequence_length: int | None = None,
    loss: Literal["kl", "ce"] = "kl",
    steps: int = STEPS,
    tokens_per_step: int = TOKENS_PER_STEP,
    layers: Iterable[int] | None = None,
    init: Literal["ridge", "zero", "lens"] = "ridge",
    init_tokens: int = INIT_TOKENS,
    rank: int | None = None,
    bias_only: bool = False,
    optimizer: str = DEFAULT_OPTIMIZER,
    learning_rate: float | None = None,
    schedule: str = "linear",
    warmup: int | None = None,
    weight_decay: float | None = None,
    clip: float | None = 1.0,
    seed: int = 0,
    eval_every: int = EVAL_EVERY,
    eval_tokens: int | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    resume: bool = True,
    engine: str = "auto",
    memory_budget: int | None = None,
    quiet: bool = False,
) -> TrainingReport:
    """Train the translators of ``lens``, all layers at once from one forward pass of the model.

    What is minimised is the sum over layers of KL(model || lens), or of the cross-entropy of the next token, each a
    mean over positions (Belrose et al., arXiv:2303.08112). No logits are written. The lens is changed in place, and its
    translators are fp32 from then on; the model is left as it was.

    With ``out`` a checkpoint is written every so often, and the same call goes on behind the last one after a kill, an
    interrupt or a full disk. On a CPU the parameters end up as those of an undisturbed run, bit for bit with the same
    machine, versions, number of threads and memory budget; a run that goes on with others warns. In the end the folder
    holds the lens (``params.pt`` and ``config.json``, which tuned-lens reads too), ``report.json`` and a picture of it.

    In a process group of ``torch.distributed``, as torchrun starts them, all processes make the same call with a whole
    model each, and every step's sequences are shared out; the folder is one that all of them see. Parameters end up
    alike on all, and as one process trains them but for the last bits. A run goes on with any number of processes.

    A lens that training goes on from must be given to the second call as it was to the first.

    A layer whose loss or gradient is not finite in a step does not take that step; others do, and the report has which.

    Args:
        model: a transformers causal LM; it runs in evaluation mode and is left in the modes it was in.
        lens: a TunedLens of that model.
        documents: token ids of each, one dimension, not empty. They are joined and cut into sequences of one length,
            which come in random order, and again in another one when all have come. If every document begins with the
            model's bos token, so does every sequence.
        out: a folder of the run's own, made if it is not there.
        held_out: the share of tokens to hold out, in whole documents, or documents to hold out. They are measured
            on and never trained on, nor is any other document of the same tokens.
        separator: the token id between documents; "eos" for the model's own, if it has one; None for none.
        sequence_length: positions of a sequence; 2,048 if None, or as many as the model has learned if those are fewer.
        loss: "kl" for KL(model || lens), "ce" for the cross-entropy of the next token.
        steps: of the optimiser.
        tokens_per_step: of which as many whole sequences are taken as fit.
        layers: those to train, all that the lens has if None; the others stay as they are.
        init: "ridge" for a regression of the last residual stream on each layer's hidden state, "zero" for the logit
            lens, "lens" for what the lens has.
        init_tokens: to fit the regression on.
        rank: train two factors of this rank in place of each matrix. The lens has their product.
        bias_only: train no matrices.
        optimizer: "sgd" with Nesterov's momentum of 0.9, "adam" with amsgrad, or "muon" for matrices with Adam for
            biases.
        learning_rate: 1 for sgd, where it is multiplied with 1 - 0.9 as in tuned-lens, 1e-3 for adam, 1e-2 for muon if
            None.
        schedule: the learning rate behind the warmup: "linear" or "cosine" to 0, or "constant".
        warmup: steps in which the learning rate rises; for adam a fifth of the steps and at most 1,000, else 0 if None.
        weight_decay: added to the gradient as a multiple of the parameter, with muon subtracted from its matrices as a
            multiple of them; 1e-3, with muon 0 if None.
        clip: the gradient of all layers together is cut to this norm; None for no limit.
        seed: of what is held out, of the order of sequences, and of the factors that begin at random.
        eval_every: steps from one measurement of the held-out KL to the next; there is always one before and one after.
        eval_tokens: to measure on at most, in whole sequences; as many as a step has and at most 16,384 if None.
        checkpoint_every: steps from one checkpoint to the next.
        resume: False refuses a folder that holds a run already.
        engine: "auto", or one of :func:`tuned_lens_fast.engines`.
        memory_budget: bytes of hidden states and scratch, the model's own activations, the lens, its gradients, its
            optimiser and the regression's sums apart; 256 MiB, or what one sequence takes where that is more, if None.
        quiet: no progress bar, which otherwise is on standard error if that is a terminal.

    Returns:
        What was measured. A run that is finished already is not trained again: its lens and report are read, with a
        warning.

    Raises:
        ValueError, IndexError, TypeError: an argument is not what it should be: a lens of another model, too little
            text, a folder of another run, a memory budget too small.
        FloatingPointError: a layer could not take many steps in a row.
        BlockingIOError: another process is writing to ``out``.
        OSError: ``out`` cannot be written. The last checkpoint stays; the same call goes on.
        ImportError: this PyTorch has no Muon.
        RuntimeError: another process of the group failed, with its message, or cannot be reached.
    """
    model = check_model(model)
    workers = Workers(model)
    with workers.together():
        if not isinstance(lens, TunedLens):
            raise TypeError(f"lens: got {kind(lens)}, wanted a TunedLens")
        _check_choices(
            loss=(loss, LOSSES), init=(init, INITS), optimizer=(optimizer, RECIPES), schedule=(schedule, SCHEDULES)
        )
        _check_counts(
            steps=steps, tokens_per_step=tokens_per_step, init_tokens=init_tokens, eval_every=eval_every,
            eval_tokens=eval_tokens, checkpoint_every=checkpoint_every,
        )  # fmt: skip
        _check_counts(0, seed=seed, warmup=warmup)
        recipe = RECIPES[optimizer]
        if optimizer == "muon":
            check_muon()
        warmup = min(recipe.warmup(steps), steps) if warmup is None else warmup
        if warmup > steps:
            raise ValueError(f"warmup: got {warmup} of {steps} steps")
        learning_rate = recipe.learning_rate if learning_rate is None else learning_rate
        weight_decay = recipe.weight_decay if weight_decay is None else weight_decay
        _check_positive(learning_rate=learning_rate, weight_decay=weight_decay or None, clip=clip)
        width = lens.config.d_model
        if rank is not None and (not isinstance(rank, int) or not 1 <= rank <= width):
            raise ValueError(f"rank: got {quoted(rank)}, wanted a whole number from 1 to the lens's width {width}")
        if bias_only and (rank is not None or not lens.config.bias):
            raise ValueError(f"bias_only: {'rank is of matrices' if rank is not None else 'the lens has no biases'}")
        if memory_budget is not None:
            check_budget(memory_budget)

        text = prepare(model, documents, held_out, separator, sequence_length, tokens_per_step, seed)
        sequence_length = text.training.shape[1]
        per_step = tokens_per_step // sequence_length
        if eval_tokens is None:
            eval_tokens = min(EVAL_TOKENS, tokens_per_step)
        measured = text.held_out[: max(1, eval_tokens // text.held_out.shape[1])]
    with workers.checks_of_model():
        blocks = len(get_transformer_layers(model)[1])
        check_lens(model, lens, blocks)
        there = layers_of(lens, blocks)
        numbers = there if layers is None else sorted(set(check_layer_numbers(lens, layers, blocks)))
        if not numbers:
            raise ValueError("layers: got none to train")
        choose(engine, lens.unembed.head.weight.device, lens.unembed.head.weight.dtype)
        arguments: dict[str, Any] = {
            "loss": loss, "steps": steps, "tokens_per_step": per_step * sequence_length,
            "sequence_length": sequence_length, "separator": text.separator, "held_out": text.share,
            "layers": numbers, "init": init, "init_tokens": init_tokens,
            "rank": rank, "bias_only": bias_only, "optimizer": optimizer, "learning_rate": float(learning_rate),
            "schedule": schedule, "warmup": warmup, "weight_decay": float(weight_decay), "clip": clip, "seed": seed,
            "eval_tokens": measured.numel(),
        }  # fmt: skip
        # What the lens has does not matter where all of it is made anew.
        keeps = init == "lens" or len(numbers) < len(there)
        identity = {
            "model": fingerprint.of_model(model),
            "lens": fingerprint.of_lens(lens)
            if keeps
            else f"{width} wide, {'with' if lens.config.bias else 'without'} bias",
            **text.hashes,
            **arguments,
        }
        called = name_or_path(model) or type(model).__name__
        conditions = {"versions": versions(), "machine": machine(lens.unembed.head.weight.device)}
        reader = Reader(model, lens, numbers, sequence_length, per_step, engine, memory_budget)
        made_with = {
            **conditions["versions"],
            **conditions["machine"],
            "engine": engine,
            "memory_budget": reader.budget,
            "processes": workers.count,
        }
    workers.agree(lambda: {"out": str(out), "resume": resume, **identity, **made_with})

    with ExitStack() as stack:
        folder, opened, finished = None, None, None
        with workers.together():
            if out is not None and workers.leads:
                folder = stack.enter_context(training_folder(out, identity, {"model": called}, made_with, resume))
                opened, finished = (folder.path, folder.run, folder.begun_with), folder.report()
        state = None
        if out is not None:
            opened, finished = workers.first((opened, finished))
            with workers.together():
                if folder is None and not opened[0].is_dir():
                    raise FileNotFoundError(f"out: {opened[0]} is not there, wanted a folder that all processes see")
                folder = folder or TrainingFolder(*opened)
                if finished is None:
                    state = folder.load()
                else:
                    _load_lens(lens, folder)
            # Or some, to whom it is empty, would begin anew while others go on.
            workers.agree(lambda: {"out": f"{out} with {'no checkpoint' if state is None else state['step']}"})
            if finished is not None:
                warnings.warn(f"out: {folder.path} holds this run, finished; it is not trained again", stacklevel=2)
                return TrainingReport.from_json(finished)
        translators = Translators(lens, numbers, bias_only, rank, seed)
        stack.enter_context(translators.trainable(lens))
        bar = TrainingBar(steps, disable=quiet or not workers.leads)
        stack.enter_context(bar.shown())
        facts = {
            "model": called, **conditions,
            "tokens": {
                "training": text.training.numel(), "held_out": text.held_out.numel(), "evaluated": measured.numel(),
                "step": per_step * sequence_length, "trained_on": steps * per_step * sequence_length,
            },
        }  # fmt: skip
        run = Run(lens, reader, translators, arguments, text.training, measured, engine, folder, bar, facts, workers)
        if state is None:
            run.begin()
        else:
            assert folder is not None
            warn_of_changes(folder.begun_with, made_with, "trained", stacklevel=2)
            run.load(state)
        return run.finish(eval_every, checkpoint_every)


def _check_choices(**given: tuple[Any, Collection[str]]) -> None:
    for name, (value, choices) in given.items():
        if value not in choices:
            raise ValueError(f"{name}: got {quoted(value)}, wanted one of {listed([*choices])}")


def _check_counts(least: int = 1, **given: int | None) -> None:
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**48:
            raise ValueError(f"{name}: got {quoted(value)}, wanted a whole number from {least}")


def _check_positive(**given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"{name}: got {quoted(value)}, wanted a positive number")


def _load_lens(lens: TunedLens, folder: TrainingFolder) -> None:
    """Give the lens what a finished run's folder has."""
    lens.layer_translators.float()
    lens.layer_translators.load_state_dict(load_checkpoint(folder.path / LENS[0]))
