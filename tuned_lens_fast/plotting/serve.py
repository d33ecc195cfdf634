"""The page over HTTP: texts of a run on disk, of which only what is in sight is read, or of a model at hand.

The parts are those of ``encode.py``, made as the page asks for them. Every address begins with a secret, so that other
pages in the same browser, and other users of the machine, cannot read along.
"""

from __future__ import annotations

import html
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs

import torch
from torch import Tensor

from tuned_lens_fast.data.parts import METADATA, check_run, load_run
from tuned_lens_fast.data.table import stats_of
from tuned_lens_fast.messages import quoted, shortened
from tuned_lens_fast.plotting import encode
from tuned_lens_fast.plotting.heatmap import hashed, written
from tuned_lens_fast.plotting.tokens import NO_TOKEN

if TYPE_CHECKING:
    from tuned_lens_fast.stats import LensStats

#: Bytes of a prompt at most.
_LONGEST_PROMPT = 2**22
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 Inter, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; max-width: 860px;
  margin: 40px auto; padding: 0 20px; }
h1 { font-size: 20px; } a { overflow-wrap: anywhere; } li span { opacity: 0.7; } .problem { font-weight: 600; }
textarea { box-sizing: border-box; width: 100%; height: 160px; font: inherit; padding: 8px; }
button { font: inherit; padding: 4px 16px; margin: 8px 0; }
"""


class Text(Protocol):
    """One decoded text."""

    name: str
    positions: int

    @property
    def header(self) -> dict[str, Any]:
        """As :func:`encode.header` makes it, served."""

    def part(self, name: str) -> bytes | None:
        """The part, or None where there is none of that name."""


class MemoryText:
    """Statistics in memory, of one lens or of several side by side: ``(what it is called, statistics)`` each."""

    def __init__(
        self, name: str, title: str, lenses: Sequence[tuple[str, LensStats]], input_ids: Tensor, tokenizer: Any
    ) -> None:
        self.name, self.positions = name, len(input_ids)
        runs = [(lens, stats, input_ids) for lens, stats in lenses]
        self.header, self._parts = encode.parts(runs, tokenizer, title, None)
        self.header["served"] = True

    def part(self, name: str) -> bytes | None:
        return self._parts.get(name)


class Run:
    """A run that ``decode --out FOLDER`` wrote.

    Args:
        tokenizer: gives texts of tokens; None shows ids.

    Raises:
        ValueError, OSError, ImportError: as ``check_run``; also a run that is not complete.
    """

    def __init__(self, folder: Path, tokenizer: Any = None) -> None:
        import pyarrow.dataset

        state = check_run(folder)
        if not state.complete:
            raise ValueError(f"run: {state}; the command that made the run writes what is lacking")
        self.rows = load_run(folder)
        self.said = json.loads((self.rows.schema.metadata or {}).get(METADATA, b"{}"))
        self.layers = self._layers()
        last = pyarrow.dataset.field("layer") == int(self.layers[-1])
        ends = self.rows.to_table(columns=["document", "position"], filter=last)
        if pyarrow.types.is_dictionary(ends["document"].type):
            ends = ends.set_column(0, "document", ends["document"].cast(pyarrow.string()))
        ends = ends.group_by("document").aggregate([("position", "max")]).sort_by("document")
        largest = self._largest_id()
        self.tokens = encode.Tokens(tokenizer, {id: id - NO_TOKEN for id in range(NO_TOKEN, largest + 1)})
        self.documents = {
            document: RunDocument(self, document, last + 1)
            for document, last in zip(ends["document"].to_pylist(), ends["position_max"].to_pylist(), strict=True)
        }

    @property
    def title(self) -> str:
        return ", ".join(self.said[name] for name in ("model", "lens") if name in self.said)

    @cached_property
    def token_part(self) -> bytes:
        return self.tokens.part()

    def _layers(self) -> Tensor:
        import pyarrow.compute as compute
        import pyarrow.dataset

        first = self.rows.to_table(columns=["layer"], filter=pyarrow.dataset.field("position") == 0)
        return torch.tensor(sorted(compute.unique(first["layer"]).to_pylist()))

    def _largest_id(self) -> int:
        import pyarrow.compute as compute

        names = [name for name in ("token_id", "target", "top_ids") if name in self.rows.schema.names]
        watched = self.said.get("watch")
        largest = 0 if not watched or isinstance(watched, dict) else max(watched)
        for batch in self.rows.to_batches(columns=names):
            for column in batch.columns:
                flat = (
                    column.flatten() if hasattr(column, "flatten") and str(column.type).startswith("list") else column
                )
                largest = max(largest, compute.max(flat).as_py() or 0)
        return largest


@dataclass(frozen=True)
class RunDocument:
    """A document of a run; what is asked for is read from its Parquet files, by ranges of positions."""

    run: Run
    document: Any  #: its number, or its id
    positions: int

    def read(self, names: Sequence[str], start: int, stop: int) -> LensStats:
        """These columns, from one position to before another."""
        from pyarrow.dataset import field

        within = (field("document") == self.document) & (field("position") >= start) & (field("position") < stop)
        table = self.run.rows.to_table(columns=["layer", "position", *names], filter=within)
        return stats_of(table, self.run.layers, start, stop)

    @property
    def _names(self) -> list[str]:
        return [*({*encode.DRAWN, "top_ids", "top_log_probs", "watch_log_probs"} & {*self.run.rows.schema.names})]

    @property
    def described(self) -> dict[str, Any]:
        """Its part of the header."""
        return encode.described(
            f"{self.run.title}, document {self.document}",
            self.read(self._names, 0, 1),
            self.positions,
            lambda name: getattr(self.read([name], 0, self.positions), name),
            self.run.tokens,
            self.run.said.get("watch"),
        )

    def block(self, start: int) -> bytes | None:
        """The statistics of a block of positions; None where there are none."""
        if start >= self.positions:
            return None
        return encode.block_part(
            self.read(self._names, start, min(start + encode.BLOCK, self.positions)), self.run.tokens
        )

    def text(self) -> bytes:
        from pyarrow.dataset import field

        one = (field("document") == self.document) & (field("layer") == int(self.run.layers[-1]))
        columns = [name for name in ("token_id", "target") if name in self.run.rows.schema.names]
        table = self.run.rows.to_table(columns=["position", *columns], filter=one).sort_by("position")
        none = torch.full((self.positions,), NO_TOKEN - 1)
        found = [none, none]
        for i, name in enumerate(columns):
            found[i] = torch.tensor(table[name].fill_null(NO_TOKEN - 1).to_numpy()).long()
        numbers = [encode.planes(self.run.tokens.number(ids)) for ids in found]
        return encode.packed(b"".join(numbers))


@dataclass(frozen=True)
class RunText:
    """A document as it is in one run, or in several side by side."""

    documents: Sequence[RunDocument]

    @property
    def name(self) -> str:
        return f"document {self.documents[0].document}"

    @property
    def positions(self) -> int:
        return max(document.positions for document in self.documents)

    @cached_property
    def header(self) -> dict[str, Any]:
        described = [document.described for document in self.documents]
        return encode.header(" | ".join(each["name"] for each in described), described, served=True)

    def part(self, name: str) -> bytes | None:
        if name == "tokens":  # ids are numbered alike in every run, the largest one has them all
            return max(
                (document.run for document in self.documents), key=lambda run: len(run.tokens.numbers)
            ).token_part
        kind, *numbers = name.split("-")
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            return None
        which, *block = map(int, numbers or ["0"])
        if which >= len(self.documents) or (kind, len(numbers)) not in (("text", 1), ("block", 2)):
            return None
        return self.documents[which].block(block[0] * encode.BLOCK) if block else self.documents[which].text()


def texts_of(run: Run, *others: Run) -> list[RunText]:
    """Every document of ``run``, beside the same one of other runs where they have it.

    Raises:
        ValueError: another run has none of them.
    """
    for other in others:
        if not run.documents.keys() & other.documents.keys():
            raise ValueError(f"compare: no document of {quoted(other.title, 150)} is one of {quoted(run.title, 150)}")
    return [
        RunText([each.documents[document] for each in (run, *others) if document in each.documents])
        for document in run.documents
    ]


class Server(ThreadingHTTPServer):
    """Serves ``texts``, and adds what ``decode`` makes of a prompt, if there is a model to do it.

    Raises:
        OSError: the address cannot be had.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], title: str, texts: list[Text], decode: Callable[[str], Text] | None = None
    ) -> None:
        super().__init__(address, _Handler)
        self.title, self.texts, self.decode, self.secret, self.busy = (
            title,
            texts,
            decode,
            secrets.token_urlsafe(16),
            Lock(),
        )

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/{self.secret}/"

    def index(self, problem: str = "", prompt: str = "") -> str:
        """The texts there are, and where to type one."""
        items = "".join(
            f'<li><a href="{i}/">{html.escape(encode.visible_line(text.name))}</a> '
            f"<span>{text.positions:,} positions</span></li>"
            for i, text in enumerate(self.texts)
        )
        form = (
            '<form method="post"><textarea name="text" aria-label="Text" autofocus required>\n'
            f"{html.escape(prompt)}</textarea><button>Read it at every layer</button></form>"
        )
        policy = f"default-src 'none'; style-src {hashed(_STYLE)}; form-action 'self'; base-uri 'none'"
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{html.escape(encode.visible_line(self.title))}</title><style>{_STYLE}</style></head><body>"
            f"<h1>{html.escape(encode.visible_line(self.title))}</h1>"
            + (f'<p class="problem">{html.escape(problem)}</p>' if problem else "")
            + f"{form if self.decode else ''}<ul>{items}</ul></body></html>"
        )


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        steps = self.path.partition("?")[0].split("/")[1:]
        if not secrets.compare_digest(steps[0].encode(), self.server.secret.encode()):
            self._answer(HTTPStatus.FORBIDDEN, b"The address lacks its secret: take the one that was printed.")
        elif steps[1:] == [""]:
            if len(self.server.texts) == 1 and self.server.decode is None:
                self._redirect("0/")
            else:
                self._answer(HTTPStatus.OK, self.server.index().encode(), "text/html; charset=utf-8")
        else:
            found = self._text(steps[1:])
            if found is None:
                self._answer(HTTPStatus.NOT_FOUND, b"There is nothing at this address.")
            else:
                self._answer(HTTPStatus.OK, *found)

    def _text(self, steps: list[str]) -> tuple[bytes, str] | None:
        """Of ``N/`` the page, of ``N/part/NAME`` the part."""
        number = int(steps[0]) if steps[0].isdecimal() and len(steps[0]) < 10 else len(self.server.texts)
        if number >= len(self.server.texts):
            return None
        text = self.server.texts[number]
        if steps[1:] == [""]:
            return written(text.header, {}).encode(), "text/html; charset=utf-8"
        part = text.part(steps[2]) if len(steps) == 3 and steps[1] == "part" else None
        return None if part is None else (part, "application/octet-stream")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != f"/{self.server.secret}/" or self.server.decode is None:
            self._answer(HTTPStatus.FORBIDDEN, b"Nothing can be sent to this address.")
            return
        if not length.isdecimal() or int(length) > _LONGEST_PROMPT:
            self.close_connection = True
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"The text is too long to be sent: use decode --file.")
            return
        sent = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"), keep_blank_values=True)
        prompt = sent.get("text", [""])[0].replace("\r\n", "\n")
        try:
            with self.server.busy:  # one at a time has the model
                self.server.texts.append(self.server.decode(prompt))
                number = len(self.server.texts) - 1
        except Exception as error:
            page = self.server.index(shortened(error, 1000) or type(error).__name__, prompt)
            self._answer(HTTPStatus.BAD_REQUEST, page.encode(), "text/html; charset=utf-8")
            return
        self._redirect(f"{number}/")

    def _redirect(self, path: str) -> None:
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", f"/{self.server.secret}/{path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal has the address, and lines with the secret need not be kept."""
