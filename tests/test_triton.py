"""The Triton kernels without a GPU: what its interpreter computes, and what they compile to."""

import os
import subprocess
import sys
from importlib.util import find_spec
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

import mtp

installed = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")


def run_python(*args, **env):
    """What a process of its own prints: the interpreter is chosen before Triton is imported."""
    options = dict(cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *args], **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@installed
def test_the_kernels_compute_what_the_tests_of_linear_logp_say():
    command = "-m pytest -q -p no:cacheprovider tests/test_mtp.py -k linear_logp".split()
    assert "passed" in run_python(*command, TRITON_INTERPRET="1")


COMPILE = """
import os, pathlib, re, subprocess, sys, mtp
assert "triton" not in sys.modules, "importing mtp imports Triton"
import triton.backends.compiler
sizes = {name: size for name, size in mtp.TILE.items() if name.isupper()}
options = {name: value for name, value in mtp.TILE.items() if name.islower()}
types = {**dict.fromkeys(sizes, "constexpr"), **dict.fromkeys("NCV", "i32"), "scale": "fp32"}
for kernel in mtp.kernels():
    kinds = {name: types.get(name, "*fp32") for name in kernel.arg_names} | {"target": "*i64"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(kinds) if kinds[x][0] == "*"}
    source = triton.compiler.ASTSource(kernel, kinds, sizes, aligned)
    compiled = triton.compile(source, triton.backends.compiler.GPUTarget("cuda", 90, 32), options)
    cubin = pathlib.Path(os.environ["TRITON_CACHE_DIR"], "cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    tool = next(pathlib.Path(triton.__file__).parent.rglob("cuobjdump*"))
    usage = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
    print(re.search(r"STACK:(\\d+)", usage)[1], compiled.metadata.shared)
"""


@installed
def test_the_kernels_compile_for_sm_90_without_spills(tmp_path):
    said = run_python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    stacks, shared = zip(*(map(int, line.split()) for line in said.splitlines()))
    assert stacks == (0, 0) and max(shared) <= 99 * 1024  # which small GPUs have, too


@pytest.mark.parametrize("statistics, dz, reason", [
    (Mock(side_effect=ImportError("no\n module")), mtp.chunk_dz, "ImportError: no module"),
    (lambda *x: (*mtp.chunk_statistics(*x)[:2], x[2]), mtp.chunk_dz, "its kernels disagree"),
    (mtp.chunk_statistics, Mock(return_value=torch.ones(150, 300)), "its kernels disagree"),
    (mtp.chunk_statistics, mtp.chunk_dz, ""),
], ids=("not installed", "wrong forward", "wrong backward", "right"))  # fmt: skip
def test_kernels_are_tried_before_they_are_chosen(statistics, dz, reason, monkeypatch):
    """Up to a number of logits, on every device, auto is naive."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(mtp, "triton_statistics", statistics)
    monkeypatch.setattr(mtp, "triton_dz", dz)
    found = mtp.why_no_triton.__wrapped__("cpu")  # not an answer kept from before
    assert found.startswith(reason) and bool(found) == bool(reason)
    monkeypatch.setattr(mtp, "why_no_triton", {"cpu": "not on cuda", "cuda": found}.get)
    for device, many in ("cpu", "chunked"), ("cuda", "chunked" if reason else "triton"):
        assert mtp.pick_impl("auto", mtp.AUTO_LOGITS // 512, 512, device) == "naive"
        assert mtp.pick_impl("auto", mtp.AUTO_LOGITS // 512 + 1, 512, device) == many
