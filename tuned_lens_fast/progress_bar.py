"""What a terminal shows of a decode or of training at work: how far it is, and how fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tuned_lens_fast import progress


class ProgressBar:
    """A progress bar on the terminal, if there is one, that counts positions."""

    def __init__(self, console: Console, disable: bool) -> None:
        self.positions = 0.0  #: decoded so far, at every layer
        self._total = 0.0
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _Throughput(),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=console,
            transient=True,
            disable=disable or not console.is_terminal,
            # Chunks of a large model are far apart.
            speed_estimate_period=300,
        )
        self._task = self._bar.add_task("", total=None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bar is on the terminal within the block."""
        with self._bar:
            yield

    def say(self, what: str) -> None:
        """What is done now, of unknown length."""
        self._bar.update(self._task, description=what, total=None)

    @contextmanager
    def counting(self, layers: int) -> Iterator[None]:
        """Within the block, count what engines report of ``layers`` layers."""

        def expecting(rows: int) -> None:
            self._total += rows / layers
            self._bar.update(self._task, total=self._total)

        def advance(rows: int) -> None:
            self.positions += rows / layers
            self._bar.update(self._task, description="decoding", completed=self.positions)

        self._bar.reset(self._task, description="running the model", total=None)
        with progress.listen(advance, expecting):
            yield


class _Throughput(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.0f} positions/s")


class _TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task) + Text(" left")


class TrainingBar:
    """A bar for training on standard error, if that is a terminal: steps, loss of groups of layers, tokens a second."""

    def __init__(self, steps: int, disable: bool) -> None:
        console = Console(stderr=True)
        self._steps = steps
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=console,
            transient=True,
            disable=disable or not console.is_terminal,
            speed_estimate_period=300,
        )
        self._task = self._bar.add_task("", total=None, state="")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bar is on the terminal within the block."""
        with self._bar:
            yield

    def say(self, what: str) -> None:
        """What is done now beside steps."""
        self._bar.update(self._task, description=what)

    def step(self, done: int, losses: dict[str, float], tokens_per_second: float) -> None:
        """``done`` steps are done, the last of them with these losses."""
        state = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self._bar.update(
            self._task,
            description=f"step {done:,} of {self._steps:,}",
            completed=done,
            total=self._steps,
            state=f"{state}  {tokens_per_second:,.0f} tokens/s",
        )
