"""Evaluate: score a run, read what it says, see where its λ_t comes from, draw curves, reproduce the paper's claims.

    python eval.py score out/arithmetic-occ-s0 --k 32       # avg@k and pass@k with 95 % intervals, as a table
    python eval.py sample out/arithmetic-occ-s0 "47+85="    # completions of a prompt, or of held-out problems
    python eval.py explain out/arithmetic-occ-s0            # δ_RL·δ_MTP and δ_MTP² token by token
    python eval.py onestep out/arithmetic-occ-s0            # would MTP help this run, and at which λ?
    python eval.py plot out/arithmetic-*                    # reward, score, λ_t, c_t, v_t² and the two terms of Δ_MTP
    python eval.py reproduce                                # regimes × seeds, five figures, tables, claims

avg@k is the mean accuracy of k samples a problem, pass@k the chance that one of k samples is right. The model is
rebuilt from the run's own config. Plots read metrics.jsonl and nothing else. Runs that differ only in the seed, and in
what is no part of the experiment, are one line, with a 95 % band over seeds. All intervals are Student's t.

train.py, too, reads runs, draws curves, and answers a mistake with one line on stderr and exit code 2, by what is here.

Dimension key: P parameters · N minibatches · S sizes of a minibatch · B sequences · T positions
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see train.py

import argparse
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
from concurrent.futures import ThreadPoolExecutor
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

VERSION = 3  # of the run folder's format
CHECKPOINT = ("step", "steps", "seconds", "model", "heads", "optimizer")  # what ckpt.pt holds


# ----------------------------------------------------------------------------------------------------------------------
# Reading a run


def build(cfg, device):
    """The trunk and its heads as initialised from the seed of a config."""
    tok, suites = rl.get_tokenizer(cfg.tokenizer), rl.suites_of(cfg.task, cfg.data_dir)
    prompts, solutions, _ = zip(*(rl.longest(suite, cfg.difficulty, tok) for suite in suites))
    block_size = max(prompts) + max(cfg.max_new_tokens, max(solutions) + 1)
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
        config, version = header["config"], header["versions"]["nanoocc"]
        complete = {"regime", "seed"} <= set(config)
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{path}:1: not the header of a run")
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
        steps = records[-1]["step"] if records else 0
        if steps > 0:
            raise ValueError(f"{path}: missing, though metrics.jsonl has {steps} steps")
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
    """Config and (trunk, heads, optimizer) of a run's checkpoint, on the device of that name.

    In regime off heads is None, or with_heads raises ValueError.
    """
    config, ckpt = read_run(folder, name)
    if ckpt is None:
        how = f"go on with python train.py --resume {folder}"
        raise ValueError(f"{folder}: no checkpoint yet; {how}")
    cfg = SimpleNamespace(**config)
    if cfg.regime not in occ.REGIMES:
        raise ValueError(f"{folder}: its regime {cfg.regime} is not among {', '.join(occ.REGIMES)}")
    try:
        model, heads, optimizer = new_state(cfg, find_device(device))
    except AttributeError as error:
        lack = f"its config has no {error.name}"
        raise ValueError(f"{folder}: a run of another version: {lack}") from None
    if with_heads and not heads:
        raise ValueError(f"{folder}: regime off has no heads, so no drafts and no lambda")
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
    mean = statistics.fmean(x) if x else math.nan
    if len(x) < 2:
        return mean, math.nan
    return mean, student_t(len(x) - 1) * statistics.stdev(x) / len(x) ** 0.5


def mean_of(intervals):
    """Mean of independent (mean, half-width), as one more of them."""
    means, halves = zip(*intervals)
    return statistics.fmean(means), math.hypot(*halves) / len(halves)


def cell(interval, digits=1):
    mean, half = interval
    if math.isnan(mean):
        return "–"
    spread = "(n = 1)" if math.isnan(half) else f"± {half:.{digits}f}"
    return f"{mean:.{digits}f} {spread}"


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
    """Unbiased pass@k from n samples of which c are right (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def equal_by_algebra(gold, candidate):
    """What math-verify (an optional package) says of two formulas, where `rl.answers_equal` says no.

    It evaluates what it reads, which could take forever: it gets no long numbers, factorials or powers of powers.
    """
    if candidate is None or len(candidate) > 200:
        return False
    if re.search(r"\d{5}|__|!|\*\*|\^.*\^", candidate):
        return False
    if rl.read_number(rl.tidied(gold)):  # numbers need no algebra
        return False
    from math_verify import parse, verify

    try:
        a, b = [parse(f"${text.strip('$')}$", parsing_timeout=1) for text in (gold, candidate)]
        return bool(verify(a, b, timeout_seconds=1))
    except Exception:  # whatever it meets in a text that it cannot read
        return False


def samples_of(cfg, model, heads, problems, args):
    """args.k samples of each problem, about 512 rows at a time: their batch, and their texts."""
    tok, generator = rl.get_tokenizer(cfg.tokenizer), torch.Generator().manual_seed(args.seed)
    drafters = heads if args.speculative else None
    options = (args.k, cfg.max_new_tokens, args.temperature, generator, drafters)
    batches, texts, chunk = [], [], max(512 // args.k, 1)
    for i in range(0, len(problems), chunk):
        batch, completions = rl.sample(model, tok, problems[i : i + chunk], *options)
        batches.append(batch)
        texts += completions
    return rl.concatenate(batches), texts


def score(args):
    """The scores of a run as a table in Markdown: a row a suite and one for all, in points of 100.

    The suites are the held-out problems of what the run was trained on, or those of --suite; a data set that shares
    problems with the training data is refused.
    """
    cfg, (model, heads, _) = load_run(args.run, args.device, with_heads=args.speculative)
    suites = trained = rl.suites_of(cfg.task, cfg.data_dir)
    if args.suite:
        suites = rl.suites_of(args.suite, args.data_dir or cfg.data_dir, scoring=True)
        rl.check_apart(trained, suites)
    tok, room = rl.get_tokenizer(cfg.tokenizer), model.cfg.block_size
    cfg.max_new_tokens = new = args.max_new_tokens or cfg.max_new_tokens
    if new >= room:
        raise ValueError(f"--max_new_tokens {new}: must be below {room}, the model's positions")
    ks = sorted({1, args.k // 4, args.k} - {0})  # of pass@k; pass@1 is avg@k
    has_math_verify = importlib.util.find_spec("math_verify") is not None
    rows, intervals, notes = [], [], []
    for suite in tqdm(suites, "suites", disable=None):
        name = rl.label(suite)
        if args.suite and suite not in rl.SUITES:  # the run was not trained on any of it
            problems = rl.read_problems(suite)[: args.problems or None]
        else:
            problems = rl.held_out_problems(suite, cfg.difficulty, args.problems or 64)
        cut = sum(len(tok.encode_ordinary(p.prompt)) + new > room for p in problems)
        if cut:
            notes.append(f"{name}: {cut} prompts are longer than the {room - new} tokens that the model has positions "
                         "for; only their ends were read")  # fmt: skip
        batch, texts = samples_of(cfg, model, heads, problems, args)
        rewards = batch["reward"].int().tolist()
        for i, text in enumerate(texts) if has_math_verify else ():
            if not rewards[i]:
                answer = rl.extract_answer(text)
                rewards[i] = int(equal_by_algebra(problems[i // args.k].answer, answer))
        # right ones of each problem
        counts = [sum(rewards[i : i + args.k]) for i in range(0, len(rewards), args.k)]
        row = [interval([100 * pass_at_k(args.k, c, k) for c in counts]) for k in ks]
        intervals.append(row)
        rows.append([name, len(problems), *map(cell, row)])
        if args.speculative:
            drafted = mtp.speculation_metrics(batch["mask"], batch["draft"], cfg.mtp_depth)
            notes.append(", ".join([name, *(f"{key} {x:.2f}" for key, x in drafted.items())]))
    overall = [cell(mean_of(column)) for column in zip(*intervals)]  # each suite counts alike
    rows.append(["all", sum(row[1] for row in rows), *overall])
    if any(rl.label(suite) in rl.COMPETITION for suite in suites):
        notes.append("Competition problems are far beyond a small model: a score may well be luck.")
    head = ["suite", "problems", f"avg@{args.k}", *(f"pass@{k}" for k in ks[1:])]
    return [*markdown(head, rows), *notes]


def sample(args):
    """Completions to read: of a prompt, or of held-out problems with their reward."""
    cfg, (model, heads, _) = load_run(args.run, args.device, with_heads=args.speculative)
    tok, suites = rl.get_tokenizer(cfg.tokenizer), rl.suites_of(cfg.task, cfg.data_dir)
    problems = [rl.Problem("", args.prompt, "")] if args.prompt else []
    for suite in [] if args.prompt else suites:
        problems += rl.held_out_problems(suite, cfg.difficulty, args.problems or 2)
    batch, texts = samples_of(cfg, model, heads, problems, args)
    lines = []
    if set(suites) & set(rl.SUITES):
        lines.append("Numbers stand lowest digit first: 47+85= asks for 74 + 58; ####231 is right.")
    if args.speculative:
        lines.append("[Brackets] are around drafts of the heads that the trunk accepted.")
        rows = zip(batch["tokens"][:, 1:], batch["mask"], batch["draft"])
        texts = [marked(tok, *row) for row in rows]
    for i, text in enumerate(texts):
        reward = "" if args.prompt else f"reward {batch['reward'][i]:g}  "
        lines.append(f"{reward}{problems[i // args.k].prompt!r} -> {text!r}")
    return lines


def marked(tok, tokens_T, mask_T, draft_T):
    """A completion with brackets around each run of accepted drafts."""
    text = ""
    sampled = zip(tokens_T[mask_T].tolist(), (draft_T[mask_T] > 0).tolist())
    for drafted, run in itertools.groupby(sampled, key=lambda pair: pair[1]):
        piece = tok.decode([token for token, _ in run if token != tok.eot_token])
        text += f"[{piece}]" if drafted and piece else piece
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Curves: runs are {label: {seed: records}}, the lines of a panel {name: {seed: {step: number}}}


class Panel(NamedTuple):
    title: str
    ylabel: str
    scale: str = "linear"


PANELS = {  # what is drawn of a run, by the key of its record
    "reward/mean": Panel("Reward in training", "mean reward"),
    "eval/score": Panel("Held-out score", "avg@k, points of 100"),
    "occ/lam": Panel("Coefficient", "λ_t (last update of a step)"),
    "occ/c": Panel("First-order correlation of a minibatch", "c_t = ⟨g_RL, g_MTP⟩", "symlog"),
    "occ/v2": Panel("Second-order penalty of a minibatch", "v_t² = ‖g_MTP‖²", "log"),
    "occ/cos": Panel("Cosine of g and m of a minibatch", "c_t / (‖g‖ v_t)"),
    "first_order": Panel("First-order term of Δ_MTP", "λ_t c_t, in units of η(1−Lη)", "symlog"),
    "second_order": Panel("Second-order term of Δ_MTP", "λ_t² v_t² / 2, in units of Lη²", "symlog"),
    "mtp/agreement_1": Panel("MTP head 1 as a drafter", "share of tokens accepted"),
}
NOT_THE_EXPERIMENT = set("seed out cache_dir data_dir device save_every keep steps".split())


def read_terms(folder):
    """read_metrics, with the two terms of Δ_MTP in the records that have c and v²."""
    header, records = read_metrics(folder)
    for r in records:
        if "occ/c" in r:
            r["first_order"] = r["occ/lam"] * r["occ/c"]
            r["second_order"] = r["occ/lam"] ** 2 * r["occ/v2"] / 2
    return header, records


def group_runs(folders):
    """{label: {seed: records}}: runs that differ only in seed and folder share a line, labelled by the rest."""
    runs = [read_terms(folder) for folder in folders]
    configs = [header["config"] for header, _ in runs]
    differ = []
    for name in sorted(set(configs[0]) - NOT_THE_EXPERIMENT - {"regime"}):
        if any(config.get(name) != configs[0][name] for config in configs):
            differ.append(name)
    groups = {}
    for folder, config, (_, records) in zip(folders, configs, runs):
        label = " ".join([config["regime"], *(f"{name}={config.get(name)}" for name in differ)])
        seeds, seed = groups.setdefault(label, {}), config["seed"]
        if not records:
            raise ValueError(f"{folder}: nothing logged yet")
        if seed in seeds:
            there = f"seed {seed} of '{label}' is there already"
            raise ValueError(f"{folder}: {there}; a band needs different seeds")
        seeds[seed] = records
    return groups


def curves(seeds, key):
    """{seed: {step: number}}: what was logged under a key, at the steps where it was."""
    found = {}
    for seed, records in seeds.items():
        found[seed] = {r["step"]: r[key] for r in records if key in r}
    return found


def logged(runs, key):
    """The lines of PANELS[key], a label each, and the panel."""
    return {label: curves(seeds, key) for label, seeds in runs.items()}, PANELS[key]


def averaged(seeds, points):
    """Of the steps that every seed has: steps, means and half-widths of the 95 % interval over seeds, (3, points).

    More than `points` steps are averaged in blocks, seed by seed, so that the interval is that of the block's mean.
    """
    steps = sorted(set.intersection(*map(set, seeds.values()))) if seeds else []
    rows = []
    for block in np.array_split(steps, min(points, len(steps))) if steps else []:
        means = [np.mean([curve[step] for step in block]) for curve in seeds.values()]
        rows.append((block.mean(), *interval(means)))
    return np.array(rows).reshape(-1, 3).T


def draw_panels(panels, points=12):  # few points: probes are noisy
    """A figure of (lines, Panel) pairs, three a row. On a linear axis a line has the band of its 95 % interval."""
    from matplotlib.figure import Figure  # takes a second: only where something is drawn

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure((15, 5 * rows), layout="constrained")
    names = []  # of the panel before
    for axis, (lines, panel) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels):
        heights = []
        for i, (name, seeds) in enumerate(lines.items()):
            steps, mean, half = averaged(seeds, points)
            color = f"C{list(REPRODUCED).index(name) if name in REPRODUCED else i}"
            axis.plot(steps, mean, color=color, label=f"{name} (n = {len(seeds)})")
            if panel.scale == "linear":
                axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.15, lw=0)
            heights += [abs(y) for y in mean if y]
        if heights:
            symlog = {"linthresh": max(heights) / 30} if panel.scale == "symlog" else {}
            axis.set_yscale(panel.scale, **symlog)
        axis.set(title=panel.title, xlabel="step", ylabel=panel.ylabel)
        axis.grid(alpha=0.3)
        if lines and list(lines) != names:
            axis.legend(fontsize="small")
        names = list(lines)
    return figure


def save(figure, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def plot(folders, path):
    """Curves of one or more runs, as a picture: reward, score, λ_t, c_t, v_t², the two terms of Δ_MTP, and more."""
    runs = group_runs(folders)
    save(draw_panels([logged(runs, key) for key in PANELS], points=60), path)


# ----------------------------------------------------------------------------------------------------------------------
# After a few updates of one rollout: where λ_t comes from


def last_update(cfg, model, heads, optimizer, seed):
    """A rollout from a run's state and its updates but the last, whose minibatch is measured by rl.probe.

    The updates are those of train.step_of_rl with λ = 0, without the KL term and what is special to --released.
    Returns the minibatch mb, its deltas (δ_RL, δ_MTP), numbers, and gradients g and m; None of a single minibatch,
    where every δ is 0.
    """
    heads_loss, algo = occ.REGIMES[cfg.regime].heads_loss, rl.ALGOS[cfg.algo]
    problems, generator = rl.training_problems(cfg, seed), torch.Generator().manual_seed(seed)
    tok, heads_at_rollout = rl.get_tokenizer(cfg.tokenizer), copy.deepcopy(heads)
    batch, _, _ = rl.rollout(model, heads, tok, problems, algo, cfg, generator)
    adv_B = rl.advantages(batch["reward"].view(-1, cfg.num_generations), algo.advantage).flatten()
    minibatches = rl.minibatches(model, heads, batch, adv_B, algo, cfg)
    if len(minibatches) < 2:
        return None
    for mb in minibatches[:-1]:
        logp, logp_mtp, _ = rl.logprobs(model, heads, mb, cfg, door=0.0)
        mb.setdefault("old", logp.detach())
        mb.setdefault("old_mtp", logp_mtp.detach())
        loss_heads = rl.mtp_loss(heads_loss, logp_mtp, mb, mb["adv"], algo)
        optimizer.zero_grad()
        (rl.trunk_policy_loss(logp, mb, algo) + loss_heads).backward()
        for part in (model, heads):
            torch.nn.utils.clip_grad_norm_(list(part.parameters()), 1.0)
        optimizer.step()
    mb, regime = minibatches[-1], occ.REGIMES["occ"]
    deltas, released = deltas_of(model, heads, mb, cfg)
    numbers, g, m = rl.probe(model, heads, mb, deltas, regime, algo, cfg, heads_at_rollout)
    numbers["occ/lam_released"] = released
    return SimpleNamespace(mb=mb, deltas=deltas, numbers=numbers, g=g, m=m)


def deltas_of(model, heads, mb, cfg):
    """(δ_RL, δ_MTP) of a minibatch, (B, T-1) each, and the mean λ of the authors' code (see train.py --released)."""
    with torch.no_grad():
        logp, logp_mtp, _ = rl.logprobs(model, heads, mb, cfg)
    deltas = occ.token_deltas(logp, mb["old"], logp_mtp, mb["old_mtp"], mb["mask_mtp"])
    old_BKT = mb["old"][:, None].expand_as(logp_mtp)
    theirs = occ.token_deltas(logp, mb["old"], logp_mtp, old_BKT, mb["mask_mtp"])
    lam_plus = occ.RELEASED_LAM_PLUS / cfg.mtp_depth
    released_B = occ.released_coefficient(*theirs, mb["mask_mtp"].any(1), lam_plus)
    return deltas, released_B.mean().item()


def explain(args):
    """Which tokens make λ_t: one rollout from a run's checkpoint and its updates with λ = 0 (before them δ is 0).

    The picture has δ_RL·δ_MTP and δ_MTP² as colours under the text of a few responses.
    """
    cfg, state = load_run(args.run, args.device, with_heads=True)
    if cfg.updates_per_rollout == 1:
        raise ValueError(f"{args.run}: with one update a rollout every δ is 0, and so is lambda")
    last = last_update(cfg, *state, 10**9 + args.seed)
    if last is None:
        few = "too few prompts have both right and wrong samples here"
        raise ValueError(f"{args.run}: {few}; try another --seed")
    delta_rl, delta_mtp = last.deltas
    product, square = delta_rl * delta_mtp, delta_mtp.square()
    c_hat, v2_hat = product.sum().item(), square.sum().item()
    c, v2, cos = [last.numbers[f"occ/{key}"] for key in ("c", "v2", "cos")]
    released = last.numbers["occ/lam_released"]
    flat = product.flatten()
    largest = flat[flat.abs().argsort(descending=True)[:10]]
    share = 100 * largest.sum().item() / c_hat if c_hat else 0.0
    path = args.out or str(Path(args.run) / "explain.png")
    save(draw_tokens(rl.get_tokenizer(cfg.tokenizer), last.mb, product, square), path)
    return [
        f"The last update of one rollout: {int(last.mb['mask_mtp'].any(1).sum())} tokens.",
        f"ĉ = {c_hat:.4g}, v̂² = {v2_hat:.4g}",
        f"λ, ratio of sums (paper):               {c_hat / (v2_hat + 1e-8):8.4f}",
        f"λ, mean of ratios × 0.1 / mtp_depth:    {released:8.4f}   (released code)",
        f"λ, exact gradients, c/v²:               {c / max(v2, 1e-30):8.4f}   "
        f"c = {c:.4g}, v² = {v2:.4g}, cosine {cos:.3f}",
        f"The ten most influential tokens make {share:.0f} % of ĉ.",
        path,
    ]


def draw_tokens(tok, mb, product, square, responses=8):
    """Colours under the text of a few different responses: those with the largest |δ_RL·δ_MTP|."""
    row_of_text = {}
    for row in product.abs().sum(1).argsort(descending=True).tolist():
        row_of_text.setdefault(tuple(mb["tokens"][row].tolist()), row)
    rows = list(row_of_text.values())[:responses]
    prompts, texts = [], []
    for row in rows:
        tokens, mask = mb["tokens"][row], mb["mask"][row]
        prompt = tok.decode(tokens[: 1 + int(mask.int().argmax())].tolist())
        prompts.append(prompt.strip()[-24:])
        pieces = [tok.decode([token]) for token in tokens[1:][mask].tolist()]
        texts.append(["END" if piece == rl.EOS else repr(piece)[1:-1] for piece in pieces])
    from matplotlib.figure import Figure

    width = int(mb["mask"].sum(1).max())
    figure = Figure((1.2 * width + 4, 0.45 * len(rows) + 1.5), layout="constrained")
    panels = ((product, "δ_RL · δ_MTP", "RdBu"), (square, "δ_MTP²", "Greens"))
    for axis, (values, title, colors) in zip(figure.subplots(1, 2), panels):
        grid = torch.full((len(rows), width), math.nan)
        for i, row in enumerate(rows):
            grid[i, : len(texts[i])] = values[row][mb["mask"][row]].cpu()
            for j, text in enumerate(texts[i]):
                axis.text(j, i, text, ha="center", va="center", fontsize=9, parse_math=False)
        top = float(grid.nan_to_num(0).abs().max()) or 1.0
        bottom = -top if values is product else 0
        image = axis.imshow(grid.numpy(), colors, vmin=bottom, vmax=top, aspect="auto", alpha=0.7)
        axis.set_yticks(range(len(rows)), prompts, parse_math=False)
        axis.set(title=title, xlabel="token of the response")
        figure.colorbar(image, ax=axis)
    return figure


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
    "lam_exact": "exact c/v²",
}


def onestep(args):
    """Whether MTP would help a run, and at which λ: what one step gains, without the noise that g and m share.

    D(λ) = Σ_j E[g_j] E[u_j] / (√E[u_j²] + ε),  u = clip(g + λ m),  is the expected first-order gain of a step of Adam
    whose second moments have converged: idealised. It is given relative to λ = 0. The unit is a minibatch as in
    training, after one real update of its rollout; E[g] E[u] is from products of different ones. The answer is yes if
    the 95 % interval of the gain is above 0, and no if it is below 1 %.
    """
    found = measure_step(args)
    path = Path(args.run) / f"onestep-{args.checkpoint}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    by_lam, by_size = [], []
    for lam in LAMS:
        gains = [found[f"{kind}/gain_{lam:g}"] for kind in ("policy", "ce")]
        by_lam.append([lam, *map(cell, gains)])
    for size in SIZES:
        row = [size]
        for kind in ("policy", "ce"):
            gain = found.get(f"{kind}/gain_at_{size}", (math.nan, math.nan))
            row += [found.get(f"{kind}/lam_at_{size}", "–"), cell(gain)]
        by_size.append(row)
    lines = [
        f"{args.run}, {args.checkpoint}, {found['minibatches']} minibatches of {found['responses']} responses. "
        "Gain of one step over that with λ = 0, in %; ± 95 % (jackknife):",
        "",
        *markdown(["λ", "m of policy", "m of ce"], by_lam),
        "",
        "By responses a minibatch, without the clip: the best λ by each half of the minibatches, and what it gains in "
        "the other (means of the two):",
        *markdown(["responses", "λ, policy", "gain", "λ, ce", "gain"], by_size),
        "",
        f"Lη of Adam's steps on fresh samples {cell(found['L_eta'], 3)} (of the clipped surrogate)",
    ]
    for kind in ("policy", "ce"):
        cos, noise_g, noise_m = (found[f"{kind}/{key}"] for key in ("cos", "noise_g", "noise_m"))
        lam, (mean, half) = found[f"{kind}/best/lam"], found[f"{kind}/best/gain"]
        answer = "cannot be told"
        if mean > half:
            answer = "yes"
        elif mean + half < 1:
            answer = "no"
        lines += [
            f"m of {kind}: cosine of E g and E m {cos:.2f}; of a minibatch's ‖g‖² {noise_g:.0f} % and ‖m‖² "
            f"{noise_m:.0f} % is noise",
            f"Would MTP help this run, through m of {kind}? {answer}: at the λ that one half of the minibatches "
            f"chooses (mean of both halves {lam:g}) a step gains {cell((mean, half))} % in the other.",
        ]
    return lines


def measure_step(args):
    """What `onestep` says of a checkpoint, as a flat dict of numbers and of (mean, half-width)."""
    cfg, state = load_run(args.run, args.device, f"{args.checkpoint}.pt", with_heads=True)
    # Two minibatches a rollout: the first updates the weights, the second is measured.
    cfg.prompts_per_step = 2 * (cfg.prompts_per_step // cfg.updates_per_rollout)
    cfg.updates_per_rollout = 2
    gradients, numbers = [], []
    for i in tqdm(range(args.rollouts), f"{args.run} {args.checkpoint}", disable=None):
        # Loading the checkpoint again would not do: Adam's moments share its memory.
        moved = copy.deepcopy(state)
        last = last_update(cfg, *moved, 10**9 + i)
        if last is None:  # too few prompts had both right and wrong samples
            continue
        model, heads, _ = moved
        _, logp_mtp, _ = rl.logprobs(model, heads, last.mb, cfg)
        loss_ce = rl.mtp_loss("ce", logp_mtp, last.mb, last.mb["adv"], rl.ALGOS[cfg.algo])
        m_ce = occ.flat_grad(loss_ce, list(model.parameters()))
        gradients.append(torch.stack((last.g, last.m, m_ce)))
        last.numbers["L_eta"] = curvature_of_update(cfg, state[0], model, last)
        numbers.append(last.numbers)
    if len(numbers) < 8:
        few = f"{len(numbers)} minibatches have a gradient, which are too few"
        raise ValueError(f"{args.run}: {few}; more --rollouts?")
    g, m_policy, m_ce = torch.stack(gradients, 1)
    responses = cfg.prompts_per_step * cfg.num_generations // 2
    found = {"rollouts": args.rollouts, "minibatches": len(g), "responses": responses}
    found["L_eta"] = interval([each["L_eta"] for each in numbers])
    for kind, m in (("policy", m_policy), ("ce", m_ce)):
        for key, value in gains_of_steps(g, m, responses).items():
            found[f"{kind}/{key}"] = value
    for proxy in PROXIES:
        lam_N = torch.tensor([each[f"occ/{proxy}"] for each in numbers], device=g.device)
        found[f"{proxy}/lam"] = lam_N.mean().item()
        found[f"{proxy}/gain"] = gain_of_a_proxy(g, m_policy, lam_N)
    return found


def curvature_of_update(cfg, before, after, last):
    """Lη along an update of the trunk, by the samples of `last`, which had no part in it."""
    trunk, algo = list(before.parameters()), rl.ALGOS[cfg.algo]
    logp, _, _ = rl.logprobs(before, None, last.mb, cfg)
    g_before = occ.flat_grad(rl.trunk_policy_loss(logp, last.mb, algo), trunk)
    vector = torch.nn.utils.parameters_to_vector
    delta = vector(trunk).detach() - vector(after.parameters()).detach()
    u = torch.cat([p.grad.flatten() for p in after.parameters()])  # along which the update went
    return curvature(g_before, last.g, delta, u)


def curvature(g, g_after, delta, u):
    """Lη: L = <g - g_after, delta>/‖delta‖² along a step -delta, times η = ‖delta‖/‖u‖, as if it were -η u.

    g and g_after, before and after the step, are of samples that had no part in it: those that chose it fall faster.
    """
    return occ.dot(g - g_after, delta) / (delta.norm() * u.norm()).item()


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
    whole, size_S1 = [x.sum(0) for x in terms], torch.tensor(sizes, device=g_NP.device)[:, None]
    gains = []
    for left_out in (slice(0), *(slice(part, None, parts) for part in range(parts))):
        n = len(g_NP) - len(g_NP[left_out])
        g, u, gu, uu = [total - x[left_out].sum(0) for total, x in zip(whole, terms)]
        # E[g_j] E[u_j], from products of different minibatches
        product = (g * u - gu) / (n * (n - 1))
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

    The halves are gains_by_lam of one size, (len(LAMS), 1 + parts). A λ that is chosen and valued on the same
    minibatches always looks as if it helped.
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
    even, odd = [gains_by_lam(g[rows], m[rows])[:, 0] for rows in HALVES]
    found["best/lam"], found["best/gain"] = chosen_on_one_half(even, odd)
    half = len(g) // 2
    fewest = half - math.ceil(half / PARTS)  # minibatches in a half, without a part
    sizes = [size for size in SIZES if size < fewest * responses]
    in_minibatches = [size / responses for size in sizes]
    even, odd = [gains_by_lam(g[rows], m[rows], in_minibatches, clip=False) for rows in HALVES]
    for i, size in enumerate(sizes):
        lam, gain = chosen_on_one_half(even[:, i], odd[:, i])
        found |= {f"lam_at_{size}": lam, f"gain_at_{size}": gain}
    g2, c, v2 = across(g, g), across(g, m), across(m, m)
    # Noise can make a square negative.
    found["cos"] = c / (g2 * v2) ** 0.5 if g2 > 0 and v2 > 0 else math.nan
    for name, x in (("noise_g", g), ("noise_m", m)):
        found[name] = 100 - 100 * across(x, x) / x.square().sum(1).mean().item()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The reproduction: train every regime on several seeds, measure one step, then draw figures and write tables

# All else is as in train.py. Where checkpoints of detach and occ are kept, one step is measured.
SETTING = dict(eval_k=32, probe_every=5, save_every=25, keep="0,25,60,120")
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


def reproduce(args):
    """Train the regimes on several seeds; draw the paper's figures, write its tables, and test its claims.

    All regimes of a seed start from the same pretrained weights. Finished runs are not repeated, unfinished ones go on;
    one that breaks down is named, and the others are drawn without it.
    """
    out, began = Path(args.out or "out/reproduce"), time.perf_counter()
    steps, rollouts = args.steps or (10 if args.fast else 250), 16 if args.fast else 48
    seeds = range(args.first_seed, args.first_seed + (args.seeds or (2 if args.fast else 5)))
    common = SETTING | dict(steps=steps, cache_dir=f"{out}/base") | (FAST if args.fast else {})
    plan, checkpoints = [], []
    for label in args.regimes.split(","):
        if label not in REPRODUCED:
            allowed = f"some of {','.join(REPRODUCED)}"
            raise ValueError(f"--regimes {args.regimes}: unknown {label!r}; allowed: {allowed}")
        for seed in seeds:
            plan.append(common | REPRODUCED[label] | dict(seed=seed, out=f"{out}/{label}-s{seed}"))
    threads = itertools.repeat(max((os.cpu_count() or 1) // args.jobs, 1))
    errors = []  # "" of what went well
    with ThreadPoolExecutor(args.jobs) as pool:
        # The first run of a seed pretrains for the others.
        for wave in (plan[: len(seeds)], plan[len(seeds) :]):
            errors += tqdm(pool.map(train_one, wave, threads), "runs", len(wave), disable=None)
        finished = errors.count("")
        for label in ("detach", "occ"):
            for seed in seeds:
                checkpoints += sorted((out / f"{label}-s{seed}").glob("ckpt*.pt"))
        measuring = pool.map(measure_one, checkpoints, itertools.repeat(rollouts), threads)
        errors += tqdm(measuring, "one step", len(checkpoints), disable=None)
    draw(out, steps)
    failed = [line for line in errors if line]
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    count, minutes = f"{finished} of {len(plan)}", (time.perf_counter() - began) / 60
    print(f"{count} runs in {minutes:.1f} minutes; figures and tables are in {out}")
    return 1 if failed else 0


def train_one(flags, threads):
    """Train, or go on, in a process of its own. Returns "", or a line that says what went wrong."""
    folder, arguments = flags["out"], [f"--{name}={value}" for name, value in flags.items()]
    if (Path(folder) / "metrics.jsonl").exists():
        try:
            config, ckpt = read_run(folder)
        except ValueError as error:
            return str(error)
        for name, value in flags.items():
            if name != "steps" and config.get(name) != value:
                there = f"a run with --{name} {config.get(name)}, not {value}"
                return f"{folder}: {there}: name another --out"
        if ckpt and ckpt["step"] == flags["steps"]:
            return ""
        arguments = ["--resume", folder, "--steps", str(flags["steps"])]
        Path(folder, "onestep-ckpt.json").unlink(missing_ok=True)  # ckpt.pt will be another
    return run_script(folder, ["train.py", *arguments], threads)


def measure_one(checkpoint, rollouts, threads):
    """`onestep` at a checkpoint, in a process of its own, unless that is done. Returns as train_one."""
    folder, name = str(checkpoint.parent), checkpoint.stem
    if measured_at(folder, name).get("rollouts") == rollouts:
        return ""
    flags = [f"--checkpoint={name}", f"--rollouts={rollouts}"]
    return run_script(folder, ["eval.py", "onestep", folder, *flags], threads)


def run_script(folder, arguments, threads):
    script = Path(__file__).with_name(arguments[0])
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(script), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
    last_line = (done.stderr.strip().splitlines() or ["killed"])[-1]
    return f"{folder}: {last_line}" if done.returncode else ""


def measured_at(folder, name):
    """What `onestep` found at a checkpoint of a run; {} where it was not measured."""
    path = Path(folder) / f"onestep-{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def finished_runs(out, steps):
    """{label: {seed: records}} of the runs in folders out/<label>-s<seed> that have made their steps.

    What `onestep` found at a step stands in its record, each mean as onestep/<key>.
    """
    runs = {}
    for label in REPRODUCED:
        for path in sorted(out.glob(f"{label}-s*/metrics.jsonl")):
            folder = path.parent
            _, records = read_terms(folder)
            if not records or records[-1]["step"] != steps:
                print(f"left out: {folder}: not at step {steps}", file=sys.stderr)
                continue
            for record in records:
                name = "ckpt" if record["step"] == steps else f"ckpt-{record['step']}"
                for key, value in measured_at(folder, name).items():
                    record[f"onestep/{key}"] = value[0] if isinstance(value, list) else value
            seed = int(folder.name.rpartition("-s")[2])
            runs.setdefault(label, {})[seed] = records
    if not runs:
        raise ValueError(f"{out}: no finished run to draw")
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Claims and predictions


def final(records, key="eval/score"):
    """Mean of an evaluation over the last fifth of training."""
    start = 0.8 * records[-1]["step"]
    return statistics.fmean(r[key] for r in records if key in r and r["step"] >= start)


def finals(seeds, key="eval/score"):
    return {seed: final(records, key) for seed, records in seeds.items()}


def differences(runs, label, other, key="eval/score"):
    """{seed: last fifth of a regime's run less that of another's} of the seeds that both have."""
    ours, theirs = finals(runs.get(label, {}), key), finals(runs.get(other, {}), key)
    return {seed: ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))}


def statistic(records, name, key):
    """One number of a run: what CLAIMS says of the logged `key`, nan where it was not logged."""
    steps, thirds = records[-1]["step"], ([], [], [])
    for r in records:
        if key in r and r["step"] > 0:
            thirds[3 * (r["step"] - 1) // steps].append(r[key])
    early, middle, late = [interval(third)[0] for third in thirds]
    if name == "log2 of late over early":
        return math.log2(max(late, 1e-30) / max(early, 1e-30))
    means = {"early": early, "middle": middle, "late": late, "start": records[0].get(key)}
    means["mean"] = interval(itertools.chain(*thirds))[0]
    first, _, second = name.partition(" - ")
    return means[first] - (means[second] if second else 0.0)


ANY = math.inf
# H5, seconds of a step, needs an idle machine: tests/bench.py. H7: predictions.
CLAIMS = [  # claim, quantity, regime, statistic or regime to compare with, key, claimed to lie above, below
    ("H1", "cosine of g and m of ce, without noise", "detach", "mean", "onestep/ce/cos", -0.1, 0.1),
    ("H1", "ce: log2 of v², last third over first", "ce", "log2 of late over early", "occ/v2", -1, ANY),
    ("H1", "ce − detach, points", "ce", "detach", "eval/score", -ANY, 0),
    ("H2", "cosine of g and m of policy, without noise", "occ", "mean", "onestep/policy/cos", 0, ANY),
    ("H2", "the same, early − late", "occ", "early - late", "onestep/policy/cos", 0, ANY),
    ("H2", "policy: log2 of v², last third over first", "policy", "log2 of late over early", "occ/v2", -1, ANY),
    ("H2", "policy: score, middle third − start", "policy", "middle - start", "eval/score", 0, ANY),
    ("H2", "policy: score, middle third − last", "policy", "middle - late", "eval/score", 0, ANY),
    ("H3", "occ: λ_t, first third − last", "occ", "early - late", "occ/lam", 0, ANY),
    ("H4", "occ − detach, points", "occ", "detach", "eval/score", 0, ANY),
    *[("H6", f"occ − {label}, points", "occ", label, "eval/score", 0, ANY) for label in SWEEP],
]  # fmt: skip


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
    for claim, quantity, label, name, key, above, below in CLAIMS:
        if name in REPRODUCED:
            values = list(differences(runs, label, name, key).values())
        else:
            values = [statistic(records, name, key) for records in runs.get(label, {}).values()]
        n = sum(not math.isnan(value) for value in values)
        mean, half = interval(values)
        claimed = f"{above:g} to {below:g}"
        if below == ANY:
            claimed = f"above {above:g}"
        elif above == -ANY:
            claimed = f"below {below:g}"
        judgement = verdict(mean, half, above, below)
        rows.append([claim, quantity, cell((mean, half), 3), n, claimed, judgement])
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


# Of each regime: whose states its steps are measured at (the heads learn by the same loss there), and what they gain.
PREDICTED = {
    "ce": ("detach", "ce/gain_1"),
    "policy": ("occ", "policy/gain_1"),
    "policy-0.1": ("occ", "policy/gain_0.1"),
    "policy-0.5": ("occ", "policy/gain_0.5"),
    "occ": ("occ", "lam_logprob/gain"),
}


def predictions(runs, steps):
    """Rows of a table: what one step says of whole runs, beside what they did; H7."""
    rows = []
    for label, (states, key) in PREDICTED.items():
        share = 0.75 if label == "occ" else 1.0  # in the first of four updates its λ_t is 0
        predicted = {}
        for seed, gains in curves(runs.get(states, {}), f"onestep/{key}").items():
            if gains:
                gains = {step: share * gain for step, gain in gains.items()}
                predicted[seed] = predicted_difference(gains, steps)
        measured = differences(runs, label, "detach")
        gaps = [gap - predicted[seed] for seed, gap in measured.items() if seed in predicted]
        columns = (predicted.values(), measured.values(), gaps)
        rows.append([label, len(measured), *(cell(interval(column)) for column in columns)])
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
            if not states:
                continue
            gaps = [r[f"onestep/{name}/lam"] - r["onestep/policy/best/lam"] for r in states]
            bias.append(interval(gaps)[0])
            gain.append(interval(r[f"onestep/{name}/gain"] for r in states)[0])
        rows.append([title, len(bias), cell(interval(bias), 2), cell(interval(gain))])
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Figures and tables of the reproduction


def draw(out, steps):
    """Every figure and every table, from the runs that lie in `out`."""
    runs = finished_runs(out, steps)
    gaps = gaps_to_detach(runs), Panel("Difference to detach, seed by seed", "points of 100")
    save(draw_panels([logged(runs, "eval/score"), gaps], points=60), out / "1-scores.png")

    with_mtp = {label: runs[label] for label in ("ce", "policy", "occ", "exact") if label in runs}
    panels = {key: logged(with_mtp, key) for key in PANELS}
    terms = [panels[key] for key in ("occ/c", "occ/v2", "occ/cos")]
    save(draw_panels(terms), out / "2-terms.png")
    decomposition = [panels["first_order"], panels["second_order"]]
    save(draw_panels(decomposition), out / "3-decomposition.png")

    lams, gains = {}, {}
    for name, title in JUDGED.items():
        lams[title] = curves(runs.get("occ", {}), f"onestep/{name}/lam")
        gains[title] = curves(runs.get("occ", {}), f"onestep/{name}/gain")
    figure = draw_panels([
        (lams, Panel("occ: λ of each proxy", "mean over minibatches", "symlog")),
        (gains, Panel("occ: gain of a step of Adam over λ = 0", "%")),
    ])  # fmt: skip
    figure.axes[1].set_ylim(-25, 10)  # where few minibatches say little, intervals go beyond
    save(figure, out / "4-proxies.png")

    cosines, gains, by_size = {}, {}, {}
    for label in ("detach", "occ"):
        for kind in ("policy", "ce"):
            line, seeds = f"{label}, m of {kind}", runs.get(label, {})
            cosines[line] = curves(seeds, f"onestep/{kind}/cos")
            gains[line] = curves(seeds, f"onestep/{kind}/gain_1")
            by_size[line] = {}
            keys = {size: f"onestep/{kind}/gain_at_{size}" for size in SIZES}
            for seed, records in seeds.items():
                end = records[-1]
                by_size[line][seed] = {size: end[key] for size, key in keys.items() if key in end}
    figure = draw_panels([
        (cosines, Panel("Cosine of g and m without noise", "cosine")),
        (gains, Panel("Gain of a step of Adam at λ = 1, over λ = 0", "%")),
        (by_size, Panel("At the end: gain of the λ that other samples choose", "%")),
    ])  # fmt: skip
    sizes = f"responses a minibatch ({MARKED[0]} here, {MARKED[1]} in the paper)"
    axis = figure.axes[2]
    axis.set(xlabel=sizes, ylim=(-40, 40))
    axis.set_xscale("log", base=2)
    for size in MARKED:
        axis.axvline(size, color="gray", linestyle=":")
    save(figure, out / "5-noise.png")
    write_tables(out, runs, steps)


def gaps_to_detach(runs):
    """Scores less those of detach, for each other label: lines of a panel."""
    scores, _ = logged(runs, "eval/score")
    base, lines = scores.pop("detach", {}), {}
    for label, seeds in scores.items():
        for seed in sorted(set(seeds) & set(base)):
            ours, theirs = seeds[seed], base[seed]
            gap = {step: ours[step] - theirs[step] for step in ours if step in theirs}
            lines.setdefault(label, {})[seed] = gap
    return lines


def write_tables(out, runs, steps):
    """Scores, differences to detach, predictions, proxies and claims."""
    one_run = next(iter(next(iter(runs.values())).values()))
    suites = [name for name in one_run[0] if name.startswith("eval/")]
    scores, gaps = [], []
    for label, seeds in runs.items():
        row = [cell(interval(finals(seeds, suite).values())) for suite in suites]
        row.append(cell(interval(records[0]["eval/score"] for records in seeds.values())))
        for third in ("early", "late"):
            lams = [statistic(records, third, "occ/lam") for records in seeds.values()]
            row.append(cell(interval(lams), 3))
        scores.append([label, len(seeds), *row])
        to_detach = [differences(runs, label, "detach", suite).values() for suite in suites]
        if label != "detach" and to_detach[0]:
            gaps.append([label, len(to_detach[0]), *(cell(interval(x)) for x in to_detach)])
    names = [name.removeprefix("eval/") for name in suites]
    head = ["regime", "n", *names, "before RL", "λ, first third", "last third"]
    write_table(out / "scores", head, scores)
    write_table(out / "differences", ["regime − detach", "n", *names], gaps)
    if "detach" in runs:
        columns = ["predicted from one step", "measured", "measured − predicted"]
        head = ["regime − detach", "n", *columns]
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
            else:
                kind = str if choices else f.type
                options = {"type": kind, "metavar": "|".join(choices) or kind.__name__}
            text = (comments[f.name] + default).replace("%", "%%")
            self.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, **options)


@contextlib.contextmanager
def reporting(prog):
    """Errors as one line on stderr and an exit code: 2 the user's mistake, 1 a run that broke down, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have no encoding
            stream.reconfigure(errors="replace")  # what a terminal's encoding lacks
    wrong_paths = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    mistakes = (ValueError, PermissionError, *wrong_paths)
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, mistakes) else 1)
    except KeyboardInterrupt:
        how = "; go on with --resume and the run's folder" if prog == "train.py" else ""
        print(f"{prog}: interrupted{how}", file=sys.stderr)
        sys.exit(130)


def parse(argv):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        text = inspect.getdoc(function)
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        if name != "reproduce":
            count = "+" if name == "plot" else None
            command.add_argument("run", nargs=count, help="folder of a run")
        if name == "sample":
            text = "what to complete [held-out problems]"
            command.add_argument("prompt", nargs="?", default="", help=text)
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
    return args


COMMANDS = {f.__name__: f for f in (score, sample, explain, onestep, plot, reproduce)}
FLAGS = {  # default, help, and the commands that have it
    "k": (8, "samples a problem", "score sample"),
    "temperature": (1.0, "of sampling; 0 is greedy", "score sample"),
    "speculative": (False, "the heads draft", "score sample"),
    "problems": (0, "a suite, at most; 0: 64 for score, or all of a file given by --suite; 2 for sample",
                 "score sample"),
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
    "out": ("", "picture or folder to write; by default in the run's folder, or out/reproduce",
            "explain plot reproduce"),
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
