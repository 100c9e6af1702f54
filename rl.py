"""Reinforcement learning with verifiable rewards: tokenizer, problems, verifier, rollout, advantages, policy losses.

    r_i = 1 if the answer of sample i equals the gold                  (plus DAPO's overlong penalty, if on)
    A_i = (r_i - mean of its group) / std of its group                 (GRPO; others in ALGOS)
    ratio_t = exp(logp_t - logp_old_t)
    J = sum_t w_t min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A)        the objective; losses are -J

The problems are six suites of arithmetic. All numbers in them are written least significant digit first and at a fixed
width, as one computes on paper, from the right (Lee et al. 2023, arXiv 2307.03381): 47 + 85 = 132 is "74+58=####231".
Each suite has one place where care is needed, the carry. A careful solution never forgets it; a careless one forgets
each carry with probability 1/2. A base model pretrained on both has the skill but shows it half of the time; RL, which
can hardly teach a new skill in minutes, brings it out.

Dimension key: B sequences · P prompts · G samples a prompt (B = P·G) · T positions · K MTP depth
"""

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F

import mtp
import occ
from model import Samples, gather, generate, share, total, world

EOS = "<|endoftext|>"
ROUNDS = 4  # of dynamic sampling: with half of the groups informative, 1 in 16 is still missing after these


@functools.cache
def get_tokenizer(name):
    """A tiktoken.Encoding: "bytes" has a token a byte, "gpt2" is fetched at first use. ValueError else."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={EOS: 256})
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise ValueError(
                "--tokenizer gpt2: its vocabulary could not be fetched; connect to a network once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from error
    raise ValueError(f"tokenizer: {name!r} is unknown; allowed: bytes, gpt2")


# ----------------------------------------------------------------------------------------------------------------------
# Problems


class Problem(NamedTuple):
    suite: str
    prompt: str
    answer: str  # the gold, as people write it
    solution: str = ""  # for pretraining: working and answer, as the suite writes them


def digit(x, i):
    return x // 10**i % 10


def write(x, n):
    """The n lowest digits of x, least significant first."""
    return "".join(str(digit(x, i)) for i in range(n))


def columns(column_sum, width, forget):
    """Column arithmetic: the digits of sum_i column_sum(i)·10^i, lowest first. A carry is lost when forget()."""
    digits, carry = "", 0
    for i in range(width):
        s = column_sum(i) + (carry if carry and not forget() else 0)
        digits += str(s % 10)
        carry = s // 10
    return digits


# A suite is two functions of the difficulty n. draw(rng, n) -> operands; solve(operands, n, forget) -> prompt, working,
# answer, where forget() is asked at every carry and says whether this one is lost.


def draw_pair(rng, n):
    return rng.randrange(10**n), rng.randrange(10**n)


def solve_add(operands, n, forget):
    a, b = operands
    return f"{write(a, n)}+{write(b, n)}=", "", columns(lambda i: digit(a, i) + digit(b, i), n + 1, forget)


def solve_sub(operands, n, forget):
    a, b = max(operands), min(operands)
    return f"{write(a, n)}-{write(b, n)}=", "", columns(lambda i: digit(a, i) - digit(b, i), n, forget)


def solve_mul(operands, n, forget):
    a, b = operands
    return f"{write(a, n)}*{b}=", "", columns(lambda i: digit(a, i) * b, n + 1, forget)


def solve_mod(operands, n, forget):
    """Horner's rule from the highest digit; the working is the remainder so far, which plays the carry."""
    a, m = operands
    r, remainders = 0, ""
    for i in reversed(range(n)):
        r = ((10 * r if r and not forget() else 0) + digit(a, i)) % m
        remainders += str(r)
    return f"{write(a, n)}%{m}=", remainders[:-1], remainders[-1]


def solve_chain(operands, n, forget):
    """Running sums of one-digit terms; the working is the sums before the last."""
    total, sums = operands[0], []
    for term in operands[1:]:
        sums.append(columns(lambda i: digit(total, i) + (term if i == 0 else 0), 2, forget))
        total = int(sums[-1][::-1])
    return "+".join(map(str, operands)) + "=", ",".join(sums[:-1]), sums[-1]


def solve_linear(operands, n, forget):
    """Solve a·x + b = c for the digit x; the working is c - b."""
    a, x, b = operands
    c = a * x + b
    difference = columns(lambda i: digit(c, i) - digit(b, i), n, forget)
    return f"{a}x+{write(b, n)}={write(c, n)}:", difference, str(int(difference[::-1]) // a % 10)


def draw_linear(rng, n):
    a, x = rng.randrange(2, 6), rng.randrange(1, 10)
    return a, x, rng.randrange(10**n - a * x)


class Suite(NamedTuple):
    draw: Callable
    solve: Callable
    n: Callable  # difficulty -> digits (terms - 1 for chain)
    commutes: bool = False  # problems with the same operands in another order are the same problem


SUITES = {
    "add": Suite(draw_pair, solve_add, lambda d: d, commutes=True),
    "sub": Suite(draw_pair, solve_sub, lambda d: d, commutes=True),
    "mul": Suite(lambda rng, n: (rng.randrange(10**n), rng.randrange(2, 7)), solve_mul, lambda d: d + 1),
    "mod": Suite(lambda rng, n: (rng.randrange(10**n), rng.randrange(3, 8)), solve_mod, lambda d: d + 1),
    "chain": Suite(
        lambda rng, n: tuple(rng.randrange(1, 10) for _ in range(n + 1)), solve_chain, lambda d: d, commutes=True
    ),
    "linear": Suite(draw_linear, solve_linear, lambda d: max(d, 2)),
}


def suites_of(task):
    """Names from a comma list; all six for "arithmetic". Raises ValueError on an unknown one."""
    names = list(SUITES) if task == "arithmetic" else list(dict.fromkeys(task.split(",")))
    for name in names:
        if name not in SUITES:
            raise ValueError(f"--task: unknown suite {name!r}; allowed: arithmetic, or some of {','.join(SUITES)}")
    return names


def is_held_out(suite, operands):
    """One problem in eight, decided by the problem itself: training and evaluation cannot share any, nor its twin."""
    key = f"{suite} {sorted(operands) if SUITES[suite].commutes else list(operands)}"
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 8 == 0


def draw_problem(suite, difficulty, rng, held_out=False, careless=0.0):
    """One random problem of the wanted side of the split; its `solution` is careless with that probability."""
    draw, solve, n = SUITES[suite].draw, SUITES[suite].solve, SUITES[suite].n(difficulty)
    while True:
        operands = draw(rng, n)
        if is_held_out(suite, operands) == held_out:
            break
    prompt, _, right = solve(operands, n, lambda: False)
    forget = (lambda: rng.random() < 0.5) if rng.random() < careless else (lambda: False)
    _, working, written = solve(operands, n, forget)
    return Problem(suite, prompt, str(int(right[::-1])), f"{working}####{written}")


def problem_stream(suites, difficulty, rng, **kwargs):
    """Training problems without end, of suites at random."""
    while True:
        yield draw_problem(rng.choice(suites), difficulty, rng, **kwargs)


def held_out_problems(suite, difficulty, count, seed=0):
    """Up to count different held-out problems of a suite: fewer where the suite has no more at this difficulty."""
    rng, found = random.Random(f"{seed}/held out/{suite}"), {}
    for _ in range(100 * count):
        problem = draw_problem(suite, difficulty, rng, held_out=True)
        found.setdefault(problem.prompt, problem)
        if len(found) == count:
            break
    return list(found.values())


def longest(suites, difficulty):
    """Bytes of the longest prompt and solution: the problems of a suite are all written at the same width."""
    problems = [draw_problem(suite, difficulty, random.Random(0)) for suite in suites]
    return max(len(p.prompt) for p in problems), max(len(p.solution) for p in problems)


# ----------------------------------------------------------------------------------------------------------------------
# Verifier


def extract_answer(text):
    """What a completion gives as its answer: the last \\boxed{...}, else after the last "####", else after the last
    "Answer:", to the end of the line. None when there is none of them: never the whole text."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), min(len(text), start + 1000)):  # longer is no answer
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : end].strip() or None
        return None
    for marker in ("####", "Answer:"):
        _, found, tail = text.rpartition(marker)
        if found:
            return tail.partition("\n")[0].strip() or None
    return None


_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"([+-]?)\s*({_DECIMAL})(?:\s*/\s*([+-]?)({_DECIMAL}))?")


def parse_number(text):
    """An integer, decimal or fraction ("-1,234.50", "3/4") as an exact Fraction; None if text is none of these."""
    text = text.strip().replace("\u2212", "-").strip("$").strip().removesuffix(".")
    match = _NUMBER.fullmatch(text) if len(text) <= 200 and text.isascii() else None
    if match is None:
        return None
    sign, numerator, sign_below, denominator = (group or "" for group in match.groups())
    top, below = (Fraction("0" + part.replace(",", "")) for part in (numerator, denominator or "1"))
    if below == 0:
        return None
    return (-1 if (sign == "-") != (sign_below == "-") else 1) * top / below


def answers_equal(gold, candidate):
    """Whether two answers are the same number, exactly, or else the same text but for case and spaces. None is not."""
    if gold is None or candidate is None:
        return False
    a, b = parse_number(gold), parse_number(candidate)
    if a is not None or b is not None:
        return a == b
    return " ".join(gold.split()).casefold() == " ".join(candidate.split()).casefold()


def is_right(problem, text):
    """Whether a completion answers the problem. The suites here answer lowest digit first."""
    answer = extract_answer(text)
    if problem.suite in SUITES and answer is not None:
        answer = answer[::-1]
    return answers_equal(problem.answer, answer)


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


def completions(tok, samples):
    """The sampled tokens of each row as text, without the end of sequence. A model may have more rows of vocabulary
    than the tokenizer has tokens (padding, for speed): those read as U+FFFD, which no right answer contains."""
    unknown = tok.encode_single_token(b"\xff")
    rows = zip(samples.tokens_BT.tolist(), samples.mask_BT.tolist())
    kept = [[t if t < tok.n_vocab else unknown for t, m in zip(*row) if m and t != tok.eot_token] for row in rows]
    return [tok.decode(row) for row in kept]


def join(parts):
    """Samples of several batches as one."""
    if len(parts) == 1:
        return parts[0]
    T = max(part.tokens_BT.size(1) for part in parts)
    wide = [part.map(lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (0, T - x.size(1)))) for part in parts]
    return Samples(*(None if field[0] is None else torch.cat(field) for field in zip(*wide)))


def rollout(model, tok, problems, num_generations, max_new_tokens, temperature=1.0, generator=None, keep_hidden=False,
            spec=None):  # fmt: skip
    """Samples (B = P·G rows), their texts, and reward_PG: 1.0 where the answer is right.

    keep_hidden: keep hidden states for `minibatches`, but under autocast, where those of training are not the same.
    spec: an mtp.Speculator, to sample by. Of several processes each samples for its share of the problems, and all of
    them get everything.
    """
    G, device, mine = num_generations, model.wte.weight.device, share(len(problems))
    keep_hidden = keep_hidden and not torch.is_autocast_enabled(device.type)
    sample = spec.generate if spec else generate
    numbers = (3,) if spec else ()  # of all problems: a sample is whoever's it is
    u_BR = torch.rand(len(problems) * G, max_new_tokens, *numbers, generator=generator)
    prompts, part = [tok.encode_ordinary(p.prompt) for p in problems[mine]], None
    if prompts:
        u_BR = u_BR[mine.start * G : mine.stop * G]
        samples = sample(model, prompts, G, max_new_tokens, tok.eot_token, temperature, u_BR, keep_hidden)
        texts = completions(tok, samples)
        asked = [p for p in problems[mine] for _ in range(G)]
        right = [float(is_right(problem, text)) for problem, text in zip(asked, texts)]
        if world()[1] > 1:
            samples = samples.map(torch.Tensor.cpu)
        part = samples, texts, right
    samples, texts, right = zip(*(part for part in gather(part) if part))
    samples = join(samples).map(lambda x: x.to(device))
    return samples, sum(texts, []), torch.tensor(sum(right, [])).view(len(problems), G)


def overlong_penalty(length_B, max_new_tokens):
    """DAPO's soft penalty (arXiv 2503.14476 §3.4): 0, falling to -1 over the last fifth of the allowed length."""
    buffer = max_new_tokens / 5
    return ((max_new_tokens - buffer - length_B) / buffer).clamp(-1, 0)


def informative(reward_PG):
    """(P,) True where the samples of a prompt differ in reward. The others have zero advantage, hence no gradient."""
    return reward_PG.amax(1) > reward_PG.amin(1)


def collect(model, tok, problems, algo, cfg, generator, spec=None):
    """The rollout of one step. With dynamic sampling (DAPO §3.2), prompts without a gradient are replaced by new ones
    from the iterator `problems`, at most ROUNDS times over; what is missing then stays missing.

    Returns Samples of the prompts kept, their reward_PG, metrics over all prompts sampled, and examples to read.
    """
    G, R = cfg.num_generations, cfg.max_new_tokens
    rounds, missing = [], cfg.prompts_per_step
    while missing and len(rounds) < (ROUNDS if algo.dynamic_sampling else 1):
        drawn = list(itertools.islice(problems, missing))
        samples, texts, reward_PG = rollout(model, tok, drawn, G, R, cfg.temperature, generator, True, spec)
        length_B, flat_P = samples.mask_BT.sum(1).cpu(), ~informative(reward_PG)
        if algo.overlong:
            reward_PG = reward_PG + overlong_penalty(length_B, R).view_as(reward_PG)
        keep_P = ~flat_P if algo.dynamic_sampling else torch.ones_like(flat_P)
        rounds.append((samples, reward_PG, keep_P, flat_P, length_B, drawn, texts))
        missing -= int(keep_P.sum())
    samples, rewards, keeps, flats, lengths, drawn, texts = zip(*rounds)
    keep_B = torch.cat(keeps).repeat_interleave(G).to(samples[0].tokens_BT.device)
    kept = join(samples).map(lambda x: x[keep_B])
    length_B, logp = torch.cat(lengths).float(), sum(part.logp_BT.sum() for part in samples)
    metrics = {
        "reward/mean": torch.cat(rewards).mean().item(),
        "reward/frac_zero_std": torch.cat(flats).float().mean().item(),
        "response_length/mean": length_B.mean().item(),
        "response_length/clip_ratio": (length_B == R).float().mean().item(),
        "response_length/sum": int(length_B.sum()),
        "actor/entropy": -logp.item() / length_B.sum().item(),  # the mean of -log p over tokens sampled from p
    }
    metrics |= spec.metrics(total) if spec else {}
    examples = [(p.prompt, t, r) for p, t, r in zip(drawn[0], texts[0][::G], rewards[0][:, 0].tolist())]
    return kept, torch.cat(rewards)[torch.cat(keeps)], metrics, examples[:8]


# ----------------------------------------------------------------------------------------------------------------------
# Advantages and losses


@dataclass(frozen=True)
class Algo:
    """What tells one policy-gradient method from another."""

    # group_std: (r - mean)/std of the group · group: r - mean · loo: r - mean of the others · batch: r - mean of all
    advantage: str = "group_std"
    # token: all tokens alike · sequence: mean a sequence first · constant: sum / (B·max_new_tokens)
    loss_agg: str = "token"
    ratio: str = "token"  # token · sequence: geometric mean over the sequence · none: plain -A log p
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    dual_clip: float = 10.0  # with A < 0 the objective is never below dual_clip·A (Ye et al. 2019, arXiv 1912.09729)
    kl_coef: float = 0.0  # weight of the k3 estimate of KL(policy, frozen base)
    dynamic_sampling: bool = False  # draw new prompts in the place of groups whose samples all have the same reward
    overlong: bool = False  # punish responses that come near max_new_tokens


ALGOS = {
    "reinforce": Algo(advantage="batch", ratio="none"),  # Williams 1992
    "grpo": Algo(loss_agg="sequence", kl_coef=0.04),  # arXiv 2402.03300
    "drgrpo": Algo(advantage="group", loss_agg="constant"),  # arXiv 2503.20783
    "dapo": Algo(clip_eps_high=0.28, dynamic_sampling=True, overlong=True),  # arXiv 2503.14476
    "gspo": Algo(loss_agg="sequence", ratio="sequence", clip_eps_low=3e-4, clip_eps_high=4e-4),  # arXiv 2507.18071
}


def advantages(reward_PG, kind):
    """(P, G) rewards -> (P, G) advantages; see Algo.advantage.

    Groups of equal rewards get exactly 0 from all kinds but "batch", whose baseline is not theirs.
    """
    G = reward_PG.size(1)
    if kind == "batch":
        return reward_PG - reward_PG.mean()
    adv_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    if kind == "group_std":
        adv_PG = adv_PG / ((adv_PG.square().sum(1, keepdim=True) / (G - 1)).sqrt() + 1e-6)
    elif kind == "loo":
        adv_PG = adv_PG * G / (G - 1)  # r - (sum - r)/(G - 1)
    # The mean of equal floats need not be that float: test the rewards, not their spread.
    return torch.where(informative(reward_PG)[:, None], adv_PG, 0.0)


def token_weights(mask_BT, loss_agg, max_new_tokens):
    """How much each token counts: (B, T-1), zero off the mask. loss = (token_weights * loss_BT).sum().

    Made once for the whole minibatch, so that cutting it into micro-batches, or padding it, changes nothing.
    """
    m = mask_BT.float()
    if loss_agg == "token":
        return m / m.sum().clamp(min=1)
    if loss_agg == "sequence":
        return m / m.sum(1, keepdim=True).clamp(min=1) / len(m)
    return m / (len(m) * max_new_tokens)


def policy_loss(logp_BT, logp_old_BT, adv_B, mask_BT, weight_BT, algo, count=None):
    """The clipped policy-gradient loss, and what happened to the ratio: for the trunk and, alike, for an MTP head.

    All (B, T-1) but adv_B. Returns loss (a scalar, -J) and clip_frac_low, clip_frac_high, ratio_max of masked tokens.
    count: tokens of the whole minibatch, where this is a part of it; loss and fractions are then shares of the whole's.
    """
    adv_BT = adv_B[:, None]
    log_ratio_BT = torch.where(mask_BT, logp_BT - logp_old_BT, 0.0)
    if algo.ratio == "sequence":  # GSPO: exp of the mean, the same for every token of the sequence
        log_ratio_BT = log_ratio_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1) * mask_BT
    ratio_BT = log_ratio_BT.clamp(-20, 20).exp()  # a finite ratio, so that a branch not taken has no NaN gradient
    if algo.ratio == "none":
        surrogate_BT = adv_BT * logp_BT
        low_BT = high_BT = torch.zeros_like(mask_BT)
    else:
        clipped_BT = ratio_BT.clamp(1 - algo.clip_eps_low, 1 + algo.clip_eps_high)
        surrogate_BT = torch.minimum(ratio_BT * adv_BT, clipped_BT * adv_BT)
        surrogate_BT = torch.where(adv_BT < 0, torch.maximum(surrogate_BT, algo.dual_clip * adv_BT), surrogate_BT)
        low_BT = mask_BT & (ratio_BT < 1 - algo.clip_eps_low) & (adv_BT < 0)
        high_BT = mask_BT & (ratio_BT > 1 + algo.clip_eps_high) & (adv_BT > 0)
    loss = -(weight_BT * surrogate_BT).sum()
    n = (mask_BT.sum() if count is None else count).clamp(min=1)
    stats = {"clip_frac_low": low_BT.sum() / n, "clip_frac_high": high_BT.sum() / n}
    return loss, stats | {"ratio_max": largest(ratio_BT.detach() * mask_BT)}


def largest(x):
    """The largest element of x ≥ 0; 0 of none."""
    return F.pad(x.flatten(), (0, 1)).max()


def k3_kl(logp_BT, logp_ref_BT, weight_BT):
    """KL(policy, reference) on the policy's own samples, estimated by r - 1 - log r ≥ 0, r = p_ref/p (Schulman)."""
    log_r = (logp_ref_BT - logp_BT).clamp(-20, 20)
    return (weight_BT * (log_r.exp() - 1 - log_r)).sum()


# ----------------------------------------------------------------------------------------------------------------------
# The minibatch of an update


class Minibatch(NamedTuple):
    """What one update sees, or this process's share of it: losses of the shares add up to those of the whole.

    (B, T-1) arrays follow the shift convention of mtp.py: column t speaks of token t+1.
    """

    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor
    adv_B: torch.Tensor
    logp_sampled_BT: torch.Tensor  # as the sampler saw it
    logp_old_BT: torch.Tensor
    logp_ref_BT: torch.Tensor  # of the frozen base; zeros without KL
    logp_old_KBT: torch.Tensor  # of each head, aligned
    weight_BT: torch.Tensor  # what each token counts in loss_rl
    weight_KBT: torch.Tensor  # and in the policy loss of each head
    counts: torch.Tensor  # (1+K,) tokens of the whole that the trunk and each head score
    half: int  # rows in the first of two halves of whole groups; 0 if there is but one group
    half_share: float  # of the whole minibatch, that this half is

    def rows(self, index):
        """The same for some of the sequences. Weights stay those of the whole."""
        axes = {"_B": index, "_BT": index, "_KBT": (slice(None), index)}
        cut = {n: x[axes["_" + n.split("_")[-1]]] for n, x in self._asdict().items() if n.endswith(tuple(axes))}
        return self._replace(**cut)

    def halves(self):
        return [self.rows(slice(0, self.half)), self.rows(slice(self.half, None))] if self.half_share else [self]


@torch.no_grad()
def minibatches(model, heads, samples, adv_B, algo, cfg, reference=None):
    """A rollout cut into updates_per_rollout minibatches, whole groups in each (fewer if there are fewer groups).

    Old log-probs of the trunk are the sampler's, and the heads are run on the hidden states that it kept. Where it kept
    none, because bfloat16 makes sampling and training differ, one forward pass gives both.
    Returns the minibatches, of each the rows that are this process's share, and the metrics mtp/logp_impl and
    mtp/agreement_k, the share of tokens that a speculative sampler drafting from head k would have accepted: the mean
    of min(1, q/p), whose expectation over tokens from p is sum_v min(p_v, q_v).
    """
    G, K, parts = cfg.num_generations, len(heads.heads) if heads else 0, []
    accepted_K, scored_K = torch.zeros(2, K, device=adv_B.device)
    P = len(adv_B) // G
    for groups in torch.arange(P).tensor_split(min(cfg.updates_per_rollout, P)) if P else ():
        first, n, half = int(groups[0]) * G, len(groups) * G, len(groups) // 2 * G
        a, b = share(half), share(n - half)  # every process has a part of both halves
        mine = torch.cat((torch.arange(a.start, a.stop), torch.arange(half + b.start, half + b.stop)))
        rows = first + mine
        whole_BT = samples.mask_BT[first : first + n, 1:]
        T = 2 + int((whole_BT * torch.arange(whole_BT.size(1), device=whole_BT.device)).max())  # the longest ends here
        masks = [mask[:, : T - 1] for mask in (whole_BT, *mtp.aligned_masks(whole_BT, K))]
        weights = [token_weights(m, algo.loss_agg, cfg.max_new_tokens)[mine] for m in masks]
        counts = torch.stack([m.sum() for m in masks])
        tokens_BT, mask_BT, logp_sampled_BT = samples.tokens_BT[rows, :T], masks[0][mine], samples.logp_BT[rows, 1:T]
        h_BTC = None if samples.h_BTC is None else samples.h_BTC[rows, :T]
        logp_BT, logp_KBT, mask_KBT, _ = mtp.logprobs(
            model, heads, tokens_BT, mask_BT, cfg.temperature, cfg.logp_impl, h_BTC=h_BTC
        )
        logp_old_BT = logp_BT if h_BTC is None else logp_sampled_BT
        logp_ref_BT = torch.zeros_like(logp_BT)
        if reference:
            logp_ref_BT = mtp.logprobs(reference, None, tokens_BT, mask_BT, cfg.temperature, cfg.logp_impl)[0]
        accepted_K += ((logp_KBT - logp_old_BT).exp().clamp(max=1) * mask_KBT).sum((1, 2))
        scored_K += counts[1:]
        weight_KBT = torch.stack(weights[1:]) if K else logp_KBT  # without heads, both are empty
        parts.append(Minibatch(tokens_BT, mask_BT, adv_B[rows], logp_sampled_BT, logp_old_BT, logp_ref_BT, logp_KBT,
                               weights[0], weight_KBT, counts, a.stop - a.start, half / n))  # fmt: skip
    if not parts:
        return [], {}
    shares = total(accepted_K) / scored_K.clamp(min=1)
    metrics = {f"mtp/agreement_{k}": value for k, value in enumerate(shares.tolist(), 1)}
    most = int(parts[0].counts.sum()) // world()[1]  # tokens of an update's call, or about so many
    metrics["mtp/logp_impl"] = mtp.pick_impl(cfg.logp_impl, most, model.cfg.vocab_size, adv_B.device)
    return parts, metrics


class Losses(NamedTuple):
    rl: torch.Tensor
    mtp: torch.Tensor  # of the heads, its gradient for the trunk; mean over depths
    heads: torch.Tensor | None  # what the heads learn, where cfg.mtp_learn makes that another loss
    delta_rl_N: torch.Tensor  # change of log-prob since the rollout, on the tokens that some head scores
    delta_mtp_N: torch.Tensor  # the same of the heads, mean over the depths that score the token
    h_BTC: torch.Tensor
    stats: dict  # of this share: to be summed over processes; of some the largest counts (is_maximum)


def is_maximum(name):
    """Whether a statistic is the largest of something, so that of several values the largest counts."""
    return "ratio_max" in name or "logp_gap" in name


def losses(model, heads, mb, algo, objective, cfg, on_policy, lam, watch=None):
    """Forward pass of a minibatch.

    objective: of the heads, as far as the trunk is concerned, "ce" or "policy". lam: what the backward will let through
    the doors of the trunk (occ.scale_grad); watch stands behind the doors (occ.hidden_watch).
    on_policy: nothing has been updated since the rollout, so old log-probs are those of this very pass; the ratio is
    exactly 1 and δ exactly 0, not rounding noise for OCC to divide.
    """
    door = functools.partial(occ.scale_grad, lam=lam)
    logp_BT, logp_KBT, mask_KBT, h_BTC = mtp.logprobs(
        model, heads, mb.tokens_BT, mb.mask_BT, cfg.temperature, cfg.logp_impl, door, watch
    )
    old_BT, old_KBT = (logp_BT.detach(), logp_KBT.detach()) if on_policy else (mb.logp_old_BT, mb.logp_old_KBT)
    if cfg.mtp_base == "main":
        old_KBT = old_BT.expand_as(logp_KBT)

    loss_rl, seen = policy_loss(logp_BT, old_BT, mb.adv_B, mb.mask_BT, mb.weight_BT, algo, mb.counts[0])
    if algo.kl_coef:
        seen["kl"] = k3_kl(logp_BT, mb.logp_ref_BT, mb.weight_BT)
        loss_rl = loss_rl + algo.kl_coef * seen["kl"]
    stats = {f"actor/{name}": value for name, value in seen.items()} | {"actor/loss": loss_rl}
    if on_policy:
        stats["rollout/logp_gap"] = largest((logp_BT - mb.logp_sampled_BT).abs() * mb.mask_BT)

    learn = cfg.mtp_learn or objective
    by_depth = {"policy": [], "ce": []}
    for k in range(len(logp_KBT)):
        count = mb.counts[1 + k].clamp(min=1)
        loss_k, seen = policy_loss(logp_KBT[k], old_KBT[k], mb.adv_B, mask_KBT[k], mb.weight_KBT[k], algo, count)
        by_depth["policy"].append(loss_k)
        by_depth["ce"].append(-(logp_KBT[k] * mask_KBT[k]).sum() / count)
        stats |= {f"mtp/loss_{k + 1}": by_depth[learn][-1], f"mtp/ratio_max_{k + 1}": seen["ratio_max"],
                  f"mtp/clip_frac_{k + 1}": seen["clip_frac_low"] + seen["clip_frac_high"]}  # fmt: skip
    mean = {kind: sum(losses) / max(len(losses), 1) for kind, losses in by_depth.items()}
    loss_mtp, loss_heads = mean[objective or "ce"], mean[learn] if learn != objective else None

    depths_BT = mask_KBT.sum(0)
    scored_BT = depths_BT > 0
    delta_mtp_BT = ((logp_KBT - old_KBT) * mask_KBT).sum(0) / depths_BT.clamp(min=1)
    deltas = ((logp_BT - old_BT)[scored_BT].detach(), delta_mtp_BT[scored_BT].detach())
    return Losses(
        loss_rl, loss_mtp, loss_heads, *deltas, h_BTC, {name: value.detach() for name, value in stats.items()}
    )
