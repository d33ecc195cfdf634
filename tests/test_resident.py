"""Models whose weights lie elsewhere: split over ranks, offloaded. Compared with the same model in one piece."""

import copy
import pickle

import accelerate
import pytest
import torch
import torch.distributed as dist
from several_ranks import on_ranks
from tiny_models import D_MODEL, tiny
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tuned_lens_fast import LogitLens, TunedLens, Unembed, decode_documents, decode_model, residual_stream, train
from tuned_lens_fast.data import fingerprint
from tuned_lens_fast.data.parts import load_run
from tuned_lens_fast.model_surgery import get_transformer_layers

IDS = (torch.arange(2 * 9) * 37 % 97 + 3).view(2, 9)
STATS = ["log_prob", "rank", "entropy", "max_prob", "kl", "js"]
#: Types whose heads, key and value heads can be cut in 4.
SPLIT = {
    "llama": {"tie_word_embeddings": True, "num_key_value_heads": 4, "vocab_size": 1003},
    "gemma2": {"num_key_value_heads": 4},
    "qwen3_moe": {"num_key_value_heads": 4},
    "gpt_neox": {},
}


def refusal(function, *arguments):
    with pytest.raises(NotImplementedError) as raised:
        function(*arguments)
    return str(raised.value)


def read(model, ids=IDS, **options):
    lens = LogitLens.from_model(model)
    return decode_model(model, lens, ids, stats=STATS, top_k=3, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for model_type, config in SPLIT.items():
        tiny(model_type, **config).save_pretrained(folder / model_type)
    return folder


@pytest.fixture(scope="module")
def found(folders):
    def tensor_parallel():
        answers = {}
        for model_type in SPLIT:
            model = AutoModelForCausalLM.from_pretrained(
                folders / model_type, distributed_config=DistributedConfig(tp_size=2)
            )
            head = model.get_output_embeddings().weight
            lens = TunedLens.from_model(model)
            answers[model_type] = {
                "split": isinstance(head, DTensor) and head.to_local().shape != head.shape,
                "stats": dict(read(model).items()),
                "chunks": dict(read(model, chunk=4).items()),
                "hash": fingerprint.of_model(model),
                "lens": fingerprint.of_lens(LogitLens(lens.unembed)),
                "tokens": lens.generate(model, 1, IDS, do_sample=False, max_new_tokens=3),
                "stream": torch.stack(residual_stream(model, IDS)),
            }
        return answers

    def by_hand(model):
        for block in get_transformer_layers(model)[1]:
            fully_shard(block)
        return fully_shard(model)

    def fsdp2():
        answers = {}
        for model_type, config in SPLIT.items():
            model = by_hand(tiny(model_type, **config))
            stats = dict(read(model).items())
            answers[model_type] = {
                "stats": stats,
                "hash": fingerprint.of_model(model),
                "sharded again": all(isinstance(p, DTensor) for p in model.parameters()),
            }
        return answers

    def fsdp2_of_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folders / "llama", distributed_config=DistributedConfig(fsdp_size=2)
        )
        return dict(read(model).items())

    def fsdp2_trained():
        model = by_hand(tiny("llama", **SPLIT["llama"]))
        lens = LogitLens.from_model(model)
        before = lens.unembed.head.weight
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(IDS, labels=IDS).loss.backward()
        in_training = lens.unembed.head.weight
        optimizer.step()
        after = lens.unembed.head.weight
        again = lens.unembed.head.weight
        return before, in_training, after, again.data_ptr() == after.data_ptr(), model.lm_head.weight.full_tensor()

    def fsdp2_shared_out():
        with pytest.raises(ValueError, match="model: it is in FSDP2") as raised:
            train(by_hand(tiny("llama")), None, [])
        return str(raised.value)

    def fsdp1():
        model = FullyShardedDataParallel(tiny("llama"), device_id=torch.device("cpu"))
        return [refusal(Unembed, model), refusal(residual_stream, model, IDS), refusal(read, model)]

    def pipeline():
        model = AutoModelForCausalLM.from_pretrained(
            folders / "qwen3_moe", distributed_config=DistributedConfig(pp_size=2)
        )
        stage = PipelineStage(tiny("llama"), dist.get_rank(), 2, torch.device("cpu"))
        return [
            refusal(Unembed, model),
            refusal(residual_stream, model, IDS),
            refusal(read, model),
            refusal(Unembed, stage),
        ]

    return on_ranks(2, tensor_parallel, fsdp2, fsdp2_of_transformers, fsdp2_trained, fsdp2_shared_out, fsdp1, pipeline)


@pytest.fixture(scope="module")
def whole():
    """The same models in one piece, and what is read in them."""
    models = {model_type: tiny(model_type, **config) for model_type, config in SPLIT.items()}
    return {model_type: (model, read(model)) for model_type, model in models.items()}


@pytest.mark.parametrize("model_type", SPLIT)
def test_tensor_parallel(found, whole, folders, model_type):
    model, wanted = whole[model_type]
    stream = torch.stack(residual_stream(model, IDS))
    for rank in found:
        got = rank["tensor_parallel"][model_type]
        assert got["split"]
        for name, value in wanted.items():
            for of in ("stats", "chunks"):
                if value.is_floating_point():
                    torch.testing.assert_close(got[of][name], value, atol=1e-5, rtol=1e-5, equal_nan=True)
                else:
                    assert torch.equal(got[of][name], value), name
        torch.testing.assert_close(got["stream"], stream, atol=1e-5, rtol=1e-5)
        assert got["hash"] == fingerprint.of_model(AutoModelForCausalLM.from_pretrained(folders / model_type))
        assert got["lens"] == fingerprint.of_lens(LogitLens.from_model(model))
        lens = LogitLens.from_model(model)
        assert torch.equal(got["tokens"], lens.generate(model, 1, IDS, do_sample=False, max_new_tokens=3))


@pytest.mark.parametrize("model_type", SPLIT)
def test_fsdp2_gives_the_same_bits(found, whole, model_type):
    model, wanted = whole[model_type]
    for rank in found:
        got = rank["fsdp2"][model_type]
        for name, value in wanted.items():
            torch.testing.assert_close(got["stats"][name], value, atol=0, rtol=0, equal_nan=True)
        assert got["hash"] == fingerprint.of_model(model)
        assert got["sharded again"]


def test_fsdp2_of_transformers_gives_the_same_bits(found, whole):
    for rank in found:
        for name, value in whole["llama"][1].items():
            torch.testing.assert_close(rank["fsdp2_of_transformers"][name], value, atol=0, rtol=0, equal_nan=True)


def test_a_lens_follows_a_model_that_fsdp2_trains(found):
    for rank in found:
        before, in_training, after, kept, wanted = rank["fsdp2_trained"]
        assert torch.equal(before, in_training)
        assert not torch.equal(before, after)
        assert torch.equal(after, wanted)
        assert kept  # it is not gathered again as long as nothing changes


def test_a_lens_of_a_model_in_fsdp2_is_trained_by_no_group(found):
    assert all("sequences are shared out" in rank["fsdp2_shared_out"] for rank in found)


@pytest.mark.parametrize(("how", "named"), [("fsdp1", "FullyShardedDataParallel"), ("pipeline", "PipelineStage")])
def test_what_no_lens_can_reach_is_refused_by_name(found, how, named):
    said = [rank[how] for rank in found]
    assert said[0] == said[1]
    assert all(named in message for message in said[0])


# --- offloaded by accelerate ---


def offloaded(model, folder, *parts):
    """``model`` with ``parts`` on the disk, and its blocks."""
    names = [name for name, module in model.named_modules() if name and not any(True for _ in module.children())]
    device_map = {name: "disk" if name.startswith((*parts, "model.layers.1")) else "cpu" for name in names}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("parts", [["lm_head"], ["model.norm"], ["model.embed_tokens", "model.norm", "lm_head"]])
def test_an_end_on_the_disk_gives_the_same_bits(parts, tmp_path):
    model, whole = offloaded(tiny("llama"), tmp_path / "offload", *parts), tiny("llama")
    before = {name: p.is_meta for name, p in model.named_parameters()}
    assert all(before[f"{part}.weight"] for part in parts)
    lens = TunedLens.from_model(model)
    assert torch.equal(lens.unembed.head.weight, whole.lm_head.weight)
    assert lens.config.unembed_hash == TunedLens.from_model(whole).config.unembed_hash
    assert torch.equal(Unembed(model, verify=False).norm.weight, whole.model.norm.weight)
    found = dict(read(model).items())
    for name, value in read(whole).items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0, equal_nan=True)
    alone = pickle.loads(pickle.dumps(lens.unembed))
    h = torch.randn(3, D_MODEL)
    assert torch.equal(alone(h), Unembed(whole)(h))
    assert torch.equal(copy.deepcopy(lens.unembed)(h), alone(h))
    assert {name: p.is_meta for name, p in model.named_parameters()} == before


def test_documents_of_an_offloaded_model(tmp_path):
    model, documents = offloaded(tiny("llama"), tmp_path / "offload", "model.embed_tokens"), [[5, 6, 7], [8, 9]]
    decode_documents(model, LogitLens.from_model(model), documents, out=tmp_path / "run")
    whole = tiny("llama")
    decode_documents(whole, LogitLens.from_model(whole), documents, out=tmp_path / "run")  # it is complete
    decode_documents(whole, LogitLens.from_model(whole), documents, out=tmp_path / "whole")
    assert load_run(tmp_path / "run").to_table().equals(load_run(tmp_path / "whole").to_table())


def test_a_run_does_not_go_on_with_a_model_whose_offloaded_blocks_differ(tmp_path):
    model, documents = offloaded(tiny("llama"), tmp_path / "1"), [[5, 6, 7], [8, 9]]
    decode_documents(model, LogitLens.from_model(model), documents, out=tmp_path / "run")
    edited = tiny("llama")
    with torch.no_grad():
        edited.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    model = offloaded(edited, tmp_path / "2")
    assert model.model.layers[1].mlp.down_proj.weight.is_meta
    with pytest.raises(ValueError, match=r"out: .*model"):
        decode_documents(model, LogitLens.from_model(model), documents, out=tmp_path / "run")


# --- quantised ---


class Scaled(torch.Tensor):
    """int8 and a scale for each row, as libraries keep quantised weights: a tensor that is none of numbers."""

    @staticmethod
    def __new__(cls, values, scales):
        shape = values.shape
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scales.dtype, requires_grad=False)

    def __init__(self, values, scales):
        self.values, self.scales = values, scales

    def __tensor_flatten__(self):
        return ["values", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scales)
        raise NotImplementedError(f"{func} of quantised weights")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            return torch.nn.functional.linear(x, weight.values * weight.scales, bias)
        if func is torch.nn.functional.embedding:
            ids, weight = args[:2]
            return weight.values[ids] * weight.scales[ids]
        return super().__torch_function__(func, types, args, kwargs or {})


def quantised(model):
    """All that is a matrix, the embedding and the head too."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            scales = module.weight.detach().abs().amax(1, keepdim=True) / 127
            values = (module.weight.detach() / scales).round().to(torch.int8)
            module.weight = nn.Parameter(Scaled(values, scales), requires_grad=False)
    return model


def test_a_model_of_quantised_weights(tmp_path):
    model, documents = quantised(tiny("llama")), [IDS[0], IDS[1, :4]]
    lens = LogitLens.from_model(model)
    head = model.lm_head.weight
    assert torch.equal(lens.unembed.head.weight, head.values * head.scales)
    decode_documents(model, lens, documents, out=tmp_path / "run")
    with torch.no_grad():
        wanted = model(IDS).logits.double().log_softmax(-1)
    wanted = -(wanted.exp() * wanted).sum(-1)
    torch.testing.assert_close(read(model).entropy[-1].double(), wanted, atol=1e-4, rtol=1e-5)
    before = fingerprint.of_model(model)
    assert fingerprint.of_model(quantised(tiny("llama"))) == before
    for part in ("values", "scales"):
        other = quantised(tiny("llama"))
        getattr(other.model.layers[1].mlp.up_proj.weight, part)[2, 0] += 1
        assert fingerprint.of_model(other) != before, part


class QuantState:
    """As bitsandbytes keeps the scales of 4-bit weights: beside the parameter."""

    def __init__(self, absmax, state2=None):
        self.absmax, self.state2, self.blocksize = absmax, state2, 64


def test_a_fingerprint_looks_at_scales_and_changes_nothing(monkeypatch):
    def never(*_, **__):
        raise AssertionError("state_dict() changes some quantised weights")

    model = tiny("llama")
    monkeypatch.setattr(nn.Module, "state_dict", never)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    hashes = {fingerprint.of_model(model)}
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == {n: at for n, (at, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    weight = model.model.layers[0].mlp.up_proj.weight
    for first, second in ((1.0, None), (2.0, None), (2.0, 1.0), (2.0, 3.0)):
        nested = None if second is None else QuantState(torch.tensor([second]))
        weight.quant_state = QuantState(torch.tensor([first]), nested)
        hashes.add(fingerprint.of_model(model))
    assert len(hashes) == 5
