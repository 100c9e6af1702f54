"""Evaluate: score a run, read what it says, see where its λ_t comes from, draw curves, reproduce the paper's claims.

    python eval.py score out/arithmetic-occ-s0 --k 32       # avg@k and pass@k with 95 % intervals, as a table
    python eval.py sample out/arithmetic-occ-s0 "47+85="    # completions of a prompt, or of held-out problems
    python eval.py explain out/arithmetic-occ-s0            # δ_RL·δ_MTP and δ_MTP² token by token
    python eval.py onestep out/arithmetic-occ-s0            # would MTP help this run, and at which λ?
    python eval.py plot out/arithmetic-*                    # reward, score, λ_t, c_t, v_t² and the two terms of Δ_MTP
    python eval.py reproduce                                # regimes × seeds, five figures, tables, claims

avg@k is the mean accuracy of k samples a problem; pass@k = 1 - C(n - c, k)/C(n, k) is the chance that one of k samples
is right, estimated without bias from n samples of which c are right (Chen et al. 2021, arXiv 2107.03374). The model is
rebuilt from the run's own config. Plots read metrics.jsonl and nothing else; runs that differ in nothing but the seed
are one line, with a 95 % band (Student's t) over seeds.

What train.py needs too is here: reading a run, curves, and the command line's manners (a mistake is one line on stderr,
exit code 2).

Dimension key: B sequences · P prompts or parameters · G samples a prompt · T positions · N minibatches
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see train.py

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
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
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import torch
from tqdm import tqdm

import mtp
import occ
import rl
from model import GPT, GPTConfig, find_device

VERSION = 2  # of the run folder's format
# What ckpt.pt holds besides its version
CHECKPOINT = "step steps seconds scores model heads optimizer".split()
# Student's t at 97.5 %, 1 to 10 degrees of freedom
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


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


def read_metrics(folder):
    """(header, a record a step) of a run. A last line cut short is left out; any other bad line raises ValueError."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder}: not a run: it has no metrics.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    if not lines:
        raise ValueError(f"{path}: empty: the run never began; start it again")
    records = [rl.parse_json(line, f"{path}:{i}") for i, line in enumerate(lines, 1)]
    try:
        version, _ = records[0]["versions"]["nanoocc"], records[0]["config"]["regime"]
    except (KeyError, TypeError):
        raise ValueError(
            f"{path}:1: not the header of a run (config, seed, commit, versions, device)"
        ) from None
    if version != VERSION:
        raise ValueError(f"{path}:1: a run of version {version}; this is version {VERSION}")
    for i, record in enumerate(records[1:], 2):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}:{i}: not the record of a step")
    return records[0], records[1:]


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


def load_run(folder, device, name="ckpt.pt"):
    """Config, trunk and heads (None in regime off) of a run's checkpoint."""
    values, ckpt = read_run(folder, name)
    if ckpt is None:
        raise ValueError(f"{folder}: no checkpoint yet; go on with python train.py --resume {folder}")
    cfg = SimpleNamespace(**values)
    try:
        model, heads = build(cfg, device)
    except AttributeError as error:
        raise ValueError(f"{folder}: a run of another version: its config has no {error.name}") from None
    heads = heads if ckpt["heads"] else None
    load_weights(ckpt, model, heads)
    return cfg, model, heads


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def pass_at_k(n, c, k):
    """Unbiased pass@k from n samples of which c are right."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values):
    """Mean and half-width of the 95 % interval over problems (a list of numbers); nan for fewer than two."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan


def equal_by_algebra(gold, candidate):
    """What math-verify (an optional package) says of two formulas, where `rl.answers_equal` says no.

    It computes with what it reads: long numbers, factorials and powers of powers are not shown to it.
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
    """The batches of args.k samples of each problem, about 512 rows at a time, and their texts."""
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
    """The table of a run, as lines of Markdown: a row a suite and one for all, in points of 100.

    The suites are the held-out problems of what the run was trained on, or those of --suite, which may share none with
    what the run has seen.
    """
    cfg, model, heads = load_run(args.run, find_device(args.device))
    suites = trained = rl.suites_of(cfg.task, cfg.data_dir)
    if args.suite:
        suites = rl.suites_of(args.suite, args.data_dir or cfg.data_dir, scoring=True)
        rl.check_apart(trained, suites)
    tok, room = rl.get_tokenizer(cfg.tokenizer), model.cfg.block_size
    new = args.max_new_tokens or cfg.max_new_tokens
    if new >= room:
        raise ValueError(f"--max_new_tokens {new}: must be below {room}, the positions that the model has")
    shown = sorted({args.k // 4, args.k} - {0, 1})  # not 1: pass@1 is avg@k
    rows, columns, lines = [], [], []
    for suite in tqdm(suites, "suites", disable=None):
        if args.suite and suite not in rl.SUITES:  # the run was not trained on any of it
            problems = rl.read_problems(suite)[: args.problems or None]
        else:
            problems = rl.held_out_problems(suite, cfg.difficulty, args.problems or 64)
        batch, texts = samples_of(cfg, model, heads, problems, args, new)
        cut = sum(len(tok.encode_ordinary(p.prompt)) + new > room for p in problems)
        if cut:
            lines.append(f"{rl.label(suite)}: {cut} prompts are longer than the {room - new} tokens that the model has "
                         "positions for; only their ends were read")  # fmt: skip
        right = batch["reward"].bool().tolist()
        if importlib.util.find_spec("math_verify"):
            golds = [problem.answer for problem in problems for _ in range(args.k)]
            for i, (gold, text) in enumerate(zip(golds, texts)):
                right[i] = right[i] or equal_by_algebra(gold, rl.extract_answer(text))
        counts = [sum(right[i : i + args.k]) for i in range(0, len(right), args.k)]
        column = [[100 * c / args.k for c in counts]]
        column += [[100 * pass_at_k(args.k, c, j) for c in counts] for j in shown]
        columns.append(column)
        rows.append([rl.label(suite), len(problems), *(cell(interval(values)) for values in column)])
        if args.speculative:
            drafted = mtp.speculation_metrics(batch["mask"], batch["draft"], cfg.mtp_depth)
            figures = [f"{name} {value:.2f}" for name, value in drafted.items()]
            lines.append(", ".join([rl.label(suite), *figures]))
    overall = []
    for values in zip(*columns):  # each suite counts alike; the interval combines theirs
        means, halves = zip(*map(interval, values))
        overall.append(cell((statistics.fmean(means), math.hypot(*halves) / len(halves))))
    rows.append(["all", sum(row[1] for row in rows), *overall])
    if set(map(rl.label, suites)) & set(rl.COMPETITION):
        lines.append("Competition problems are far beyond a small model trained from scratch: a score near zero is what to "
                     "expect of one, and what is above zero may well be guessed.")  # fmt: skip
    return [*markdown(["suite", "problems", f"avg@{args.k}", *(f"pass@{j}" for j in shown)], rows), *lines]


def sample(args):
    """Completions to read, as lines: of a prompt, or of held-out problems with their reward."""
    cfg, model, heads = load_run(args.run, find_device(args.device))
    tok, suites, problems = rl.get_tokenizer(cfg.tokenizer), rl.suites_of(cfg.task, cfg.data_dir), []
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


def pyplot():
    """matplotlib without a screen, imported when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot().close(figure)


def first_order(record):
    """λ c, the first-order term of Δ_MTP in units of η (1 - Lη)."""
    return record["occ/lam"] * record["occ/c"] if "occ/c" in record else None


def second_order(record):
    """λ² v²/2, the second-order term of Δ_MTP in units of L η²."""
    return record["occ/lam"] ** 2 * record["occ/v2"] / 2 if "occ/c" in record else None


def logged(name):
    return lambda record: record.get(name)


PANELS = [  # title, axis label, value of a record, scale of the axis
    ("Reward in training", "mean reward", logged("reward/mean"), "linear"),
    ("Held-out score", "avg@k, points of 100", logged("eval/score"), "linear"),
    ("Coefficient", "λ_t (last update of a step)", logged("occ/lam"), "linear"),
    ("First-order correlation", "c_t = ⟨g_RL, g_MTP⟩", logged("occ/c"), "symlog"),
    ("Second-order penalty", "v_t² = ‖g_MTP‖²", logged("occ/v2"), "log"),
    ("First-order term of Δ_MTP", "λ_t c_t, in units of η(1−Lη)", first_order, "symlog"),
    ("Second-order term of Δ_MTP", "λ_t² v_t² / 2, in units of Lη²", second_order, "symlog"),
    ("MTP head 1 as a drafter", "share of tokens accepted", logged("mtp/agreement_1"), "linear"),
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
            raise ValueError(
                f"{folder}: seed {seed} of '{label}' is there already; a band needs different seeds"
            )
        seen.add((label, seed))
        groups.setdefault(label, []).append(records)
    return groups


def series(runs, value, points):
    """Steps that every run has, mean and half-width of the 95 % band (nan for one run) of value(record) over runs.

    More than `points` steps are averaged in blocks, run by run, so that the band is that of the block's mean.
    """
    tables = [{r["step"]: value(r) for r in records if value(r) is not None} for records in runs]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    if not steps:
        return [], [], []
    blocks = np.array_split(np.array(steps), min(points, len(steps)))
    y = np.array([[np.mean([table[s] for s in block]) for block in blocks] for table in tables])
    return [block.mean() for block in blocks], y.mean(0).tolist(), [half_width(column) for column in y.T]


def half_width(values):
    """Of the 95 % interval (Student's t) of a mean of a few numbers; nan for one."""
    n = len(values)
    return T_95[min(n - 2, len(T_95) - 1)] * statistics.stdev(values) / n**0.5 if n > 1 else math.nan


def draw_lines(axis, groups, value, scale, points):
    """A line a group of runs, on a linear axis with a 95 % band where n > 1."""
    heights = []
    for i, (name, runs) in enumerate(groups.items()):
        steps, mean, half = series(runs, value, points)
        color = f"C{list(REPRODUCED).index(name) if name in REPRODUCED else i}"
        axis.plot(steps, mean, color=color, label=f"{name} (n = {len(runs)})")
        if scale == "linear":
            low, high = np.subtract(mean, half), np.add(mean, half)
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        heights += [abs(y) for y in mean if y]
    if heights and scale == "symlog":
        axis.set_yscale(scale, linthresh=max(heights) / 30)
    elif heights:
        axis.set_yscale(scale)
    axis.grid(alpha=0.3)


def draw_panels(path, panels, rows=1, points=12):
    """A panel for each (groups, title, label, value, scale). By default in 12 blocks of steps: probes are noisy."""
    columns = len(panels) // rows
    size = (4.5 * columns, 8) if rows > 1 else (15, 5)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, layout="constrained")
    for axis, (groups, title, label, value, scale) in zip(axes.flat, panels):
        draw_lines(axis, groups, value, scale, points)
        axis.set(title=title, xlabel="step", ylabel=label)
    if panels[0][0]:
        axes.flat[0].legend(fontsize="small")
    save(figure, path)


def plot(folders, path):
    """Draw PANELS for the runs, one line a label, and save the picture at `path`."""
    groups = group_runs(folders)
    draw_panels(path, [(groups, *panel) for panel in PANELS], rows=2, points=60)


# ----------------------------------------------------------------------------------------------------------------------
# After a few updates of one rollout: where λ_t comes from


def last_update(cfg, model, heads, optimizer, seed):
    """A rollout from a run's state and its updates but the last, with λ = 0, as in train.step_of_rl.

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
        loss_rl = rl.policy_loss(logp, mb["old"], mb["adv"], mb["mask"], mb["weight"], algo)
        optimizer.zero_grad()
        (loss_rl + rl.mtp_loss(regime.heads_loss, logp_mtp, mb, mb["adv"], algo)).backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        torch.nn.utils.clip_grad_norm_(list(heads.parameters()), 1.0)
        optimizer.step()
    return (minibatches[-1], heads_at_rollout) if len(minibatches) > 1 else None


def load_to_measure(folder, device, name="ckpt.pt"):
    """Of a run with heads: config, (trunk, heads, optimizer), and the checkpoint whose weights they have."""
    cfg, model, heads = load_run(folder, device, name)
    if heads is None:
        raise ValueError(f"{folder}: regime off has no heads, hence no MTP gradient and no lambda")
    optimizer = torch.optim.Adam([*model.parameters(), *heads.parameters()], lr=cfg.lr)
    _, ckpt = read_run(folder, name)
    load_weights(ckpt, model, heads, optimizer)
    return cfg, (model, heads, optimizer), ckpt


def explain(args):
    """One rollout from a run's checkpoint and its updates (δ is 0 before); then every token's part in λ_t.

    Returns lines, and writes a picture: δ_RL·δ_MTP and δ_MTP² as colours under the text of a few responses.
    """
    cfg, (model, heads, optimizer), _ = load_to_measure(args.run, find_device(args.device))
    if cfg.updates_per_rollout == 1:
        raise ValueError(f"{args.run}: with one update a rollout every δ is 0, and so is lambda")
    last = last_update(cfg, model, heads, optimizer, 10**9 + args.seed)
    if last is None:
        raise ValueError(
            f"{args.run}: too few prompts have both right and wrong samples here; try another --seed"
        )
    mb, heads_at_rollout = last
    with torch.no_grad():
        logp, logp_mtp, _ = rl.logprobs(model, heads, mb, cfg)
    delta_rl, delta_mtp = occ.token_deltas(logp, mb["old"], logp_mtp, mb["old_mtp"], mb["mask_mtp"])
    product, scored = delta_rl * delta_mtp, mb["mask_mtp"].any(1)
    c_hat, v2_hat = product.sum().item(), delta_mtp.square().sum().item()
    regime, algo = occ.REGIMES[cfg.regime], rl.ALGOS[cfg.algo]
    found, _, _ = rl.probe(model, heads, mb, (delta_rl, delta_mtp), regime, algo, cfg, heads_at_rollout)
    c, v2, cos = found["occ/c"], found["occ/v2"], found["occ/cos"]
    largest = product.flatten()[product.flatten().abs().topk(min(10, product.numel())).indices]
    share = 100 * largest.sum().item() / c_hat if c_hat else 0.0
    path = Path(args.out or Path(args.run) / "explain.png")
    draw_tokens(path, rl.get_tokenizer(cfg.tokenizer), mb, product, delta_mtp.square(), args.responses)
    return [
        f"The last update of one rollout: {int(scored.sum())} tokens.",
        f"ĉ = {c_hat:.4g}, v̂² = {v2_hat:.4g}",
        f"λ, ratio of sums (paper):             {c_hat / (v2_hat + 1e-8):8.4f}",
        f"λ, mean of ratios (released code):    {found['occ/lam_released']:8.4f}",
        f"λ, exact gradients, c/v²:             {c / max(v2, 1e-30):8.4f}   c = {c:.4g}, v² = {v2:.4g}, cosine {cos:.3f}",
        f"The ten most influential tokens make {share:.0f} % of ĉ.",
        str(path),
    ]


def draw_tokens(path, tok, mb, product, square, responses):
    """Colours under the text of a few different responses: those with the largest |δ_RL·δ_MTP|."""
    rows, seen = [], set()
    for row in product.abs().sum(1).argsort(descending=True).tolist():
        text = tuple(mb["tokens"][row].tolist())
        if text not in seen and len(rows) < responses:
            rows.append(row)
        seen.add(text)
    width, labels = int(mb["mask"].sum(1).max()), []
    size = (1.2 * width + 4, 0.45 * len(rows) + 1.5)
    figure, axes = pyplot().subplots(1, 2, figsize=size, layout="constrained")
    for row in rows:
        prompt = mb["tokens"][row, : 1 + int(mb["mask"][row].int().argmax())].tolist()
        labels.append(tok.decode(prompt).strip()[-24:].replace("$", r"\$"))
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
SIZES = [16, 32, 64, 128, 256, 512, 1024]  # responses a minibatch; the paper has 512
ADAM_EPS = 1e-8
HALVES = (slice(0, None, 2), slice(1, None, 2))  # of the minibatches
PROXIES = {  # of λ: a key of rl.probe, and its name
    "lam_logprob": "log-probs (paper)",
    "lam_released": "mean of ratios",
    "lam_hidden": "hidden states",
    "lam_frozen": "log-probs, frozen heads",
    "lam_star": "exact c/v²",
}
CONSTANTS = {"0": 0.0, "0.05": 0.05, "0.1": 0.1}


def onestep(args):
    """Whether MTP would help a run, and at which λ: what one step gains, without the noise that g and m share.

    D(λ) = Σ_j E[g_j] E[u_j] / (√E[u_j²] + ε),  u = clip(g + λ m),  is the expected first-order gain of a step of Adam
    whose second moments have converged: idealised. "own" has the optimizer's moments instead. A plain step of its best
    length gains <E g, E u>²/(2 L E‖u‖²). All are given relative to λ = 0. The unit is a minibatch as in training, after
    one real update of its rollout; E[g] E[u] is from products of different ones.
    """
    found = measure_step(args.run, args.checkpoint, args.rollouts, find_device(args.device))
    path = Path(args.run) / f"onestep-{args.checkpoint}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    lines = [f"{args.run}, {args.checkpoint}: {found['minibatches']} minibatches of {found['responses']} responses. Gain of "
             "one step over that with λ = 0, in %; ± 95 % by the jackknife.", ""]  # fmt: skip
    head, columns = ["λ"], []
    for kind in ("policy", "ce"):
        for step in ("adam", "own", "plain"):
            if step in found[kind]:  # there are no own moments before Adam's first step
                head.append(f"m of {kind}, {step}")
                columns.append([cell(gain) for gain in found[kind][step]])
    lines += [*markdown(head, list(zip(LAMS, *columns))), ""]

    lines.append("By responses a minibatch, adam without the clip: the best λ by each half of the minibatches, and what it "
                 "gains in the other, in % (means of the two).")  # fmt: skip
    rows = []
    for size, policy, ce in zip(SIZES, found["policy"]["sizes"], found["ce"]["sizes"]):
        rows.append([size, policy["lam"], cell(policy["gain"]), ce["lam"], cell(ce["gain"])])
    lines += [*markdown(["responses", "policy: λ", "policy: gain", "ce: λ", "ce: gain"], rows), ""]

    lines.append("Adam along g_i + λ_i m_i, λ_i of each minibatch by a proxy: mean of λ_i, gain over λ = 0, and regret, what "
                 "is lost against the best constant λ by the other half; in %.")  # fmt: skip
    rows = []
    for name, each in found["proxies"].items():
        title = PROXIES.get(name, f"constant {name}")
        rows.append([title, f"{each['lam']:.3f}", cell(each["gain"]), cell(each["regret"])])
    lines += [*markdown(["λ", "mean", "gain", "regret"], rows), ""]

    for kind in ("policy", "ce"):
        free, seen = found[kind]["noise_free"], found[kind]["of_a_minibatch"]
        lines.append(f"m of {kind}: cosine of E g and E m {cosine(*free):.2f}; of a minibatch's ‖g‖² "
                     f"{100 - 100 * free[0] / seen[0]:.0f} % and ‖m‖² {100 - 100 * free[2] / seen[2]:.0f} % is noise")  # fmt: skip
    lines.append(f"Lη of Adam's steps on fresh samples {cell(found['L_eta'], 3)} (of the clipped surrogate)")
    for kind in ("policy", "ce"):
        lam, (mean, half) = found[kind]["chosen"]["lam"], found[kind]["chosen"]["gain"]
        answer = "yes" if mean > half else "no" if mean + half < 1 else "cannot be told"
        lines.append(f"Would MTP help this run, through m of {kind}? {answer}: at λ = {lam:g}, chosen on one half and valued "
                     f"on the other, a step gains {cell((mean, half))} %.")  # fmt: skip
    return lines


def measure_step(folder, name, rollouts, device):
    """What `onestep` prints, as a dict: see there."""
    cfg, (model, heads, optimizer), ckpt = load_to_measure(folder, device, f"{name}.pt")
    cfg.prompts_per_step = 2 * (cfg.prompts_per_step // cfg.updates_per_rollout)
    cfg.updates_per_rollout, algo, trunk = 2, rl.ALGOS[cfg.algo], list(model.parameters())
    theta = torch.nn.utils.parameters_to_vector(trunk).detach()
    g, m_policy, m_ce, L_eta, lams = [], [], [], [], {key: [] for key in PROXIES}
    for i in tqdm(range(rollouts), f"{folder} {name}", disable=None):
        load_weights(ckpt, model, heads, optimizer)
        last = last_update(cfg, model, heads, optimizer, 10**9 + i)
        if last is None:  # too few prompts with both right and wrong samples
            continue
        mb, heads_at_rollout = last
        u = torch.cat([p.grad.flatten() for p in trunk])
        delta = theta - torch.nn.utils.parameters_to_vector(trunk).detach()
        logp, logp_mtp, _ = rl.logprobs(model, heads, mb, cfg)
        deltas = occ.token_deltas(logp, mb["old"], logp_mtp, mb["old_mtp"], mb["mask_mtp"])
        m_ce.append(occ.flat_grad(rl.mtp_loss("ce", logp_mtp, mb, mb["adv"], algo), trunk))
        regime = occ.REGIMES["occ"]
        found, g_after, m = rl.probe(model, heads, mb, deltas, regime, algo, cfg, heads_at_rollout)
        g.append(g_after)
        m_policy.append(m)
        for key in lams:
            lams[key].append(found[f"occ/{key}"])
        load_weights(ckpt, model)  # the same samples before the update, in which they had no part
        logp, _, _ = rl.logprobs(model, None, mb, cfg)
        loss_rl = rl.policy_loss(logp, mb["old"], mb["adv"], mb["mask"], mb["weight"], algo)
        L_eta.append(curvature(occ.flat_grad(loss_rl, trunk), g_after, delta, u))
    if len(g) < 8:
        raise ValueError(
            f"{folder}: {len(g)} minibatches have a gradient, which are too few; more --rollouts?"
        )
    g, L_eta = torch.stack(g), torch.tensor(L_eta)
    m_of = {"policy": torch.stack(m_policy), "ce": torch.stack(m_ce)}
    responses = cfg.prompts_per_step * cfg.num_generations // 2
    measured = {"rollouts": rollouts, "minibatches": len(g), "responses": responses}
    measured["L_eta"] = (L_eta.mean().item(), 1.96 * L_eta.std().item() / len(L_eta) ** 0.5)
    moments = own_moments(optimizer, trunk)
    for kind, m in m_of.items():
        pairs, sums = ((g, g), (g, m), (m, m)), sums_by_lam(g, m)
        halves = [sums_by_lam(g[rows], m[rows]) for rows in HALVES]
        not_clipped = [sums_by_lam(g[rows], m[rows], clip=False) for rows in HALVES]
        measured[kind] = {
            "chosen": chosen_on_one_half(halves),
            "sizes": [chosen_on_one_half(not_clipped, size / responses) for size in SIZES],
            "noise_free": [across(a, b) for a, b in pairs],
            "of_a_minibatch": [(a * b).sum(1).mean().item() for a, b in pairs],
        }
        for name, step in (("adam", "adam"), ("own", moments), ("plain", "plain")):
            if step is not None:
                measured[kind][name] = [relative_gain(sums[lam], sums[0.0], step) for lam in LAMS]
        if kind == "policy":
            lams |= {name: [lam] * len(g) for name, lam in CONSTANTS.items()}
            best, measured["proxies"] = best_by_the_other(halves), {}
            for name, values in lams.items():
                measured["proxies"][name] = value_of_a_proxy(g, m, torch.tensor(values), sums[0.0], best)
    return measured


def own_moments(optimizer, trunk):
    """Adam's own second moments of the trunk, without their bias, as one vector; None before its first step."""
    states = [optimizer.state[p] for p in trunk]
    if not all(states):
        return None
    beta2 = optimizer.param_groups[0]["betas"][1]
    moments = torch.cat([state["exp_avg_sq"].flatten() for state in states])
    return moments / (1 - beta2 ** float(states[0]["step"]))


def across(a, b):
    """Mean of <a_i, b_j> over i ≠ j: of independent estimates, without the noise that a_i and b_i share."""
    n = len(a)
    return ((a.sum(0) @ b.sum(0) - (a * b).sum()) / max(n * (n - 1), 1)).item()


def cosine(g2, c, v2):
    """Of estimates of ‖g‖², <g, m> and ‖m‖²; nan where noise has made one of the squares negative."""
    return c / (g2 * v2) ** 0.5 if g2 > 0 and v2 > 0 else math.nan


def curvature(g, g_after, delta, u):
    """Lη: L = <g - g_after, delta>/‖delta‖² along a step -delta, times η = ‖delta‖/‖u‖, as if it were -η u.

    g and g_after, before and after the step, are of samples that had no part in it: those that chose it fall faster.
    """
    return occ.product(g - g_after, delta) / (delta.norm() * u.norm()).item()


def clipped(u):
    """u (..., P) as training clips the gradient: no longer than 1."""
    return u / u.norm(dim=-1, keepdim=True).clamp(min=1.0)


def sums_of(g_NP, u_NP, blocks=12):
    """What `step_gains` needs of N minibatches, then of those without each of `blocks` parts, for the jackknife.

    Each is a list: how many minibatches, and sums over them (P,) of g, u, g u and u².
    """
    sums = []
    for block in range(blocks):
        g, u = g_NP[block::blocks], u_NP[block::blocks]
        sums.append([len(g), g.sum(0), u.sum(0), (g * u).sum(0), u.square().sum(0)])
    whole = [sum(parts) for parts in zip(*sums)]
    return [whole] + [[a - b for a, b in zip(whole, part)] for part in sums]


def sums_by_lam(g, m, clip=True):
    """{λ: sums_of u = g + λ m} of LAMS."""
    sums = {}
    for lam in LAMS:
        u = g + lam * m
        sums[lam] = sums_of(g, clipped(u) if clip else u)
    return sums


def step_gains(sums, step="adam", size=1.0):
    """Expected first-order gain of a step along u (see `onestep`), of each of `sums_of`.

    step: "adam", "plain", or Adam's own second moments (P,). size: of a minibatch, in units of those given, from 1/N to
    N. Then E[u²] = (E u)² + s²/size, s² the variance.
    """
    gains = []
    for n, g, u, gu, uu in sums:
        product = (g * u - gu) / (n * (n - 1))  # E[g_j] E[u_j], from products of different minibatches
        variance = (uu - u.square() / n) / (n - 1)
        square = ((u / n).square() + variance * (1 / size - 1 / n)).clamp(min=0)
        if step == "plain":
            inner = product.sum().item()
            gains.append(inner * abs(inner) / square.sum().item())  # a step backwards is a loss
        else:
            square = square if step == "adam" else step
            gains.append((product / (square.sqrt() + ADAM_EPS)).sum().item())
    return gains


def relative_gain(sums, sums_0, step="adam", size=1.0):
    """(gain of a step along u over that of a step along u_0, minus 1, in %; half-width of its 95 % interval).

    The interval is the jackknife's over 12 blocks of minibatches, with Student's t.
    """
    pairs = zip(step_gains(sums, step, size), step_gains(sums_0, step, size))
    ratios = [100 * (a / b - 1) if b else math.nan for a, b in pairs]
    left_out = ratios[1:]
    n, mean = len(left_out), statistics.fmean(left_out)
    variance = (n - 1) / n * sum((x - mean) ** 2 for x in left_out)
    return ratios[0], 2.20 * variance**0.5


def best_lam(sums, size=1.0):
    """The λ along which a step of Adam gains most, of `sums_by_lam`."""
    gains = {lam: step_gains(sums[lam][:1], "adam", size)[0] for lam in sums}
    return max(gains, key=gains.get)


def mean_of_two(gains):
    """Of two independent (mean, half-width)."""
    (mean_a, half_a), (mean_b, half_b) = gains
    return (mean_a + mean_b) / 2, math.hypot(half_a, half_b) / 2


def chosen_on_one_half(halves, size=1.0):
    """{"lam", "gain"}: the best λ by each half of the minibatches (their sums_by_lam), and its gain in the other; means.

    A λ that is chosen and valued on the same minibatches always looks as if it helped.
    """
    lams, gains = [], []
    for here, there in (halves, halves[::-1]):
        lam = best_lam(here, size)
        lams.append(lam)
        gains.append(relative_gain(there[lam], there[0.0], "adam", size))
    return {"lam": round(sum(lams) / 2, 3), "gain": mean_of_two(gains)}


def best_by_the_other(halves):
    """Of each half of the minibatches its sums along the λ that is best by the other half."""
    even, odd = halves
    return even[best_lam(odd)], odd[best_lam(even)]


def value_of_a_proxy(g, m, lam_N, sums_0, best):
    """Of steps of Adam along g_i + λ_i m_i: mean of λ_i, gain over λ = 0, and regret against the best constant λ.

    sums_0: those of λ = 0. best: as `best_by_the_other`; the regret is the mean of those of the halves.
    """
    u, regrets = clipped(g + lam_N[:, None] * m), []
    for rows, sums_best in zip(HALVES, best):
        mean, half = relative_gain(sums_of(g[rows], u[rows]), sums_best)
        regrets.append((-mean, half))
    gain = relative_gain(sums_of(g, u), sums_0)
    return {"lam": lam_N.mean().item(), "gain": gain, "regret": mean_of_two(regrets)}


# ----------------------------------------------------------------------------------------------------------------------
# The reproduction: train every regime on several seeds, then draw figures and write tables from what was logged

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
DEFAULTS = "detach,ce,policy,occ,exact,policy-0.1"  # the others take longer than they tell
SWEEP = [label for label in REPRODUCED if label.startswith("policy")]
STATES = "ckpt-0 ckpt-25 ckpt-60 ckpt-120 ckpt".split()  # of detach and of occ, where one step is measured
GROWTH = 3.6  # points a unit of ln t, fitted to detach on seeds 100 and 101: see predicted_difference


def reproduce(args):
    """Train the regimes on several seeds; draw the paper's figures, write its tables, and test its claims.

    All regimes of a seed start from the same pretrained weights. Finished runs are not repeated, unfinished ones go on;
    one that breaks down is named, and the others are drawn without it. The claims are CLAIMS; `verdict` decides.
    """
    out, start = Path(args.out or "out/reproduce"), time.perf_counter()
    steps, rollouts = args.steps or (10 if args.fast else 250), 16 if args.fast else 48
    common = SETTING | dict(steps=steps, cache_dir=f"{out}/base") | (FAST if args.fast else {})
    seeds, plan = range(args.seeds or (2 if args.fast else 5)), []
    for label in args.regimes.split(","):
        plan += [common | REPRODUCED[label] | dict(seed=s, out=f"{out}/{label}-s{s}") for s in seeds]
    threads, failed = max((os.cpu_count() or 1) // args.jobs, 1), []
    bar = tqdm(total=len(plan), desc="runs", disable=None)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        # The first run of a seed pretrains for the others.
        for wave in (plan[: len(seeds)], plan[len(seeds) :]):
            for line in pool.map(train_one, wave, [threads] * len(wave)):
                failed += [line] if line else []
                bar.update()
        finished = len(plan) - len(failed)
        folders = [out / f"{label}-s{s}" for label in ("detach", "occ") for s in seeds]
        states = list(itertools.product(folders, STATES))
        found = pool.map(measure_one, states, [rollouts] * len(states), [threads] * len(states))
        failed += [line for line in tqdm(found, "one step", len(states), disable=None) if line]
    draw(out, steps)
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
                return (
                    f"{folder}: a run with --{name} {config.get(name)}, not {flags[name]}: name another --out"
                )
        if ckpt and ckpt["step"] == flags["steps"]:
            return ""
        arguments = ["--resume", folder, "--steps", str(flags["steps"])]
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


# ----------------------------------------------------------------------------------------------------------------------
# Statistics over seeds, and the claims


def over_seeds(values):
    """Mean and half-width of the 95 % interval (Student's t) of one number a seed, nan left out."""
    x = [value for value in values if not math.isnan(value)]
    return (statistics.fmean(x), half_width(x)) if x else (math.nan, math.nan)


def in_thirds(records, name):
    """Means of a logged number over the first, the second and the last third of training."""
    end, parts = records[-1]["step"], ([], [], [])
    for r in records:
        if name in r and r["step"] > 0:
            parts[min(3 * (r["step"] - 1) // end, 2)].append(r[name])
    return [statistics.fmean(part) if part else math.nan for part in parts]


def final(records, name="eval/score"):
    """Mean of an evaluation over the last fifth of training."""
    return statistics.fmean(r[name] for r in records if name in r and r["step"] >= 0.8 * records[-1]["step"])


def whole(records, name):
    """Mean of a logged number after step 0, nan left out."""
    return over_seeds(r[name] for r in records if name in r and r["step"] > 0)[0]


def early_minus_late(records, name):
    return in_thirds(records, name)[0] - in_thirds(records, name)[2]


def halvings(records, name):
    """log2 of the last third over the first."""
    early, _, late = in_thirds(records, name)
    return math.log2(max(late, 1e-30) / max(early, 1e-30))


def rise(records, name):
    return in_thirds(records, name)[1] - records[0][name]


def fall(records, name):
    return in_thirds(records, name)[1] - in_thirds(records, name)[2]


def seconds_of_updates(records, name):
    """Median seconds of the updates of a step, λ_t included."""
    seconds = [r["perf/update_s"] + r["perf/coefficient_s"] for r in records if "perf/update_s" in r]
    return statistics.median(seconds) if seconds else math.nan


ANY = math.inf
CLAIMS = [  # claim, quantity, regime, statistic of a run, key, compared with, claimed to lie above, below
    ("H1", "cosine of g and m of ce, without noise", "detach", whole, "onestep/cos_ce", None, -0.1, 0.1),
    ("H1", "ce: log2 of v², last third over first", "ce", halvings, "occ/v2", None, -1, ANY),
    ("H1", "ce − detach, points", "ce", final, "eval/score", "detach", -ANY, 0),
    ("H2", "cosine of g and m of policy, without noise", "occ", whole, "onestep/cos_policy", None, 0, ANY),
    ("H2", "the same, early − late", "occ", early_minus_late, "onestep/cos_policy", None, 0, ANY),
    ("H2", "policy: log2 of v², last third over first", "policy", halvings, "occ/v2", None, -1, ANY),
    ("H2", "policy: score, middle third − start", "policy", rise, "eval/score", None, 0, ANY),
    ("H2", "policy: score, middle third − last", "policy", fall, "eval/score", None, 0, ANY),
    ("H3", "occ: λ_t, first third − last", "occ", early_minus_late, "occ/lam", None, 0, ANY),
    ("H4", "occ − detach, points", "occ", final, "eval/score", "detach", 0, ANY),
    ("H5", "seconds of updates, occ − 1.02 detach", "occ", seconds_of_updates, "", "detach", -ANY, 0),
    *[("H6", f"occ − {label}, points", "occ", final, "eval/score", label, 0, ANY) for label in SWEEP],
]


def verdict(mean, half, above, below):
    """ "reproduced" if the interval lies where the claim says, "not" if it lies elsewhere, else "undecided"."""
    if math.isnan(half):
        return "undecided"
    if above < mean - half and mean + half < below:
        return "reproduced"
    return "not" if mean + half <= above or mean - half >= below else "undecided"


def judged_claims(runs):
    """A row of CLAIMS each: claim, quantity, interval over seeds, n, where it should lie, verdict."""
    rows = []
    for claim, quantity, label, statistic, key, other, above, below in CLAIMS:
        values = {seed: statistic(records, key) for seed, records in runs.get(label, {}).items()}
        if other:
            factor = 1.02 if claim == "H5" else 1.0
            others = {seed: statistic(records, key) for seed, records in runs.get(other, {}).items()}
            values = {seed: values[seed] - factor * others[seed] for seed in values if seed in others}
        mean, half = over_seeds(values.values())
        judged = verdict(mean, half, above, below)
        claimed = f"above {above:g}" if below == ANY else f"below {below:g}"
        claimed = f"{above:g} to {below:g}" if ANY not in (-above, below) else claimed
        rows.append([claim, quantity, cell((mean, half), 3), len(values), claimed, judged])
    return rows


def one_step(out, label):
    """What `onestep` found at STATES of the runs of a regime: {seed: {step: as measure_step}}."""
    found = {}
    for path in sorted(out.glob(f"{label}-s*/onestep-*.json")):
        seed = path.parent.name.rpartition("-s")[2]
        step = path.stem.removeprefix("onestep-ckpt").removeprefix("-")
        step = int(step) if step else read_metrics(path.parent)[1][-1]["step"]
        found.setdefault(int(seed), {})[step] = json.loads(path.read_text(encoding="utf-8"))
    return found


def predicted_difference(gains, steps):
    """Points to `detach`, mean over the last fifth of training, if a regime's steps gain F(t) times those of detach.

    gains: {step: 100 (F - 1)}, in a line between. `detach` scores S(t) = a + GROWTH ln t; a regime has lived
    τ(t) = ∫ F dt, so it scores S(τ(t)). nan where F is not above 0: no prediction.
    """
    factors = 1 + np.interp(range(1, steps + 1), list(gains), list(gains.values())) / 100
    if factors.min() <= 0:
        return math.nan
    lived = factors.cumsum() / range(1, steps + 1)  # τ(t)/t
    return GROWTH * float(np.log(lived[round(0.8 * steps) - 1 :]).mean())


def predictions(out, runs, steps):
    """Rows of a table: what one step says of whole runs, beside what they did; H7."""
    rows = []
    for label in ("ce", *SWEEP, "occ"):
        kind, states = ("ce", "detach") if label == "ce" else ("policy", "occ")
        at, predicted, measured = LAMS.index(REPRODUCED[label].get("lam", 1.0)), {}, {}
        for seed, found in one_step(out, states).items():
            gains = {step: found[step][kind]["adam"][at][0] for step in sorted(found)}
            if label == "occ":  # its own λ_t, which is 0 in the first of four updates
                for step in gains:
                    gains[step] = 0.75 * found[step]["proxies"]["lam_logprob"]["gain"][0]
            predicted[seed] = predicted_difference(gains, steps)
        for seed in set(runs.get(label, {})) & set(runs["detach"]):
            measured[seed] = final(runs[label][seed]) - final(runs["detach"][seed])
        gaps = [measured[seed] - predicted[seed] for seed in set(measured) & set(predicted)]
        intervals = [over_seeds(x) for x in (predicted.values(), measured.values(), gaps)]
        rows.append([label, len(measured), *map(cell, intervals)])
    return rows


def ranks(x):
    """Of a list of numbers; equal ones share theirs."""
    x = np.array(x)
    return (x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2


def judged_proxies(out):
    """Rows of a table, over the states of occ: λ of each proxy less the best constant λ of the state (bias), rank
    correlation of the two, regret in %."""
    seeds, rows = list(one_step(out, "occ").values()), []
    for name in [*PROXIES, *CONSTANTS]:
        bias, correlation, regret = [], [], []
        for states in seeds:
            best = [found["policy"]["chosen"]["lam"] for found in states.values()]
            each = [found["proxies"][name] for found in states.values()]
            lam = [proxy["lam"] for proxy in each]
            bias.append(statistics.fmean(np.subtract(lam, best)))
            regret.append(statistics.fmean(proxy["regret"][0] for proxy in each))
            constant = len(set(lam)) == 1 or len(set(best)) == 1
            correlation.append(math.nan if constant else float(np.corrcoef(ranks(lam), ranks(best))[0, 1]))
        title = PROXIES.get(name, f"constant {name}")
        intervals = [over_seeds(bias), over_seeds(correlation)]
        rows.append([title, len(bias), *(cell(x, 2) for x in intervals), cell(over_seeds(regret))])
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Figures and tables of the reproduction


def finished_runs(out, steps):
    """{label: {seed: records}} of the runs in folders out/<label>-s<seed> that have made their steps."""
    runs = {}
    for label in REPRODUCED:
        measured = one_step(out, label)
        for path in sorted(out.glob(f"{label}-s*/metrics.jsonl")):
            records, seed = read_metrics(path.parent)[1], int(path.parent.name.rpartition("-s")[2])
            if not records or records[-1]["step"] != steps:
                print(f"left out: {path.parent}: not at step {steps}", file=sys.stderr)
                continue
            for record in records:  # what one step was found to be stands beside what was logged there
                for kind in ("policy", "ce") if record["step"] in measured.get(seed, {}) else ():
                    found = measured[seed][record["step"]]
                    record[f"onestep/cos_{kind}"] = cosine(*found[kind]["noise_free"])
            runs.setdefault(label, {})[seed] = records
    if not runs:
        raise ValueError(f"{out}: no finished run to draw")
    return runs


def draw(out, steps):
    """Every figure and every table, from the runs that lie in `out`."""
    runs = finished_runs(out, steps)
    groups = {label: list(seeds.values()) for label, seeds in runs.items()}
    with_mtp = {label: groups[label] for label in ("ce", "policy", "occ", "exact") if label in groups}
    draw_panels(out / "1-scores.png", [
        (groups, "Held-out score", "avg@k, points of 100", logged("eval/score"), "linear"),
        (gaps_to_detach(runs), "Difference to detach, seed by seed", "points of 100", logged("gap"), "linear"),
    ], points=60)  # fmt: skip
    draw_panels(out / "2-terms.png", [
        (with_mtp, "First-order correlation of a minibatch", "c_t", logged("occ/c"), "symlog"),
        (with_mtp, "Second-order penalty of a minibatch", "v_t²", logged("occ/v2"), "log"),
        (with_mtp, "Cosine of g and m of a minibatch", "c_t / (‖g‖ v_t)", logged("occ/cos"), "linear"),
    ])  # fmt: skip
    draw_panels(out / "3-decomposition.png", [
        (with_mtp, "First-order term of a minibatch", "λ_t c_t, in units of η(1−Lη)", first_order, "symlog"),
        (with_mtp, "Second-order term of a minibatch", "λ_t² v_t² / 2, in units of Lη²", second_order, "symlog"),
    ])  # fmt: skip
    draw_proxies(out / "4-proxies.png", out)
    draw_noise(out / "5-noise.png", out)
    write_tables(out, runs, steps)


def gaps_to_detach(runs):
    """For each label the difference of its scores to detach's: [{"step", "gap"} of each evaluation] of each seed."""
    gaps = {}
    for label, seeds in runs.items():
        for seed in sorted(set(seeds) & set(runs.get("detach", {}))) if label != "detach" else ():
            base, gap = {r["step"]: r.get("eval/score") for r in runs["detach"][seed]}, []
            for r in seeds[seed]:
                if "eval/score" in r and base.get(r["step"]) is not None:
                    gap.append({"step": r["step"], "gap": r["eval/score"] - base[r["step"]]})
            gaps.setdefault(label, []).append(gap)
    return gaps


def draw_states(axis, seeds, value, **style):
    """A line over the states of a regime: value(what `onestep` found), mean and 95 % interval over seeds.

    seeds: [{step: as measure_step} of each seed].
    """
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    intervals = [over_seeds(value(seed[step]) for seed in seeds) for step in steps]
    draw_bars(axis, steps, intervals, **style)


def draw_bars(axis, x, intervals, **style):
    if x:
        means, halves = zip(*intervals)
        axis.errorbar(x, means, halves, marker="o", markersize=3, capsize=2, **style)


def draw_proxies(path, out):
    """At the states of occ: λ of each proxy beside the best constant one, and what following it loses."""
    figure, axes = pyplot().subplots(1, 2, figsize=(15, 5), layout="constrained")
    seeds, best = list(one_step(out, "occ").values()), {"color": "black", "label": "best constant λ"}
    draw_states(axes[0], seeds, lambda found: found["policy"]["chosen"]["lam"], **best)
    for i, name in enumerate([*PROXIES, *CONSTANTS]):
        style = {"color": f"C{i}", "label": PROXIES.get(name, f"constant {name}")}
        if name in PROXIES:
            draw_states(axes[0], seeds, lambda found, name=name: found["proxies"][name]["lam"], **style)
        draw_states(axes[1], seeds, lambda found, name=name: found["proxies"][name]["regret"][0], **style)
    axes[0].set_yscale("symlog", linthresh=0.05)
    axes[0].set(title="occ: λ of each proxy", xlabel="step", ylabel="mean over minibatches")
    axes[1].set(title="Regret: a step's loss against the best constant λ", xlabel="step", ylabel="%")
    finish(figure, axes, path)


def draw_noise(path, out):
    """What one step says at STATES of detach and of occ: a line is the mean over seeds, its bars 95 % intervals."""
    figure, axes = pyplot().subplots(1, 3, figsize=(15, 5), layout="constrained")
    for label, line in (("detach", "--"), ("occ", "-")):
        seeds = list(one_step(out, label).values())
        for i, kind in enumerate(("policy", "ce")):
            style = {"linestyle": line, "color": f"C{i}", "label": f"{label}, m of {kind}"}
            draw_states(axes[0], seeds, lambda found, kind=kind: cosine(*found[kind]["noise_free"]), **style)
            at = LAMS.index(1.0)
            draw_states(axes[1], seeds, lambda found, kind=kind: found[kind]["adam"][at][0], **style)
            ends = [states[max(states)][kind]["sizes"] for states in seeds]
            gains = [over_seeds(size["gain"][0] for size in each) for each in zip(*ends)]
            draw_bars(axes[2], SIZES if gains else [], gains, **style)
    axes[0].set(title="Cosine of g and m without noise", xlabel="step", ylabel="cosine")
    axes[1].set(title="Gain of a step of Adam at λ = 1, over λ = 0", xlabel="step", ylabel="%")
    axes[2].set(title="At the end: λ chosen on other samples", xlabel="responses a minibatch", ylabel="%")
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(SIZES, SIZES)
    for size, whose in ((64, "here"), (512, "paper")):
        axes[2].axvline(size, color="gray", linewidth=0.8, linestyle=":")
        axes[2].text(size, -38, whose, ha="right", rotation=90, fontsize="small")
    axes[2].set_ylim(-40, 40)  # with few minibatches the intervals of the largest go beyond
    finish(figure, axes, path)


def finish(figure, axes, path):
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.legend(fontsize="x-small", handlelength=3.5)
    save(figure, path)


def write_tables(out, runs, steps):
    """Scores, differences to detach, predictions, proxies and claims."""
    suites = [name for name in next(iter(next(iter(runs.values())).values()))[0] if name.startswith("eval/")]
    names, scores, differences = [name.removeprefix("eval/") for name in suites], [], []
    for label, seeds in runs.items():
        intervals = [over_seeds(final(records, suite) for records in seeds.values()) for suite in suites]
        scores.append([label, len(seeds), *map(cell, intervals)])
        shared = sorted(set(seeds) & set(runs.get("detach", {}))) if label != "detach" else []
        if shared:
            gaps = [[final(seeds[i], s) - final(runs["detach"][i], s) for i in shared] for s in suites]
            differences.append([label, len(shared), *(cell(over_seeds(gap)) for gap in gaps)])
    write_table(out / "scores", ["regime", "n", *names], scores)
    write_table(out / "differences", ["regime − detach", "n", *names], differences)
    if "detach" in runs:
        head = ["regime − detach", "n", "predicted from one step", "measured", "measured − predicted"]
        write_table(out / "predictions", head, predictions(out, runs, steps))
    head = ["λ", "n", "bias", "rank correlation", "regret, %"]
    write_table(out / "proxies", head, judged_proxies(out))
    head = ["claim", "quantity", "95 % interval", "n", "claimed", "verdict"]
    write_table(out / "claims", head, judged_claims(runs))


def cell(interval, digits=1):
    mean, half = interval
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f} (n = 1)" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def markdown(head, rows):
    """Lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(x) for x in line) + " |" for line in lines]


def write_table(path, head, rows):
    """As Markdown and as CSV."""
    Path(f"{path}.md").write_text("\n".join(markdown(head, rows)) + "\n", encoding="utf-8")
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([head, *rows])


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
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted {error}".strip(), file=sys.stderr)
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
        least = 1 if name in ("jobs", "k", "responses", "rollouts") else 0
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise ValueError(f"--{name} {value}: must be {least} or more")
    for label in args.regimes.split(",") if args.command == "reproduce" else ():
        if label not in REPRODUCED:
            raise ValueError(
                f"--regimes {args.regimes}: unknown {label!r}; allowed: some of {','.join(REPRODUCED)}"
            )
    return args


COMMANDS = {f.__name__: f for f in (score, sample, explain, onestep, plot, reproduce)}
FLAGS = {  # default, help, and the commands that have it
    "k": (8, "samples a problem", "score sample"),
    "temperature": (1.0, "of sampling; 0 is greedy", "score sample"),
    "speculative": (False, "the heads draft", "score sample"),
    "problems": (0, "a suite, at most; 0: score 64, or a whole file; sample 2", "score sample"),
    "suite": ("", f"arithmetic, competition, or some of {','.join([*rl.SUITES, *rl.SCORE])},FILE.jsonl; by default the "
              "held-out problems of the run's own task", "score"),
    "max_new_tokens": (0, "longest response; 0: as the run was trained", "score"),
    "data_dir": ("", "folder of data sets; by default the run's own", "score"),
    "seed": (0, "of problems and samples", "score sample explain"),
    "device": ("cpu", "cpu, or any device that torch knows", "score sample explain onestep"),
    "rollouts": (48, "of one minibatch each", "onestep"),
    "checkpoint": ("ckpt", "file in the run's folder, as ckpt-60 (train.py --keep 60)", "onestep"),
    "responses": (8, "in the picture", "explain"),
    "seeds": (0, "how many: 0 to this - 1; 0: 5, or 2 with --fast", "reproduce"),
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
