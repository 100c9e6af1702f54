"""What a run survives: kill -9 at any moment, a full disk, a second run, numbers that are not finite."""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import coin
from test_train import fails, metrics, resume

import eval as evaluation
import rl
import train

BUSY = dict(steps=8, save_every=1, eval_every=3, eval_problems=1)  # something is being written most of the time


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(module, name, n, action):
    """Replace module.name so that its n-th call runs action(*args) first."""
    original, calls = getattr(module, name), []

    def replaced(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            action(*args)
        return original(*args, **kwargs)

    setattr(module, name, replaced)


def tear_file(fd):
    """Half of a checkpoint has reached the disk."""
    os.ftruncate(fd, os.fstat(fd).st_size // 2)
    die()


def tear_line(run, record):
    run.files["metrics.jsonl"].write(json.dumps(record).encode()[:99])
    die()


POINTS = {  # what is patched, its n-th call, what happens instead
    "before pretraining": (train, "pretrain", 1, lambda *a: die()),
    "in pretraining": (train, "pretraining_batch", 2, lambda *a: die()),
    "before the first evaluation": (evaluation, "evaluate", 1, lambda *a: die()),
    "between log and checkpoint": (train, "save_atomically", 4, lambda *a: die()),
    "in a checkpoint": (train.os, "fsync", 6, tear_file),  # the base is there: two growing files, then the checkpoint
    "before it takes its name": (train.os, "replace", 2, lambda *a: die()),
    "half a line of metrics": (train.Run, "log", 2, tear_line),
    "in a rollout": (rl, "collect", 3, lambda *a: die()),
}


def child(config, again, point):
    """The whole life of a process that trains, until it ends or is ended."""
    rl.is_right, evaluation.plot = coin, lambda *a: None
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.os.fsync = lambda fd: None  # slow, and only for power cuts
    if point:
        module, name, n, action = POINTS[point]
        on_call(module, name, n, action)
    started = Path(config["out"], "metrics.jsonl").exists() and Path(config["out"], "metrics.jsonl").stat().st_size
    arguments = train.command_line(["--resume", config["out"]]) if again and started else (train.Config(**config),)
    sys.exit(train.main(*arguments))


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has torch imported and nothing run: they start at once, and can be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "tiktoken", "tqdm"])  # else imported by each process
    return context


def test_killed_at_twenty_moments(small, processes):
    """After kill -9 at each point of POINTS and at random times, a run ends as the unbroken one does."""
    whole = small("whole", cache_dir=small().cache_dir + " whole", **BUSY)
    train.main(whole)
    rng, kills, points, number, cfg = random.Random(0), 0, list(POINTS), 0, None
    while kills < 20 or cfg:
        if cfg is None:  # each run has a base of its own: pretraining is interrupted too
            number += 1
            cfg = small(f"broken{number}", cache_dir=f"{small().cache_dir} {number}", **BUSY)
        point = points.pop(0) if points else None
        process = processes.Process(target=child, args=(cfg.__dict__, True, point))
        process.start()
        process.join(None if point or kills >= 20 else rng.uniform(0.02, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL or process.exitcode == 0 and not point, (point, process.exitcode)
        kills += process.exitcode != 0
        if process.exitcode == 0:
            assert metrics(cfg) == metrics(whole), number
            assert {p.name for p in Path(cfg.out).iterdir()} == {"metrics.jsonl", "ckpt.pt", "samples.txt"}
            cfg = None
    assert number >= 2 and not points


def full(limit):
    """From now on this process can make no file longer than that: the system refuses, as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def fill_disk(config, room):
    """A run whose disk is full after step 3 but for `room` bytes behind the end of metrics.jsonl."""
    rl.is_right, evaluation.plot = coin, lambda *a: None
    sys.stderr = open(Path(config["out"]).parent / "stderr", "w")
    lines = Path(config["out"]) / "metrics.jsonl"
    on_call(train.Learner, "step", 4, lambda *a: full(lines.stat().st_size + room))
    with evaluation.reporting("train.py"):
        train.main(train.Config(**config))


@pytest.mark.parametrize("room, file", ((100, "metrics.jsonl"), (3000, "ckpt.pt")))
def test_a_full_disk_is_one_line_and_loses_nothing(small, processes, room, file):
    whole, broken = small("whole"), small("broken")
    train.main(whole)
    process = processes.Process(target=fill_disk, args=(broken.__dict__, room))
    process.start()
    process.join()
    assert process.exitcode == 1
    line = (Path(broken.out).parent / "stderr").read_text()
    assert line.startswith("train.py: error: ") and line.count("\n") == 1 and file in line, line
    assert f"the last good checkpoint is that of step 2; go on with: python train.py --resume {broken.out}" in line
    assert not list(Path(broken.out).glob("*.tmp"))
    text = (Path(broken.out) / "metrics.jsonl").read_text()
    assert text.endswith("}\n")  # not half a line
    assert resume(broken) == 0
    assert metrics(broken) == metrics(whole)


def test_two_runs_in_one_folder(small, capsys):
    cfg = small()
    train.main(cfg)
    before = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    first = train.Run(cfg, torch.load(Path(cfg.out) / "ckpt.pt", weights_only=True))
    assert f"{cfg.out}: another run is writing there" in fails(capsys, "--resume", cfg.out, "--steps", "6")
    assert before == {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    for f in first.files.values():
        f.close()
    assert resume(cfg, "--steps", "6") == 0


def test_a_run_that_moved_on_while_another_waited_for_it(small, capsys):
    """Resuming read a checkpoint before it had the lock: by then there may be a later one."""
    cfg = small()
    train.main(cfg)
    arguments = train.command_line(["--resume", cfg.out, "--steps", "6"])
    assert resume(cfg, "--steps", "8") == 0
    before = {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}
    with pytest.raises(ValueError, match="another run has just written there; try again"):
        train.main(*arguments)
    assert before == {p.name: p.read_bytes() for p in Path(cfg.out).iterdir()}


def test_an_empty_metrics_file_is_no_run(small, capsys):
    """Killed between making the file and its first line: one starts it again."""
    cfg = small()
    Path(cfg.out).mkdir()
    (Path(cfg.out) / "metrics.jsonl").touch()
    assert "metrics.jsonl: empty: the run never began; start it again" in fails(capsys, "--resume", cfg.out)
    assert train.main(cfg) == 0


def test_two_runs_that_start_together(small):
    """Both found the folder empty: the lock decides."""
    cfg = small()
    first = train.Run.create(cfg, torch.device("cpu"))
    (Path(cfg.out) / "samples.txt").unlink()  # as the second saw it
    with pytest.raises(ValueError, match="another run is writing there"):
        train.Run.create(cfg, torch.device("cpu"))
    assert first.files["metrics.jsonl"].tell() == (Path(cfg.out) / "metrics.jsonl").stat().st_size > 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="skipped: needs a folder that even root cannot write to")
@pytest.mark.parametrize("flag", ("out", "cache_dir"))
def test_a_folder_where_nothing_can_be_written(tmp_path, capsys, flag):
    paths = {"out": str(tmp_path / "run"), "cache_dir": str(tmp_path / "base"), flag: "/proc/self"}
    assert "/proc/self" in fails(capsys, "--out", paths["out"], "--cache_dir", paths["cache_dir"])
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(small, monkeypatch, capsys):
    """The loss is finite all the while."""
    cfg, losses, calls = small(save_every=1, probe_every=0), rl.losses, []

    def broken(model, *args):
        out = losses(model, *args)
        calls.append(1)
        spoiled = (0 * model.wte.weight).square().sum().sqrt()  # 0, with the gradient 0/0
        return out._replace(rl=out.rl + spoiled) if len(calls) == 6 else out

    monkeypatch.setattr(rl, "losses", broken)
    with pytest.raises(SystemExit) as exit, evaluation.reporting("train.py"):
        train.main(cfg)
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert "step 3: grad_norm/trunk is not finite; the last good checkpoint is that of step 2; go on with" in error
    ckpt = torch.load(Path(cfg.out) / "ckpt.pt", weights_only=True)
    assert ckpt["step"] == 2 and all(torch.isfinite(p).all() for p in ckpt["model"].values())


def test_a_vocabulary_larger_than_the_tokenizers(small, capsys):
    """The rows that the tokenizer lacks can be sampled; they read as no answer."""
    cfg = small(vocab_size=600, eval_k=4)
    assert train.main(cfg) == 0
    assert torch.load(Path(cfg.out) / "ckpt.pt", weights_only=True)["model"]["wte.weight"].shape == (600, 16)
    assert "\ufffd" in (Path(cfg.out) / "samples.txt").read_text()
    assert evaluation.score(evaluation.parse(["score", cfg.out, "--k", "2", "--problems", "2"]))
    line = fails(capsys, "--vocab_size", "100", "--out", cfg.out + "2")
    assert "--vocab_size 100: must be 0, or at least the tokenizer's 257" in line
    assert not Path(cfg.out + "2").exists()
