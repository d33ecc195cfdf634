"""The training loop: how a lens's translators are brought to read every layer as the model's output.

It is where the parts of this package meet: sequences are read, losses and gradients gathered, a step taken, and now and
then measured and put on disk.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast.messages import listed, shortened
from tuned_lens_fast.nn import LogitLens, TunedLens
from tuned_lens_fast.progress_bar import TrainingBar
from tuned_lens_fast.training import ridge
from tuned_lens_fast.training.documents import drawn
from tuned_lens_fast.training.folder import LENS, PICTURE, TrainingFolder, writing
from tuned_lens_fast.training.optimizers import optimizers, rate
from tuned_lens_fast.training.report import TrainingReport, draw, mean, thirds
from tuned_lens_fast.training.states import Reader, States
from tuned_lens_fast.training.translators import Translators
from tuned_lens_fast.training.workers import Workers

_log = logging.getLogger(__name__)
#: Steps in a row that a layer may skip.
_MOST_SKIPPED = 20


class Run:
    """A lens in training: what changes from step to step, and how."""

    def __init__(
        self,
        lens: TunedLens,
        reader: Reader,
        translators: Translators,
        arguments: dict[str, Any],
        sequences: Tensor,
        measured: Tensor,
        engine: str,
        folder: TrainingFolder | None,
        bar: TrainingBar,
        facts: dict[str, Any],
        workers: Workers,
    ) -> None:
        """``facts``: what the report says of the run beside what happens in it."""
        self.lens, self.reader, self.translators, self.arguments = lens, reader, translators, arguments
        self.sequences, self.measured, self.engine = sequences, measured, engine
        self.folder, self.bar, self.facts, self.workers = folder, bar, facts, workers
        self.optimizers = optimizers(
            arguments["optimizer"], translators.all(), arguments["learning_rate"], arguments["weight_decay"], workers
        )
        # PyTorch keeps the rate that a schedule starts from nowhere but in the schedule.
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.step = 0  #: done
        self.losses: list[Tensor] = []  #: float64 [layers] of each step
        self.skipped: list[list[int]] = []
        self.in_row = torch.zeros(len(reader.numbers), dtype=torch.int64)  #: steps that each layer skipped just now
        self.logit_lens: Tensor | None = None
        self.evaluations: list[dict[str, Any]] = []
        self.init: list[dict[str, Any]] = []
        self.seconds = self.stepping = 0.0
        self._started = time.perf_counter()

    def begin(self) -> None:
        """The translators that training starts from, and what they and the logit lens read."""
        self.bar.say("measuring the logit lens")
        self.logit_lens = self._measure(LogitLens(self.lens.unembed))["kl"]
        if self.arguments["init"] != "lens":
            for number in self.reader.numbers:
                self.translators.zero(number)
        if self.arguments["init"] == "ridge":
            self.bar.say("ridge regression")
            length = self.sequences.shape[1]
            count = min(len(self.sequences), max(2, self.arguments["init_tokens"] // length))
            taken = self.sequences[drawn(len(self.sequences), 0, count, self.arguments["seed"])]
            chosen = ridge.start(
                self.reader, self.lens, self.translators, taken,
                bias_only=self.arguments["bias_only"], rank=self.arguments["rank"], engine=self.engine,
                workers=self.workers,
            )  # fmt: skip
            self.init = [
                {"layer": number, "strength": start.held_back, "kl": start.kl}
                for number, start in zip(self.reader.numbers, chosen, strict=True)
            ]
        self.translators.factorise()
        self.workers.same(parameter.detach() for parameter in self.translators.all())
        self.translators.push()
        self._evaluate()
        self._save()

    def finish(self, eval_every: int, checkpoint_every: int) -> TrainingReport:
        """All steps that are left, and what comes after the last."""
        steps = self.arguments["steps"]
        while self.step < steps:
            began = time.perf_counter()
            losses = self._gradients()
            # Here the gradients of a step are complete, and nowhere else.
            self._update(losses)
            self.step += 1
            self.stepping += time.perf_counter() - began
            self._tell()
            self._check_skips()
            if self.step % eval_every == 0 and self.step < steps:
                self._evaluate()
            if self.step % checkpoint_every == 0 or self.step == steps:
                self._save()
        if self.evaluations[-1]["step"] != steps:
            self._evaluate()
        report = self._report(finished=True)
        with self.workers.together():
            if self.folder is not None and self.workers.leads:
                with writing(self.folder.path / LENS[0]):
                    self.lens.save(self.folder.path)
                self._draw(report)
                self.folder.finish(report.to_json())
        return report

    def _gradients(self) -> Tensor:
        """Add up every parameter's gradient over the sequences of the step; the losses, float64 ``[layers]``."""
        count = self.arguments["tokens_per_step"] // self.sequences.shape[1]
        taken = drawn(len(self.sequences), self.step * count, count, self.arguments["seed"])
        total = torch.zeros(len(self.reader.numbers), dtype=torch.float64, device=self.lens.unembed.head.weight.device)
        of_all, own = self.workers.own(self.sequences[taken])
        for share, states in self.reader.read(own):
            # Sequences are of one length, so that each has as many positions that count.
            of_rows, states = self.workers.own_rows(states)
            weight = of_all * share * of_rows[self.arguments["loss"]]
            if not weight:
                continue
            with torch.enable_grad():
                losses = self._loss(states)
            (weight * losses.sum()).backward()
            total += weight * losses.detach()
        self.workers.add_up([*self.translators.gradients(), total])
        self.translators.pull()
        return total

    def _loss(self, states: States) -> Tensor:
        with_ce = self.arguments["loss"] == "ce"
        return self.lens.loss(
            states.hidden,
            targets=states.targets if with_ce else None,
            reference=None if with_ce else states.reference,
            layers=self.reader.numbers,
            engine=self.engine,
            memory_budget=self.reader.scratch,
        )

    @torch.no_grad()
    def _update(self, losses: Tensor) -> None:
        """Take the step, but for layers whose loss or gradient is not finite."""
        by_layer = [self.translators.parameters(number) for number in self.reader.numbers]
        norms = torch.stack(
            [torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm() for parameters in by_layer]
        )
        sound = (losses.isfinite() & norms.isfinite()).cpu()
        for number, parameters, fine in zip(self.reader.numbers, by_layer, sound.tolist(), strict=True):
            if not fine:
                self.skipped.append([self.step, number])
                for parameter in parameters:
                    parameter.grad = None  # optimisers pass over it
        self.in_row = (self.in_row + 1).masked_fill_(sound, 0)
        everything = self.translators.all()
        if self.arguments["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(everything, self.arguments["clip"])
        scale = rate(self.arguments["schedule"], self.step, self.arguments["steps"], self.arguments["warmup"])
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * scale
            self.workers.step(optimizer)
        for parameter in everything:
            parameter.grad = None
        self.translators.push()
        self.losses.append(losses.cpu())

    def _check_skips(self) -> None:
        """Stop where a layer has skipped many steps in a row, or all layers have skipped all of a short run."""
        rows, most = self.in_row.tolist(), _MOST_SKIPPED
        if min(rows) == self.arguments["steps"]:
            most = min(rows[0], most)
        stuck = [number for number, row in zip(self.reader.numbers, rows, strict=True) if row >= most]
        if stuck:
            raise FloatingPointError(
                f"layers: in {most} steps in a row, up to step {self.step - 1}, the loss or gradient of "
                f"{'layer' if len(stuck) == 1 else 'layers'} {listed(stuck, 8)} was not finite; use a lower "
                f"learning_rate, a model in bfloat16 or float32, or leave them out of layers"
            )

    @torch.no_grad()
    def _measure(self, lens: TunedLens | LogitLens) -> dict[str, Tensor]:
        """Held-out means, float64 ``[layers]``: "kl", and "ce" where that is trained."""
        with_ce = self.arguments["loss"] == "ce"
        found = {
            name: torch.zeros(
                len(self.reader.numbers), dtype=torch.float64, device=self.lens.unembed.head.weight.device
            )
            for name in (("kl", "ce") if with_ce else ("kl",))
        }
        of_all, own = self.workers.own(self.measured)
        for share, states in self.reader.read(own):
            of_rows, states = self.workers.own_rows(states)
            stats = lens.decode(
                states.hidden,
                layers=self.reader.numbers,
                targets=states.targets if with_ce else None,
                reference=states.reference,
                stats=["kl", "log_prob"] if with_ce else ["kl"],
                engine=self.engine,
                memory_budget=self.reader.scratch,
            )
            assert stats.kl is not None
            values = {"kl": stats.kl.double().mean(1)}
            if stats.log_prob is not None:
                values["ce"] = -stats.log_prob[:, states.targets >= 0].double().mean(1)
            for name, value in values.items():
                if of_rows[name]:
                    found[name] += of_all * share * of_rows[name] * value
        self.workers.add_up(found.values())
        return {name: value.cpu() for name, value in found.items()}

    def _evaluate(self) -> None:
        self.bar.say("measuring on what is held out")
        measured = self._measure(self.lens)
        self.evaluations.append({"step": self.step, "seconds": self._elapsed(), **measured})
        kl = self.evaluations[-1]["kl"].tolist()
        _log.info("step %d: held-out KL %.4f nats, a mean over layers", self.step, mean(kl))

    def _elapsed(self) -> float:
        """Seconds of all processes that worked on the run."""
        return self.seconds + time.perf_counter() - self._started

    def _tell(self) -> None:
        groups = {name: float(self.losses[-1][part].mean()) for name, part in thirds(len(self.reader.numbers)).items()}
        done = self.arguments["tokens_per_step"] * self.step
        self.bar.step(self.step, groups, done / self.stepping)

    def _save(self) -> None:
        """A checkpoint: all that changes. Nothing draws random numbers after the start, and data follow the step."""
        if self.folder is None:
            return
        optimizers = [self.workers.state_of(optimizer) for optimizer in self.optimizers]
        with self.workers.together():
            if self.workers.leads:
                self._write(self.folder, optimizers)

    def _write(self, folder: TrainingFolder, optimizers: list[dict[str, Any]]) -> None:
        folder.save(
            {
                "step": self.step,
                "translators": self.translators.state(),
                "optimizers": optimizers,
                "losses": torch.stack(self.losses) if self.losses else torch.empty(0),
                "skipped": self.skipped,
                "in_row": self.in_row,
                "logit_lens": self.logit_lens,
                "evaluations": self.evaluations,
                "init": self.init,
                "seconds": self._elapsed(),
                "stepping": self.stepping,
            }
        )
        folder.write_report(self._report(finished=False).to_json())

    def load(self, state: dict[str, Any]) -> None:
        """Go on behind a checkpoint."""
        self.translators.load(state["translators"])
        for optimizer, its in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        self.losses = [*state["losses"]]
        for name in ("step", "skipped", "in_row", "logit_lens", "evaluations", "init", "seconds", "stepping"):
            setattr(self, name, state[name])

    def _report(self, finished: bool) -> TrainingReport:
        assert self.logit_lens is not None
        return TrainingReport(
            run="" if self.folder is None else self.folder.run,
            arguments=self.arguments,
            layers=self.reader.numbers,
            init=self.init,
            losses=[losses.tolist() for losses in self.losses],
            logit_lens=self.logit_lens.tolist(),
            evaluations=[
                {name: value.tolist() if isinstance(value, Tensor) else value for name, value in evaluation.items()}
                for evaluation in self.evaluations
            ],
            skipped=self.skipped,
            seconds=self._elapsed(),
            tokens_per_second=self.step * self.arguments["tokens_per_step"] / max(self.stepping, 1e-9),
            finished=finished,
            **self.facts,
        )

    def _draw(self, report: TrainingReport) -> None:
        assert self.folder is not None
        try:
            with self.folder.writing(PICTURE) as aside:
                draw(report, aside)
        except ImportError:
            warnings.warn(f"out: without matplotlib there is no {PICTURE}: pip install matplotlib", stacklevel=4)
        except OSError:
            raise
        except Exception as error:  # whatever a picture fails for: the lens is there
            warnings.warn(f"out: {PICTURE} cannot be drawn: {shortened(error, 150)}", stacklevel=4)
