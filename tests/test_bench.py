"""The benchmarks themselves: wrong numbers are refused, nobody vanishes, and the document holds what was measured."""

import functools
import gc
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import contenders  # noqa: E402
import gpu_checks  # noqa: E402
import loss  # noqa: E402
import measure  # noqa: E402
import presets  # noqa: E402
import record  # noqa: E402
import reference  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import small_decodes  # noqa: E402
import vocabulary_kernels  # noqa: E402
from checking import expect, judge  # noqa: E402
from contenders.adapter import Contender  # noqa: E402
from suites import EVERY, FULL, SUITES  # noqa: E402

from tuned_lens_fast.engines import ENGINES  # noqa: E402

TINY = ["--preset", "tiny", "--rounds", "3", "--seconds", "0.01"]
QUICK = ["product", "product-tiles", "eager", "loop"]


@pytest.fixture(scope="module", autouse=True)
def nothing_old_to_collect():
    """Memory is measured after a collection, which takes long with all that a test run has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def problem(asked=EVERY, positions=6, dtype=torch.float32, seed=0, **shape):
    shape = replace(presets.PRESETS["tiny"], **shape)
    made = presets.random_problem(shape, positions, dtype, "cpu", presets.BUDGET, seed=seed)
    return made.asking(*presets.question(asked))


def right(made):
    """The answer of an engine."""
    return contenders.CONTENDERS["eager"].prepare(made)()


def go(tmp_path, *arguments):
    out = tmp_path / "result.json"
    assert run.main([*TINY, *arguments, "--out", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("shape", [{}, {"norm": "layer"}, {"softcap": 30.0}, {"unit_offset": True, "vocab": 999}])
def test_expected_values_are_those_of_the_independent_reference(shape):
    made = problem(**shape)
    expected = expect(made, sample=made.rows + 2)
    assert len(expected.layer) == made.rows
    z = reference.logits(reference.head_inputs(made.hidden, made.translators, made.norm).float(), made.head)
    of_model = reference.logits(made.query.reference, made.head)
    want = reference.statistics(z, targets=made.query.targets, reference=of_model)
    for name, value in expected.values.items():
        torch.testing.assert_close(value, want[name][expected.layer, expected.position], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["eager", "loop", "tuned-lens", "linear_cross_entropy"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_contenders_are_right(name, norm):
    contender = contenders.CONTENDERS[name]
    asked = FULL if contender.answers >= {"kl"} else "log_prob"
    made = problem(asked, norm=norm)
    why = contender.why_not(made)
    if why is not None:
        pytest.skip(why)
    verdict = judge(contender.prepare(made)(), made, expect(made))
    assert verdict.wrong is None
    assert max(verdict.errors.values()) < 1


def test_one_that_ignores_the_softcap_is_refused(tmp_path, monkeypatch):
    contender = contenders.CONTENDERS["tuned-lens"]
    made = problem(FULL, softcap=5.0)
    if contender.why_not(made) is not None:
        pytest.skip(contender.why_not(made))
    assert "float64 says" in judge(contender.prepare(made)(), made, expect(made)).wrong


PLANTED = {
    "kl": lambda value: value * 1.01 + 0.01,
    "log_prob": lambda value: value.masked_fill(value == value.max(), float("nan")),
    "rank": lambda value: value + 1,
    "entropy": lambda value: value.roll(1, 1),
    "top_ids": lambda value: value.flip(-1),
    "top_log_probs": lambda value: value[..., :1].expand_as(value),
    "lse": lambda value: value + 0.01,
    "js": lambda value: value[:, :-1],
    "tv": lambda value: value * 2,
}


@pytest.mark.parametrize("name", PLANTED)
def test_wrong_numbers_are_noticed(name):
    made = problem()
    answer, expected = right(made), expect(made, sample=made.rows + 2)
    assert judge(answer, made, expected).wrong is None
    assert judge(answer | {name: PLANTED[name](answer[name])}, made, expected).wrong.startswith(name)


def test_missing_numbers_and_repeated_ids_are_noticed():
    made = problem()
    answer, expected = right(made), expect(made)
    assert "nothing" in judge({k: v for k, v in answer.items() if k != "kl"}, made, expected).wrong
    twice = answer["top_ids"].clone()
    twice[..., 1] = twice[..., 0]
    assert "twice" in judge(answer | {"top_ids": twice}, made, expected).wrong
    assert "outside" in judge(answer | {"top_ids": answer["top_ids"] - 1000}, made, expected).wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_rounded_to_16_bits_are_tolerated_and_no_more(dtype):
    made = problem(FULL, dtype=dtype)
    answer, expected = contenders.CONTENDERS["loop"].prepare(made)(), expect(made)
    assert judge(answer, made, expected).wrong is None
    assert judge(answer | {"kl": answer["kl"] + 1}, made, expected).wrong.startswith("kl")


def planted(monkeypatch, **changes):
    """A contender "planted" that does what the eager engine does, but for ``changes``."""
    eager = contenders.CONTENDERS["eager"]
    made = Contender(**{**vars(eager), "name": "planted", "ours": False, **changes})
    monkeypatch.setitem(contenders.CONTENDERS, "planted", made)


def test_a_contender_with_wrong_numbers_is_refused_and_not_timed(tmp_path, monkeypatch):
    calls = []

    def prepare(made):
        def wrong():
            calls.append(1)
            return right(made) | {"kl": right(made)["kl"] * 1.02 + 0.02}

        return wrong

    planted(monkeypatch, prepare=prepare)
    result = go(tmp_path, "--positions", "5", "--contenders", *QUICK, "planted")
    found = result["cases"][0]["contenders"]
    assert found["planted"]["status"] == "refused"
    assert "kl" in found["planted"]["why"]
    assert "seconds" not in found["planted"]
    assert len(calls) == 1
    assert "seconds" in found["eager"]


def test_one_that_breaks_or_cannot_run_says_why(tmp_path, monkeypatch, capsys):
    def prepare(made):
        raise RuntimeError("no such kernel\nand more")

    planted(monkeypatch, prepare=prepare)
    result = go(tmp_path, "--positions", "3", "--contenders", "product", "planted", "liger-kernel", "scratch")
    found = result["cases"][0]["contenders"]
    assert found["planted"] == {"status": "failed", "why": "RuntimeError: no such kernel"}
    assert found["liger-kernel"]["status"] == "not here"
    assert "log_prob only" in found["scratch"]["why"]
    assert "no such kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("off", "said"), [(3e-4, "times as far off as is allowed"), (1.0, "refused: wrong numbers: kl")]
)
def test_our_own_are_held_to_their_promise(monkeypatch, capsys, off, said):
    def prepare(made):
        def decode():
            answer = right(made)
            return answer | {"kl": answer["kl"] + off}

        return decode

    planted(monkeypatch, prepare=prepare, ours=True)
    arguments = ["--positions", "2", "--statistics", "kl", "--contenders", "product", "planted"]
    assert run.main([*TINY, *arguments]) == 1
    assert said in capsys.readouterr().err


def test_results_and_the_document_made_of_them(tmp_path):
    suite = tmp_path / "results" / "cpu"
    suite.mkdir(parents=True)
    result = go(tmp_path, "--positions", "4", "8", "32", "--contenders", *QUICK, "liger-kernel")
    assert [case["positions"] for case in result["cases"]] == [4, 8, 32]
    for case in result["cases"]:
        entry = case["contenders"]["eager"]
        s = entry["seconds"]
        floor = min(case["contenders"][name]["seconds"]["median"] for name in ("product", "product-tiles"))
        assert s["min"] <= s["q1"] <= s["median"] <= s["q3"] <= s["max"]
        assert entry["over_product"] == pytest.approx({name: s[name] / floor for name in ("q1", "median", "q3")})
        assert entry["errors_over_allowed"].keys() == {"lse", "log_prob", "entropy", "kl", "top_log_probs"}
        assert case["contenders"][case["floor"]]["over_product"]["median"] == 1
    assert "--out" not in result["command"]
    gpu = json.loads(json.dumps(result)) | {"device": "cuda", "note": "Made up."}
    gpu["cases"] = [dict(case, preset=name) for name in ("one", "two") for case in gpu["cases"][:1]]
    gpu["cases"][0]["contenders"]["eager"]["seconds"] = {"median": 0.0534712}  # as much as was written down once
    gpu["cases"][0]["contenders"]["eager"]["over_product"] = {"median": 1.12}
    for folder, content in (("cpu", result), ("cpu-again", result), ("h100", gpu)):
        (path := suite.with_name(folder) / "tiny.json").parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))

    pytest.importorskip("matplotlib", reason="the picture needs it: pip install '.[bench]'")
    page = report.document(suite.parent, tmp_path)
    assert result["command"] in page
    assert "liger-kernel (not here: computes log_prob only)" in page
    assert result["environment"]["cpu"]["name"] in page
    assert "They differ by 0.0% in the median" in page
    assert "Made up." in page
    assert "| 53.47, 1.12 |" in page
    median = result["cases"][0]["contenders"]["loop"]["seconds"]["median"]
    assert f"| loop | {report.number(median)}, " in page
    picture = tmp_path / "cpu-growth.svg"
    before = picture.read_bytes()
    assert report.document(suite.parent, tmp_path) == page
    assert picture.read_bytes() == before


def test_a_result_is_what_was_written(tmp_path):
    result = {"seconds": {"median": 1.23456789, "calls": 3}, "cases": [{"name": "x" * 99, "why": None}] * 3, "no": {}}
    record.write(tmp_path / "result.json", result)
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == result | {"seconds": {"median": 1.234568, "calls": 3}}
    assert max(map(len, text.splitlines())) <= 160


def test_compare(tmp_path, capsys):
    result = go(tmp_path, "--positions", "4", "--contenders", *QUICK)
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(result))
    ratio = result["cases"][0]["contenders"]["loop"]["over_product"]
    for status in (0, 1):
        ratio["median"] *= 1.08
        two.write_text(json.dumps(result))
        assert run.main(["--compare", str(one), str(two)]) == status
    assert "16.6%" in capsys.readouterr().out


def test_a_suite_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    ran = []

    def fake(command, **_):
        ran.append((command[1].name, command[-1].stem))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", fake)
    (tmp_path / "memory.json").write_text("{}")
    suite = ["--suite", "gpu", "--out", str(tmp_path)]
    assert run.main(suite) == 0
    assert [part for _, part in ran] == [part for part in SUITES["gpu"] if part != "memory"]
    assert (ran[0][0], ran[-1][0]) == ("run.py", "profile_decode.py")
    assert run.main([*suite, "--part", "memory"]) == 0
    assert ran[-1] == ("run.py", "memory")


def test_a_comparison_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Case by case, of the same command; one that is finished, or another's, is measured anew."""
    out, arguments = tmp_path / "one.json", ["--positions", "2", "3", "--contenders", "product", "eager"]
    arguments = ["--preset", "tiny", *arguments, "--rounds", "1", "--least", "1", "--out", str(out)]
    measured, stopped = run.measure, []

    def stop(*args):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)
        measured(*args)

    monkeypatch.setattr(run, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run.main(arguments)
    first = json.loads(out.read_text())
    assert first["unfinished"]
    assert [case["positions"] for case in first["cases"]] == [2]
    monkeypatch.setattr(run, "measure", measured)
    assert run.main(arguments) == 0
    whole = json.loads(out.read_text())
    assert "unfinished" not in whole
    assert [case["positions"] for case in whole["cases"]] == [2, 3]
    assert whole["cases"][0] == first["cases"][0]
    assert run.kept(out, whole["command"]) == []
    out.write_text(json.dumps(first))
    assert run.kept(out, first["command"] + " --more") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="bench/gpu.sh needs a bash")
@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize(("call", "most"), [(1, 480), (2, 540), (3, 420)])
def test_every_step_on_a_gpu_can_be_parsed_and_ends_in_time(call, most, rehearsal):
    """Its limits leave a call of ten minutes time to spare, and no mistyped option takes any of it."""
    asked = os.environ | {"LIST": "1", **({"REHEARSE": "1"} if rehearsal else {})}
    listed = subprocess.run(
        ["bash", BENCH / "gpu.sh", str(call)], env=asked, capture_output=True, text=True, check=True
    ).stdout
    steps = [line.split("\t") for line in listed.splitlines()]
    assert len({name for name, _, _ in steps}) >= len(steps) - rehearsal  # of two shapes, where there is one
    assert sum(int(limit) for _, limit, _ in steps) <= most
    parsers = {"run.py": run.parse, "loss.py": loss.parse, "small_decodes.py": small_decodes.parse}
    parsers["vocabulary_kernels.py"] = vocabulary_kernels.parse
    seen = 0
    for _, _, line in steps:
        script, _, arguments = line.partition("bench/")[2].partition(" ")
        if script in parsers:
            parsers[script](arguments.split())
            seen += 1
    assert seen >= 2
    assert subprocess.run(["bash", BENCH / "gpu.sh", "4"], capture_output=True).returncode == 2


def test_all_sizes_take_turns_and_threads_are_cases_of_their_own(tmp_path, monkeypatch):
    races, measured, before = [], measure.interleaved, torch.get_num_threads()

    def spied(some, *rest):
        races.append(len(some))
        return measured(some, *rest)

    monkeypatch.setattr(run, "interleaved", spied)
    sizes = ["--positions", "2", "3", "--threads", "1", "2", "--contenders", "product", "eager", "--least", "1"]
    result = go(tmp_path, *sizes, "--rounds", "2", "--together")
    torch.set_num_threads(before)
    assert [(case["threads"], case["positions"]) for case in result["cases"]] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    assert races == [1, 1, 1, 1, 4]  # the floor of each is found beforehand


def test_every_suite_can_be_parsed():
    for parts in SUITES.values():
        for line in parts.values():
            script, *arguments = line.split()
            assert (BENCH / script).exists()
            parsers = {"run.py": run, "loss.py": loss, "small_decodes.py": small_decodes}
            if script in parsers:
                parsers[script].parse(arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--statistics", "perplexity"], "perplexity"),
        (["--contenders", "planted"], "planted"),
        (["--part", "tiny"], "--suite"),
        (["--preset", "gpt5"], "gpt5"),
    ],
)
def test_wrong_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert said in capsys.readouterr().err


def test_real_weights_only_where_there_are_some():
    with pytest.raises(ValueError, match="smollm2-135m"):
        presets.real_model("gpt2", torch.float32, "cpu")


def test_the_interleaving():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    [found] = measure.interleaved([measure.Race(calls, {"a": 4, "b": 2, "c": 1})], "cpu")
    assert [turns.count(name) for name in "abc"] == [4, 2, 1]
    assert {name: len(seconds) for name, (seconds, _) in found.items()} == {"a": 4, "b": 2, "c": 1}
    assert not any(ratios for _, ratios in found.values())


def test_the_floor_runs_between_any_two(monkeypatch):
    """A machine that gets slower with every call: times differ, their multiples of the floor's beside them do not."""
    turns = []

    def timed(call, device):
        call()
        return (3 if turns[-1] == "b" else 1) * (100 + len(turns))

    monkeypatch.setattr(measure, "timed", timed)
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    [found] = measure.interleaved([measure.Race(calls, {"a": 3, "b": 3, "c": 2}, "a")], "cpu")
    assert "bc" not in "".join(turns)
    assert "cb" not in "".join(turns)
    assert found["b"][1] == pytest.approx([3.0] * 3)
    assert found["c"][1] == pytest.approx([1.0] * 2)
    assert set(found["a"][1]) == {1.0}


def test_races_take_turns(monkeypatch):
    """Each has its own floor and threads, none is over before another has begun."""
    turns = []

    def call(name):
        return lambda: turns.append((name, torch.get_num_threads()))

    races = [
        measure.Race({name: call(name + number) for name in "ab"}, {"a": 4, "b": 4}, "a", threads)
        for number, threads in (("1", 1), ("2", 2))
    ]
    before = torch.get_num_threads()
    found = measure.interleaved(races, "cpu")
    assert torch.get_num_threads() == before
    assert {threads for name, threads in turns if name.endswith("1")} == {1}
    assert {threads for name, threads in turns if name.endswith("2")} == {2}
    order = [name[1] for name, _ in turns if name[0] == "b"]
    assert all(set(order[i : i + 2]) == {"1", "2"} for i in range(0, 8, 2))
    assert [len(times["b"][1]) for times in found] == [4, 4]


def test_a_second_problem_makes_nothing_compile_anew(monkeypatch):
    """Or a race would time the compiler; what the graphs are compiled to does not matter here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    calls = [contenders.CONTENDERS["compiled"].prepare(problem(positions=count)) for count in (2, 3)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before
    for call in (*calls, *calls):
        call()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_the_floor_lasts_a_share_of_what_it_is_held_against(monkeypatch):
    turns = []
    monkeypatch.setattr(measure, "timed", lambda call, device: call())
    calls = {"floor": lambda: turns.append("f") or 1.0, "long": lambda: turns.append("l") or 35.0}
    [found] = measure.interleaved([measure.Race(calls, {"floor": 2, "long": 2}, "floor")], "cpu")
    assert "".join(turns) == "flffff" + "fffflffff"
    assert found["long"][1] == [35.0, 35.0]


def test_one_whose_ratio_is_known_has_no_further_rounds(monkeypatch):
    turns = []
    noise = random.Random(0)

    def timed(call, device):
        call()
        return {"a": 1.0, "b": 2.0, "c": 3.0 + noise.uniform(-2, 2)}[turns[-1]]

    monkeypatch.setattr(measure, "timed", timed)
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    [found] = measure.interleaved([measure.Race(calls, {"a": 30, "b": 30, "c": 30}, "a")], "cpu", within=0.01)
    assert len(found["b"][1]) == 6  # the fewest that say anything
    assert len(found["c"][1]) == 30


@pytest.mark.parametrize("count", [6, 9, 25])
def test_the_median_lies_where_it_is_said_to(count):
    noise = random.Random(count)
    inside = 0
    for _ in range(1000):
        low, high = measure.confidence([noise.expovariate(1) for _ in range(count)])
        inside += low <= math.log(2) <= high
    assert 0.93 <= inside / 1000 <= 0.995
    assert measure.confidence([1.0] * 5) == (-math.inf, math.inf)
    assert not measure.settled([1.0] * 5, 0.5)
    assert not measure.settled([], 0.5)


def test_memory_is_that_of_the_call():
    def call():
        held = torch.ones(64, 2**20)
        return held.sum(0)

    for _ in range(2):  # what the allocator kept of the first call does not hide the second's growth
        growth, answer = measure.peak_growth(call, torch.device("cpu"))
        if growth is None:
            pytest.skip("the resident peak can be reset on Linux only")
        assert 256 * 2**20 <= growth < 320 * 2**20
        assert answer.shape == (2**20,)


def test_quantiles_and_exponents():
    found = measure.quantiles([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"min": 1, "q1": 2, "median": 3, "q3": 4, "max": 5, "calls": 5}
    assert set(measure.quantiles([2.0]).values()) == {2.0, 1}
    assert report.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_profile_counts_and_measures(tmp_path, monkeypatch):
    import profile_decode

    monkeypatch.setattr(profile_decode, "ENGINES", {"eager": ENGINES["eager"]})
    monkeypatch.setattr(profile_decode, "ROUNDS", 3)
    out = tmp_path / "profile.json"
    arguments = ["--preset", "tiny", "--positions", "8", "--ceiling-mib", "1", "--out", str(out)]
    assert profile_decode.main(arguments) == 0
    result = json.loads(out.read_text())
    assert set(result["engines"]["eager"]["parts"]) == set(result["work"])
    assert result["work"]["product"]["operations"] == 2 * 3 * 8 * 48 * 1000
    assert result["ceilings"]["operations_per_second"] > 0


def test_the_document_is_the_one_made_of_the_results(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs it: pip install '.[bench]'")
    there = BENCH.parent / "docs" / "performance.md"
    pictures = tmp_path / "performance"
    pictures.mkdir()
    assert there.read_text() == report.document(BENCH / "results", pictures), "run: python bench/report.py"
    assert {path.name for path in there.with_suffix("").iterdir()} == {path.name for path in pictures.iterdir()}


def test_the_costs_in_the_docs_are_those_that_are_calculated():
    """And the largest of them by hand: 70B parameters, 80 layers of 8,192, 128,256 tokens, on 8 GPUs."""
    import cost

    docs = (Path(__file__).parents[1] / "docs/distributed.md").read_text(encoding="utf-8")
    for table in (cost.corpus(), cost.splits(), cost.training(), cost.rates()):
        assert "\n".join(table) in docs
    of_forward, of_lens = cost.seconds(cost.MODELS[1])
    assert of_forward == pytest.approx(2 * 70.6e9 / (0.4 * 989e12))
    assert of_lens == pytest.approx((82 * 2 * 8192 * 128256 + 80 * 2 * 8192**2) / 520e12)
    speed = 8 / (of_forward + of_lens)
    assert f"| 8 | {float(f'{speed:.2g}'):,.0f} | {1e9 / speed / 3600:.1f} h |" in docs


def test_what_a_gpu_tells_is_rendered(tmp_path):
    """Kernels beside torch.mm, kernels of a decode, decodes of few rows, counters; a file of tiles is no result."""
    began = record.heading("x.py", [], "cpu")
    tile = {"over_product": 1.056, "queued_over_product": 1.0449}
    shape = {"preset": "tiny", "rows": 8192, "d_model": 48}
    results = {
        "kernels": [{**shape, "asked": asked, "tiles": {"plain": tile}} for asked in ("all sums", "hardly anything")],
        "kernels of a decode": [
            {"preset": "tiny", "statistics": "lse", "kernels": {"_merge": {"seconds": 2e-3, "launches": 7}}}
        ],
        "small decodes": [
            {"preset": "tiny", "rows": 8, "read": 2e-5, "seconds": {"W read": {}, "graph": {"median": 2.6e-5}}}
        ],
    }
    for kind, cases in results.items():
        record.write(tmp_path / "h200-x" / f"{kind}.json", {"kind": kind, **began, "cases": cases})
    counted = tmp_path / "counted"
    counted.mkdir()
    lines = [
        '"Kernel Name","Metric Name","Metric Unit","Metric Value"',
        '"_pass","SM Busy","%","61.5"',
        '"_pass","","",""',
    ]
    (counted / "llama.csv").write_text("==PROF== noise\n" + "\n".join(lines) + "\n")
    checked = {"tests": None, "profiles": {"llama": gpu_checks.profile(counted / "llama.csv")}}
    record.write(tmp_path / "h200-x" / "counters.json", {"kind": "gpu checks", **began, **checked})
    (tmp_path / "h200-x" / "tiles.json").write_text("{}")
    page = "\n".join(report.section(tmp_path / "h200-x", tmp_path))
    for said in (
        "| plain | 1.056 (1.045) |",
        "| _merge | 2.000 | 7 |",
        "| tiny, 8 rows | 20 | 1.30 |",
        "| SM Busy | 61.5 % |",
    ):
        assert said in page
