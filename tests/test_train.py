"""Runs: what they log, that regimes are isolated, that runs repeat, resume, survive and refuse."""

import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PLOT, ROOT, metrics

import eval as evaluation
import occ
import rl
import train


def weights(cfg, part="model"):
    return torch.load(Path(cfg.out) / "ckpt.pt", weights_only=True)[part]


def base(cfg, part="model"):
    return train.pretrained(cfg, torch.device("cpu"))[part]


def moved(before, after):
    """Names of the parameters in which two states of a module differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def distance(before, after):
    gaps = [(before[name] - after[name]).abs().max() for name in before]
    return torch.stack(gaps).max().item()


def start(*argv):
    return train.main(*train.command_line(list(argv)))


def resume(cfg, *flags):
    return start("--resume", cfg.out, *flags)


@pytest.fixture
def fails(capsys):
    """Calls a function that must end the program by one line on stderr, which it returns."""

    def call(function, *args, code=2):
        with pytest.raises(SystemExit) as exit, evaluation.reporting("train.py"):
            function(*args)
        error = capsys.readouterr().err
        assert exit.value.code == code and error.count("\n") == 1, error
        assert error.startswith("train.py: error: "), error
        return error

    return call


VARIANTS = {
    "off": dict(algo="reinforce"),
    "detach": dict(tied=True),
    "ce": dict(speculative=True, temperature=0.7),
    "policy": dict(algo="gspo"),
    "exact-ce": dict(mtp_design="parallel", algo="drgrpo"),
}


@pytest.mark.parametrize("regime", occ.REGIMES)
def test_a_run_of_each_regime(trained, regime, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "plot", PLOT)
    cfg = trained(regime=regime, mtp_depth=2, keep="0,4", **VARIANTS.get(regime, {}))
    lines = capsys.readouterr().out.splitlines()  # not a terminal: a line an evaluation
    steps = ["step 2: reward ", "step 4: reward "]
    starts = ["pretraining: ", "reinforcement learning: ", *steps, "score "]
    for line, expected in zip(lines, starts, strict=True):
        assert line.startswith(expected)
    assert lines[-1].endswith(f"the run is in {cfg.out}")
    files = {"metrics.jsonl", "ckpt.pt", "ckpt-0.pt", "ckpt-4.pt", "samples.txt", "curves.png"}
    assert {p.name for p in Path(cfg.out).iterdir()} == files
    header, records = evaluation.read_metrics(cfg.out)
    assert header["config"] == dataclasses.asdict(cfg)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    for r in records:
        assert r.get("rollout/logp_gap", 0) < 1e-4  # what is sampled from is what is scored
        assert ("eval/score" in r) == (r["step"] in (0, 2, 4))
        assert ("occ/c" in r) == (r["step"] in (2, 4) and regime != "off")
    assert any(r.get("occ/lam") for r in records) == (regime not in ("off", "detach"))


@pytest.mark.parametrize("changes", ({}, dict(tied=True), dict(mtp_design="parallel", algo="grpo")))
def test_off_and_detach_move_the_trunk_alike_bit_by_bit(trained, changes):
    names = "off", "policy", "detach"
    off, policy, detach = (trained(name, regime=name, **changes) for name in names)
    assert not moved(weights(off), weights(detach))
    assert moved(weights(off), weights(policy)) and moved(weights(off), base(off))
    heads = base(detach, "heads")
    assert moved(heads, weights(detach, "heads")) == set(heads)


def test_heads_learn_by_cross_entropy_while_the_trunk_gets_the_policy_gradient(
    trained, monkeypatch
):
    """One update from the same weights: the heads move as in detach, the trunk as in policy, or not at λ = 0."""
    monkeypatch.setitem(occ.REGIMES, "both", occ.Regime("ce", "policy", "fixed"))
    monkeypatch.setitem(occ.REGIMES, "closed", occ.REGIMES["policy"])
    trunk, heads = {}, {}
    for name, lam in {"detach": 0.5, "policy": 0.5, "both": 0.5, "closed": 0.0}.items():
        monkeypatch.setitem(occ.REGIMES, "ce", occ.REGIMES[name])  # a name that flags allow
        cfg = trained(name, regime="ce", lam=lam, steps=1, updates_per_rollout=1, probe_every=0)
        trunk[name], heads[name] = weights(cfg), weights(cfg, "heads")
    assert distance(trunk["both"], trunk["policy"]) <= 1e-6
    assert distance(heads["both"], heads["detach"]) <= 1e-6
    assert distance(heads["both"], heads["policy"]) > 1e-5
    assert distance(trunk["closed"], trunk["detach"]) <= 1e-6
    assert distance(trunk["closed"], trunk["policy"]) > 1e-5


@pytest.mark.parametrize("half", (False, True))
def test_the_first_lambda_of_a_rollout_is_exactly_zero(trained, monkeypatch, capfd, half):
    """With the main head's old log-prob as base, as in --released, δ_MTP does not start at 0, and λ still does."""
    if half:
        bfloat16 = torch.autocast("cpu", torch.bfloat16)
        monkeypatch.setattr(rl.mtp, "autocast", lambda device: bfloat16)
    cfg = trained(updates_per_rollout=1)
    assert "lambda_t stays 0" in capfd.readouterr().out
    for r in metrics(cfg)[1:]:
        assert r["occ/lam"] == r["occ/v2_hat"] == 0
        assert r["actor/ratio_max"] == r["mtp/ratio_max"] == 1
    cfg = trained("released", updates_per_rollout=1, steps=1, released=True, mtp_depth=2)
    record = metrics(cfg)[1]
    assert record["occ/lam"] == 0 and record["occ/v2_hat"] > 0 and record["mtp/ratio_max"] > 1


@pytest.mark.parametrize("name, changes", [
    ("lam_exact", dict(regime="exact", algo="drgrpo")),
    ("lam_logprob", {}),
    ("lam_hidden", dict(occ_proxy="hidden", algo="grpo")),
])  # fmt: skip
def test_the_probe_tells_the_lambda_that_the_update_uses(trained, name, changes):
    probes = [r for r in metrics(trained(**changes)) if "occ/c" in r]
    assert len(probes) == 2
    for r in probes:
        assert r["occ/lam"] == pytest.approx(r[f"occ/{name}"], rel=1e-3) and r["occ/lam"] != 0
        # the heads have moved
        assert r["occ/v2_frozen"] != pytest.approx(r["occ/v2_hat"], rel=1e-3)


def test_released_puts_lambda_inside_the_clip(trained, monkeypatch):
    """With λ = 0 neither the trunk nor the heads learn anything by the heads' loss: λ times their advantages."""

    def zero(delta_rl, delta_mtp, mask, lam_plus):
        assert lam_plus == 0.05  # over two heads
        return torch.zeros(len(mask))

    monkeypatch.setattr(occ, "released_coefficient", zero)
    off = trained("off", regime="off", mtp_depth=2)
    released = trained("released", released=True, mtp_depth=2)
    assert distance(weights(released), weights(off)) <= 1e-6
    assert not moved(base(released, "heads"), weights(released, "heads"))


def test_pretraining_scores_a_solution_and_its_end_and_nothing_else(small):
    cfg = small(task="add,sub")
    for tokens, mask in zip(*train.pretraining_batch(cfg, 0)):
        scored = cfg.tok().decode(tokens[1:][mask].tolist())
        before = cfg.tok().decode(tokens[: 1 + mask.nonzero().min()].tolist())
        assert re.fullmatch(r"####\d+<\|endoftext\|>", scored)
        assert re.fullmatch(r"\d+[+-]\d+=", before)


def test_muon_makes_updates_whose_singular_values_are_near_one():
    p = torch.nn.Parameter(torch.zeros(8, 20))
    p.grad = torch.randn(8, 20) * torch.logspace(-1, 1, 8)[:, None]
    train.Muon([p], dict(lr=1.0)).step()
    before, after = torch.linalg.svdvals(p.grad), torch.linalg.svdvals(p.detach())
    assert before.max() > 20 * before.min() and after.min() > 0.5 and after.max() < 1.5


def test_the_kl_is_to_the_frozen_base(trained):
    kl = [r["actor/kl"] for r in metrics(trained(algo="grpo", updates_per_rollout=1))[1:]]
    assert abs(kl[0]) < 1e-6 < kl[1] < kl[3]


def test_a_rollout_where_all_are_wrong_changes_nothing(trained, monkeypatch):
    monkeypatch.setattr(rl, "is_right", lambda problem, text: False)
    cfg = trained()
    assert not moved(base(cfg), weights(cfg))
    assert all(r["reward/frac_zero_std"] == 1 for r in metrics(cfg)[1:])


def before_call(monkeypatch, module, name, number, action):
    """Something happens right before the n-th call of a function."""
    function, calls = getattr(module, name), itertools.count(1)

    def patched(*args, **kwargs):
        if next(calls) == number:
            action()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, patched)


def out_of_memory():
    raise MemoryError


@pytest.mark.parametrize("changes, module, name, number", [
    ({}, train, "pretraining_batch", 2),
    ({}, rl, "evaluate", 1),  # before the first checkpoint
    ({"algo": "grpo"}, rl, "rollout", 4),
    ({"regime": "off"}, rl, "rollout", 3),
    ({"speculative": True}, rl, "rollout", 4),
    ({"regime": "exact"}, train.os, "replace", 3),  # while saving step 2
])  # fmt: skip
def test_resumed_equals_unbroken(small, trained, monkeypatch, changes, module, name, number):
    whole = trained("whole", **changes)
    broken = small("broken", **changes)
    broken.cache_dir = f"{broken.out}/base"  # pretrained again
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        before_call(patch, module, name, number, out_of_memory)
        train.main(broken)
    assert not list(Path(broken.out).glob("*.tmp"))
    with open(Path(broken.out) / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "torn')
    assert resume(broken) == 0
    assert metrics(broken) == metrics(whole)
    samples, expected = (Path(cfg.out) / "samples.txt" for cfg in (broken, whole))
    assert samples.read_bytes() == expected.read_bytes()
    assert not moved(weights(broken), weights(whole))


def test_ctrl_c_leaves_a_checkpoint_and_a_run_can_be_made_longer(small, monkeypatch, capsys, fails):
    longer, broken = small("longer", save_every=100, steps=6), small("broken", save_every=100)
    train.main(longer)
    with monkeypatch.context() as patch:
        before_call(patch, rl, "rollout", 3, lambda: signal.raise_signal(signal.SIGINT))
        assert train.main(broken) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as before the run
    with train.ctrl_c_waits() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
        assert stop
        signal.raise_signal(signal.SIGINT)
    said = f"stopped after step 3; go on with: python train.py --resume {broken.out}"
    assert said in capsys.readouterr().out
    assert "--steps 2: must be 3 or more" in fails(resume, broken, "--steps", "2")
    assert resume(broken, "--steps", "6") == 0
    assert metrics(broken) == metrics(longer)


def test_a_number_that_is_not_finite_stops_the_run(small, monkeypatch, fails):
    """The loss is finite; its gradient is not. The last checkpoint is kept."""
    cfg = small(save_every=1, regime="off", updates_per_rollout=1)
    policy_loss, calls = rl.policy_loss, itertools.count(1)

    def broken(logp, *args):
        nothing = (0 * logp).square().sum().sqrt()  # its gradient is 0/0
        return policy_loss(logp, *args) + (nothing if next(calls) == 3 else 0.0)

    monkeypatch.setattr(rl, "policy_loss", broken)
    error = fails(train.main, cfg, code=1)
    assert "step 3: grad_norm/trunk is not finite; the last good checkpoint is that of" in error
    assert f"step 2; go on with: python train.py --resume {cfg.out}" in error
    assert all(torch.isfinite(p).all() for p in weights(cfg).values())


def test_two_runs_in_one_folder(trained, fails):
    cfg = trained()
    before = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    first = train.Run(cfg, resume=True)
    assert f"{cfg.out}: another run is writing there" in fails(resume, cfg, "--steps", "6")
    first.metrics.close()
    assert f"go on with --resume {cfg.out}" in fails(start, "--out", cfg.out)
    assert before == {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}


@pytest.mark.parametrize("flags, said", [  # flags, and what must be said of them
    ("--regime mtp", f"--regime mtp: must be one of {', '.join(occ.REGIMES)}"),
    ("--task add,gsm", "--task: unknown suite 'gsm'; allowed: arithmetic, or some of add,sub"),
    ("--task aime24", "--task aime24: a set to score on: python eval.py score RUN --suite aime24"),
    ("--temperature 0", "--temperature 0.0: must be above 0"),
    ("--lr nan", "--lr nan: must be above 0"),
    ("--max_new_tokens 4", "--max_new_tokens 4: must be 12 or more for this task and difficulty"),
    ("--device gpu", "--device gpu: cannot be used here"),
    ("--logp_impl triton", "--logp_impl triton: must be auto, naive or chunked here"),
    ("--regim occ", "unrecognized arguments: --regim"),
    ("--speculative --regime off", "--speculative True: must be left out"),
    ("--released --regime exact", "--released True: must be left out"),
    ("--released --lam_plus 0.5", "--lam_plus 0.5: must be left out with --released"),
    ("--released --occ_proxy hidden", "--occ_proxy hidden: must be left out with --released"),
])  # fmt: skip
def test_wrong_flags_are_named(fails, flags, said):
    assert said in fails(start, *flags.split())


def test_damaged_runs_are_refused_in_one_line(trained, tmp_path, fails):
    cfg = trained()
    log, ckpt = Path(cfg.out) / "metrics.jsonl", Path(cfg.out) / "ckpt.pt"
    good, state = ckpt.read_bytes(), torch.load(ckpt, weights_only=True)
    text = log.read_text(encoding="utf-8")
    assert "--lr: with --resume a run keeps" in fails(resume, cfg, "--lr", "1")
    nowhere = fails(start, "--resume", str(tmp_path / "nowhere"))
    assert "not a run: it has no metrics.jsonl" in nowhere
    ckpt.write_bytes(good[: len(good) // 2])
    assert "ckpt.pt: not a readable checkpoint" in fails(resume, cfg)
    torch.save(state | {"step": os.system}, ckpt)  # a pickle that names a function
    assert "not a readable checkpoint" in fails(resume, cfg)
    torch.save(state | {"model": {"wte.weight": torch.zeros(2, 2)}}, ckpt)
    assert "do not fit the sizes" in fails(resume, cfg)
    ckpt.unlink()
    assert "ckpt.pt: missing, though metrics.jsonl has 4 steps" in fails(resume, cfg)
    assert log.read_text(encoding="utf-8") == text  # refused before anything was cut
    ckpt.write_bytes(good)
    for damaged, said in (
        ("[]\n", "not the header of a run"),
        ("{torn\n", "not JSON"),
        (text.replace('"nanoocc": ', '"nanoocc": 9'), "a run of version 9"),
        (text.replace('"lam": 1.0, ', ""), "settings that differ: lam"),
    ):
        log.write_text(damaged, encoding="utf-8")
        assert said in fails(resume, cfg)


def test_every_flag_is_explained_and_fits_any_terminal():
    """--help into a pipe whose encoding lacks λ and θ; in a locale that is not UTF-8."""
    terminal = dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C", COLUMNS="200")
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    done = subprocess.run(command, env=os.environ | terminal, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in train.Config.__dataclass_fields__:
        assert f"--{name}" in done.stdout
    assert "[0.0002]" in done.stdout
