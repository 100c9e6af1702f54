"""Several processes: one job of torchrun on the CPU, against one process."""

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, coin
from test_train import metrics

import eval as evaluation
import rl
import train

VARIANTS = {
    "occ": {},
    "hidden": dict(occ_proxy="hidden", algo="drgrpo", mtp_depth=2),
    "exact": dict(regime="exact", algo="gspo"),
    "grpo": dict(algo="grpo", speculative=True),
    "single": dict(prompts_per_step=1, updates_per_rollout=1, algo="reinforce"),  # one has nothing to do
    "own": {},  # here every process takes the λ of its own tokens: a plausible mistake
}
SCRIPT = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import coin
import eval as evaluation, occ, rl, train
rl.is_right, evaluation.plot, total = coin, lambda *args: None, occ.total
with evaluation.reporting("train.py"):
    for name, config in json.loads({configs!r}).items():
        occ.total = (lambda x: x) if name == "own" else total
        train.main(train.Config(**config))
    train.dist.barrier()
    train.dist.destroy_process_group()
"""


def config(folder, name):
    paths = dict(out=str(folder / name), cache_dir=str(folder.parent / "base"))
    return train.Config(**{**SMALL, **paths, **VARIANTS[name]})


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What one process and what two processes have left of every variant, and what the two have printed."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "is_right", coin)
        patch.setattr(evaluation, "plot", lambda *args: None)
        one = {name: config(folder / "one", name) for name in VARIANTS}
        for cfg in one.values():
            train.main(cfg)
    two = {name: config(folder / "two", name) for name in VARIANTS}
    configs = json.dumps({name: dataclasses.asdict(cfg) for name, cfg in two.items()})
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), configs=configs))
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    run = subprocess.run([*torchrun, str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return one, two, run.stdout


@pytest.mark.parametrize("name", ("occ", "hidden", "exact", "grpo", "single"))
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
    assert out.count(f"the run is in {two[name].out}") == 1  # one process speaks


def test_a_coefficient_for_each_process_would_be_seen(job):
    """The comparison above is not blind."""
    one, two, _ = job
    lams = [[r["occ/lam"] for r in metrics(runs["own"])[1:]] for runs in (one, two)]
    gaps = [abs(a - b) / max(abs(a), 0.1) for a, b in zip(*lams)]
    assert max(gaps) > 0.03 and any(lam != 0 for lam in lams[0])
