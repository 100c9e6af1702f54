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

has_triton = importlib.util.find_spec("triton") is not None
installed = pytest.mark.skipif(not has_triton, reason="Triton is not installed")


def run_python(*args, **env):
    """What a process of its own prints: the interpreter is chosen before Triton is imported."""
    env, command = {**os.environ, **env}, [sys.executable, *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@installed
def test_the_kernels_compute_what_they_should():
    """By the tests of linear_logp."""
    command = "-m pytest -q -p no:cacheprovider tests/test_mtp.py -k linear_logp".split()
    said = run_python(*command, TRITON_INTERPRET="1")
    assert "passed" in said and "skipped" not in said


COMPILE = """
import os, re, subprocess, sys
from pathlib import Path
import mtp
assert "triton" not in sys.modules, "importing mtp imports Triton"
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for kind, size in (("bf16", 2), ("fp32", 4)):
    types = dict(h="*" + kind, W="*" + kind, dz="*" + kind, target="*i64", scale="fp32")
    types |= {name: "*fp32" for name in ("out", "top", "log_sum", "g")}
    constants = {name: value for name, value in mtp.TILES[size].items() if name.isupper()}
    options = {name: value for name, value in mtp.TILES[size].items() if name.islower()}
    for kernel in mtp.kernels():
        signature, values, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            signature[name] = "constexpr" if name in constants else types.get(name, "i32")
            if name in constants:
                values[i,] = constants[name]
            if signature[name][0] == "*" or name in ("C", "width", "start"):  # V may be any
                attributes[i,] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, values, attributes)
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), options)
        cubin = Path(os.environ["TRITON_CACHE_DIR"], "cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = next(Path(triton.__file__).parent.rglob("cuobjdump*"))
        usage = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
        wgmma = compiled.asm["ptx"].count("wgmma.mma_async")
        print(kind, re.search(r"STACK:(\\d+)", usage)[1], wgmma, compiled.metadata.shared)
"""


@installed
def test_the_kernels_compile_for_sm_90_without_spills_and_with_tensor_cores(tmp_path):
    said = run_python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    rows = [line.split() for line in said.splitlines()]
    assert len(rows) == 4
    for kind, stack, wgmma, shared in rows:
        assert stack == "0", f"spills registers: {rows}"
        assert int(wgmma) > 0 or kind == "fp32", f"does not use tensor cores: {rows}"
        most = 99 if kind == "fp32" else 227  # KiB of small GPUs, and of sm_90
        assert int(shared) <= most * 1024, f"takes too much shared memory: {rows}"


def wrong_statistics(h, W, target, temperature):
    return mtp.chunked_statistics(h, W, target, 1.0)


def wrong_dz(h, W, target, top, log_sum, g, temperature):
    return mtp.chunked_dz(h, W, target, top, log_sum, -g, temperature)


not_installed = Mock(side_effect=ImportError("no\n module"))
DISAGREE = "its kernels disagree with naive on a small random input"
TRIALS = {  # what takes the place of triton_statistics and triton_dz, and what is said of it
    "not installed": (not_installed, mtp.chunked_dz, "ImportError: no module"),
    "wrong forward": (wrong_statistics, mtp.chunked_dz, DISAGREE),
    "wrong backward": (mtp.chunked_statistics, wrong_dz, DISAGREE),
    "right": (mtp.chunked_statistics, mtp.chunked_dz, ""),
}


@pytest.mark.parametrize("statistics, dz, reason", TRIALS.values(), ids=TRIALS)
def test_kernels_are_tried_before_they_are_chosen(statistics, dz, reason, monkeypatch):
    monkeypatch.setattr(mtp, "INTERPRETED", True)
    monkeypatch.setattr(mtp, "triton_statistics", statistics)
    monkeypatch.setattr(mtp, "triton_dz", dz)
    found = mtp.why_no_triton.__wrapped__("cpu", torch.float32)  # not an answer kept from before
    assert found == reason
    monkeypatch.setattr(mtp, "why_no_triton", lambda device, dtype: reason)
    assert mtp.pick_impl("auto", 10, 300, "cuda") == ("chunked" if reason else "triton")
