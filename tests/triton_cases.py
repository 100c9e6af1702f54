"""The Triton kernels on a CPU, by Triton's interpreter: run in a process of its own by test_triton.py.

TRITON_INTERPRET=1 must be set before Triton is first imported. The interpreter is slow: sizes are small, and tiles are
made small too, so that there are several of them, with ragged edges.
"""

import pytest
from test_mtp import CASES, CHECKS, HALVES, check_case

import mtp


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(mtp, "TILES", {size: dict(ROWS=16, COLUMNS=32, CHANNELS=16) for size in (2, 4)})
    monkeypatch.setattr(mtp, "PROGRAMS", 6)
    monkeypatch.setattr(mtp, "DZ_BYTES", 4 * 37 * 70)


@pytest.mark.parametrize("dtype, rounding", HALVES)
def test_the_kernels_pass_their_trial(dtype, rounding, monkeypatch):
    monkeypatch.undo()  # the tiles that a GPU gets
    assert mtp.why_no_triton("cpu", dtype) == ""


@pytest.mark.parametrize("dtype, rounding", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype, rounding):
    check_case("triton", case, dtype, rounding)


@pytest.mark.parametrize("check", CHECKS)
def test_in_special_cases(check):
    check("triton")
