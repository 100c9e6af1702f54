"""Runs: what they print and log, that regimes are isolated, that they resume and refuse."""

import errno
import io
import itertools
import math
import os
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import PLOT, metrics

import eval as evaluation
import occ
import rl
import train

CUDA = torch.cuda.is_available()


def weights(cfg, part="model", base=False):
    (path,) = Path(cfg.cache_dir).iterdir() if base else [Path(cfg.out) / "ckpt.pt"]
    return torch.load(path, weights_only=True)[part]


def moved(before, after):
    """Names of the parameters in which two states of a module differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def start(*argv):
    train.main(*train.command_line(list(argv)))


def follow(error):
    """Do what a message says one can go on with, as a shell would."""
    start(*shlex.split(error.split("go on with: python train.py ")[1]))


@pytest.fixture
def fails(capsys):
    """Calls a function that must end the program by one line on stderr, which it returns."""

    def call(function, *args, code=2):
        with pytest.raises(SystemExit) as exit, evaluation.reporting("train.py"):
            function(*args)
        error = capsys.readouterr().err
        assert exit.value.code == code and error.count("\n") == 1, error
        return error

    return call


@pytest.mark.parametrize("regime, changes", [
    ("off", dict(algo="reinforce")), ("detach", dict(algo="rloo", tied=True)),
    ("ce", dict(algo="grpo", temperature=0.7, updates_per_rollout=1)), ("occ", dict(algo="cispo")),
    ("policy", dict(algo="gspo", mtp_design="parallel")),
    ("exact", dict(algo="drgrpo", tied=True, mtp_design="parallel")),
    pytest.param("occ", dict(device="cuda"), marks=pytest.mark.skipif(not CUDA, reason="no CUDA")),
])  # fmt: skip
def test_a_run_of_each_regime(trained, regime, changes, capsys, monkeypatch):
    if regime == "occ":
        monkeypatch.setattr(evaluation, "plot", PLOT)
    cfg = trained(regime=regime, mtp_depth=2, keep="0,3", **changes)
    device = "cpu, 1 threads" if cfg.device == "cpu" else torch.cuda.get_device_name()
    first = f"{cfg.out}: 1 x {device}, matrix products in float32"
    starts = [
        first,
        "curves so far",
        "pretraining: 3 steps of 8 ",
        "step 0: score ",
        "step 2: right ",
    ]
    lines = capsys.readouterr().out.splitlines()
    for line, expected in zip(lines, [*starts, "step 4: ", "score ", "look at "], strict=True):
        assert line.startswith(expected)
    files = ["ckpt-0.pt", "ckpt-3.pt", "ckpt.pt", "curves.png", "metrics.jsonl"]
    assert sorted({p.name for p in Path(cfg.out).iterdir()} | {"curves.png"}) == files
    assert (Path(cfg.out) / "curves.png").exists() == (regime == "occ")
    header, records = evaluation.read_metrics(cfg.out)
    assert header["config"] == vars(cfg) and header["command"] == sys.argv
    assert header["shape"]["vocab_size"] == 257 and header["shape"]["tied"] == cfg.tied
    assert header["versions"]["torch"] == torch.__version__ and header["data"] == {}
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    for r in records:
        assert r.get("rollout/logp_gap", 0) < 1e-4  # what is sampled from is what is scored
        assert ("eval/score" in r) == (r["step"] in (0, 2, 4))
        assert ("occ/c" in r) == (r["step"] in (2, 4) and regime != "off")
        if regime == "exact" and "occ/c" in r:
            assert r["occ/lam"] == pytest.approx(r["occ/lam_exact"], rel=1e-3)
    assert any(r.get("occ/lam") for r in records) == (regime not in ("off", "detach"))
    assert (records[-1]["actor/kl"] > 1e-6) == (cfg.algo == "grpo")  # to the frozen base


@pytest.mark.parametrize("mixed, share", [(1, 6), (2, 11)])  # of 18 prompts
def test_whether_there_is_something_to_learn_is_told(small, monkeypatch, capsys, mixed, share):
    """Of some held-out prompts one of two samples is right; all others are, which moves nothing."""
    prompts = [p.prompt for p in rl.held_out_problems("add", 2, 3)[:mixed]]
    calls, cfg = itertools.count(), small(eval_problems=3)

    def reward(problem, text):
        return problem.prompt not in prompts or next(calls) % 2 == 0

    monkeypatch.setattr(rl, "is_right", reward)
    train.main(cfg)
    little = "; RL has little to learn from here" if mixed == 1 else ""
    said = f"; {share} % of the prompts have both right and wrong samples{little}\n"
    assert said in capsys.readouterr().out
    assert not moved(weights(cfg, base=True), weights(cfg))


@pytest.mark.parametrize("depth", (1, 2))
@pytest.mark.parametrize("design", ("sequential", "parallel"))
@pytest.mark.parametrize("tied", (False, True))
def test_off_and_detach_move_the_trunk_alike_bit_by_bit(trained, tied, design, depth):
    sizes = dict(tied=tied, mtp_design=design, mtp_depth=depth, steps=2, task="add,mul")
    names = "off", "detach", "policy"
    off, detach, policy = (trained(name, regime=name, **sizes) for name in names)
    assert not moved(weights(off), weights(detach))
    assert moved(weights(off), weights(policy)) and moved(weights(off), weights(off, base=True))
    heads = weights(detach, "heads", base=True)
    assert moved(heads, weights(detach, "heads")) == set(heads)


def test_pretraining_is_careful_first_and_scores_a_solution_and_its_end(small):
    cfg, wrong = small(task="add", careless=1.0, pretrain_steps=10, pretrain_batch=40), []
    for step in (0, 4, 5, 9):
        wrong.append(0)
        for tokens, mask in zip(*train.pretraining_batch(cfg, step)):
            scored = cfg.tok().decode(tokens[1:][mask].tolist())
            before = cfg.tok().decode(tokens[: 1 + mask.nonzero().min()].tolist())
            (answer,) = re.fullmatch(r"####(\d+)<\|endoftext\|>", scored).groups()
            a, b, answer = (int(x[::-1]) for x in [*before.removesuffix("=").split("+"), answer])
            wrong[-1] += a + b != answer
    assert wrong[:2] == [0, 0] and min(wrong[2:]) > 5


def test_muon_moves_a_stack_as_each_matrix_alone_and_heads_join_late():
    """Singular values of an update are near 1, whatever those of the gradient."""
    params = [torch.nn.Parameter(torch.zeros(size)) for size in [(8, 20)] * 3 + [(20, 8)]]
    copies = [torch.nn.Parameter(torch.zeros_like(p)) for p in params]
    stacked, alone = train.Muon(params), [train.Muon([p]) for p in copies]
    for step in range(3):
        before = [p.detach().clone() for p in params]
        for i in {0, 1, 3} if step == 0 else range(4):  # the last of its shape joins late
            params[i].grad = torch.randn_like(params[i]) * 10.0 ** (i - step)
            params[i].grad[:4] *= 0.1
            copies[i].grad = params[i].grad.clone()
            alone[i].step(1.0)
        stacked.step(1.0)
        for p, q, old in zip(params, copies, before):
            assert torch.allclose(p, q, atol=1e-4)
            values = torch.linalg.svdvals(p.detach() - old) / max(1, len(p) / 8) ** 0.5
            assert p.grad is None or (values.min() > 0.5 and values.max() < 1.5)


def break_down(monkeypatch, module, name, number, error):
    """The n-th call of a function raises an error."""
    function, calls = getattr(module, name), itertools.count(1)

    def patched(*args, **kwargs):
        if next(calls) == number:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, patched)


@pytest.mark.parametrize("changes, module, name, number", [
    ({}, train, "pretraining_batch", 2), ({}, rl, "evaluate", 1),  # before the first checkpoint
    ({"algo": "grpo"}, rl, "rollout", 4), ({"regime": "off"}, rl, "rollout", 3),
    ({"regime": "exact"}, os, "replace", 3), ({}, Path, "write_bytes", 3),  # step 2 is saved
])  # fmt: skip
def test_resumed_equals_unbroken(trained, small, monkeypatch, fails, changes, module, name, number):
    """One goes on in the same program as the last line says; the folder's name has a space."""
    whole, broken = trained("whole", **changes), small("a run", **changes)
    broken.cache_dir = f"{broken.out}/base"  # pretrained again
    full = name == "write_bytes"
    error = OSError(errno.ENOSPC, "No space left on device") if full else KeyboardInterrupt()
    with monkeypatch.context() as patch:
        break_down(patch, module, name, number, error)
        said = fails(train.main, broken, code=1 if full else 130)
    assert not full or f"{broken.out}: cannot be written (No space left" in said
    if module in (os, Path):  # the old checkpoint is whole
        assert weights(broken, "step") == 0 and not list(Path(broken.out).glob("*.tmp"))
    with open(Path(broken.out) / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "torn')
    if name not in ("pretraining_batch", "evaluate"):  # from a checkpoint on, no base is needed
        monkeypatch.setattr(train, "pretrained", None)
    follow(said)
    assert metrics(broken) == metrics(whole) and not moved(weights(broken), weights(whole))


def test_a_run_can_be_made_longer(trained, monkeypatch, fails):
    """Also when it is interrupted at once, and one goes on as it says."""
    assert train.Config().save_every == 25
    longer, run = trained("longer", steps=6), trained("a run")
    assert "--steps 2: must be 4 or more" in fails(start, "--resume", run.out, "--steps", "2")
    assert "--lr: with --resume a run" in fails(start, "--resume", run.out, "--lr", "1")
    flags = ["--resume", run.out, "--steps", "6", "--device", "cpu"]
    with monkeypatch.context() as patch:
        break_down(patch, rl, "rollout", 1, KeyboardInterrupt())
        said = fails(start, *flags, code=130)
    follow(said)
    assert metrics(run) == metrics(longer) and not moved(weights(run), weights(longer))
    assert train.command_line(["--resume", run.out])[0].steps == 6


def test_one_run_a_folder_where_there_are_locks(trained, monkeypatch, capsys, fails):
    cfg = trained("a run")
    before = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    first = train.Run(cfg, True, 4)
    assert f"{cfg.out}: another run is writing there" in fails(start, "--resume", cfg.out)
    first.log.close()
    assert f"go on with --resume '{cfg.out}', or" in fails(start, "--out", cfg.out)
    assert before == {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    break_down(monkeypatch, pytest.importorskip("fcntl"), "flock", 1, OSError(errno.ENOLCK, "none"))
    assert len(metrics(trained("other"))) == 5
    assert capsys.readouterr().out.count("note: no lock keeps other runs out") == 1


def test_a_number_that_is_not_finite_stops_the_run(small, monkeypatch, fails):
    cfg, lams = small(save_every=1, updates_per_rollout=1), iter([0.0, 0.0, math.nan])
    monkeypatch.setattr(occ, "coefficient", lambda *args: next(lams))
    error = fails(train.main, cfg, code=1)
    last = "the last good checkpoint is that of step 2; go on with: python train.py --resume "
    assert f"step 3: grad_norm/trunk is not finite; {last}{cfg.out}" in error
    assert all(torch.isfinite(p).all() for p in weights(cfg).values())


def test_two_steps_with_the_settings_for_one_gpu(tmp_path, monkeypatch, small):
    """On a CPU, in a thread, below the home folder. CUDA is left alone.

    Few samples are right: few prompts are left for the updates, which take most of the time.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(rl, "is_right", lambda problem, text: text.startswith("0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", None)  # to call it would raise
    flags = "--difficulty 3 --n_layer 1 --n_head 8 --n_embd 256 --prompts_per_step 128 --device cpu"
    flags += " --num_generations 16 --pretrain_batch 512 --lr 1e-4 --steps 2 --pretrain_steps 1"
    flags += " --eval_problems 1 --eval_k 1 --probe_every 0 --task add --max_new_tokens 12"
    flags += " --lam -1e-3 --out=~/x --cache_dir=~/c --data_dir=~/d"
    cfg, _ = train.command_line(flags.split())
    with ThreadPoolExecutor(1) as thread:
        thread.submit(train.main, cfg).result()
    assert [cfg.out, cfg.cache_dir, cfg.data_dir] == [f"{tmp_path}/{name}" for name in "xcd"]
    assert cfg.lam == -0.001 and train.command_line(["--resume", "~/x"]) == (cfg, True)
    assert [r["step"] for r in metrics(cfg)] == [0, 1, 2] and metrics(cfg)[2]["occ/lam"] != 0


@pytest.mark.parametrize("flags, said", [  # flags, and what must be said of them
    ("--regime mtp", f"--regime mtp: must be one of {', '.join(occ.REGIMES)}"),
    ("--task add,gsm", "--task: unknown suite 'gsm'; allowed: some of arithmetic,add,sub"),
    ("--temperature 1e-38", "--temperature 1e-38: must be 0.01 or more"),
    ("--lr nan", "--lr nan: must be above 0"), ("--regim occ", "unrecognized arguments: --regim"),
    ("--max_new_tokens 8", "--max_new_tokens 8: must be 10 or more for all solutions of add"),
    ("--max_new_tokens 11", "--max_new_tokens 11: must be 12 or more"),  # for no penalty
    ("--device gpu", "--device gpu: cannot be used here"),
    ("--device cuda:77", "--device cuda:77: cannot be used here"),
    ("--logp_impl triton --device cpu", "--logp_impl triton: must be auto, naive or chunked"),
])  # fmt: skip
def test_wrong_flags_are_named(fails, tmp_path, flags, said):
    assert said in fails(start, "--out", str(tmp_path / "x"), *flags.split())


def test_damaged_runs_are_refused_in_one_line(trained, fails):
    cfg = trained()
    log, ckpt = Path(cfg.out) / "metrics.jsonl", Path(cfg.out) / "ckpt.pt"
    good, state, text = ckpt.read_bytes(), torch.load(ckpt, weights_only=True), log.read_bytes()
    for path, damaged, said in (
        (ckpt, good[: len(good) // 2], "ckpt.pt: not a readable checkpoint"),
        (ckpt, state | {"step": os.system}, "ckpt.pt: not a readable"),  # it names a function
        (ckpt, None, "ckpt.pt: missing, though"),
        (log, b"{torn\n", "metrics.jsonl:1: not JSON"),
        (log, b"[]\n", "metrics.jsonl:1: not "),
        (log, text + b"[]\n", "metrics.jsonl:7: not "),
        (log, text.replace(b'"nanoocc": ', b'"nanoocc": 9'), "of version 9"),
        (log, text.replace(b'"lam": 1.0, ', b""), "settings that differ: lam"),
    ):
        path.unlink()
        if isinstance(damaged, dict):
            torch.save(damaged, path)
        elif damaged:
            path.write_bytes(damaged)
        assert said in fails(start, "--resume", cfg.out)
        (log.write_bytes(text), ckpt.write_bytes(good))


def test_help_names_every_flag_in_any_terminal(monkeypatch):
    """Into a pipe whose encoding lacks λ and θ."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    for read in (train.command_line, evaluation.parse):
        with pytest.raises(SystemExit, match="0"), evaluation.reporting("train.py"):
            read(["--help"])
    sys.stdout.seek(0)
    text = sys.stdout.read()
    assert all(f"--{name} " in text for name in train.Config.__dataclass_fields__)
