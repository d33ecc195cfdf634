"""Checkpoints are read as torch.load reads them, and no file makes the reader call or allocate anything else."""

import json
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from tuned_lens_fast.checkpoint import MOST_DESCRIPTION, load_checkpoint
from tuned_lens_fast.memory import PeakMemory

MIB = 2**20


def pickled(path, data, **entries):
    """An archive as torch.save writes it, around any data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        for name, content in ({"version": b"3\n"} | entries).items():
            archive.writestr(f"x/{name}", content)
    return path


def refused_in_little(path, most=64 * MIB):
    """The message about a file, for which little memory was taken."""
    memory = PeakMemory(torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot read") as caught:
        load_checkpoint(path)
    growth = memory.growth()
    assert growth is None or growth < most
    assert len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "dtype",
    [*(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8)],
)
def test_tensors_are_those_that_were_saved(tmp_path, suffix, dtype):
    torch.manual_seed(0)
    state = {str(shape): (10 * torch.rand(shape)).to(dtype) for shape in ((), (0,), (3,), (4, 5), (700, 1000))}
    path = tmp_path / f"x{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    found = load_checkpoint(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
        assert torch.equal(found[name].double(), tensor.double())


def test_views_parameters_and_whatever_is_beside_them(tmp_path):
    whole = torch.arange(60.0).reshape(3, 4, 5)
    module = torch.nn.Linear(3, 4)
    state = {
        "views": [whole[1], whole[2].T, whole[:, :, 1:], whole.flatten()[::2], whole[0, 0].expand(1, 5)],
        "module": module.state_dict(),
        "parameter": module.weight,
        "plain": {"bytes": b"\x80\x00abc", 5: None, "flag": True, "number": 1.5, "large": 2**40, "text": "ü"},
    }
    path = tmp_path / "x.pt"
    torch.save(state, path)
    found, wanted = load_checkpoint(path), torch.load(path)
    for ours, theirs in zip(found["views"], wanted["views"], strict=True):
        assert torch.equal(ours, theirs)
    assert found["module"].keys() == wanted["module"].keys()
    assert torch.equal(found["parameter"], module.weight)
    assert found["plain"] == wanted["plain"]


def test_only_what_is_asked_for_is_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"large": torch.zeros(64, MIB), "small": torch.ones(3)}, path)
    memory = PeakMemory(torch.device("cpu"))
    found = load_checkpoint(path)
    assert found["large"].shape == (64, MIB)
    assert found["small"].tolist() == [1, 1, 1]
    growth = memory.growth()
    assert growth is None or growth < 32 * MIB


def test_a_compressed_archive_is_refused_before_it_grows(tmp_path):
    small, large = tmp_path / "bomb.pt", tmp_path / "x.pt"
    torch.save({"0.weight": torch.zeros(16, MIB)}, large)
    with zipfile.ZipFile(large) as source, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as bomb:
        for info in source.infolist():
            bomb.writestr(info.filename, source.read(info))
    large.unlink()
    assert small.stat().st_size < MIB
    assert "is compressed, as torch.save never does" in refused_in_little(small, 16 * MIB)
    with zipfile.ZipFile(small, "w", zipfile.ZIP_BZIP2) as bomb:
        bomb.writestr("x/data.pkl", bytes(64 * MIB))
    assert "is compressed" in refused_in_little(small, 16 * MIB)


def test_sizes_that_the_file_has_not(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"0.weight": torch.zeros(2, 3)}, path)
    whole = path.read_bytes()
    # The shape and the storage's count, in the pickle: 2 x 3 becomes 2 x 255.
    assert b"K\x02K\x03\x86" in whole
    with zipfile.ZipFile(path) as archive:
        data = archive.read("x/data.pkl")
        entries = {name[2:]: archive.read(name) for name in archive.namelist() if name != "x/data.pkl"}
    data = data.replace(b"K\x02K\x03\x86", b"K\x02K\xff\x86").replace(b"K\x03K\x01\x86", b"K\xffK\x01\x86")
    pickled(path, data, **entries)
    assert "it is truncated" in refused_in_little(path)


def storage(module="torch", name="FloatStorage"):
    return (
        b"(X\x07\x00\x00\x00storagec"
        + f"{module}\n{name}\n".encode()
        + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQ"
    )


#: A tensor of one number that is repeated 10^9 times.
REPEATED = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\x00J\x00\xca\x9a;\x85K\x00\x85\x89}tR"


@pytest.mark.parametrize(
    "data",
    [
        b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"cbuiltins\nset\n" + REPEATED + b"\x85R.",
        b"ccollections\nOrderedDict\n" + REPEATED + b"\x85R.",
        b"ccollections\nCounter\n" + REPEATED + b"\x85R.",
        b"ctorch\nSize\n" + REPEATED + b"\x85R.",
        b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.",
        b"ctorch\nload\n.",
        b"ctorch\nfloat32\n)R.",
        b"\x96" + struct.pack("<Q", 2**33) + b".",  # BYTEARRAY8
        b"\x8e" + struct.pack("<Q", 2**33) + b".",  # BINBYTES8
        b"X\xff\xff\xff\x7f.",
        b"}" + b")" + b"\x85" * (MOST_DESCRIPTION // 2) + b"Ns.",  # a key whose hash overflows the stack
        b"}(" + b")" + b"\x85" * (MOST_DESCRIPTION // 2) + b"Nu.",
        b"]" * MOST_DESCRIPTION + b".",
        b"\x8f" * (MOST_DESCRIPTION // 2) + b".",
        b"(" * (MOST_DESCRIPTION - 9),
        b"",
        b".",
        b"R.",
        b"}K\x01s.",
        b"}(K\x01u.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)))tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\x00X\x01\x00\x00\x00aK\x01\x85\x89}tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"J\xff\xff\xff\xffK\x01\x85K\x01\x85\x89}tR.",
        storage(name="Tensor") + b".",
        b"K\x05Q.",
    ],
)
def test_pickles_that_want_more_than_tensors(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pickled(tmp_path / "x.pt", b"\x80\x02" + data)
    refused_in_little(path, 128 * MIB)


def test_a_far_place_in_the_memo_takes_no_memory(tmp_path):
    memory = PeakMemory(torch.device("cpu"))
    assert load_checkpoint(pickled(tmp_path / "x.pt", b"\x80\x02}r\xff\xff\xff\x7f.")) == {}
    growth = memory.growth()
    assert growth is None or growth < 16 * MIB


@pytest.mark.parametrize(
    "data",
    [
        REPEATED + b".",
        b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R.",
    ],
    ids=["a repeated number", "a storage without numbers"],
)
def test_what_takes_memory_only_once_it_is_read(tmp_path, data):
    path = pickled(tmp_path / "x.pt", b"\x80\x02" + data, **{"data/0": bytes(32)})
    memory = PeakMemory(torch.device("cpu"))
    assert not isinstance(load_checkpoint(path), dict)
    growth = memory.growth()
    assert growth is None or growth < 64 * MIB


def test_what_describes_the_tensors_is_short(tmp_path):
    path = pickled(tmp_path / "x.pt", bytes(MOST_DESCRIPTION + 1))
    assert "wanted at most 1,048,576" in refused_in_little(path)
    # A directory of many entries: 46 bytes of it become an object each.
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(30_000):
            archive.writestr(f"x/{i}", b"")
    assert "wanted one entry data.pkl" in refused_in_little(path)


@pytest.mark.parametrize(
    "header",
    [
        *({"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}},),
        *({"w": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]}},),
        *({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}},),
        *({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},),
        *({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},),
        *({"w": 5}, [], "x"),
    ],
)
def test_safetensors_headers(tmp_path, header):
    path = tmp_path / "x.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused_in_little(path)
    for length in (2**64 - 1, 2**40, MOST_DESCRIPTION + 1, len(text) + 100):
        path.write_bytes(struct.pack("<Q", length) + text + bytes(4))
        refused_in_little(path)


def test_a_header_as_large_as_a_model_needs_none(tmp_path):
    """A true one, that safetensors itself would read."""
    path = tmp_path / "x.safetensors"
    text = json.dumps({f"{i}.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)})
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    assert "wanted at most 1,048,576" in refused_in_little(path, 8 * MIB)
