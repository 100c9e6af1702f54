"""The Triton kernels without a GPU: what they compute, by Triton's interpreter, and what they compile to."""

import importlib.util
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

import mtp

installed = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


@installed
def test_the_kernels_compute_what_they_should():
    """By the tests of linear_logp, in a process of its own: the interpreter is chosen before Triton is imported."""
    command = "-m pytest -q -p no:cacheprovider tests/test_mtp.py -k linear_logp".split()
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


COMPILE = """
import os, re, subprocess, sys
from pathlib import Path
import mtp
assert "triton" not in sys.modules, "importing mtp imports Triton"
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

statistics, dz = mtp.kernels()
for kind, size in (("bf16", 2), ("fp32", 4)):
    inputs = dict(h="*" + kind, W="*" + kind, target="*i64", N="i32", C="i32", scale="fp32")
    floats = dict(top="*fp32", log_sum="*fp32", g="*fp32", dz="*bf16" if kind == "bf16" else "*fp32")
    for name, kernel, more in (
        ("statistics", statistics, dict(out="*fp32", V="i32", width="i32")),
        ("dz", dz, dict(floats, start="i32", end="i32")),
    ):
        types = inputs | more
        constants = {name: value for name, value in mtp.TILES[size].items() if name.isupper()}
        options = {name: value for name, value in mtp.TILES[size].items() if name.islower()}
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        places = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
        aligned = [x for x in types if types[x].startswith("*") or x in ("C", "width", "start")]  # V may be any
        source = ASTSource(kernel, signature, {places[x]: value for x, value in constants.items()},
                           {places[x]: [["tt.divisibility", 16]] for x in aligned})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        cubin = Path(os.environ["TRITON_CACHE_DIR"], "cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = next(Path(triton.__file__).parent.rglob("cuobjdump*"))
        usage = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
        stack, wgmma = re.search(r"STACK:(\\d+)", usage)[1], compiled.asm["ptx"].count("wgmma.mma_async")
        print(kind, name, stack, wgmma, compiled.metadata.shared)
"""


@installed
def test_the_kernels_compile_for_sm_90_without_spills_and_with_tensor_cores(tmp_path):
    """In a process of its own, too: until kernels() is called, importing mtp must not import Triton."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 4
    for kind, kernel, stack, wgmma, shared in rows:
        assert stack == "0", f"{kernel} of {kind} spills registers"
        assert int(wgmma) > 0 or kind == "fp32", f"{kernel} of {kind} does not use tensor cores"
        most = 99 if kind == "fp32" else 227  # KiB of small GPUs, and of sm_90
        assert int(shared) <= most * 1024, f"{kernel} of {kind} takes too much shared memory"


def wrong_statistics(h, W, target, temperature):
    return mtp.chunked_statistics(h, W, target, 1.0)


def wrong_dz(h, W, target, top, log_sum, g, temperature):
    return mtp.chunked_dz(h, W, target, top, log_sum, -g, temperature)


DISAGREE = "its kernels disagree with naive on a small random input"
TRIALS = {  # functions that take the place of mtp's, and what is said of them
    "not installed": ({"kernels": Mock(side_effect=ImportError("no\n module"))}, "ImportError: no module"),
    "wrong forward": ({"triton_statistics": wrong_statistics, "triton_dz": mtp.chunked_dz}, DISAGREE),
    "wrong backward": ({"triton_statistics": mtp.chunked_statistics, "triton_dz": wrong_dz}, DISAGREE),
    "right": ({"triton_statistics": mtp.chunked_statistics, "triton_dz": mtp.chunked_dz}, ""),
}


@pytest.mark.parametrize("functions, reason", TRIALS.values(), ids=TRIALS)
def test_kernels_are_tried_before_they_are_chosen(functions, reason, monkeypatch):
    monkeypatch.setattr(mtp, "INTERPRETED", True)
    for name, function in functions.items():
        monkeypatch.setattr(mtp, name, function)
    assert mtp.why_no_triton.__wrapped__("cpu", torch.float32) == reason  # not an answer kept from before
    monkeypatch.setattr(mtp, "why_no_triton", lambda device, dtype: reason)
    assert mtp.pick_impl("auto", 10, 300, "cuda") == ("chunked" if reason else "triton")
