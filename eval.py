"""Evaluate: score a run on held-out problems, and plot what happened in one run or several.

    python eval.py score out/arithmetic-occ-s0 --k 32       # avg@k and pass@k with 95 % intervals, as a table
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
import dataclasses
import errno
import inspect
import itertools
import json
import math
import multiprocessing
import random
import re
import statistics
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import torch
from tqdm import tqdm

import mtp
import rl
from model import GPT, GPTConfig, autocast, choose, generate, pad

VERSION = 1  # of the run folder's format
CHECKPOINT = "step steps seconds sizes scores model heads optimizer".split()  # what ckpt.pt holds besides its version
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POINTS = 60  # of a line in a plot, at most
T_95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]  # Student's t at 97.5 %, 1..10 degrees of freedom


# ----------------------------------------------------------------------------------------------------------------------
# Reading a run


def build(cfg, tok, device):
    """The trunk and its heads as initialised from the seed of a config."""
    torch.manual_seed(cfg.seed)
    prompt, solution = rl.longest(rl.suites_of(cfg.task), cfg.difficulty)
    block_size = prompt + max(solution + 1, cfg.max_new_tokens)
    if 0 < cfg.vocab_size < tok.n_vocab:
        raise ValueError(f"--vocab_size {cfg.vocab_size}: must be 0, or at least the tokenizer's {tok.n_vocab}")
    shape = GPTConfig(cfg.vocab_size or tok.n_vocab, block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.tied)
    return GPT(shape).to(device), mtp.MTPHeads(shape, cfg.mtp_depth, cfg.mtp_design).to(device)


def read_metrics(folder):
    """(header, a record a step) of a run. A last line cut short is left out; any other bad line raises ValueError."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder}: not a run: it has no metrics.jsonl")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty: the run never began; start it again")
    lines, records = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], []
    for i, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}:{i}: not JSON: {line[:40]!r}") from None
    try:
        version, _ = records[0]["versions"]["nanoocc"], records[0]["config"]["regime"]
    except (IndexError, KeyError, TypeError):
        raise ValueError(f"{path}:1: not the header of a run (config, seed, commit, versions, device)") from None
    if version != VERSION:
        raise ValueError(f"{path}:1: a run of version {version}; this is version {VERSION}")
    for i, record in enumerate(records[1:], 2):
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}:{i}: not the record of a step")
    return records[0], records[1:]


def read_run(folder):
    """(config as a dict, checkpoint or None) of a run. ValueError when something there is not what it should be."""
    header, records = read_metrics(folder)
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
    """Config, tokenizer and trunk of a run's last checkpoint."""
    values, ckpt = read_run(folder)
    if ckpt is None:
        raise ValueError(f"{folder}: no checkpoint yet; go on with python train.py --resume {folder}")
    cfg = SimpleNamespace(**values)
    try:
        tok = rl.get_tokenizer(cfg.tokenizer)
        model, _ = build(cfg, tok, device)
    except AttributeError as error:
        raise ValueError(f"{folder}: a run of another version: its config has no {error.name}") from None
    load_weights(ckpt, model)
    return cfg, tok, model


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def accuracy(model, tok, problems, k, max_new_tokens, temperature=1.0, seed=0, rows=768):
    """(number of problems, k) 0/1 results, about `rows` sequences at a time. Same seed, same random numbers."""
    generator, G = torch.Generator().manual_seed(seed), 1 if temperature == 0 else k
    n = max(rows // G, 1)
    parts = [problems[i : i + n] for i in range(0, len(problems), n)]
    with autocast(model.wte.weight.device):
        right = [rl.rollout(model, tok, part, G, max_new_tokens, temperature, generator)[2] for part in parts]
    return torch.cat(right).expand(-1, k)


def evaluate(model, tok, cfg):
    """During training: {eval/score, eval/<suite>}, avg@eval_k on held-out problems in points of 100.

    The score is the mean of the suites. The same problems and the same random numbers every time.
    """
    suites = rl.suites_of(cfg.task)
    problems = [p for suite in suites for p in rl.held_out_problems(suite, cfg.difficulty, cfg.eval_problems)]
    right = accuracy(model, tok, problems, cfg.eval_k, cfg.max_new_tokens, cfg.temperature)
    mean = {s: 100 * right[[i for i, p in enumerate(problems) if p.suite == s]].mean().item() for s in suites}
    return {"eval/score": sum(mean.values()) / len(mean)} | {f"eval/{s}": value for s, value in mean.items()}


def pass_at_k(n, c, k):
    """Unbiased pass@k from n samples of which c are right."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values):
    """Mean and half-width of the 95 % interval over problems (a list of numbers); nan for fewer than two."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan


def score(folder, k, temperature, problems_a_suite, device):
    """The table of a run, as lines of Markdown: a row a suite and one for all, in points of 100."""
    cfg, tok, model = load_run(folder, device)
    rows = []
    for suite in rl.suites_of(cfg.task):
        problems = rl.held_out_problems(suite, cfg.difficulty, problems_a_suite)
        right = accuracy(model, tok, problems, k, cfg.max_new_tokens, temperature).sum(1).int().tolist()
        passed = [[100 * pass_at_k(k, c, j) for c in right] for j in shown(k)]
        rows.append((suite, [100 * c / k for c in right], passed))
    return table(rows, k)


def shown(k):
    """The values of k that pass@k is shown for. Not 1: pass@1 is avg@k."""
    return sorted({k // 4, k} - {0, 1})


def table(rows, k):
    """rows: (suite, avg@k of each problem, for each shown k the pass@k of each problem) -> lines of Markdown.

    The row "all" is the mean over suites, each counting alike; its interval combines theirs.
    """
    heads = ["suite", "problems", f"avg@{k}"] + [f"pass@{j}" for j in shown(k)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    columns = [[avg, *passed] for _, avg, passed in rows]
    for (suite, avg, _), column in zip(rows, columns):
        lines.append(row_of(suite, len(avg), [interval(values) for values in column]))
    overall = []
    for column in zip(*columns):
        means, halves = zip(*(interval(values) for values in column))
        overall.append((sum(means) / len(means), math.hypot(*halves) / len(halves)))
    return lines + [row_of("all", sum(len(avg) for _, avg, _ in rows), overall)]


def row_of(name, n, cells):
    return f"| {name} | {n} | " + " | ".join(f"{mean:.1f} ± {half:.1f}" for mean, half in cells) + " |"


# ----------------------------------------------------------------------------------------------------------------------
# Plots


def group_runs(folders):
    """{label: [records of each seed]}: runs that differ only in seed and folder share a line, labelled by the rest."""
    runs = [read_metrics(folder) for folder in folders]
    free = {"seed", "out", "cache_dir", "device", "save_every", "steps"}
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


def series(runs, value):
    """Steps that every run has, mean and half-width of the 95 % band (nan for one run) of value(record) over runs.

    More than POINTS steps are averaged in blocks, run by run, so that the band is that of the block's mean.
    """
    tables = [{r["step"]: y for r in records if (y := value(r)) is not None} for records in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    y = torch.tensor([[table[s] for s in steps] for table in tables], dtype=torch.float64)
    if len(steps) > POINTS:
        size = -(-len(steps) // POINTS)
        y = torch.stack([block.mean(1) for block in y.split(size, dim=1)], dim=1)
        steps = [block.mean().item() for block in torch.tensor(steps, dtype=torch.float64).split(size)]
    n = len(tables)
    half = T_95[min(n - 2, 9)] * y.std(0) / n**0.5 if n > 1 else torch.full((len(steps),), math.nan)
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


def plot(folders, path):
    """Draw PANELS for the runs, one line a label, and save the picture at `path`."""
    plt = pyplot()
    groups = group_runs(folders)
    figure, axes = plt.subplots(2, 4, figsize=(18, 8), layout="constrained")
    for axis, (title, label, value, scale) in zip(axes.flat, PANELS):
        lines = {name: series(runs, value) for name, runs in groups.items()}
        drawn = [abs(y) for _, mean, _ in lines.values() for y in mean if y]
        if drawn and scale != "linear":
            axis.set_yscale(scale, **({"linthresh": max(drawn) / 30} if scale == "symlog" else {}))
        for i, (name, (steps, mean, _)) in enumerate(lines.items()):
            axis.plot(steps, mean, color=f"C{i}", label=f"{name} (n = {len(groups[name])})", linewidth=1.4)
        limits = axis.get_ylim()
        for i, (steps, mean, half) in enumerate(lines.values()):
            low, high = ([m + sign * h for m, h in zip(mean, half)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        if scale != "linear":  # there a band can reach to nowhere
            axis.set_ylim(limits)
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
    problems = rl.problem_stream(rl.suites_of(cfg.task), cfg.difficulty, random.Random(0))
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
        return pool.submit(function, *args).result()


def cache_speedup(repeats=7):
    """Tokens/s of the sampler over those of decoding by whole forward passes, 48 new tokens: a ratio a repeat."""
    learner = bench_learner({**SETTINGS["default"], "max_new_tokens": 48})
    cfg, model = learner.cfg, learner.model
    problems = rl.problem_stream(rl.suites_of(cfg.task), cfg.difficulty, random.Random(0))
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
    one.add_argument("--problems", type=int, default=64, help="held-out problems a suite, at most [64]")
    one.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    many = commands.add_parser("plot", help="curves of runs in one picture")
    many.add_argument("run", nargs="+", help="folders of runs")
    many.add_argument("--out", default="", help="picture to write [curves.png in the first folder]")
    fast = commands.add_parser("bench", help="how fast a step is, where its time goes, what the regimes cost")
    fast.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="[all]")
    fast.add_argument("--repeats", type=int, default=7, help="steps of each, after one to warm up [7]")
    fast.add_argument("--out", default="out/growth.png", help="picture of growth; empty: none [out/growth.png]")
    args = parser.parse_args(argv)
    for name, least in (("k", 1), ("problems", 1), ("temperature", 0), ("repeats", 1)):
        value = getattr(args, name, least)
        if not least <= value < math.inf:
            raise ValueError(f"--{name} {value}: must be {least} or more")
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: must be cpu here: torch finds no CUDA")
    return args


def main(args):
    if args.command == "score":
        print("\n".join(score(args.run, args.k, args.temperature, args.problems, torch.device(args.device))))
    elif args.command == "bench":
        bench(args.settings, args.repeats, args.out)
    else:
        path = args.out or str(Path(args.run[0]) / "curves.png")
        plot(args.run, path)
        print(path)


if __name__ == "__main__":
    with reporting("eval.py"):
        main(parse(sys.argv[1:]))
