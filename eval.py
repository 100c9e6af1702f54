"""Evaluate: score a run, read what it says, see where its λ_t comes from, draw curves, reproduce the paper's claims.

    python eval.py score out/arithmetic-occ-s0 --k 32       # avg@k and pass@k with 95 % intervals, as a table
    python eval.py sample out/arithmetic-occ-s0 "47+85="    # completions of a prompt, or of held-out problems
    python eval.py explain out/arithmetic-occ-s0            # δ_RL·δ_MTP and δ_MTP² token by token
    python eval.py onestep out/arithmetic-occ-s0            # would MTP help this run, and at which λ?
    python eval.py plot out/arithmetic-*                    # reward, score, λ_t, c_t, v_t² and the two terms of Δ_MTP
    python eval.py reproduce                                # regimes × seeds, five figures, tables, claims

avg@k is the mean accuracy of k samples a problem; pass@k = 1 - C(n - c, k)/C(n, k) is the chance that one of k samples
is right, estimated without bias from n samples of which c are right (Chen et al. 2021, arXiv 2107.03374). The model is
rebuilt from the run's own config. Plots read metrics.jsonl and nothing else; runs that differ only in the seed, and in
what is no part of the experiment (NOT_THE_EXPERIMENT), are one line, with a 95 % band over seeds. All intervals are
Student's t.

What train.py needs too is here: reading a run, curves, and the command line's manners (a mistake is one line on stderr,
exit code 2).

Dimension key: P parameters · N minibatches · S sizes of a minibatch · B sequences · T positions
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see train.py

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, get_args

import numpy as np
import torch
from tqdm import tqdm

import mtp
import occ
import rl
from model import GPT, GPTConfig, find_device

VERSION = 2  # of the run folder's format
CHECKPOINT = ("step", "steps", "seconds", "model", "heads", "optimizer")  # what ckpt.pt holds


# ----------------------------------------------------------------------------------------------------------------------
# Reading a run


def build(cfg, device):
    """The trunk and its heads as initialised from the seed of a config."""
    tok = rl.get_tokenizer(cfg.tokenizer)
    lengths = [rl.longest(suite, cfg.difficulty, tok) for suite in rl.suites_of(cfg.task, cfg.data_dir)]
    response = max(cfg.max_new_tokens, max(solution for _, solution, _ in lengths) + 1)
    block_size = max(prompt for prompt, _, _ in lengths) + response
    torch.manual_seed(cfg.seed)
    shape = GPTConfig(tok.n_vocab, block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.tied)
    return GPT(shape).to(device), mtp.MTPHeads(shape, cfg.mtp_depth, cfg.mtp_design).to(device)


def new_state(cfg, device):
    """(trunk, heads, optimizer) of a run before its first step. heads is None in regime off."""
    model, heads = build(cfg, device)
    heads = heads if occ.REGIMES[cfg.regime].heads_loss else None
    params = [*model.parameters(), *(heads.parameters() if heads else [])]
    return model, heads, torch.optim.Adam(params, cfg.lr, fused=device.type in ("cpu", "cuda"))


def read_metrics(folder):
    """(header, a record a step) of a run. A last line cut short is left out; any other bad line raises ValueError."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder}: not a run: it has no metrics.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    if not lines:
        raise ValueError(f"{path}: empty: the run never began; start it again")
    records = [rl.parse_json(line, f"{path}:{i}") for i, line in enumerate(lines, 1)]
    header = records.pop(0)
    try:
        version, _ = header["versions"]["nanoocc"], header["config"]["regime"]
    except (KeyError, TypeError):
        wanted = "the header of a run (config, seed, commit, versions, device)"
        raise ValueError(f"{path}:1: not {wanted}") from None
    if version != VERSION:
        raise ValueError(f"{path}:1: a run of version {version}; this is version {VERSION}")
    for i, record in enumerate(records, 2):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}:{i}: not the record of a step")
    return header, records


def read_run(folder, name="ckpt.pt"):
    """(config as a dict, checkpoint or None) of a run. ValueError when something there is not what it should be."""
    header, records = read_metrics(folder)
    path = Path(folder) / name
    if not path.exists():
        if records and records[-1]["step"] > 0:
            raise ValueError(f"{path}: missing, though metrics.jsonl has {records[-1]['step']} steps")
        return header["config"], None
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        return header["config"], {key: ckpt[key] for key in CHECKPOINT}
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None


def load_weights(ckpt, **parts):
    """Weights of a checkpoint into model=, heads= and optimizer=; a part that is None is left out."""
    try:
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(ckpt[name])
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError):
        raise ValueError("ckpt.pt: its weights do not fit the sizes in the run's config") from None


def load_run(folder, device, name="ckpt.pt", with_heads=False):
    """Config and (trunk, heads, optimizer) of a run's checkpoint.

    In regime off heads is None, or with_heads raises ValueError.
    """
    values, ckpt = read_run(folder, name)
    if ckpt is None:
        raise ValueError(f"{folder}: no checkpoint yet; go on with python train.py --resume {folder}")
    cfg = SimpleNamespace(**values)
    try:
        model, heads, optimizer = new_state(cfg, device)
    except AttributeError as error:
        raise ValueError(f"{folder}: a run of another version: its config has no {error.name}") from None
    if with_heads and not heads:
        raise ValueError(f"{folder}: regime off has no heads, hence no MTP gradient and no lambda")
    load_weights(ckpt, model=model, heads=heads, optimizer=optimizer)
    return cfg, (model, heads, optimizer)


# ----------------------------------------------------------------------------------------------------------------------
# Intervals and tables


def student_t(freedom):
    """At 97.5 %; from 12 degrees of freedom on by a formula that is right to 0.01."""
    table = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.5 / freedom


def interval(values):
    """Mean of numbers, without those that are nan, and half-width of its 95 % interval; nan where it cannot be had."""
    x = [value for value in values if not math.isnan(value)]
    if not x:
        return math.nan, math.nan
    if len(x) == 1:
        return x[0], math.nan
    return statistics.fmean(x), student_t(len(x) - 1) * statistics.stdev(x) / len(x) ** 0.5


def mean_of(intervals):
    """Mean of independent (mean, half-width), as one more of them."""
    means, halves = zip(*intervals)
    return statistics.fmean(means), math.hypot(*halves) / len(halves)


def cell(interval, digits=1):
    mean, half = interval
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f} (n = 1)" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def markdown(head, rows):
    """Lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def write_table(path, head, rows):
    """As Markdown and as CSV."""
    Path(f"{path}.md").write_text("\n".join(markdown(head, rows)) + "\n", encoding="utf-8")
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([head, *rows])


# ----------------------------------------------------------------------------------------------------------------------
# Scores and samples


def pass_at_k(n, c, k):
    """Unbiased pass@k from n samples of which c are right."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def equal_by_algebra(gold, candidate):
    """What math-verify (an optional package) says of two formulas, where `rl.answers_equal` says no.

    It evaluates what it reads, which could take forever: long numbers, factorials and powers of powers are not given to it.
    """
    if candidate is None or len(candidate) > 200 or re.search(r"\d{5}|__|!|\*\*|\^.*\^", candidate):
        return False
    if rl.read_number(rl.tidied(gold)):  # numbers need no algebra
        return False
    import math_verify

    try:
        parsed = [math_verify.parse(f"${text.strip('$')}$", parsing_timeout=1) for text in (gold, candidate)]
        return bool(math_verify.verify(*parsed, timeout_seconds=1))
    except Exception:  # whatever it meets in a text that it cannot read
        return False


def samples_of(cfg, model, heads, problems, args, max_new_tokens):
    """args.k samples of each problem, about 512 rows at a time: their batch, and their texts."""
    if args.speculative and heads is None:
        raise ValueError(f"--speculative: {args.run} has no heads to draft with")
    drafting = heads if args.speculative else None
    tok, generator = rl.get_tokenizer(cfg.tokenizer), torch.Generator().manual_seed(args.seed)
    batches, texts, chunk = [], [], max(512 // args.k, 1)
    for i in range(0, len(problems), chunk):
        part = problems[i : i + chunk]
        out = rl.sample(model, tok, part, args.k, max_new_tokens, args.temperature, generator, drafting)
        batches.append(out[0])
        texts += out[1]
    return rl.concatenate(batches), texts


def score(args):
    """The scores of a run as a table in Markdown: a row a suite and one for all, in points of 100.

    The suites are the held-out problems of what the run was trained on, or those of --suite; a data set that shares
    problems with the training data is refused.
    """
    cfg, (model, heads, _) = load_run(args.run, find_device(args.device))
    suites = trained = rl.suites_of(cfg.task, cfg.data_dir)
    if args.suite:
        suites = rl.suites_of(args.suite, args.data_dir or cfg.data_dir, scoring=True)
        rl.check_apart(trained, suites)
    tok, room = rl.get_tokenizer(cfg.tokenizer), model.cfg.block_size
    new = args.max_new_tokens or cfg.max_new_tokens
    if new >= room:
        raise ValueError(f"--max_new_tokens {new}: must be below {room}, the positions that the model has")
    ks = sorted({args.k // 4, args.k} - {0, 1})  # of pass@k; not 1: that is avg@k
    rows, intervals, notes = [], [], []
    for suite in tqdm(suites, "suites", disable=None):
        name = rl.label(suite)
        if args.suite and suite not in rl.SUITES:  # the run was not trained on any of it
            problems = rl.read_problems(suite)[: args.problems or None]
        else:
            problems = rl.held_out_problems(suite, cfg.difficulty, args.problems or 64)
        cut = sum(len(tok.encode_ordinary(p.prompt)) + new > room for p in problems)
        if cut:
            notes.append(f"{name}: {cut} prompts are longer than the {room - new} tokens that the model has positions for; "
                         "only their ends were read")  # fmt: skip
        batch, texts = samples_of(cfg, model, heads, problems, args, new)
        right = batch["reward"].bool().tolist()
        if importlib.util.find_spec("math_verify"):
            for i, text in enumerate(texts):
                gold = problems[i // args.k].answer
                right[i] = right[i] or equal_by_algebra(gold, rl.extract_answer(text))
        counts = [sum(right[i : i + args.k]) for i in range(0, len(right), args.k)]
        row = [interval([100 * c / args.k for c in counts])]
        row += [interval([100 * pass_at_k(args.k, c, k) for c in counts]) for k in ks]
        intervals.append(row)
        rows.append([name, len(problems), *map(cell, row)])
        if args.speculative:
            drafted = mtp.speculation_metrics(batch["mask"], batch["draft"], cfg.mtp_depth)
            notes.append(", ".join([name, *(f"{key} {value:.2f}" for key, value in drafted.items())]))
    overall = [cell(mean_of(column)) for column in zip(*intervals)]  # each suite counts alike
    rows.append(["all", sum(row[1] for row in rows), *overall])
    if any(rl.label(suite) in rl.COMPETITION for suite in suites):
        notes.append("Competition problems are far beyond a small model: a score above zero may well be luck.")
    return [*markdown(["suite", "problems", f"avg@{args.k}", *(f"pass@{k}" for k in ks)], rows), *notes]


def sample(args):
    """Completions to read: of a prompt, or of held-out problems with their reward."""
    cfg, (model, heads, _) = load_run(args.run, find_device(args.device))
    tok, suites = rl.get_tokenizer(cfg.tokenizer), rl.suites_of(cfg.task, cfg.data_dir)
    problems = []
    for suite in suites:
        problems += rl.held_out_problems(suite, cfg.difficulty, args.problems or 2)
    if args.prompt:
        problems = [rl.Problem("", args.prompt, "")]
    batch, texts = samples_of(cfg, model, heads, problems, args, cfg.max_new_tokens)
    lines = []
    if set(suites) & set(rl.SUITES):
        lines.append("Numbers stand lowest digit first: 47+85= asks for 74 + 58, and ####231 is right.")
    if args.speculative:
        lines.append("[Brackets] are around drafts of the heads that the trunk accepted.")
        texts = [marked(tok, *row) for row in zip(batch["tokens"][:, 1:], batch["mask"], batch["draft"])]
    for i, text in enumerate(texts):
        reward = "" if args.prompt else f"reward {batch['reward'][i]:g}  "
        lines.append(f"{reward}{problems[i // args.k].prompt!r} -> {text!r}")
    return lines


def marked(tok, tokens_T, mask_T, draft_T):
    """A completion with brackets around each run of accepted drafts."""
    pieces = []
    sampled = [(int(d) > 0, int(t)) for t, d in zip(tokens_T[mask_T], draft_T[mask_T]) if t != tok.eot_token]
    for drafted, run in itertools.groupby(sampled, key=lambda pair: pair[0]):
        text = tok.decode([token for _, token in run])
        pieces.append(f"[{text}]" if drafted else text)
    return "".join(pieces)


# ----------------------------------------------------------------------------------------------------------------------
# Curves


class Panel(NamedTuple):
    title: str
    ylabel: str
    value: str | Callable  # a key of a record, or a function of it
    scale: str = "linear"
    limits: tuple = (None, None)  # of the axis
    x: str = "step"


def first_order(record):
    """λ c, the first-order term of Δ_MTP in units of η (1 - Lη)."""
    return record["occ/lam"] * record["occ/c"] if "occ/c" in record else None


def second_order(record):
    """λ² v²/2, the second-order term of Δ_MTP in units of L η²."""
    return record["occ/lam"] ** 2 * record["occ/v2"] / 2 if "occ/c" in record else None


FIRST_ORDER = Panel("First-order term of Δ_MTP", "λ_t c_t, in units of η(1−Lη)", first_order, "symlog")
SECOND_ORDER = Panel("Second-order term of Δ_MTP", "λ_t² v_t² / 2, in units of Lη²", second_order, "symlog")
CORRELATION = Panel("First-order correlation of a minibatch", "c_t = ⟨g_RL, g_MTP⟩", "occ/c", "symlog")
PENALTY = Panel("Second-order penalty of a minibatch", "v_t² = ‖g_MTP‖²", "occ/v2", "log")
SCORE = Panel("Held-out score", "avg@k, points of 100", "eval/score")
PANELS = [
    Panel("Reward in training", "mean reward", "reward/mean"),
    SCORE,
    Panel("Coefficient", "λ_t (last update of a step)", "occ/lam"),
    CORRELATION,
    PENALTY,
    FIRST_ORDER,
    SECOND_ORDER,
    Panel("MTP head 1 as a drafter", "share of tokens accepted", "mtp/agreement_1"),
]
NOT_THE_EXPERIMENT = set("seed out cache_dir data_dir device save_every keep steps".split())


def group_runs(folders):
    """{label: [records of each seed]}: runs that differ only in seed and folder share a line, labelled by the rest."""
    runs = [read_metrics(folder) for folder in folders]
    differ = []
    for name, value in runs[0][0]["config"].items():
        same = all(header["config"].get(name) == value for header, _ in runs)
        if name != "regime" and name not in NOT_THE_EXPERIMENT and not same:
            differ.append(name)
    groups, seen = {}, set()
    for folder, (header, records) in zip(folders, runs):
        cfg, seed = header["config"], header["seed"]
        label = " ".join([cfg["regime"], *(f"{name}={cfg.get(name)}" for name in differ)])
        if not records:
            raise ValueError(f"{folder}: nothing logged yet")
        if (label, seed) in seen:
            there = f"seed {seed} of '{label}' is there already"
            raise ValueError(f"{folder}: {there}; a band needs different seeds")
        seen.add((label, seed))
        groups.setdefault(label, []).append(records)
    return groups


def series(runs, value, points):
    """Steps that every run has, and the interval of a number over runs at each: [] and [] where there is none.

    More than `points` steps are averaged in blocks, run by run, so that the interval is that of the block's mean.
    """
    tables = []
    for records in runs:
        values = {r["step"]: value(r) if callable(value) else r.get(value) for r in records}
        tables.append({step: y for step, y in values.items() if y is not None})
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    if not steps:
        return [], []
    blocks = np.array_split(np.array(steps), min(points, len(steps)))
    intervals = [interval([np.mean([table[s] for s in block]) for table in tables]) for block in blocks]
    return [block.mean() for block in blocks], intervals


def draw_panel(axis, groups, panel, points):
    """A line a group of runs, on a linear axis with the band of its 95 % interval."""
    heights = []
    for i, (name, runs) in enumerate(groups.items()):
        steps, intervals = series(runs, panel.value, points)
        mean, half = np.array(intervals).reshape(-1, 2).T
        color = f"C{list(REPRODUCED).index(name) if name in REPRODUCED else i}"
        axis.plot(steps, mean, color=color, label=f"{name} (n = {len(runs)})")
        if panel.scale == "linear":
            axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
        heights += [abs(y) for y in mean if y]
    if heights and panel.scale == "symlog":
        axis.set_yscale("symlog", linthresh=max(heights) / 30)
    elif heights:
        axis.set_yscale(panel.scale)
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.ylabel)
    axis.grid(alpha=0.3)


def pyplot():
    """matplotlib without a screen, imported when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_panels(path, panels, rows=1, points=12):
    """A picture of (groups, panel) pairs. By default in 12 blocks of steps: probes are noisy."""
    columns = len(panels) // rows
    size = (4.5 * columns, 8) if rows > 1 else (15, 5)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, layout="constrained")
    for i, (axis, (groups, panel)) in enumerate(zip(axes.flat, panels)):
        draw_panel(axis, groups, panel, points)
        axis.set_ylim(*panel.limits)
        if panel.x != "step":  # sizes of a minibatch
            axis.set_xscale("log", base=2)
            for size in MARKED:
                axis.axvline(size, color="gray", linestyle=":")
        if groups and (i == 0 or list(groups) != list(panels[i - 1][0])):  # other lines than the panel before
            axis.legend(fontsize="small")
    save(figure, path)


def save(figure, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot().close(figure)


def plot(folders, path):
    """Curves of one or more runs, as a picture: reward, score, λ_t, c_t, v_t² and the two terms of Δ_MTP."""
    groups = group_runs(folders)
    draw_panels(path, [(groups, panel) for panel in PANELS], rows=2, points=60)


# ----------------------------------------------------------------------------------------------------------------------
# After a few updates of one rollout: where λ_t comes from


def all_updates_but_the_last(cfg, model, heads, optimizer, seed):
    """A rollout from a run's state and its updates but the last.

    They are those of train.step_of_rl with λ = 0, without the KL term and what is special to --released.
    Returns (the last minibatch, the heads as at the rollout), or None if there was only one: then every δ is 0.
    """
    regime, algo = occ.REGIMES[cfg.regime], rl.ALGOS[cfg.algo]
    problems, generator = rl.training_problems(cfg, seed), torch.Generator().manual_seed(seed)
    tok, heads_at_rollout = rl.get_tokenizer(cfg.tokenizer), copy.deepcopy(heads)
    batch, _, _ = rl.rollout(model, heads, tok, problems, algo, cfg, generator)
    adv_B = rl.advantages(batch["reward"].view(-1, cfg.num_generations), algo.advantage).flatten()
    minibatches = rl.minibatches(model, heads, batch, adv_B, algo, cfg)
    for mb in minibatches[:-1]:
        logp, logp_mtp, _ = rl.logprobs(model, heads, mb, cfg, door=0.0)
        mb.setdefault("old", logp.detach())
        mb.setdefault("old_mtp", logp_mtp.detach())
        loss_heads = rl.mtp_loss(regime.heads_loss, logp_mtp, mb, mb["adv"], algo)
        optimizer.zero_grad()
        (rl.trunk_policy_loss(logp, mb, algo) + loss_heads).backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        torch.nn.utils.clip_grad_norm_(list(heads.parameters()), 1.0)
        optimizer.step()
    return (minibatches[-1], heads_at_rollout) if len(minibatches) > 1 else None


def deltas_of(model, heads, mb, cfg):
    """(δ_RL, δ_MTP) of a minibatch, (B, T-1) each, and the mean λ of the authors' code (see train.py --released)."""
    with torch.no_grad():
        logp, logp_mtp, _ = rl.logprobs(model, heads, mb, cfg)
    deltas = occ.token_deltas(logp, mb["old"], logp_mtp, mb["old_mtp"], mb["mask_mtp"])
    return deltas, rl.released_lam(logp, logp_mtp, mb).mean().item()


def explain(args):
    """Which tokens make λ_t: one rollout from a run's checkpoint and its updates with λ = 0 (before them δ is 0).

    The picture has δ_RL·δ_MTP and δ_MTP² as colours under the text of a few responses.
    """
    cfg, state = load_run(args.run, find_device(args.device), with_heads=True)
    if cfg.updates_per_rollout == 1:
        raise ValueError(f"{args.run}: with one update a rollout every δ is 0, and so is lambda")
    last = all_updates_but_the_last(cfg, *state, 10**9 + args.seed)
    if last is None:
        few = "too few prompts have both right and wrong samples here"
        raise ValueError(f"{args.run}: {few}; try another --seed")
    mb, heads_at_rollout = last
    model, heads, _ = state
    deltas, released = deltas_of(model, heads, mb, cfg)
    product, square = deltas[0] * deltas[1], deltas[1].square()
    c_hat, v2_hat = product.sum().item(), square.sum().item()
    regime, algo = occ.REGIMES["occ"], rl.ALGOS[cfg.algo]
    terms, _, _ = rl.probe(model, heads, mb, deltas, regime, algo, cfg, heads_at_rollout)
    c, v2, cos = terms["occ/c"], terms["occ/v2"], terms["occ/cos"]
    largest = product.flatten().abs().topk(min(10, product.numel())).indices
    share = 100 * product.flatten()[largest].sum().item() / c_hat if c_hat else 0.0
    path = Path(args.out or Path(args.run) / "explain.png")
    draw_tokens(path, rl.get_tokenizer(cfg.tokenizer), mb, product, square)
    return [
        f"The last update of one rollout: {int(mb['mask_mtp'].any(1).sum())} tokens.",
        f"ĉ = {c_hat:.4g}, v̂² = {v2_hat:.4g}",
        f"λ, ratio of sums (paper):               {c_hat / (v2_hat + 1e-8):8.4f}",
        f"λ, mean of ratios × 0.1 / mtp_depth:    {released:8.4f}   (released code)",
        f"λ, exact gradients, c/v²:               {c / max(v2, 1e-30):8.4f}   c = {c:.4g}, v² = {v2:.4g}, cosine {cos:.3f}",
        f"The ten most influential tokens make {share:.0f} % of ĉ.",
        str(path),
    ]


def draw_tokens(path, tok, mb, product, square, responses=8):
    """Colours under the text of a few different responses: those with the largest |δ_RL·δ_MTP|."""
    rows, seen = [], set()
    for row in product.abs().sum(1).argsort(descending=True).tolist():
        text = tuple(mb["tokens"][row].tolist())
        if text not in seen and len(rows) < responses:
            rows.append(row)
        seen.add(text)
    width, labels = int(mb["mask"].sum(1).max()), []
    for row in rows:
        prompt = mb["tokens"][row, : 1 + int(mb["mask"][row].int().argmax())].tolist()
        labels.append(tok.decode(prompt).strip()[-24:].replace("$", r"\$"))
    size = (1.2 * width + 4, 0.45 * len(rows) + 1.5)
    figure, axes = pyplot().subplots(1, 2, figsize=size, layout="constrained")
    panels = ((axes[0], product, "δ_RL · δ_MTP", "RdBu"), (axes[1], square, "δ_MTP²", "Greens"))
    for axis, values, title, colors in panels:
        grid = torch.full((len(rows), width), math.nan)
        for i, row in enumerate(rows):
            mask, tokens = mb["mask"][row], mb["tokens"][row, 1:]
            grid[i, : int(mask.sum())] = values[row][mask].cpu()
            for j, token in enumerate(tokens[mask].tolist()):
                text = "END" if token == tok.eot_token else repr(tok.decode([token]))[1:-1]
                axis.text(j, i, text.replace("$", r"\$"), ha="center", va="center", fontsize=9)
        top = float(grid.nan_to_num(0).abs().max()) or 1.0
        bottom = -top if values is product else 0
        image = axis.imshow(grid.numpy(), colors, vmin=bottom, vmax=top, aspect="auto", alpha=0.7)
        axis.set_yticks(range(len(rows)), labels)
        axis.set(title=title, xlabel="token of the response")
        figure.colorbar(image, ax=axis)
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# One step: what would MTP add to it?

LAMS = [-0.5, -0.2, -0.1, -0.05, 0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
ZERO = LAMS.index(0.0)
SIZES = [16, 32, 64, 128, 256, 512]  # responses a minibatch
MARKED = (64, 512)  # what training has by default, and what the paper has
ADAM_EPS = 1e-8
PARTS = 12  # which the jackknife leaves out, one at a time; fewer of fewer minibatches
HALVES = (slice(0, None, 2), slice(1, None, 2))  # of the minibatches
PROXIES = {  # a λ that is measured for each minibatch, and its name
    "lam_logprob": "log-probs (paper)",
    "lam_released": "mean of ratios × 0.1",
    "lam_hidden": "hidden states",
    "lam_frozen": "log-probs, frozen heads",
    "lam_star": "exact c/v²",
}


def onestep(args):
    """Whether MTP would help a run, and at which λ: what one step gains, without the noise that g and m share.

    D(λ) = Σ_j E[g_j] E[u_j] / (√E[u_j²] + ε),  u = clip(g + λ m),  is the expected first-order gain of a step of Adam
    whose second moments have converged: idealised. It is given relative to λ = 0. The unit is a minibatch as in
    training, after one real update of its rollout; E[g] E[u] is from products of different ones. The answer is yes if
    the 95 % interval of the gain is above 0, and no if it is below 1 %.
    """
    found = measure_step(args.run, args.checkpoint, args.rollouts, find_device(args.device))
    path = Path(args.run) / f"onestep-{args.checkpoint}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    of = f"{found['minibatches']} minibatches of {found['responses']} responses"
    lines = [f"{args.run}, {args.checkpoint}, {of}. Gain of one step over that with λ = 0, in %; ± 95 % (jackknife):", ""]
    rows = []
    for lam in LAMS:
        rows.append([lam, cell(found[f"policy/gain_{lam:g}"]), cell(found[f"ce/gain_{lam:g}"])])
    lines += [*markdown(["λ", "m of policy", "m of ce"], rows), ""]

    rows = []
    for size in SIZES:
        row = [size]
        for kind in ("policy", "ce"):
            gain = found.get(f"{kind}/gain_at_{size}", (math.nan, math.nan))
            row += [found.get(f"{kind}/lam_at_{size}", "–"), cell(gain)]
        rows.append(row)
    lines.append("By responses a minibatch, without the clip: the best λ by each half of the minibatches, and what it gains "
                 "in the other (means of the two):")  # fmt: skip
    lines += [*markdown(["responses", "λ, policy", "gain", "λ, ce", "gain"], rows), ""]

    for kind in ("policy", "ce"):
        cos, noise_g, noise_m = (found[f"{kind}/{key}"] for key in ("cos", "noise_g", "noise_m"))
        lines.append(f"m of {kind}: cosine of E g and E m {cos:.2f}; of a minibatch's ‖g‖² {noise_g:.0f} % and ‖m‖² "
                     f"{noise_m:.0f} % is noise")  # fmt: skip
    lines.append(f"Lη of Adam's steps on fresh samples {cell(found['L_eta'], 3)} (of the clipped surrogate)")
    for kind in ("policy", "ce"):
        lam, (mean, half) = found[f"{kind}/best/lam"], found[f"{kind}/best/gain"]
        answer = "yes" if mean > half else "no" if mean + half < 1 else "cannot be told"
        lines.append(f"Would MTP help this run, through m of {kind}? {answer}: at the λ that one half of the minibatches "
                     f"chooses (mean of both halves {lam:g}) a step gains {cell((mean, half))} % in the other.")  # fmt: skip
    return lines


def measure_step(folder, name, rollouts, device):
    """What `onestep` says of a checkpoint, as a flat dict of numbers and of (mean, half-width)."""
    cfg, state = load_run(folder, device, f"{name}.pt", with_heads=True)
    # Two minibatches a rollout: the first updates the weights, the second is measured.
    cfg.prompts_per_step = 2 * (cfg.prompts_per_step // cfg.updates_per_rollout)
    cfg.updates_per_rollout = 2
    gradients, numbers = [], []
    for i in tqdm(range(rollouts), f"{folder} {name}", disable=None):
        # Loading the checkpoint again would not do: Adam's moments share its memory.
        moved = copy.deepcopy(state)
        last = all_updates_but_the_last(cfg, *moved, 10**9 + i)
        if last is not None:  # else too few prompts had both right and wrong samples
            of_minibatch = measure_minibatch(cfg, state[0], moved, *last)
            gradients.append(of_minibatch[0])
            numbers.append(of_minibatch[1])
    if len(numbers) < 8:
        few = f"{len(numbers)} minibatches have a gradient, which are too few"
        raise ValueError(f"{folder}: {few}; more --rollouts?")
    g, m_policy, m_ce = torch.stack(gradients, 1)
    responses = cfg.prompts_per_step * cfg.num_generations // 2
    found = {"rollouts": rollouts, "minibatches": len(g), "responses": responses}
    found["L_eta"] = interval([each["L_eta"] for each in numbers])
    for kind, m in (("policy", m_policy), ("ce", m_ce)):
        for key, value in gains_of_steps(g, m, responses).items():
            found[f"{kind}/{key}"] = value
    for proxy in PROXIES:
        lam_N = torch.tensor([each[f"occ/{proxy}"] for each in numbers])
        found[f"{proxy}/lam"] = lam_N.mean().item()
        found[f"{proxy}/gain"] = gain_of_a_proxy(g, m_policy, lam_N)
    return found


def measure_minibatch(cfg, before, moved, mb, heads_at_rollout):
    """Of a minibatch: (3, P) g, m of the policy loss and m of cross-entropy; and numbers, as rl.probe, and Lη.

    before: the trunk at the rollout. moved: trunk, heads and optimizer after an update in which mb had no part.
    """
    model, heads, _ = moved
    algo, trunk = rl.ALGOS[cfg.algo], list(model.parameters())
    deltas, released = deltas_of(model, heads, mb, cfg)
    numbers, g, m = rl.probe(model, heads, mb, deltas, occ.REGIMES["occ"], algo, cfg, heads_at_rollout)
    numbers["occ/lam_released"] = released
    _, logp_mtp, _ = rl.logprobs(model, heads, mb, cfg)
    m_ce = occ.flat_grad(rl.mtp_loss("ce", logp_mtp, mb, mb["adv"], algo), trunk)
    logp, _, _ = rl.logprobs(before, None, mb, cfg)
    g_before = occ.flat_grad(rl.trunk_policy_loss(logp, mb, algo), list(before.parameters()))
    u = torch.cat([p.grad.flatten() for p in trunk])  # along which the update went
    vector = torch.nn.utils.parameters_to_vector
    delta = vector(before.parameters()).detach() - vector(trunk).detach()
    numbers["L_eta"] = curvature(g_before, g, delta, u)
    return torch.stack((g, m, m_ce)), numbers


def curvature(g, g_after, delta, u):
    """Lη: L = <g - g_after, delta>/‖delta‖² along a step -delta, times η = ‖delta‖/‖u‖, as if it were -η u.

    g and g_after, before and after the step, are of samples that had no part in it: those that chose it fall faster.
    """
    return occ.product(g - g_after, delta) / (delta.norm() * u.norm()).item()


def across(a, b):
    """Mean of <a_i, b_j> over i ≠ j: of independent estimates, without the noise that a_i and b_i share."""
    n = len(a)
    return ((a.sum(0) @ b.sum(0) - (a * b).sum()) / max(n * (n - 1), 1)).item()


def clipped(u):
    """u (..., P) as training clips the gradient: no longer than 1."""
    return u / u.norm(dim=-1, keepdim=True).clamp(min=1.0)


def step_gains(g_NP, u_NP, sizes=(1.0,)):
    """D of `onestep` along u: (S, 1 + parts), of all N minibatches, then without each of some parts of them.

    sizes: of a minibatch in units of those given, each below N. Then E[u²] = (E u)² + s²/size, s² the variance.
    """
    terms, parts = (g_NP, u_NP, g_NP * u_NP, u_NP.square()), min(PARTS, len(g_NP))
    whole, size_S1 = [x.sum(0) for x in terms], torch.tensor(sizes)[:, None]
    gains = []
    for left_out in (slice(0), *(slice(part, None, parts) for part in range(parts))):
        n = len(g_NP) - len(g_NP[left_out])
        g, u, gu, uu = [total - x[left_out].sum(0) for total, x in zip(whole, terms)]
        product = (g * u - gu) / (n * (n - 1))  # E[g_j] E[u_j], from products of different minibatches
        variance = (uu - u.square() / n) / (n - 1)
        square_SP = (u / n).square() + variance * (1 / size_S1 - 1 / n)
        gains.append((product / (square_SP.clamp(min=0).sqrt() + ADAM_EPS)).sum(1))
    return torch.stack(gains, 1)


def gains_by_lam(g, m, sizes=(1.0,), clip=True):
    """step_gains along g + λ m for the λ of LAMS: (len(LAMS), S, 1 + parts)."""
    gains = []
    for lam in LAMS:
        u = g + lam * m
        gains.append(step_gains(g, clipped(u) if clip else u, sizes))
    return torch.stack(gains)


def relative_gain(gain, gain_0):
    """(gain of a step over that of another, minus 1, in %; half-width of its 95 % interval), of rows of step_gains.

    The interval is the jackknife's, with Student's t. nan where that other step is not sure to gain anything.
    """
    if (gain_0 <= 0).any():
        return math.nan, math.nan
    percent = (100 * (gain / gain_0 - 1)).tolist()
    left_out = percent[1:]
    freedom = len(left_out) - 1
    variance = freedom**2 / len(left_out) * statistics.variance(left_out)
    return percent[0], student_t(freedom) * variance**0.5


def gain_of_a_proxy(g, m, lam_N):
    """What steps along g_i + λ_i m_i gain over those with λ = 0."""
    u = g + lam_N[:, None] * m
    return relative_gain(step_gains(g, clipped(u))[0], step_gains(g, clipped(g))[0])


def chosen_on_one_half(even, odd):
    """(λ, gain): the best λ by each half of the minibatches, and its gain in the other half; means of the two.

    The halves are gains_by_lam of one size, (len(LAMS), 1 + parts). A λ that is chosen and valued on the same minibatches
    always looks as if it helped.
    """
    lams, gains = [], []
    for here, there in ((even, odd), (odd, even)):
        best = int(here[:, 0].argmax())
        lams.append(LAMS[best])
        gains.append(relative_gain(there[best], there[ZERO]))
    return statistics.fmean(lams), mean_of(gains)


def gains_of_steps(g, m, responses):
    """What one kind of m adds to a step, as a dict: gains by λ and by size of minibatch, and how g and m lie."""
    found = {}
    gains = gains_by_lam(g, m)[:, 0]
    for lam, gain in zip(LAMS, gains):
        found[f"gain_{lam:g}"] = relative_gain(gain, gains[ZERO])
    halves = [gains_by_lam(g[rows], m[rows])[:, 0] for rows in HALVES]
    found["best/lam"], found["best/gain"] = chosen_on_one_half(*halves)
    half = len(g) // 2
    fewest = half - math.ceil(half / PARTS)  # minibatches in a half, without a part
    sizes = [size for size in SIZES if size < fewest * responses]
    in_minibatches = [size / responses for size in sizes]
    even, odd = [gains_by_lam(g[rows], m[rows], in_minibatches, clip=False) for rows in HALVES]
    for i, size in enumerate(sizes):
        found[f"lam_at_{size}"], found[f"gain_at_{size}"] = chosen_on_one_half(even[:, i], odd[:, i])
    g2, c, v2 = across(g, g), across(g, m), across(m, m)
    found["cos"] = c / (g2 * v2) ** 0.5 if g2 > 0 and v2 > 0 else math.nan  # noise can make a square negative
    found["noise_g"] = 100 - 100 * g2 / g.square().sum(1).mean().item()
    found["noise_m"] = 100 - 100 * v2 / m.square().sum(1).mean().item()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The reproduction: train every regime on several seeds, measure one step, then draw figures and write tables

SETTING = dict(eval_k=32, probe_every=5, save_every=25, keep="0,25,60,120")  # all else as in train.py
FAST = dict(task="add,sub", difficulty=1, n_layer=2, pretrain_steps=100, pretrain_batch=64, prompts_per_step=8,
            probe_every=2, eval_every=2, eval_problems=4, eval_k=4, device="cpu")  # fmt: skip
REPRODUCED = {  # the first is what the others are compared with
    "detach": dict(regime="detach"),
    "ce": dict(regime="ce"),
    "policy": dict(regime="policy"),
    "occ": dict(regime="occ"),
    "exact": dict(regime="exact"),
    "policy-0.1": dict(regime="policy", lam=0.1),
    "policy-0.5": dict(regime="policy", lam=0.5),
    "exact-ce": dict(regime="exact-ce"),
}
DEFAULTS = "detach,ce,policy,occ,exact,policy-0.1"
SWEEP = [label for label in REPRODUCED if label.startswith("policy")]
JUDGED = PROXIES | {"policy/best": "best constant"}
STATES = "ckpt-0 ckpt-25 ckpt-60 ckpt-120 ckpt".split()  # of detach and of occ, where one step is measured


def reproduce(args):
    """Train the regimes on several seeds; draw the paper's figures, write its tables, and test its claims.

    All regimes of a seed start from the same pretrained weights. Finished runs are not repeated, unfinished ones go on;
    one that breaks down is named, and the others are drawn without it.
    """
    out, start = Path(args.out or "out/reproduce"), time.perf_counter()
    steps, rollouts = args.steps or (10 if args.fast else 250), 16 if args.fast else 48
    seeds = range(args.first_seed, args.first_seed + (args.seeds or (2 if args.fast else 5)))
    common = SETTING | dict(steps=steps, cache_dir=f"{out}/base") | (FAST if args.fast else {})
    plan = []
    for label in args.regimes.split(","):
        for seed in seeds:
            plan.append(common | REPRODUCED[label] | dict(seed=seed, out=f"{out}/{label}-s{seed}"))
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    train = functools.partial(train_one, threads=threads)
    measure = functools.partial(measure_one, rollouts=rollouts, threads=threads)
    folders = [out / f"{label}-s{seed}" for label in ("detach", "occ") for seed in seeds]
    states = list(itertools.product(folders, STATES))
    errors = []  # "" of what went well
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        # The first run of a seed pretrains for the others.
        for wave in (plan[: len(seeds)], plan[len(seeds) :]):
            errors += tqdm(pool.map(train, wave), "runs", len(wave), disable=None)
        finished = errors.count("")
        errors += tqdm(pool.map(measure, states), "one step", len(states), disable=None)
    draw(out, steps)
    failed = [line for line in errors if line]
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    minutes = (time.perf_counter() - start) / 60
    print(f"{finished} of {len(plan)} runs in {minutes:.1f} minutes; figures and tables are in {out}")
    return 1 if failed else 0


def train_one(flags, threads):
    """Train, or go on, in a process of its own. Returns "", or a line that says what went wrong."""
    folder, arguments = flags["out"], [f"--{name}={value}" for name, value in flags.items()]
    if (Path(folder) / "metrics.jsonl").exists():
        try:
            config, ckpt = read_run(folder)
        except ValueError as error:
            return str(error)
        for name in set(flags) - {"steps"}:
            if config.get(name) != flags[name]:
                there = f"a run with --{name} {config.get(name)}, not {flags[name]}"
                return f"{folder}: {there}: name another --out"
        if ckpt and ckpt["step"] == flags["steps"]:
            return ""
        arguments = ["--resume", folder, "--steps", str(flags["steps"])]
        Path(folder, "onestep-ckpt.json").unlink(missing_ok=True)  # ckpt.pt will be another
    return run_script(folder, ["train.py", *arguments], threads)


def measure_one(state, rollouts, threads):
    """`onestep` at a checkpoint, in a process of its own, unless that is done or not to be had. Returns as train_one."""
    folder, name = state
    path = folder / f"onestep-{name}.json"
    if not (folder / f"{name}.pt").exists():
        return ""
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["rollouts"] == rollouts:
        return ""
    arguments = ["eval.py", "onestep", str(folder), f"--checkpoint={name}", f"--rollouts={rollouts}"]
    return run_script(folder, arguments, threads)


def run_script(folder, arguments, threads):
    script = Path(__file__).with_name(arguments[0])
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(script), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
    return f"{folder}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}" if done.returncode else ""


def finished_runs(out, steps):
    """{label: {seed: records}} of the runs in folders out/<label>-s<seed> that have made their steps.

    What `onestep` found at a step stands in its record, each mean as onestep/<key>.
    """
    runs = {}
    for label in REPRODUCED:
        for path in sorted(out.glob(f"{label}-s*/metrics.jsonl")):
            folder, seed = path.parent, int(path.parent.name.rpartition("-s")[2])
            _, records = read_metrics(folder)
            if not records or records[-1]["step"] != steps:
                print(f"left out: {folder}: not at step {steps}", file=sys.stderr)
                continue
            for record in records:
                name = "ckpt" if record["step"] == steps else f"ckpt-{record['step']}"
                path = folder / f"onestep-{name}.json"
                found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
                for key, value in found.items():
                    record[f"onestep/{key}"] = value[0] if isinstance(value, list) else value
            runs.setdefault(label, {})[seed] = records
    if not runs:
        raise ValueError(f"{out}: no finished run to draw")
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Claims and predictions


def final(records, key="eval/score"):
    """Mean of an evaluation over the last fifth of training."""
    return statistics.fmean(r[key] for r in records if key in r and r["step"] >= 0.8 * records[-1]["step"])


def statistic(records, name, key):
    """One number of a run: what CLAIMS says of the logged `key`, nan where it was not logged."""
    steps, thirds = records[-1]["step"], ([], [], [])
    for r in records:
        if key in r and r["step"] > 0 and not math.isnan(r[key]):
            thirds[min(3 * (r["step"] - 1) // steps, 2)].append(r[key])
    early, middle, late = [statistics.fmean(third) if third else math.nan for third in thirds]
    if name == "mean":
        return interval(sum(thirds, []))[0]
    if name == "log2 of late over early":
        return math.log2(max(late, 1e-30) / max(early, 1e-30))
    if name == "middle - start":
        return middle - records[0][key]
    return {"early": early, "late": late, "early - late": early - late, "middle - late": middle - late}[name]


ANY = math.inf
# H5, seconds of a step, needs an idle machine: tests/bench.py. H7: predictions.
CLAIMS = [  # claim, quantity, regime, statistic of a run, key, compared with, claimed to lie above, below
    ("H1", "cosine of g and m of ce, without noise", "detach", "mean", "onestep/ce/cos", None, -0.1, 0.1),
    ("H1", "ce: log2 of v², last third over first", "ce", "log2 of late over early", "occ/v2", None, -1, ANY),
    ("H1", "ce − detach, points", "ce", "final", "eval/score", "detach", -ANY, 0),
    ("H2", "cosine of g and m of policy, without noise", "occ", "mean", "onestep/policy/cos", None, 0, ANY),
    ("H2", "the same, early − late", "occ", "early - late", "onestep/policy/cos", None, 0, ANY),
    ("H2", "policy: log2 of v², last third over first", "policy", "log2 of late over early", "occ/v2", None, -1, ANY),
    ("H2", "policy: score, middle third − start", "policy", "middle - start", "eval/score", None, 0, ANY),
    ("H2", "policy: score, middle third − last", "policy", "middle - late", "eval/score", None, 0, ANY),
    ("H3", "occ: λ_t, first third − last", "occ", "early - late", "occ/lam", None, 0, ANY),
    ("H4", "occ − detach, points", "occ", "final", "eval/score", "detach", 0, ANY),
    *[("H6", f"occ − {label}, points", "occ", "final", "eval/score", label, 0, ANY) for label in SWEEP],
]  # fmt: skip


def verdict(mean, half, above, below):
    """ "reproduced" if the interval lies where the claim says, "not" if it lies elsewhere, else "undecided"."""
    if math.isnan(half):
        return "undecided"
    if above < mean - half and mean + half < below:
        return "reproduced"
    return "not" if mean + half <= above or mean - half >= below else "undecided"


def differences(runs, label, other, key="eval/score"):
    """[last fifth of a regime's run less that of another's] of the seeds that both have."""
    ours, theirs = runs.get(label, {}), runs.get(other, {})
    return [final(ours[s], key) - final(theirs[s], key) for s in sorted(set(ours) & set(theirs))]


def judged_claims(runs):
    """A row of CLAIMS each: claim, quantity, interval over seeds, n, where it should lie, verdict."""
    rows = []
    for claim, quantity, label, name, key, other, above, below in CLAIMS:
        if other:
            values = differences(runs, label, other, key)
        else:
            values = [statistic(records, name, key) for records in runs.get(label, {}).values()]
        mean, half = interval(values)
        if below == ANY:
            claimed = f"above {above:g}"
        else:
            claimed = f"below {below:g}" if above == -ANY else f"{above:g} to {below:g}"
        n = sum(not math.isnan(value) for value in values)
        rows.append([claim, quantity, cell((mean, half), 3), n, claimed, verdict(mean, half, above, below)])
    return rows


GROWTH = 3.6  # points a unit of ln t, fitted to detach on seeds 100 and 101


def predicted_difference(gains, steps):
    """Points to `detach`, mean over the last fifth of training, if a regime's steps gain F(t) times those of detach.

    gains: {step: 100 (F - 1)}, interpolated linearly. `detach` scores S(t) = a + GROWTH ln t; a regime has lived
    τ(t) = ∫ F dt, so it scores S(τ(t)). nan where F is not above 0: no prediction.
    """
    factors = 1 + np.interp(range(1, steps + 1), list(gains), list(gains.values())) / 100
    if factors.min() <= 0:
        return math.nan
    lived = factors.cumsum() / range(1, steps + 1)  # τ(t)/t
    return GROWTH * float(np.log(lived[round(0.8 * steps) - 1 :]).mean())


def predictions(runs, steps):
    """Rows of a table: what one step says of whole runs, beside what they did; H7.

    The steps are those of the run whose heads learn by the same loss: `detach` for ce, `occ` for the others.
    """
    rows = []
    for label in ("ce", *SWEEP, "occ"):
        states, kind = ("detach", "ce") if label == "ce" else ("occ", "policy")
        key, share = f"onestep/{kind}/gain_{REPRODUCED[label].get('lam', 1.0):g}", 1.0
        if label == "occ":  # its own λ_t, which is 0 in the first of four updates
            key, share = "onestep/lam_logprob/gain", 0.75
        predicted = {}
        for seed, records in runs.get(states, {}).items():
            gains = {r["step"]: share * r[key] for r in records if key in r}
            if gains:
                predicted[seed] = predicted_difference(gains, steps)
        measured = differences(runs, label, "detach")
        seeds = sorted(set(runs.get(label, {})) & set(runs["detach"]))
        gaps = [gap - predicted[seed] for seed, gap in zip(seeds, measured) if seed in predicted]
        intervals = [interval(x) for x in (predicted.values(), measured, gaps)]
        rows.append([label, len(measured), *map(cell, intervals)])
    return rows


def judged_proxies(runs):
    """Rows of a table, over the states of occ: λ of each proxy less the best constant λ of the state (bias), and what a
    step gains with it over λ = 0, in %. The last row is that constant, which is chosen on other minibatches.
    """
    rows = []
    for name, title in JUDGED.items():
        bias, gain = [], []
        for records in runs.get("occ", {}).values():
            states = [r for r in records if f"onestep/{name}/lam" in r]
            gaps = [r[f"onestep/{name}/lam"] - r["onestep/policy/best/lam"] for r in states]
            bias.append(interval(gaps)[0])
            gain.append(interval([r[f"onestep/{name}/gain"] for r in states])[0])
        rows.append([title, len(bias), cell(interval(bias), 2), cell(interval(gain))])
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Figures and tables of the reproduction


def draw(out, steps):
    """Every figure and every table, from the runs that lie in `out`."""
    runs = finished_runs(out, steps)
    groups = {label: list(seeds.values()) for label, seeds in runs.items()}
    with_mtp = {label: groups[label] for label in ("ce", "policy", "occ", "exact") if label in groups}
    gap = Panel("Difference to detach, seed by seed", "points of 100", "y")
    draw_panels(out / "1-scores.png", [(groups, SCORE), (gaps_to_detach(runs), gap)], points=60)
    cos = Panel("Cosine of g and m of a minibatch", "c_t / (‖g‖ v_t)", "occ/cos")
    draw_panels(out / "2-terms.png", [(with_mtp, CORRELATION), (with_mtp, PENALTY), (with_mtp, cos)])
    draw_panels(out / "3-decomposition.png", [(with_mtp, FIRST_ORDER), (with_mtp, SECOND_ORDER)])

    occ_runs, lam, gain = groups.get("occ", []), {}, {}
    for name, title in JUDGED.items():
        lam[title], gain[title] = one_line(occ_runs, f"{name}/lam"), one_line(occ_runs, f"{name}/gain")
    # Where few minibatches say little, intervals go beyond the limits.
    draw_panels(out / "4-proxies.png", [
        (lam, Panel("occ: λ of each proxy", "mean over minibatches", "y", "symlog")),
        (gain, Panel("occ: gain of a step of Adam over λ = 0", "%", "y", limits=(-25, 10))),
    ])  # fmt: skip

    cosines, gains, by_size = {}, {}, {}
    for label in ("detach", "occ"):
        for kind in ("policy", "ce"):
            line, records = f"{label}, m of {kind}", groups.get(label, [])
            cosines[line] = one_line(records, f"{kind}/cos")
            gains[line] = one_line(records, f"{kind}/gain_1")
            by_size[line] = []
            for run in records:
                gain_at = {size: run[-1].get(f"onestep/{kind}/gain_at_{size}") for size in SIZES}
                by_size[line].append([{"step": size, "y": gain} for size, gain in gain_at.items()])
    sizes = f"responses a minibatch ({MARKED[0]} here, {MARKED[1]} in the paper)"
    draw_panels(out / "5-noise.png", [
        (cosines, Panel("Cosine of g and m without noise", "cosine", "y")),
        (gains, Panel("Gain of a step of Adam at λ = 1, over λ = 0", "%", "y")),
        (by_size, Panel("At the end: λ chosen on other samples", "%", "y", limits=(-40, 40), x=sizes)),
    ])  # fmt: skip
    write_tables(out, runs, steps)


def one_line(runs, key):
    """Of each run what `onestep` found, as records with the one number y: lines of a panel may have different keys."""
    key = f"onestep/{key}"
    return [[{"step": r["step"], "y": r[key]} for r in records if key in r] for records in runs]


def gaps_to_detach(runs):
    """For each label the difference of its scores to detach's: [{"step", "y"} of each evaluation] of each seed."""
    gaps, base = {}, runs.get("detach", {})
    for label, seeds in runs.items():
        for seed in [] if label == "detach" else sorted(set(seeds) & set(base)):
            score = {r["step"]: r["eval/score"] for r in base[seed] if "eval/score" in r}
            gap = []
            for r in seeds[seed]:
                if "eval/score" in r and r["step"] in score:
                    gap.append({"step": r["step"], "y": r["eval/score"] - score[r["step"]]})
            gaps.setdefault(label, []).append(gap)
    return gaps


def write_tables(out, runs, steps):
    """Scores, differences to detach, predictions, proxies and claims."""
    one_run = next(iter(next(iter(runs.values())).values()))
    suites = [name for name in one_run[0] if name.startswith("eval/")]
    names = [name.removeprefix("eval/") for name in suites]
    scores, gaps = [], []
    for label, seeds in runs.items():
        row = [cell(interval([final(records, suite) for records in seeds.values()])) for suite in suites]
        row.append(cell(interval([records[0]["eval/score"] for records in seeds.values()])))
        for third in ("early", "late"):
            lams = [statistic(records, third, "occ/lam") for records in seeds.values()]
            row.append(cell(interval(lams), 3))
        scores.append([label, len(seeds), *row])
        to_detach = [differences(runs, label, "detach", key=suite) for suite in suites]
        if label != "detach" and to_detach[0]:
            gaps.append([label, len(to_detach[0]), *(cell(interval(values)) for values in to_detach)])
    write_table(out / "scores", ["regime", "n", *names, "before RL", "λ, first third", "last third"], scores)
    write_table(out / "differences", ["regime − detach", "n", *names], gaps)
    if "detach" in runs:
        head = ["regime − detach", "n", "predicted from one step", "measured", "measured − predicted"]
        write_table(out / "predictions", head, predictions(runs, steps))
    head = ["λ", "n", "bias", "gain of a step, %"]
    write_table(out / "proxies", head, judged_proxies(runs))
    head = ["claim", "quantity", "95 % interval", "n", "claimed", "verdict"]
    write_table(out / "claims", head, judged_claims(runs))


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
            choices, default = get_args(f.type), "" if f.default == "" else f" [{f.default}]"
            if f.type is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif choices:
                options = {"type": str, "metavar": "|".join(choices)}
            else:
                options = {"type": f.type, "metavar": f.type.__name__}
            text = (comments[f.name] + default).replace("%", "%%")
            self.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, **options)


@contextlib.contextmanager
def reporting(prog):
    """Errors as one line on stderr and an exit code: 2 the user's mistake, 1 a run that broke down, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal's encoding lacks
    wrong_paths = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, *wrong_paths)) else 1)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; a run goes on with: python train.py --resume RUN", file=sys.stderr)
        sys.exit(130)


def parse(argv):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        text = inspect.getdoc(function)
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        if name != "reproduce":
            command.add_argument("run", nargs="+" if name == "plot" else None, help="folder of a run")
        if name == "sample":
            command.add_argument("prompt", nargs="?", default="", help="what to complete [held-out problems]")
        for flag, (default, text, users) in FLAGS.items():
            if name in users.split():
                kind = {"action": "store_true"} if default is False else {"type": type(default)}
                shown = "" if default in ("", False) else f" [{default}]"
                command.add_argument(f"--{flag}", default=default, help=text + shown, **kind)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = 1 if name in ("jobs", "k", "rollouts") else 0
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise ValueError(f"--{name} {value}: must be {least} or more")
    for label in args.regimes.split(",") if args.command == "reproduce" else ():
        if label not in REPRODUCED:
            allowed = f"some of {','.join(REPRODUCED)}"
            raise ValueError(f"--regimes {args.regimes}: unknown {label!r}; allowed: {allowed}")
    return args


COMMANDS = {f.__name__: f for f in (score, sample, explain, onestep, plot, reproduce)}
FLAGS = {  # default, help, and the commands that have it
    "k": (8, "samples a problem", "score sample"),
    "temperature": (1.0, "of sampling; 0 is greedy", "score sample"),
    "speculative": (False, "the heads draft", "score sample"),
    "problems": (0, "a suite, at most; 0: 64 for score, or all of a file given by --suite; 2 for sample", "score sample"),
    "suite": ("", f"arithmetic, competition, or some of {','.join([*rl.SUITES, *rl.SCORE])},FILE.jsonl; by default the "
              "held-out problems of the run's own task", "score"),
    "max_new_tokens": (0, "longest response; 0: as the run was trained", "score"),
    "data_dir": ("", "folder of data sets; by default the run's own", "score"),
    "seed": (0, "of the samples; for explain of the problems too", "score sample explain"),
    "device": ("cpu", "cpu, or any device that torch knows", "score sample explain onestep"),
    "rollouts": (48, "how many; each gives one measured minibatch", "onestep"),
    "checkpoint": ("ckpt", "file in the run's folder, as ckpt-60 (train.py --keep 60)", "onestep"),
    "seeds": (0, "how many; 0: 5, or 2 with --fast", "reproduce"),
    "first_seed": (0, "the first of them", "reproduce"),
    "steps": (0, "length of a run; 0: as train.py", "reproduce"),
    "regimes": (DEFAULTS, f"some of {','.join(REPRODUCED)}", "reproduce"),
    "jobs": (os.cpu_count() or 1, "runs at a time", "reproduce"),
    "fast": (False, "tiny runs that show nothing but that all of it works", "reproduce"),
    "out": ("", "picture or folder to write; by default in the run's folder, or out/reproduce", "explain plot reproduce"),
}  # fmt: skip


def main(args):
    """Print what a command has to say. Returns the exit code."""
    if args.command == "reproduce":
        return reproduce(args)
    if args.command == "plot":
        path = args.out or str(Path(args.run[0]) / "curves.png")
        plot(args.run, path)
        print(path)
    else:
        print("\n".join(COMMANDS[args.command](args)))
    return 0


if __name__ == "__main__":
    with reporting("eval.py"):
        sys.exit(main(parse(sys.argv[1:])))
