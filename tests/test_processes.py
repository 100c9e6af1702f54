"""Several processes: torchrun on the CPU, against one process; and what happens when one of them dies."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import metrics

import rl
import train

SCRIPT = """
import json, os, sys, zlib
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import coin
import eval as evaluation, rl, train
rl.is_right, evaluation.plot = coin, lambda *a: None
{patch}
with evaluation.reporting("train.py"):
    for config in json.loads({configs!r}):
        assert train.main(train.Config(**config)) == 0
    train.leave()
"""


def torchrun(tmp_path, processes, configs, patch=""):
    """Run training for each config under torchrun; the finished command."""
    script = tmp_path / "script.py"
    fields = dict(root=str(ROOT), tests=str(ROOT / "tests"), patch=patch)
    script.write_text(SCRIPT.format(configs=json.dumps([c.__dict__ for c in configs]), **fields))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        str(script),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


VARIANTS = {
    "occ": {},
    "hidden": dict(occ_proxy="hidden", algo="drgrpo", mtp_depth=2),
    "exact": dict(regime="exact", algo="gspo"),
    "released": dict(algo="grpo", occ_average="ratios", mtp_base="main", lam_scope="all"),
    "speculative": dict(speculative=2),
    "single": dict(prompts_per_step=1, updates_per_rollout=1, algo="reinforce"),  # fewer prompts than processes
}


@pytest.mark.parametrize("processes, variants", ((2, list(VARIANTS)), (3, ["occ", "single"])))
def test_several_processes_give_the_metrics_of_one(small, tmp_path, processes, variants):
    """Rewards to the bit, everything else to rounding, with shares that do not come out even."""
    one, several = ([small(f"{kind}-{n}", **VARIANTS[n]) for n in variants] for kind in ("one", "several"))
    for cfg in one:
        train.main(cfg)
    run = torchrun(tmp_path, processes, several)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("score ") == len(variants)  # one process speaks
    moved = 0
    for a, b in zip(one, several):
        for x, y in zip(metrics(a), metrics(b), strict=True):
            assert set(x) == set(y)
            for key in x:
                exact = key.startswith(("reward/", "response_length/", "eval/", "step", "mtp/logp_impl"))
                # the mean of ratios divides by the δ² of single tokens, some of which are next to nothing
                rel = 0 if "/loss" in key else 0.1 if key == "occ/lam_ratios" else 1e-3
                near = x[key] if exact else pytest.approx(x[key], rel=rel, abs=1e-5)
                assert y[key] == near, (a.out, x["step"], key)
            if "occ/lam" in x:
                assert abs(x["occ/lam"] - y["occ/lam"]) < 1e-5 * max(1, abs(x["occ/lam"]))
                moved += x["occ/lam"] != 0
        header = json.loads((Path(b.out) / "metrics.jsonl").read_text().splitlines()[0])
        assert header["device"].startswith(f"{processes} x cpu")
    assert moved > 2


def test_a_coefficient_for_each_process_would_be_seen(small, tmp_path):
    """The comparison above is not blind: λ from a process's own tokens is another number."""
    one, two = small("one"), small("two")
    train.main(one)
    patch = "import occ; own = occ.coefficient; occ.coefficient = lambda out, trunk, cfg, total: own(out, trunk, cfg)"
    run = torchrun(tmp_path, 2, [two], patch)
    assert run.returncode == 0, run.stderr
    gaps = [abs(x["occ/lam"] - y["occ/lam"]) for x, y in zip(metrics(one)[1:], metrics(two)[1:])]
    assert max(gaps) > 1e-3


def test_pretraining_together_and_resuming_alone(small, tmp_path):
    """A base made by two processes is that of one but for rounding; a run of two goes on as one."""
    one = small("one", cache_dir=str(tmp_path / "cache one"))
    train.main(one)
    two = small("two", cache_dir=str(tmp_path / "cache two"), steps=2)
    run = torchrun(tmp_path, 2, [two])
    assert run.returncode == 0, run.stderr
    bases = [torch.load(next((tmp_path / f"cache {n}").iterdir()), weights_only=True) for n in ("one", "two")]
    for part in ("model", "heads"):
        for name, p in bases[0][part].items():
            torch.testing.assert_close(bases[1][part][name], p, rtol=1e-3, atol=1e-4)
    assert train.main(*train.command_line(["--resume", two.out, "--steps", "4"])) == 0
    assert [r["reward/mean"] for r in metrics(two)[1:]] == [r["reward/mean"] for r in metrics(one)[1:]]


def test_a_stop_that_one_process_sees_stops_all_at_the_same_step(small, tmp_path):
    one, two = small("one", save_every=100), small("two", save_every=100)
    train.main(one)
    patch = """
stop, calls, collect, main = [], [], rl.collect, train.main
def counted(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        stop.append(1)
    return collect(*args)
rl.collect = counted
train.main = lambda cfg: main(cfg, stop=stop) - 130
"""
    run = torchrun(tmp_path, 2, [two], patch)
    assert run.returncode == 0, run.stderr
    assert f"stopped after step 2; go on with: python train.py --resume {two.out}" in run.stdout
    assert train.main(*train.command_line(["--resume", two.out])) == 0
    assert [r["reward/mean"] for r in metrics(two)[1:]] == [r["reward/mean"] for r in metrics(one)[1:]]


def test_a_process_that_dies_ends_the_job_with_its_error(small, tmp_path):
    patch = """
if os.environ["RANK"] == "1":
    def losses(*args):
        raise RuntimeError("the second process is ill")
    rl.losses = losses
"""
    began = time.monotonic()
    run = torchrun(tmp_path, 2, [small()], patch)
    assert run.returncode != 0 and "the second process is ill" in run.stderr
    assert time.monotonic() - began < 60


def test_shares_cover_everything_once(monkeypatch):
    for size in (1, 2, 3, 7):
        for n in (0, 1, 5, 8):
            parts = []
            for rank in range(size):
                monkeypatch.setattr("model.world", lambda rank=rank, size=size: (rank, size))
                parts.append(list(range(n))[rl.share(n)])
            assert sum(parts, []) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1
