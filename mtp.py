"""Multi-token-prediction (MTP) heads, and the log-probs of tokens without the logits of all of them.

Two designs of head, depth k = 1..K. All read the trunk through the same three doors: final hidden states h, embedding
rows emb, and the unembedding matrix W.

  sequential  h^k_t = norm(block_k(P_k [norm(h^{k-1}_t); norm(emb(token_{t+k}))])), h^0 = h
              (DeepSeek-V3 §2.2, arXiv 2412.19437)
  parallel    h^k_t = norm(block_k(h_t))  (Gloeckle et al. 2024, arXiv 2404.19737)
  both        logits of depth k at t = W h^k_t, a prediction of token t+1+k; depth 0 is the trunk's own next token

The shift convention, stated here once. Column t of every (B, T-1) array speaks of token t+1, whoever predicts it:
  trunk       column t comes from hidden state t
  depth k     column t comes from position t-k, which saw tokens ≤ t-k and, if sequential, the embeddings of t-k+1..t;
              so columns 0..k-1 are invalid. "Aligned" means: the trunk and all heads score the same token in a column.

Dimension key: B sequences · P prompts · G samples a prompt · T positions · S new positions · R new tokens · K depth ·
V vocabulary · C channels · N tokens
"""

# Annotations stay text: those of the kernels name types of Triton, which is imported later.
from __future__ import annotations

import functools
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import Block, KVCache, at_token, autocast, choose, read_prompts, tempered
from occ import scale_grad


class Head(nn.Module):
    """One depth: hidden states (B, S, C) -> hidden states (B, S, C), ready for the unembedding."""

    def __init__(self, cfg, sequential):
        super().__init__()
        C = cfg.n_embd
        self.block = Block(cfg)
        self.norm = nn.LayerNorm(C, bias=False)
        self.sequential = sequential
        if sequential:
            self.norm_h, self.norm_e = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
            self.proj = nn.Linear(2 * C, C, bias=False)

    def forward(self, h, emb, cache=None, pos_BS=None, end=None):
        """The parallel design does not read emb. The rest is as in Block.forward."""
        if self.sequential:
            h = self.proj(torch.cat((self.norm_h(h), self.norm_e(emb)), dim=-1))
        return self.norm(self.block(h, cache, pos_BS, end))


class MTPHeads(nn.Module):
    """K heads. Their parameters are what the paper calls φ; the trunk's never register here."""

    def __init__(self, cfg, depth, design="sequential"):
        super().__init__()
        self.sequential = design == "sequential"
        self.heads = nn.ModuleList(Head(cfg, self.sequential) for _ in range(depth))

    def forward(self, h_BTC, emb_BTC):
        """Hidden states of all depths, aligned: (B, K, T-1, C), where the first k columns of depth k are 0.

        The loss of a depth also trains the sequential heads below it, as in DeepSeek-V3.
        """
        T = h_BTC.size(1)
        below, aligned = h_BTC, []
        for k, head in enumerate(self.heads, start=1):
            S = max(T - 1 - k, 0)
            h = head(below[:, :S], emb_BTC[:, k : k + S])
            below = h if self.sequential else below
            aligned.append(F.pad(h, (0, 0, k, 0))[:, : T - 1])  # position t-k goes to column t
        return torch.stack(aligned, 1)


def aligned_mask(mask_BT, depth):
    """(B, K, T-1): for each depth the masked columns whose token it can predict, all but the first k."""
    column = torch.arange(mask_BT.size(1), device=mask_BT.device)
    k = torch.arange(1, depth + 1, device=mask_BT.device)
    return mask_BT[:, None] & (column >= k[:, None])


def logprobs(model, heads, tokens_BT, mask_BT, temperature=1.0, impl="auto", door=1.0):
    """Log-probs of the masked tokens under the trunk and under each head, aligned (see the top of this file).

    tokens_BT (B, T); mask_BT (B, T-1), True where token t+1 counts. door is the λ of occ.scale_grad at the doors:
    how much of the heads' gradient enters the trunk. heads may be None: then K = 0.
    Returns logp_BT (B, T-1) and logp_BKT (B, K, T-1), both 0 off their masks, and the hidden states h_BTC.
    """
    B, T = tokens_BT.shape
    target_BT, W = tokens_BT[:, 1:], model.lm_head.weight
    with autocast(tokens_BT.device):
        h_BTC = model.hidden(tokens_BT)
        if heads:
            h_BKTC = heads(scale_grad(h_BTC, door), scale_grad(model.wte(tokens_BT), door))
    logp_BT = masked_logp(h_BTC[:, :-1], W, target_BT, mask_BT, temperature, impl)
    if not heads:
        return logp_BT, logp_BT.new_zeros(B, 0, T - 1), h_BTC
    mask_BKT = aligned_mask(mask_BT, h_BKTC.size(1))
    target_BKT = target_BT[:, None].expand(mask_BKT.shape)
    logp_BKT = masked_logp(h_BKTC, scale_grad(W, door), target_BKT, mask_BKT, temperature, impl)
    return logp_BT, logp_BKT, h_BTC


def masked_logp(h, W, targets, mask, temperature, impl):
    """linear_logp of the masked tokens, 0 elsewhere. h is (..., C); targets, mask and the result are (...)."""
    logp_N = linear_logp(h[mask], W, targets[mask], temperature, impl)
    return torch.zeros(mask.shape, device=h.device, dtype=logp_N.dtype).masked_scatter(mask, logp_N)


# ----------------------------------------------------------------------------------------------------------------------
# Speculative sampling: the heads draft, the trunk verifies (Leviathan et al. 2023, arXiv 2211.17192)


def accepts(log_p_BKV, log_q_BKV, draft_BK, temperature, u_BK):
    """(B, K) whether each draft would be accepted if those before it are: with probability min(1, p/q).

    Together with `after_rejection` this gives exactly p. At temperature 0 a draft must be what the trunk would say.
    """
    if temperature == 0:
        return draft_BK == log_p_BKV.argmax(-1)
    return u_BK < (at_token(log_p_BKV, draft_BK) - at_token(log_q_BKV, draft_BK)).exp()


def after_rejection(log_p_BV, log_q_BV):
    """Log of the residual max(p - q, 0), not normalised; of p where nothing is left, or where q is 0 throughout."""
    residual_BV = (log_p_BV.exp() - log_q_BV.exp()).clamp(min=0)
    return torch.where(residual_BV.sum(-1, keepdim=True) > 0, residual_BV.log(), log_p_BV)


def draft(model, heads, caches, tokens, states, n_B, width, end, temperature, u_BK):
    """Each head writes its draft behind position n, the last token's. Returns their log-probs (B, K, V).

    Head k reads the `width` positions before n and writes token n+k. What its cache has of the last K+1 of them may be
    of rejected drafts, so each round makes these again. Older columns are right, and later ones are masked.
    """
    row = torch.arange(len(n_B), device=n_B.device)
    window = (n_B[:, None] + torch.arange(-width, 0, device=n_B.device)).clamp(min=0)
    below, log_q = states[row[:, None], window], []
    for k, head in enumerate(heads.heads, start=1):
        h = head(below, model.wte(tokens[row[:, None], window + k]), caches[k - 1], window, end)
        log_q.append(tempered(model.logits(h[:, -1]), temperature))
        tokens[row, n_B + k] = choose(log_q[-1], temperature, u_BK[:, k - 1])
        below = h if heads.sequential else below
    return torch.stack(log_q, 1)


def settle(log_p, log_q_BKV, draft_BK, temperature, u):
    """The tokens of a round (B, K+1), and how many of its drafts are accepted (B,).

    These drafts come first, then one token of the trunk; columns after it mean nothing. log_p (B, K+1, V) are the
    trunk's log-probs, and u (B, K+1, 3) the numbers of speculative_generate.
    """
    B, K = draft_BK.shape
    row = torch.arange(B, device=u.device)
    good_BK = accepts(log_p[:, :K], log_q_BKV, draft_BK, temperature, u[:, :K, 1])
    accepted_B = good_BK.long().cumprod(1).sum(1)
    log_own_BV = log_p[row, accepted_B]
    if temperature != 0:
        log_q = F.pad(log_q_BKV, (0, 0, 0, 1), value=-torch.inf)  # q is 0 behind the last draft
        log_own_BV = after_rejection(log_own_BV, log_q[row, accepted_B])
    own_B = choose(log_own_BV, temperature, u[row, accepted_B, 2])
    is_draft = torch.arange(K + 1, device=u.device) < accepted_B[:, None]
    return torch.where(is_draft, F.pad(draft_BK, (0, 1)), own_B[:, None]), accepted_B


@torch.no_grad()
def speculative_generate(
    model, heads, prompts, num_generations, max_new_tokens, eos, temperature=1.0, u_BR3=None
):
    """Samples like model.generate, from the same distribution, in fewer passes of the trunk.

    u_BR3: three uniform numbers a token, for its draft, for accepting it, and for sampling it otherwise. A number may
    be read again in a later round, but only if all that it decided before was thrown away.
    Returns the dict of model.generate with one more entry: draft (B, T-1), the depth k of the head whose draft the
    token was, 0 where the trunk sampled it.
    """
    R, K = max_new_tokens, len(heads.heads)
    tokens, states, caches = read_prompts(model, prompts, num_generations, R)
    B, longest = tokens.shape
    device, room = tokens.device, longest + R
    head_caches = [KVCache(room) for _ in range(K)]
    tokens, states = F.pad(tokens, (0, R + K + 1)), F.pad(states, (0, 0, 0, R))
    logp = torch.zeros_like(tokens, dtype=torch.float)
    depth = torch.full_like(tokens, -1)  # of the head that drafted; the trunk is 0, no response -1
    u_BR3 = (torch.rand(B, R, 3) if u_BR3 is None else u_BR3).to(device)
    row, j = torch.arange(B, device=device), torch.arange(K + 1, device=device)
    rows = row[:, None]

    # The first token comes from the trunk. Of each row, n is the position of the last token so far, and stop the first
    # where no token may go: behind the end token, or else behind R tokens.
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    n = first = length.repeat_interleave(num_generations)
    log_p = tempered(model.logits(states[row, n - 1]), temperature)
    tokens[row, n] = choose(log_p, temperature, u_BR3[:, 0, 2])
    logp[row, n] = at_token(log_p, tokens[row, n])
    depth[row, n] = 0
    stop = torch.where(tokens[row, n] == eos, n + 1, first + R)
    width = max(longest, K + 1)
    while (n + 1 < stop).any():
        at = n[:, None] + 1 + j  # (B, K+1): where the tokens of this round go
        u = u_BR3[rows, (at - first[:, None]).clamp(max=R - 1)]
        pos = (at - 1).clamp(max=room - 1)  # where the trunk reads; not used behind the end
        end = int(pos.max()) + 1

        # 1 draft
        args = tokens, states, n, width, end, temperature, u[..., 0]
        log_q = draft(model, heads, head_caches, *args)
        width = K + 1  # only the first round reads whole prompts
        # 2 verify: the trunk reads the last token and all drafts in one pass
        h = model.hidden(tokens[rows, at - 1], caches, pos, end)
        states[rows, pos] = h
        log_p = tempered(model.logits(h), temperature)
        new, accepted = settle(log_p, log_q, tokens[rows, at[:, :K]], temperature, u)
        # 3 keep the accepted drafts and one token of the trunk, up to the end of the response
        kept = (j <= accepted[:, None]) & (at < stop[:, None])
        ended = (new == eos) & kept
        kept &= ended.cumsum(1) - ended.long() == 0  # nothing behind the end token
        tokens[rows, at] = new * kept
        logp[rows, at] = at_token(log_p, new) * kept
        depth[rows, at] = torch.where(kept, (1 + j) * (j < accepted[:, None]), -1)
        n = n + kept.sum(1)
        stop = torch.where(ended.any(1), n + 1, stop)
    end = int((depth >= 0).any(0).nonzero().max()) + 1
    depth = depth[:, 1:end]
    out = {"tokens": tokens[:, :end], "mask": depth >= 0, "logp": logp[:, 1:end]}
    return out | {"draft": depth.clamp(min=0)}


def speculation_metrics(mask_BT, draft_BT, depth):
    """What drafting was worth, of samples of speculative_generate.

    spec/accept_rate_k: share of rounds whose k-th draft came out. spec/accept_len: tokens a round, the trunk's own
    included. spec/tokens_per_call: tokens a row and pass of the trunk; reading the prompt is one pass, which gives one.
    """
    own_BT = mask_BT & (draft_BT == 0)
    # A round begins behind each of the trunk's own tokens that is not the last of its row.
    rounds = max((own_BT[:, :-1] & mask_BT[:, 1:]).sum().item(), 1)
    tokens, rows = mask_BT.sum().item(), len(mask_BT)
    metrics = {}
    for k in range(1, depth + 1):
        metrics[f"spec/accept_rate_{k}"] = (draft_BT == k).sum().item() / rounds
    metrics["spec/accept_len"] = (tokens - rows) / rounds
    metrics["spec/tokens_per_call"] = tokens / (rounds + rows)
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# log softmax(h W^T / temperature)[target], a number a token


# impl="chunked" holds so many logits at a time: 16 MiB in float32, or 64 columns if those are more.
CHUNK_LOGITS = 2**22
# "auto" is naive up to so many: 32 MiB, above which glibc maps every temporary anew (python tests/bench.py --logp).
AUTO_LOGITS = 2**23


def pick_impl(impl, n_tokens, vocab_size, device, dtype=torch.float32):
    """The implementation that runs for N tokens and a vocabulary of V: `impl` itself unless it is "auto"."""
    if impl != "auto":
        return impl
    if torch.device(device).type == "cuda":
        return "chunked" if why_no_triton("cuda", dtype) else "triton"
    return "naive" if n_tokens * vocab_size <= AUTO_LOGITS else "chunked"


def linear_logp(h, weight, targets, temperature=1.0, impl="auto"):
    """log softmax(h @ weight.T / temperature)[targets], float32, with exact gradients for any upstream one per token.

    h (..., C), weight (V, C), targets (...) from 0 to V-1 -> logp (...). impl: "naive" holds all (N, V) logits;
    "chunked" about CHUNK_LOGITS of them; "triton" none in the forward, in the backward DZ_BYTES of dz; "auto" picks one
    (pick_impl). Raises ValueError on an impl that cannot run here and on a target out of range. On a GPU, where to find
    that out would make the host wait, the log-prob of such a target is NaN.
    """
    impl = pick_impl(impl, targets.numel(), len(weight), h.device, h.dtype)
    if impl not in ("naive", "chunked", "triton"):
        raise ValueError(f"impl: {impl!r} is unknown; allowed: auto, naive, chunked, triton")
    if impl == "triton" and (why := why_no_triton(h.device.type, h.dtype)):
        raise ValueError(f"impl: 'triton' cannot run here: {why}; allowed: auto, naive, chunked")
    h_NC, target_N = h.reshape(-1, h.size(-1)), targets.reshape(-1)
    valid_N = (target_N >= 0) & (target_N < len(weight))
    if h.device.type == "cpu" and not valid_N.all():
        wrong = target_N[~valid_N][0].item()
        raise ValueError(f"targets: {wrong} is out of range; allowed: 0 to {len(weight) - 1}")
    target_N = target_N.clamp(0, len(weight) - 1)
    with torch.autocast(h.device.type, enabled=False):
        if impl == "naive" or target_N.numel() == 0:
            logits_NV = F.linear(accurate(h_NC), accurate(weight)) / temperature
            logp_N = -F.cross_entropy(logits_NV, target_N, reduction="none")
        else:
            logp_N = RecomputedLogp.apply(h_NC, weight, target_N, temperature, impl)
    return torch.where(valid_N, logp_N, torch.nan).view(targets.shape)


def accurate(x):
    """x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


class RecomputedLogp(torch.autograd.Function):
    """logp_i = (z_i,target - top_i) - log_sum_i of logits z = h W^T / temperature that are never all in memory.

    top_i is the largest logit of token i, and log_sum_i = log Σ_v exp(z_iv - top_i). In this order no digits are lost
    to a large common offset of the logits. With p = exp((z - top) - log_sum) and any upstream gradient g_i a token,

        dz_iv = g_i ([v = target_i] - p_iv) / temperature        dh = dz W        dW = dz^T h

    The backward makes z again, some columns of V at a time: 8·N·C·V FLOPs, where "naive" takes 6·N·C·V. No atomics: the
    same bits each time. Sums are float32; only dz of the Triton path is rounded, to bfloat16 where h is.

    Each implementation has two functions. *_statistics returns top, log_sum and the target's logit, (N,) each. *_dz
    yields dz in pieces: (columns, dz of these columns).
    """

    @staticmethod
    def forward(ctx, h_NC, weight, target_N, temperature, impl):
        statistics = triton_statistics if impl == "triton" else chunked_statistics
        top_N, log_sum_N, z_target_N = statistics(h_NC, weight, target_N, temperature)
        ctx.save_for_backward(h_NC, weight, target_N, top_N, log_sum_N)
        ctx.temperature, ctx.impl = temperature, impl
        return (z_target_N - top_N) - log_sum_N

    @staticmethod
    @once_differentiable
    def backward(ctx, g_N):
        h_NC, weight = ctx.saved_tensors[:2]
        pieces_of_dz = triton_dz if ctx.impl == "triton" else chunked_dz
        dW = torch.empty_like(weight)
        dh_NC = torch.zeros_like(accurate(h_NC))
        for columns, dz in pieces_of_dz(*ctx.saved_tensors, g_N / ctx.temperature, ctx.temperature):
            dh_NC += product(dz, weight[columns].to(dz.dtype))
            dW[columns] = product(dz.T, h_NC.to(dz.dtype))  # each row of dW is written once
        return dh_NC.type_as(h_NC), dW, None, None, None


def product(a, b):
    """a @ b, accumulated and returned in float32 (float64 of float64)."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return accurate(a) @ accurate(b)


def column_chunks(n_tokens, vocab_size, logits, multiple=64):
    """Slices of the vocabulary for which N tokens have about `logits` logits; a multiple of so many columns each."""
    width = max(logits // n_tokens // multiple, 1) * multiple
    return [slice(start, min(start + width, vocab_size)) for start in range(0, vocab_size, width)]


def chunked_logits(h_NC, weight, target_N, temperature):
    """For each chunk of the vocabulary: its columns, the logits z, and an index `at` of those targets that are in it.

    z[at] are the logits of these targets. All z share one buffer, which is faster than new memory for each.
    """
    h = accurate(h_NC)
    chunks = column_chunks(len(h), len(weight), CHUNK_LOGITS)
    buffer = h.new_empty(len(h) * chunks[0].stop)
    for columns in chunks:
        W = accurate(weight[columns])
        z = buffer[: len(h) * len(W)].view(len(h), len(W))
        torch.addmm(z, h, W.T, beta=0, alpha=1 / temperature, out=z)
        (rows,) = torch.where((target_N >= columns.start) & (target_N < columns.stop))
        yield columns, z, (rows, target_N[rows] - columns.start)


def chunked_statistics(h_NC, weight, target_N, temperature):
    """Maximum and sum are those of the columns so far (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
    top_N = torch.full_like(accurate(h_NC[:, 0]), -torch.inf)
    sum_N = torch.zeros_like(top_N)
    z_target_N = torch.zeros_like(top_N)
    for _, z, at in chunked_logits(h_NC, weight, target_N, temperature):
        z_target_N[at[0]] = z[at]
        higher_N = torch.maximum(top_N, z.amax(1))
        sum_N = sum_N * (top_N - higher_N).exp() + z.sub_(higher_N[:, None]).exp_().sum(1)
        top_N = higher_N
    return top_N, sum_N.log(), z_target_N


def chunked_dz(h_NC, weight, target_N, top_N, log_sum_N, g_N, temperature):
    """g_N is the upstream gradient / temperature, here and in triton_dz."""
    for columns, z, at in chunked_logits(h_NC, weight, target_N, temperature):
        dz = z.sub_(top_N[:, None]).sub_(log_sum_N[:, None]).exp_().mul_(-g_N[:, None])
        dz[at] += g_N[at[0]]
        yield columns, dz


# "triton": the same on a GPU, logits in registers. Triton comes with torch's CUDA wheels and is imported when it is
# first needed; its compiler, or its interpreter (TRITON_INTERPRET=1), then takes the place of these three functions.

tl = None  # triton.language
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Of a program, by the bytes of a number. On sm_90 no register spills, and with 2 bytes tensor cores are used
# (tests/test_triton.py compiles them). float32 is multiplied as it is, without tensor cores.
TILES = {
    2: dict(ROWS=128, COLUMNS=128, CHANNELS=64, num_warps=8, num_stages=4),
    4: dict(ROWS=64, COLUMNS=64, CHANNELS=32, num_warps=4, num_stages=2),
}
PROGRAMS = 264  # at least, so that few rows fill a GPU too: two for each processor of an H100 (not measured)
DZ_BYTES = 2**25  # of dz held at a time (not measured)


def logits_tile(h, W, rows, columns, N, C, end, scale, CHANNELS: tl.constexpr):
    """Logits of some rows and columns, accumulated in float32; columns from `end` on are -inf."""
    row_starts = rows.to(tl.int64)[:, None] * C
    column_starts = columns.to(tl.int64)[:, None] * C
    z = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        a = tl.load(h + row_starts + c, (rows < N)[:, None] & (c < C), 0.0)
        b = tl.load(W + column_starts + c, (columns < end)[:, None] & (c < C), 0.0)
        z = tl.dot(a, tl.trans(b), z, input_precision="ieee")
    return tl.where(columns < end, z * scale, -float("inf"))


def statistics_kernel(h, W, target, out, N, C, V, width, scale,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Of a tile of rows and a split of the columns: maximum, sum of exponentials, target's logit."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    end = tl.minimum(split * width + width, V)
    wanted = tl.load(target + rows, rows < N, -1)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    z_target = tl.zeros((ROWS,), tl.float32)
    for first in range(split * width, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        z = logits_tile(h, W, rows, columns, N, C, end, scale, CHANNELS)
        z_target += tl.sum(tl.where(columns[None, :] == wanted[:, None], z, 0.0), 1)
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        top = higher
    at = out + split.to(tl.int64) * 3 * N + rows
    tl.store(at, top, rows < N)
    tl.store(at + N, total, rows < N)
    tl.store(at + 2 * N, z_target, rows < N)


def dz_kernel(h, W, target, top, log_sum, g, dz, N, C, start, end, scale,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """dz of a tile, in columns from `start` to `end` of the vocabulary."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = start + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    z = logits_tile(h, W, rows, columns, N, C, end, scale, CHANNELS)
    wanted = tl.load(target + rows, rows < N, -1)
    top_R = tl.load(top + rows, rows < N)
    log_sum_R = tl.load(log_sum + rows, rows < N)
    g_R = tl.load(g + rows, rows < N)
    p = tl.exp((z - top_R[:, None]) - log_sum_R[:, None])
    out = tl.where(columns[None, :] == wanted[:, None], 1.0 - p, -p) * g_R[:, None]
    at = dz + rows.to(tl.int64)[:, None] * (end - start) + (columns - start)[None, :]
    tl.store(at, out.to(dz.dtype.element_ty), (rows < N)[:, None] & (columns < end)[None, :])


@functools.cache
def kernels():
    """(statistics_kernel, dz_kernel) for Triton. ImportError where it is not installed."""
    global tl, logits_tile
    import triton
    import triton.language as tl

    logits_tile = triton.jit(logits_tile)
    return triton.jit(statistics_kernel), triton.jit(dz_kernel)


@functools.cache
def why_no_triton(device, dtype):
    """Why impl="triton" cannot run for tensors of a dtype on a device: "" if it can. The kernels are tried once."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it has no {dtype}"
    if device != "cuda" and not INTERPRETED:
        return f"tensors are on the {device}, not on cuda"
    random = torch.Generator(device).manual_seed(0)
    h = torch.randn(150, 40, device=device, generator=random).to(dtype).requires_grad_()
    W = torch.randn(300, 40, device=device, generator=random).to(dtype).requires_grad_()
    g = torch.randn(150, device=device, generator=random)
    targets = torch.arange(150, device=device) * 2
    results = []
    try:  # so that "auto" never ends a run
        with torch.enable_grad():
            naive = linear_logp(h, W, targets, 0.8, "naive")
            for logp in (naive, RecomputedLogp.apply(h, W, targets, 0.8, "triton")):
                results.append((logp.detach(), *torch.autograd.grad(logp, (h, W), g)))
    except Exception as error:  # not installed, no compiler, too little shared memory, ...
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    for expected, found in zip(*results):
        if not (found.float() - expected.float()).norm() < 0.02 * expected.float().norm():
            return "its kernels disagree with naive on a small random input"
    return ""


def operands(h_NC, weight):
    """Both as the kernels take them, and their tiles. The interpreter multiplies bfloat16 wrongly: it gets float32."""
    dtype = torch.float32 if INTERPRETED else h_NC.dtype
    tile = TILES[h_NC.dtype.itemsize]
    return h_NC.to(dtype).contiguous(), weight.to(dtype).contiguous(), tile


def triton_statistics(h_NC, weight, target_N, temperature):
    """A program has a tile of rows and a split of the columns. The splits are merged here, in a fixed order."""
    h, W, tile = operands(h_NC, weight)
    (N, C), V = h.shape, len(W)
    tiles = math.ceil(N / tile["ROWS"])
    pieces = math.ceil(V / tile["COLUMNS"])
    width = math.ceil(pieces / min(math.ceil(PROGRAMS / tiles), pieces)) * tile["COLUMNS"]
    splits = math.ceil(V / width)
    out = torch.empty(splits, 3, N, device=h.device)
    kernels()[0][tiles, splits](h, W, target_N, out, N, C, V, width, 1 / temperature, **tile)
    top_SN, sum_SN, z_target_SN = out.unbind(1)
    top_N = top_SN.amax(0)
    sum_N = (sum_SN * (top_SN - top_N).exp()).sum(0)
    return top_N, sum_N.log(), z_target_SN.sum(0)


def triton_dz(h_NC, weight, target_N, top_N, log_sum_N, g_N, temperature):
    """DZ_BYTES of dz at a time, bfloat16 if h is, else float32: gradients of a mean are too small for float16."""
    h, W, tile = operands(h_NC, weight)
    N, C = h.shape
    dtype = torch.bfloat16 if h_NC.dtype == torch.bfloat16 else torch.float32
    for columns in column_chunks(N, len(W), DZ_BYTES // dtype.itemsize, tile["COLUMNS"]):
        width = columns.stop - columns.start
        dz = h.new_empty(N, width, dtype=dtype)
        grid = math.ceil(N / tile["ROWS"]), math.ceil(width / tile["COLUMNS"])
        sizes = N, C, columns.start, columns.stop, 1 / temperature
        kernels()[1][grid](h, W, target_N, top_N, log_sum_N, g_N, dz, *sizes, **tile)
        yield columns, dz
