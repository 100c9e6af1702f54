"""Evaluate: score a run, read what it says, see where its λ_t comes from, draw curves, reproduce the paper's claims.

    python eval.py score out/arithmetic-occ-s0 --k 32       # avg@k and pass@k with 95 % intervals, as a table
    python eval.py sample out/arithmetic-occ-s0 "47+85="    # completions of a prompt, or of held-out problems
    python eval.py explain out/arithmetic-occ-s0            # δ_RL·δ_MTP and δ_MTP² token by token
    python eval.py onestep out/arithmetic-occ-s0            # what MTP adds to one update, term by term, by λ
    python eval.py plot out/arithmetic-*                    # reward, score, λ_t, c_t and v_t² over training
    python eval.py reproduce                                # regimes × seeds, three figures, tables, claims

avg@k is the mean accuracy of k samples per problem, pass@k the chance that one of k samples or more is right. The model
is rebuilt from what the run's header says. Curves read metrics.jsonl and nothing else; the figures of reproduce also
read what onestep found. Runs that differ only in the seed, and in what is no part of the experiment, are one line, with
a 95 % band over seeds. All intervals are Student's t.

train.py also uses this file: to read runs, draw curves and report errors in one line.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see train.py

import argparse
import contextlib
import copy
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import mtp
import occ
import rl
from model import GPTConfig, find_device

VERSION = 5  # of the run folder's format


# ---- Reading a run -------------------------------------------------------------------------------


def new_state(cfg, shape, device):
    """(trunk, heads, optimizer) of a run before its first step. heads is None in regime off."""
    model, heads = mtp.build(shape, cfg.mtp_depth, cfg.mtp_design, cfg.seed, device)
    heads = heads if occ.REGIMES[cfg.regime].loss else None
    params = [*model.parameters(), *(heads.parameters() if heads else [])]
    return model, heads, torch.optim.Adam(params, cfg.lr, fused=True)


def read_metrics(folder):
    """(header, a record a step) of a run. A last line cut short is left out; any other bad line raises ValueError."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder}: not a run: it has no metrics.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records = [rl.parse_json(line, f"{path}:{i}") for i, line in enumerate(lines, 1)]
    for i, record in enumerate(records, 1):
        if not isinstance(record, dict) or ("step" in record) == (i == 1):
            raise ValueError(f"{path}:{i}: not what a run writes there")
    version = records[0].get("versions", {}).get("nanoocc") if records else None
    if version != VERSION or "config" not in records[0]:
        raise ValueError(f"{path}:1: of version {version}, not {VERSION}; start the run again")
    return records[0], records[1:]


def read_run(folder, name="ckpt.pt"):
    """(header, checkpoint or None) of a run. ValueError when something there is not what it should be."""
    header, records = read_metrics(folder)
    path = Path(folder) / name
    if not path.exists():
        if records and records[-1]["step"] > 0:
            raise ValueError(f"{path}: missing, though steps were made: {records[-1]['step']}")
        return header, None
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        return header, ckpt | {"step": int(ckpt["step"])}
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None


def check_data(header):
    """ValueError if a file that a run was trained on is no longer what it was."""
    for path, digest in header["data"].items():
        if not Path(path).exists():
            raise ValueError(f"{path}: not there; the run was trained on it")
        if rl.digest(path) != digest:
            raise ValueError(f"{path}: has changed since the run was trained on it")


def load_run(args, with_data=True, with_heads=False):
    """Config and (trunk, heads, optimizer) of the checkpoint of args.run, on args.device.

    In regime off heads is None, or with_heads raises ValueError. with_data: the run's own problems are needed.
    """
    header, ckpt = read_run(args.run, f"{getattr(args, 'checkpoint', 'ckpt')}.pt")
    if ckpt is None:
        raise ValueError(f"{args.run}: no checkpoint yet: python train.py --resume {args.run}")
    if with_data:
        check_data(header)
    cfg, device = SimpleNamespace(**header["config"]), find_device(args.device)
    model, heads, optimizer = new_state(cfg, GPTConfig(**header["shape"]), device)
    if with_heads and not heads:
        raise ValueError(f"{args.run}: regime off has no heads, so no drafts and no lambda")
    load_weights(ckpt, model=model, heads=heads, optimizer=optimizer)
    return cfg, (model, heads, optimizer)


def load_weights(ckpt, **parts):
    """Weights of a checkpoint into model=, heads= and optimizer=; a part that is None is left out."""
    for name, part in parts.items():
        try:
            if part is not None:
                part.load_state_dict(ckpt[name])
        except (RuntimeError, KeyError, ValueError):
            raise ValueError(f"the checkpoint's {name} is not of this run") from None


# ---- Intervals and tables ------------------------------------------------------------------------


def student_t(freedom):
    """The 97.5 % quantile; from 12 degrees of freedom on by a formula that is right to about 0.01."""
    table = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.5 / freedom


def interval(values):
    """Mean of numbers, without those that are nan, and half-width of its 95 % interval; nan where it cannot be had."""
    x = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(x) if x else math.nan
    if len(x) < 2:
        return mean, math.nan
    return mean, student_t(len(x) - 1) * statistics.stdev(x) / len(x) ** 0.5


def jackknife(whole, left_out):
    """(whole, half-width of its 95 % interval) from the same statistic without each part of the sample in turn."""
    n = len(left_out)
    variance = (n - 1) ** 2 / n * statistics.variance(left_out)
    return whole, student_t(n - 1) * variance**0.5


def mean_of(intervals):
    """Mean of independent (mean, half-width), as one more of them."""
    means, halves = zip(*intervals)
    return statistics.fmean(means), math.hypot(*halves) / len(halves)


def ratio(a, b):
    return a / b if b else math.nan


def cell(interval, digits=1):
    mean, half = interval
    if math.isnan(mean):
        return "–"
    spread = "(n = 1)" if math.isnan(half) else f"± {half:.{digits}f}"
    return f"{mean:z.{digits}f} {spread}"


def markdown(head, rows):
    """Lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


# ---- Scores and samples --------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """Unbiased pass@k from n samples of which c are right (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def equal_by_algebra(gold, candidate):
    """What math-verify (an optional package) says of two formulas, where `rl.answers_equal` says no.

    It evaluates what it reads, which could take forever: it gets no long numbers, factorials or powers of powers.
    """
    if candidate is None or len(candidate) > 200 or rl.read_number(gold) is not None:
        return False
    if re.search(r"\d{5}|__|!|\*\*|\^.*\^", candidate):
        return False
    from math_verify import parse, verify

    try:
        a, b = [parse(f"${text.strip('$')}$", parsing_timeout=1) for text in (gold, candidate)]
        return bool(verify(a, b, timeout_seconds=1))
    except Exception:  # whatever it meets in a text that it cannot read
        return False


def samples_of(cfg, model, problems, args):
    """args.k samples of each problem, about 512 rows at a time: whether each is right, and its text."""
    tok, generator = rl.get_tokenizer(cfg.tokenizer), torch.Generator().manual_seed(args.seed)
    options = (args.k, cfg.max_new_tokens, args.temperature, generator)
    right, texts, chunk = [], [], max(512 // args.k, 1)
    for i in range(0, len(problems), chunk):
        batch, completions = rl.sample(model, tok, problems[i : i + chunk], *options)
        right += batch["right"].int().tolist()
        texts += completions
    return right, texts


def score(args):
    """The scores of a run as a table in Markdown: a row per suite and one for all, in points of 100.

    The suites are the held-out problems of what the run was trained on, or those of --suite; a data set that shares
    problems with the training data is refused.
    """
    cfg, (model, _, _) = load_run(args)
    suites = trained = rl.suites_of(cfg.task, cfg.data_dir)
    if args.suite:
        suites = rl.suites_of(args.suite, args.data_dir or cfg.data_dir, scoring=True)
        rl.check_apart(trained, suites)
    tok, room = rl.get_tokenizer(cfg.tokenizer), model.cfg.block_size
    cfg.max_new_tokens = new = args.max_new_tokens or cfg.max_new_tokens
    if new >= room:
        raise ValueError(f"--max_new_tokens {new}: must be below {room}, the model's positions")
    algebra = importlib.util.find_spec("math_verify") is not None
    rows, averages, passes, notes = [], [], [], []
    for suite in tqdm(suites, "suites", disable=None):
        name = rl.label(suite)
        if args.suite and suite not in rl.SUITES:  # the run was not trained on any of it
            problems = rl.read_problems(suite)[: args.problems or None]
        else:
            problems = rl.held_out_problems(suite, cfg.difficulty, args.problems or 64)
        if name in rl.COMPETITION and not algebra:
            numbers = [p for p in problems if rl.read_number(p.answer) is not None]
            left_out, problems = len(problems) - len(numbers), numbers
            notes.append(f"{name}: {left_out} answers are no numbers: left out without math-verify")
        cut = sum(len(tok.encode_ordinary(p.prompt)) + new > room for p in problems)
        if cut:
            notes.append(f"{name}: of {cut} prompts only the last {room - new} tokens were read")
        right, texts = samples_of(cfg, model, problems, args)
        for i, text in enumerate(texts if algebra else []):
            gold = problems[i // args.k].answer
            right[i] = right[i] or int(equal_by_algebra(gold, rl.extract_answer(text)))
        counts = [sum(right[i : i + args.k]) for i in range(0, len(right), args.k)]
        averages.append(interval([100 * c / args.k for c in counts]))
        passes.append(interval([100 * pass_at_k(args.k, c, args.k) for c in counts]))
        rows.append([name, len(problems), cell(averages[-1]), cell(passes[-1])])
    total = sum(row[1] for row in rows)
    rows.append(["all", total, cell(mean_of(averages)), cell(mean_of(passes))])
    return [*markdown(["suite", "problems", f"avg@{args.k}", f"pass@{args.k}"], rows), *notes]


def drafts_of(cfg, model, heads, problems, args):
    """As samples_of, but the heads draft; [brackets] are around the drafts that the trunk accepted."""
    torch.manual_seed(args.seed)
    tok, right, texts = rl.get_tokenizer(cfg.tokenizer), [], []
    for problem in [p for p in problems for _ in range(args.k)]:
        room = model.cfg.block_size - cfg.max_new_tokens  # of a long prompt the end is kept
        prompt = tok.encode_ordinary(problem.prompt)[-room:]
        options = cfg.max_new_tokens, tok.eot_token, args.temperature
        tokens, depths = mtp.speculative_sample(model, heads, prompt, *options)
        right.append(int(rl.is_right(problem, tok.decode(tokens).removesuffix(rl.EOS))))
        text = ""
        for is_draft, run in itertools.groupby(zip(tokens, depths), key=lambda pair: pair[1] > 0):
            piece = tok.decode([token for token, _ in run]).removesuffix(rl.EOS)
            text += f"[{piece}]" if is_draft and piece else piece
        texts.append(text)
    return right, texts


def sample(args):
    """Completions to read: of a prompt, or of held-out problems with their reward.

    --speculative: the heads draft, the trunk verifies; [brackets] are around the drafts that it accepted.
    """
    cfg, (model, heads, _) = load_run(args, not args.prompt, args.speculative)
    problems = [rl.Problem("", args.prompt, "")]
    if not args.prompt:
        problems = []
        for suite in rl.suites_of(cfg.task, cfg.data_dir):
            problems += rl.held_out_problems(suite, cfg.difficulty, args.problems or 2)
    if args.speculative:
        right, texts = drafts_of(cfg, model, heads, problems, args)
    else:
        right, texts = samples_of(cfg, model, problems, args)
    lines = []
    if args.prompt or any(p.suite in rl.SUITES for p in problems):
        lines = ["Suites have the lowest digit first: 47+85= asks for 74 + 58; ####231 is right."]
    for i, text in enumerate(texts):
        reward = "" if args.prompt else f"reward {right[i]}  "
        lines.append(f"{reward}{problems[i // args.k].prompt!r} -> {text!r}")
    return lines


# ---- Curves --------------------------------------------------------------------------------------
# Runs are {label: {seed: records}}, the lines of a panel {label: {seed: {step: number}}}.

PANELS = {  # what is drawn of a run, by the key of its record
    "reward/right": dict(title="Right answers in training", ylabel="share of all samples"),
    "eval/score": dict(title="Held-out score", ylabel="avg@k, points of 100"),
    "occ/lam": dict(title="Coefficient", ylabel="λ (last update of a step)"),
    "occ/c": dict(
        title="First-order correlation, one minibatch", ylabel="c_t = ⟨g_RL, g_MTP⟩", yscale="asinh"
    ),
    "occ/v2": dict(
        title="Second-order penalty, one minibatch", ylabel="v_t² = ‖g_MTP‖²", yscale="asinh"
    ),
    "mtp/agreement_1": dict(title="MTP head 1 as a drafter", ylabel="share of tokens accepted"),
}
NOT_THE_EXPERIMENT = set("seed out cache_dir data_dir device save_every keep steps".split())


def group_runs(folders):
    """{label: {seed: records}}: runs of one experiment share a line, labelled by what differs from other experiments.

    Runs of the same settings and seed are lines of their own, labelled by their folders.
    """
    runs = [read_metrics(folder) for folder in folders]
    configs = [header["config"] for header, _ in runs]
    differ, labels, groups = [], [], {}
    for name in sorted(set().union(*configs) - NOT_THE_EXPERIMENT - {"regime"}):
        if any(config.get(name) != configs[0].get(name) for config in configs):
            differ.append(name)
    for config in configs:
        labels.append(" ".join([config["regime"], *(f"{x}={config.get(x)}" for x in differ)]))
    same = Counter((label, config["seed"]) for label, config in zip(labels, configs))
    for folder, label, config, (_, records) in zip(folders, labels, configs, runs):
        if not records:
            raise ValueError(f"{folder}: nothing logged yet")
        label = str(folder) if same[label, config["seed"]] > 1 else label
        groups.setdefault(label, {})[config["seed"]] = records
    return groups


def curves(seeds, key):
    """{seed: {step: number}}: what was logged under a key, at the steps where it was."""
    found = {}
    for seed, records in seeds.items():
        found[seed] = {r["step"]: r[key] for r in records if r.get(key) is not None}
    return found


def averaged(seeds, points):
    """Steps shared by all seeds, means and half-widths of the 95 % interval over seeds, (3, points).

    More than `points` steps are averaged in blocks, seed by seed, so that the interval is that of the block's mean.
    """
    steps = sorted(set.intersection(*map(set, seeds.values()))) if seeds else []
    rows = []
    for block in np.array_split(steps, min(points, len(steps))) if steps else []:
        means = [np.mean([curve[step] for step in block]) for curve in seeds.values()]
        rows.append((block.mean(), *interval(means)))
    return np.array(rows).reshape(-1, 3).T


def color_of(label, otherwise):
    """The same for a regime of `reproduce` in every picture."""
    return f"C{list(REPRODUCED).index(label)}" if label in REPRODUCED else otherwise


def draw_lines(axis, lines, panel, points=12):
    """{label: {seed: {step: number}}} as lines with the band of the 95 % interval; panel: what matplotlib sets."""
    for i, (label, seeds) in enumerate(lines.items()):
        steps, mean, half = averaged(seeds, points)
        color = color_of(label, f"C{i}")
        axis.plot(steps, mean, color=color, label=f"{label} (n = {len(seeds)})")
        axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.15, lw=0)
    axis.set(xlabel="step", **panel)
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(fontsize="small")


def panels_of(count):
    """A figure with so many panels, at most three a row, and its axes."""
    from matplotlib.figure import Figure  # takes a second: only where something is drawn

    rows, columns = math.ceil(count / 3), min(count, 3)
    figure = Figure((5 * max(columns, 2), 5 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def save(figure, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def plot(folders, path):
    """Curves of one or more runs, as a picture: right answers, score, λ_t, c_t and v_t² of a minibatch, and more."""
    runs, notes = group_runs(folders), []
    figure, axes = panels_of(len(PANELS))
    for axis, (key, panel) in zip(axes, PANELS.items()):
        draw_lines(axis, {label: curves(seeds, key) for label, seeds in runs.items()}, panel, 60)
    save(figure, path)
    for label, seeds in runs.items():
        last = [records[-1]["step"] for records in seeds.values()]
        if min(last) < max(last):
            notes.append(f"{label}: drawn up to step {min(last)}, the end of its shortest seed")
    return notes


# ---- The last update of one rollout: where λ_t comes from ----------------------------------------


def explain(args):
    """Which tokens make λ_t: the last update of one rollout from a run's checkpoint (before the first, δ is 0).

    A row for each of the 16 tokens that add most to ĉ = Σ δ_RL·δ_MTP, or take most away; equal texts are one row.
    """
    cfg, (model, heads, optimizer) = load_run(args, with_heads=True)
    cfg.probe_every, tok = 1, rl.get_tokenizer(cfg.tokenizer)
    _, _, last = rl.step(cfg, model, heads, optimizer, tok, 10**9 + args.seed)
    if last is None or not last.deltas[1].any():
        why = "one update per rollout, or too few prompts with a gradient; try another --seed"
        raise ValueError(f"{args.run}: every δ is 0: {why}")
    delta_rl, delta_mtp = last.deltas
    c_hat, v2_hat = occ.inner(delta_rl, delta_mtp).item(), occ.inner(delta_mtp, delta_mtp).item()
    exact = occ.exact_terms(last.g, last.m)
    sums = {}  # by text: how often, δ_RL, δ_MTP, product
    for row, column in last.mb["mask_mtp"].any(1).nonzero().tolist():
        ids = last.mb["tokens"][row].tolist()
        text = tok.decode(ids[: column + 1])[-24:], tok.decode([ids[column + 1]])
        a, b = delta_rl[row, column].item(), delta_mtp[row, column].item()
        sums[text] = sums.get(text, 0) + np.array([1, a, b, a * b])
    rows = []
    for text, total in sorted(sums.items(), key=lambda item: -abs(item[1][3]))[:16]:
        times, mean_rl, mean_mtp, share = total / [1, total[0], total[0], c_hat or math.inf]
        means = f"{mean_rl:.3f}", f"{mean_mtp:.3f}"
        rows.append([*map(repr, text), int(times), *means, f"{100 * share:.1f} %"])
    return [
        f"The last update of one rollout, {len(sums)} different tokens. Those with most influence:",
        *markdown(["after", "token", "times", "mean δ_RL", "mean δ_MTP", "share of ĉ"], rows),
        f"proxy: ĉ = {c_hat:.4g}, v̂² = {v2_hat:.4g}, λ = ĉ/v̂² = {c_hat / (v2_hat + 1e-8):.4f}",
        f"exact: c = {exact['c']:.4g}, v² = {exact['v2']:.4g}, λ = c/v² = {exact['lam_exact']:.4f}, "
        f"cosine of g and m {exact['cos']:.3f}",
    ]


# ---- One update: what does MTP add to it, with noise counted? (occ.noisy_terms) ------------------

LAMS = [-0.5, -0.2, -0.1, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0]
PARTS = 12  # of the minibatches: the jackknife leaves out one at a time
TERMS = {  # prefix: name. A number of onestep is keyed by prefix and λ, as sum/0.5
    "first": "first order", "shared": "shared noise", "penalty": "penalty", "sum": "sum",
    "sum8": "sum, 8 × batch, same η", "adam": "Adam's update",
}  # fmt: skip
COLUMNS = {  # of the tables, beside the terms: key, name, digits
    "rl": ("RL alone", 0), "lam_star": ("λ*, noise counted", 2), "lam_star8": ("λ*, 8 ×, same η", 2),
    "lam_t": ("λ_t for λ₊ = 1", 3), "lam_plus": ("λ₊ for λ*", 1), "cos": ("cosine without noise", 2),
    "L_eta": ("Lη of Adam's update", 3), "noise_g": ("noise in ‖ĝ‖², %", 0), "noise_m": ("in ‖m̂‖², %", 0),
}  # fmt: skip


def onestep(args):
    """What MTP adds to one update from a run's checkpoint, term by term and by λ, with noise counted.

    Two kinds of update. A plain one against ĝ + λ m̂, of the size η that makes it at λ = 0 as long as the run's own: its
    mean gain to second order, by occ.noisy_terms, for the run's own m, in % of η g² where g² = ‖E ĝ‖². And one of Adam
    with clip, whose second moments have converged: its first-order gain D(λ) = Σ_j E[ĝ_j] E[u_j] / √E[u_j²], where u
    is ĝ + λ m̂ clipped, in % over λ = 0. A "–" is a quotient whose denominator is not told to be above 0.

    Limits. H is the Hessian of the run's policy loss, a surrogate, without a KL term; of gspo, which clips at less than
    an update moves a ratio, it is mostly the clip's. It is the first update of a rollout: the others start where the
    noise of those before has moved trunk and heads. D(λ) is drawn towards 0 by the noise in E[u_j²], at 60 minibatches
    by about a point. `reinforce` has its baseline from one minibatch here.
    """
    cfg, state = load_run(args, with_heads=True)
    means = part_means(measure(cfg, state, args.rollouts))
    parts = [one_step(means, [i for i in range(PARTS) if i != part]) for part in range(PARTS)]
    found, saved = {}, {}
    for key, (top, bottom) in one_step(means, list(range(PARTS))).items():
        _, half = jackknife(bottom, [part[key][1] for part in parts])
        saved[key], found[key] = (top, bottom, half), (math.nan, math.nan)
        if bottom > half:
            found[key] = jackknife(top / bottom, [ratio(*part[key]) for part in parts])
    path = Path(args.run) / f"onestep-{args.checkpoint}.json"
    path.write_text(json.dumps(saved), encoding="utf-8")  # reproduce pools seeds
    draw_onestep(found, f"{args.run}, {args.checkpoint}", path.with_suffix(".png"))
    rows = [[lam, *(cell(found[f"{term}/{lam:g}"], 0) for term in TERMS)] for lam in LAMS]
    return [
        f"m is the gradient of the heads' {occ.REGIMES[cfg.regime].loss} loss. What MTP adds to a plain update, in % "
        "of η g², and to the first-order gain of Adam's update, in % of that at λ = 0; ± 95 % (jackknife):",
        *markdown(["λ", *TERMS.values()], rows),
        *(f"{name}: {cell(found[key], digits)}" for key, (name, digits) in COLUMNS.items()),
        str(path.with_suffix(".png")),
    ]


def probed(cfg, state, updates, count):
    """The last minibatches of rollouts of so many updates, as rl.step returns them, and the trunk after each."""
    cfg, tok = copy.copy(cfg), rl.get_tokenizer(cfg.tokenizer)
    cfg.prompts_per_step = updates * (cfg.prompts_per_step // cfg.updates_per_rollout)
    cfg.updates_per_rollout, cfg.probe_every = updates, 1
    for i in tqdm(range(count), f"rollouts, update {updates}", disable=None):
        # Loading the checkpoint again would not do: Adam's moments share its memory.
        model, heads, optimizer = copy.deepcopy(state)
        # Steps that training never makes, others for each number of updates: so the samples are fresh.
        _, _, last = rl.step(cfg, model, heads, optimizer, tok, updates * 10**9 + i)
        if last:
            yield last, parameters_to_vector(model.parameters()).detach()


def measure(cfg, state, rollouts):
    """Minibatches as `part_means` takes them, on the CPU: each number or vector of shape (PARTS, minibatches, ...).

    g, m, Hg, Hm are of the first updates of rollouts, so that all stand at the checkpoint's weights: products of
    different ones have no noise in common. Hg and Hm are differences of the policy loss's gradient along g and m, over
    the length of Adam's update, on the next minibatch of the part: on its own samples a gradient falls faster than on
    others. In a first update δ is 0, so λ_t and Adam's update (its length, and Lη along it) are those of second
    updates, of further rollouts.
    """
    algo, trunk = rl.ALGOS[cfg.algo], copy.deepcopy(state[0])
    first = [last for last, _ in probed(cfg, state, 1, rollouts)]

    def moved(pair):
        return pair[0].g.any() and pair[0].deltas[1].any()

    second = list(itertools.islice(filter(moved, probed(cfg, state, 2, rollouts)), 2 * PARTS))
    size, some = len(first) // PARTS, sum(int(last.g.any()) for last in first)
    if min(some, len(second)) < 2 * PARTS:
        few = f"{some} first and {len(second)} second minibatches had a gradient"
        raise ValueError(f"--rollouts {rollouts}: {few}; {2 * PARTS} of each are needed")

    def gradient(theta, mb):
        vector_to_parameters(theta, trunk.parameters())
        logp, _ = rl.logprobs(trunk, None, mb, cfg)
        return occ.flat_grad(rl.trunk_loss(logp, mb, algo), list(trunk.parameters()))

    rows = {name: [] for name in ("lam_t", "length", "L_eta", "g", "m", "Hg", "Hm")}
    for i, (last, after) in enumerate(second):
        fresh, delta = second[i ^ 1][0], last.theta - after
        fall = occ.dot(gradient(last.theta, fresh.mb) - gradient(after, fresh.mb), delta)
        rows["lam_t"].append(occ.logprob_coefficient(*last.deltas))
        rows["length"].append(delta.norm())
        rows["L_eta"].append(fall / (delta.norm() * last.g.norm()))
    length = torch.stack(rows["length"]).mean()
    for i, last in enumerate(tqdm(first[: size * PARTS], "curvatures", disable=None)):
        fresh = first[i - i % size + (i + 1) % size]
        for name, v in (("g", last.g), ("m", last.m)):
            e = length / v.norm().clamp(min=1e-30)
            fall = fresh.g - gradient(last.theta - e * v, fresh.mb)
            rows[name].append(v)
            rows["H" + name].append(fall / e)
    return {name: torch.stack(x).cpu().unflatten(0, (PARTS, -1)) for name, x in rows.items()}


def part_means(rows):
    """Means over the minibatches of each part (PARTS, ...), of what `measure` returns and of products within each."""
    means, g, m = {name: x.mean(1) for name, x in rows.items()}, rows["g"], rows["m"]
    for a, b in ("gg", "mm", ("g", "Hg"), ("g", "Hm"), ("m", "Hg"), ("m", "Hm")):
        means[a + b] = (rows[a] * rows[b]).sum(2).mean(1)
    for lam in LAMS:
        u = g + lam * m
        u /= u.norm(dim=2, keepdim=True).clamp(min=1.0)  # as training clips it
        means[f"u{lam:g}"], means[f"u²{lam:g}"] = u.mean(1), u.square().mean(1)
    return means


def one_step(means, kept):
    """The numbers of `onestep` from some of the parts, each as (top, bottom) of a quotient.

    Products across parts have no noise in common, and products within a minibatch have all of it.
    """
    means = {name: x[kept] for name, x in means.items()}

    def across(a, b):
        a, b = means[a], means[b]
        return (a.sum(0) * b.sum(0) - (a * b).sum(0)) / (len(a) * (len(a) - 1))

    def within(name):
        return means[name].mean().item()

    g2, c, v2 = (across(*pair).sum().item() for pair in ("gg", "gm", "mm"))
    eta, lam_t = within("length") / within("gg") ** 0.5, within("lam_t")
    found = {
        "rl": (100 * (eta * g2 - eta**2 / 2 * within("gHg")), eta * g2),
        "lam_t": (lam_t, 1.0),
        "L_eta": (within("L_eta"), 1.0),
        "cos": (c, (max(g2, 0) * max(v2, 0)) ** 0.5),
        "noise_g": (100 - 100 * ratio(g2, within("gg")), 1.0),
        "noise_m": (100 - 100 * ratio(v2, within("mm")), 1.0),
    }
    for size, tag in ((8, "8"), (1, "")):  # a larger minibatch has less noise and the same means
        ghm = (across("g", "Hm") + across("m", "Hg")).sum().item() / 2
        mhm = across("m", "Hm").sum().item()
        ghm += ((within("gHm") + within("mHg")) / 2 - ghm) / size
        mhm += (within("mHm") - mhm) / size
        found[f"lam_star{tag}"] = c - eta * ghm, eta * mhm
        for lam in LAMS:
            terms = occ.noisy_terms(lam, c, ghm, mhm, eta)
            for name, value in zip(("first", "shared", "penalty", "sum"), (*terms, sum(terms))):
                found[f"{name}{tag}/{lam:g}"] = 100 * value, eta * g2
    found["lam_plus"] = c - eta * ghm, eta * mhm * lam_t
    gains = {}
    for lam in LAMS:
        root = means[f"u²{lam:g}"].mean(0).sqrt() + 1e-8  # Adam's ε
        gains[lam] = (across("g", f"u{lam:g}") / root).sum().item()
    return found | {
        f"adam/{lam:g}": (100 * (x - gains[0.0]), gains[0.0]) for lam, x in gains.items()
    }


def percent_axis(axis):
    """An axis on which 20 % and 1000 % can both be read."""
    from matplotlib.ticker import FixedLocator

    sizes = [20, 50, 100, 200, 500, 1000, 5000]
    axis.set_yscale("asinh", linear_width=50)
    axis.yaxis.set_major_locator(FixedLocator([*(-size for size in sizes), 0, *sizes]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.axhline(0, color="black", lw=0.5)
    axis.grid(alpha=0.3)


def draw_onestep(found, title, path):
    """The terms by λ as lines, their sum with its band, Adam's gain as points, λ* and the proxy's λ_t as marks."""
    figure, (axis,) = panels_of(1)
    for i, (term, name) in enumerate(TERMS.items()):
        mean, half = np.array([found[f"{term}/{lam:g}"] for lam in LAMS]).T
        style = {"sum8": "--", "adam": "o"}.get(term, "-")
        axis.plot(LAMS, mean, style, color=f"C{i}", label=name)
        if term in ("sum", "adam"):
            axis.fill_between(LAMS, mean - half, mean + half, color=f"C{i}", alpha=0.15, lw=0)
    for key, style in (("lam_star", ":"), ("lam_t", "-.")):
        if LAMS[0] <= found[key][0] <= LAMS[-1]:
            axis.axvline(found[key][0], color="gray", ls=style, label=COLUMNS[key][0])
    percent_axis(axis)
    units = "% of η g²; Adam's update: % of its gain at λ = 0"
    axis.set(title=f"What MTP adds to one update\n{title}", xlabel="λ", ylabel=units)
    axis.legend(fontsize="small")
    save(figure, path)


# ---- The reproduction: regimes x seeds, figures, claims -------------------------------------------

SETTING = dict(eval_k=32, probe_every=5, keep="0,25,60,120")  # all else is as in train.py
REPRODUCED = {  # the others are compared with the first; onestep is run on the first four
    "detach": dict(regime="detach"),
    "ce": dict(regime="ce"),
    "policy": dict(regime="policy"),
    "occ": dict(regime="occ"),
    "exact": dict(regime="exact"),
    "policy-0.1": dict(regime="policy", lam=0.1),
    "policy-0.5": dict(regime="policy", lam=0.5),
}
DRAWN = list(REPRODUCED)[:4]


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reproduce(args):
    """Train the regimes on several seeds; draw the paper's figures, write its tables, and test its claims.

    All regimes of a seed start from the same pretrained weights. Finished runs are not repeated, unfinished ones go on;
    one that breaks down is named, and the others are drawn without it. Flags after -- go to every run.
    """
    began, plan, errors = time.perf_counter(), [], []
    for label in args.regimes.split(","):
        if label not in REPRODUCED:
            allowed = f"some of {','.join(REPRODUCED)}"
            raise ValueError(f"--regimes {args.regimes}: unknown {label!r}; allowed: {allowed}")
        plan += [(label, seed) for seed in range(args.first_seed, args.first_seed + args.seeds)]
    jobs = args.jobs or (min(cores(), 4) if torch.cuda.is_available() else cores())
    with ThreadPoolExecutor(jobs) as pool:
        # The first run of a seed pretrains for the others.
        for wave in (plan[: args.seeds], plan[args.seeds :]):
            results = pool.map(lambda run: reproduce_one(args, *run, max(cores() // jobs, 1)), wave)
            errors += tqdm(results, "runs", len(wave), disable=None)
    failed = [line for line in errors if line]
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    draw(Path(args.out))
    count, minutes = f"{len(plan) - len(failed)} of {len(plan)}", (time.perf_counter() - began) / 60
    print(f"{count} runs in {minutes:.1f} minutes; figures and tables are in {args.out}")
    return 1 if failed else 0


def reproduce_one(args, label, seed, threads):
    """Train, or go on, and measure single steps, in processes of their own. Returns "", or what went wrong."""
    folder = Path(args.out) / f"{label}-s{seed}"
    flags = SETTING | REPRODUCED[label] | dict(seed=seed, out=folder, cache_dir=f"{args.out}/base")
    train = ["train.py", *(f"--{name}={value}" for name, value in flags.items()), *args.flags]
    if (folder / "metrics.jsonl").exists():
        try:
            header, ckpt = read_run(folder)
        except ValueError as error:
            return str(error)
        if header["command"][1:] != train[1:]:
            command = " ".join(header["command"])
            return f"{folder}: made by another command: {command}; name another --out"
        finished = ckpt and ckpt["step"] == header["config"]["steps"]
        train = [] if finished else ["train.py", "--resume", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}

    def failure(script, *arguments):
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
        last_line = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return f"{folder}: {last_line}" if done.returncode else ""

    failed = [failure(*train)] if train else []
    for path in sorted(folder.glob("ckpt*.pt")) if label in DRAWN and not any(failed) else []:
        if not (folder / f"onestep-{path.stem}.json").exists():
            flags = f"--checkpoint={path.stem}", f"--rollouts={args.rollouts}"
            failed.append(failure("eval.py", "onestep", str(folder), *flags))
    return "; ".join(filter(None, failed))


def finished_runs(out):
    """{label: {seed: records}} of the runs in folders out/<label>-s<seed> that have made their steps.

    What `onestep` found at a step stands in its record, as onestep/<key>: (top, bottom, half-width of bottom).
    """
    runs = {}
    for label, path in itertools.product(REPRODUCED, sorted(out.glob("*/metrics.jsonl"))):
        header, records = read_metrics(path.parent)
        if path.parent.name != f"{label}-s{header['seed']}":
            continue  # of another label, or a copy
        steps = header["config"]["steps"]
        if not records or records[-1]["step"] < steps:
            print(f"left out: {path.parent}: not at step {steps}", file=sys.stderr)
            continue
        for record in records:
            at = "ckpt" if record["step"] == steps else f"ckpt-{record['step']}"
            file = path.with_name(f"onestep-{at}.json")
            if file.exists():
                numbers = rl.parse_json(file.read_text(encoding="utf-8", errors="replace"), file)
                if not isinstance(numbers, dict) or np.shape([*numbers.values()])[1:] != (3,):
                    raise ValueError(f"{file}: not what onestep writes today; delete it")
                record |= {f"onestep/{key}": tuple(value) for key, value in numbers.items()}
            if record.get("occ/g2") and record["occ/v2"]:
                record["occ/v2_g2"] = math.log2(record["occ/v2"] / record["occ/g2"])
        runs.setdefault(label, {})[header["seed"]] = records
    if not runs:
        raise ValueError(f"{out}: no finished run to draw")
    return runs


def draw(out):
    """Every figure and every table, from the runs that lie in `out`."""
    from matplotlib import rc_context

    runs = finished_runs(out)
    pair = [(label, runs[label]) for label in ("ce", "policy") if label in runs]
    with rc_context({"font.size": 14}):  # a page shows it small
        figure, axes = panels_of(3)
        draw_gaps(axes[0], runs)
        when = ("base", 0), ("later", None)
        groups = [(f"{label}\n{name}", seeds, at) for label, seeds in pair for name, at in when]
        draw_terms(axes[1], groups)
        axes[1].set(title="What MTP adds to a plain update, λ = 1")
        draw_coefficients(axes[2], runs)
        save(figure, out / "overview.png")

    figure, axes = panels_of(2)
    draw_lines(axes[0], curves_of(runs, "eval/score", DRAWN), PANELS["eval/score"], 60)
    draw_gaps(axes[1], runs)
    save(figure, out / "1-scores.png")

    figure, axes = panels_of(6)
    for axis, (label, seeds) in zip(axes, pair):
        draw_terms(axis, [(step, seeds, step) for step in measured(seeds)])
        axis.set(title=f"{label}: what MTP adds to a plain update, λ = 1", xlabel="step")
        draw_states(axes[2], seeds, "adam/1", label)
    axes[2].set(title="Adam's update at λ = 1, over λ = 0", ylabel="% of its first-order gain")
    for axis, key in zip(axes[3:], ("occ/c", "occ/v2", "eval/score")):
        draw_lines(axis, curves_of(runs, key, ("ce", "policy")), PANELS[key])
    save(figure, out / "2-decomposition.png")

    figure, axes = panels_of(1)
    draw_coefficients(axes[0], runs)
    save(figure, out / "3-coefficient.png")
    for name, lines in tables(runs).items():
        (out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def curves_of(runs, key, labels):
    return {label: curves(runs[label], key) for label in labels if label in runs}


def draw_gaps(axis, runs):
    """Held-out scores less those of detach, seed by seed."""
    scores = curves_of(runs, "eval/score", DRAWN)
    detach, gaps = scores.pop("detach", {}), {}
    for label, seeds in scores.items():
        gaps[label] = {seed: minus(seeds[seed], detach[seed]) for seed in seeds if seed in detach}
    panel = dict(title="Score less that of detach", ylabel="points of 100")
    draw_lines(axis, gaps, panel, 60)


def draw_terms(axis, groups):
    """The terms at λ = 1 as bars, their sum with its interval as a dot. A group is (name, seeds, step), see `over`."""
    for i, term in enumerate(("first", "shared", "penalty", "sum", "sum8")):
        x = np.arange(len(groups)) + 0.18 * (i - 2)
        found = [pooled(over(seeds, f"onestep/{term}/1", step=step)) for _, seeds, step in groups]
        mean, half = np.array(found).reshape(-1, 2).T
        if term.startswith("sum"):
            hollow = "white" if term == "sum8" else "black"
            style = dict(fmt="o", color="black", mfc=hollow, capsize=3)
            axis.errorbar(x, mean, half, **style, label=TERMS[term])
        else:
            axis.bar(x, mean, 0.18, label=TERMS[term])
    axis.set_xticks(range(len(groups)), [str(name) for name, *_ in groups])
    for i in np.flatnonzero(np.isnan(mean)):
        axis.text(i, 0, "g² unsure", rotation=90, ha="center", va="bottom")
    axis.set(ylabel="% of η g²", xlim=(-0.6, len(groups) - 0.4))
    percent_axis(axis)
    axis.legend(fontsize="small")


def measured(seeds):
    """The steps at which `onestep` has measured a seed."""
    return sorted(set().union(*curves(seeds, "onestep/lam_t").values()))


def draw_states(axis, seeds, key, name):
    """A number of `onestep` at the measured steps, with its interval over seeds."""
    steps = measured(seeds)
    found = [pooled(over(seeds, f"onestep/{key}", step=step)) for step in steps]
    mean, half = np.array(found).reshape(-1, 2).T
    style = dict(fmt="o", color=color_of(name, "black"), capsize=3)
    axis.errorbar(steps, mean, half, **style, label=name)
    axis.set(xlabel="step")
    axis.axhline(0, color="black", lw=0.5)
    axis.legend(fontsize="small")


def draw_coefficients(axis, runs):
    """λ_t of occ, the minibatch's own c/v², and λ* with noise counted."""
    seeds = runs.get("occ", {})
    lines = {"λ_t": curves(seeds, "occ/lam")}
    lines["λ₊ c/v² of the minibatch"] = curves(seeds, "occ/lam_exact")
    draw_lines(axis, lines, dict(title="occ: coefficients", ylabel="λ"))
    draw_states(axis, seeds, "lam_star", "λ*, noise counted")


def minus(a, b):
    """{step: number} less another, of what both have."""
    return {key: a[key] - b[key] for key in a if key in b}


AFTER_0 = 1e-6  # a share of training: what begins here leaves out step 0 alone


def over(seeds, key, first=AFTER_0, last=1.0, step=None):
    """{seed: sums} of what was logged under a key at a step, or between two shares of training: of a quotient the sums
    of its tops and bottoms and the half-width of the latter, of other numbers their sum, their count, and 0.

    So sum/sum is the mean, of quotients that of the means: a state whose bottom is near 0 counts for nothing, and none
    is left out. By default step 0 is: nothing has been trained there, and Adam, without moments, steps farther.
    """
    found = {}
    for seed, records in seeds.items():
        rows = []
        for record in records:
            share, value = record["step"] / records[-1]["step"], record.get(key)
            at = record["step"] == step or (step is None and first <= share <= last)
            if at and value is not None:
                rows.append(value if isinstance(value, tuple) else (value, 1.0, 0.0))
        if rows:
            top, bottom, half = zip(*rows)
            found[seed] = sum(top), sum(bottom), math.hypot(*half)
    return found


def pooled(*sides):
    """(Mean over seeds of what `over` returns, half-width of its 95 % interval), or of two sides the first less the
    second, seed by seed.

    The jackknife leaves out one seed with all that belongs to it; for a mean it gives Student's interval. nan where a
    bottom is not told to be above 0, over seeds or, of one seed, by its own interval.
    """
    common = [seed for seed in sides[0] if all(seed in side for side in sides)]

    def value(some):
        means = [sum(side[s][0] for s in some) / sum(side[s][1] for s in some) for side in sides]
        return means[0] - sum(means[1:])

    below = [interval([side[seed][1] for seed in common]) for side in sides]
    if len(common) == 1:
        below = [side[common[0]][1:] for side in sides]
    if not common or not all(mean > half for mean, half in below):
        return math.nan, math.nan
    if len(common) == 1:
        return value(common), math.nan
    return jackknife(value(common), [value([s for s in common if s != x]) for x in common])


def tables(runs):
    """{name: lines}: scores, the terms at the measured states, and claims. ± 95 % over seeds."""
    rows, key, end = [], "eval/score", (0.8, 1)
    base = over(runs.get("detach", {}), key, *end)
    for label, seeds in runs.items():
        row = [cell(pooled(over(seeds, key, *shares))) for shares in ((0, 0), end)]
        row += ["–" if label == "detach" else cell(pooled(over(seeds, key, *end), base))]
        for shares in ((AFTER_0, 1 / 3), (2 / 3, 1)):
            row.append(cell(pooled(over(seeds, "occ/lam", *shares)), 3))
        rows.append([label, len(seeds), *row])
    head = ["regime", "n", "before RL", "last fifth", "minus detach", "λ early", "late"]
    found = {"scores": markdown(head, rows)}

    numbers = {f"{term}/1": (name, 0) for term, name in TERMS.items()} | COLUMNS
    rows = []
    for label, seeds in runs.items():
        states = {step: step for step in measured(seeds)}
        for name, step in (states | {"later than 0": None} if any(states) else states).items():
            at = {key: over(seeds, f"onestep/{key}", step=step) for key in numbers}
            shown = [cell(pooled(at[key]), digits) for key, (_, digits) in numbers.items()]
            rows.append([label, name, len(at["lam_t"]), *shown])
    head = ["run", "step", "n", *(name for name, _ in numbers.values())]
    found["terms"] = markdown(head, rows)

    head = ["claim", "quantity", "95 % interval", "n", "claimed", "verdict"]
    return found | {"claims": markdown(head, claims(runs))}


def claims(runs):
    """A row per claim: its quantity, interval over seeds, n, where it should lie, verdict.

    "reproduced" if the interval lies where the claim says, "not" if it lies elsewhere, else "undecided". H5, seconds of
    a step, needs an idle machine: tests/bench.py. % is of η g², at λ = 1, see `onestep`, from states later than step 0.
    """
    start, early, middle, late = (0, 0), (AFTER_0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)
    rows, end = [], (0.8, 1)
    first, penalty, score = "onestep/first/1", "onestep/penalty/1", "eval/score"

    def side(label, key, shares=(AFTER_0, 1)):
        return over(runs.get(label, {}), key, *shares)

    def claim(name, quantity, sides, above=-math.inf, below=math.inf):
        center, half = pooled(*sides)
        verdict = "undecided"
        if above < center - half and center + half < below:
            verdict = "reproduced"
        elif center + half <= above or center - half >= below:
            verdict = "not"
        n, shown = len(set.intersection(*map(set, sides))), cell((center, half), 3)
        rows.append([name, quantity, shown, n, f"{above:g} to {below:g}", verdict])

    def gap(label, other):
        return side(label, score, end), side(other, score, end)

    def change(label, key, a, b):
        return side(label, key, a), side(label, key, b)

    claim("H1", "ce: first order, %", [side("ce", first)], -15, 15)
    claim("H1", "ce: penalty, %", [side("ce", penalty)], below=0)
    claim("H1", "ce − detach, points", gap("ce", "detach"), below=0)
    decay, growth = change("policy", first, early, late), change("policy", "occ/v2_g2", late, early)
    rise, fall = change("policy", score, middle, start), change("policy", score, middle, late)
    claim("H2", "policy: first order, %", [side("policy", first)], 0)
    claim("H2", "policy: first order, early − late, %", decay, 0)
    claim("H2", "policy: log2 ‖m̂‖²/‖ĝ‖², late − early", growth, -1)
    claim("H2", "policy: score, middle third − start", rise, 0)
    claim("H2", "policy: score, middle third − last", fall, 0)
    claim("H3", "occ: λ_t, first third − last", change("occ", "occ/lam", early, late), 0)
    claim("H4", "occ − detach, points", gap("occ", "detach"), 0)
    for label in ("policy", "policy-0.5", "policy-0.1"):
        claim("H6", f"occ − {label}, points", gap("occ", label), 0)
    return rows


# ---- Command line --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """No abbreviations; a mistake is one line; -1e-3 and -5+3= are values, not flags."""

    def __init__(self, description=None, **kwargs):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False, **kwargs)
        self._negative_number_matcher = re.compile(r"-[.\d]")

    def error(self, message):
        raise ValueError(message)


@contextlib.contextmanager
def reporting(prog):
    """Errors as one line on stderr and an exit code: 2 the user's mistake, 1 a run that broke down, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have no encoding
            stream.reconfigure(errors="replace")  # what a terminal's encoding lacks
    wrong_paths = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, PermissionError, *wrong_paths)) else 1)
    except KeyboardInterrupt as interrupt:
        print(f"{prog}: interrupted; {interrupt}".rstrip("; "), file=sys.stderr)
        sys.exit(130)


def parse(argv):
    """Arguments -> what the commands read."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        text = inspect.getdoc(function)
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        if name != "reproduce":
            count = "+" if name == "plot" else None
            command.add_argument("run", nargs=count, help="folder of a run")
        if name == "reproduce":
            text = "flags of train.py for every run"
            command.add_argument("flags", nargs="*", metavar="-- flags", help=text)
        if name == "sample":
            command.add_argument(
                "prompt", nargs="?", default="", help="prompt to complete [held-out problems]"
            )
        for flag, default, users, text in FLAGS:
            if name in users.split():
                kind = {"action": "store_true"} if default is False else {"type": type(default)}
                shown = f" [{default}]" if default else ""
                command.add_argument(f"--{flag}", default=default, help=text + shown, **kind)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = {"k": 1, "seeds": 1, "rollouts": 2 * PARTS}.get(name, 0)
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise ValueError(f"--{name} {value}: must be {least} or more")
        if name == "temperature" and 0 < value < 0.01:
            raise ValueError(f"--temperature {value}: must be 0 (greedy), or 0.01 or more")
        if name in ("run", "out", "data_dir") and isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))
    return args


COMMANDS = {f.__name__: f for f in (score, sample, explain, onestep, plot, reproduce)}
FLAGS = [  # flag, default, commands that have it, help
    ("k", 8, "score sample", "samples per problem"),
    ("temperature", 1.0, "score sample", "sampling temperature; 0 is greedy"),
    ("speculative", False, "sample", "let the heads draft; [brackets] are around accepted drafts"),
    ("problems", 0, "score sample", "problems per suite at most [score: 64, or all of a --suite file; sample: 2]"),
    ("suite", "", "score", f"arithmetic, competition, or some of {','.join([*rl.SUITES, *rl.SCORE])},FILE.jsonl [the "
     "held-out problems of the run's own task]"),
    ("max_new_tokens", 0, "score", "longest response [as the run was trained]"),
    ("data_dir", "", "score", "folder of data sets [the run's own]"),
    ("seed", 0, "score sample explain", "seed of the samples; for explain of the problems too"),
    ("device", "cpu", "score sample explain onestep", "cpu, or any device that torch knows"),
    ("rollouts", 48, "onestep", "rollouts to make; each gives one measured minibatch"),
    ("rollouts", 64, "reproduce", "rollouts for each measured checkpoint"),
    ("checkpoint", "ckpt", "onestep", "file in the run's folder, as ckpt-60 (train.py --keep 60)"),
    ("seeds", 5, "reproduce", "number of seeds"),
    ("first_seed", 0, "reproduce", "first seed"),
    ("regimes", "detach,ce,policy,occ,exact,policy-0.1", "reproduce", f"some of {','.join(REPRODUCED)}"),
    ("jobs", 0, "reproduce", "runs at a time [one per core, on a GPU at most four]"),
    ("out", "", "plot", "picture to write [curves.png in the first run's folder]"),
    ("out", "out/reproduce", "reproduce", "folder to write to"),
]  # fmt: skip


def main(args):
    """Print what a command has to say. Returns the exit code."""
    if args.command == "reproduce":
        return reproduce(args)
    if args.command == "plot":
        path = args.out or str(Path(args.run[0]) / "curves.png")
        lines = [*plot(args.run, path), path]
    else:
        lines = COMMANDS[args.command](args)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    with reporting("eval.py"):
        sys.exit(main(parse(sys.argv[1:])))
