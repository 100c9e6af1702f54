"""Runs: what they log, that regimes are isolated, that runs repeat, resume, survive and refuse."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PLOT, ROOT, coin

import eval as evaluation
import occ
import rl
import train


def metrics(cfg, clock=False):
    """The lines behind the header, without what depends on the clock."""
    _, records = evaluation.read_metrics(cfg.out)
    return [{k: v for k, v in r.items() if clock or not k.startswith(("time", "perf/"))} for r in records]


def weights(cfg, part="model"):
    return torch.load(Path(cfg.out) / "ckpt.pt", weights_only=True)[part]


def base(cfg):
    return train.pretrained(cfg, torch.device("cpu"))


def resume(cfg, *flags, stop=()):
    return train.main(*train.command_line(["--resume", cfg.out, *flags]), stop)


def fails(capsys, *argv):
    """The one line on stderr of a command that must exit with code 2."""
    with pytest.raises(SystemExit) as exit, evaluation.reporting("train.py"):
        train.main(*train.command_line(list(argv)))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("train.py: error: ") and error.count("\n") == 1, error
    return error


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves


@pytest.mark.parametrize("regime", occ.REGIMES)
def test_a_run_of_each_regime(small, regime, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "plot", PLOT)
    cfg = small(regime=regime, mtp_depth=2, keep="0,4")
    assert train.main(cfg) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pretraining: ") and lines[1].startswith("reinforcement learning: ")
    assert (
        lines[2].startswith("step 2: reward ") and "minutes left" in lines[2]
    )  # no terminal: a line an evaluation
    assert (
        lines[-1].startswith("score ") and lines[-1].endswith(f"the run is in {cfg.out}") and len(lines) == 5
    )
    files = {"metrics.jsonl", "ckpt.pt", "ckpt-0.pt", "ckpt-4.pt", "samples.txt", "curves.png"}
    assert {p.name for p in Path(cfg.out).iterdir()} == files
    header, records = evaluation.read_metrics(cfg.out)
    assert set(header) == {"config", "seed", "commit", "versions", "device", "logp_impl"}
    assert header["config"] == dataclasses.asdict(cfg) and header["logp_impl"] == "naive"
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    for r in records:
        assert ("eval/score" in r) == (r["step"] in (0, 2, 4))
        assert ("occ/c" in r) == (r["step"] in (2, 4) and regime != "off")
        assert all(isinstance(value, (int, float)) and value == value for value in r.values())
    assert "reward" in (Path(cfg.out) / "samples.txt").read_text(encoding="utf-8")
    moved = any(r.get("occ/lam") for r in records)
    assert moved == (regime not in ("off", "detach"))


@pytest.mark.parametrize("changes", ({}, {"tied": True}, {"mtp_design": "parallel", "algo": "grpo"}))
def test_off_and_detach_move_the_trunk_alike_bit_by_bit(small, changes):
    runs = {}
    for regime in ("off", "detach", "policy"):
        cfg = small(regime, regime=regime, **changes)
        train.main(cfg)
        runs[regime] = weights(cfg)
    start = base(cfg)["model"]
    assert all(torch.equal(runs["off"][name], runs["detach"][name]) for name in start)
    assert any(not torch.equal(runs["off"][name], runs["policy"][name]) for name in start)
    assert any(not torch.equal(runs["off"][name], start[name]) for name in start)  # and the trunk did move


def test_heads_learn_when_detached(small):
    cfg = small(regime="detach")
    train.main(cfg)
    start = base(cfg)["heads"]
    assert all(not torch.equal(p, start[name]) for name, p in weights(cfg, "heads").items())


def test_heads_that_learn_by_cross_entropy_while_the_trunk_gets_the_policy_gradient(small):
    """One update from the same weights, λ fixed: the heads move as in detach, the trunk as in policy."""
    moved = {}
    for name, row in (("detach", occ.REGIMES["detach"]), ("policy", occ.REGIMES["policy"]),
                      ("both", occ.Regime("ce", "policy", "fixed"))):  # fmt: skip
        occ.REGIMES["ce"], kept = row, occ.REGIMES["ce"]
        try:
            cfg = small(name, regime="ce", lam=0.5, steps=1, updates_per_rollout=1, probe_every=0)
            train.main(cfg)
            moved[name] = weights(cfg), weights(cfg, "heads")
        finally:
            occ.REGIMES["ce"] = kept
    for name, p in moved["both"][0].items():
        torch.testing.assert_close(p, moved["policy"][0][name], rtol=0, atol=1e-6)
    for name, p in moved["both"][1].items():
        torch.testing.assert_close(p, moved["detach"][1][name], rtol=0, atol=1e-6)
    assert any(not torch.equal(p, moved["policy"][1][name]) for name, p in moved["both"][1].items())


def test_one_update_a_rollout_leaves_lambda_at_zero_and_says_so(small, capfd):
    cfg = small(updates_per_rollout=1)
    train.main(cfg)
    assert [r["occ/lam"] for r in metrics(cfg)[1:]] == [0, 0, 0, 0]
    assert all(r["actor/ratio_max"] == r["mtp/ratio_max"] == 1 for r in metrics(cfg)[1:])
    assert "lambda_t stays 0" in capfd.readouterr().out


def test_the_first_lambda_of_a_rollout_is_exactly_zero_with_bfloat16_too(small, monkeypatch):
    """And with the main head's old log-prob as base the heads' ratio does not start at 1, while λ is still 0."""
    monkeypatch.setattr(rl.mtp, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    cfg = small(updates_per_rollout=1, steps=1)
    train.main(cfg)
    assert metrics(cfg)[1]["occ/lam"] == 0 and metrics(cfg)[1]["occ/v2_hat"] == 0
    cfg = small("released", updates_per_rollout=1, steps=1, released=True, mtp_depth=2)
    train.main(cfg)
    record = metrics(cfg)[1]
    assert record["occ/lam"] == 0 and record["occ/v2_hat"] > 0 and record["mtp/ratio_max"] > 1
    assert cfg.lam_plus == 0.05 and json.loads((Path(cfg.out) / "metrics.jsonl").read_text().splitlines()[0])


def test_the_probe_tells_the_lambda_that_released_would_use(small):
    """In a run with --released it is λ_t itself."""
    cfg = small(released=True, mtp_depth=2, probe_every=1)
    train.main(cfg)
    for record in metrics(cfg)[1:]:
        assert (
            record["occ/lam_released"] == pytest.approx(record["occ/lam"], rel=1e-4)
            and record["occ/lam"] != 0
        )


def test_released_puts_lambda_inside_the_clip(small, monkeypatch):
    """With λ = 0 neither the trunk nor the heads learn anything by the heads' loss: λ times their advantages."""
    monkeypatch.setattr(occ, "released_coefficient", lambda a, b, mask, lam_plus: torch.zeros(len(mask)))
    runs = {}
    for regime, changes in (("off", {}), ("occ", dict(released=True))):
        cfg = small(regime, regime=regime, **changes)
        train.main(cfg)
        runs[regime] = weights(cfg)
    for name, p in runs["off"].items():
        torch.testing.assert_close(runs["occ"][name], p, rtol=0, atol=1e-6)
    start = base(cfg)["heads"]
    assert all(torch.equal(p, start[name]) for name, p in weights(cfg, "heads").items())


def test_pretraining_is_shared_by_the_regimes_of_a_seed(small, monkeypatch):
    pretrain, seeds = train.pretrain, []
    monkeypatch.setattr(train, "pretrain", lambda cfg, *rest: seeds.append(cfg.seed) or pretrain(cfg, *rest))
    starts = []
    for name, changes in (
        ("a", {}),
        ("b", dict(regime="detach", lr=1e-5)),
        ("c", dict(seed=1)),
        ("d", dict(careless=0.1)),
    ):
        train.main(small(name, **changes))
        starts.append(metrics(small(name, **changes))[0])
    assert seeds == [0, 1, 0] and starts[0] == starts[1]  # another seed or another mixture is another base


def test_muon_makes_updates_whose_singular_values_are_near_one():
    p = torch.nn.Parameter(torch.zeros(8, 20))
    p.grad = torch.randn(8, 20) * torch.logspace(-1, 1, 8)[:, None]
    train.Muon([p], dict(lr=1.0)).step()
    spread = torch.linalg.svdvals(p.grad).max() / torch.linalg.svdvals(p.grad).min()
    values = torch.linalg.svdvals(p.detach())
    assert spread > 20 and values.min() > 0.5 and values.max() < 1.5


def test_the_kl_is_to_the_frozen_base(small):
    cfg = small(algo="grpo", updates_per_rollout=1)
    train.main(cfg)
    kl = [r["actor/kl"] for r in metrics(cfg)[1:]]
    assert abs(kl[0]) < 1e-6 < kl[1] < kl[3]


def test_the_probe_sees_the_minibatch_as_the_update_does(small):
    cfg = small(regime="exact", algo="drgrpo")
    train.main(cfg)
    probes = [r for r in metrics(cfg) if "occ/c" in r]
    assert probes and all(r["occ/lam"] == pytest.approx(r["occ/lam_star"], rel=1e-3) for r in probes)


@pytest.mark.parametrize("changes", ({"algo": "reinforce"}, {"algo": "gspo", "released": True}, {"occ_proxy": "hidden"},
                                     {"regime": "exact-ce", "mtp_design": "parallel", "mtp_depth": 2},
                                     {"speculative": True, "mtp_depth": 2, "temperature": 0.7}))  # fmt: skip
def test_variants_run_and_lambda_moves(small, changes):
    cfg = small(**changes)
    assert train.main(cfg) == 0
    assert any(r["occ/lam"] != 0 for r in metrics(cfg)[1:])
    assert all(r["rollout/logp_gap"] < 1e-4 for r in metrics(cfg)[1:])


def test_naive_and_chunked_give_the_same_metrics(small):
    logs = []
    for impl in ("naive", "chunked"):
        cfg = small(impl, logp_impl=impl, steps=2)
        train.main(cfg)
        logs.append(metrics(cfg))
    for a, b in zip(*logs):
        for key in set(a) - {
            "occ/lam_released"
        }:  # it divides by δ² of single tokens, some of which are rounding
            assert a[key] == pytest.approx(b[key], rel=1e-2, abs=1e-3), key


def test_a_rollout_where_all_are_wrong_changes_nothing(small, monkeypatch):
    monkeypatch.setattr(rl, "is_right", lambda problem, text: False)
    cfg = small()
    assert train.main(cfg) == 0
    start = base(cfg)["model"]
    assert all(torch.equal(p, start[name]) for name, p in weights(cfg).items())
    assert all(r["reward/frac_zero_std"] == 1 for r in metrics(cfg)[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Repeating, resuming and surviving


def test_same_seed_same_log(small):
    logs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = small(name, seed=seed)
        train.main(cfg)
        logs[name] = metrics(cfg)
    assert logs["a"] == logs["b"] != logs["c"]


@pytest.mark.parametrize(
    "changes", ({}, {"algo": "grpo"}, {"regime": "exact"}, {"regime": "off"}, {"speculative": True})
)
def test_resumed_equals_unbroken(small, changes, monkeypatch):
    whole, broken = small("whole", **changes), small("broken", **changes)
    train.main(whole)
    write = train.Run.write

    def write_and_die(run, record):
        write(run, record)
        if record.get("step") == 3:
            raise MemoryError  # with step 3 written, and a checkpoint of step 2

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train.Run, "write", write_and_die)
        train.main(broken)
    with open(Path(broken.out) / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "torn')
    assert resume(broken) == 0
    assert metrics(broken) == metrics(whole)
    samples = [(Path(cfg.out) / "samples.txt").read_text(encoding="utf-8") for cfg in (broken, whole)]
    assert samples[0] == samples[1]
    assert all(torch.equal(a, b) for a, b in zip(weights(broken).values(), weights(whole).values()))


def test_interrupted_before_the_first_checkpoint(small, tmp_path):
    whole, broken = small("whole"), small("broken", cache_dir=str(tmp_path / "other"))
    train.main(whole)
    with pytest.raises(KeyboardInterrupt, match=f"go on with: python train.py --resume {broken.out}"):
        train.main(broken, stop=[1])  # asked to stop during pretraining
    assert not (Path(broken.out) / "ckpt.pt").exists()
    assert resume(broken) == 0
    assert metrics(broken) == metrics(whole)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_ctrl_c_leaves_a_checkpoint_that_resumes(small, monkeypatch, capsys, number):
    whole, broken = small("whole", save_every=100), small("broken", save_every=100)
    train.main(whole)
    rollout, calls = rl.rollout, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return rollout(*args)

    monkeypatch.setattr(rl, "rollout", interrupted)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert train.main(broken, stop=train.on_ctrl_c()) == 130
        assert (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )  # a second Ctrl-C ends it at once
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert (
        f"stopped after step 3; go on with: python train.py --resume {broken.out}" in capsys.readouterr().out
    )
    assert resume(broken) == 0
    assert metrics(broken) == metrics(whole)


def test_resume_can_extend_a_run_and_remembers_how_far(small, capsys):
    cfg, longer = small("short"), small("long", steps=8)
    train.main(cfg)
    train.main(longer)
    assert resume(cfg, "--steps", "8", stop=[1]) == 130  # stopped on the way
    assert len(metrics(cfg)) == 1 + 5
    assert "--steps 4: must be 5 or more" in fails(capsys, "--resume", cfg.out, "--steps", "4")
    assert resume(cfg) == 0
    assert metrics(cfg) == metrics(longer)


def killed_run(config, module, name, calls_before):
    """A process that trains, and is killed at the n-th call of a function."""
    rl.is_right, evaluation.plot = coin, lambda *args: None
    sys.stdout = open(os.devnull, "w")
    original, calls = getattr(module, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) > calls_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, call)
    train.main(train.Config(**config))


@pytest.mark.parametrize("module, name, calls", [(train, "pretraining_batch", 1), (rl, "evaluate", 0), (rl, "rollout", 2),
                                                 (train.os, "replace", 1), (train.os, "replace", 2)])  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_numbers(small, tmp_path, module, name, calls):
    whole, broken = (
        small("whole", save_every=1),
        small("broken", save_every=1, cache_dir=str(tmp_path / "other")),
    )
    train.main(whole)
    process = multiprocessing.get_context("fork").Process(
        target=killed_run, args=(dataclasses.asdict(broken), module, name, calls)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert resume(broken) == 0
    assert metrics(broken) == metrics(whole)


def test_a_crash_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("disk full")

    path = tmp_path / "ckpt.pt"
    train.save_atomically({"step": 1}, path)
    monkeypatch.setattr(train.os, "replace", full)
    with pytest.raises(OSError):
        train.save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == [
        "ckpt.pt"
    ]


def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(small, monkeypatch, capsys):
    """The loss is finite; its gradient is not."""
    cfg, policy_loss, calls = small(save_every=1, regime="off", updates_per_rollout=1), rl.policy_loss, []

    def broken(logp, *args):
        calls.append(1)
        spoiled = (0 * logp).square().sum().sqrt() if len(calls) == 3 else 0.0  # 0, with the gradient 0/0
        return policy_loss(logp, *args) + spoiled

    monkeypatch.setattr(rl, "policy_loss", broken)
    with pytest.raises(SystemExit) as exit, evaluation.reporting("train.py"):
        train.main(cfg)
    error = capsys.readouterr().err
    assert exit.value.code == 1 and error.count("\n") == 1
    assert (
        "step 3: grad_norm/trunk is not finite; the last good checkpoint is that of step 2; go on with: python"
        in error
    )
    assert all(torch.isfinite(p).all() for p in weights(cfg).values())


def test_two_runs_in_one_folder(small, capsys):
    cfg = small()
    train.main(cfg)
    before = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    first = train.Run(cfg, resume=True)
    assert f"{cfg.out}: another run is writing there" in fails(capsys, "--resume", cfg.out, "--steps", "6")
    assert f"--resume {cfg.out}" in fails(capsys, "--out", cfg.out)
    assert before == {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    first.metrics.close()
    assert resume(cfg, "--steps", "6") == 0


def test_an_empty_metrics_file_is_no_run(small, capsys):
    """Killed between making the file and its first line: one starts it again."""
    cfg = small()
    Path(cfg.out).mkdir()
    (Path(cfg.out) / "metrics.jsonl").touch()
    assert "metrics.jsonl: empty: the run never began; start it again" in fails(capsys, "--resume", cfg.out)
    assert train.main(cfg) == 0


def test_a_damaged_cache_is_made_again(small):
    cfg = small("a")
    train.main(cfg)
    (path,) = Path(cfg.cache_dir).iterdir()
    for content in (b"half a file", None):
        path.write_bytes(content) if content else torch.save({"model": {}}, path)
        again = small(f"again {content}")
        train.main(again)
        assert metrics(again) == metrics(cfg)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "flag, value, allowed",
    [
        ("regime", "mtp", "must be one of off, detach, ce, policy, occ, exact, occ-ce, exact-ce"),
        ("algo", "ppo", "must be one of reinforce, grpo, drgrpo, dapo, gspo"),
        ("task", "add,gsm", "unknown suite 'gsm'; allowed: arithmetic, or some of add,sub"),
        ("tokenizer", "words", "must be one of bytes, gpt2"),
        ("steps", "0", "must be above 0"),
        ("n_layer", "-1", "must be above 0"),
        ("n_embd", "30", "must be a multiple of n_head = 4"),
        ("num_generations", "1", "must be 2 or more"),
        ("temperature", "0", "must be above 0"),
        ("lr", "nan", "must be above 0"),
        ("lam", "nan", "must be a finite number"),
        ("seed", "99999999999", "must be 0 or more"),
        ("max_new_tokens", "4", "must be 11 or more for this task and difficulty"),
        ("lr", "fast", "invalid float value: 'fast'"),
        ("careless", "1.5", "must be a share from 0 to 1"),
        ("difficulty", "9", "must be 1 to 8"),
        ("updates_per_rollout", "64", "must be at most prompts_per_step = 32"),
        ("occ_proxy", "grad", "must be one of logprob, hidden"),
        ("device", "gpu", "cannot be used here"),
        ("logp_impl", "triton", "must be auto, naive or chunked here"),
        ("regim", "occ", "unrecognized arguments: --regim"),
    ],
)
def test_wrong_values_are_named(capsys, flag, value, allowed):
    line = fails(capsys, f"--{flag}", value)
    assert flag in line and allowed in line


def test_flags_that_do_not_go_together(capsys):
    assert "--speculative True: must be left out" in fails(capsys, "--speculative", "--regime", "off")
    assert "--released True: must be left out" in fails(capsys, "--released", "--regime", "exact")
    assert "--lam_plus 0.5: must be left out with --released" in fails(
        capsys, "--released", "--lam_plus", "0.5"
    )
    assert "--occ_proxy hidden: must be left out" in fails(capsys, "--released", "--occ_proxy", "hidden")
    cfg, again = train.command_line(
        "--num_generations 1 --algo reinforce --task add,mul --tied --lam -0.5".split()
    )
    assert (cfg.out, cfg.tied, cfg.lam, again) == ("out/add+mul-occ-s0", True, -0.5, False)


@pytest.mark.parametrize("name", ("samples.txt", "ckpt.pt", "curves.png"))
def test_files_of_other_people_are_left_alone(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert f"has a {name}" in fails(capsys, "--out", str(tmp_path), "--cache_dir", str(tmp_path / "base"))
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("flag", ("out", "cache_dir"))
def test_a_folder_that_cannot_be_made(tmp_path, capsys, flag):
    (tmp_path / "file").write_text("mine")
    paths = {
        "out": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "base"),
        flag: str(tmp_path / "file" / "x"),
    }
    line = fails(capsys, "--out", paths["out"], "--cache_dir", paths["cache_dir"])
    assert "file" in line and (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "run").exists()  # found before anything was made


class Hostile:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_runs_are_refused_in_one_line(small, tmp_path, capsys):
    cfg = small()
    train.main(cfg)
    run, ckpt = Path(cfg.out), Path(cfg.out) / "ckpt.pt"
    good, state = ckpt.read_bytes(), torch.load(ckpt, weights_only=True)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert "--lr: with --resume a run keeps its own settings" in fails(
        capsys, "--resume", cfg.out, "--lr", "1"
    )
    assert "not a run: it has no metrics.jsonl" in fails(capsys, "--resume", str(tmp_path / "nowhere"))
    ckpt.write_bytes(good[: len(good) // 2])
    assert "ckpt.pt: not a readable checkpoint" in fails(capsys, "--resume", cfg.out)
    torch.save(Hostile(tmp_path / "ran"), ckpt)
    assert "ckpt.pt: not a readable checkpoint" in fails(capsys, "--resume", cfg.out)
    assert not (tmp_path / "ran").exists()
    torch.save(state | {"version": 0}, ckpt)
    assert "a checkpoint of version 0; this is version 2" in fails(capsys, "--resume", cfg.out)
    torch.save(state | {"model": {"wte.weight": torch.zeros(2, 2)}, "step": 0}, ckpt)
    assert "do not fit the sizes" in fails(capsys, "--resume", cfg.out)
    ckpt.unlink()
    assert "ckpt.pt: missing, though metrics.jsonl has 4 steps" in fails(capsys, "--resume", cfg.out)
    assert (run / "metrics.jsonl").read_text(encoding="utf-8") == "".join(
        lines
    )  # refused before anything was cut
    ckpt.write_bytes(good)
    for first_line, said in ((lines[0].replace('"nanoocc": 2', '"nanoocc": 7'), "a run of version 7; this is version 2"),
                             ("[]\n", "not the header of a run"), ("{torn\n", "not JSON"),
                             (lines[0].replace('"lam": 1.0, ', ""), "settings that differ: lam")):  # fmt: skip
        (run / "metrics.jsonl").write_text(first_line)
        assert said in fails(capsys, "--resume", cfg.out)


# ----------------------------------------------------------------------------------------------------------------------
# Any machine


def test_every_flag_is_explained_and_fits_any_terminal():
    """--help into a pipe whose encoding lacks λ and θ; in a locale that is not UTF-8."""
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in train.Config.__dataclass_fields__:
        assert f"--{name}" in done.stdout
    assert "[0.0002]" in done.stdout and len(train.Config.__dataclass_fields__) <= 42


def test_every_file_is_opened_as_utf_8():
    """open, read_text and write_text without an encoding take the machine's, which need not be UTF-8."""
    for name in ("model", "mtp", "occ", "rl", "eval", "train"):
        for number, line in enumerate((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines(), 1):
            if (
                any(call in line for call in ("open(", ".read_text(", ".write_text("))
                and "urlopen" not in line
            ):
                assert "encoding=" in line, f"{name}.py:{number}: {line}"


def test_float32_on_gpus_without_bfloat16_and_float64_only_where_there_is_one(monkeypatch):
    import model

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert model.hidden_dtype(torch.device("cuda")) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert model.hidden_dtype(torch.device("cuda")) == torch.bfloat16
    assert model.hidden_dtype(torch.device("cpu")) == torch.float32
    assert (
        occ.wide(torch.zeros(1)).dtype == torch.float64
        and occ.wide(torch.zeros(1, device="meta")).dtype == torch.float32
    )
