"""Generated files of every kind that is read: a right answer or one error for a person, little memory, no code.

Each kind takes a few seconds here, and 1,000 files where slow tests run.
"""

import json
import pickletools
import struct
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tuned_lens_fast.artifacts import read_artifact
from tuned_lens_fast.data.jsonl import read_jsonl
from tuned_lens_fast.memory import PeakMemory
from tuned_lens_fast.stats import LensStats

LAYERS, D_MODEL = 2, 3
CONFIG = {"base_model_name_or_path": "a/b", "d_model": D_MODEL, "num_hidden_layers": LAYERS, "bias": True}
STATE = {f"{i}.weight": torch.ones(D_MODEL, D_MODEL) for i in range(LAYERS)}
STATE |= {f"{i}.bias": torch.zeros(D_MODEL) for i in range(LAYERS)}
#: What a file could make run.
ACTIONS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect")
acted = []
watching = False


def watch(event, args):
    if watching and event in ACTIONS:
        acted.append((event, args))


sys.addaudithook(watch)


@pytest.fixture(params=[60, pytest.param(1000, marks=pytest.mark.slow)])
def check(request):
    """Run a check on that many examples of strategies, with nothing else run."""

    def run(function, **strategies):
        global watching
        health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
        quiet = settings(max_examples=request.param, deadline=None, suppress_health_check=health)
        acted.clear()
        watching = True
        try:
            quiet(given(**strategies)(function))()
        finally:
            watching = False
        assert acted == []

    return run


def refused(call, *arguments):
    """The answer, or None after one error of a kind and a length that a person reads; in little memory."""
    memory = PeakMemory(torch.device("cpu"))
    try:
        return call(*arguments)
    except ValueError as error:
        text = str(error)
        assert len(text) < 500
        assert "\n" not in text
        return None
    finally:
        growth = memory.growth()
        assert growth is None or growth < 200 * 2**20


def nested(depth):
    return '{"text": "a", "b": ' + "[" * depth + "]" * depth + "}"


LONG = st.builds(
    lambda char, count: char * count, st.sampled_from('xé\n\x00\u202e=\\"'), st.sampled_from([1, 70, 10**5])
)
NAMES = st.sampled_from(["text", "id", "TEXT", ""]) | st.text(max_size=8) | LONG
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | LONG,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=5)
LINES = (
    st.builds(lambda row: json.dumps(row).encode(), OBJECTS)
    | st.builds(
        lambda text, name: json.dumps({"text": text, "id": name}).encode(), st.text(min_size=1), st.integers(0, 9)
    )
    | st.builds(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"), VALUES)
    | st.builds(lambda depth: nested(depth).encode(), st.sampled_from([1, 500, 2000, 10**5, 10**6]))
    | st.sampled_from(
        [b"", b" ", b"\r", b"{", b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "\\ud800"}', b"\xef\xbb\xbf{}"]
    )
    | st.builds(lambda n: json.dumps({str(i): 1 for i in range(n)}).encode(), st.sampled_from([3, 10**4]))
    | st.binary(max_size=20)
)


def test_jsonl(check, tmp_path):
    path = tmp_path / "x.jsonl"

    def read(lines, column):
        path.write_bytes(b"\n".join(lines))
        found = refused(read_jsonl, path, "text", column)
        if found is None:
            return
        rows = [json.loads(line.decode("utf-8-sig")) for line in path.read_bytes().split(b"\n") if line.strip()]
        assert [document.text for document in found] == [row["text"] for row in rows]
        assert [document.id for document in found] == [row.get(column) if column else None for row in rows]

    check(read, lines=st.lists(LINES, max_size=4), column=st.sampled_from([None, "id"]) | NAMES)


KEYS = st.sampled_from([*CONFIG, "unembed_hash", "num_layers", "rank", "model_config", "lens_type", "auto_map"]) | NAMES
SIZES = st.sampled_from([0, 1, 2, 3, -1, 10**9, 2**63, 10**30, 1.5, True, "2", None])
CONFIGS = (
    st.builds(lambda changes: json.dumps(CONFIG | changes).encode(), st.dictionaries(KEYS, VALUES, max_size=4))
    | st.builds(lambda d, n: json.dumps(CONFIG | {"d_model": d, "num_hidden_layers": n}).encode(), SIZES, SIZES)
    | st.builds(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"), VALUES)
    | st.builds(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth, st.sampled_from([5, 10**4, 10**5]))
    | st.builds(
        lambda n: json.dumps(CONFIG | {str(i): [] for i in range(n)}).encode(), st.sampled_from([9, 10**4, 10**5])
    )
    | st.binary(max_size=50)
)


@pytest.mark.filterwarnings("ignore:lens config. unknown key")
def test_lens_configs(check, tmp_path):
    torch.save(STATE, tmp_path / "params.pt")

    def read(text):
        (tmp_path / "config.json").write_bytes(text)
        found = refused(read_artifact, tmp_path / "config.json", tmp_path / "params.pt")
        if found is not None:
            values = json.loads(text)
            assert found.config.d_model == values["d_model"] == D_MODEL
            assert found.config.num_hidden_layers == values.get("num_hidden_layers", values.get("num_layers"))
            assert {name: value.tolist() for name, value in found.translators.items()} == {
                name: value.tolist() for name, value in STATE.items()
            }

    check(read, text=CONFIGS)


def entries(names):
    """Entries of a header, mostly of another tensor than the file holds."""
    numbers = st.sampled_from([0, 1, 3, 9, 36, -1, 2**31, 2**63, 2**64, 10**30, 1.5, None])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "I64", "BF16", "BOOL", "F8_E4M3", "X", 5]),
            "shape": st.lists(numbers, max_size=3) | st.just([1] * 1000),
            "data_offsets": st.lists(numbers, max_size=3),
        }
    )
    return st.dictionaries(st.sampled_from(names) | NAMES, entry | VALUES, max_size=4)


def rewritten(whole, changes, lost, length):
    """A file of safetensors with another header, or another length of it."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header = {name: value for name, value in header.items() if name not in lost} | changes
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + whole[8 + size :]


LENGTHS = st.none() | st.none() | st.sampled_from([0, 1, 100, 2**20, 2**20 + 1, 2**40, 2**63, 2**64 - 1])


def test_safetensors_headers_of_lenses(check, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    whole = save(STATE)

    def read(changes, lost, length):
        (tmp_path / "x.safetensors").write_bytes(rewritten(whole, changes, lost, length))
        found = refused(read_artifact, tmp_path / "config.json", tmp_path / "x.safetensors")
        if found is not None:
            assert {name: [*value.shape] for name, value in found.translators.items()} == {
                name: [*value.shape] for name, value in STATE.items()
            }

    names = [*STATE, "__metadata__"]
    check(read, changes=st.just({}) | entries(names), lost=st.sets(st.sampled_from(names), max_size=1), length=LENGTHS)


def test_safetensors_headers_of_statistics(check, tmp_path):
    stats = LensStats(torch.zeros(2, 3), torch.arange(2), torch.arange(3), rank=torch.ones(2, 3, dtype=torch.int64))
    path = tmp_path / "x.safetensors"
    stats.save(path)
    whole = path.read_bytes()

    def read(changes, lost, length):
        path.write_bytes(rewritten(whole, changes, lost, length))
        found = refused(LensStats.load, path)
        if found is not None:
            assert found[1].layers.ndim == 0
            assert found.lse.shape[: found.layers.ndim] == found.layers.shape
            repr(found)
            assert len(found.to_pandas()) == found.lse.numel()

    names = [*dict(stats.items()), "top_ids", "__metadata__"]
    check(read, changes=st.just({}) | entries(names), lost=st.sets(st.sampled_from(names), max_size=2), length=LENGTHS)


def opcodes(data):
    """Every operation of a pickle with its argument, as bytes."""
    ends = [*[position for _, _, position in pickletools.genops(data)][1:], len(data)]
    starts = [0, *ends[:-1]]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


WILD = st.sampled_from(
    [
        *(b"cos\nsystem\n", b"X\x04\x00\x00\x00true", b"\x85", b"R", b"cbuiltins\nset\n", b"cbuiltins\nbytearray\n"),
        *(b"J\xff\xff\xff\x7f", b"(", b")", b"}", b"]", b"s", b"u", b"a", b"e", b"t", b"b", b"Q", b"\x81", b"."),
        *(b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"r\xff\xff\xff\x7f", b"h\x00", b"q\x00"),
        *(b"\x8f", b"\x93", b"\x96" + struct.pack("<Q", 2**40), b"\x85" * 10**5, b"]" * 10**5, b"K\x00", b"N"),
    ]
)


def test_pickles_of_checkpoints(check, tmp_path):
    path = tmp_path / "params.pt"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = (name for name in held if name.endswith("/data.pkl"))
    whole = opcodes(held[name])

    def read(changes, entry, size):
        parts = [*whole]
        for at, what, instead in changes:
            parts[at % len(parts) : at % len(parts) + instead] = what
        with zipfile.ZipFile(path, "w") as archive:
            for key, content in (held | {name: b"".join(parts)}).items():
                archive.writestr(key, content[:size] if key.endswith(entry) else content)
        found = refused(read_artifact, tmp_path / "config.json", path)
        if found is not None:
            for key, value in found.translators.items():
                assert value.shape == STATE[key].shape

    changes = st.tuples(st.integers(0, 999), st.lists(WILD, max_size=3), st.integers(0, 2))
    names = st.sampled_from(["/data/0", "/data/1", "/byteorder", "/nothing"])
    check(read, changes=st.lists(changes, max_size=3), entry=names, size=st.sampled_from([0, 8, 10**6]))
