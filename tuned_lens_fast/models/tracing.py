"""Finds out how a model ends by running it on a few tokens: from its last block's output to its logits.

This is where the way from hidden state to statistics is surveyed: everything after it sees plain descriptions, never
a model. Nothing is known of model types or of names in their configs. An alias of the model is run, so that the model
itself is not touched; its blocks can be made to return anything, which makes the rest of it a function of the last
block's output to take apart, and to compare a description with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuned_lens_fast.models.alias import alias
from tuned_lens_fast.models.block_output import Layout, first_tensor, mapped, stream_of, with_stream
from tuned_lens_fast.models.blocks import find_blocks, linear_head
from tuned_lens_fast.models.comparison import close, constant_factor, random_like, relative_error
from tuned_lens_fast.models.forward_pass import TRIAL_TOKENS, model_inputs, name_of, trial_ids, undisturbed
from tuned_lens_fast.models.model_end import Chain, Tail
from tuned_lens_fast.models.resident import Resident, fully_sharded, unsharded


@dataclass(frozen=True)
class LogitTransform:
    """What a model does around its head: ``z = softcap(scale * (W (factor * norm(h)) + b))``, and keeps the first
    ``vocab`` of it."""

    factor: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None  #: tokens whose logits the model returns; None for all of W


@dataclass
class _Call:
    """A module of the alias that was called outside of the blocks, in the order in which they returned."""

    module: nn.Module
    given: Tensor
    returned: Tensor


@dataclass
class _Pass:
    """One forward pass of the alias."""

    outputs: list[Any]  #: what each block returned in its last call
    calls: list[_Call]
    x: Tensor  #: [1, tokens, d_model], what the head received
    z: Tensor  #: [1, tokens, W's vocabulary], what it returned
    logits: Tensor  #: [1, tokens, vocab]


class TracedModel:
    """A model's end, as seen by running it.

    ``norm`` leads from the last block's output to the head, but for ``transform.factor``: a module of the model's own
    where it is one; ``head`` is its linear layer, and ``plain_head`` gives it as one of plain tensors; ``width`` is a
    hidden state's. With ``run_blocks=False``, and in FSDP2, blocks return what they are given, at no cost.
    """

    def __init__(self, model: Any, *, run_blocks: bool = True) -> None:
        self.model = model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
        self.head = linear_head(model)
        blocks = list(find_blocks(model)[1])
        self.num_blocks = len(blocks)
        #: What is gathered of a model in FSDP2. Its blocks are gathered by hooks, which an alias has none of.
        self.sharded = fully_sharded(model, blocks)
        self._run_blocks = run_blocks = run_blocks and not self.sharded
        _check_loaded(model, blocks, run_blocks)
        with undisturbed(model):
            with unsharded(self.sharded):
                self._trace(blocks)
            self.plain_head = Resident(self.head, self.sharded, self._random.x.dtype)
            self._check_head()

    def _trace(self, blocks: Sequence[nn.Module]) -> None:
        model = self.model
        self._twin = alias(model, own_buffers=True).eval()
        twins = dict(zip(model.modules(), self._twin.modules(), strict=True))
        self._originals = {twin: original for original, twin in twins.items()}
        self._blocks = [twins[block] for block in blocks]
        self._head = twins[self.head]
        inside = {module for block in self._blocks for module in block.modules()}
        self._outside = [module for module in self._twin.modules() if module not in inside]
        seen = self._first_pass()
        stream = stream_of(seen.outputs[-1])
        self.layout = Layout.of(stream, TRIAL_TOKENS)
        self.width = self.layout.flat(stream).shape[-1]
        # All that follows is read off this pass: in a real one, rows of one size hide what a norm does to it.
        self._random = self._random_pass(seen.outputs)
        self.norm, factor = self._before_head(blocks)
        self.transform = self._after_head(factor)

    def verify(self, unembed: Callable[[Tensor], Tensor], head_input: Callable[[Tensor], Tensor]) -> None:
        """Compares a description with the model, at random hidden states in place of the last block's output.

        Args:
            unembed: logits of hidden states ``[rows, width]``.
            head_input: what the head receives, of the same.

        Raises:
            NotImplementedError: in some row they differ by more than 1e-4 of its largest logit in fp32 and fp64, 0.8%
                of it in fp16, or 6% in bf16; the message says where they part.
        """
        with undisturbed(self.model):
            own = self._random
            device = cast(nn.Linear, self.plain_head()).weight.device  # the last block may be on another
            rows = self.layout.flat(stream_of(own.outputs[-1]))[0, -own.x.shape[-2] :].to(device)
            ours, x = unembed(rows), head_input(rows)
            wanted = own.logits.reshape(-1, own.logits.shape[-1])
            if ours.shape != wanted.shape:
                raise NotImplementedError(
                    f"model: {name_of(self.model)} returns logits of {wanted.shape[-1]} tokens, the lens of "
                    f"{ours.shape[-1]}"
                )
            if close(ours, wanted):
                return
            own_x = own.x.reshape(-1, own.x.shape[-1]).to(device)
            if not close(x, own_x):
                ratio = float((x.double() * own_x.double()).sum() / own_x.double().square().sum())
                proportional = close(x.double() / ratio, own_x) if ratio else False
                part = f"the factor before its head, by {ratio:.6g}" if proportional else "its final norm"
            else:
                part = "its head, or the scale or softcap after it"
            raise NotImplementedError(
                f"model: the lens's logits for random hidden states differ from those of {name_of(self.model)} by "
                f"{relative_error(ours, wanted):.1e} of the largest logit; what differs is {part}"
            )

    def _first_pass(self) -> _Pass:
        """A pass on a few tokens: real, or through blocks that return what they are given, in a form that works."""
        if self._run_blocks:
            try:
                return self._pass({})
            except NotImplementedError:
                raise
            except Exception as error:
                raise ValueError(
                    f"model: {name_of(self.model)} does not run on {TRIAL_TOKENS} tokens "
                    f"({type(error).__name__}: {error}); where only its blocks do not, pass verify=False"
                ) from error
        problems = []
        for form in (lambda h: h, lambda h: (h,), lambda h: (h, None), lambda h: (h, None, None)):

            def entering(*args: Any, form: Callable = form, **kwargs: Any) -> Any:
                return form(first_tensor(args, kwargs))

            def last(*args: Any, form: Callable = form, **kwargs: Any) -> Any:
                return form(random_like(first_tensor(args, kwargs), 1))

            try:
                seen = self._pass({block: entering for block in self._blocks} | {self._blocks[-1]: last})
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}")
                continue
            if seen.x.shape[:-1] == (1, TRIAL_TOKENS):
                return seen
        raise NotImplementedError(
            f"model: {name_of(self.model)} does not run when its blocks return what they are given "
            f"({problems[0] if problems else 'its head gets another shape'}); leave verify=True"
        )

    def _random_pass(self, outputs: Sequence[Any]) -> _Pass:
        """The model's end at random hidden states, if it is a function of them alone: not of what else blocks return,
        nor of the tokens. ``outputs``: what the blocks returned in another pass."""
        h = random_like(stream_of(outputs[-1]), 1)
        own = self._replay([*outputs[:-1], with_stream(outputs[-1], h)])
        noise = [mapped(output, lambda part: random_like(part, 2)) for output in outputs]
        other = self._replay([*noise[:-1], with_stream(noise[-1], h)], first_token=11)
        if close(other.logits, own.logits):
            return own
        raise NotImplementedError(
            f"model: the logits of {name_of(self.model)} depend on more than its last block's output, so a layer's "
            f"hidden state alone does not give them"
        )

    def _check_head(self) -> None:
        """Refuse a head that does more than its weight and bias say."""
        x, z, head = self._random.x, self._random.z, cast(nn.Linear, self.plain_head())
        if not close(F.linear(x.to(head.weight), head.weight, head.bias), z):
            raise NotImplementedError(
                f"model: the head of {name_of(self.model)}, a {type(self.head).__name__}, gives other logits than its "
                f"weight and bias"
            )

    def _before_head(self, blocks: Sequence[nn.Module]) -> tuple[nn.Module, float]:
        """What leads from the last block's output to the head, and the factor behind it."""
        output = self._random.outputs[-1]
        steps = self._steps(stream_of(output))
        if steps is None:
            tail = Tail(self.model, blocks, self.head, output, self.layout)
            try:
                alias(tail, own_buffers=True)(self.layout.flat(stream_of(output))[0, -1:])
            except Exception as error:
                raise NotImplementedError(
                    f"model: the end of {name_of(self.model)} is no chain of modules, and does not run by itself "
                    f"({type(error).__name__}: {error})"
                ) from error
            return tail, 1.0
        modules, factors = steps
        if not modules:
            return nn.Identity(), factors[0]
        factor = 1.0 if factors[-1] == 1.0 else self._factor(modules[-1])
        originals = [self._originals[module] for module in modules]
        if len(modules) == 1 and factors[0] == 1.0 and self.layout.streams is None:
            return originals[0], factor
        return Chain(originals, factors[:-1], self.layout), factor

    def _replay(
        self, outputs: Sequence[Any], also: dict[nn.Module, Callable] | None = None, first_token: int = 3
    ) -> _Pass:
        """A pass whose blocks return ``outputs``; ``also``: what other modules do instead of their forward."""

        def copied(part: Any) -> Any:
            return part.clone() if isinstance(part, Tensor) else part  # what follows may be done in place

        given = {b: (lambda *_, o=o, **__: mapped(o, copied)) for b, o in zip(self._blocks, outputs, strict=True)}
        return replace(self._pass({**given, **(also or {})}, first_token), outputs=list(outputs))

    def _pass(self, forwards: dict[nn.Module, Callable], first_token: int = 3) -> _Pass:
        """Run the alias with other forward methods of some of its modules."""
        outputs: dict[nn.Module, Any] = {}
        given: dict[nn.Module, Tensor | None] = {}
        calls: list[_Call] = []
        at_head: list[tuple[Tensor, Tensor]] = []

        def keep_output(block: nn.Module, _: tuple, output: Any) -> None:
            outputs[block] = output

        # Clones, since what modules do and what follows them may be done in place.
        def keep_given(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
            given[module] = tensors[0].clone() if len(tensors) == 1 else None

        def keep_call(module: nn.Module, _: tuple, output: Any) -> None:
            before, returned = given[module], stream_of(output)
            if before is not None and isinstance(returned, Tensor):
                calls.append(_Call(module, before, returned.clone()))

        def keep_head(_: nn.Module, args: tuple, output: Tensor) -> None:
            at_head.append((args[0].clone(), output.clone()))

        hooks = [block.register_forward_hook(keep_output) for block in self._blocks]
        for module in self._outside:
            if module is not self._head:
                hooks.append(module.register_forward_pre_hook(keep_given, with_kwargs=True))
                hooks.append(module.register_forward_hook(keep_call))
        hooks.append(self._head.register_forward_hook(keep_head))
        own = {module: vars(module).get("forward") for module in forwards}
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        try:
            logits = self._twin(**model_inputs(self._twin, trial_ids(self._twin, first_token)))
        finally:
            for hook in hooks:
                hook.remove()
            for module, method in own.items():
                del vars(module)["forward"]
                if method is not None:
                    vars(module)["forward"] = method
        logits = logits if isinstance(logits, Tensor) else logits["logits"]
        if len(at_head) != 1:
            raise NotImplementedError(f"model: {name_of(self.model)} calls its head {len(at_head)} times a pass")
        unseen = [i for i, block in enumerate(self._blocks) if block not in outputs]
        if unseen:
            raise NotImplementedError(f"model: {name_of(self.model)} does not call its blocks {unseen}")
        return _Pass([outputs[block] for block in self._blocks], calls, *at_head[0], logits)

    def _steps(self, stream: Tensor) -> tuple[list[nn.Module], list[float]] | None:
        """The modules that lead from ``stream`` to the head and the factor before each and at the end; None if none."""
        calls = self._random.calls

        def back(target: Tensor, before: int) -> tuple[list[nn.Module], list[float]] | None:
            if self.layout.streams is None or target.shape == stream.shape:
                factor = constant_factor(stream, target)
                if factor is not None:
                    return [], [factor]
            for i, call in enumerate(calls[:before]):
                factor = constant_factor(call.returned, target)
                if factor is None or constant_factor(call.given, call.returned) == 1.0:
                    continue
                found = back(call.given, i)
                if found is not None:
                    return [*found[0], call.module], [*found[1], factor]
            return None

        return back(self._random.x, len(calls))

    def _factor(self, last: nn.Module) -> float:
        """What the output of ``last`` is multiplied by before the head, free of the rounding of the model's dtype."""
        returned = next(call.returned for call in self._random.calls if call.module is last)
        probe = torch.linspace(1, 2, returned.numel(), dtype=torch.float64, device=returned.device).view(returned.shape)
        forwards = {last: lambda *_, **__: probe.clone(), self._head: lambda _: self._random.z}
        x = self._replay(self._random.outputs, forwards).x.double()
        return float(x.reshape(-1)[-1]) / float(probe.reshape(-1)[-1])

    def _after_head(self, factor: float) -> LogitTransform:
        """Scale, softcap and cut, from what becomes of chosen values in the place of what the head returns."""
        z = self._random.z
        generator = torch.Generator().manual_seed(0)
        largest = 14 if z.dtype == torch.float16 else 30
        sizes = torch.logspace(-6, largest, z.numel(), base=2, dtype=torch.float64, device="cpu")
        signs = torch.randint(2, sizes.shape, generator=generator, device="cpu") * 2 - 1
        # Shuffled, so that no two tokens get the same: a cut elsewhere than at the end would be seen.
        values = (sizes * signs)[torch.randperm(len(sizes), generator=generator, device="cpu")].view(z.shape)
        probe = values.to(z.device)
        logits = self._replay(self._random.outputs, {self._head: lambda _: probe.clone()}).logits
        tolerance = max(1e-5, 8 * torch.finfo(logits.dtype).eps)
        found = logits.double().cpu()
        vocab = found.shape[-1]
        if found.shape[:-1] == values.shape[:-1] and vocab <= values.shape[-1]:
            values = values[..., :vocab]
            order = values.abs().flatten().argsort()
            top, next_octave = order[-1], order[-1 - max(1, len(order) // 32)]
            p, g = values.flatten(), found.flatten()
            cap = float(g[top].abs())
            softcap = cap if abs(cap - float(g[next_octave].abs())) <= tolerance * cap else None
            if softcap is None:
                scale = float(g[top] / p[top])
            else:
                linear = g.abs() < softcap / 2
                scale = float((softcap * torch.atanh(g[linear] / softcap) / p[linear]).median())
            scale = 1.0 if abs(scale - 1) < 1e-6 else scale
            wanted = scale * values if softcap is None else softcap * torch.tanh(scale * values / softcap)
            if ((found - wanted).abs() <= tolerance * wanted.abs()).all():
                return LogitTransform(factor, scale, softcap, vocab if vocab < z.shape[-1] else None)
        raise NotImplementedError(
            f"model: {name_of(self.model)} changes its logits after the head by more than a scale, a softcap and a cut "
            f"of the vocabulary's end"
        )


def _check_loaded(model: nn.Module, blocks: Sequence[nn.Module], run_blocks: bool) -> None:
    """Refuse a model whose end cannot be read, or that cannot be run."""
    inside = set() if run_blocks else {p for block in blocks for p in block.parameters()}
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    for name, parameter in model.named_parameters():
        if parameter in inside:
            continue
        if parameter.is_meta and not offloaded:
            raise ValueError(f"model: {name} is not loaded (meta device); load the weights before building a lens")
