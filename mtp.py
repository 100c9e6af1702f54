"""Multi-token-prediction (MTP) heads, and the log-probs of tokens without the logits of all of them.

Two designs of head, depth k = 1..K, all reading the trunk through the same three things: final hidden states h,
embedding rows, and the unembedding matrix W.
  sequential  h^k_t = norm(block_k(P_k [norm(h^{k-1}_t); norm(emb(token_{t+k}))])), h^0 = h
              (DeepSeek-V3 §2.2, arXiv 2412.19437)
  parallel    h^k_t = norm(block_k(h_t))  (Gloeckle et al. 2024, arXiv 2404.19737)
  both        logits of depth k at t = W h^k_t, a prediction of token t+1+k; depth 0 is the trunk's own next token

The shift convention, stated here once. Column t of every (B, T-1) array speaks of token t+1, whoever predicts it:
  main      column t comes from hidden state t
  depth k   column t comes from position t-k, which saw tokens ≤ t-k and, if sequential, the embeddings of t-k+1..t;
            so columns 0..k-1 are invalid. "Aligned" means: main and MTP log-probs in a column score the same token.

Dimension key: B sequences · T positions · K depth · V vocabulary · C channels · N tokens

Differs: rotary positions of depth k are t, not t+k; attention only sees their differences, which are the same.
"""

from __future__ import annotations  # the kernels' name types of Triton, which is imported later

import contextlib
import dataclasses
import functools
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import COMPACT, Block, KVCache, Samples, choose, read_prompts

CHUNK_LOGITS = 2**22  # logits held at a time by impl="chunked": 16 MiB in float32 (64 columns at least)
# "auto" is naive up to so many logits: 32 MiB, above which glibc maps and faults in every temporary afresh. Chunked
# over naive on two CPU cores (eval.py bench --logp): 0.99 at (N, C, V) = (65536, 128, 64), which is half of that, 0.85
# at (16384, 128, 576), just above, 0.67 at (16384, 128, 1024), 0.43 at (8192, 256, 50304).
AUTO_LOGITS = 2**23
DZ_BYTES = 2**25  # of dz held at a time by impl="triton" (not measured: no GPU was at hand)


class Head(nn.Module):
    """One depth: hidden states (B, S, C) -> hidden states (B, S, C), ready for the unembedding."""

    def __init__(self, cfg, sequential):
        super().__init__()
        C = cfg.n_embd
        self.block, self.norm = Block(cfg), nn.RMSNorm(C)
        if sequential:
            self.norm_h, self.norm_e, self.proj = nn.RMSNorm(C), nn.RMSNorm(C), nn.Linear(2 * C, C, bias=False)

    def forward(self, h, emb, rope, past=None):
        x = h if emb is None else self.proj(torch.cat((self.norm_h(h), self.norm_e(emb)), dim=-1))
        return self.norm(self.block(x, rope, past))


class MTPHeads(nn.Module):
    """K heads. Their parameters are what the paper calls φ; the trunk's never register here."""

    def __init__(self, cfg, depth, design="sequential"):
        super().__init__()
        self.sequential = design == "sequential"
        self.heads = nn.ModuleList(Head(cfg, self.sequential) for _ in range(depth))

    def forward(self, h_BTC, emb_BTC, rope):
        """Hidden states of each depth: item k-1 is (B, T-1-k, C), position i predicting token i+1+k.

        The loss of a depth also trains the sequential heads below it, as in DeepSeek-V3.
        """
        T, out = h_BTC.size(1), []
        for k, head in enumerate(self.heads, start=1):
            prev = out[-1] if self.sequential and out else h_BTC
            S = max(T - 1 - k, 0)
            emb = emb_BTC[:, k : k + S] if self.sequential else None
            out.append(head(prev[:, :S], emb, tuple(t[:, :S] for t in rope)))
        return out


def aligned_masks(mask_BT, depth):
    """For each depth 1..depth, the masked columns whose token it can predict: all but the first k."""
    column = torch.arange(mask_BT.size(1), device=mask_BT.device)
    return [mask_BT & (column >= k) for k in range(1, depth + 1)]


def logprobs(model, heads, tokens_BT, mask_BT, temperature=1.0, impl="auto", door=lambda x: x, watch=None, h_BTC=None):
    """Log-probs of the masked tokens under the trunk and under each head, aligned (see the top of this file).

    tokens_BT (B, T); mask_BT (B, T-1), True where token t+1 counts. `door` is applied to each of the three trunk
    tensors that the heads read; occ.scale_grad there decides how much of the MTP gradient enters the trunk. `watch`, if
    given, is applied to what trunk and heads read behind the doors, all at once (occ.hidden_watch).
    Returns logp_BT (B, T-1), logp_KBT and mask_KBT (K, B, T-1), 0 and False outside the mask, and h_BTC.
    heads may be None: then K = 0. Given h_BTC, the trunk is not run again, and logp_BT is 0.
    """
    run_trunk, depths, W_heads = h_BTC is None, [], None
    if run_trunk:
        h_BTC = model.hidden(tokens_BT)
    if heads:
        reads = [h_BTC, *(door(x) for x in (h_BTC, model.wte(tokens_BT), model.lm_head.weight))]
        h_BTC, h_heads, emb, W_heads = watch(*reads) if watch else reads
        depths = heads(h_heads, emb, model.rope(tokens_BT.size(1)))
    masks = [mask_BT & run_trunk, *aligned_masks(mask_BT, len(depths))]
    S = mask_BT.size(1)  # position i -> column i+k; a sequence may be too short for a depth to have any
    hiddens = [h_BTC[:, :S], *(F.pad(h, (0, 0, k, 0))[:, :S] for k, h in enumerate(depths, 1))]
    mask_DBT = torch.stack(masks)  # D = 1+K: the trunk, then the depths
    target_DBT = tokens_BT[:, 1:].expand(mask_DBT.shape)
    logp_DBT = torch.zeros(mask_DBT.shape, device=h_BTC.device)

    parts = [h[m] for h, m in zip(hiddens, masks)]
    h_NC = torch.cat(parts)
    rest = (len(parts[0]), W_heads) if heads else None  # one pass over W; the heads' gradient passes its door
    flat_N = linear_logp(h_NC, model.lm_head.weight, target_DBT[mask_DBT], temperature, impl, rest)
    logp_DBT = logp_DBT.masked_scatter(mask_DBT, flat_N)
    return logp_DBT[0], logp_DBT[1:], mask_DBT[1:], h_BTC


# ----------------------------------------------------------------------------------------------------------------------
# Speculative sampling: the heads draft, the trunk verifies (Leviathan et al. 2023, arXiv 2211.17192)


def accepts(log_p_BKV, log_q_BKV, draft_BK, temperature, u_BK):
    """(B, K) whether each draft would be accepted if those before it are: with probability min(1, p/q), which together
    with `after_rejection` gives exactly p; at temperature 0 if it is what the trunk would have said."""
    if temperature == 0:
        return draft_BK == log_p_BKV.argmax(-1)
    log_p_BK, log_q_BK = (x.gather(-1, draft_BK[..., None]).squeeze(-1) for x in (log_p_BKV, log_q_BKV))
    return u_BK < (log_p_BK - log_q_BK).exp()


def after_rejection(log_p_BV, log_q_BV):
    """Log of the residual max(p - q, 0), not normalised; of p where nothing is left, or where q is 0 throughout."""
    residual_BV = (log_p_BV.exp() - log_q_BV.exp()).clamp(min=0)
    return torch.where(residual_BV.sum(-1, keepdim=True) > 0, residual_BV.log(), log_p_BV)


class Speculator:
    """Samples like model.generate, from the same distribution, in fewer passes of the trunk.

    A round: head 1 drafts a token from the trunk's last state and the last token, head k the k-th; beyond the last head
    (sequential ones only), that one goes on by itself, its own output in the place of the state below it. The trunk
    reads the last token and all drafts in one pass, drafts are accepted from the left, and one more token comes out of
    the trunk. No cache is rewound: a query sees the columns up to its own position, and those that were written for
    rejected drafts are written again before they are seen. Head k at position i has read tokens up to i+k; so when
    the last token is n, and was at least n-K-1 a round ago, the states of head k from n-K-k on may be of rejected
    drafts: all heads make those of n-K-D..n-1 again (K drafts, D heads).
    """

    def __init__(self, heads, drafts):
        self.heads, self.drafts, self.depth = heads, drafts, min(drafts, len(heads.heads))
        if not heads.sequential and drafts > self.depth:
            raise ValueError(f"--speculative {drafts}: must be at most --mtp_depth {self.depth} with parallel heads")
        self.counts = torch.zeros(drafts + 3)  # drafts of each depth that came out; rounds, their tokens; first tokens

    def metrics(self, total=lambda x: x):
        """Since the last call: spec/accept_rate_k, the share of rounds whose k-th draft came out; spec/accept_len,
        tokens a round, the trunk's own included; spec/tokens_per_call, the same with the prompts' passes and the tokens
        that these gave."""
        *accepted, rounds, tokens, firsts = total(self.counts).tolist()
        self.counts = torch.zeros_like(self.counts)
        rates = {f"spec/accept_rate_{k}": n / max(rounds, 1) for k, n in enumerate(accepted, 1)}
        calls = rounds + firsts
        return rates | {"spec/accept_len": tokens / max(rounds, 1),
                        "spec/tokens_per_call": (tokens + firsts) / max(calls, 1)}  # fmt: skip

    @torch.no_grad()
    def generate(self, model, prompts, num_generations, max_new_tokens, eos, temperature, u_BR3, keep_hidden=False):
        """Arguments and result of model.generate, but for three uniform numbers a token: for its draft, for accepting
        it, and for sampling it otherwise. A number may be read again in a later round, but only if all that it decided
        before was thrown away: the distribution is the trunk's. A sample depends on nothing else in its batch."""
        G, R, K, D = num_generations, max_new_tokens, self.drafts, self.depth
        prompt_PT, length_P, h_PTC, cache = read_prompts(model, prompts, R)
        (P, longest), device = prompt_PT.shape, prompt_PT.device
        T, own = longest + R, KVCache(dataclasses.replace(model.cfg, n_layer=D), P, longest, device, cache.kv.dtype)
        tokens, row = F.pad(prompt_PT, (0, R + K + 1)), torch.arange(P, device=device)
        states = F.pad(h_PTC, (0, 0, 0, R)).expand(D + 1, -1, -1, -1).clone()  # of trunk and heads, a row and position

        def head(k, below, pos, end):  # states of head k at some positions of the rows still here
            emb = model.wte(tokens[row[:, None], pos + k]) if self.heads.sequential else None
            seen = pos[:, None, :, None] >= torch.arange(end, device=device)
            past = (lambda key, value: own.write(k - 1, key, value, pos, end)), seen
            return self.heads.heads[k - 1](below, emb, (model.cos[pos], model.sin[pos]), past)

        def head_of_states(k, pos, end):
            h = head(k, states[k - 1 if self.heads.sequential else 0, row[:, None], pos], pos, end)
            states[k, row[:, None], pos] = h.float()
            return h

        for k in range(1, D + 1):  # each prompt once; its last k positions are made again, when their tokens are known
            head_of_states(k, torch.arange(longest, device=device).expand_as(prompt_PT), longest)
        cache.expand(G, T)
        own.expand(G, T)
        tokens, states = tokens.repeat_interleave(G, 0), states.repeat_interleave(G, 1)
        mask, logp = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape, device=device)
        u, j = u_BR3.to(device), torch.arange(K + 1, device=device)

        # of the rows still here: index, position of the first token and of the last one so far, whether it is wanted
        row, first = torch.arange(P * G, device=device), length_P.repeat_interleave(G)
        n, alive = first.clone(), torch.ones_like(row, dtype=torch.bool)
        tokens[row, n], logp[row, n] = choose(model.logits(states[0, row, n - 1]), temperature, u[row, 0, 2])
        mask[row, n] = True
        alive = (tokens[row, n] != eos) & (R > 1)
        self.counts[-1] += len(row)
        while alive.any():
            if alive.float().mean() < COMPACT:
                end = int(n.max())
                for some in (cache, own):
                    some.keep(alive.nonzero().squeeze(1), end=end)
                row, first, n, alive = row[alive], first[alive], n[alive], alive[alive]
            end, log_q = min(int(n.max()) + K + 1, T), []
            window = (n[:, None] + torch.arange(-K - D, 0, device=device)).clamp(min=0)
            uniform = lambda offset, which: u[row, (n + offset - first).clamp(max=R - 1), which]
            for k in range(1, K + 1):  # draft
                if k <= D:
                    h = head_of_states(k, window, end)[:, -1:]
                else:
                    h = head(D, h, (n + k - D - 1).clamp(max=T - 1)[:, None], end)
                log_q.append(F.log_softmax(model.logits(h[:, 0]) / (temperature or 1.0), -1))
                tokens[row, n + k], _ = choose(log_q[-1], temperature and 1.0, uniform(k, 0))
            at = row[:, None], n[:, None] + 1 + j  # where the new tokens go
            pos = (n[:, None] + j).clamp(max=T - 1)  # beyond it nobody reads on: the limit comes first
            h = model.hidden(tokens[row[:, None], n[:, None] + j], cache, pos, end)  # verify
            states[0, row[:, None], pos] = h.float()
            log_p, log_q = F.log_softmax(model.logits(h) / (temperature or 1.0), -1), torch.stack(log_q, 1)
            draft, here = tokens[at][:, :K], torch.arange(len(row), device=device)
            u_accept = torch.stack([uniform(k, 1) for k in range(1, K + 1)], 1)
            good = accepts(log_p[:, :K], log_q, draft, temperature, u_accept).long().cumprod(1)
            a = good.sum(1)
            log_q = F.pad(log_q, (0, 0, 0, 1), value=-torch.inf)  # nobody drafts the last one
            last, _ = choose(log_p[here, a] if temperature == 0 else after_rejection(log_p[here, a], log_q[here, a]),
                             temperature and 1.0, uniform(a + 1, 2))  # fmt: skip
            new = torch.where(j == a[:, None], last[:, None], F.pad(draft, (0, 1)))
            kept = (j <= a[:, None]) & (at[1] < (first + R)[:, None]) & alive[:, None]
            ended = (new == eos) & kept
            kept &= ended.long().cumsum(1) - ended.long() == 0  # up to an end, which is kept
            tokens[at], mask[at] = new * kept, kept
            logp[at] = log_p.gather(-1, new[..., None]).squeeze(-1) * kept
            made = kept.sum(1)
            came_out = (good.bool() & kept[:, :K]).sum(0)
            self.counts[:-1] += torch.cat((came_out, alive.sum()[None], made.sum()[None])).cpu()
            n = n + made
            alive = alive & ~(ended & kept).any(1) & (n + 1 < first + R)
        end = int(mask.any(0).nonzero().max()) + 1
        h_BTC = states[0] if keep_hidden else None
        return Samples(tokens, mask, logp, h_BTC).map(lambda x: x[:, :end])


# ----------------------------------------------------------------------------------------------------------------------
# log softmax(h Wᵀ / temperature)[target], a number a token: RecomputedLogp has the mathematics


def pick_impl(impl, n_tokens, vocab_size, device="cpu", dtype=torch.float32):
    """The implementation that runs for N tokens and a vocabulary of V: `impl` itself unless it is "auto"."""
    if impl != "auto":
        return impl
    if torch.device(device).type == "cuda" and dtype != torch.float64 and not why_no_triton("cuda"):
        return "triton"
    return "naive" if n_tokens * vocab_size <= AUTO_LOGITS else "chunked"


def linear_logp(h, weight, targets, temperature=1.0, impl="auto", rest=None, entropy=False):
    """log softmax(h @ weight.T / temperature)[targets], float32, with exact gradients for any upstream one per token.

    h (..., C), weight (V, C), targets (...) from 0 to V-1 -> logp (...). impl: "naive" holds all (N, V) logits;
    "chunked" about CHUNK_LOGITS of them (64 columns at least); "triton" none in the forward, in the backward DZ_BYTES
    of dz, and computes in the dtype of h (bfloat16, float16 or float32); "auto" picks one (pick_impl).
    rest: (n, weight_rest): rows from n on are scored by weight_rest, the same numbers as weight, and what they say
    about the weight becomes its gradient: one pass over W, two gradients. h then is (N, C). entropy: return (logp,
    entropy) instead, the latter (...) in nats and without a gradient. ValueError on an impl that cannot run here.
    """
    impl = pick_impl(impl, targets.numel(), weight.size(0), h.device, h.dtype)
    if impl not in ("naive", "chunked", "triton"):
        raise ValueError(f"impl: {impl!r} is unknown; allowed: auto, naive, chunked, triton")
    if impl == "triton" and (why := why_no_triton(h.device.type, h.dtype)):
        raise ValueError(f"impl: 'triton' cannot run here: {why}; allowed: auto, naive, chunked")
    split, weight_rest = rest or (targets.numel(), weight)
    with torch.autocast(h.device.type, enabled=False):
        h_NC, target_N = h.reshape(-1, h.size(-1)), targets.reshape(-1)
        if impl == "naive":
            z_NV = [F.linear(_float(rows), _float(W)) / temperature
                    for rows, W in ((h_NC[:split], weight), (h_NC[split:], weight_rest))]  # fmt: skip
            log_p_NV = torch.cat(z_NV).log_softmax(-1) if rest else z_NV[0].log_softmax(-1)
            logp_N, entropy_N = log_p_NV.gather(-1, target_N[:, None]), None
            if entropy:
                entropy_N = -(log_p_NV.exp() * log_p_NV).detach().sum(-1)
        else:
            logp_N, entropy_N = RecomputedLogp.apply(
                h_NC, weight, weight_rest, split, target_N, temperature, impl, entropy
            )
    logp = logp_N.view(targets.shape)
    return (logp, entropy_N.view(targets.shape)) if entropy else logp


def _float(x):
    return x if x.dtype == torch.float64 else x.float()


def _mm(a, b):
    """a @ b, accumulated and returned in float32 (float64 of float64)."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return _float(a) @ _float(b)


def _add_mm(total, a, b):
    """total += a @ b, the same."""
    return total.addmm_(a, b) if a.dtype == b.dtype == total.dtype else total.add_(_mm(a, b))


class RecomputedLogp(torch.autograd.Function):
    """logp_i = z_i,target - lse_i of logits z = h Wᵀ / T that are never all there, lse_i = log Σ_v exp z_iv.

    With p = exp(z - lse) and any upstream gradient g_i a token, ∂logp_i/∂z_iv = [v = target_i] - p_iv, hence

        dz_iv = g_i ([v = target_i] - p_iv) / T        dh = dz W        dW = dzᵀ h

    FLOPs: z, dh and dW take 2·N·C·V each. Held are h, W, targets and lse; the backward makes z again, some columns of V
    at a time: 8·N·C·V where "naive", which holds z, p and dz, takes 6·N·C·V. Bytes held: 3·N·V·4 there; here a chunk,
    4·CHUNK_LOGITS or DZ_BYTES, and dh in float32. Bytes moved at least: (N·C + V·C) numbers in, twice, and out, once;
    the chunks' z and dz pass through the cache, and on a GPU dz through memory, 2·N·V numbers. With C in the hundreds
    the products outweigh all of it.

    Rows with g = 0 have no gradient and are left out of the backward: exact, and it saves in proportion; on a GPU the
    host waits there for their number, and nowhere else. No atomics: the same bits each time. z, p, lse and all sums are
    float32 whatever h is; only dz of the Triton path is rounded, to bfloat16 where h is, for the tensor cores. The two
    implementations differ in who makes the statistics of z, and dz.
    """

    @staticmethod
    def forward(ctx, h_NC, weight, weight_rest, split, target_N, temperature, impl, entropy):
        statistics = triton_statistics if impl == "triton" else chunked_statistics
        lse_N, z_N, mean_z_N = statistics(h_NC, weight, target_N, temperature, entropy)
        ctx.save_for_backward(h_NC, weight, target_N, lse_N)
        ctx.split, ctx.temperature, ctx.impl, ctx.two = split, temperature, impl, split < len(h_NC)
        entropy_N = lse_N - mean_z_N
        ctx.mark_non_differentiable(entropy_N)
        return z_N - lse_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, g_N, _):
        h_NC, weight, target_N, lse_N = ctx.saved_tensors
        rows = g_N.nonzero().squeeze(1)  # the host of a GPU waits here, for how many there are
        h_RC, target_R, lse_R, g_R = (x[rows] for x in (h_NC, target_N, lse_N, g_N))
        split = int((rows < ctx.split).sum())
        wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[2] and ctx.two
        dWs = [torch.empty_like(weight) if yes else None for yes in wanted]
        dh_RC = torch.zeros_like(_float(h_RC))
        dz_of = triton_dz if ctx.impl == "triton" else chunked_dz
        for columns, dz in dz_of(h_RC, weight, target_R, lse_R, g_R / ctx.temperature, ctx.temperature):
            _add_mm(dh_RC, dz, weight[columns].to(dz.dtype))
            for part, dW in zip((slice(0, split), slice(split, None)), dWs):
                if dW is not None:
                    dW[columns] = _mm(dz[part].T, h_RC[part].to(dz.dtype))
        dh_NC = torch.zeros_like(h_NC).index_copy_(0, rows, dh_RC.type_as(h_NC))
        return dh_NC, *dWs, None, None, None, None, None


# "chunked": torch alone. Columns, not rows, are what is cut: each row of dW is then written once.


def columns_of(n_tokens, vocab_size, logits, least=64):
    """Slices of the vocabulary for which N rows have about `logits` logits: a multiple of `least` columns."""
    width = max(logits // max(n_tokens, 1) // least, 1) * least
    return [slice(a, min(a + width, vocab_size)) for a in range(0, vocab_size, width)]


def chunked_logits(h_NC, weight, temperature):
    """(columns, their logits), one chunk after the other in one buffer."""
    h, chunks = _float(h_NC), columns_of(len(h_NC), len(weight), CHUNK_LOGITS)
    buffer = h.new_empty(len(h) * (chunks[0].stop - chunks[0].start))
    for columns in chunks:
        W = _float(weight[columns])
        z = buffer[: len(h) * len(W)].view(len(h), len(W))
        yield columns, torch.addmm(z, h, W.T, beta=0, alpha=1 / temperature, out=z)


def at_target(target_N, columns):
    """For each row the column of its target within a chunk (any, if it is in another), and whether it is in this."""
    local = target_N - columns.start
    last = columns.stop - columns.start - 1
    return local.clamp(0, last)[:, None], (local >= 0) & (local <= last)


def chunked_statistics(h_NC, weight, target_N, temperature, entropy):
    """lse, the target's logit, and (if entropy) the mean logit under p, (N,) each, in one pass: the maximum and the sum
    of exponentials are those of the columns so far (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
    new = _float(h_NC).new_zeros
    top_N, sum_N, target_z_N, mean_N = new(len(h_NC)) - torch.inf, new(len(h_NC)), new(len(h_NC)), new(len(h_NC))
    for columns, z in chunked_logits(h_NC, weight, temperature):
        local, here = at_target(target_N, columns)
        target_z_N += torch.where(here, z.gather(1, local).squeeze(1), 0)
        top = torch.maximum(top_N, z.amax(1))
        shrink = (top_N - top).exp_()
        shifted = z.sub_(top[:, None])
        e = shifted.exp() if entropy else shifted.exp_()
        if entropy:
            mean_N = mean_N * shrink + (e * shifted).sum(1) + top * e.sum(1)
        sum_N, top_N = sum_N * shrink + e.sum(1), top
    return top_N + sum_N.log(), target_z_N, mean_N / sum_N


def chunked_dz(h_RC, weight, target_R, lse_R, g_R, temperature):
    """(columns, dz) of all columns; g_R is the upstream gradient over the temperature."""
    for columns, z in chunked_logits(h_RC, weight, temperature):
        local, here = at_target(target_R, columns)
        dz = z.sub_(lse_R[:, None]).exp_().mul_(-g_R[:, None])
        yield columns, dz.scatter_add_(1, local, (g_R * here)[:, None])


# "triton": the same on a GPU, logits in registers. Triton comes with torch's CUDA wheels and is imported when it is
# first needed; its compiler, or its interpreter (TRITON_INTERPRET=1), then takes the place of these three functions.

tl = None  # triton.language
# Of a program, by the bytes of a number. On sm_90, with C a multiple of 16, no register spills, and with 2 bytes tensor
# cores are used (tests/test_triton.py compiles them). float32 is multiplied as it is, without tensor cores, in tiles
# that fit into the shared memory of smaller GPUs.
TILES = {2: dict(ROWS=128, COLUMNS=128, CHANNELS=64), 4: dict(ROWS=64, COLUMNS=64, CHANNELS=32)}
LAUNCH = {2: dict(num_warps=8, num_stages=4), 4: dict(num_warps=4, num_stages=2)}
# at least, so that few rows fill a GPU too, their columns split: two for each processor of an H100, not measured
PROGRAMS = 264


def logits_tile(h, W, rows, columns, N, C, end, scale, UPCAST: tl.constexpr, CHANNELS: tl.constexpr):
    """Logits of some rows and columns, accumulated in float32; columns from `end` on are -inf."""
    z = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        a = tl.load(h + rows.to(tl.int64)[:, None] * C + c, (rows < N)[:, None] & (c < C), 0.0)
        b = tl.load(W + columns.to(tl.int64)[:, None] * C + c, (columns < end)[:, None] & (c < C), 0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, tl.trans(b), z, input_precision="ieee")
    return tl.where(columns < end, z * scale, -float("inf"))


def statistics_kernel(h, W, target, out, N, C, V, width, scale, ENTROPY: tl.constexpr, UPCAST: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Of a tile of rows and a split of the columns: maximum, sum of exponentials, target's logit, sum of e·z."""
    tiles = tl.cdiv(N, ROWS)
    split = tl.program_id(0) // tiles
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    wanted = tl.load(target + rows, rows < N, -1)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total, target_z, mean = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    end = tl.minimum(split * width + width, V)
    for first in range(split * width, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        z = logits_tile(h, W, rows, columns, N, C, end, scale, UPCAST, CHANNELS)
        target_z += tl.sum(tl.where(columns[None, :] == wanted[:, None], z, 0.0), 1)
        higher = tl.maximum(top, tl.max(z, 1))
        e, shrink = tl.exp(z - higher[:, None]), tl.exp(top - higher)
        total = total * shrink + tl.sum(e, 1)
        if ENTROPY:
            mean = mean * shrink + tl.sum(tl.where(columns[None, :] < end, e * z, 0.0), 1)
        top = higher
    at = out + split.to(tl.int64) * 4 * N + rows
    tl.store(at, top, rows < N)
    tl.store(at + N, total, rows < N)
    tl.store(at + 2 * N, target_z, rows < N)
    tl.store(at + 3 * N, mean, rows < N)


def dz_kernel(h, W, target, lse, g, dz, N, C, start, end, scale, UPCAST: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """dz of a tile, in columns from `start` to `end` of the vocabulary."""
    tiles = tl.cdiv(N, ROWS)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    columns = start + tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    z = logits_tile(h, W, rows, columns, N, C, end, scale, UPCAST, CHANNELS)
    wanted, lse_R, g_R = (
        tl.load(target + rows, rows < N, -1),
        tl.load(lse + rows, rows < N),
        tl.load(g + rows, rows < N),
    )
    p = tl.exp(z - lse_R[:, None])
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


def interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_triton(device, dtype=torch.float32):
    """Why impl="triton" cannot run for tensors on a device: "" if it can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it has no {dtype}"
    if device != "cuda" and not interpreted():
        return f"tensors are on the {device}, not on cuda"
    try:
        kernels()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return ""


def launch(kernel, programs, h_NC, *args, **flags):
    """Run a kernel on so many programs. Its interpreter multiplies bfloat16 wrongly: there, tiles are upcast first."""
    where = torch.cuda.device(h_NC.device) if h_NC.is_cuda else contextlib.nullcontext()
    with where:
        size = h_NC.element_size()
        try:
            kernel[(programs,)](h_NC, *args, UPCAST=interpreted(), **flags, **TILES[size], **LAUNCH[size])
        except Exception as error:  # no compiler, too little shared memory, ...
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"impl: 'triton' failed on this machine ({said}); choose naive or chunked") from error


def triton_statistics(h_NC, weight, target_N, temperature, entropy):
    """As chunked_statistics. Splits of the columns are merged here, in a fixed order."""
    (N, C), V = h_NC.shape, len(weight)
    if N == 0:
        return torch.zeros(3, 0, device=h_NC.device)
    tile = TILES[h_NC.element_size()]
    tiles, pieces = -(-N // tile["ROWS"]), -(-V // tile["COLUMNS"])
    width = -(-pieces // min(-(-PROGRAMS // tiles), pieces)) * tile["COLUMNS"]
    splits = -(-V // width)
    out = torch.empty(splits, 4, N, device=h_NC.device)
    h, W = h_NC.contiguous(), weight.to(h_NC.dtype).contiguous()
    launch(
        kernels()[0], tiles * splits, h, W, target_N.contiguous(), out, N, C, V, width, 1 / temperature, ENTROPY=entropy
    )
    top, total, target_z, mean = out.unbind(1)
    share = (top - top.amax(0)).exp()
    total_N = (total * share).sum(0)
    return top.amax(0) + total_N.log(), target_z.sum(0), (mean * share).sum(0) / total_N


def triton_dz(h_RC, weight, target_R, lse_R, g_R, temperature):
    """As chunked_dz, about DZ_BYTES of dz at a time: bfloat16 if h is, else float32, because gradients of a mean over
    many tokens are too small for float16."""
    (R, C), h, W, tile = h_RC.shape, h_RC.contiguous(), weight.to(h_RC.dtype).contiguous(), TILES[h_RC.element_size()]
    dtype = torch.bfloat16 if h.dtype == torch.bfloat16 else torch.float32
    chunks = columns_of(R, len(W), DZ_BYTES // dtype.itemsize, tile["COLUMNS"])
    buffer = h.new_empty(R * (chunks[0].stop - chunks[0].start), dtype=dtype)
    for columns in chunks:
        n = columns.stop - columns.start
        dz = buffer[: R * n].view(R, n)
        programs = -(-R // tile["ROWS"]) * -(-n // tile["COLUMNS"])
        if programs:
            args = target_R.contiguous(), lse_R, g_R.float(), dz, R, C, columns.start, columns.stop, 1 / temperature
            launch(kernels()[1], programs, h, W, *args)
        yield columns, dz
