"""Reinforcement learning with verifiable rewards: the algorithm first, then problems, data sets and the verifier.

`step` is the paper's algorithm (arXiv 2605.28184 §4), with θ the trunk and φ the heads:

    sample with π_old;   r_i = 1 if the answer of sample i is right, else 0;   A_i = (r_i - mean of its group) / std
    for each minibatch:  δ = log π - log π_old of each token, of the trunk and of the heads;   ratio = exp(δ)
                         loss_rl = -Σ weight min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)   over tokens
                         loss_mtp = the same with the heads' log-probs, or their cross-entropy
                         λ_t = λ₊ <δ_RL, δ_MTP> / (‖δ_MTP‖² + ε)
                         θ -= η (∇ loss_rl + λ_t ∇ loss_mtp);   φ -= η ∇ loss_mtp        (by Adam)

A batch is a dict of tensors whose first axis is the sequence, so that {k: x[rows] for k, x in batch.items()} is some of
its sequences.

Dimension key: B sequences · P prompts · G samples per prompt (B = P·G) · T positions · K MTP depth · R new tokens

Left out: a value network, an entropy bonus, and a verifier for formulas (eval.py score can ask math-verify).
"""

import functools
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import time
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F

import mtp
import occ
from model import autocast, gather, generate, share, total, total_gradients, width

# ---- Advantages and losses -----------------------------------------------------------------------


@dataclass(frozen=True)
class Algo:
    """The settings of a policy-gradient method."""

    # group_std: (r - mean)/std of the group · group: r - mean · others: r - mean of the group's other samples ·
    # batch: r - mean of all
    advantage: str = "group_std"
    # token: mean over all tokens · sequence: mean per sequence, then over these · constant: sum / (B·max_new_tokens)
    loss_agg: str = "token"
    # token · sequence: geometric mean over the sequence · none: plain -A log p · detached: a weight of -A log p
    ratio: str = "token"
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    # with A < 0 the objective is never below dual_clip·A (Ye et al. 2019, arXiv 1912.09729)
    dual_clip: float = 10.0
    kl_coef: float = 0.0  # weight of the k3 estimate of KL(policy, frozen base)
    dynamic_sampling: bool = False  # replace groups of samples that are all alike by new prompts
    overlong: bool = False  # punish responses that come near max_new_tokens


ALGOS = {
    # Williams 1992; nothing is clipped
    "reinforce": Algo("batch", ratio="none", clip_eps_low=math.inf, clip_eps_high=math.inf),
    "rloo": Algo("others"),  # arXiv 2402.14740
    "grpo": Algo(loss_agg="sequence", kl_coef=0.04),  # arXiv 2402.03300
    "drgrpo": Algo("group", loss_agg="constant"),  # arXiv 2503.20783
    "dapo": Algo(clip_eps_high=0.28, dynamic_sampling=True, overlong=True),  # arXiv 2503.14476
    # arXiv 2507.18071
    "gspo": Algo(loss_agg="sequence", ratio="sequence", clip_eps_low=3e-4, clip_eps_high=4e-4),
    # arXiv 2506.13585
    "cispo": Algo(ratio="detached", clip_eps_low=math.inf, clip_eps_high=0.28),
}


def informative(reward_PG):
    """(P,) True where the samples of a prompt differ in reward: without that, group-relative advantages are zero."""
    return reward_PG.amax(1) > reward_PG.amin(1)


def advantages(reward_PG, kind):
    """(P, G) rewards -> (P, G) advantages.

    Groups of equal rewards get exactly 0, unless the kind is "batch", whose baseline is the mean of all rewards.
    """
    if kind == "batch":
        return reward_PG - reward_PG.mean()
    G = reward_PG.size(1)
    adv_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    if kind == "group_std":
        variance_P1 = adv_PG.square().sum(1, keepdim=True) / (G - 1)
        adv_PG = adv_PG / (variance_P1.sqrt() + 1e-6)
    if kind == "others":  # r - (sum - r)/(G - 1)
        adv_PG = adv_PG * G / (G - 1)
    # The mean of equal floats need not be that float: test the rewards, not their spread.
    return torch.where(informative(reward_PG)[:, None], adv_PG, 0.0)


def token_weights(mask_BKT, loss_agg, max_new_tokens):
    """How much each token counts in a loss, (weight * x).sum(): (B, K, T-1), 0 off the mask.

    At each depth the weights add up to 1, except for "constant". They are made once for the whole minibatch, so that
    cutting it into shares, or padding it, changes nothing.
    """
    x, B = mask_BKT.float(), len(mask_BKT)
    if loss_agg == "token":
        return x / x.sum((0, 2), keepdim=True).clamp(min=1)
    if loss_agg == "sequence":
        return x / x.sum(2, keepdim=True).clamp(min=1) / B
    return x / (B * max_new_tokens)


def importance_ratio(logp, old, mask, algo):
    """π_θ/π_old of each token; for "sequence" the geometric mean over the sequence, the same for all of its tokens."""
    log_ratio = torch.where(mask, logp - old, 0.0)
    if algo.ratio == "sequence":  # GSPO
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1) * mask
    # A finite ratio, so that a branch not taken has no NaN gradient.
    return log_ratio.clamp(-20, 20).exp()


def policy_loss(logp, old, adv_B, mask, weight, algo):
    """The clipped policy-gradient loss, of the trunk (arrays are (B, T-1)) or of the MTP heads (B, K, T-1)."""
    adv = adv_B.view(-1, *[1] * (logp.ndim - 1))
    if algo.ratio == "none":
        return -(weight * adv * logp).sum()
    ratio = importance_ratio(logp, old, mask, algo)
    clipped = ratio.clamp(1 - algo.clip_eps_low, 1 + algo.clip_eps_high)
    if algo.ratio == "detached":  # CISPO: a clipped token still has a gradient
        return -(weight * clipped.detach() * adv * logp).sum()
    surrogate = torch.minimum(ratio * adv, clipped * adv)
    surrogate = torch.where(adv < 0, torch.maximum(surrogate, algo.dual_clip * adv), surrogate)
    return -(weight * surrogate).sum()


def kl_to_base(logp_BT, mb):
    """KL(policy, frozen base) by Schulman's k3 = r - 1 - log r ≥ 0, r = p_base/p; 0 for a method without a base.

    Above log r = 10 it goes on along its tangent: r would overflow, and the pull back is needed most there.
    """
    if "ref" not in mb:
        return torch.zeros((), device=logp_BT.device)
    log_r = mb["ref"] - logp_BT
    near = log_r.clamp(max=10)
    k3 = near.exp() - 1 - near + F.relu(log_r - 10) * (math.exp(10) - 1)
    return (mb["weight"] * k3).sum()


def trunk_loss(logp_BT, mb, algo):
    """The policy loss of the trunk, and where the method has one the KL to its base."""
    loss = policy_loss(logp_BT, mb["old"], mb["adv"], mb["mask"], mb["weight"], algo)
    return loss + algo.kl_coef * kl_to_base(logp_BT, mb)


def mtp_loss(kind, logp_BKT, mb, algo):
    """The heads' loss, a mean over depths: "ce" cross-entropy on the sampled tokens, "policy" the clipped loss."""
    if kind == "policy":
        mask, weight = mb["mask_mtp"], mb["weight_mtp"]
        loss = policy_loss(logp_BKT, mb["old_mtp"], mb["adv"], mask, weight, algo)
    else:
        loss = -(mb["weight_ce"] * logp_BKT).sum()
    return loss / max(logp_BKT.size(1), 1)  # without heads the arrays are empty, and the loss is 0


# ---- One step ------------------------------------------------------------------------------------


def step(cfg, model, heads, optimizer, tok, step, reference=None):
    """One rollout and its updates: the paper's algorithm. heads is None in regime off.

    reference is the frozen base, for a method whose loss has a KL term. Returns (record, examples, last): what to log;
    samples to read [(prompt, completion, whether it is right)]; when probing, the last minibatch before its update (mb,
    deltas, g, m, and theta, the trunk as a vector), else None.
    """
    regime, algo, clock = occ.REGIMES[cfg.regime], ALGOS[cfg.algo], Clock(model)
    theta = list(model.parameters())
    phi = list(heads.parameters()) if heads else []
    probing = heads and cfg.probe_every and step % cfg.probe_every == 0

    # 1 rollout: G samples of each prompt, from the distribution that is scored below
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    rng, suites = random.Random(f"{cfg.seed}/rl/{step}"), suites_of(cfg.task, cfg.data_dir)
    problems = problem_stream(suites, cfg.difficulty, rng)
    batch, record, examples = rollout(model, tok, problems, algo, cfg, generator)
    clock("rollout")

    # 2 rewards -> advantages, and a minibatch for each update, with its log-probs before any update
    adv_B = advantages(batch["reward"].view(-1, cfg.num_generations), algo.advantage).flatten()
    parts = minibatches(model, heads, batch, adv_B, algo, cfg, reference)
    clock("score")

    updates, last = [], None
    for mb in parts:
        # λ at the doors, which only a backward reads: 1 while 5 measures m, λ_t in the backward of 6.
        lam = torch.ones((), device=adv_B.device)
        logp, logp_mtp = logprobs(model, heads, mb, cfg, lam)
        # In the first update these are the old log-probs: ratios are exactly 1, δ exactly 0.
        mb.setdefault("old", logp.detach())
        mb.setdefault("old_mtp", logp_mtp.detach())
        deltas = occ.token_deltas(logp, logp_mtp, mb)

        # 3 policy loss of the trunk, whose gradient is g
        loss_rl = trunk_loss(logp, mb, algo)
        # 4 loss of the heads, whose gradient in the trunk is m
        loss_mtp = mtp_loss(regime.loss, logp_mtp, mb, algo)
        clock("update")

        # 5 coefficient λ_t; every few steps the real c and v² beside it
        terms, probe_now = {}, probing and mb is parts[-1]
        if probe_now or regime.rule == "exact":
            g, m = occ.flat_grad(loss_rl, theta), occ.flat_grad(loss_mtp, theta)
            terms = occ.exact_terms(g, m, cfg.lam_plus)
        if probe_now:
            now = torch.nn.utils.parameters_to_vector(theta).detach()
            last = SimpleNamespace(mb=mb, deltas=deltas, g=g, m=m, theta=now)
            record |= {f"occ/{name}": value for name, value in terms.items()}
        lam.fill_(occ.coefficient(regime.rule, cfg, deltas, terms))
        clock("probe" if probe_now else "coefficient")

        # 6 one backward, one step of Adam: the trunk's gradient is g + λ_t m, the heads have their own
        optimizer.zero_grad()
        (loss_rl + loss_mtp).backward()
        total_gradients(theta + phi)
        # Clipped separately: with one shared norm the heads would shrink the step of the policy.
        norm, norm_heads = (torch.nn.utils.clip_grad_norm_(part, 1.0) for part in (theta, phi))
        optimizer.step()

        # 7 log
        metrics = update_metrics(logp.detach(), logp_mtp.detach(), mb, algo)
        metrics |= {"grad_norm/trunk": norm, "actor/loss": total(loss_rl.detach())}
        if heads:
            metrics |= {"grad_norm/heads": norm_heads, "mtp/loss": total(loss_mtp.detach())}
            metrics |= {"occ/lam": lam, "occ/c_hat": occ.inner(*deltas)}
            metrics["occ/v2_hat"] = occ.inner(deltas[1], deltas[1])
        updates.append(metrics)
        clock("update")

    record |= summary(updates) | clock.seconds
    record["perf/tokens_per_s"] = record["response_length/sum"] / sum(clock.seconds.values())
    return record, examples, last


class Clock:
    """Seconds by phase. A call adds the time since the last call to a phase; on CUDA, once its work is done."""

    def __init__(self, model):
        self.on_gpu = model.wte.weight.is_cuda
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, phase):
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        name = f"perf/{phase}_s"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


# ---- The minibatch of an update ------------------------------------------------------------------


def logprobs(model, heads, mb, cfg, lam=None):
    """mtp.logprobs of a minibatch: logp (B, T-1) and logp_mtp (B, K, T-1)."""
    tokens, mask = mb["tokens"], mb["mask"]
    return mtp.logprobs(model, heads, tokens, mask, cfg.temperature, cfg.logp_impl, lam)


@torch.no_grad()
def minibatches(model, heads, batch, adv_B, algo, cfg, reference=None):
    """A rollout cut into updates_per_rollout minibatches of whole groups, fewer if there are fewer groups.

    Each is a dict of this process's share of it: tokens (B, T); logp as sampled, mask and weight (B, T-1); adv (B,);
    mask_mtp, weight_mtp and weight_ce (B, K, T-1); with a reference, its log-probs ref. Losses of the shares add up to
    those of the whole. All but the first have old and old_mtp, the log-probs before any update, from a forward pass
    here; the first update takes those of its own forward pass.
    """
    G, R, K = cfg.num_generations, cfg.max_new_tokens, len(heads.heads) if heads else 0
    groups = torch.arange(len(adv_B)).view(-1, G)
    cuts = min(cfg.updates_per_rollout, len(groups))
    parts = []
    for part in groups.tensor_split(cuts) if cuts else []:
        rows = slice(int(part[0, 0]), int(part[-1, -1]) + 1)
        T = 1 + width(batch["mask"][rows])  # cut to the longest row
        mask_BT = batch["mask"][rows, : T - 1]
        mask_BKT = mtp.aligned_mask(mask_BT, K)
        mb = {
            "tokens": batch["tokens"][rows, :T],
            "mask": mask_BT,
            "logp": batch["logp"][rows, : T - 1],
            "adv": adv_B[rows],
            "weight": token_weights(mask_BT[:, None], algo.loss_agg, R)[:, 0],
            "mask_mtp": mask_BKT,
            "weight_mtp": token_weights(mask_BKT, algo.loss_agg, R),
            "weight_ce": token_weights(mask_BKT, "token", R),
        }
        mine = share(len(part))
        mb = {k: x[mine.start * G : mine.stop * G] for k, x in mb.items()}
        if parts:
            mb["old"], mb["old_mtp"] = logprobs(model, heads, mb, cfg)
        if reference:
            mb["ref"], _ = logprobs(reference, None, mb, cfg)
        parts.append(mb)
    return parts


def largest(x):
    """The largest of numbers that are not negative, over all processes; an empty share counts as 0."""
    return total(F.pad(x.flatten(), (0, 1)).max(), dist.ReduceOp.MAX)


def ratio_metrics(name, logp, old, adv_B, mask, algo):
    """Largest importance ratio, and share of tokens beyond the clip below (A < 0) and above (A > 0)."""
    ratio = importance_ratio(logp, old, mask, algo)
    adv = adv_B.view(-1, *[1] * (logp.ndim - 1))
    low = mask & (ratio < 1 - algo.clip_eps_low) & (adv < 0)
    high = mask & (ratio > 1 + algo.clip_eps_high) & (adv > 0)
    counts = total(torch.stack((mask.sum(), low.sum(), high.sum())))
    shares = counts / counts[0].clamp(min=1)
    return {
        f"{name}/ratio_max": largest(ratio * mask),
        f"{name}/clip_frac_low": shares[1],
        f"{name}/clip_frac_high": shares[2],
    }


def update_metrics(logp_BT, logp_BKT, mb, algo):
    """Metrics of trunk and heads from the forward pass of an update."""
    metrics = ratio_metrics("actor", logp_BT, mb["old"], mb["adv"], mb["mask"], algo)
    metrics["actor/kl"] = total(kl_to_base(logp_BT, mb))
    metrics["rollout/logp_gap"] = largest((mb["old"] - mb["logp"]).abs() * mb["mask"])
    if logp_BKT.size(1):
        metrics |= ratio_metrics("mtp", logp_BKT, mb["old_mtp"], mb["adv"], mb["mask_mtp"], algo)
    # The share of head k's drafts that a speculative sampler would accept at the rollout: the mean of min(1, q/p), p of
    # the trunk, q of the head, over tokens sampled from p. Its expectation is Σ_v min(p_v, q_v).
    accepted_BKT = (mb["old_mtp"] - mb["old"][:, None]).exp().clamp(max=1) * mb["mask_mtp"]
    scored_K = total(mb["mask_mtp"].sum((0, 2))).clamp(min=1)
    shares_K = total(accepted_BKT.sum((0, 2))) / scored_K
    return metrics | {f"mtp/agreement_{k}": x for k, x in enumerate(shares_K, 1)}


def summary(updates):
    """One step's updates as one record: means; the largest of a maximum; the last of occ/ (the first λ_t is 0).

    They become numbers all at once: each by itself would make the host wait for a GPU.
    """
    record = {}
    rows = [torch.stack([x.float() for x in metrics.values()]) for metrics in updates]
    for name, series in zip(updates[0], torch.stack(rows, 1).cpu()) if updates else []:
        value = series.mean()
        if name.startswith("occ/"):
            value = series[-1]
        elif name.endswith(("ratio_max", "logp_gap")):
            value = series.max()
        record[name] = value.item()
    return record


# ---- Rollout and evaluation ----------------------------------------------------------------------


def sample(model, tok, problems, G, max_new_tokens, temperature, generator):
    """G completions of each problem: the dict of model.generate with right (B,), and their texts.

    Each of several processes samples for its share of the problems, and all of them get everything. The random numbers
    are those of all problems, so the samples do not depend on the number of processes.
    """
    device, mine = model.wte.weight.device, share(len(problems))
    u = torch.rand(len(problems) * G, max_new_tokens, generator=generator)
    u = u[mine.start * G : mine.stop * G]
    room = max(model.cfg.block_size - max_new_tokens, 1)  # of a long prompt the end is kept
    prompts = [tok.encode_ordinary(p.prompt)[-room:] for p in problems[mine]]
    part = None
    if prompts:
        with autocast(model):
            part = generate(model, prompts, G, max_new_tokens, tok.eot_token, temperature, u)
        part = {k: x.cpu() for k, x in part.items()}
    batch = concatenate([part for part in gather(part) if part])
    texts, right = [], []
    for i, (tokens, mask) in enumerate(zip(batch["tokens"][:, 1:], batch["mask"])):
        texts.append(tok.decode(tokens[mask].tolist()).removesuffix(EOS))
        right.append(is_right(problems[i // G], texts[-1]))
    batch["right"] = torch.tensor(right, dtype=torch.float)
    return {k: x.to(device) for k, x in batch.items()}, texts


def concatenate(batches):
    """Several batches as one, padded to the longest."""
    whole = {}
    for k in batches[0]:
        T = max(batch[k].shape[-1] for batch in batches)
        rows = [F.pad(x, (0, T - x.size(1))) if x.ndim > 1 else x for x in (b[k] for b in batches)]
        whole[k] = torch.cat(rows)
    return whole


def overlong_penalty(length_B, max_new_tokens):
    """DAPO's soft penalty (arXiv 2503.14476 §3.4): 0, falling to -1 over the last fifth of the allowed length."""
    buffer = max_new_tokens / 5
    return ((max_new_tokens - buffer - length_B) / buffer).clamp(-1, 0)


def rollout(model, tok, problems, algo, cfg, generator):
    """The samples of one step. With dynamic sampling (DAPO §3.2) prompts whose samples are all right or all wrong are
    replaced by new ones from `problems`: once, by twice as many as are missing. What is missing then stays missing.

    Returns the batch of the prompts kept, metrics over all prompts sampled, and examples to read.
    """
    G, R = cfg.num_generations, cfg.max_new_tokens
    batches, examples, wanted = [], [], cfg.prompts_per_step
    while wanted > 0:
        drawn = list(itertools.islice(problems, wanted))
        batch, texts = sample(model, tok, drawn, G, R, cfg.temperature, generator)
        examples += zip([p.prompt for p in drawn], texts[::G], batch["right"][::G].tolist())
        batch["has_gradient"] = informative(batch["right"].view(-1, G)).repeat_interleave(G)
        batches.append(batch)
        missing = wanted - int(batch["has_gradient"].sum()) // G
        wanted = 2 * missing if algo.dynamic_sampling and len(batches) < 2 else 0
    batch = concatenate(batches)
    length_B = batch["mask"].sum(1).float()
    batch["reward"] = batch["right"] + (overlong_penalty(length_B, R) if algo.overlong else 0.0)
    record = {
        "reward/right": batch["right"].mean(),
        "reward/mean": batch["reward"].mean(),
        "reward/frac_zero_std": 1 - batch["has_gradient"].float().mean(),
        "response_length/mean": length_B.mean(),
        "response_length/sum": length_B.sum(),
        "response_length/clip_ratio": (length_B == R).float().mean(),
        # the mean of -log p over tokens sampled from p
        "actor/entropy": -batch["logp"].sum() / length_B.sum(),
    }
    if algo.dynamic_sampling:
        rows = batch["has_gradient"].nonzero().squeeze(1)[: cfg.prompts_per_step * G]
        batch = {k: x[rows] for k, x in batch.items()}
    names, values = list(record), torch.stack([*record.values()]).tolist()
    return batch, dict(zip(names, values)), examples[:8]


def evaluate(model, tok, cfg):
    """During training: avg@eval_k on held-out problems in points of 100, of each suite (eval/<suite>) and their mean
    (eval/score), and eval/mixed, the share of prompts that have both right and wrong samples: RL learns from these.

    The same problems and the same random numbers every time.
    """
    generator, record, mixed = torch.Generator().manual_seed(0), {}, []
    for suite in suites_of(cfg.task, cfg.data_dir):
        problems = held_out_problems(suite, cfg.difficulty, cfg.eval_problems)
        sampling = cfg.eval_k, cfg.max_new_tokens, cfg.temperature
        batch, _ = sample(model, tok, problems, *sampling, generator)
        record[f"eval/{label(suite)}"] = 100 * batch["right"].mean().item()
        mixed.append(informative(batch["right"].view(-1, cfg.eval_k)).float())
    score = sum(record.values()) / len(record)
    return {"eval/score": score, "eval/mixed": torch.cat(mixed).mean().item()} | record


# ---- Tokenizer -----------------------------------------------------------------------------------

EOS = "<|endoftext|>"


@functools.cache
def get_tokenizer(name):
    """A tiktoken.Encoding: "bytes" has one token per byte, "gpt2" is fetched at first use."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        pieces = {"pat_str": r"[\s\S]", "mergeable_ranks": ranks, "special_tokens": {EOS: 256}}
        return tiktoken.Encoding(name, **pieces)
    if name != "gpt2":
        raise ValueError(f"--tokenizer {name}: unknown; allowed: bytes, gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        once = "connect to a network once, or set TIKTOKEN_CACHE_DIR to a folder that has its files"
        raise ValueError(f"--tokenizer gpt2: not fetched ({error}); {once}") from error


# ---- Six suites of arithmetic --------------------------------------------------------------------
# Made up as needed. All numbers are written least significant digit first and at a fixed width, as one computes on
# paper, from the right (Lee et al. 2023, arXiv 2307.03381): 58 + 67 = 125 is "85+76=####521". Each suite has one place
# where care is needed, the carry. A careful solution never forgets it; a careless one forgets each carry with
# probability 1/2. A base model pretrained on both has the skill but shows it half of the time; RL, which can hardly
# teach a new skill in minutes, brings it out.


class Problem(NamedTuple):
    suite: str  # a name in SUITES, or the path of a data set
    prompt: str
    answer: str  # the gold, as people write it
    solution: str = ""  # for pretraining: working and answer
    line: int = 0  # of the data set


def write(x, n):
    """x in n digits, the lowest first."""
    return f"{x:0{n}}"[::-1]


def columns(operation, a, b, n, carried):
    """The n lowest digits of the result, lowest first, worked out column by column with a carry."""
    written, carry = "", 0
    for i, j in zip(write(a, n), write(b, n)):
        s = operation(int(i), int(j)) + carried(carry)
        written += str(s % 10)
        carry = s // 10
    return written


# A suite is a function (draw, n, carried) -> prompt, working, answer. It draws operands of size n, with draw(stop) or
# draw(start, stop), and solves them. carried(carry) is the carry in careful work; careless work forgets it at times.


def add(draw, n, carried):
    a, b = draw(10**n), draw(10**n)
    return f"{write(a, n)}+{write(b, n)}=", "", columns(operator.add, a, b, n + 1, carried)


def sub(draw, n, carried):
    b, a = sorted((draw(10**n), draw(10**n)))
    return f"{write(a, n)}-{write(b, n)}=", "", columns(operator.sub, a, b, n, carried)


def mul(draw, n, carried):
    n = n + 1
    a, b = draw(10**n), draw(2, 7)
    b_everywhere = int(str(b) * (n + 1))  # it meets every digit of a
    return f"{write(a, n)}*{b}=", "", columns(operator.mul, a, b_everywhere, n + 1, carried)


def mod(draw, n, carried):
    """Horner's rule from the highest digit; the working is the remainder so far, which plays the carry."""
    n = n + 1
    a, m = draw(10**n), draw(3, 8)
    remainder, working = 0, ""
    for digit in reversed(write(a, n)):
        remainder = (10 * carried(remainder) + int(digit)) % m
        working += str(remainder)
    return f"{write(a, n)}%{m}=", working[:-1], working[-1]


def chain(draw, n, carried):
    """Running sums of one-digit terms; the working is the sums before the last."""
    terms = [draw(1, 10) for _ in range(n + 1)]
    sums = [write(terms[0], 2)]
    for term in terms[1:]:
        so_far = int(sums[-1][::-1])
        sums.append(columns(operator.add, so_far, term, 2, carried))
    return "+".join(map(str, terms)) + "=", ",".join(sums[1:-1]), sums[-1]


def linear(draw, n, carried):
    """Solve a·x + b = c for the digit x; the working is c - b."""
    n = max(n, 2)
    a, x = draw(2, 6), draw(1, 10)
    b = draw(10**n - a * x)
    c = a * x + b
    difference = columns(operator.sub, c, b, n, carried)
    return f"{a}x+{write(b, n)}={write(c, n)}:", difference, str(int(difference[::-1]) // a % 10)


SUITES = {f.__name__: f for f in (add, sub, mul, mod, chain, linear)}


def is_held_out(prompt):
    """Whether a problem is of the eighth that is never trained on, decided by its letters and digits in any order.

    So training and evaluation share no problem, in whatever file it stands, and 47+85 is on the side of 85+47.
    """
    key = "".join(sorted(filter(str.isalnum, prompt.casefold())))
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 8 == 0


def draw_problem(suite, difficulty, rng, held_out=False, careless=0.0):
    """One random problem of the wanted side of the split.

    Its `solution` is careless with probability `careless`; a data set has only its own solutions.
    """
    if suite not in SUITES:
        return rng.choice(side_of_split(suite, held_out))

    operands = []

    def draw(*limits):
        operands.append(rng.randrange(*limits))
        return operands[-1]

    while True:
        operands.clear()
        prompt, working, right = SUITES[suite](draw, difficulty, lambda carry: carry)
        if is_held_out(prompt) == held_out:
            break
    written = right
    if rng.random() < careless:  # the same operands again, and a coin for each carry
        again = iter(operands)
        _, working, written = SUITES[suite](
            lambda *limits: next(again), difficulty, lambda carry: carry * (rng.random() < 0.5)
        )
    return Problem(suite, prompt, str(int(right[::-1])), f"{working}####{written}")


def problem_stream(suites, difficulty, rng, careless=0.0):
    """Training problems without end, of suites at random."""
    while True:
        yield draw_problem(rng.choice(suites), difficulty, rng, careless=careless)


@functools.cache
def held_out_problems(suite, difficulty, count):
    """Up to count different held-out problems of a suite: fewer where the suite has no more at this difficulty."""
    rng, problems = random.Random(f"0/held out/{label(suite)}"), {}  # by prompt
    for _ in range(100 * count):
        problem = draw_problem(suite, difficulty, rng, held_out=True)
        problems[problem.prompt] = problem
        if len(problems) == count:
            break
    return list(problems.values())


def check_room(cfg, tok):
    """(block size that prompts and solutions need, a line on the lengths of each data set).

    ValueError where max_new_tokens cuts off the solutions of a suite, or most of a data set's: they earn no reward.
    """
    R, longest_prompt, longest_response, notes = cfg.max_new_tokens, 0, cfg.max_new_tokens, []
    for suite in suites_of(cfg.task, cfg.data_dir):
        problems, length = [draw_problem(suite, cfg.difficulty, random.Random(0))], len  # all alike
        if suite not in SUITES:
            problems, length = read_problems(suite), lambda text: len(tok.encode_ordinary(text))
        prompt, line = max((length(p.prompt), p.line) for p in problems)
        sizes = [(length(p.solution) + 1, p.line) for p in problems]
        needed, at = max(sizes)
        cut = sum(size > R for size, _ in sizes)
        longest_prompt = max(longest_prompt, prompt)
        longest_response = max(longest_response, needed)
        of = suite
        if suite not in SUITES:
            of = f"{suite} (the longest: {suite}:{at})"
            longest = f"longest prompt {prompt} tokens ({suite}:{line}), longest solution {needed}"
            cut_off = f"{cut} of {len(problems)} solutions are longer than --max_new_tokens {R}"
            notes.append(f"{suite}: {longest} ({suite}:{at}); {cut_off}")
            for held_out in (False, True):
                side_of_split(suite, held_out)  # ValueError if a side is empty
        elif ALGOS[cfg.algo].overlong:  # the penalty takes the last fifth
            needed = math.ceil(needed * 5 / 4)
        if 2 * cut > len(problems) or (suite in SUITES and needed > R):
            raise ValueError(
                f"--max_new_tokens {R}: must be {needed} or more for all solutions of {of}"
            )
    return longest_prompt + longest_response, notes


# ---- Data sets: JSONL, a problem per line ----------------------------------------------------------

GITHUB = "https://raw.githubusercontent.com/"
QWEN = "QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data/"
SIMPLE_RL = (
    "hkust-nlp/simpleRL-reason/cf1c7858bfc145a27aa733e75d930d34f0d318a6/examples/"
    "simplelr_math_eval/data/"
)
GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
PUBLISHED = {  # name: its file at the commit that was read
    "gsm8k_train": GSM8K + "train.jsonl",
    "gsm8k_test": GSM8K + "test.jsonl",
    "svamp": "arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json",
    "mawps": QWEN + "mawps/test.jsonl",
    "math500": SIMPLE_RL + "math500/test.jsonl",
    "aime24": QWEN + "aime24/test.jsonl",
    "aime25": "armenjeddi/mcd/76771f969048ebd77a1b4261b0a3469192c6f92a/evaluation/data/aime25/test.jsonl",
    "amc23": QWEN + "amc23/test.jsonl",
    "minerva": QWEN + "minerva_math/test.jsonl",
    "olympiadbench": QWEN + "olympiadbench/test.jsonl",
}
# the paper's, to score on
COMPETITION = "aime24 aime25 amc23 math500 minerva olympiadbench".split()
TRAIN = {"gsm8k": "gsm8k_train", "svamp": "svamp", "mawps": "mawps"}
SCORE = TRAIN | {"gsm8k": "gsm8k_test"} | {name: name for name in COMPETITION}


def label(suite):
    """The name of a suite in logs and tables."""
    return suite if suite in SUITES else Path(suite).stem


@functools.cache
def suites_of(task, data_dir="data", scoring=False):
    """Suites from a comma list: names in SUITES, known data sets (as their path, fetched if need be), files *.jsonl.

    "arithmetic" is the six, "competition" the paper's sets. scoring: the test parts, else those to train on.
    ValueError on anything else.
    """
    flag, known = ("--suite", SCORE) if scoring else ("--task", TRAIN)
    groups = {"arithmetic": SUITES, "competition": COMPETITION}
    names, suites = [], {}  # suites by their label
    for name in task.split(","):
        names += groups.get(name, [name])
    for name in names:
        if name in known:
            name = data_file(known[name], data_dir)
        elif name in SCORE:
            raise ValueError(f"{flag} {name}: only for python eval.py score RUN --suite {name}")
        if name.endswith(".jsonl"):
            name = os.path.expanduser(name)
            read_problems(name)
        elif name not in SUITES:
            allowed = ",".join(["arithmetic", *SUITES, *known, "FILE.jsonl"])
            raise ValueError(f"{flag}: unknown suite {name!r}; allowed: some of {allowed}")
        tag = label(name)
        if tag in ("score", "mixed", "all") or suites.setdefault(tag, name) != name:
            raise ValueError(f"{flag}: {name}: logs have another {tag}; rename the file")
    return list(suites.values())


def data_file(name, data_dir):
    """Path of a published data set in data_dir, fetched where it is not there. ValueError if that fails."""
    path, url = Path(data_dir) / f"{name}.jsonl", GITHUB + PUBLISHED[name]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)  # all of it or none
        except OSError as error:  # no network, no room, ...
            reason = f"not there, and not fetched ({error})"
            raise ValueError(f"{path}: {reason}; put it there by hand, from {url}") from None
    return str(path)


def digest(path):
    """SHA-256 of a file, for the header of a run: another file under the same name is another experiment."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@functools.cache
def read_problems(path):
    """The problems of a file, JSONL or a JSON array. ValueError names path:line, of an array path:item."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if text.lstrip().startswith("["):
        records = enumerate(parse_json(text, path), 1)
    else:  # not splitlines: a text may contain other separators
        lines = enumerate(text.split("\n"), 1)
        records = [(i, parse_json(line, f"{path}:{i}")) for i, line in lines if line.strip()]
    problems = [problem_of(record, path, i) for i, record in records]
    if not problems:
        raise ValueError(f"{path}: no problems in it")
    return problems


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}): {text[:40]!r}") from None


def problem_of(record, path, line):
    """A record of a data set as a Problem. ValueError says what it lacks.

    The text is in `problem`, `question` or `input` (SVAMP: Body and Question). The gold is in `answer` or `target`, or
    it is the one of `final_answer`, or what `solution` answers; an `answer` with "####" is a solution too.
    """
    where, fields = f"{path}:{line}", {}  # texts, and numbers as people write them
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a record of problem and answer: {str(record)[:40]!r}")
    for name, value in record.items():
        if name == "final_answer" and isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'{where}: "{name}" is {value}; allowed: finite numbers')
        if type(value) in (int, float):
            value = str(value).removesuffix(".0")
        if isinstance(value, str) and value.strip():
            fields[name] = value.strip()

    def first(*names):
        return next((fields[name] for name in names if name in fields), "")

    text, solution = first("problem", "question", "input"), first("solution")
    if not text and "Body" in fields and "Question" in fields:
        text = f"{fields['Body'].removesuffix('.')}. {fields['Question']}"
    if not text:
        raise ValueError(f'{where}: no text in "problem", "question" or "input"')
    answer = first("answer", "Answer", "target", "final_answer") or extract_answer(solution) or ""
    if "####" in answer:
        answer, solution = extract_answer(answer) or "", answer
    if not answers_equal(answer, extract_answer(solution)):
        solution = f"{solution}\n\\boxed{{{answer}}}" if solution else f"#### {answer}"
    if not answers_equal(answer, extract_answer(solution)):
        allowed = 'a text, a number, or a solution with "#### N"'
        raise ValueError(f'{where}: no answer in "answer"; allowed: {allowed}')
    return Problem(path, f"{text}\n", answer, solution, line)


@functools.cache
def side_of_split(path, held_out):
    """The problems of a file that are held out, or the others. ValueError if there are none."""
    problems = [p for p in read_problems(path) if is_held_out(p.prompt) == held_out]
    if not problems:
        side = "held out" if held_out else "left to train on"
        raise ValueError(f"{path}: too few problems: none is {side}")
    return problems


def words(text):
    """Words, numbers and signs of a text: problems that agree in these are the same.

    Ignored: case, white space, dollars around formulas, punctuation of sentences.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    return tuple(re.findall(r"\w+|[^\w\s,;:!?\"'$`.]", text))


def check_apart(training, scored):
    """ValueError if a data set to be scored shares problems with one that was trained on."""
    for trained in set(training) - set(SUITES):
        known = {words(p.prompt) for p in read_problems(trained)}
        for suite in set(scored) - set(SUITES):
            shared = sum(words(p.prompt) in known for p in read_problems(suite))
            if shared:
                on = f"{shared} of its problems are in {trained}, which the run was trained on"
                raise ValueError(f"--suite {suite}: {on}")


# ---- Verifier: exact numbers, else equal text. A wrong reward teaches wrong things. Text is never evaluated.

LONGEST = 500  # characters: a longer answer is none, so that no pattern below takes long
MINUS = str.maketrans("\u2212\u2013\u2010\u2044", "---/")  # − – ‐, and the stroke in ½
# LaTeX or a space in the place of the comma of 1,000
COMMA = r"(?:\{,\}|,\\!\s*|\\[,!;:]|[\u00a0\u202f\u2009])"
DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"  # 1,234.5 or 1234 or 3. or .5
PERCENT = r"[%\uff05\ufe6a]|percent"
UNIT = r"(?:dollar|mile|hour|minute|second|degree)s?|inches|feet|percent|erg\ s|km/h|[kcm]?m|k?g|s"
WRAPPED = r"\s*(?:\*\*(.+)\*\*|(?:\\(?:boxed|text|mathbf))?\{(.+)\})[\s.]*"  # **5** or {5}
FRACTION = rf"""(?ax) \\[dt]?frac \s* (?: \{{ \s* (-?) ({DECIMAL}) \s* \}} | (\d) )  # {{-1}} or 1
    \s* (?: \{{ \s* (-?{DECIMAL}) \s* \}} | (\d) )  # {{-3}} or 3"""
NUMBER = rf"""(?ax) \s* =? \s* (?P<sign>[+-]?) \s*
    (?: (?P<whole>\d+) \s+ (?=\d+\s*/\s*\d) )?                 # the 1 of 1 4/5
    (?P<top>{DECIMAL} | (?=10\^))                              # the 4, or nothing before 10^3
    (?: \s* / \s* (?P<bottom>-{{0,2}} (?=[\d.,]*[1-9]) {DECIMAL})  # the 5, which is not 0
      | (?: [eE] | (?: \s*(?:\\times|\\cdot|[x*×·⋅])\s* | (?<![\d.])) 10\^)  # 1.5e3, 1.5 x 10^3
        (?P<exponent>[+-]?\d{{1,4}}) )?
    \s* (?:\\?%|percent|dollars?|\\(?:text|mathrm)\{{\s*(?:{UNIT})\s*\}}(?:\^-?\d)?)? [\s.,]*"""


def extract_answer(text: str) -> str | None:
    """An answer is the last \\boxed{...}, else \\boxed 5, else what follows "####" or "Answer:"."""
    text = text[-100_000:]  # which is where an answer is
    boxes = re.split(r"\\boxed\s*(?=\{)", text)[1:]
    for box in reversed(boxes[-10:]):  # the last ones may be cut off, or empty
        depths = list(itertools.accumulate((c == "{") - (c == "}") for c in box[:LONGEST]))
        if 0 in depths and (inside := box[1 : depths.index(0)].strip()):
            return inside
    bare = re.findall(r"\\boxed\s*(-?[0-9]+(?:[.,/][0-9]+)*)", text)
    if bare:
        return bare[-1]
    mark = "#{4,}" if "####" in text else r"(?i)answer[*_]{0,3}\s{0,3}[:\uff1a]"
    parts = re.split(mark, text)
    rest = parts[-1].strip() if len(parts) > 1 else ""  # never the whole text
    line = rest.lstrip("*_` \t\r\n").partition("\n")[0].rstrip("*_`. \t\r")  # without bold
    return line or rest.partition("\n")[0] or None


@functools.lru_cache(10_000)  # the same answers come again and again
def read_number(text: str) -> Fraction | None:
    """The exact value of 1,234.5 or 1\\frac45 or 180\\% or 2 \\times 10^3, else None."""
    if len(text) > LONGEST:
        return None
    text = re.sub(rf"(?<=\d){COMMA}(?=\d{{3}}(?!\d))", ",", text)
    text = re.sub(r"(?:\\?\$|\\[()\[\] ,!;:]|[~\s])+", " ", text)  # dollars, and LaTeX's spaces
    text = re.sub("[\u00bc-\u00be\u2150-\u215e]", r" \g<0> ", text)  # 12½ is 12 1/2
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", r"^{\g<0>}", text)  # 10³
    text = unicodedata.normalize("NFKC", text).translate(MINUS)
    while match := re.fullmatch(WRAPPED, text):
        text = match[match.lastindex]
    text = re.sub(FRACTION, r" \2\3/\1\4\5 ", text)
    text = re.sub(r"(?:\^|\*\*) ?(?:\{([+-]?\d+)\}|([+-]?\d+))", r"^\1\2 ", text)  # 10**3 is 10^3
    match = re.fullmatch(NUMBER, text)
    if match is None:
        return None
    part = {name: group.replace(",", "") for name, group in match.groupdict("").items()}
    value = Fraction(f"{part['top'] or 1}e{part['exponent'] or 0}")
    value = int(part["whole"] or 0) + value / Fraction(part["bottom"].replace("--", "") or 1)
    value = -value if part["sign"] == "-" else value
    return value / 100 if re.search(PERCENT, text) else value


def answers_equal(gold: str | None, candidate: str | None) -> bool:
    """Whether they are exactly the same number, or else the same text; 62.5 too answers 62.5%."""
    if gold is None or candidate is None or max(len(gold), len(candidate)) > LONGEST:
        return False
    a, b = read_number(gold), read_number(candidate)
    if a is None or b is None:
        return a is b and gold.strip(" \t\r\n$.") == candidate.strip(" \t\r\n$.") != ""
    signs = [bool(re.search(PERCENT, text)) for text in (gold, candidate)]
    return a == b or (signs == [True, False] and 100 * a == b)


def is_right(problem, text):
    """Whether a completion answers the problem. The suites answer lowest digit first."""
    answer = extract_answer(text)
    if problem.suite in SUITES and answer is not None:
        answer = answer[::-1]
    return answers_equal(problem.answer, answer)
