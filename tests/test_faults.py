"""A run that is killed, interrupted or out of disk leaves whole parts only, and the same call finishes it."""

import errno
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import forked_runs
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_text_model
import torch

from tuned_lens_fast.data import parts

KEYS = ["document", "layer", "position", "token_id", "token", "target", "rank", "top_ids"]
KILLS = 50


@pytest.fixture(scope="module")
def tiny():
    return tiny_text_model.make()


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The rows that every run must end with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = forked_runs.decode(*tiny, tmp_path_factory.mktemp("undisturbed") / "run")
    torch.set_num_threads(before)
    assert sum(len(batch["rows"]) > 1 for batch in json.loads((out / "_run.json").read_text())["batches"]) >= 2
    return rows(out)


def rows(out):
    """Every row of the folder, sorted by its keys."""
    return pq.read_table(out).sort_by([(key, "ascending") for key in ("document", "layer", "position")])


def assert_same(found, wanted):
    assert found.schema.remove_metadata() == wanted.schema.remove_metadata()
    assert found.select(KEYS).to_pylist() == wanted.select(KEYS).to_pylist()
    for name in set(wanted.column_names) - set(KEYS):
        got, expected = (
            (column.combine_chunks().flatten() if "list" in str(column.type) else column).to_numpy()
            for column in (found[name], wanted[name])
        )
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5, err_msg=name)


def assert_whole(out):
    """Every file under a part's name can be read."""
    for path in out.glob("*.parquet"):
        assert len(pq.read_table(path)) > 0


class Server:
    """Starts runs in forked processes; see forked_runs."""

    def __init__(self):
        script = Path(forked_runs.__file__)
        self.process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # or a line that is read ahead is none to wait for
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, out):
        self.process.stdin.write(json.dumps({"out": str(out)}).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self, seconds=60.0):
        """The wait status, if the run ends within ``seconds``."""
        if select.select([self.process.stdout], [], [], seconds)[0]:
            return int(self.process.stdout.readline())
        return None


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_fifty_kills(server, undisturbed, tmp_path):
    """Runs are killed at random, killed again while they resume, until one gets through; 50 kills in all."""
    chance = random.Random(0)
    server.start(tmp_path / "timed")
    start = time.perf_counter()
    assert server.ended() == 0
    whole = time.perf_counter() - start
    kills = finished = 0
    out = None
    while kills < KILLS or out is not None:
        out = out or tmp_path / f"run {finished}"
        pid = server.start(out)
        status = server.ended(chance.uniform(0, 0.7 * whole) if kills < KILLS else 60)
        if status is None:
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(pid, signal.SIGKILL)
            status = server.ended()
        if out.exists():
            assert_whole(out)
        if status == 0:
            assert_same(rows(out), undisturbed)
            assert not [name for name in os.listdir(out) if name.startswith(".")], "leftovers of killed processes"
            finished, out = finished + 1, None
        else:
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
    print(f"{kills} kills, {finished} runs, {whole:.2f} s for one undisturbed")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_interrupt(server, undisturbed, tmp_path):
    out = tmp_path / "run"
    pid = server.start(out)
    while len(list(out.glob("*.parquet"))) < 3:
        time.sleep(0.005)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(server.ended()) == 130
    assert all(name.startswith("part-") for name in os.listdir(out) if name not in ("_run.json", "_lock"))
    assert_whole(out)
    server.start(out)
    assert server.ended() == 0
    assert_same(rows(out), undisturbed)


def test_a_file_that_grows_too_large(tiny, undisturbed, tmp_path):
    """What a full disk does to a write, as far as a process without one can have it."""
    out = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"out: cannot write .*part-\d{6}-\d{6}.parquet: File too large") as caught:
            forked_runs.decode(*tiny, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    forked_runs.decode(*tiny, out)
    assert_same(rows(out), undisturbed)


@pytest.mark.parametrize("writes", [0, 1, 2, 9])
def test_full_disk(writes, tiny, undisturbed, tmp_path, monkeypatch):
    """The disk is full when a file, the manifest's first, is to be flushed."""
    out = tmp_path / "run"
    left = [1 + 2 * writes]  # of the folder's own name; of each file, and of its name
    fsync = os.fsync

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        name = "part-.*parquet" if writes else "_run.json"
        with pytest.raises(OSError, match=rf"out: cannot write .*{name}: No space left on device") as caught:
            forked_runs.decode(*tiny, out)
    assert caught.value.errno == errno.ENOSPC
    assert len(list(out.glob("*.parquet"))) == max(0, writes - 1)
    assert_whole(out) if writes else None
    forked_runs.decode(*tiny, out)
    assert_same(rows(out), undisturbed)


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_a_part_cut_short_is_written_anew(keep, tiny, undisturbed, tmp_path):
    out = forked_runs.decode(*tiny, tmp_path / "run")
    damaged = sorted(out.glob("*.parquet"))[1:4:2]
    for path in damaged:
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    forked_runs.decode(*tiny, out)
    rewritten = [path for path in stamps if path.stat().st_mtime_ns != stamps[path]]
    assert sorted(rewritten) == damaged
    assert_same(rows(out), undisturbed)


def test_a_part_with_rows_missing_is_written_anew(tiny, undisturbed, tmp_path):
    out = forked_runs.decode(*tiny, tmp_path / "run")
    path = sorted(out.glob("*.parquet"))[2]
    pq.write_table(pq.read_table(path)[:-1], path)
    forked_runs.decode(*tiny, out)
    assert_same(rows(out), undisturbed)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', "half", "changed", b"\xff"])
def test_a_damaged_manifest_is_refused(damage, tiny, tmp_path):
    out = forked_runs.decode(*tiny, tmp_path / "run")
    path = out / "_run.json"
    text = path.read_text()
    damage = {"half": text[: len(text) // 2], "changed": text.replace('"boundaries": [', '"boundaries": [7, ', 1)}.get(
        damage, damage
    )
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    before = sorted(os.listdir(out))
    with pytest.raises(ValueError, match=r"out: .*_run.json (is damaged|has the format)"):
        forked_runs.decode(*tiny, out)
    assert sorted(os.listdir(out)) == before


def test_a_part_of_another_run_is_refused(tiny, tmp_path):
    out = forked_runs.decode(*tiny, tmp_path / "run")
    other = forked_runs.decode(*tiny, tmp_path / "other", top_k=1)
    part = sorted(out.glob("*.parquet"))[2]
    part.write_bytes((other / part.name).read_bytes())
    with pytest.raises(ValueError, match=f"out: .*{part.name} is a part of another run"):
        forked_runs.decode(*tiny, out)


def test_one_process_at_a_time(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "_lock", "ab") as file:
        parts._lock(file.fileno(), tmp_path)
        with pytest.raises(BlockingIOError, match="out: another process is writing to"):
            forked_runs.decode(*tiny, tmp_path / "run")
    forked_runs.decode(*tiny, tmp_path / "run")
