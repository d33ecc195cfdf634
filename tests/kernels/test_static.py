"""The static model on machine code small enough to count by hand."""

import dataclasses
import sys
from pathlib import Path

import pytest
from compiling import Report

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import static

PRODUCT = [
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0",
    "LDGSTS.E [R1], [R2.64]",
    "IMAD R1, R1, R2, R3",
]
RARE = ["@P0 BRA `(.L_rare)", *["FSEL R1, R1, R2, P1"] * 30, ".L_rare:"]
STATISTICS = [
    *["FMNMX R1, R2, R3, !PT"] * 20,
    *["MUFU.EX2 R4, R5"] * 40,
    *["FFMA R6, R7, R8, R9"] * 60,
    "F2FP R1, R2, R3",
]
NESTED = [
    ".L_tile:",
    "CS2R R24, SRZ",
    ".L_step:",
    *PRODUCT,
    "@P1 BRA `(.L_step)",
    *RARE,
    *STATISTICS,
    "@P2 BRA `(.L_tile)",
    "EXIT",
]
FLAT = [
    ".L_step:",
    *PRODUCT,
    "BRA.U UP0, `(.L_next)",
    *RARE,
    *STATISTICS,
    ".L_next:",
    "@P1 BRA `(.L_step)",
    "EXIT",
]
#: A wait for a barrier: it spins out of line, and its way back must not count as a loop around the product.
WAIT = [".L_wait:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA `(.L_wait)", "BRA `(.L_step)"]


def sass(lines):
    return "\n".join(line if line.startswith(".") else f"        /*0010*/                   {line} ;" for line in lines)


def report(lines, warps=8, registers=168):
    return Report("_statistics", registers, 0, 150_000, warps, 3, {}, False, {}, sass(lines))


@pytest.mark.parametrize("wait", [[], WAIT])
@pytest.mark.parametrize(("lines", "flat"), [(NESTED, False), (FLAT, True)])
def test_product_and_epilogue_are_told_apart(lines, flat, wait):
    program = static.read(sass(lines + wait))
    tile = static.dissect(program)
    assert tile.flat == flat
    opcodes = [program[i].opcode for i in tile.epilogue]
    assert opcodes.count("MUFU") == 40
    assert opcodes.count("FFMA") == 60
    assert opcodes.count("FSEL") == 0  # the rare case is left out
    assert opcodes.count("HGMMA") == 0
    assert [program[i].opcode for i in tile.product][:3] == ["HGMMA", "LDGSTS", "IMAD"]
    assert len(tile.product) == (5 if flat else 4)


def test_prediction():
    """128x32 logits on 8 warps, 16 a thread: 40 exponentials keep MUFU busy for 40 * 256 / 16 clocks."""
    prediction = static.predict(report(NESTED), 128, 32, 64, 4096, 90)
    product = 2 * 128 * 32 * 4096 / 4096 / 0.8
    issue = (1 + 20 + 40 + 60 + 1 + 2) * 8 / 4
    assert prediction.instructions_per_logit == (1 + 20 + 40 + 60 + 1 + 2) / 16
    assert prediction.serial == pytest.approx((product + max(640, issue / 0.75) + 800) / product)
    assert prediction.overlapped == pytest.approx(max(product, (issue + 4 * 2 * 64) / 0.75, 640) / product)
    assert prediction.programs == 1
    assert static.predict(report(FLAT), 128, 32, 64, 4096, 90).serial == pytest.approx((product + 640) / product)


def test_prediction_of_two_halves():
    """A group's 64 rows on a warp a scheduler: in step the epilogue is added, held back what outlasts the lag."""
    kernel = dataclasses.replace(report(FLAT), kernel="_cooperative", constants={"LAG": 2})
    found = static.predict(kernel, 128, 32, 64, 4096, 90)
    product = 2 * 128 * 32 * 4096 / 4096 / 0.8
    epilogue = max(40 * 128 / 16, (20 + 40 + 60 + 1) / 0.55)
    assert found.serial == pytest.approx((product + epilogue) / product)
    assert found.overlapped == pytest.approx((product + epilogue - 2 * product / 64 / 2) / product)


def test_code_without_a_product_is_refused():
    with pytest.raises(ValueError, match="found no loop"):
        static.dissect(static.read(sass(STATISTICS)))
