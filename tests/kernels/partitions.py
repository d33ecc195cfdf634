"""Runs Gluon kernels without a GPU: their partitions take turns in an order drawn at random, and time is unkind.

Triton's interpreter knows nothing of Gluon. Here its functions run as plain Python with a stand-in for its language:
tensors are those of Triton's interpreter, layouts are nothing, shared memory is NumPy's, barriers count arrivals and
bytes as the hardware does. A copy that was asked for lands at any later time, and until then its place holds NaN; a
product reads its operands when it is waited for, and they must be what they were when it was issued. Partitions that
all wait for one another raise Deadlock.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType, SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.interpreter import GridExecutor, TensorHandle


class Deadlock(Exception):
    """No partition can go on, and no copy is under way."""


class Turns:
    """Partitions as threads of which one runs at a time, until it waits; which one goes on is drawn."""

    def __init__(self, seed: int) -> None:
        self.drawn = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.waiting: dict[int, Callable[[], bool]] = {}
        self.go: list[threading.Semaphore] = []
        self.failure: BaseException | None = None
        self.over = threading.Semaphore(0)
        self.mine = threading.local()

    def run(self, functions: Sequence[Callable[[], None]]) -> None:
        self.go = [threading.Semaphore(0) for _ in functions]
        self.waiting = {i: lambda: True for i in range(len(functions))}

        def work(i: int, function: Callable[[], None]) -> None:
            self.mine.number = i
            self.go[i].acquire()
            try:
                if self.failure is None:
                    function()
            except BaseException as error:
                self.failure = self.failure or error
            self.waiting.pop(i, None)
            self._next()

        threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(functions)]
        for thread in threads:
            thread.start()
        self._next()
        self.over.acquire()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def wait(self, ready: Callable[[], bool]) -> None:
        """Let others run, and come back when ``ready``."""
        number = self.mine.number
        self.waiting[number] = ready
        self._next()
        self.go[number].acquire()
        if self.failure is not None:
            raise self.failure

    def _next(self) -> None:
        while True:
            if self.copies and self.drawn.random() < 0.3:
                self._land()
            able = [i for i, ready in self.waiting.items() if self.failure is not None or ready()]
            if able:
                chosen = self.drawn.choice(able)
                del self.waiting[chosen]
                self.go[chosen].release()
                return
            if self.copies:
                self._land()
            elif self.waiting:
                self.failure = Deadlock(f"{len(self.waiting)} partitions wait for one another")
            else:
                self.over.release()
                return

    def _land(self) -> None:
        """Any of the copies that are under way."""
        try:
            self.copies.pop(self.drawn.randrange(len(self.copies)))()
        except AssertionError as error:
            self.failure = self.failure or error


class Barrier:
    """Flips its phase once all arrivals and bytes of it have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def start(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, count: int, more: int = 0) -> None:
        self.missing -= count
        self.bytes += more
        assert self.missing >= 0, "more arrivals than a phase has"
        if not self.missing and not self.bytes:
            self.missing, self.phase = self.count, 1 - self.phase


class Shared:
    """A piece of shared memory, or of an array of barriers."""

    def __init__(self, data: np.ndarray, dtype: tl.dtype) -> None:
        self.data, self.dtype = data, dtype

    def index(self, at) -> Shared:
        return Shared(self.data[int(at) : int(at) + 1].reshape(self.data.shape[1:]), self.dtype)

    def reshape(self, shape) -> Shared:
        return Shared(self.data.reshape(shape), self.dtype)

    def slice(self, start, length, dim) -> Shared:
        assert dim == 0
        return Shared(self.data[int(start) : int(start) + int(length)], self.dtype)

    def permute(self, order) -> Shared:
        return Shared(self.data.transpose(order), self.dtype)

    @property
    def barrier(self) -> Barrier:
        return self.data.item()

    def tensor(self) -> tl.tensor:
        return tl.tensor(TensorHandle(self.data.copy(), self.dtype), tl.block_type(self.dtype, list(self.data.shape)))


class Descriptor:
    """What a kernel sees of a host's tensor descriptor."""

    def __init__(self, host) -> None:
        self.host, self.layout = host, None
        base = host.base.detach()
        self.dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[base.dtype]
        bits = base.view(torch.int16).as_strided(host.shape, host.strides).numpy()
        # As Triton's interpreter keeps them: raw bits for bfloat16.
        self.data = bits.view(np.uint16 if self.dtype == tl.bfloat16 else np.float16)
        self.block_type = SimpleNamespace(nbytes=2 * int(np.prod(host.block_shape)))

    def block(self, at: Sequence[int]) -> np.ndarray:
        """Zeros where it reaches over the edge."""
        found = np.zeros(self.host.block_shape, self.data.dtype)
        inside = self.data[tuple(slice(i, i + n) for i, n in zip(at, found.shape, strict=True))]
        found[tuple(slice(n) for n in inside.shape)] = inside
        return found


class Sum:
    """An accumulator with products under way."""

    def __init__(self, value, under_way=()) -> None:
        self.value, self.under_way = value, list(under_way)


class Language:
    """Gluon's names for the interpreter's functions, without layouts."""

    int64, float32 = tl.int64, tl.float32
    constexpr = tl.constexpr
    static_range = range

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __getattr__(self, name: str):
        return getattr(tl, name)

    def arange(self, start, end, layout):
        return tl.arange(start, end)

    def zeros(self, shape, dtype, layout):
        return tl.zeros(shape, dtype)

    def full(self, shape, value, dtype, layout):
        return tl.full(shape, value, dtype)

    def convert_layout(self, value, layout):
        return value

    def SliceLayout(self, dim, parent):
        return None

    def NVMMADistributedLayout(self, *version, instr_shape):
        return None

    def allocate_shared_memory(self, dtype, shape, layout) -> Shared:
        if isinstance(layout, Barriers.MBarrierLayout):
            return Shared(np.array([Barrier() for _ in range(int(np.prod(shape)))], object).reshape(shape), dtype)
        return Shared(np.full(shape, 0xFFFF, np.uint16).view(_kept(dtype)), dtype)

    def warp_specialize(self, functions_and_args, warps, registers):
        assert len(warps) == len(registers) == len(functions_and_args) - 1
        self._turns.run([lambda f=f, args=args: f(*args) for f, args in functions_and_args])


class Barriers:
    """The module mbarrier."""

    class MBarrierLayout:
        pass

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def init(self, barrier: Shared, count: int) -> None:
        barrier.barrier.start(count)

    def expect(self, barrier: Shared, size: int) -> None:
        barrier.barrier.arrive(1, size)

    def arrive(self, barrier: Shared, *, count: int, pred: bool = True) -> None:
        if pred:
            barrier.barrier.arrive(count)

    def wait(self, barrier: Shared, phase, pred: bool = True) -> None:
        awaited, over = barrier.barrier, int(phase)
        if pred:
            self._turns.wait(lambda: awaited.phase != over)


def _kept(dtype: tl.dtype):
    return np.uint16 if dtype == tl.bfloat16 else np.float16


def _stand_ins(turns: Turns) -> dict:
    def load_tile(descriptor: Descriptor, at, barrier: Shared, place: Shared) -> None:
        block = descriptor.block([int(i) for i in at])
        place.data[...] = np.full(block.shape, 0xFFFF, np.uint16).view(block.dtype)

        def land() -> None:
            place.data[...] = block
            barrier.barrier.arrive(0, -descriptor.block_type.nbytes)

        turns.copies.append(land)

    def multiply(a: Shared, b: Shared, acc, *, use_acc, is_async):
        assert is_async
        acc = acc if isinstance(acc, Sum) else Sum(acc)
        return Sum(acc.value, [*acc.under_way, (a, b, a.data.copy(), b.data.copy(), bool(use_acc))])

    def wait(num_outstanding, deps):
        [acc] = deps
        done = len(acc.under_way) - num_outstanding
        value = acc.value
        for a, b, a_then, b_then, use_acc in acc.under_way[:done]:
            # Bits, for NaN is a place that a copy has not reached.
            assert np.array_equal(a.data.view(np.uint16), a_then.view(np.uint16)), "x changed under a product"
            assert np.array_equal(b.data.view(np.uint16), b_then.view(np.uint16)), "W changed under a product"
            start = value if use_acc else tl.zeros(value.shape, tl.float32)
            value = tl.dot(a.tensor(), b.tensor(), start)
        return Sum(value, acc.under_way[done:]) if num_outstanding else value

    return {
        "gl": Language(turns),
        "tl": tl,
        "mbarrier": Barriers(turns),
        "_load_tile": load_tile,
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": wait,
    }


class Launcher:
    """Takes the place of a Gluon kernel: ``launcher[grid](...)`` runs it here."""

    def __init__(self, kernel: GluonJITFunction, seed: int = 0) -> None:
        self.kernel, self.seed, self.launches = kernel, seed, 0
        self.splits = 1

    def __getitem__(self, grid):
        def run(*args, num_warps, enable_fp_fusion, **constants):
            self.launches += 1
            namespace = dict(self.kernel.fn.__globals__)
            namespace |= _stand_ins(Turns(self.seed))
            for name, value in namespace.items():
                if isinstance(value, GluonJITFunction):
                    namespace[name] = _plain(value.fn, namespace)
            function = _plain(self.kernel.fn, namespace)
            args = [Descriptor(arg) if hasattr(arg, "block_shape") else arg for arg in args]
            GridExecutor(function, self.kernel.arg_names, grid)(*args, **constants)

        return run


def stand_in(module: ModuleType, name: str, seed: int = 0) -> Launcher:
    """Have the module's Gluon kernel run here."""
    launcher = Launcher(getattr(module, name), seed)
    setattr(module, name, launcher)
    tl.block_type.layout = None  # the kernels hand it on
    return launcher


def _plain(function: FunctionType, namespace: dict) -> FunctionType:
    plain = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__)
    plain.__annotations__ = {
        name: "constexpr" for name, kind in function.__annotations__.items() if "constexpr" in kind
    }
    return plain


def plant(monkeypatch, module: ModuleType, name: str, changes: dict[str, str], **seen: object) -> None:
    """Change the source of the kernel's function ``name``, which then sees ``seen`` as well."""
    kernel = getattr(module, name)
    source = inspect.getsource(kernel.fn).partition("\n")[2]
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    for seen_as, value in seen.items():
        monkeypatch.setattr(module, seen_as, value, raising=False)
    namespace = dict(kernel.fn.__globals__)
    exec(compile("from __future__ import annotations\n" + source, "<planted>", "exec"), namespace)
    planted = type(kernel).__new__(type(kernel))
    planted.fn = namespace[name]
    monkeypatch.setattr(module, name, planted)
