"""Evaluate: score a run on held-out problems, and plot what happened in one run or several.

    python eval.py score out/arithmetic-occ-s0 --k 32       # avg@k and pass@k with 95 % intervals, as a table
    python eval.py score out/gsm8k_train-occ-s0 --suite competition   # on the paper's six sets of real problems
    python eval.py plot out/arithmetic-*                    # reward, score, λ_t, c_t, v_t² and the two terms of Δ_MTP

avg@k is the mean accuracy of k samples a problem; pass@k = 1 - C(n - c, k)/C(n, k) is the chance that one of k samples
is right, estimated without bias from n samples of which c are right (Chen et al. 2021, arXiv 2107.03374). Intervals are
over problems: mean ± 1.96 standard errors (0 where all problems agree). Plots read metrics.jsonl and nothing else; runs
that differ in nothing but the seed are one line, with a 95 % band (Student's t) over seeds.

The model is rebuilt from the run's own config. What both commands share with train.py is here too: reading a run,
evaluation during training, and the command line's manners (a mistake is one line on stderr, exit code 2).
"""

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import importlib.metadata
import inspect
import itertools
import json
import math
import multiprocessing
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import torch
from tqdm import tqdm

import mtp
import occ
import rl
from model import GPT, GPTConfig, autocast, choose, generate, pad

VERSION = 1  # of the run folder's format
CHECKPOINT = "step steps seconds sizes scores model heads optimizer".split()  # what ckpt.pt holds besides its version
# settings of a run that are no part of the experiment
FREE = "out cache_dir data_dir device threads save_every steps".split()
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POINTS = 60  # of a line in a plot, at most
CACHE = 2**28  # numbers in a sampler's KV cache while scoring: 1 GiB in float32
BLOCKS = 12  # of a line of probes, which are noisy
T_95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]  # Student's t at 97.5 %, 1..10 degrees of freedom


# ----------------------------------------------------------------------------------------------------------------------
# Reading a run


def build(cfg, tok, device):
    """The trunk and its heads as initialised from the seed of a config."""
    torch.manual_seed(cfg.seed)
    if 0 < cfg.vocab_size < tok.n_vocab:
        raise ValueError(f"--vocab_size {cfg.vocab_size}: must be 0, or at least the tokenizer's {tok.n_vocab}")
    shape = GPTConfig(cfg.vocab_size or tok.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.tied)
    return GPT(shape).to(device), mtp.MTPHeads(shape, cfg.mtp_depth, cfg.mtp_design).to(device)


def read_metrics(folder):
    """(header, a record a step) of a run. A last line cut short is left out; any other bad line raises ValueError."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder}: not a run: it has no metrics.jsonl")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty: the run never began; start it again")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records = list(rl.json_lines(path, lines))
    try:
        version, _ = records[0]["versions"]["nanoocc"], records[0]["config"]["regime"]
    except (IndexError, KeyError, TypeError):
        raise ValueError(f"{path}:1: not the header of a run (config, seed, commit, data, versions, device)") from None
    if version != VERSION:
        raise ValueError(f"{path}:1: a run of version {version}; this is version {VERSION}")
    for i, record in enumerate(records[1:], 2):
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}:{i}: not the record of a step")
    return records[0], records[1:]


def read_run(folder):
    """(config as a dict, checkpoint or None) of a run. ValueError when something there is not what it should be."""
    header, records = read_metrics(folder)
    rl.check_unchanged(header.get("data", {}))
    path = Path(folder) / "ckpt.pt"
    if not path.exists():
        if records and records[-1]["step"] > 0:
            raise ValueError(f"{path}: missing, though metrics.jsonl has {records[-1]['step']} steps")
        return header["config"], None
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        version, _ = ckpt["version"], [ckpt[key] for key in CHECKPOINT]
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if version != VERSION:
        raise ValueError(f"{path}: a checkpoint of version {version}; this is version {VERSION}")
    return header["config"], ckpt


def load_weights(ckpt, model, heads=None, optimizer=None):
    """Weights of a checkpoint into the trunk and, if given, heads and optimizer. ValueError if they do not fit."""
    try:
        for module, name in ((model, "model"), (heads, "heads"), (optimizer, "optimizer")):
            if module is not None:
                module.load_state_dict(ckpt[name])
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError):
        raise ValueError("ckpt.pt: its weights do not fit the sizes in the run's config") from None


def load_run(folder, device):
    """Config, tokenizer, trunk and heads (None in regime off) of a run's last checkpoint."""
    values, ckpt = read_run(folder)
    if ckpt is None:
        raise ValueError(f"{folder}: no checkpoint yet; go on with python train.py --resume {folder}")
    cfg = SimpleNamespace(**values)
    try:
        tok = rl.get_tokenizer(cfg.tokenizer)
        model, heads = build(cfg, tok, device)
    except AttributeError as error:
        raise ValueError(f"{folder}: a run of another version: its config has no {error.name}") from None
    heads = heads if ckpt["heads"] else None
    load_weights(ckpt, model, heads)
    return cfg, tok, model, heads


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def accuracy(model, tok, problems, k, max_new_tokens, temperature=1.0, seed=0, rows=768, spec=None):
    """(number of problems, k) 0/1 results, about `rows` sequences at a time, fewer where their keys and values would
    take more than CACHE numbers. Same seed, same random numbers."""
    generator, G = torch.Generator().manual_seed(seed), 1 if temperature == 0 else k
    positions = max(len(tok.encode_ordinary(p.prompt)) for p in problems) + max_new_tokens
    most = CACHE // (2 * model.cfg.n_layer * model.cfg.n_embd * positions)
    n = max(min(rows, most) // G, 1)
    parts = [problems[i : i + n] for i in range(0, len(problems), n)]
    with autocast(model.wte.weight.device):
        right = [
            rl.rollout(model, tok, part, G, max_new_tokens, temperature, generator, False, spec)[2] for part in parts
        ]
    return torch.cat(right).expand(-1, k)


def evaluate(model, tok, cfg):
    """During training: {eval/score, eval/<suite>}, avg@eval_k on held-out problems in points of 100.

    The score is the mean of the suites. The same problems and the same random numbers every time.
    """
    suites = rl.suites_of(cfg.task, cfg.data_dir)
    problems = [p for suite in suites for p in rl.held_out_problems(suite, cfg.difficulty, cfg.eval_problems)]
    right = accuracy(model, tok, problems, cfg.eval_k, cfg.max_new_tokens, cfg.temperature)
    rows = {rl.label(suite): [i for i, p in enumerate(problems) if p.suite == suite] for suite in suites}
    mean = {name: 100 * right[some].mean().item() for name, some in rows.items()}
    return {"eval/score": sum(mean.values()) / len(mean)} | {f"eval/{s}": value for s, value in mean.items()}


def pass_at_k(n, c, k):
    """Unbiased pass@k from n samples of which c are right."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values):
    """Mean and half-width of the 95 % interval over problems (a list of numbers); nan for fewer than two."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan


def score(args):
    """The table of a run, as lines of Markdown: a row a suite and one for all, in points of 100.

    The suites are the held-out problems of what the run was trained on, or those of --suite, which may share none with
    what the run has seen. With --speculative drafts a round the heads draft; a line then says how many were accepted.
    """
    cfg, tok, model, heads = load_run(args.run, torch.device(args.device))
    if args.speculative and heads is None:
        raise ValueError(f"--speculative {args.speculative}: {args.run} has no heads to draft with")
    suites = rl.suites_of(args.suite or cfg.task, args.data_dir or cfg.data_dir, scoring=bool(args.suite))
    if args.suite:
        trained = [s for task in (cfg.task, cfg.pretrain_task or cfg.task) for s in rl.suites_of(task, cfg.data_dir)]
        rl.check_apart(trained, suites)
    rows, spec = [], mtp.Speculator(heads, args.speculative) if args.speculative else None
    longest, new = rl.longest(suites, cfg.difficulty, tok)[0], args.max_new_tokens or cfg.max_new_tokens
    model.reach(max(model.cfg.block_size, longest + new))
    for suite in tqdm(suites, "suites", disable=None):
        if args.suite and suite not in rl.SUITES:
            problems = rl.read_problems(suite)[: args.problems or None]
        else:
            problems = rl.held_out_problems(suite, cfg.difficulty, args.problems or 64)
        right = accuracy(model, tok, problems, args.k, new, args.temperature, spec=spec).sum(1).int().tolist()
        passed = [[100 * pass_at_k(args.k, c, j) for c in right] for j in shown(args.k)]
        symbolic = sum(rl.is_symbolic(p.answer) for p in problems)
        rows.append((rl.label(suite), [100 * c / args.k for c in right], passed, symbolic))
    return [*table(rows, args.k), *remarks(rows, spec)]


def remarks(rows, spec=None):
    """Lines below the table, for what it must not be read without."""
    if spec:
        yield ", ".join(f"{name} {value:.2f}" for name, value in spec.metrics().items())
    if any(symbolic for *_, symbolic in rows):
        judge = "is installed and does" if rl.has_algebra() else "is not installed: they count as written"
        yield ("\nsymbolic: problems whose gold can be written in ways that only algebra can judge "
               f"(math-verify {judge}).")  # fmt: skip
    if any(name in rl.COMPETITION for name, *_ in rows):
        yield ("\nCompetition problems are far beyond a small model trained from scratch: a score near zero is what to "
               "expect of one, and what is above zero may well be guessed.")  # fmt: skip


def shown(k):
    """The values of k that pass@k is shown for. Not 1: pass@1 is avg@k."""
    return sorted({k // 4, k} - {0, 1})


def table(rows, k):
    """rows: (suite, avg@k of each problem, for each shown k the pass@k of each problem, how many have a symbolic gold)
    -> lines of Markdown.

    The row "all" is the mean over suites, each counting alike; its interval combines theirs.
    """
    counts = [(len(avg), symbolic) for _, avg, _, symbolic in rows]
    some = 2 if any(symbolic for _, symbolic in counts) else 1  # a column of zeros says nothing
    heads = ["suite", *["problems", "symbolic"][:some], f"avg@{k}"] + [f"pass@{j}" for j in shown(k)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    columns = [[avg, *passed] for _, avg, passed, _ in rows]
    for (suite, *_), count, column in zip(rows, counts, columns):
        lines.append(row_of(suite, count[:some], [interval(values) for values in column]))
    overall = []
    for column in zip(*columns):
        means, halves = zip(*(interval(values) for values in column))
        overall.append((sum(means) / len(means), math.hypot(*halves) / len(halves)))
    return lines + [row_of("all", [sum(column) for column in zip(*counts)][:some], overall)]


def row_of(name, counts, cells):
    return "| " + " | ".join([name, *map(str, counts), *(f"{mean:.1f} ± {half:.1f}" for mean, half in cells)]) + " |"


# ----------------------------------------------------------------------------------------------------------------------
# Plots


def group_runs(folders):
    """{label: [records of each seed]}: runs that differ only in seed and folder share a line, labelled by the rest."""
    runs = [read_metrics(folder) for folder in folders]
    free = {*FREE, "seed"}
    configs = [{name: value for name, value in header["config"].items() if name not in free} for header, _ in runs]
    differ = [n for n in configs[0] if n != "regime" and any(c.get(n) != configs[0][n] for c in configs)]
    groups = {}
    for folder, cfg, (header, records) in zip(folders, configs, runs):
        label = " ".join([cfg["regime"]] + [f"{name}={cfg.get(name)}" for name in differ])
        seeds = groups.setdefault(label, {})
        if not records:
            raise ValueError(f"{folder}: nothing logged yet")
        if header["seed"] in seeds:
            raise ValueError(
                f"{folder}: seed {header['seed']} of '{label}' is there already; a band needs different seeds"
            )
        seeds[header["seed"]] = records
    return {label: list(seeds.values()) for label, seeds in groups.items()}


def series(runs, value, points=POINTS):
    """Steps that every run has, mean and half-width of the 95 % band (nan for one run) of value(record) over runs.

    More than `points` steps are averaged in blocks, run by run, so that the band is that of the block's mean.
    """
    if not runs:
        return [], [], []
    tables = [{r["step"]: y for r in records if (y := value(r)) is not None} for records in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    y = torch.tensor([[table[s] for s in steps] for table in tables], dtype=torch.float64)
    if len(steps) > points:
        size = -(-len(steps) // points)
        y = torch.stack([block.mean(1) for block in y.split(size, dim=1)], dim=1)
        steps = [block.mean().item() for block in torch.tensor(steps, dtype=torch.float64).split(size)]
    n = len(tables)
    half = T_95[min(n - 2, 9)] * y.std(0) / n**0.5 if n > 1 and steps else torch.full((len(steps),), math.nan)
    return steps, y.mean(0).tolist(), half.tolist()


def first_order(record):
    """λ c, the first-order term of Δ_MTP in units of η (1 - Lη)."""
    return record["occ/lam"] * record["occ/c"] if "occ/c" in record else None


def second_order(record):
    """λ² v²/2, the second-order term of Δ_MTP in units of L η²."""
    return record["occ/lam"] ** 2 * record["occ/v2"] / 2 if "occ/c" in record else None


PANELS = [  # title, axis label, value of a record, scale of the axis
    ("Reward in training", "mean reward", lambda r: r.get("reward/mean"), "linear"),
    ("Held-out score", "avg@k, points of 100", lambda r: r.get("eval/score"), "linear"),
    ("Coefficient", "λ_t (last update of a step)", lambda r: r.get("occ/lam"), "linear"),
    ("First-order correlation", "c_t = ⟨g_RL, g_MTP⟩", lambda r: r.get("occ/c"), "symlog"),
    ("Second-order penalty", "v_t² = ‖g_MTP‖²", lambda r: r.get("occ/v2"), "log"),
    ("First-order term of Δ_MTP", "λ_t c_t, in units of η(1−Lη)", first_order, "symlog"),
    ("Second-order term of Δ_MTP", "λ_t² v_t² / 2, in units of Lη²", second_order, "symlog"),
    ("MTP head 1 as a drafter", "share of tokens accepted", lambda r: r.get("mtp/agreement_1"), "linear"),
]


def pyplot():
    """matplotlib without a screen, imported when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_lines(axis, groups, value, scale="linear", style="-", color=None, points=POINTS):
    """A line a group of runs with its 95 % band, none where n = 1. Lines that are not solid have no legend."""
    lines = {name: series(runs, value, points) for name, runs in groups.items()}
    drawn = [abs(y) for _, mean, _ in lines.values() for y in mean if y]
    if drawn and scale != "linear" and style == "-":
        axis.set_yscale(scale, **({"linthresh": max(drawn) / 30} if scale == "symlog" else {}))
    fixed = COLORS if set(groups) <= set(COLORS) else {}
    colors = {name: color or fixed.get(name, f"C{i}") for i, name in enumerate(groups)}
    for name, (steps, mean, _) in lines.items():
        label = f"{name} (n = {len(groups[name])})" if style == "-" else None
        axis.plot(steps, mean, style, color=colors[name], label=label, linewidth=1.4)
    limits = axis.get_ylim()
    for name, (steps, mean, half) in lines.items():
        low, high = ([m + sign * h for m, h in zip(mean, half)] for sign in (-1, 1))
        if style == "-":
            axis.fill_between(steps, low, high, color=colors[name], alpha=0.15, linewidth=0)
    if scale != "linear":  # there a band can reach to nowhere
        axis.set_ylim(limits)


def plot(folders, path):
    """Draw PANELS for the runs, one line a label, and save the picture at `path`."""
    plt = pyplot()
    groups = group_runs(folders)
    figure, axes = plt.subplots(2, 4, figsize=(18, 8), layout="constrained")
    for axis, (title, label, value, scale) in zip(axes.flat, PANELS):
        draw_lines(axis, groups, value, scale)
        axis.set(title=title, xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Benchmark. The model is untrained and a coin decides rewards: speed does not depend on what has been learnt. The
# learning rate is next to nothing, so that all regimes sample the same tokens; dynamic sampling and probes are off.

SETTINGS = {
    "default": {},
    "wide": dict(n_layer=6, n_embd=256, max_new_tokens=48),
    "vocabulary": dict(vocab_size=50304),
}
VARIANTS = {  # the first is what the others are divided by
    "detach": dict(regime="detach"),
    "occ": dict(regime="occ"),
    "occ, hidden": dict(regime="occ", occ_proxy="hidden"),
    "ce": dict(regime="ce"),
    "policy": dict(regime="policy"),
    "exact": dict(regime="exact"),
    "exact, half of the blocks": dict(regime="exact", exact_blocks=2),
}
PHASES = "rollout score update coefficient log".split()
GROWTH = {  # the setting that grows, and how
    "prompts_per_step": (8, 32, 128),
    "max_new_tokens": (16, 64),
    "mtp_depth": (1, 2, 4),
}


def matmul_peak(device, repeats=7):
    """FLOP/s of a large product of two matrices in the dtype of training, median: what a step is compared with."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(repeats + 1))


def timed(run, device):
    """Seconds that run() takes, on CUDA until its work is done."""
    clock = trainer().Clock(device)
    run()
    clock("run")
    return clock.seconds["run"]


def trainer():
    """train.py, imported where it is needed: it imports this file."""
    import train

    return train


def bench_learner(changes):
    """A train.Learner of the default config with some changes, ready to be timed."""
    train = trainer()
    speed_only = dict(lr=1e-9, dynamic_sampling=False, probe_every=0)
    cfg = train.Config(**{**speed_only, **changes})
    rl.is_right = lambda problem, text: zlib.crc32(text.encode()) % 2 == 0
    return train.Learner(cfg, train.set_up(cfg))


def bench_step(learner, step):
    """{phase: seconds} and the record of one step, its line of JSON written to a temporary file."""
    clock = trainer().Clock(learner.device)
    record, _ = learner.step(step, clock)
    with tempfile.TemporaryFile("w") as f:
        f.write(json.dumps(record))
    clock("log")
    return clock.seconds, record


def useful_flops(learner, tokens):
    """Floating-point operations that one step cannot do without: two per weight and token in a matrix product, three
    times that with gradients. Not counted: attention, padding, and what the chunked log-probs compute twice."""
    cfg, K = learner.cfg, learner.cfg.mtp_depth
    samples = cfg.prompts_per_step * cfg.num_generations
    problems = rl.training_problems(cfg, 0)
    prompt = statistics.mean(len(p.prompt) for p in itertools.islice(problems, 1000))
    trunk, heads = (
        sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in (learner.model.blocks, learner.heads)
    )
    logits, positions = learner.model.lm_head.weight.numel(), samples * prompt + tokens
    rollout = trunk * (cfg.prompts_per_step * prompt + tokens - samples) + logits * tokens
    score = heads * (positions - samples * (K + 3) / 2) + K * logits * tokens  # the last 1+k positions predict nothing
    update = trunk * positions + logits * tokens + score
    return 2 * (rollout + score + 3 * update)


def measure(changes, repeats=5):
    """Medians over some steps, for a process of its own: seconds by phase and of the whole, samples, tokens/s, useful
    FLOP/s, and the peak of memory in bytes beyond what the process had before (on a GPU: of its memory)."""
    trainer()  # what it imports is not the run's memory
    before = memory_peak(reset=True)
    learner = bench_learner(changes)
    steps = [bench_step(learner, step) for step in range(repeats + 1)][1:]  # the first warms up
    seconds = {phase: statistics.median(s[phase] for s, _ in steps) for phase in PHASES}
    tokens = statistics.median(record["response_length/sum"] for _, record in steps)
    whole = statistics.median(sum(s.values()) for s, _ in steps)
    cuda = learner.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if cuda else memory_peak() - before
    samples = learner.cfg.prompts_per_step * learner.cfg.num_generations
    rates = {"tokens_per_s": tokens / whole, "flops": useful_flops(learner, tokens) / whole}
    return rates | {"seconds": seconds, "whole": whole, "memory": memory, "samples": samples}


def memory_peak(reset=False):
    """Peak of this process's resident memory in bytes; `reset` starts it anew, where the system can (Linux)."""
    status = Path("/proc/self/status")
    if status.exists():
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def in_new_process(function, *args):
    """The result of function(*args) in a fresh process: its peak of memory is its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *args).result()
        except KeyboardInterrupt:  # or the end of this block would wait for it
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def cache_speedup(repeats=7):
    """Tokens/s of the sampler over those of decoding by whole forward passes, 48 new tokens: a ratio a repeat."""
    learner = bench_learner({**SETTINGS["default"], "max_new_tokens": 48})
    cfg, model = learner.cfg, learner.model
    problems = rl.training_problems(cfg, 0)
    prompts = [learner.tok.encode_ordinary(p.prompt) for p in itertools.islice(problems, cfg.prompts_per_step)]
    G, end = cfg.num_generations, cfg.vocab_size or learner.tok.n_vocab  # an end that never comes: all rows run to 48

    @torch.no_grad()
    def without_cache():
        tokens_BT, length_B = pad([row for row in prompts for _ in range(G)], learner.device)
        tokens_BT, row = torch.nn.functional.pad(tokens_BT, (0, 48)), torch.arange(len(tokens_BT))
        for i in range(48):
            h_BC = model.hidden(tokens_BT[:, : int(length_B.max()) + i])[row, length_B + i - 1]
            tokens_BT[row, length_B + i], _ = choose(model.logits(h_BC), 1.0, torch.rand(len(row)).to(learner.device))

    ratios = []
    for _ in range(repeats + 1):
        slow = timed(without_cache, learner.device)
        ratios.append(slow / timed(lambda: generate(model, prompts, G, 48, end), learner.device))
    return ratios[1:]


def speculation(repeats):
    """Lines of Markdown: both clocks of speculative sampling, of the default base after pretraining.

    Tokens a pass of the trunk, and seconds over those of plain sampling, in turn: median (smallest to largest).
    """
    train, learner = trainer(), bench_learner(SETTINGS["default"])
    cfg, model, heads = learner.cfg, learner.model, learner.heads
    load_weights(train.pretrained(cfg, learner.tok, learner.device, ()), model, heads)
    stream = rl.training_problems(cfg, 0)
    prompts = [learner.tok.encode_ordinary(p.prompt) for p in itertools.islice(stream, cfg.prompts_per_step)]
    lines = ["| prompts x samples | drafts a round | tokens a call | seconds over plain |", "|---|---:|---:|---:|"]
    for some, G in ((prompts, cfg.num_generations), (prompts[:4], 1)):
        shape = some, G, cfg.max_new_tokens, learner.tok.eot_token, 1.0
        numbers, u = (len(some) * G, cfg.max_new_tokens), torch.Generator().manual_seed(0)
        for drafts in (1, 2, 3):
            spec, ratios = mtp.Speculator(heads, drafts), []
            for _ in range(repeats + 1):
                plain = timed(lambda: generate(model, *shape, torch.rand(*numbers, generator=u)), learner.device)
                drafted = timed(
                    lambda: spec.generate(model, *shape, torch.rand(*numbers, 3, generator=u)), learner.device
                )
                ratios.append(drafted / plain)
            ratios, calls = ratios[1:], spec.metrics()["spec/tokens_per_call"]
            cells = f"{calls:.2f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(f"| {len(some)} x {G} | {drafts} | {cells} |")
    return lines


def bench(settings, repeats, picture):
    """Print how fast a step is and where its time goes; draw how time and memory grow. Lines of Markdown."""
    if picture:
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
    device = bench_learner({}).device
    peak = matmul_peak(device, repeats)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; a large matrix product: {peak / 1e9:.0f} GFLOP/s; medians of {repeats}\n")
    print("| setting | samples/s | tokens/s | " + " | ".join(PHASES) + " | GFLOP/s | of the peak | memory, MiB |")
    print("|---|" + "---:|" * (5 + len(PHASES)))
    for setting in settings:
        m = in_new_process(measure, SETTINGS[setting], repeats)
        shares = " | ".join(f"{100 * m['seconds'][phase] / m['whole']:.1f} %" for phase in PHASES)
        cells = [f"{m['samples'] / m['whole']:.0f}", f"{m['tokens_per_s']:.0f}", shares, f"{m['flops'] / 1e9:.0f}"]
        cells += [f"{100 * m['flops'] / peak:.0f} %", f"{m['memory'] / 2**20:.0f}"]
        print(f"| {setting} | " + " | ".join(cells) + " |", flush=True)
    print("\nSeconds a step over those of detach, measured in turn: median (smallest to largest)\n")
    print("| setting | " + " | ".join(VARIANTS) + " |\n|---|" + "---:|" * len(VARIANTS))
    for setting in settings:
        ratios = step_ratios(SETTINGS[setting], repeats)
        cells = [f"{statistics.median(r):.3f} ({min(r):.2f} to {max(r):.2f})" for r in ratios.values()]
        print(f"| {setting} | " + " | ".join(cells) + " |", flush=True)
    ratios = cache_speedup(repeats)
    print(f"\nSampling 48 tokens with the KV cache, times as fast as without: {statistics.median(ratios):.1f} "
          f"({min(ratios):.1f} to {max(ratios):.1f})", flush=True)  # fmt: skip
    print("\nSpeculative sampling: passes of the trunk, and the clock on the wall\n")
    print("\n".join(speculation(repeats)), flush=True)
    if picture:
        growth = {
            name: [in_new_process(measure, {name: value}, 3) for value in values] for name, values in GROWTH.items()
        }
        plot_growth(growth, picture)
        print(picture)


def step_ratios(setting, repeats):
    """{variant: [seconds over those of the first variant, a repeat each]}, the variants taking turns."""
    learners = {name: bench_learner({**setting, **changes}) for name, changes in VARIANTS.items()}
    first, seconds = next(iter(learners)), []
    for step in tqdm(range(repeats + 1), "regimes", disable=None):
        seconds.append({name: sum(bench_step(learner, step)[0].values()) for name, learner in learners.items()})
    return {name: [s[name] / s[first] for s in seconds[1:]] for name in learners}


LOGP_SHAPES = {  # N tokens, C channels, V words
    "cpu": ((65536, 128, 64), (16384, 128, 576), (16384, 128, 1024), (8192, 256, 50304)),
    "cuda": ((16384, 768, 50304), (32768, 2048, 151936), (65536, 512, 50304)),
}


def logp_peers(device):
    """{name: f(h, W, targets) -> log-probs}: ours, torch's, and of other libraries those that can be imported."""
    ours = [name for name in ("naive", "chunked", "triton") if name != "triton" or not mtp.why_no_triton(device.type)]
    peers = {name: functools.partial(mtp.linear_logp, impl=name) for name in ours}
    peers["naive, torch.compile"] = torch.compile(peers["naive"])
    fused, options = torch.nn.functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    peers["torch, linear_cross_entropy"] = lambda h, W, t: -fused(h, W, t, reduction="none", options=options)
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            if _version("liger-kernel") < (0, 8, 2):
                raise ImportError("before 0.8.2 its gradients a token were wrong")
            from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as scaled
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
            peers["Liger, scaled"] = lambda h, W, t: -scaled.apply(h, W, t)
            peers["Liger, FLCE none"] = lambda h, W, t: -liger(W, h, t)
        with contextlib.suppress(ImportError):
            from cut_cross_entropy import linear_cross_entropy as cce

            peers["CCE, exact"] = lambda h, W, t: -cce(h, W, t, reduction="none", impl="cce_exact")
            peers["CCE, filtered: inexact"] = lambda h, W, t: -cce(h, W, t, reduction="none")
    return peers


def _version(package):
    """Of an installed package, as numbers; (0,) of one that is not."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:3] if part.isdigit())
    except importlib.metadata.PackageNotFoundError:
        return (0,)


def logp_inputs(shape, device):
    """h, W, targets and a signed upstream gradient a token; of ten tokens one has none."""
    (N, C, V), generator = shape, torch.Generator(device).manual_seed(0)
    dtype, new = torch.bfloat16 if device.type == "cuda" else torch.float32, dict(device=device, generator=generator)
    h, W = torch.randn(N, C, **new), torch.randn(V, C, **new) / C**0.5
    g = torch.randn(N, **new) * (torch.rand(N, **new) > 0.1)
    return h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), torch.randint(V, (N,), **new), g


def logp_pass(f, h, W, targets, g):
    """Log-probs, and the gradients of h and W."""
    logp = f(h, W, targets)
    return logp.detach(), *torch.autograd.grad(logp, (h, W), g.to(logp.dtype))


def logp_memory(name, shape):
    """Bytes that forward and backward need at their peak, beyond inputs and gradients. For a process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    f, inputs = logp_peers(device)[name], logp_inputs(shape, device)
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2])
    if device.type == "cpu":  # with what torch.compile takes to compile: a second pass would reuse freed memory
        before = memory_peak(reset=True)
        logp_pass(f, *inputs)
        return memory_peak() - before - gradients
    logp_pass(f, *inputs)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp_pass(f, *inputs)
    return torch.cuda.max_memory_allocated() - before - gradients


def bench_logp(repeats):
    """Print how fast log-probs are from hidden states, by our implementations and others', and how far they are off.

    All take turns on the same inputs; the share of the peak counts 8·N·C·V FLOPs, as if all computed logits twice.
    Errors are the largest of log-probs, and of dh relative to its norm, of 64 tokens against float64.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak, tokens = matmul_peak(device, repeats), slice(0, 64)
    print(f"{device.type}; a large matrix product: {peak / 1e9:.0f} GFLOP/s; medians of {repeats}")
    head = "with backward, ms | forward, ms | over naive | of the peak | memory, MiB | error of logp | of dh".split(
        " | "
    )
    for shape in LOGP_SHAPES[device.type]:
        print(f"\n(N, C, V) = {shape}; auto picks {mtp.pick_impl('auto', shape[0], shape[2], device)}\n\n"
              f"| | {' | '.join(head)} |\n|---|{'---:|' * len(head)}")  # fmt: skip
        h, W, targets, g = inputs = logp_inputs(shape, device)
        few = h.detach()[tokens].double().requires_grad_()
        exact = mtp.linear_logp(few, W.detach().double(), targets[tokens], impl="naive")
        (exact_dh,) = torch.autograd.grad(exact, few, g[tokens].double())
        torch._dynamo.reset()  # or what was compiled for one shape would be compiled for any shape at the next
        peers = logp_peers(device)
        times, errors, failed = {name: [] for name in peers}, {}, {}
        for _ in tqdm(range(repeats + 1), str(shape), disable=None):
            for name, f in peers.items():
                if name in failed:
                    continue
                clock = trainer().Clock(device)
                try:
                    logp, dh, _ = logp_pass(f, *inputs)
                    clock("whole")
                    with torch.no_grad():
                        f(h, W, targets)
                    clock("forward")
                except Exception as error:  # too little memory, or what a library lacks: the others go on
                    failed[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    continue
                times[name].append((clock.seconds["whole"], clock.seconds["forward"]))
                off = dh[tokens].double() - exact_dh
                errors[name] = (logp[tokens] - exact).abs().max().item(), (off.norm() / exact_dh.norm()).item()
                del logp, dh
        for name, turns in times.items():
            if name in failed:
                print(f"| {name} | {failed[name]} |" + " |" * 6)
                continue
            whole, forward = (statistics.median(x) for x in zip(*turns[1:]))
            ratios = (
                [b[0] / a[0] for a, b in zip(times["naive"][1:], turns[1:])] if "naive" not in failed else [math.nan]
            )
            ratio = statistics.median(ratios)
            torch.cuda.empty_cache()  # for the process that measures memory
            try:
                memory = in_new_process(logp_memory, name, shape) / 2**20
            except Exception:  # it ran out of it
                memory = math.nan
            share = 8 * math.prod(shape) / whole / peak
            cells = f"{1e3 * whole:.1f} | {1e3 * forward:.1f} | {ratio:.2f} | {100 * share:.0f} % | {memory:.0f}"
            print(f"| {name} | {cells} | {errors[name][0]:.0e} | {errors[name][1]:.0e} |", flush=True)


def plot_growth(growth, path):
    """Seconds a step and memory against each setting of GROWTH, both over those at its smallest value; the dashed line
    is growth in proportion."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(growth), figsize=(4.5 * len(growth), 4), layout="constrained", sharey=True)
    for axis, (name, points) in zip(axes, growth.items()):
        times = [value / GROWTH[name][0] for value in GROWTH[name]]
        axis.plot(times, times, "--", color="gray", label="in proportion")
        for label, values in (
            ("seconds a step", [m["whole"] for m in points]),
            ("seconds a token", [1 / m["tokens_per_s"] for m in points]),
            ("memory", [m["memory"] for m in points]),
        ):
            axis.plot(times, [value / values[0] for value in values], "o-", label=label)
        axis.set(xlabel=f"times --{name} {GROWTH[name][0]}", xscale="log", yscale="log", xticks=times)
        axis.set_xticklabels([f"×{t:g}" for t in times])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times as much")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# The reproduction: train every regime on several seeds, then draw figures and write tables from what was logged

SETTING = dict(eval_k=32, probe_every=5, save_every=25)  # all else as in train.py
SMOKE = dict(task="add,sub", difficulty=1, n_layer=2, pretrain_steps=100, pretrain_batch=64, steps=10)  # --fast
SMOKE |= dict(prompts_per_step=8, probe_every=2, eval_every=2, eval_problems=4, eval_k=4)
REPRODUCED = {  # the first is what the others are compared with
    "detach": dict(regime="detach"),
    "ce": dict(regime="ce"),
    "policy": dict(regime="policy"),
    "occ": dict(regime="occ"),
    "occ-hidden": dict(regime="occ", occ_proxy="hidden"),
    "exact": dict(regime="exact"),
    "exact-ce": dict(regime="exact", mtp_learn="ce"),
    "policy-0.1": dict(regime="policy", lam=0.1),
    "policy-0.2": dict(regime="policy", lam=0.2),
    "policy-0.5": dict(regime="policy", lam=0.5),
}
SWEEP = {0.1: "policy-0.1", 0.2: "policy-0.2", 0.5: "policy-0.5", 1.0: "policy"}
PROXIES = {
    "lam_sums": "log-probs (paper)",
    "lam_ratios": "log-probs (released code)",
    "lam_hidden": "hidden states",
    "lam_blocks": "last half of the blocks",
}
CHECKPOINTS = (0.1, 0.5, 0.9)  # of a run's length: where `parabola` measures
LAMBDAS = (-0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.5, 1.0)


def reproduce(args):
    """Train the regimes on several seeds; draw the paper's figures, write its tables, and test its claims.

    The claims, each tested over seeds with a 95 % interval (Student's t). One rule, written down before the runs,
    decides: "reproduced" if the interval lies where the claim says, "not" if it lies elsewhere, else "undecided"; of
    several intervals, all must lie there, or one elsewhere. Thirds are of training; a score is the mean of avg@k on
    held-out problems in the last fifth of training.

    H1  ce: the cosine of g and m is within ±0.05; v² of the last third is at least half of that of the first; the score
        is below detach's.
    H2  policy, λ = 1: c > 0 in the first third (from split halves), and smaller in the last; v² of the last third is at
        least half of that of the first; the score rises (middle third above the start), then falls (last third below
        the middle).
    H3  occ: λ_t is larger in the first third than in the second and in the last.
    H4  occ is above detach on every suite, and on their mean.
    H5  a step of occ takes at most 1.02 times as long as one of detach (interval over repeats in one process).
    H6  occ is above every fixed λ of policy (the paper's Table 2).

    All regimes of a seed start from the same pretrained weights. Finished runs are not repeated, unfinished ones go on;
    one that breaks down is named, and the others are drawn without it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start, configs = time.perf_counter(), plan(args)
    failed = train_all(configs, args.jobs)
    trained = len(configs) - len(failed)
    cfg = next((c for c in configs if c.regime == "occ"), configs[-1])
    file = lambda name: Path(args.out) / f"{name}.json"
    alone = [(file("parabola"), parabola, [cfg]),
             (file("speed"), step_ratios, [SMOKE if args.fast else {}, 2 if args.fast else 15])]  # fmt: skip
    looks = [(file(f"look-{when}-{label}-s{cfg.seed}"), second_look, [cfg, when, 4 if args.fast else 48])
             for label, when in LOOKS for cfg in configs if Path(cfg.out).name == f"{label}-s{cfg.seed}"]  # fmt: skip
    failed += [line for measurement in alone for line in measure_once(*measurement)]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        failed += itertools.chain.from_iterable(pool.map(lambda measurement: measure_once(*measurement), looks))
    draw(args.out, configs[0].steps)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    print(f"{trained} of {len(configs)} runs in {(time.perf_counter() - start) / 60:.1f} minutes; "
          f"figures and tables are in {args.out}")  # fmt: skip
    return 1 if failed else 0


def measure_once(path, measurement, what):
    """Write {"of": what was measured, "found": measurement(*what)} to a JSON file, unless it says that already.

    Returns a list of what went wrong: no line, or one, for that is no reason not to draw the rest.
    """
    moves = {*FREE} - {"steps"}  # what may change without making it another measurement
    of = [{k: v for k, v in dataclasses.asdict(x).items() if k not in moves} if dataclasses.is_dataclass(x) else x
          for x in what]  # fmt: skip
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, half written, or something else
        if json.loads(path.read_text())["of"] == of:
            return []
    try:
        found, aside = in_new_process(measurement, *what), path.with_suffix(".tmp")
        aside.write_text(json.dumps({"of": of, "found": found}))
        aside.replace(path)
    except Exception as error:
        return [f"{path.stem}: {type(error).__name__}: {error}"]
    return []


def plan(args):
    """The train.Config of every run, regimes in the order of REPRODUCED. ValueError if a folder holds another run."""
    train, configs = trainer(), []
    common = SETTING | (SMOKE if args.fast else {}) | ({"steps": args.steps} if args.steps else {})
    common |= dict(cache_dir=f"{args.out}/base", device="cpu" if args.fast else "auto")
    common |= dict(threads=max(train.usable_cores() // args.jobs, 1))
    for label in (name for name in REPRODUCED if name in args.regimes):
        for seed in range(args.seeds or (2 if args.fast else 5)):
            paths = dict(seed=seed, out=f"{args.out}/{label}-s{seed}")
            cfg = train.Config(**{**common, **REPRODUCED[label], **paths})
            found = {}
            with contextlib.suppress(ValueError):  # nothing there, or damaged: train_one will say
                found = read_metrics(cfg.out)[0]["config"]
            for name, value in dataclasses.asdict(cfg).items():
                if name in found and name not in FREE and found[name] != value:
                    raise ValueError(f"{cfg.out}: a run with --{name} {found[name]}, not {value}: name another --out")
            configs.append(cfg)
    return configs


def train_all(configs, jobs):
    """Train what is unfinished, `jobs` processes at a time, under one bar. Returns a line for each that broke down.

    First one run of each seed, which pretrains for the others. Ctrl-C lets all of them save.
    """
    first = [next(c for c in configs if c.seed == seed) for seed in sorted({c.seed for c in configs})]
    rest = [cfg for cfg in configs if cfg not in first]
    processes, failed = [], []
    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        tqdm(total=sum(cfg.steps for cfg in configs), desc="steps of all runs", disable=None) as bar,
    ):
        try:
            for wave in (first, rest):
                waiting = [pool.submit(train_one, cfg, processes) for cfg in wave]
                while waiting:
                    done, waiting = concurrent.futures.wait(waiting, timeout=1, return_when="FIRST_COMPLETED")
                    failed += [line for future in done if (line := future.result())]
                    bar.n = sum(lines_logged(cfg) for cfg in configs)
                    bar.refresh()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise KeyboardInterrupt("(what trains has been saved; the same command goes on)") from None
    return failed


def lines_logged(cfg):
    path = Path(cfg.out) / "metrics.jsonl"
    return max(path.read_bytes().count(b"\n") - 2, 0) if path.exists() else 0


def train_one(cfg, processes):
    """Train, or go on, in a process of its own. Returns None, or a line that says what went wrong."""
    done = None
    if (Path(cfg.out) / "metrics.jsonl").exists():
        try:
            ckpt = read_run(cfg.out)[1]
        except ValueError as error:
            return str(error)
        done = ckpt["step"] if ckpt else 0
    if done == cfg.steps:
        return None
    given = {f.name: value for f in dataclasses.fields(cfg) if (value := getattr(cfg, f.name)) != f.default}
    flags = [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
             for name, value in given.items()]  # fmt: skip
    if done is not None:
        flags = ["--resume", cfg.out, "--steps", str(cfg.steps)]
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes.append(process)
    out, error = (text.strip().splitlines() for text in process.communicate())
    if process.returncode:
        return f"{cfg.out}: {error[-1] if error else f'exit code {process.returncode}'}"
    tqdm.write(out[-1])
    return None


# ----------------------------------------------------------------------------------------------------------------------
# What metrics.jsonl cannot tell: the change of J in one step, for many λ


def parabola(cfg):
    """Make the run of cfg once more, and at CHECKPOINTS of it measure what a step with λ in LAMBDAS would do to J."""
    train, points = trainer(), []
    learner = train.Learner(cfg, train.set_up(cfg))
    load_weights(train.pretrained(cfg, learner.tok, learner.device, ()), learner.model, learner.heads)
    marks, probe = [max(round(share * cfg.steps), 1) for share in CHECKPOINTS], learner.probe

    def probe_and_measure(mb, on_policy):
        terms, g, m, before = probe(mb, on_policy)
        points.append({"step": step, **parabola_at(learner, terms, g, m)})
        return terms, g, m, before

    learner.probe = probe_and_measure
    for step in tqdm(range(1, marks[-1] + 1), "parabola", disable=None):
        cfg.probe_every = step if step in marks else 0
        learner.step(step, train.Clock(learner.device))
    return points


def parabola_at(learner, terms, g, m):
    """The measured change of J in a step from here along -(g + λ m), losses' gradients, by Adam and by plain gradient.

    J is the expected reward on held-out problems. Samples are drawn once, here; elsewhere they count by their
    importance ratio r: J' - J = E[(r - 1) A], A the reward minus the mean of the prompt's other samples. So all λ share
    their random numbers. The plain step is as long as Adam's is at λ = 0, which defines η. L is fitted to steps of ½, 1
    and 2 times that length along g: J' - J = η <G, g> s - L η² ‖g‖² s²/2, with G the gradient on the held-out samples.
    Changes and L are lists [mean, half a 95 % interval over problems], changes in points of 100, those of λ as
    differences to λ = 0. The loss that g is a gradient of has other units than J (advantages over their deviation, only
    prompts with both rewards): <G, g>/‖g‖² is what one of its units is worth in J.
    """
    cfg, model, device = learner.cfg, learner.model, learner.device
    problems = [
        p
        for s in rl.suites_of(cfg.task, cfg.data_dir)
        for p in rl.held_out_problems(s, cfg.difficulty, 2 * cfg.eval_problems)
    ]
    generator, before = torch.Generator().manual_seed(1), learner.flat_trunk()
    samples, _, reward_PG = rl.rollout(
        model, learner.tok, problems, cfg.eval_k, cfg.max_new_tokens, cfg.temperature, generator
    )
    adv_B = rl.advantages(reward_PG, "loo").flatten().to(device)

    def logp(model, rows):
        part = samples.tokens_BT[rows], samples.mask_BT[rows, 1:]
        return mtp.logprobs(model, None, *part, cfg.temperature, cfg.logp_impl)[0].sum(1)

    def objective(model, rows):
        return ((logp(model, rows) - old_B[rows]).exp() - 1) * adv_B[rows]

    chunks = torch.arange(len(adv_B)).split(1024)
    with torch.no_grad():
        old_B = torch.cat([logp(model, rows) for rows in chunks])
    at_h = copy.deepcopy(model)
    G = sum(occ.flat_grad(-objective(at_h, rows).sum() / len(adv_B), list(at_h.parameters())) for rows in chunks)

    @torch.no_grad()
    def change(delta):  # of J, a number a problem
        moved = copy.deepcopy(model)
        torch.nn.utils.vector_to_parameters(before + delta, moved.parameters())
        return 100 * torch.cat([objective(moved, rows) for rows in chunks]).view(len(problems), -1).mean(1).double()

    def adam(u):
        moved, optimizer = copy.deepcopy((model, learner.optimizer))
        optimizer.zero_grad()
        for p, part in zip(moved.parameters(), u.split([p.numel() for p in moved.parameters()])):
            p.grad = part.view_as(p).clone()
        torch.nn.utils.clip_grad_norm_(moved.parameters(), cfg.grad_clip)
        optimizer.step()
        return torch.nn.utils.parameters_to_vector(moved.parameters()).detach() - before

    def differences(step_of):
        alone = change(step_of(0.0))
        return {
            "alone": interval(alone.tolist()),
            "more": [interval((change(step_of(lam)) - alone).tolist()) for lam in LAMBDAS],
        }

    eta = (adam(g).norm() / g.norm()).item()
    s = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    along_g_SP = torch.stack([change(-eta * x * g).cpu() for x in s.tolist()]) / 100
    _, bend_P = torch.linalg.lstsq(torch.stack((s, -s.square()), 1), along_g_SP).solution  # a fit for each problem
    known = {name: terms[f"occ/{name}"] for name in ("c", "v2", "g2", "cos", "lam_star")}
    return known | {
        "eta": eta,
        "L": interval((2 * bend_P / (eta**2 * terms["occ/g2"])).tolist()),
        "slope_g": occ.inner(G, g).item(),
        "slope_m": occ.inner(G, m).item(),
        "adam": differences(lambda lam: adam(g + lam * m)),
        "plain": differences(lambda lam: -eta * (g + lam * m)),
    }


LOOKS = [("ce", "start"), ("policy", "start"), *((label, "end") for label in ("ce", "policy", "occ", "exact-ce"))]


def second_look(cfg, when, rollouts):
    """How much of g and m is signal, at the start or the end of a run: inner products over many rollouts.

    Samples of different rollouts share no noise, so the mean of <g_i, m_j> over i ≠ j is that of the expectations,
    <E g, E m>, without bias; the mean of <g_i, m_i> is what a minibatch sees. Returns {"free": [‖E g‖², c, v²],
    "seen": [E ‖g‖², E c, E v²] of a minibatch}, whose noise is that of a rollout times the number of its minibatches.
    """
    train = trainer()
    learner = train.Learner(dataclasses.replace(cfg, updates_per_rollout=1), train.set_up(cfg))
    if when == "start":
        load_weights(train.pretrained(cfg, learner.tok, learner.device, ()), learner.model, learner.heads)
    else:
        load_weights(read_run(cfg.out)[1], learner.model, learner.heads)
    both = []
    for i in tqdm(range(rollouts), f"{cfg.out} at its {when}", disable=None):
        problems, generator = (
            rl.training_problems(cfg, f"{cfg.seed}/look/{i}"),
            torch.Generator().manual_seed(2**40 + i),
        )
        samples, reward_PG, _, _ = rl.collect(learner.model, learner.tok, problems, learner.algo, cfg, generator)
        adv_B = rl.advantages(reward_PG, learner.algo.advantage).flatten().to(learner.device)
        parts, _ = rl.minibatches(learner.model, learner.heads, samples, adv_B, learner.algo, learner.cfg)
        for mb in parts:  # one, or none where all groups agree
            out = learner.forward(mb, True, 1.0)
            both.append([occ.flat_grad(loss, learner.trunk).double() for loss in (out.rl, out.mtp)])
    g, m = (torch.stack(x) for x in zip(*both))
    pairs = ((g, g), (g, m), (m, m))
    free, own = [across(a, b) for a, b in pairs], [(a * b).sum(1).mean().item() for a, b in pairs]
    return {"free": free, "seen": [f + (o - f) * cfg.updates_per_rollout for f, o in zip(free, own)]}


def across(a, b):
    """Mean of <a_i, b_j> over i ≠ j: of independent estimates, without the noise that a_i and b_i share."""
    n = len(a)
    return ((a.sum(0) @ b.sum(0) - (a * b).sum()) / (n * (n - 1))).item()


def second_gain(lam, free, seen):
    """What m adds to a step along g + λ m as a second look at the same samples: a factor, 1 for nothing.

    If every λ has the step length that is best for it, an L-smooth objective gains <E g, E u>²/(2 L E‖u‖²) by a step
    along u = g + λ m, whatever L is. This is that gain over that of λ = 0. Without noise it is 1 at the most, since
    nothing beats g itself; with noise, m helps where it knows what g does not.
    """
    (g2, c, _), (g2_seen, c_seen, v2_seen) = free, seen
    return (1 + lam * c / g2) ** 2 * g2_seen / (g2_seen + 2 * lam * c_seen + lam**2 * v2_seen)


def best_second_look(free, seen):
    """The λ that maximises second_gain."""
    (g2, c, _), (g2_seen, c_seen, v2_seen) = free, seen
    return (c * g2_seen - g2 * c_seen) / (g2 * v2_seen - c * c_seen)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics over seeds


def over_seeds(values):
    """Mean and half-width of the 95 % interval (Student's t) of one number a seed; nan for one seed."""
    x = torch.tensor(list(values), dtype=torch.float64)
    if len(x) < 2:
        return x.mean().item(), math.nan
    return x.mean().item(), T_95[min(len(x) - 2, len(T_95) - 1)] * x.std().item() / len(x) ** 0.5


def paired(a, b):
    """{seed: a - b} over the seeds that both have."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def ranks(x):
    """1-based ranks of a list of numbers; equal ones share the mean of theirs."""
    x = torch.tensor(x, dtype=torch.float64)
    return ((x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2).double()


def pearson(x, y):
    """Correlation of two lists; nan where one does not vary."""
    x, y = (v - v.mean() for v in (torch.as_tensor(x).double(), torch.as_tensor(y).double()))
    return ((x @ y) / (x.norm() * y.norm())).item() if x.norm() * y.norm() > 0 else math.nan


def spearman(x, y):
    return pearson(ranks(x), ranks(y))


def in_thirds(records, name):
    """Means of a logged number over the first, the second and the last third of training."""
    end, parts = records[-1]["step"], ([], [], [])
    for r in records:
        if name in r and r["step"] > 0:
            parts[min(3 * (r["step"] - 1) // end, 2)].append(r[name])
    return [sum(part) / len(part) if part else math.nan for part in parts]


def final(records, name):
    """Mean of an evaluation over the last fifth of training."""
    values = [r[name] for r in records if name in r and r["step"] >= 0.8 * records[-1]["step"]]
    return sum(values) / len(values)


def verdict(intervals, low, high):
    """Whether all (mean, half) lie within (low, high): "reproduced"; one lies wholly outside: "not"; else undecided."""
    if not intervals or any(math.isnan(half) for _, half in intervals):
        return "undecided"
    if all(low < mean - half and mean + half < high for mean, half in intervals):
        return "reproduced"
    return "not" if any(mean + half <= low or mean - half >= high for mean, half in intervals) else "undecided"


def claims(runs, speed):
    """[(claim, quantity, [(mean, half)], n, allowed, verdict)]: the hypotheses of `reproduce`, as far as runs go."""
    rows = []

    def test(name, quantity, samples, low=-math.inf, high=math.inf):
        found = [over_seeds(values) if values else (math.nan, math.nan) for values in samples]
        n = min((len(values) for values in samples), default=0)
        allowed = (
            f"above {low:g}" if high == math.inf else f"below {high:g}" if low == -math.inf else f"{low:g} to {high:g}"
        )
        rows.append((name, quantity, found, n, allowed, verdict(found, low, high)))

    def each(label, statistic):
        return [statistic(records) for records in runs.get(label, {}).values()]

    def scores(label, name="eval/score"):
        return {seed: final(records, name) for seed, records in runs.get(label, {}).items()}

    def halvings(records):
        early, _, late = in_thirds(records, "occ/v2")
        return math.log2(max(late, 1e-30) / max(early, 1e-30))

    def third_by_third(name, a, b):
        return lambda records: in_thirds(records, name)[a] - in_thirds(records, name)[b]

    def rise(records):
        return in_thirds(records, "eval/score")[1] - records[0]["eval/score"]

    suites = [name for name in next(iter(next(iter(runs.values())).values()))[0] if name.startswith("eval/")]
    detach, ours = scores("detach"), scores("occ")
    test("H1", "ce: cosine of g and m", [each("ce", lambda r: sum(in_thirds(r, "occ/cos")) / 3)], -0.05, 0.05)
    test("H1", "ce: log2 of v², last third over first", [each("ce", halvings)], -1)
    test("H1", "ce − detach, points", [list(paired(scores("ce"), detach).values())], high=0)
    test("H2", "policy: c, first third, split halves", [each("policy", lambda r: in_thirds(r, "occ/c_split")[0])], 0)
    test("H2", "policy: c, last third − first", [each("policy", third_by_third("occ/c_split", 2, 0))], high=0)
    test("H2", "policy: log2 of v², last third over first", [each("policy", halvings)], -1)
    test("H2", "policy: score, middle third − start", [each("policy", rise)], 0)
    test("H2", "policy: score, last third − middle", [each("policy", third_by_third("eval/score", 2, 1))], high=0)
    test("H3", "occ: λ_t, first third − second", [each("occ", third_by_third("occ/lam", 0, 1))], 0)
    test("H3", "occ: λ_t, first third − last", [each("occ", third_by_third("occ/lam", 0, 2))], 0)
    by_suite = [list(paired(scores("occ", s), scores("detach", s)).values()) for s in suites if s != "eval/score"]
    test("H4", "occ − detach on each suite, points", by_suite, 0)
    test("H4", "occ − detach, points", [list(paired(ours, detach).values())], 0)
    test("H5", "seconds a step, occ / detach", [speed.get("occ", [])], high=1.02)
    fixed = [list(paired(ours, scores(label)).values()) for label in SWEEP.values()]
    test("H6", "occ − policy with each fixed λ, points", fixed, 0)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Figures and tables of the reproduction: each is a function that
# draws and returns the numbers; its docstring is the caption

COLORS = {label: f"C{i}" for i, label in enumerate(REPRODUCED)}
MAIN = [label for label in REPRODUCED if "." not in label]


def finished_runs(out, steps=None):
    """({label: {seed: records}}, lines about what was left out) of the runs in folders out/<label>-s<seed>.

    Left out are runs that have not made `steps` (None: as many as the longest), that cannot be read, or whose settings
    are not those of their label.
    """
    runs, left_out = {}, []
    for path in sorted(Path(out).glob("*-s*/metrics.jsonl")):
        label, seed = path.parent.name.rsplit("-s", 1)
        if label not in REPRODUCED or not seed.isdigit():
            continue
        try:
            header, records = read_metrics(path.parent)
        except ValueError as error:
            left_out.append(str(error))
            continue
        if any(header["config"].get(name) != value for name, value in REPRODUCED[label].items()):
            left_out.append(f"{path.parent}: its settings are not those of {label}")
        else:
            runs[label, int(seed)] = records
    steps = steps or max((records[-1]["step"] for records in runs.values() if records), default=0)
    whole = {label: {} for label in REPRODUCED}
    for (label, seed), records in runs.items():
        if records and records[-1]["step"] == steps:
            whole[label][seed] = records
        else:
            left_out.append(f"{out}/{label}-s{seed}: not at step {steps}")
    return {label: seeds for label, seeds in whole.items() if seeds}, left_out


def some(runs, labels):
    """Of the runs, those of some labels, as draw_lines takes them."""
    return {label: list(runs[label].values()) for label in labels if label in runs}


def counts(groups):
    """For captions: which runs, and how many."""
    return "Runs: " + ", ".join(f"{label} (n = {len(records)})" for label, records in groups.items()) + "."


def lines_of(figure, groups, panels, points=BLOCKS, rows=1):
    """One axis a panel (title, label of y, scale, {style: value of a record}); a line a group and style."""
    axes = figure.subplots(rows, len(panels) // rows, squeeze=False).flat
    for axis, (title, label, scale, values) in zip(axes, panels):
        for style, value in values.items():
            draw_lines(axis, groups, value, scale, style, points=points)
        axis.set(title=title, xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    legend(axes[0])
    return axes


def logged(name):
    return lambda record: record.get(name)


def legend(axis):
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def draw_scores(figure, runs, extra):
    """Held-out score (avg@k, points of 100) against steps: mean over seeds, band: 95 % interval (Student's t).

    Right: the difference to detach, seed by seed, which leaves out what seeds have in common. Look at which bands there
    leave out 0.
    """
    groups, axes = some(runs, MAIN), figure.subplots(1, 2)
    draw_lines(axes[0], groups, logged("eval/score"))
    axes[0].set(title="Held-out score", xlabel="step", ylabel="avg@k, points of 100")
    legend(axes[0])
    gaps = {label: gaps_to_detach(runs[label], runs.get("detach", {})) for label in groups if label != "detach"}
    draw_lines(axes[1], {label: gap for label, gap in gaps.items() if gap}, logged("gap"))
    axes[1].axhline(0, color=COLORS["detach"], linewidth=1)
    axes[1].set(title="Paired difference to detach", xlabel="step", ylabel="points of 100")
    for axis in axes:
        axis.grid(alpha=0.3)
    ends = ", ".join(f"{label} {cell(over_seeds(final(r, 'eval/score') for r in g))}" for label, g in groups.items())
    return f"{counts(groups)} Mean of the last fifth of training: {ends}."


def gaps_to_detach(seeds, detach):
    """For each seed that both have, {"step", "gap"} of the evaluations."""
    gaps = []
    for seed in sorted(set(seeds) & set(detach)):
        base = {r["step"]: r["eval/score"] for r in detach[seed] if "eval/score" in r}
        both = [r for r in seeds[seed] if "eval/score" in r and r["step"] in base]
        gaps.append([{"step": r["step"], "gap": r["eval/score"] - base[r["step"]]} for r in both])
    return gaps


def draw_terms(figure, runs, extra):
    """The exact first-order correlation c_t, second-order penalty v_t² and cosine of g and m at probe steps.

    Means over seeds and over blocks of probes. Solid: of a whole minibatch, with the noise that g and m share. Dashed:
    across its halves, without that noise (the dashed cosine has the solid one's norms below it; on a log axis values
    below 0 are missing). Look at what is left of the correlation in the dashed lines, and at v² of policy.
    """
    groups = some(runs, ["ce", "policy", "occ"])
    norms = lambda r: (r["occ/g2"] * r["occ/v2"]) ** 0.5
    split_cos = lambda r: r["occ/c_split"] / norms(r) if "occ/c_split" in r and norms(r) else None
    lines_of(figure, groups, [
        ("First-order correlation", "c_t = ⟨g, m⟩", "symlog", {"-": logged("occ/c"), "--": logged("occ/c_split")}),
        ("Second-order penalty", "v_t² = ‖m‖²", "log", {"-": logged("occ/v2"), "--": logged("occ/v2_split")}),
        ("Cosine of g and m", "c_t / (‖g‖ ‖m‖)", "linear", {"-": logged("occ/cos"), "--": split_cos}),
    ])  # fmt: skip
    facts = []
    for label, seeds in groups.items():
        means = [
            [sum(in_thirds(r, f"occ/{name}")) / 3 for r in seeds] for name in ("c", "c_split", "g2", "g2_split", "v2")
        ]
        names = "⟨g, m⟩", "across halves", "‖g‖²", "across halves", "‖m‖²"
        facts.append(f"{label}: " + ", ".join(f"{n} {cell(over_seeds(x), 3)}" for n, x in zip(names, means)))
    return f"{counts(groups)} Means of whole runs: {'; '.join(facts)}."


def with_terms(records):
    """For each probe the two terms of Δ_MTP(λ_t), of its own c, v², λ and η and the mean L of the run's probes.

    "first" is the first-order term in the mean, η λ (<E g, E m> - L η c): the slope is that across halves, while the
    step contains the noise of both. "paper" is η λ (1 - L η) c, with the shared noise in c.
    """
    probes = [r for r in records if "occ/L" in r and "occ/c_split" in r]
    L, sums, out = sum(r["occ/L"] for r in probes) / max(len(probes), 1), dict.fromkeys(TERMS, 0.0), []
    for r in probes:
        lam, c, c_split, v2, eta = (r[f"occ/{name}"] for name in ("lam", "c", "c_split", "v2", "eta"))
        paper, second = occ.delta_mtp(lam, c, 0.0, eta, L), -occ.delta_mtp(lam, 0.0, v2, eta, L)
        terms = dict(first=paper + eta * lam * (c_split - c), paper=paper, second=second)
        sums = {name: sums[name] + terms[name] for name in TERMS}
        totals = {f"sum of {name}": value for name, value in sums.items()} | {"net": sums["first"] - sums["second"]}
        out.append({"step": r["step"], "Lη": L * eta, **terms, **totals})
    return out


TERMS = "first", "paper", "second"


def draw_decomposition(figure, runs, extra):
    """The two terms of Δ_MTP(λ_t), of the update at each probe (above), and summed over the probes so far (below).

    Left: solid the first-order term η λ (⟨g, m⟩ − Lη c) with ⟨g, m⟩ across halves; dotted as the bound has it, η λ
    (1 − Lη) c, with the noise that g and m share in c. Middle: the second-order term L η² λ² v²/2. Right: solid minus
    second. η is the length of Adam's step over ‖g + λ m‖; L is measured: the mean curvature along a run's steps. The
    unit is that of the policy objective. Means over seeds, bands: 95 %. Look at how much of the dotted lines is noise.
    """
    groups = {label: [with_terms(r) for r in g] for label, g in some(runs, ["ce", "policy", "occ", "exact"]).items()}
    first, summed = ({"-": logged(f"{of}first"), ":": logged(f"{of}paper")} for of in ("", "sum of "))
    lines_of(figure, groups, [
        ("First order, a step", "gain", "linear", first),
        ("Second order, a step", "loss", "linear", {"-": logged("second")}),
        ("First minus second order, a step", "gain", "linear", {"-": lambda r: r["first"] - r["second"]}),
        ("First order, summed", "gain", "linear", summed),
        ("Second order, summed", "loss", "linear", {"-": logged("sum of second")}),
        ("First minus second order, summed", "gain", "linear", {"-": logged("net")}),
    ], rows=2)  # fmt: skip
    ends, size = [], lambda g: over_seeds(sum(r["Lη"] for r in run) / max(len(run), 1) for run in g)
    for label, g in groups.items():
        last = [run[-1] for run in g if run]
        sums = [
            cell(over_seeds(r[name] for r in last), 3) for name in ("sum of first", "sum of paper", "sum of second")
        ]
        ends.append(f"{label} {', '.join(sums)} (Lη {cell(size(g), 2)})")
    return f"{counts(groups)} Sums at the end, first order, as the bound has it, second order: {'; '.join(ends)}."


def draw_parabola(figure, runs, extra):
    """What one real step along g + λ m does to J on held-out problems, against the same step with λ = 0.

    Points: measured with the same samples for every λ, weighed by importance ratios (bars: 95 % over problems), for a
    plain gradient step and for Adam's, at three checkpoints of one run. Lines: the quadratic with L fitted to measured
    steps along g. Dashed: its slope along m measured on the held-out samples too; dotted: its λ*. Solid: the slope that
    the minibatch's own c claims, in units of J; it has the noise that g and m share. Look at which line the points
    follow.
    """
    found, said = extra.get("parabola", {}), []
    points, label = found.get("found", []), "occ" if found.get("of", [{}])[0].get("regime") == "occ" else "other"
    axes = figure.subplots(1, max(len(points), 1), squeeze=False).flat
    grid = [LAMBDAS[0] + i * (LAMBDAS[-1] - LAMBDAS[0]) / 100 for i in range(101)]
    for axis, p in zip(axes, points):
        for i, kind in enumerate(("plain", "adam")):
            mean, half = zip(*p[kind]["more"])
            axis.errorbar(LAMBDAS, mean, half, fmt="o", ms=4, capsize=2, color=f"C{i}", label=f"measured, {kind} step")
        low, high = axis.get_ylim()
        eta, (L, L_half), c, v2 = (p[name] for name in ("eta", "L", "c", "v2"))
        for slope, style, name in ((p["slope_g"] / p["g2"] * c, "k-", "c of the minibatch"),
                                   (p["slope_m"], "k--", "slope on held-out samples")):  # fmt: skip
            line = [100 * (occ.delta_mtp(x, c, v2, eta, L) + eta * x * (slope - c)) for x in grid]
            axis.plot(grid, line, style, label=name)
        lam = (p["slope_m"] - L * eta * c) / (L * eta * v2) if L > 0 else math.nan
        if LAMBDAS[0] < lam < LAMBDAS[-1]:
            axis.axvline(lam, color="k", linestyle=":", label="λ*")
        axis.set(title=f"step {p['step']}", xlabel="λ", ylabel="change of J against λ = 0, points",
                 ylim=(low - (high - low) / 2, high + (high - low) / 2))  # fmt: skip
        axis.grid(alpha=0.3)
        best = "no λ*: L is not above 0" if math.isnan(lam) else f"λ* = {lam:.2f}"
        said.append(f"step {p['step']}: Lη = {cell((L * eta, L_half * eta), 2)}, {best}, c/v² = {p['lam_star']:.2f}, "
                    f"slope along m {p['slope_m']:.4f} where c says {p['slope_g'] / p['g2'] * c:.4f}; λ = 0 gains "
                    f"{cell(p['plain']['alone'], 2)} (plain), {cell(p['adam']['alone'], 2)} (Adam)")  # fmt: skip
    legend(axes[0])
    return f"Runs: {label} (n = {min(len(points), 1)}). {'; '.join(said)}."


def draw_proxies(figure, runs, extra):
    """What each proxy makes of the probed minibatches of occ, beside λ* = c/v² from exact gradients of the same.

    Left: mean over seeds against steps, band: 95 %. Right: one point a probe. Look at whether the points rise together.
    The table "proxies" has the correlations for every regime.
    """
    groups, titles = some(runs, ["occ"]), []
    axes = figure.subplots(1, 1 + len(PROXIES)).flat
    for i, (name, title) in enumerate([("lam_star", "exact λ*"), *PROXIES.items()]):
        lines = dict.fromkeys([title], groups.get("occ", []))
        draw_lines(axes[0], lines, logged(f"occ/{name}"), color=f"C{i}", points=BLOCKS)
    axes[0].set_yscale("symlog", linthresh=0.05)
    axes[0].set(title="occ: each proxy and λ*", xlabel="step", ylabel="λ")
    legend(axes[0])
    for i, (axis, (name, title)) in enumerate(zip(axes[1:], PROXIES.items()), 1):
        points = [
            (r[f"occ/{name}"], r["occ/lam_star"]) for g in groups.values() for run in g for r in run if "occ/c" in r
        ]
        axis.plot(*(zip(*points) if points else ([], [])), ".", color=f"C{i}", ms=3)
        titles += [f"{title} {', '.join(cells)}" for cells in [fidelity(groups.get("occ", []), name)] if cells]
        axis.set(title=title, xlabel="λ of the proxy", ylabel="exact λ*")
    for axis in axes:
        axis.grid(alpha=0.3)
    what = "Over seeds, Pearson and Spearman with λ*, and Spearman with c across halves over v²"
    return f"{counts(groups)} {what}: {'; '.join(titles)}."


def fidelity(seeds, name):
    """Three cells: Pearson and Spearman of a proxy with λ* over the probes of a run, and Spearman with c_split/v²,
    which has not the proxy's noise (but its own, which lowers it); mean and interval over runs."""
    found = []
    for records in seeds:
        probes = [r for r in records if "occ/c_split" in r and r["occ/v2"] > 0]
        if len(probes) > 2:
            x, y = [r[f"occ/{name}"] for r in probes], [r["occ/lam_star"] for r in probes]
            free = [r["occ/c_split"] / r["occ/v2"] for r in probes]
            found.append((pearson(x, y), spearman(x, y), spearman(x, free)))
    return [cell(over_seeds(values), 2) for values in zip(*found)]


def draw_speed(figure, runs, extra):
    """Seconds a step over those of detach, in one process, the regimes taking turns on the same samples.

    Bars: median, with the smallest and the largest. The paper reports 0.995 for OCC and 5.6 for exact gradients.
    """
    ratios, axis = extra.get("speed", {}).get("found", {}), figure.subplots()
    middle = {name: statistics.median(r) for name, r in ratios.items()}
    spread = [[abs(end(r) - middle[name]) for name, r in ratios.items()] for end in (min, max)]
    axis.bar(list(middle), list(middle.values()), yerr=spread, capsize=3, color="C0")
    axis.set(title="Seconds a step, over those of detach", ylabel="ratio")
    axis.grid(alpha=0.3, axis="y")
    repeats = len(next(iter(ratios.values()), []))
    return f"n = {repeats} repeats: {', '.join(f'{name} {m:.3f}' for name, m in middle.items())}."


def draw_sweep(figure, runs, extra):
    """Score (last fifth of training) against the fixed λ of policy, beside occ and detach; bars and bands: 95 %.

    The paper's Table 2: there, OCC is above every fixed λ. Look at whether the curve crosses the line of occ.
    """
    axis, groups = figure.subplots(), some(runs, [*SWEEP.values(), "occ", "detach"])
    ends = {label: over_seeds(final(r, "eval/score") for r in g) for label, g in groups.items()}
    lams = [lam for lam, label in SWEEP.items() if label in ends]
    mean, half = zip(*(ends[SWEEP[lam]] for lam in lams)) if lams else ([], [])
    axis.errorbar(
        lams,
        mean,
        [0 if math.isnan(h) else h for h in half],
        fmt="o-",
        capsize=3,
        color=COLORS["policy"],
        label="policy, fixed λ",
    )
    for label in ("occ", "detach"):
        if label in ends:
            m, h = ends[label]
            axis.axhline(m, color=COLORS[label], label=label)
            if not math.isnan(h):
                axis.axhspan(m - h, m + h, color=COLORS[label], alpha=0.12)
    axis.set(title="Fixed λ against OCC", xlabel="λ", ylabel="score, points of 100", xscale="log" if lams else "linear")
    legend(axis)
    axis.grid(alpha=0.3)
    return f"{counts(groups)} {', '.join(f'{label} {cell(end)}' for label, end in ends.items())}."


def ceiling(cos, lr):
    """Δ_MTP(λ*) over what RL alone gains, cos² (1 - Lη)²/(Lη (2 - Lη)), from the cosine of g and m and Lη in (0, 1)."""
    return cos**2 * (1 - lr) ** 2 / (lr * (2 - lr)) if 0 < lr < 1 else math.nan


def draw_ceiling(figure, runs, extra):
    """How much MTP with the best λ could add to a step, in % of what RL alone gains.

    Lines: the ceiling cos² (1 − Lη)²/(Lη (2 − Lη)) of the bound by thirds of training, from c, ‖g‖² and v² of the
    minibatches themselves, mean over seeds: c holds the noise that g and m share, so this is a ceiling of the ceiling;
    missing where Lη is not between 0 and 1. Squares: measured on held-out samples, the largest gain over the λ of
    figure 4 (the best of several, so biased upwards), where RL alone gains more than its interval. Below: how much of c
    is left across halves. Look at the order of magnitude.
    """
    axis, said, points = figure.subplots(), [], extra.get("parabola", {}).get("found", [])
    groups = some(runs, ["policy", "occ", "exact", "exact-ce"])
    for label, g in groups.items():
        thirds = []
        for third in range(3):
            mean = {n: sum(in_thirds(r, f"occ/{n}")[third] for r in g) / len(g) for n in ("c", "g2", "v2", "L", "eta")}
            lr = mean["L"] * mean["eta"]
            thirds.append((lr, 100 * ceiling(mean["c"] / ((mean["g2"] * mean["v2"]) ** 0.5 or math.nan), lr)))
        x = [g[0][-1]["step"] * (i + 0.5) / 3 for i in range(3)]
        axis.plot(x, [y for _, y in thirds], "o-", color=COLORS[label], label=label)
        left = over_seeds(sum(in_thirds(r, "occ/c_split")) / sum(in_thirds(r, "occ/c")) for r in g)
        most = ", ".join("–" if math.isnan(y) else f"{y:.1f}" for _, y in thirds)
        said.append(f"{label}: Lη {', '.join(f'{lr:.2f}' for lr, _ in thirds)}, ceiling {most} %, "
                    f"of c across halves {cell(left, 2)}")  # fmt: skip
    for p in points:
        (alone, alone_half), (gain, half) = p["plain"]["alone"], max(p["plain"]["more"])
        if alone > alone_half:
            axis.errorbar(p["step"], 100 * gain / alone, 100 * half / alone, fmt="ks", capsize=3)
        said.append(
            f"step {p['step']}: RL alone {cell((alone, alone_half), 2)} points, the best λ adds {cell((gain, half), 3)}"
        )
    axis.set(title="What MTP could add to a step", xlabel="step", ylabel="% of what RL alone gains", yscale="symlog")
    legend(axis)
    axis.grid(alpha=0.3)
    return f"{counts(groups)} {'; '.join(said)}."


def draw_drafter(figure, runs, extra):
    """Share of tokens that a speculative sampler drafting from head 1 would accept (mean of min(1, q/p)).

    Of the responses that are trained on: those to prompts whose samples differ in reward. Left: against steps, mean
    over seeds, band: 95 %. Right: against the entropy of the policy, nats a token of all responses, a point a block of
    steps. Look at which regimes keep their drafter, and whether entropy alone explains it.
    """
    groups, ends = some(runs, MAIN), []
    axes = figure.subplots(1, 2)
    draw_lines(axes[0], groups, logged("mtp/agreement_1"))
    for label, g in groups.items():
        both = [[r for r in run if "mtp/agreement_1" in r and "actor/entropy" in r] for run in g]
        (_, x, _), (_, y, _) = (series(both, logged(name)) for name in ("actor/entropy", "mtp/agreement_1"))
        axes[1].plot(x, y, ".-", color=COLORS[label], linewidth=0.5)
        ends.append(f"{label} {cell(over_seeds(in_thirds(r, 'mtp/agreement_1')[2] for r in g), 2)}")
    axes[0].set(title="Head 1 as a drafter", xlabel="step", ylabel="share of tokens accepted", ylim=(0, 1))
    axes[1].set(title="and the entropy of the policy", xlabel="entropy, nats a token", ylim=(0, 1))
    for axis in axes:
        axis.grid(alpha=0.3)
    legend(axes[0])
    return f"{counts(groups)} Mean of the last third of training: {', '.join(ends)}."


def draw_second_look(figure, runs, extra):
    """Signal and noise of g and m, at the start of runs and at their ends, over many rollouts (a point a run).

    Left: the cosine of g and m, crosses of minibatches, dots without noise: of the expectations, from products across
    rollouts. Right: what m adds to a step along g + λ m when every λ has its best step length, in % of what g alone
    gains: it can only add what it knows of E g that the noise of g hides. Mean over seeds; its highest point is chosen
    on the same samples, so biased upwards. Look at how far the curves get above 0, and at which λ.
    """
    axes, looks, said = figure.subplots(1, 2), extra.get("looks", {}), []
    lams = [x / 100 for x in range(-20, 101)]
    for i, (name, found) in enumerate(looks.items()):
        free, seen = ([cosine(*x[kind]) for x in found] for kind in ("free", "seen"))
        for cosines, marker in ((free, "o"), (seen, "x")):
            axes[0].plot([i] * len(cosines), cosines, marker, color=f"C{i}", alpha=0.7)
        signal = [x for x, cos in zip(found, free) if not math.isnan(cos)]
        gains = [[100 * second_gain(lam, **x) - 100 for lam in lams] for x in signal]
        axes[1].plot(lams, [sum(column) / len(gains) for column in zip(*gains)] or [math.nan] * len(lams), label=name)
        best = [best_second_look(**x) for x in signal]
        most = [100 * second_gain(lam, **x) - 100 for lam, x in zip(best, signal)]
        at_1 = [gain[-1] for gain in gains]
        free, seen, best, most, at_1 = (
            over_seeds(y for y in x if not math.isnan(y)) for x in (free, seen, best, most, at_1)
        )
        said.append(f"{name} (n = {len(signal)}): cosine {cell(free, 2)} without noise, {cell(seen, 2)} with; "
                    f"the best λ {cell(best, 2)} adds {cell(most)} %, λ = 1 {cell(at_1)} %")  # fmt: skip
    axes[0].set(title="Cosine of g and m: dots without noise, crosses of minibatches", ylabel="cosine")
    axes[0].set_xticks(range(len(looks)), list(looks))
    axes[1].set(title="What m adds as a second look", xlabel="λ", ylabel="% of what g alone gains", ylim=(-60, 40))
    axes[1].axhline(0, color="k", linewidth=0.8)
    for axis in axes:
        axis.grid(alpha=0.3)
    legend(axes[1])
    return f"{'; '.join(said) or 'n = 0'}."


def cosine(g2, c, v2):
    """Of estimates of ‖g‖², <g, m> and ‖m‖²; nan where noise has made one of the squares negative."""
    return c / (g2 * v2) ** 0.5 if g2 > 0 and v2 > 0 else math.nan


FIGURES = {
    "1-scores": draw_scores, "2-terms": draw_terms, "3-decomposition": draw_decomposition, "4-parabola": draw_parabola,
    "5-proxies": draw_proxies, "6-speed": draw_speed, "7-sweep": draw_sweep, "8-ceiling": draw_ceiling,
    "9-drafter": draw_drafter, "10-second-look": draw_second_look,
}  # fmt: skip


def draw(out, steps=None):
    """Every figure with its caption, a sheet of all of them, and every table, from the runs that lie in `out`."""
    plt, out, extra = pyplot(), Path(out), {}
    runs, left_out = finished_runs(out, steps)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    if not runs:
        raise ValueError(f"{out}: no finished run to draw")
    for path in (out / "parabola.json", out / "speed.json"):
        if path.exists():
            extra[path.stem] = json.loads(path.read_text())
    extra["looks"] = {}
    for label, when in LOOKS:
        found = [json.loads(path.read_text())["found"] for path in sorted(out.glob(f"look-{when}-{label}-s*.json"))]
        extra["looks"] |= {f"{label}, {when}": found} if found else {}
    sheet = plt.figure(figsize=(30, 30), layout="constrained")
    for (name, function), part in zip(FIGURES.items(), sheet.subfigures(5, 2).flat):
        figure = plt.figure(figsize=(15, 5), layout="constrained")
        caption = f"{inspect.getdoc(function)}\n\n{function(figure, runs, extra)}\n"
        (out / f"{name}.txt").write_text(caption, encoding="utf-8")
        figure.savefig(out / f"{name}.png", dpi=90)
        plt.close(figure)
        function(part, runs, extra)
        part.suptitle(f"Figure {name.replace('-', ': ', 1)}")
    sheet.savefig(out / "figures.png", dpi=60)
    plt.close("all")
    write_tables(out, runs, extra)


def cell(interval, digits=1):
    mean, half = interval
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f} (n = 1)" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def write_tables(out, runs, extra):
    """scores, differences, claims and proxies, each as Markdown and as CSV."""
    suites = [name for name in next(iter(next(iter(runs.values())).values()))[0] if name.startswith("eval/")]
    ends = {
        label: {s: {seed: final(r, s) for seed, r in seeds.items()} for s in suites} for label, seeds in runs.items()
    }
    names = [s.removeprefix("eval/") for s in suites]
    rows = [[label, len(runs[label]), *(cell(over_seeds(e[s].values())) for s in suites)] for label, e in ends.items()]
    write_table(out / "scores", ["regime", "n", *names], rows)
    if "detach" in runs:
        seeds, rows = sorted(runs["detach"]), []
        for label in runs:
            gaps = {s: paired(ends[label][s], ends["detach"][s]) for s in suites}
            if label != "detach" and gaps["eval/score"]:
                by_seed = [f"{gaps['eval/score'][x]:+.1f}" if x in gaps["eval/score"] else "" for x in seeds]
                rows.append([label, *by_seed, *(cell(over_seeds(gaps[s].values())) for s in suites)])
        write_table(out / "differences", ["regime − detach", *(f"seed {x}" for x in seeds), *names], rows)
    tested = claims(runs, extra.get("speed", {}).get("found", {}))
    rows = [[name, what, "; ".join(cell(x, 2) for x in found), *rest] for name, what, found, *rest in tested]
    write_table(out / "claims", ["claim", "quantity", "95 % interval", "n", "claimed", "verdict"], rows)
    rows = []
    for label, seeds in runs.items():
        for name, title in PROXIES.items():
            cells = fidelity(seeds.values(), name)
            if cells:
                rows.append([label, title, len(seeds), *cells])
    write_table(
        out / "proxies", ["regime", "proxy", "n", "Pearson with λ*", "Spearman with λ*", "with c_split/v²"], rows
    )


def write_table(path, head, rows):
    lines = [head, *rows]
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(lines)
    lines.insert(1, ["---"] * len(head))
    text = "".join("| " + " | ".join(str(x) for x in line) + " |\n" for line in lines)
    Path(f"{path}.md").write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """No abbreviations; a mistake is one line."""

    def __init__(self, description=None, **kwargs):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise ValueError(message)

    def add_fields(self, config):
        """A flag for each field of a dataclass, its comment the help text. What is not given leaves no attribute."""
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
        for f in dataclasses.fields(config):
            kinds = [t for t in get_args(f.type) or (f.type,) if t not in (None, type(None))]
            options = {"type": str, "metavar": "|".join(kinds)} if isinstance(kinds[0], str) else {
                "type": kinds[0], "metavar": kinds[0].__name__}  # fmt: skip
            options = {"action": argparse.BooleanOptionalAction} if kinds[0] is bool else options
            default = "" if f.default in (None, "") else f" [{f.default}]"
            text = (comments[f.name] + default).replace("%", "%%")
            self.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, **options)


@contextlib.contextmanager
def reporting(prog):
    """Errors as one line on stderr and an exit code: 2 the user's mistake, 1 a run that broke down, 130 Ctrl-C."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        broke_down = isinstance(error, FloatingPointError) or getattr(error, "errno", None) in DISK_FULL
        sys.exit(1 if broke_down else 2)
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted {error}".strip(), file=sys.stderr)
        sys.exit(130)


def parse(argv):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("score", help="avg@k and pass@k of a run on held-out problems")
    one.add_argument("run", help="folder of a run")
    one.add_argument("--k", type=int, default=32, help="samples a problem [32]")
    one.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy [1.0]")
    one.add_argument("--suite", default="", help="score on these: arithmetic, competition, or a comma list of suites, "
                     f"of {', '.join(rl.SCORE)}, FILE.jsonl [the held-out problems of the run's own task]")  # fmt: skip
    one.add_argument(
        "--problems", type=int, default=0, help="a suite, at most; 0: 64 held-out ones, whole data sets [0]"
    )
    one.add_argument("--max_new_tokens", type=int, default=0, help="longest response [0: as the run was trained]")
    one.add_argument("--data_dir", default="", help="folder of data sets [the run's own]")
    one.add_argument("--speculative", type=int, default=0, help="tokens a round that the heads draft; 0: none [0]")
    one.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    many = commands.add_parser("plot", help="curves of runs in one picture")
    many.add_argument("run", nargs="+", help="folders of runs")
    many.add_argument("--out", default="", help="picture to write [curves.png in the first folder]")
    fast = commands.add_parser("bench", help="how fast a step is, where its time goes, what the regimes cost")
    fast.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="[all]")
    fast.add_argument("--repeats", type=int, default=7, help="steps of each, after one to warm up [7]")
    fast.add_argument(
        "--logp", action="store_true", help="instead: log-probs from hidden states, against other libraries"
    )
    fast.add_argument("--out", default="out/growth.png", help="picture of growth; empty: none [out/growth.png]")
    whole = commands.add_parser(
        "reproduce", help="the paper's figures, tables and claims", description=inspect.getdoc(reproduce)
    )
    whole.add_argument("--seeds", type=int, default=0, help="how many: 0 to this - 1 [5; 2 with --fast]")
    whole.add_argument("--steps", type=int, default=0, help="length of a run [0: as train.py]")
    whole.add_argument("--regimes", nargs="+", default=list(REPRODUCED), choices=REPRODUCED, help="[all]")
    whole.add_argument("--jobs", type=int, default=trainer().usable_cores(), help="runs at a time [cores]")
    whole.add_argument("--fast", action="store_true", help="tiny runs that show nothing but that all of it works")
    whole.add_argument("--out", default="out/reproduce", help="folder of runs, figures and tables [out/reproduce]")
    args = parser.parse_args(argv)
    for name in "seeds steps jobs k problems temperature repeats speculative max_new_tokens".split():
        least = 1 if name in ("jobs", "k", "repeats") else 0
        value = getattr(args, name, least)
        if not least <= value < math.inf:
            raise ValueError(f"--{name} {value}: must be {least} or more")
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: must be cpu here: torch finds no CUDA")
    return args


def main(args):
    if args.command == "score":
        print("\n".join(score(args)))
    elif args.command == "bench":
        bench_logp(args.repeats) if args.logp else bench(args.settings, args.repeats, args.out)
    elif args.command == "reproduce":
        return reproduce(args)
    else:
        path = args.out or str(Path(args.run[0]) / "curves.png")
        plot(args.run, path)
        print(path)


if __name__ == "__main__":
    with reporting("eval.py"):
        sys.exit(main(parse(sys.argv[1:])))
