"""The Triton kernels without a GPU: what they compute, by Triton's interpreter, and what they compile to."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import mtp

installed = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="skipped: Triton is not installed")


@installed
def test_the_kernels_compute_what_they_should():
    """In a process of its own: the interpreter must be chosen before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "triton_cases.py")]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 24 and "skipped" not in done.stdout


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path.insert(0, sys.argv[1])
import mtp

statistics, dz = mtp.kernels()
for kind, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
    p = "*" + kind
    inputs = dict(h=p, W=p, target="*i64")
    shape = dict(N="i32", C="i32", start="i32", end="i32", scale="fp32")
    kernels = {
        "log-prob": (statistics, dict(inputs, out="*fp32", V="i32", width="i32", **shape), dict(ENTROPY=False)),
        "entropy": (statistics, dict(inputs, out="*fp32", V="i32", width="i32", **shape), dict(ENTROPY=True)),
        "dz": (dz, dict(inputs, lse="*fp32", g="*fp32", dz="*bf16" if kind == "bf16" else "*fp32", **shape), {}),
    }
    for name, (kernel, signature, flags) in kernels.items():
        constants = {**flags, "UPCAST": False, **mtp.TILES[size]}
        signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
        aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names)
                   if signature[name].startswith("*") or name in ("C", "width", "start")}  # V may be any
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=mtp.LAUNCH[size])
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(compiled.asm["cubin"])
            f.flush()
            tool = next(Path(triton.__file__).parent.rglob("cuobjdump*"))
            usage = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
        stack, wgmma = re.search(r"STACK:(\\d+)", usage)[1], compiled.asm["ptx"].count("wgmma.mma_async")
        print(kind, name, stack, wgmma, compiled.metadata.shared)
"""


@installed
def test_the_kernels_compile_for_sm_90_without_spills_and_with_tensor_cores(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script), str(ROOT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 9
    for kind, kernel, stack, wgmma, shared in rows:
        assert stack == "0" and (int(wgmma) > 0 or kind == "fp32"), (kind, kernel)
        # the shared memory of sm_90, and of small GPUs
        assert int(shared) <= (227 if kind != "fp32" else 99) * 1024, (kind, kernel)


def test_a_forced_triton_that_cannot_run_says_why(monkeypatch):
    args = torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="impl: 'triton' cannot run here: tensors are on the cpu, not on cuda"):
        mtp.linear_logp(*args, impl="triton")
    with pytest.raises(ValueError, match="it has no torch.float64"):
        mtp.linear_logp(args[0].double(), args[1].double(), args[2], impl="triton")

    def missing():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(mtp, "kernels", missing)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="Triton cannot be imported .No module named 'triton'."):
        mtp.linear_logp(*args, impl="triton")
    assert mtp.pick_impl("auto", 1, 300, "cuda") == "naive"  # a fallback, logged as mtp/logp_impl
    monkeypatch.setattr(mtp, "kernels", lambda: None)
    assert mtp.pick_impl("auto", 1, 300, "cuda") == "triton"
    assert mtp.pick_impl("auto", 1, 300, "cuda", torch.float64) == "naive"


def test_a_launch_that_fails_says_what_to_choose(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(mtp, "kernels", lambda: (Kernel(), Kernel()))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        ValueError, match="'triton' failed on this machine .RuntimeError: out of resource.*naive or chun"
    ):
        mtp.linear_logp(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), impl="triton")


def test_importing_mtp_does_not_import_triton():
    code = "import sys, mtp; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(ROOT)).returncode == 0
