"""Processes that train one lens together train what one process trains, and end together."""

import os
import time

import pytest
import tiny_text_model
import torch
import torch.distributed as dist
from several_ranks import on_ranks
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import tuned_lens_fast as tl
from tuned_lens_fast.checkpoint import load_checkpoint
from tuned_lens_fast.training import loop

pytestmark = pytest.mark.slow  # processes that start, and training on each
ASKED = {
    "steps": 6,
    "tokens_per_step": 96,
    "sequence_length": 16,
    "init_tokens": 256,
    "checkpoint_every": 2,
    "quiet": True,
}
CASES = {
    "adam": {},
    "muon": {"optimizer": "muon", "init": "zero", "learning_rate": 1e-3},
    "rank": {"rank": 4, "optimizer": "sgd", "clip": None},
    "ce of biases": {"loss": "ce", "bias_only": True},
    "one sequence": {"tokens_per_step": 16},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As the ranks have, since the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def documents():
    torch.manual_seed(1)
    return [torch.randint(0, 256, (length,)) for length in (200, 150, 90, 70, 300)]


def trained(out=None, model=None, **changes):
    """Parameters after training, and gradients of the first step."""
    model = model or tiny_text_model.make()[0]
    lens, gradients = tl.TunedLens.from_model(model), []
    update = loop.Run._update

    def seen(run, losses):
        if not gradients:
            gradients.append([p.grad.clone() for p in run.translators.all()])
        update(run, losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_update", seen)
        report = tl.train(model, lens, documents(), out=out, **ASKED | changes)
    return {
        "parameters": [p.detach().clone() for p in lens.layer_translators.parameters()],
        "gradients": gradients[0] if gradients else [],
        "kl": report.kl_after,
        "losses": torch.tensor(report.losses),
    }


def cases():
    return {name: trained(**changes) for name, changes in CASES.items()}


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


def stopped(out, step):
    """A run that ends behind the checkpoint of ``step``."""
    save = loop.Run._save

    def saved(run):
        save(run)
        if run.step == step:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_save", saved)
        with pytest.raises(Stopped):
            trained(out)


@pytest.fixture(scope="module")
def pair(folder):
    stopped(folder / "begun by one", 2)

    def resumed():
        found = {"from one": trained(folder / "begun by one")}
        stopped(folder / "begun by two", 4)
        found["finished"] = trained(folder / "whole")
        found["again"] = trained(folder / "whole")
        return found

    tiny_text_model.save(folder / "model")

    def tensor_parallel():
        config = DistributedConfig(tp_size=2)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config)
        found = {name: trained(model=model, **CASES[name]) for name in ("adam", "ce of biases", "one sequence")}
        start = time.monotonic()
        with pytest.raises((ValueError, RuntimeError)) as mistake:
            trained(model=model, loss="none" if dist.get_rank() else "kl")
        assert time.monotonic() - start < 20
        return {**found, "mistake": (mistake.type.__name__, str(mistake.value))}

    def mistakes():
        rank, found = dist.get_rank(), {}
        (folder / f"of {rank}").mkdir()
        os.chdir(folder / f"of {rank}")
        for name, changes in (
            ("elsewhere", {"out": "lens"}),
            ("steps", {"steps": 5 + rank}),
            ("check", {"loss": "none" if rank else "kl"}),
            ("folder", {"out": folder / "whole", "seed": 5}),
            ("nan", {"learning_rate": 1e30, "init": "zero", "optimizer": "sgd", "steps": 2}),
        ):
            start = time.monotonic()
            try:
                found[name] = trained(**changes)
            except Exception as error:
                found[name] = type(error).__name__, str(error)
            assert time.monotonic() - start < 20
        return found

    return on_ranks(2, cases, resumed, tensor_parallel, mistakes)


@pytest.fixture(scope="module")
def alone():
    return cases()


def assert_alike(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_two_train_what_one_trains(pair, alone, name):
    wanted = alone[name]
    first, second = (rank["cases"][name] for rank in pair)
    assert all(torch.equal(a, b) for a, b in zip(first["parameters"], second["parameters"], strict=True))
    assert first["kl"] == second["kl"]
    assert max(g.abs().max() for g in wanted["gradients"]) > 1e-3
    assert_alike(first["gradients"], wanted["gradients"], 1e-6)
    assert_alike(first["parameters"], wanted["parameters"], 2e-4)
    torch.testing.assert_close(first["losses"], wanted["losses"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "ce of biases", "one sequence"])
def test_a_model_over_two_trains_what_a_whole_one_trains(pair, alone, name):
    first, second = (rank["tensor_parallel"][name] for rank in pair)
    assert all(torch.equal(a, b) for a, b in zip(first["parameters"], second["parameters"], strict=True))
    assert_alike(first["gradients"], alone[name]["gradients"], 2e-5)
    torch.testing.assert_close(first["losses"], alone[name]["losses"], atol=1e-4, rtol=1e-4)


def test_a_run_goes_on_with_another_number(pair, alone, folder):
    wanted = alone["adam"]
    for rank in pair:
        assert_alike(rank["resumed"]["from one"]["parameters"], wanted["parameters"], 2e-4)
        for name in ("finished", "again"):
            assert_alike(rank["resumed"][name]["parameters"], pair[0]["cases"]["adam"]["parameters"], 0)
    with pytest.warns(UserWarning, match="the run began under other conditions .*processes 2 then, 1 now"):
        found = trained(folder / "begun by two")
    assert_alike(found["parameters"], wanted["parameters"], 2e-4)
    written = load_checkpoint(folder / "whole" / "params.pt")
    assert torch.equal(written["0.weight"], pair[0]["cases"]["adam"]["parameters"][0])


def test_one_mistake_is_everybodys_who_runs_a_part_of_the_model(pair):
    (first, told), (second, own) = (rank["tensor_parallel"]["mistake"] for rank in pair)
    assert (first, second) == ("RuntimeError", "ValueError")
    assert told == f"rank 1 failed: ValueError: {own}"


def test_one_mistake_is_everybodys(pair):
    first, second = (rank["mistakes"] for rank in pair)
    assert first["steps"] == second["steps"]
    assert first["steps"][1].startswith("steps: got 5 on rank 0 and 6 on rank 1; all ranks have to ask the same")
    assert second["check"][0] == "ValueError"
    assert first["check"] == ("RuntimeError", f"rank 1 failed: ValueError: {second['check'][1]}")
    assert first["folder"][0] == "ValueError"
    assert second["folder"] == ("RuntimeError", f"rank 0 failed: ValueError: {first['folder'][1]}")
    assert second["elsewhere"] == (
        "FileNotFoundError",
        "out: lens is not there, wanted a folder that all processes see",
    )
    assert first["elsewhere"] == ("RuntimeError", f"rank 1 failed: FileNotFoundError: {second['elsewhere'][1]}")
    outcomes = [found["nan"] if isinstance(found["nan"], tuple) else found["nan"]["kl"] for found in (first, second)]
    assert repr(outcomes[0]) == repr(outcomes[1]), "steps that are not finite are skipped by both"


def killed():
    """The third of three dies in the middle."""
    if dist.get_rank() == 2:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Run, "_tell", lambda run: os._exit(0) if run.step == 2 else None)
            trained()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="cannot reach the others, of which one has ended or hangs"):
        trained()
    assert time.monotonic() - start < 30
    return True


def test_a_process_that_is_gone():
    assert [rank.get("killed") for rank in on_ranks(3, killed)] == [True, True, None]
