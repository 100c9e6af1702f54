"""Runs: what they log, that they repeat, resume and refuse, and that regimes are isolated over several steps."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import PLOT, coin

import eval as evaluation
import occ
import rl
import train


def metrics(cfg, clock=False):
    """The lines behind the header, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(cfg.out) / "metrics.jsonl").read_text().splitlines()[1:]]
    return [{k: v for k, v in r.items() if clock or not k.startswith(("time", "perf/"))} for r in lines]


def weights(cfg, part="model"):
    return torch.load(Path(cfg.out) / "ckpt.pt", weights_only=True)[part]


def base(cfg):
    return train.pretrained(cfg, rl.get_tokenizer("bytes"), torch.device("cpu"), ())


def resume(cfg, *flags):
    return train.main(*train.command_line(["--resume", cfg.out, *flags]))


def fails(capsys, *argv):
    """The one line on stderr of a command that must exit with code 2."""
    with pytest.raises(SystemExit) as exit, evaluation.reporting("train.py"):
        train.main(*train.command_line(list(argv)))
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("train.py: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


# What a run leaves


@pytest.mark.parametrize("regime", occ.REGIMES)
def test_a_run_of_each_regime(small, regime, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "plot", PLOT)
    cfg = small(regime=regime, mtp_depth=2)
    assert train.main(cfg) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("score ") and line.endswith(f"the run is in {cfg.out}")
    assert {p.name for p in Path(cfg.out).iterdir()} == {"metrics.jsonl", "ckpt.pt", "samples.txt", "curves.png"}
    header = json.loads((Path(cfg.out) / "metrics.jsonl").read_text().splitlines()[0])
    assert set(header) == {"config", "seed", "commit", "data", "versions", "device"}
    assert header["config"]["regime"] == regime
    records = metrics(cfg, clock=True)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    keys = (
        "reward/mean reward/frac_zero_std response_length/mean actor/loss actor/clip_frac_low actor/clip_frac_high "
        "actor/entropy actor/ratio_max grad_norm/trunk grad_norm/heads perf/rollout_s perf/update_s perf/tokens_per_s"
    )
    heads = "mtp/loss_1 mtp/loss_2 mtp/ratio_max_2 mtp/clip_frac_2 mtp/agreement_2 occ/lam occ/c_hat occ/v2_hat"
    probes = "occ/c occ/v2 occ/cos occ/lam_star occ/c_split"
    assert set(keys.split()) <= set(records[1])
    assert set(heads.split()) <= set(records[1]) or regime == "off"
    for r in records:
        assert ("eval/score" in r) == (r["step"] in (0, 2, 4))
        assert (set(probes.split()) <= set(r)) == (r["step"] in (2, 4) and regime != "off")
        assert all(isinstance(v, (int, float)) and v == v for k, v in r.items() if k != "mtp/logp_impl")
    assert records[1]["mtp/logp_impl"] == "naive"
    assert "reward" in (Path(cfg.out) / "samples.txt").read_text()


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
    assert all(not torch.equal(runs["off"][name], start[name]) for name in start)  # and the trunk did move


def test_heads_learn_when_detached(small):
    cfg = small(regime="detach")
    train.main(cfg)
    start = base(cfg)["heads"]
    assert all(not torch.equal(p, start[name]) for name, p in weights(cfg, "heads").items())


def test_one_update_a_rollout_leaves_lambda_at_zero_and_says_so(small, capfd):
    cfg = small(updates_per_rollout=1)
    train.main(cfg)
    assert [r["occ/lam"] for r in metrics(cfg)[1:]] == [0, 0, 0, 0]
    assert "lambda_t stays 0" in capfd.readouterr().out
    several = small("several")
    train.main(several)
    assert any(r["occ/lam"] != 0 for r in metrics(several)[1:])


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


def test_lam_scope_all_scales_what_the_heads_learn(small):
    heads = {}
    for name, changes in (("full", {}), ("none", dict(lam=0.0)), ("all", dict(lam=0.0, lam_scope="all"))):
        cfg = small(name, regime="ce", **changes)
        train.main(cfg)
        heads[name] = weights(cfg, "heads")
    start = base(cfg)["heads"]
    moved = {name: sum((p - start[key]).norm() for key, p in h.items()) for name, h in heads.items()}
    assert moved["all"] == 0 < moved["none"]


# Repeating and resuming


def test_same_seed_same_log(small):
    logs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = small(name, seed=seed)
        train.main(cfg)
        logs[name] = metrics(cfg)
    assert logs["a"] == logs["b"] != logs["c"]


@pytest.mark.parametrize(
    "changes", ({}, {"algo": "grpo"}, {"regime": "exact"}, {"occ_proxy": "hidden"}, {"regime": "off"})
)
def test_resumed_equals_unbroken(small, changes):
    whole, broken = small("whole", **changes), small("broken", **changes)
    train.main(whole)
    original = train.Run.log

    def log(run, record):
        original(run, record)
        if record.get("step") == 3 and run.dir.name == "broken":
            raise KeyboardInterrupt  # with step 3 written, and a checkpoint of step 2

    train.Run.log = log
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(broken)
    finally:
        train.Run.log = original
    with open(Path(broken.out) / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "torn')
    assert resume(broken) == 0
    assert metrics(broken) == metrics(whole)
    assert (Path(broken.out) / "samples.txt").read_text() == (Path(whole.out) / "samples.txt").read_text()
    assert all(torch.equal(a, b) for a, b in zip(weights(broken).values(), weights(whole).values()))


def test_interrupted_before_the_first_checkpoint(small, monkeypatch):
    whole, broken = small("whole"), small("broken", cache_dir=str(Path(small().out).parent / "other"))
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
    collect, calls = rl.collect, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return collect(*args)

    monkeypatch.setattr(rl, "collect", interrupted)
    before, at_term = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        assert train.main(broken, stop=train.on_ctrl_c()) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a second Ctrl-C ends it at once
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, at_term)
    assert f"stopped after step 3; go on with: python train.py --resume {broken.out}" in capsys.readouterr().out
    assert resume(broken) == 0
    assert metrics(broken) == metrics(whole)


def test_resume_can_extend_a_run_and_remembers_how_far(small, capsys):
    cfg, longer = small("short"), small("long", steps=8)
    train.main(cfg)
    train.main(longer)
    stop = train.command_line(["--resume", cfg.out, "--steps", "8"])
    assert train.main(*stop, stop=[1]) == 130  # stopped on the way
    assert len(metrics(cfg)) == 1 + 5
    assert "--steps 4: must be 5 or more" in fails(capsys, "--resume", cfg.out, "--steps", "4")
    assert resume(cfg) == 0
    assert metrics(cfg) == metrics(longer)


def test_resuming_twice(small, monkeypatch):
    """Cut back past an evaluation, stopped before the next one, and resumed again."""
    often = dict(save_every=3, eval_every=5, steps=6)
    whole, broken = small("whole", **often), small("broken", **often)
    train.main(whole)
    original = train.Run.log
    monkeypatch.setattr(
        train.Run, "log", lambda run, r: original(run, r) or r["step"] == 5 and (_ for _ in ()).throw(MemoryError)
    )
    with pytest.raises(MemoryError):
        train.main(broken)
    monkeypatch.undo()
    monkeypatch.setattr(rl, "is_right", coin)
    assert train.main(*train.command_line(["--resume", broken.out]), stop=[1]) == 130
    assert resume(broken) == 0
    assert metrics(broken) == metrics(whole)
    assert (Path(broken.out) / "samples.txt").read_text() == (Path(whole.out) / "samples.txt").read_text()


# What is logged


@pytest.mark.parametrize(
    "changes",
    (
        {"algo": "reinforce"},
        {"algo": "drgrpo"},
        {"algo": "gspo"},
        {"advantage": "loo"},
        {"mtp_base": "main", "lam_scope": "all", "occ_average": "ratios"},
        {"occ_proxy": "hidden", "mtp_depth": 2},
        {"regime": "exact", "mtp_design": "parallel"},
        {"logp_impl": "chunked", "temperature": 0.7},
    ),
)
def test_variants_run_and_lambda_moves(small, changes):
    cfg = small(**changes)
    assert train.main(cfg) == 0
    assert any(r["occ/lam"] != 0 for r in metrics(cfg)[1:])


def test_naive_and_chunked_give_the_same_metrics(small):
    logs = []
    for impl in ("naive", "chunked"):
        train.main(small(impl, logp_impl=impl))
        logs.append(metrics(small(impl, logp_impl=impl)))
    for a, b in zip(*logs):
        compared = set(a) - {"mtp/logp_impl", "occ/lam_ratios"}  # ratios: δ of single tokens may be rounding noise
        assert all(a[key] == pytest.approx(b[key], rel=1e-2, abs=1e-4) for key in compared)
    assert logs[1][1]["mtp/logp_impl"] == "chunked"


def test_the_kl_is_to_the_frozen_base(small):
    cfg = small(algo="grpo", updates_per_rollout=1)
    train.main(cfg)
    kl = [r["actor/kl"] for r in metrics(cfg)[1:]]
    assert abs(kl[0]) < 1e-6 < kl[1] < kl[3]


def test_the_probe_sees_the_minibatch_as_the_update_does(small):
    cfg = small(regime="exact", dynamic_sampling=False)
    train.main(cfg)
    probes = [r for r in metrics(cfg) if "occ/c" in r]
    assert probes and all(r["occ/lam"] == pytest.approx(r["occ/lam_star"], rel=1e-3) for r in probes)


def test_summary():
    updates = [{"a": 1.0, "mtp/ratio_max_1": 5.0, "occ/lam": 0.0}, {"a": 2.0, "mtp/ratio_max_1": 3.0, "occ/lam": 0.4}]
    assert train.summary(updates) == {"a": 1.5, "mtp/ratio_max_1": 5.0, "occ/lam": 0.4}
    assert train.summary([]) == {}


# Runs that cannot learn


def test_a_rollout_where_all_are_wrong_changes_nothing(small, monkeypatch):
    monkeypatch.setattr(rl, "is_right", lambda problem, text: False)
    cfg = small(overlong=False)
    assert train.main(cfg) == 0
    start = base(cfg)["model"]
    assert all(torch.equal(p, start[name]) for name, p in weights(cfg).items())
    assert all(r["reward/frac_zero_std"] == 1 for r in metrics(cfg)[1:])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(small, monkeypatch, capsys):
    cfg, losses, calls = small(save_every=1), rl.losses, []

    def broken(*args):
        out = losses(*args)
        calls.append(1)
        return out._replace(rl=out.rl * float("nan")) if len(calls) == 5 else out

    monkeypatch.setattr(rl, "losses", broken)
    monkeypatch.setattr(train.Learner, "probe", lambda *a, **k: ({},))
    monkeypatch.setattr(train.Learner, "probe_step", lambda *a: {})
    with pytest.raises(SystemExit) as exit, evaluation.reporting("train.py"):
        train.main(cfg)
    assert exit.value.code == 1
    assert (
        "step 3: actor/loss is not finite; the last good checkpoint is that of step 2; go on with: python train.py"
        in capsys.readouterr().err
    )
    monkeypatch.undo()
    assert all(torch.isfinite(p).all() for p in weights(cfg).values())


# Mistakes


@pytest.mark.parametrize(
    "flag, value, allowed",
    [
        ("regime", "mtp", "must be one of off, detach, ce, policy, occ, exact"),
        ("algo", "ppo", "must be one of reinforce, grpo, drgrpo, dapo, gspo"),
        ("task", "add,gsm", "unknown suite 'gsm'; allowed: arithmetic, or some of add,sub"),
        ("tokenizer", "words", "must be one of bytes, gpt2"),
        ("steps", "0", "must be above 0"),
        ("n_layer", "-1", "must be above 0"),
        ("n_embd", "30", "must be a multiple of 2·n_head = 8"),
        ("mtp_depth", "0", "must be above 0"),
        ("num_generations", "1", "must be 2 or more"),
        ("temperature", "0", "must be above 0"),
        ("lr", "nan", "must be above 0"),
        ("lam", "nan", "must be a finite number"),
        ("dual_clip", "0.5", "must be above 1"),
        ("seed", "99999999999", "must be 0 or more"),
        ("max_new_tokens", "4", "must be 11 or more for this task and difficulty"),
        ("lr", "fast", "invalid float value: 'fast'"),
        ("careless", "1.5", "must be a share from 0 to 1"),
        ("difficulty", "9", "must be 1 to 8"),
        ("updates_per_rollout", "64", "must be at most prompts_per_step = 32"),
        ("occ_proxy", "grad", "must be one of logprob, hidden"),
        ("regim", "occ", "unrecognized arguments: --regim"),
    ],
)
def test_wrong_values_are_named(capsys, flag, value, allowed):
    line = fails(capsys, f"--{flag}", value)
    assert flag in line and allowed in line


def test_cuda_is_refused_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: must be cpu here" in fails(capsys, "--device", "cuda")


def test_a_folder_that_holds_a_run_is_left_alone(small, capsys):
    cfg = small()
    train.main(cfg)
    before = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    assert f"--resume {cfg.out}" in fails(capsys, "--out", cfg.out)
    assert before == {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}


@pytest.mark.parametrize("name", ("samples.txt", "ckpt.pt", "curves.png"))
def test_files_of_other_people_are_left_alone(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert f"has a {name}" in fails(capsys, "--out", str(tmp_path), "--cache_dir", str(tmp_path / "base"))
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("flag", ("out", "cache_dir"))
def test_a_folder_that_cannot_be_made(tmp_path, capsys, flag):
    (tmp_path / "file").write_text("mine")
    paths = {"out": str(tmp_path / "run"), "cache_dir": str(tmp_path / "base"), flag: str(tmp_path / "file" / "x")}
    line = fails(capsys, "--out", paths["out"], "--cache_dir", paths["cache_dir"])
    assert "file" in line and (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "run").exists()  # found before anything was made


def test_group_of_one(capsys):
    assert "--num_generations 1: must be 2 or more" in fails(capsys, "--num_generations", "1")
    assert "--num_generations 1" in fails(
        capsys, "--num_generations", "1", "--advantage", "batch"
    )  # dapo would drop it
    assert train.command_line("--num_generations 1 --algo reinforce".split())[0].num_generations == 1


def test_resume_takes_no_other_flag(small, capsys):
    cfg = small()
    train.main(cfg)
    assert "--lr: with --resume a run keeps its own settings" in fails(capsys, "--resume", cfg.out, "--lr", "1")


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
    assert "not a run: it has no metrics.jsonl" in fails(capsys, "--resume", str(tmp_path / "nowhere"))
    good = ckpt.read_bytes()
    ckpt.write_bytes(good[: len(good) // 2])
    assert "ckpt.pt: not a readable checkpoint" in fails(capsys, "--resume", cfg.out)
    torch.save(Hostile(tmp_path / "ran"), ckpt)
    assert "ckpt.pt: not a readable checkpoint" in fails(capsys, "--resume", cfg.out)
    assert not (tmp_path / "ran").exists()
    ckpt.write_bytes(good)
    state = torch.load(ckpt, weights_only=True)
    torch.save(state | {"version": 0}, ckpt)
    assert "a checkpoint of version 0; this is version 1" in fails(capsys, "--resume", cfg.out)
    torch.save({"version": 1, "model": state["model"]}, ckpt)
    assert "ckpt.pt: not a readable checkpoint" in fails(capsys, "--resume", cfg.out)
    before = (run / "metrics.jsonl").read_bytes()
    torch.save(state | {"model": {"wte.weight": torch.zeros(2, 2)}, "sizes": dict.fromkeys(state["sizes"], 0)}, ckpt)
    assert "do not fit the sizes" in fails(capsys, "--resume", cfg.out)
    ckpt.unlink()
    assert "ckpt.pt: missing, though metrics.jsonl has 4 steps" in fails(capsys, "--resume", cfg.out)
    assert (run / "metrics.jsonl").read_bytes() == before  # refused before anything was cut
    (tmp_path / "thesis.txt").write_text("mine")
    torch.save(state | {"sizes": state["sizes"] | {str(tmp_path / "thesis.txt"): 0}}, ckpt)
    assert resume(cfg) == 0 and (tmp_path / "thesis.txt").read_text() == "mine"
    capsys.readouterr()
    ckpt.write_bytes(good)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    assert "metrics.jsonl: shorter than the" in fails(capsys, "--resume", cfg.out)
    (run / "metrics.jsonl").write_text(lines[0].replace('"nanoocc": 1', '"nanoocc": 7'))
    assert "metrics.jsonl:1: a run of version 7; this is version 1" in fails(capsys, "--resume", cfg.out)
    (run / "metrics.jsonl").write_text("[]\n")
    assert "metrics.jsonl:1: not the header of a run" in fails(capsys, "--resume", cfg.out)
    (run / "metrics.jsonl").write_text("{torn\n")
    assert "metrics.jsonl:1: not JSON" in fails(capsys, "--resume", cfg.out)
    assert ckpt.read_bytes() == good


def test_a_damaged_cache_is_made_again(small):
    cfg = small("a")
    train.main(cfg)
    (path,) = Path(cfg.cache_dir).iterdir()
    path.write_bytes(b"half a file")
    again = small("b")
    train.main(again)
    assert metrics(again) == metrics(cfg)
    torch.save({"model": {}}, path)  # a whole file, but not this model's
    again = small("c")
    train.main(again)
    assert metrics(again) == metrics(cfg)


def test_a_crash_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    train.save_atomically({"step": 1}, path)
    monkeypatch.setattr(train.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        train.save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_every_flag_that_scripts_rely_on_exists():
    flags = (
        "regime algo task tokenizer seed steps lr prompts_per_step num_generations updates_per_rollout max_new_tokens "
        "temperature n_layer n_head n_embd mtp_depth mtp_design lam lam_plus occ_proxy mtp_base lam_scope out "
        "save_every eval_every probe_every device"
    )
    assert set(flags.split()) <= set(train.Config.__dataclass_fields__)
    cfg, ckpt, again = train.command_line(
        "--task add,mul --no-dynamic_sampling --tied --lam -0.5 --advantage loo".split()
    )
    assert (cfg.out, cfg.tied, cfg.lam, ckpt, again) == ("out/add+mul-occ-s0", True, -0.5, None, False)
    assert cfg.algorithm() == train.dataclasses.replace(rl.ALGOS["dapo"], dynamic_sampling=False, advantage="loo")


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        train.command_line(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in train.Config.__dataclass_fields__) and "[0.0002]" in text
