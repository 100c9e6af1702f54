"""Several processes: one job of torchrun on the CPU, against one process."""

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import ROOT, make_quick, metrics, small_config

import train

VARIANTS = {
    "occ": {},
    "hidden": dict(occ_proxy="hidden", algo="drgrpo", mtp_depth=2),
    "exact": dict(regime="exact", algo="gspo"),
    "grpo": dict(algo="grpo", speculative=True),
    # one process has nothing to do
    "single": dict(prompts_per_step=1, updates_per_rollout=1, algo="reinforce"),
    "own": {},  # here every process takes the λ of its own tokens: a plausible mistake
}
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pytest import MonkeyPatch
from conftest import evaluation, make_quick, train
import occ
make_quick(MonkeyPatch())
with evaluation.reporting("train.py"):
    for name, config in json.loads(sys.argv[2]).items():
        with MonkeyPatch.context() as patch:
            if name == "own":
                patch.setattr(occ, "total", lambda x: x)
            train.main(train.Config(**config))
    train.dist.barrier()
    train.dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What one process and what two processes have left of every variant, and what the two have printed."""
    folder = tmp_path_factory.mktemp("processes")
    cache = dict(cache_dir=str(folder / "base"))
    one, two = (
        {name: small_config(folder / number, name, **cache, **v) for name, v in VARIANTS.items()}
        for number in ("one", "two")
    )
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        for cfg in one.values():
            train.main(cfg)
    configs = json.dumps({name: dataclasses.asdict(cfg) for name, cfg in two.items()})
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    (folder / "script.py").write_text(SCRIPT)
    command = [*torchrun, str(folder / "script.py"), str(ROOT / "tests"), configs]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return one, two, run.stdout


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "own"])
def test_two_processes_give_the_metrics_of_one(job, name):
    """Rewards to the bit, everything else to the rounding of sums in another order."""
    one, two, out = job
    for x, y in zip(metrics(one[name]), metrics(two[name]), strict=True):
        assert set(x) == set(y)
        for key in y:
            if key.startswith(("reward/", "response_length/", "eval/", "step")):
                assert y[key] == x[key], (x["step"], key)
            elif "logp_gap" not in key:
                assert y[key] == pytest.approx(x[key], rel=1e-2, abs=1e-3), (x["step"], key)
    assert out.count(f"the run is in {two[name].out}") == 1
    assert out.count("reinforcement learning: ") == len(VARIANTS)  # one process speaks


def test_a_coefficient_for_each_process_would_be_seen(job):
    """The comparison above is not blind."""
    one, two, _ = job
    lams = [[r["occ/lam"] for r in metrics(runs["own"])[1:]] for runs in (one, two)]
    gaps = [abs(a - b) / max(abs(a), 0.1) for a, b in zip(*lams)]
    assert max(gaps) > 0.03 and any(lam != 0 for lam in lams[0])
