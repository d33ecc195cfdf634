"""A run that is killed, interrupted, damaged or out of disk leaves whole parts only, and the same call finishes it."""

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked_runs
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_text_model
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuned_lens_fast.atomic_write import atomic_write, machine
from tuned_lens_fast.cli import main
from tuned_lens_fast.data import folder, load_run, parts
from tuned_lens_fast.data.claims import Claims
from tuned_lens_fast.data.parts import check_run, recorded_engine

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from kill_resume import bits, flip, footer, in_footer, swap


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the forked runs have, since the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    return tiny_text_model.make()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An undisturbed run, not to be touched."""
    out = forked_runs.decode(*tiny, tmp_path_factory.mktemp("undisturbed") / "run")
    assert sum(len(share["rows"]) > 1 for share in json.loads((out / "_run.json").read_text())["shares"]) >= 2
    return out


@pytest.fixture(scope="module")
def undisturbed(whole):
    """The rows that every run must end with."""
    return bits(whole)


@pytest.fixture
def out(whole, tmp_path):
    """A run of one's own to damage."""
    return shutil.copytree(whole, tmp_path / "run")


def assert_same(out, wanted):
    found = bits(out)
    assert [*found] == [*wanted]
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def assert_whole(out):
    """Every file under a part's name can be read, and is what was written."""
    for path in out.glob("*.parquet"):
        assert len(pq.read_table(path)) > 0
    assert not check_run(out).damaged


def child(*arguments):
    """A process of its own that runs forked_runs.py."""
    root = Path(parts.__file__).parents[2]
    search = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    return subprocess.Popen([sys.executable, forked_runs.__file__, *map(str, arguments)], env=environment)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.slow
def test_kills_and_damages(tmp_path):
    """Runs of one process and of three end with the same bits after kills, kills while they resume, and each damage."""
    assert child("--folder", tmp_path, "--kills", 10, "--damages", 12, "--workers", 3).wait() == 0


@pytest.mark.slow
def test_interrupt(undisturbed, tiny, tmp_path):
    out = tmp_path / "run"
    run = child("--out", out)
    while len(list(out.glob("*.parquet"))) < 3:
        assert run.poll() is None
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    assert run.wait() == -signal.SIGINT
    assert all(name.startswith("part-") for name in os.listdir(out) if name not in ("_run.json", "_lock"))
    assert_whole(out)
    assert not check_run(out).complete
    forked_runs.decode(*tiny, out)
    assert_same(out, undisturbed)


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
    assert_same(out, undisturbed)


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
    assert_same(out, undisturbed)


def damaged_part(out, damage):
    """The third part, damaged."""
    path = sorted(out.glob("*.parquet"))[2]
    content = path.read_bytes()
    chance = random.Random(0)
    if damage in (0, 3, 0.5, -1):
        path.write_bytes(content[: int(len(content) * damage) if damage == 0.5 else damage])
    elif damage == "page":
        flip(path, chance, 0, footer(path))
    elif damage == "footer":
        in_footer(path, chance)
    elif damage == "rows":
        pq.write_table(pq.read_table(path)[:-1], path)
    else:
        path = path.rename(path.with_name(path.name.replace(path.stem[-16:], "0" * 16)))
    return path


@pytest.mark.parametrize("damage", [0, 3, 0.5, -1, "page", "footer", "rows", "checksum"])
def test_a_damaged_part_is_written_anew(damage, tiny, undisturbed, out, whole, capsys):
    path = damaged_part(out, damage)
    others = {other: other.stat().st_mtime_ns for other in out.glob("*.parquet") if other != path}
    assert check_run(out).damaged == {(0, 2): path}
    assert main(["check", str(out)]) == 1
    assert f"10 of 11 parts, 8 documents, damaged: {path.name}\n" in capsys.readouterr().out
    with pytest.warns(UserWarning, match=f"out: parts in .*run are damaged and are written anew: {path.name}$"):
        forked_runs.decode(*tiny, out)
    assert {other: other.stat().st_mtime_ns for other in others} == others
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    assert_same(out, undisturbed)
    assert main(["check", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 11 parts, 8 documents, complete\n"


def test_parts_in_each_others_place(tiny, undisturbed, out):
    swap(out, random.Random(0))
    assert len(check_run(out).damaged) == 2
    one, other = sorted(out.glob("*.parquet"))[:2]
    one.unlink()
    other.rename(other.with_name(f"{one.stem[:-16]}{other.stem[-16:]}.parquet"))
    assert (0, 0) in check_run(out).damaged, "with a checksum that is right"
    assert (0, 1) in check_run(out).missing
    with pytest.warns(UserWarning, match="are damaged and are written anew"):
        forked_runs.decode(*tiny, out)
    assert_same(out, undisturbed)


def test_load_run(out, whole, recwarn):
    table = load_run(whole).to_table()
    assert len(table) == len(pq.read_table(whole))
    assert not recwarn.list
    damaged = damaged_part(out, "page")
    gone = sorted(out.glob("*.parquet"))[0]
    gone.unlink()
    with pytest.warns(
        UserWarning, match=f"9 of 11 parts, 8 documents, damaged: {damaged.name}; missing: {gone.name[:18]}"
    ):
        found = load_run(str(out))
    assert len(found.to_table(columns=["layer"])) < len(table)
    assert damaged.name not in " ".join(found.files)
    for part in out.glob("*.parquet"):
        part.unlink()
    with pytest.raises(ValueError, match="0 of 11 parts"):
        load_run(out)


def test_check_of_what_is_no_run(out, tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 1
    assert "holds no run, since there is no _run.json" in capsys.readouterr().err
    (out / "mine.parquet").touch()
    assert main(["check", str(out)]) == 1
    assert "run holds mine.parquet, no part of this run" in capsys.readouterr().err


def signed(body):
    """A manifest whose digest is right, whatever it holds."""
    return json.dumps({"run": folder.digest(body), **body})


def manifest_of(whole):
    body = json.loads((whole / "_run.json").read_text())
    del body["run"]
    return body


def shares(documents, boundaries, ends, rows):
    batch = {"documents": documents, "boundaries": boundaries}
    return {"shares": [{"batches": [batch], "ends": ends, "rows": rows}]}


DAMAGED_MANIFESTS = {
    "empty": lambda text, body: "",
    "open": lambda text, body: "{",
    "a list": lambda text, body: "[]",
    "a number": lambda text, body: '{"format": 1}',
    "half": lambda text, body: text[: len(text) // 2],
    "changed": lambda text, body: text.replace('"boundaries": [', '"boundaries": [7, ', 1),
    "no text": lambda text, body: b"\xff",
    "deep": lambda text, body: "[" * 200_000,
    "deep objects": lambda text, body: '{"a":' * 200_000,
    "deep inside": lambda text, body: text.replace('"names": {', '"names": {"x": ' + "[" * 900 + "]" * 900 + ",", 1),
    "a long number": lambda text, body: '{"format": ' + "9" * 10_000 + "}",
    "a long format": lambda text, body: json.dumps({"format": "x" * 10_000}),
    "names": lambda text, body: signed(body | {"names": [1]}),
    "identity": lambda text, body: signed(body | {"identity": "none"}),
    "made_with": lambda text, body: signed(body | {"made_with": 3}),
    "no shares": lambda text, body: signed(body | {"shares": []}),
    "shares": lambda text, body: signed(body | {"shares": {"documents": 1}}),
    "documents": lambda text, body: signed(body | {"shares": [body["shares"][0]] * 2}),
    "boundaries": lambda text, body: signed(body | shares([0], [3, 2], [2], [1])),
    "ends": lambda text, body: signed(body | shares([0], [2, 3], [1], [1])),
    "rows": lambda text, body: signed(body | shares([0], [3], [1], ["1"])),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_MANIFESTS)
def test_a_damaged_manifest_is_refused(damage, tiny, out, whole):
    path = out / "_run.json"
    content = DAMAGED_MANIFESTS[damage](path.read_text(), manifest_of(whole))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(os.listdir(out))
    for call, argument in ((lambda: forked_runs.decode(*tiny, out), "out"), (lambda: check_run(out), "run")):
        with pytest.raises(ValueError, match=rf"^{argument}: .*_run.json is damaged") as caught:
            call()
        assert len(str(caught.value)) < 500
    assert sorted(os.listdir(out)) == before


def test_a_huge_manifest_is_refused(out):
    os.truncate(out / "_run.json", 2**40)
    with pytest.raises(ValueError, match=r"_run\.json is damaged"):
        check_run(out)


def test_a_run_of_the_format_before(tiny, out, whole):
    (out / "_run.json").write_text(signed(manifest_of(whole) | {"format": "tuned_lens_fast data set 1"}))
    with pytest.raises(
        ValueError, match=r"has the format 'tuned_lens_fast data set 1', .* cannot resume it; .* Name an"
    ):
        forked_runs.decode(*tiny, out)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_made_up_manifests(data, whole, tmp_path_factory, out):
    """Bytes changed, JSON at random, and JSON at random in the place of one entry of a manifest with a right digest."""
    content = bytearray((whole / "_run.json").read_bytes())
    body = manifest_of(whole)
    kind = data.draw(st.sampled_from(["bytes", "json", "entry"]))
    if kind == "bytes":
        for at, value in data.draw(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=5)
        ):
            content[at] = value
    elif kind == "json":
        content = json.dumps(data.draw(JSON)).encode()
    else:
        content = signed(body | {data.draw(st.sampled_from([*body])): data.draw(JSON)}).encode()
    (out / "_run.json").write_bytes(content)
    recorded_engine(out)
    error = None
    try:
        state = check_run(out)
        with parts.run_folder(out, body["identity"], body["names"], {}, list) as folder:
            assert folder.shares == state.shares
    except ValueError as caught:
        error = str(caught)
    if error is None:  # the parts name the manifest by its digest, so that they are another's parts
        assert json.loads(content)["run"] == json.loads((whole / "_run.json").read_text())["run"]
    else:
        assert len(error) < 500
        assert re.match("(out|run): ", error)


def test_what_differs_is_said_in_short(tiny, out, whole):
    """However much of it there is."""
    identity = {"layers": [*range(1000)], "x" * 1000: 1, "stats": ["kl"] * 99, "top_k": "k" * 999, "engine": None}
    (out / "_run.json").write_text(signed(manifest_of(whole) | {"identity": identity}))
    with pytest.raises(ValueError, match=r"holds a run with another model, .* here\); name another folder") as caught:
        forked_runs.decode(*tiny, out)
    assert len(str(caught.value)) < 500
    with (
        pytest.raises(ValueError, match=r"another x{39}… .*, another layers .*, another stats") as caught,
        parts.run_folder(out, {"x" * 1000: 2}, {}, {}, list),
    ):
        pass
    assert len(str(caught.value)) < 500


def test_a_part_of_another_run_is_refused(tiny, out, tmp_path):
    other = forked_runs.decode(*tiny, tmp_path / "other", top_k=1)
    sorted(out.glob("*.parquet"))[2].unlink()
    part = sorted(other.glob("*.parquet"))[2]
    shutil.copy(part, out)
    with pytest.raises(ValueError, match=f"out: .*{part.name} is a part of another run"):
        forked_runs.decode(*tiny, out)


def test_what_the_last_bits_depend_on_is_recorded(tiny, out):
    made = json.loads((out / "_run.json").read_text())["made_with"]
    assert (made["threads"], made["memory_budget"]) == (1, 2**28)
    sorted(out.glob("*.parquet"))[2].unlink()
    with pytest.warns(UserWarning, match=r"other conditions \(memory_budget 268435456 then, 134217728 now\), so that"):
        forked_runs.decode(*tiny, out, memory_budget=2**27)


def test_claims(tmp_path):
    """A share is one process's until it lets go of it or is gone; what was checked is known as long as one works."""
    with Claims(tmp_path) as one:
        with one.guard():
            pass
        with Claims(tmp_path) as other:
            with other.guard():
                assert one.claim(3)
                assert not other.claim(3)
                assert other.claim(4)
            one.mark(3)
            assert other.checked(3)
            assert not other.checked(4)
            one.release(3)
            assert other.claim(3)
            assert not one.claim(3)
        assert one.claim(3)
        with Claims(tmp_path) as third:
            with third.guard():
                pass
            assert third.checked(3), "one is still at work"
    with Claims(tmp_path) as later:
        with later.guard():
            pass
        assert not later.checked(3)


@pytest.mark.skipif(sys.platform != "linux", reason="threads of one process have the same locks here")
def test_several_work_on_one_run(tiny, undisturbed, tmp_path, monkeypatch):
    """Each on some of it, none on what another has; all return when it is whole."""
    out, wrote, begin, start = tmp_path / "run", [], parts.RunFolder.begin, threading.Barrier(3)

    def begun(folder, share, part):
        wrote.append((share, part))
        return begin(folder, share, part)

    def work():
        start.wait()
        forked_runs.decode(*tiny, out)
        return check_run(out).complete

    monkeypatch.setattr(parts.RunFolder, "begin", begun)
    with ThreadPoolExecutor(3) as pool:
        assert all(done.result() for done in [pool.submit(work) for _ in range(3)])
    assert_same(out, undisturbed)
    assert len(wrote) == len(set(wrote)) == len(list(out.glob("*.parquet")))


def test_what_another_machine_is_writing_stays(tiny, undisturbed, out):
    """Locks that hold on each machine alone do not tell whether it is at work."""
    part = sorted(out.glob("*.parquet"))[0]
    part.unlink()
    theirs, dead, abandoned = (
        out / f".{part.name[:18]}.parquet.{mark}" for mark in ("0" * 8 + "-1", f"{machine()}-1", "0" * 8 + "-2")
    )
    for file in (theirs, dead, abandoned):
        file.touch()
    os.utime(abandoned, (0, 0))
    forked_runs.decode(*tiny, out)
    assert [file.exists() for file in (theirs, dead, abandoned)] == [True, False, False]
    assert_same(out, undisturbed)


def test_what_another_holds_is_waited_for(tiny, undisturbed, out, caplog):
    """And taken over when it is gone."""
    victim = sorted(out.glob("*.parquet"))[2]
    content, share = victim.read_bytes(), int(victim.name[5:11])
    other = Claims(out)
    other.__enter__()
    with other.guard():
        pass
    assert other.claim(share)
    victim.unlink()
    threading.Timer(0.5, other.__exit__, (None, None, None)).start()
    start = time.perf_counter()
    forked_runs.decode(*tiny, out)
    assert time.perf_counter() - start >= 0.4
    assert victim.read_bytes() == content


def test_a_part_that_is_there_twice(tiny, undisturbed, out, capsys):
    """As two machines leave it whose file system has locks for each alone."""
    part = sorted(out.glob("*.parquet"))[1]
    table = pq.read_table(part)
    pq.write_table(table, out / ".other", compression="none")
    content = (out / ".other").read_bytes()
    twin = f"{part.stem[:-16]}{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    (out / ".other").rename(out / twin)
    assert main(["check", str(out)]) == 1
    assert "there twice: part-" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="are there twice and are removed: part-"):
        forked_runs.decode(*tiny, out)
    assert (out / part.name).exists() != (out / twin).exists()
    assert_same(out, undisturbed)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(code, tiny, undisturbed, tmp_path, monkeypatch):
    """Each process of a job has its own share then, and returns when that is written."""

    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    out, whole = tmp_path / "run", []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.warns(UserWarning, match="the file system of .* has no locks; see that only the 2 processes"):
            forked_runs.decode(*tiny, out)
        whole.append(check_run(out))
    assert 0 < len(whole[0].whole) < len(whole[1].whole)
    assert_same(out, undisturbed)


@pytest.mark.parametrize(
    "name", ["a" * 251 + ".csv", "a" * 246 + ".csv", "ü" * 125 + ".csv", "長" * 83 + ".html", "😀" * 63]
)
def test_long_names(name, tmp_path):
    assert 250 <= len(os.fsencode(name)) <= 255
    path = tmp_path / name
    with atomic_write(path) as aside:
        aside.write_text("new")
        assert aside.name.startswith(".")
        assert aside.name.endswith(str(os.getpid()))
    assert os.listdir(tmp_path) == [name]
    assert path.read_text() == "new"


def test_a_run_with_a_long_name(tiny, undisturbed, tmp_path):
    out = forked_runs.decode(*tiny, tmp_path / ("é" * 127))
    assert_same(out, undisturbed)
