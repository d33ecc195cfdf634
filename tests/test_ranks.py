"""Ranks that read a model together find what one process finds, all alike, or all of them say why not."""

import contextlib
import io
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import tiny_text_model
import torch
import torch.distributed as dist
from several_ranks import on_ranks
from tiny_models import LAYERS, tiny
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tuned_lens_fast import LogitLens, TunedLens, cli, decode_documents, decode_model
from tuned_lens_fast.ranks import Ranks, ranks_of

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from kill_resume import bits

pytestmark = pytest.mark.slow  # processes that start, and models on each
IDS = (torch.arange(2 * 9) * 37 % 97 + 3).view(2, 9)
STATS = ["log_prob", "rank", "entropy", "max_prob", "kl", "reverse_kl", "js", "tv"]
FLOATS = ["lse", "log_prob", "entropy", "max_prob", "kl", "reverse_kl", "js", "tv", "top_log_probs", "watch_log_probs"]
DOCUMENTS = [[*range(3, 3 + length)] for length in (30, 13, 9, 8)]
#: Tied, with a softcap, and with a bias of the head.
SPLIT = {"llama": {"tie_word_embeddings": True, "num_key_value_heads": 4, "vocab_size": 1003}, "gemma2": {}, "phi": {}}


def make(model_type):
    model = tiny(model_type, **SPLIT[model_type])
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[-1] = head[7]  # a tie of tokens of the first and the last rank
        head[60] = head[7]
        if model_type == "phi":
            model.get_input_embeddings().weight[int(IDS[1, 4])] = torch.nan  # its rows, and those behind it
    return model


def lens_of(model):
    lens = TunedLens.from_model(model)
    torch.manual_seed(5)
    for linear in lens:
        torch.nn.init.normal_(linear.weight, std=0.05)
        torch.nn.init.normal_(linear.bias, std=0.05)
    return lens


def question(**options):
    return {"stats": STATS, "top_k": 5, "watch": [7, 99, 60, 3]} | options


def read(model, lens=None, ids=IDS, **options):
    with torch.no_grad():
        return dict(decode_model(model, lens or lens_of(model), ids, **question(**options)).items())


CASES = {
    "native": {},
    "eager": {"engine": "eager"},
    "chunks": {"chunk": 4},
    "small budget": {"memory_budget": 210_000},
    "left": {"attention_mask": (torch.arange(9) >= torch.tensor([[0], [4]])).long()},
    "given targets": {"targets": torch.where(IDS % 5 == 0, -100, IDS.flip(1)), "stats": ["rank"], "top_k": 0},
    "one position": {"ids": IDS[:, :1], "top_k": 101},
}


def whole_on_every_rank():
    """Replicas, which split rows or vocabulary."""
    return {
        (model_type, split, name): read(model, lens, split=split, **case)
        for model_type in SPLIT
        for model in [make(model_type)]
        for lens in [lens_of(model)]
        for split in ("rows", "vocabulary")
        for name, case in CASES.items()
        if (model_type, name) != ("phi", "left")  # the NaN is in the way of its trial
    }


def more_ranks_than_tokens():
    found = {}
    for vocab in (3, 1):
        model = tiny("llama", vocab_size=vocab, pad_token_id=0, bos_token_id=0, eos_token_id=0)
        lens = lens_of(model)
        for split, engine in itertools.product(("rows", "vocabulary"), ("auto", "eager")):
            asked = {"ids": IDS[0, :2] % vocab, "watch": [vocab - 1], "top_k": 1, "split": split, "engine": engine}
            found[vocab, split, engine] = read(model, lens, **asked)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for model_type in SPLIT:
        if model_type != "phi":  # its NaN would spread
            make(model_type).save_pretrained(folder / model_type)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """What two ranks found, one after the other in one group."""

    def tensor_parallel():
        found = {}
        for model_type in ("llama", "gemma2"):
            config = DistributedConfig(tp_size=2)
            model = AutoModelForCausalLM.from_pretrained(folder / model_type, distributed_config=config)
            assert isinstance(model.get_output_embeddings().weight, DTensor)
            lens = LogitLens.from_model(model)
            for split in (None, "rows", "vocabulary"):
                found[model_type, split] = read(model, lens, split=split)
            gathered = lens.unembed._model_end[1]._copy
            found[model_type] = gathered is None, ranks_of(model, None)[1]
        return found

    def corpus():
        """Replicas that work as one, a model of tensor parallelism, and each rank alone; all into folders."""
        model = make("gemma2")
        lens = lens_of(model)
        for split in ("rows", "vocabulary"):
            decode_documents(model, lens, DOCUMENTS, out=folder / split, split=split, chunk=16, **question())
        decode_documents(model, lens, DOCUMENTS, out=folder / "alone", chunk=16, **question())
        with contextlib.suppress(OSError):
            sorted((folder / "rows").glob("*.parquet"))[dist.get_rank()].unlink()
        dist.barrier()
        decode_documents(model, lens, DOCUMENTS, out=folder / "rows", split="rows", chunk=16, **question())
        config = DistributedConfig(tp_size=2)
        model = AutoModelForCausalLM.from_pretrained(folder / "gemma2", distributed_config=config)
        decode_documents(model, LogitLens.from_model(model), DOCUMENTS, out=folder / "tp", chunk=16, **question())
        decode_model(model, LogitLens.from_model(model), IDS, out=folder / "prompt", layers=iter([0, 2]), **question())

    def mistakes():
        """What every rank raises when one does something else."""
        model, rank = make("llama"), dist.get_rank()
        lens, found = lens_of(model), {}

        def attempt(name, **options):
            start = time.monotonic()
            try:
                found[name] = read(model, options.pop("lens", lens), split="rows", **options)
            except Exception as error:
                found[name] = type(error).__name__, str(error)
            assert time.monotonic() - start < 10

        attempt("ids", ids=IDS + rank)
        attempt("shape", ids=IDS[:, : 9 - rank])
        attempt("top_k", top_k=3 + rank)
        attempt("engine", engine="eager" if rank else "native")
        attempt("watch", watch=[1, "no token"] if rank else [1])
        attempt("check", engine="none" if rank else "eager")
        attempt("lens", lens=LogitLens(lens.unembed) if rank else lens)
        attempt("all", top_k=-1)
        for name, out, documents in (
            ("documents", folder / "other", DOCUMENTS[rank:]),
            ("folder", folder / "alone", DOCUMENTS[1:]),
            ("full", folder / "full", DOCUMENTS),
        ):
            with pytest.MonkeyPatch.context() as patch:
                if name == "full":
                    patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
                try:
                    decode_documents(model, lens, documents, out=out, split="rows")
                except Exception as error:
                    found[name] = type(error).__name__, str(error)
        attempt("still well")
        return found

    tiny_text_model.save(folder / "text")

    def command_line():
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(["decode", str(folder / "text"), "some text", "--tp", "2", "--json"])
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WORLD_SIZE", "3")
                with pytest.raises(SystemExit):
                    cli.main(["decode", str(folder / "text"), "some text", "--tp", "2"])
                with pytest.raises(SystemExit):
                    cli.main(["decode", str(folder / "text"), "some text"])
        return code, said.getvalue()

    return on_ranks(2, whole_on_every_rank, tensor_parallel, corpus, command_line, mistakes)


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, more_ranks_than_tokens, killed)


def killed():
    """The second rank dies while the others wait for it."""
    ranks = Ranks()
    if ranks.rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        ranks.gather([torch.zeros(3)])
    assert time.monotonic() - start < 20
    return str(raised.value)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As the ranks have, since the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tolerance(name, value):
    absolute, relative = (5e-4, 1e-4) if name in ("reverse_kl", "js", "tv") else (1e-4, 1e-5)
    return absolute + relative * value.abs()


def assert_same(found, wanted):
    assert [*found] == [*wanted]
    for name in wanted:
        assert torch.equal(found[name].nan_to_num(7777), wanted[name].nan_to_num(7777)), name


def assert_close(found, wanted, share=0.05):
    """Ranks and ids equal; all else within a twentieth of the tolerances."""
    assert [*found] == [*wanted]
    for name in wanted:
        if name not in FLOATS:
            assert torch.equal(found[name], wanted[name]), name
            continue
        assert torch.equal(found[name].isnan(), wanted[name].isnan()), name
        off = torch.where(found[name] == wanted[name], 0, (found[name] - wanted[name]).abs())
        assert (off.nan_to_num(0) <= share * tolerance(name, wanted[name]).nan_to_num(1)).all(), (name, off.max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("model_type", SPLIT)
def test_a_split_finds_what_one_process_finds(pair, model_type, name):
    if (model_type, name) == ("phi", "left"):
        return
    model = make(model_type)
    wanted = read(model, **CASES[name])
    if model_type != "phi" and name != "one position":
        assert wanted["rank"].max() > 20
    for split, compare in (("rows", assert_same), ("vocabulary", assert_close)):
        first, second = (rank["whole_on_every_rank"][model_type, split, name] for rank in pair)
        assert_same(first, second)
        compare(first, wanted)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_tensor_parallel(pair, model_type):
    model = make(model_type)
    wanted = read(model, LogitLens.from_model(model))
    for split in (None, "rows", "vocabulary"):
        first, second = (rank["tensor_parallel"][model_type, split] for rank in pair)
        assert_same(first, second)
        for name in ("lse", "entropy", "kl", "top_log_probs"):
            torch.testing.assert_close(first[name], wanted[name], atol=2e-4, rtol=1e-4)
    assert all(rank["tensor_parallel"][model_type] == (True, "rows") for rank in pair), "the head was gathered"


def test_corpora(pair, folder):
    model = make("gemma2")
    wanted = decode_documents(model, lens_of(model), DOCUMENTS, out=folder / "one", chunk=16, **question())
    assert [rank["corpus"] for rank in pair] == [None, None]
    for name in ("rows", "alone"):
        found = bits(folder / name)
        assert all((found[column] == values).all() for column, values in bits(wanted).items()), name
    for name in ("vocabulary", "tp"):
        assert (bits(folder / name)["token_id"] == bits(wanted)["token_id"]).all()
    assert {*bits(folder / "prompt")["layer"].tolist()} == {0, 2, LAYERS}


def test_one_mistake_is_everybodys(pair):
    first, second = (rank["mistakes"] for rank in pair)
    for name, message in (
        ("ids", "input_ids: got .* on rank 0 and .* on rank 1; all ranks have to ask the same"),
        ("shape", "input_ids: got"),
        ("top_k", "top_k: got 3 on rank 0 and 4 on rank 1"),
        ("engine", "engine: got 'native' on rank 0 and 'eager' on rank 1"),
        ("lens", "lens: got 'TunedLens' on rank 0 and 'LogitLens' on rank 1"),
        ("documents", "documents: got"),
        ("all", "top_k: got -1"),
    ):
        assert first[name] == second[name]
        kind, said = first[name]
        assert kind == "ValueError"
        assert re.match(message, said)
    assert first["watch"] == ("RuntimeError", f"rank 1 failed: TypeError: {second['watch'][1]}")
    assert first["check"] == ("RuntimeError", f"rank 1 failed: ValueError: {second['check'][1]}")
    assert "holds a run with another" in first["folder"][1]
    assert second["folder"] == ("RuntimeError", f"rank 0 failed: ValueError: {first['folder'][1]}")
    assert "No space left" in first["full"][1]
    assert second["full"][1].startswith("rank 0 failed: OSError: out: cannot write")
    assert_same(first["still well"], second["still well"])


def test_the_command_line(pair, folder, capsys):
    assert cli.main(["decode", str(folder / "text"), "some text", "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    (code, said), (other_code, other) = (rank["command_line"] for rank in pair)
    assert (code, other_code) == (0, 0)
    printed = said.partition("\nusage")[0]
    found = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    torch.testing.assert_close(torch.tensor(found["entropy"]), torch.tensor(wanted["entropy"]), atol=1e-4, rtol=1e-4)
    assert found["top_ids"] == wanted["top_ids"]
    assert "{" not in other.partition("\nusage")[0], "only the first prints"
    assert "--tp: got 2 and 3 processes, wanted a number that divides them" in said
    assert "--out: 3 processes share the work on a folder, got none; or name --tp" in said


def test_more_ranks_than_tokens(four):
    for vocab in (3, 1):
        model = tiny("llama", vocab_size=vocab, pad_token_id=0, bos_token_id=0, eos_token_id=0)
        wanted = read(model, ids=IDS[0, :2] % vocab, watch=[vocab - 1], top_k=1)
        for asked in itertools.product(("rows", "vocabulary"), ("auto", "eager")):
            found = [rank["more_ranks_than_tokens"][(vocab, *asked)] for rank in four if rank]
            for other in found[1:]:
                assert_same(found[0], other)
            assert_close(found[0], wanted)  # the product of a single row may round otherwise than that of two


def test_a_rank_that_is_gone(four):
    for number, rank in enumerate(four):
        if number != 1:
            assert f"rank {number} of 4 cannot reach the others" in rank["killed"]


def test_without_a_group():
    model = tiny("llama")
    lens = LogitLens.from_model(model)
    with pytest.raises(ValueError, match="split: got 'rows' and no process group; start with torchrun"):
        decode_model(model, lens, IDS, split="rows")
    with pytest.raises(ValueError, match="split: got 'layers', wanted 'rows', 'vocabulary' or None"):
        decode_model(model, lens, IDS, split="layers")
