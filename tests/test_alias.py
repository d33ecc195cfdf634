"""Aliases of modules: what they share with the original, and what is their own."""

import functools
import threading
import types

import pytest
import torch
from torch import nn

from tuned_lens_fast.models.alias import alias, frozen_alias


class Part(nn.Module):
    """Refers to other modules and to tensors in every way that an instance can."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.tied = self.linear
        self.register_buffer("counted", torch.ones(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.scale = torch.rand(3)
        self.grown = torch.rand(3, requires_grad=True) * 2  # a deep copy of which PyTorch refuses
        self.by_name = {"linear": [self.linear, {"scale": self.scale}, self.grown]}
        self.lock = threading.Lock()
        self.forward = functools.partial(Part.run, self, scale=self.scale)
        functools.update_wrapper(self.forward, types.MethodType(Part.run, self))

    def run(self, x, scale):
        self.counted += 1
        return self.by_name["linear"][0](x) * scale * self.counted


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()])
        self.again = types.MethodType(Whole.twice, self)
        self.outside = [nn.Linear(2, 2)]
        self.nothing = None
        self.register_module("none", None)

    def twice(self, x):
        return self.parts[1](self.parts[0](x))

    def forward(self, x):
        return self.again(x)


@pytest.fixture
def whole():
    torch.manual_seed(0)
    return Whole()


@pytest.mark.parametrize("make", [alias, frozen_alias, functools.partial(alias, own_buffers=True)])
def test_every_reference_to_a_module_is_to_its_alias(whole, make):
    twin = make(whole)
    pairs = dict(zip(whole.modules(), twin.modules(), strict=True))
    assert not set(pairs) & set(pairs.values())
    for original, copied in pairs.items():
        assert type(original) is type(copied)
    assert twin.again.__self__ is twin
    assert twin.nothing is twin.none is None
    for original, part in zip(whole.parts, twin.parts, strict=True):
        assert part.tied is part.linear is part.by_name["linear"][0] is pairs[original.linear]
        assert part.forward.args == (part,)
        assert part.forward.__wrapped__.__self__ is part
        assert part.forward.keywords["scale"] is part.scale is part.by_name["linear"][1]["scale"] is original.scale
        assert part.by_name["linear"][2] is part.grown is original.grown
        assert part.lock is original.lock
        assert original.tied is original.linear is original.by_name["linear"][0]
        assert original.forward.args == (original,)
    assert twin.outside[0] is whole.outside[0]


def test_tensors_are_the_originals_then_and_later(whole):
    twin = alias(whole)
    own = whole.state_dict(keep_vars=True)
    for name, value in twin.state_dict(keep_vars=True).items():
        assert value is own[name]
    whole.parts[0].linear.weight = nn.Parameter(torch.eye(3))
    whole.parts[1].counted = torch.zeros(3)
    assert twin.parts[0].linear.weight is whole.parts[0].linear.weight
    assert twin.parts[1].counted is whole.parts[1].counted


def test_hooks_modes_and_methods_are_its_own(whole):
    seen = []
    for module in whole.modules():
        module.register_forward_hook(lambda *_: seen.append("theirs"))
        module.register_forward_pre_hook(lambda *_: seen.append("theirs"))
        module.register_full_backward_hook(lambda *_: seen.append("theirs"))
    twin = alias(whole).eval()
    twin.parts[1].linear.register_forward_hook(lambda *_: seen.append("ours"))
    twin.parts[0].__dict__["forward"] = lambda x: x
    x = torch.ones(3)
    found = twin(x)
    assert seen == ["ours"]
    assert all(module.training for module in whole.modules())
    part = whole.parts[1]
    torch.testing.assert_close(found, nn.functional.linear(x, part.linear.weight, part.linear.bias) * part.scale * 2)
    whole.parts[1].counted.fill_(1)
    whole(x)
    assert seen.count("theirs") == 2 * sum(1 for _ in whole.modules()) - 2
    assert seen.count("ours") == 1


def test_own_buffers(whole):
    whole.parts[1].counted = whole.parts[0].counted
    twin = alias(whole, own_buffers=True)
    assert twin.parts[0].counted is twin.parts[1].counted
    with torch.no_grad():
        twin(torch.ones(3))
    assert torch.equal(whole.parts[0].counted, torch.ones(3))
    assert torch.equal(twin.parts[0].counted, torch.full([3], 3.0))
    assert twin.parts[0].steps is whole.parts[0].steps
    assert twin.parts[0].linear.weight is whole.parts[0].linear.weight


def test_a_frozen_alias_stands_alone(whole):
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    twin = frozen_alias(whole)
    for ours, own in zip(twin.parameters(), whole.parameters(), strict=True):
        assert ours.data_ptr() == own.data_ptr()
        assert own.requires_grad
        assert not ours.requires_grad
    twin(torch.ones(3, requires_grad=True)).sum().backward()
    twin.to(torch.float64)
    assert all(p.grad is None and p.dtype == torch.float32 for p in whole.parameters())
    assert twin.parts[0].linear.weight is twin.parts[0].tied.weight
    for name, value in whole.state_dict().items():
        assert torch.equal(value, before[name])
