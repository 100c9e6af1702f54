"""Several processes: one job of torchrun on the CPU, against one process."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_quick, metrics, small_config, train

import model as gpt

VARIANTS = {
    "occ": dict(mtp_depth=2, steps=2),
    "exact": dict(regime="exact", algo="gspo", steps=2),
    "grpo": dict(algo="grpo", regime="ce", steps=2),
    "empty": dict(prompts_per_step=1, updates_per_rollout=1, algo="reinforce"),  # for one of two
    "own": {},  # here every process takes the λ of its own tokens: a plausible mistake
}
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from conftest import make_quick, pytest, train
make_quick(pytest.MonkeyPatch())
for name, config in json.loads(sys.argv[2]).items():
    if name == "own":
        train.occ.total = lambda x: x
    train.main(train.Config(**config))
train.dist.barrier()
train.dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What one process and what two have left of every variant."""
    folder, one, two = tmp_path_factory.mktemp("processes"), {}, {}
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        for name, changes in VARIANTS.items():
            one[name], two[name] = (small_config(folder / n, name, **changes) for n in "12")
            train.main(one[name])
    (folder / "script.py").write_text(SCRIPT)
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2".split()
    command += [str(folder / "script.py"), str(ROOT / "tests"), json.dumps(two, default=vars)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("look at") == run.stdout.count(": 2 x cpu") == len(VARIANTS)
    return one, two


@pytest.mark.parametrize("name", ("occ", "exact", "grpo", "empty"))
def test_two_processes_give_the_metrics_of_one(job, name):
    """Rewards to the bit, everything else to the rounding of sums in another order."""
    for x, y in zip(*(metrics(runs[name]) for runs in job), strict=True):
        for key in (set(x) | set(y)) - {"rollout/logp_gap"}:
            exactly = key.startswith(("reward/", "response_length/", "eval/", "step"))
            near = x[key] if exactly else pytest.approx(x[key], rel=1e-2, abs=1e-3)
            assert y[key] == near, (x["step"], key)


def test_a_coefficient_for_each_process_would_be_seen(job):
    one, two = ([r["occ/lam"] for r in metrics(runs["own"])[1:]] for runs in job)
    assert max(abs(a - b) / max(abs(a), 0.1) for a, b in zip(one, two)) > 0.03


def test_gradients_are_added_up_in_one_message(monkeypatch):
    """The other process has the same ones. The last parameter has none."""
    params, sent = [torch.nn.Parameter(torch.ones(size)) for size in (2, 3, 4)], []
    params[0].grad, params[1].grad = torch.tensor([1.0, 2]), torch.tensor([3.0, 4, 5])
    monkeypatch.setattr(gpt.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(gpt.dist, "all_reduce", lambda x, op: sent.append(len(x.mul_(2))))
    gpt.total_gradients(params)
    assert sent == [5] and params[2].grad is None
    assert torch.cat([p.grad for p in params[:2]]).tolist() == [2, 4, 6, 8, 10]
