"""The residual stream where it passes; every model type: test_coverage.py."""

import threading

import pytest
import torch
from all_models import build
from tiny_models import D_MODEL, LAYERS, tiny
from torch import nn
from toy_model import ToyModel

from tuned_lens_fast import residual_stream
from tuned_lens_fast.model_surgery import get_transformer_layers
from tuned_lens_fast.models.forward_pass import model_inputs
from tuned_lens_fast.models.residual_stream import recorded

IDS = torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba", "rwkv", "deepseek_v4", "gemma3n_text", "cpmant"])
def test_each_entry_is_what_its_block_makes_of_the_one_before(model_type):
    """The blocks' own inputs and outputs, by hooks of the test's."""
    model = build(model_type)
    blocks = get_transformer_layers(model)[1]
    taken, given = [], []

    def keep(_, args, kwargs, output):
        taken.append(args[0] if args else kwargs["hidden_states"])
        given.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    stream = residual_stream(model, IDS)
    for hook in hooks:
        hook.remove()
    assert len(stream) == len(blocks) + 1
    for ours, own in zip(stream, [*taken, given[-1]], strict=True):
        if own.ndim == 4:
            own = (own if model_type == "deepseek_v4" else own.permute(1, 2, 0, 3)).flatten(-2)
        assert torch.equal(ours, own[:, -IDS.shape[1] :])
    for i in range(len(blocks) - 1):
        torch.testing.assert_close(taken[i + 1], given[i], msg=f"block {i}")


def test_one_text_without_a_batch():
    model = tiny("llama")
    for alone, batched in zip(residual_stream(model, IDS[0]), residual_stream(model, IDS), strict=True):
        assert alone.shape == (5, D_MODEL)
        torch.testing.assert_close(alone, batched[0])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_padding_on_the_left_changes_nothing(model_type):
    model = tiny(model_type)
    padded = torch.nn.functional.pad(IDS, (3, 0))
    mask = (torch.arange(8) >= 3).long().expand(2, -1)
    for ours, wanted in zip(
        residual_stream(model, padded, attention_mask=mask), residual_stream(model, IDS), strict=True
    ):
        torch.testing.assert_close(ours[:, 3:], wanted, atol=1e-5, rtol=1e-5)


def test_recorded_for_many_passes():
    model = tiny("llama")
    model.train()
    model.lm_head.eval()
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    whole = residual_stream(model, IDS)
    with torch.no_grad(), recorded(model, [2, 0]) as recorder:
        assert not model.training
        model(IDS)
        (third, first), at_head = recorder.take()
        assert torch.equal(third, whole[2])
        assert torch.equal(first, whole[0])
        assert at_head.shape == (2, 5, D_MODEL)
        model(IDS[:, :3])
        (third, _), at_head = recorder.take()
        torch.testing.assert_close(third, whole[2][:, :3])
        assert at_head.shape == (2, 3, D_MODEL)
        with pytest.raises(ValueError, match=r"calls its head 0 times a pass and its blocks \[0, 0\]"):
            recorder.take()
        model(IDS)
        model(IDS)
        with pytest.raises(ValueError, match=r"calls its head 2 times a pass and its blocks \[2, 2\]"):
            recorder.take()
        model(IDS)
        assert len(recorder.take()[0]) == 2
    assert set(seen) == {(2, 1, 101)}  # logits of the last position only
    assert model.training
    assert not model.lm_head.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_positions_are_cut_behind_a_models_own():
    """cpmant puts 32 positions before the prompt's."""
    model = build("cpmant")
    whole = residual_stream(model, IDS)
    with torch.no_grad(), recorded(model, positions=slice(2, 4)) as recorder:
        model(**model_inputs(model, IDS))
        entering, at_head = recorder.take()
    assert at_head.shape == (2, 2, D_MODEL)
    for ours, wanted in zip(entering, whole, strict=False):
        assert torch.equal(ours, wanted[:, 2:4])


@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma3n_text"])
def test_several_streams_at_sizes_that_look_alike(model_type):
    """A batch of 4 with 4 positions and 4 streams: whose dimension is whose."""
    model = build(model_type)
    ids = torch.arange(3, 19).view(4, 4)
    for row in range(4):
        for ours, wanted in zip(residual_stream(model, ids), residual_stream(model, ids[row]), strict=True):
            assert ours.shape == (4, 4, 4 * D_MODEL)
            torch.testing.assert_close(ours[row], wanted, atol=1e-5, rtol=1e-5)


def test_blocks_that_are_called_again_are_refused():
    with pytest.raises(ValueError, match=r"its blocks \[2, 2, 2\], wanted each once"):
        residual_stream(build("hrm_text"), IDS)


def test_hooks_go_when_the_model_fails():
    model = tiny("gpt2")
    with pytest.raises(IndexError), recorded(model):
        model(torch.tensor([[1000]]))
    with pytest.raises(IndexError), recorded(model, [LAYERS]):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("refused", ["no head", "HookedTransformer"])
def test_models_that_are_refused_keep_no_hooks(refused):
    model = tiny("llama").model
    if refused == "HookedTransformer":
        model.cfg, model.unembed = object(), nn.Module()
        model.unembed.W_U = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError if refused == "HookedTransformer" else ValueError, match=refused):
        residual_stream(model, IDS)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_head_that_is_wrapped():
    class Around(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(2 * x)

    model = tiny("llama")
    with torch.no_grad(), recorded(model, ()) as recorder:
        model(IDS)
        wanted = recorder.take()[1]
    model.lm_head = Around(model.lm_head)
    with torch.no_grad(), recorded(model, ()) as recorder:
        model(IDS)
        assert torch.equal(recorder.take()[1], 2 * wanted)


def test_a_pass_of_another_thread_meets_a_hook_that_is_not_whole():
    """PyTorch has a hook a moment before it knows that keywords are wanted; a thread may look in between."""
    model, ids = tiny("llama"), torch.arange(5)[None]
    want, failed = model(ids).logits, []

    def other():
        try:
            assert torch.equal(model(ids).logits, want)
        except Exception as error:
            failed.append(error)

    with recorded(model):
        for module in model.modules():
            module._forward_pre_hooks_with_kwargs.clear()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert not failed


def test_only_the_threads_own_passes_are_recorded():
    model = tiny("llama")
    shapes = []

    def other():
        with torch.no_grad():
            shapes.append(model(IDS[:, :2]).logits.shape)

    def run():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    # Amidst a pass, behind where its tokens were counted.
    whole = residual_stream(model, IDS)
    hook = model.model.layers[1].register_forward_pre_hook(
        lambda *_: None if threading.current_thread() is not threading.main_thread() else run()
    )
    for ours, wanted in zip(residual_stream(model, IDS), whole, strict=True):
        assert torch.equal(ours, wanted)
    hook.remove()
    assert shapes == [(2, 2, 101)]


def test_no_graph_is_built():
    model = ToyModel(nn.LayerNorm(D_MODEL))
    assert not any(h.requires_grad for h in residual_stream(model, IDS))
