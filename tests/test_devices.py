"""A model whose blocks lie on several devices, emulated: read where its states are, as if it were on one."""

import warnings

import accelerate
import pytest
import torch
from emulated_devices import CPU, FIRST, SECOND, THIRD, emulated_devices
from tiny_models import D_MODEL, LAYERS, tiny
from torch import nn

from tuned_lens_fast import (
    LogitLens,
    TunedLens,
    Unembed,
    capture,
    decode_documents,
    decode_model,
    replicas,
    residual_stream,
)
from tuned_lens_fast.data.parts import load_run
from tuned_lens_fast.engines import ENGINES
from tuned_lens_fast.engines.interface import Norm
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.plotting import PredictionTrajectory

IDS = (torch.arange(2 * 9) * 37 % 97 + 3).view(2, 9)
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
FAMILIES = {"llama": {"tie_word_embeddings": True}, "gemma2": {}, "gpt_neox": {}, "qwen3_moe": {}}
STATS = ["log_prob", "rank", "entropy", "max_prob", "kl", "reverse_kl", "js", "tv"]


def spread(model_type, **config):
    """A model with its embedding and first block on one device, the other blocks and the norm on a second, the head on
    a third; or where the embedding is, to which it is tied."""
    model = tiny(model_type, **FAMILIES[model_type] | config)
    path, blocks = get_transformer_layers(model)
    path = path.replace("base_model", model.base_model_prefix, 1)
    places = {model.get_input_embeddings(): FIRST, model.get_output_embeddings(): THIRD}
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        places[model.get_output_embeddings()] = FIRST
    device_map = {f"{path}.{i}": str(SECOND if i else FIRST) for i in range(len(blocks))}
    for name, module in model.named_modules():
        if not any(True for _ in module.children()) and not name.startswith(f"{path}."):
            device_map[name] = str(places.get(module, SECOND))
    return accelerate.dispatch_model(model, device_map, skip_keys="past_key_values")


@pytest.fixture
def devices():
    with emulated_devices():
        yield


def trained(model):
    """A lens with translators that are not zero, the same for models alike."""
    lens = TunedLens.from_model(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return lens


def assert_close(found, wanted):
    """But for the rounding of products of other numbers of rows."""
    found = dict(found.items())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].cpu(), value, atol=2e-5, rtol=1e-5, equal_nan=True)


def test_emulated_devices_do_not_mix(devices):
    a, b = torch.ones(3, device=FIRST), torch.ones(3).to(SECOND)
    assert (a.device, b.device, (a * 2)[1:].device, torch.ones(1).device) == (FIRST, SECOND, FIRST, CPU)
    with pytest.raises(RuntimeError, match="tensors on cpu:1, cpu:2"):
        a + b
    with pytest.raises(RuntimeError, match="tensors on cpu:1, cpu"):
        nn.functional.linear(a, torch.ones(2, 3))
    a[:] = b
    assert torch.equal(a + b.to(a), torch.full((3,), 2.0, device=FIRST))
    assert nn.Linear(2, 2).to(SECOND).weight.device == SECOND


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_as_on_one_device(devices, model_type):
    model, whole = spread(model_type), tiny(model_type, **FAMILIES[model_type])
    lens, wanted = trained(model), trained(whole)
    home = lens.unembed.head.weight.device
    assert {entry.device for entry in residual_stream(model, IDS.to(FIRST))} == {FIRST, SECOND}
    question = {"stats": STATS, "top_k": 3, "watch": [5, 7]}
    for options in ({}, {"chunk": 4}, {"attention_mask": MASK}, {"attention_mask": MASK, "chunk": 4}):
        ours = {n: v.to(FIRST) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as that it does not continue from its cache
            answer = decode_model(model, lens, IDS.to(FIRST), **question, **ours)
        assert_close(answer, decode_model(whole, wanted, IDS, **question, **options))
        assert answer.lse.device == home
    states, own = residual_stream(model, IDS.to(FIRST)), residual_stream(whole, IDS)
    question = {"stats": STATS, "top_k": 2}
    as_on_one = wanted.decode(own[:-1], reference=wanted.unembed.norm(own[-1]), targets=IDS, **question)
    for at in (home, SECOND):
        reference = lens.unembed.norm(states[-1].to(home)).to(at)
        assert_close(lens.decode(states[:-1], reference=reference, targets=IDS, **question), as_on_one)
    for layer in range(LAYERS):
        new = lens.generate(model, layer, IDS.to(FIRST), do_sample=False, max_new_tokens=3)
        assert torch.equal(new.cpu(), wanted.generate(whole, layer, IDS, do_sample=False, max_new_tokens=3))


def test_the_rest_of_what_reads_a_model(devices, tmp_path):
    model, whole = spread("llama"), tiny("llama", **FAMILIES["llama"])
    lens, wanted = LogitLens.from_model(model), LogitLens.from_model(whole)
    assert torch.equal(lens.unembed.norm.weight.cpu(), whole.model.norm.weight)
    h = torch.randn(3, D_MODEL)
    for verify in (True, False):
        assert torch.equal(Unembed(model, verify=verify)(h.to(FIRST)).cpu(), wanted.unembed(h))
    for at in ("attn", "mlp", "mid", "head"):
        torch.testing.assert_close(capture(model, IDS, at).cpu(), capture(whole, IDS, at))
    for target, each in ((tmp_path / "split", (model, lens)), (tmp_path / "whole", (whole, wanted))):
        decode_documents(*each, [*IDS, IDS[0, :4]], out=target, memory_budget=2**20)
    tables = [load_run(tmp_path / name).to_table().to_pandas() for name in ("split", "whole")]
    assert tables[0]["rank"].equals(tables[1]["rank"])
    assert (tables[0]["kl"] - tables[1]["kl"]).abs().max() < 2e-5
    made = [PredictionTrajectory.from_lens_and_model(*each, IDS) for each in ((lens, model), (wanted, whole))]
    assert abs(made[0].forward_kl().stats - made[1].forward_kl().stats).max() < 2e-5


@pytest.fixture
def places(monkeypatch):
    """Where the engine's passes over the vocabulary run, with the number of rows."""
    seen, engine = {}, type(ENGINES["eager"])
    own = engine.vocabulary_pass

    def watched(self, x, *rest):
        seen[x.device] = seen.get(x.device, 0) + len(x)
        return own(self, x, *rest)

    monkeypatch.setattr(engine, "vocabulary_pass", watched)
    return seen


def test_layers_are_read_where_their_states_are(devices, places):
    model = spread("llama", tie_word_embeddings=False)
    lens = LogitLens.from_model(model)
    decode_model(model, lens, IDS.to(FIRST), stats=["entropy"], engine="eager")
    # What the embedding and the first block put out, what the second does, and the model's own output.
    assert places == {FIRST: 2 * IDS.numel(), SECOND: IDS.numel(), THIRD: IDS.numel()}


def test_a_lens_that_was_moved_away_has_the_states_come(devices, places):
    model = spread("llama", tie_word_embeddings=False)
    lens = trained(model)
    wanted = decode_model(model, lens, IDS.to(FIRST), engine="eager").to("cpu")
    places.clear()
    elsewhere = torch.device("cpu", 4)
    found = decode_model(model, lens.to(elsewhere), IDS.to(FIRST), engine="eager")
    assert (places.keys(), found.lse.device) == ({elsewhere}, elsewhere)
    assert_close(found.to("cpu"), wanted)


def test_states_come_to_the_head_where_there_is_no_room_for_another(devices, places, monkeypatch):
    model = spread("llama", tie_word_embeddings=False)
    lens = trained(model)
    size = lens.unembed.head.weight.nbytes + 2 * lens.unembed.norm.weight.nbytes
    of_a_layer = sum(parameter.nbytes for parameter in lens[0].parameters())
    wanted = decode_model(model, lens, IDS.to(FIRST), engine="eager")
    # Twice the head and one translator fit, which the second device needs; not twice the head and two.
    monkeypatch.setattr(replicas, "_free", lambda device: 2 * (size + of_a_layer))
    places.clear()
    lens = trained(model)
    assert_close(decode_model(model, lens, IDS.to(FIRST), engine="eager").to("cpu"), wanted.to("cpu"))
    assert places.keys() == {SECOND, THIRD}


def test_what_changes_at_home_changes_elsewhere(devices):
    model = spread("llama", tie_word_embeddings=False)
    lens = trained(model)
    states = [entry.detach() for entry in residual_stream(model, IDS.to(FIRST))[:-1]]
    before = lens.decode(states)
    with torch.no_grad():
        lens[0].weight.mul_(2)
        lens.unembed._model_end[0].module.weight.mul_(2)
    after, home = lens.decode(states), lens.unembed.head.weight.device
    assert not torch.equal(after.entropy[0], before.entropy[0])
    assert_close(after.to("cpu"), lens.decode([entry.to(home) for entry in states]).to("cpu"))


def test_a_norm_whose_buffer_changes_is_copied_anew():
    module, copies = nn.Module(), replicas._Replicas()
    module.register_buffer("scale", torch.ones(3))
    norm = Norm("module", module=module)
    first = copies.copy("norm", torch.device("cpu"), norm)
    assert copies.copy("norm", torch.device("cpu"), norm) is first
    module.scale.mul_(2)
    assert copies.copy("norm", torch.device("cpu"), norm) is not first


def test_states_from_elsewhere_are_refused(devices):
    lens = LogitLens.from_model(spread("llama", tie_word_embeddings=False))
    states = [torch.zeros(2, D_MODEL) for _ in range(LAYERS)]
    with pytest.raises(ValueError, match="hidden_states: they are on cpu, the lens on cpu:3"):
        lens.decode(states)
    with pytest.raises(ValueError, match="reference: it is on cpu, the lens on cpu:3"):
        lens.decode([entry.to(SECOND) for entry in states], reference=states[0])
