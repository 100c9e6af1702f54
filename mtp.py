"""Multi-token-prediction (MTP) heads, and log-probs of tokens without holding the logits of all.

Head k = 1..K ("depth k") comes in two designs. All read the trunk through the same three doors: final hidden states h,
embedding rows emb, and the unembedding matrix W.

  sequential  h^k_t = norm(block_k(P_k [norm(h^{k-1}_t); norm(emb(token_{t+k}))])), h^0 = h
              (DeepSeek-V3 §2.2, arXiv 2412.19437)
  parallel    h^k_t = norm(block_k(h_t))  (Gloeckle et al. 2024, arXiv 2404.19737)
  both        logits of depth k at t = W h^k_t, a prediction of token t+1+k; depth 0 is the trunk's own next token

The shift convention, stated here once: column t of every (B, T-1) array is about token t+1, whoever predicts it. In
"8+5=31", where "31" is sampled ("=" is token 3, and 8+5 = 13 is written lowest digit first), the column of "1" is 4:

  token         8   +   5   =   3   1              scores token 5, which is "1", in column 4:
  position      0   1   2   3   4   5                trunk     from h_4, which has read 8+5=3
  column        -   0   1   2   3   4                depth 1   from h_3, which has read 8+5=, and from emb(3)
                                                     depth 2   from h_2, which has read 8+5, and from emb(=), emb(3)

So depth k in column t comes from position t-k. Sequential heads are told the k tokens between, parallel heads are not.
The first k columns of depth k are invalid. "Aligned" means: trunk and heads score the same token in a column.

Dimension key: B sequences · T positions · K depth · V vocabulary · C channels · N tokens
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

from model import GPT, Block, autocast
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

    def forward(self, h, emb):
        """The parallel design does not read emb."""
        if self.sequential:
            h = self.proj(torch.cat((self.norm_h(h), self.norm_e(emb)), dim=-1))
        return self.norm(self.block(h))


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


def build(shape, depth, design, seed, device):
    """Trunk and heads of a GPTConfig, initialised from a seed."""
    torch.manual_seed(seed)
    return GPT(shape).to(device), MTPHeads(shape, depth, design).to(device)


def aligned_mask(mask_BT, depth):
    """(B, K, T-1), True in the columns whose token counts and depth k can predict: all but the first k."""
    column = torch.arange(mask_BT.size(1), device=mask_BT.device)
    k = torch.arange(1, depth + 1, device=mask_BT.device)
    return mask_BT[:, None] & (column >= k[:, None])


def logprobs(model, heads, tokens_BT, mask_BT, temperature=1.0, impl="auto", lam=None):
    """Log-probs, under the trunk and under each head, of the tokens that count, aligned (see the top of this file).

    tokens_BT (B, T); mask_BT (B, T-1), True where token t+1 counts. lam is the λ of occ.scale_grad at the doors: how
    much of the heads' gradient enters the trunk (None: all of it). heads may be None: then K = 0.
    Returns logp_BT (B, T-1) and logp_BKT (B, K, T-1), both 0 where they score no token.
    """
    B, T = tokens_BT.shape
    W = model.lm_head.weight
    row_N, column_N = mask_BT.nonzero(as_tuple=True)
    target_N = tokens_BT[row_N, column_N + 1]
    with autocast(model):
        h_BTC = model.hidden(tokens_BT)
        if heads:
            h = scale_grad(h_BTC, lam)  # door 1: hidden states
            emb = scale_grad(model.wte(tokens_BT), lam)  # door 2: embedding rows
            h_BKTC = heads(h, emb)
    logp_N = linear_logp(h_BTC[row_N, column_N], W, target_N, temperature, impl)
    logp_BT = logp_N.new_zeros(B, T - 1).index_put((row_N, column_N), logp_N)
    if not heads:
        return logp_BT, logp_BT.new_zeros(B, 0, T - 1)
    K = h_BKTC.size(1)
    W = scale_grad(W, lam)  # door 3: unembedding
    h_NKC = h_BKTC.transpose(1, 2)[row_N, column_N]
    logp_NK = linear_logp(h_NKC, W, target_N[:, None].expand(-1, K), temperature, impl)
    logp_BTK = logp_N.new_zeros(B, T - 1, K).index_put((row_N, column_N), logp_NK)
    return logp_BT, logp_BTK.transpose(1, 2) * aligned_mask(mask_BT, K)


# ---- Speculative sampling: the heads draft, the trunk verifies (Leviathan et al. 2023, arXiv 2211.17192)


@torch.no_grad()
def speculative_sample(model, heads, prompt, max_new_tokens, eos, temperature=1.0):
    """One sample like those of model.generate, from the same distribution, in fewer passes of the trunk.

    prompt is a list of token ids. Random numbers come from torch's global generator. Returns (the new tokens, the depth
    of the head that drafted each, 0 where the trunk sampled it). For brevity there is no cache and no batch. It is
    exact: a draft from the head's q stays with probability min(1, p/q), p of the trunk, else one is drawn from
    max(p - q, 0), normalised; together that is p.
    """

    def distribution(h):
        logits = model.logits(h)
        if temperature == 0:  # all on the likeliest token
            return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
        return (logits / temperature).softmax(-1)

    device, K, n = model.wte.weight.device, len(heads.heads), len(prompt)
    h = model.hidden(torch.tensor([prompt], device=device))
    tokens = [*prompt, distribution(h[0, -1]).multinomial(1).item()]
    depths = [0]
    while len(depths) < max_new_tokens and eos not in tokens[n:]:
        # 1 draft: head k guesses the token k places after the last one
        drafts, q = [], []
        for k in range(1, min(K, max_new_tokens - len(depths)) + 1):
            ids = torch.tensor([[*tokens, *drafts, 0]], device=device)  # the 0 is not read
            emb = model.wte(ids)
            h_drafts = F.pad(h, (0, 0, 0, emb.size(1) - h.size(1)))
            q.append(distribution(heads(h_drafts, emb)[0, k - 1, -1]))
            drafts.append(q[-1].multinomial(1).item())
        # 2 verify: one pass of the trunk over the last token and all drafts
        h = model.hidden(torch.tensor([tokens + drafts], device=device))
        p = distribution(h[0, len(tokens) - 1 :])
        good = 0
        for draft, p_V, q_V in zip(drafts, p, q):
            if torch.rand(()).item() >= p_V[draft] / q_V[draft]:
                break
            good += 1
        # 3 keep the good drafts, and sample one token of the trunk
        rest = (p[good] - q[good]).clamp(min=0) if good < len(drafts) else p[good]
        rest = rest if rest.any() else p[good]  # they differed by rounding only
        tokens += [*drafts[:good], rest.multinomial(1).item()]
        depths += [*range(1, good + 1), 0]
        h = h[:, : len(tokens) - 1]
    new = tokens[n : n + max_new_tokens]
    end = new.index(eos) + 1 if eos in new else len(new)
    return new[:end], depths[:end]


# ---- log softmax(h W^T / temperature)[target], a number per token ----------------------------------


CHUNK_LOGITS = 2**22  # logits that RecomputedLogp holds at a time: 16 MiB
# Most logits for which "auto" is naive. Above these 32 MiB glibc maps every temporary anew (tests/bench.py --logp).
AUTO_LOGITS = 2**23


def pick_impl(impl, n_tokens, vocab_size, device):
    """The implementation that runs for N tokens and a vocabulary of V: `impl` itself unless it is "auto".

    ValueError if it cannot run on the device.
    """
    if impl not in ("auto", "naive", "chunked", "triton"):
        raise ValueError(f"--logp_impl {impl}: must be auto, naive, chunked or triton")
    if impl == "auto" and n_tokens * vocab_size <= AUTO_LOGITS:
        return "naive"
    if impl in ("naive", "chunked"):
        return impl
    why = why_no_triton(torch.device(device).type)
    if impl == "triton" and why:
        raise ValueError(f"--logp_impl triton: must be auto, naive or chunked here: {why}")
    return "chunked" if why else "triton"


def linear_logp(h, weight, targets, temperature=1.0, impl="auto"):
    """log softmax(h @ weight.T / temperature)[targets], differentiable, with any upstream gradient per token.

    h (..., C), weight (V, C), targets (...) from 0 to V-1 -> logp (...), in float32 (float64 of float64, without the
    kernels). impl: "naive" holds all (N, V) logits, "chunked" and "triton" about CHUNK_LOGITS; "auto" picks one.
    Raises ValueError on an impl that cannot run here and, on a CPU, on a target out of range; elsewhere to check it
    would make the host wait.
    """
    impl = pick_impl(impl, targets.numel(), len(weight), h.device)
    target_N = targets.reshape(-1)
    if h.device.type == "cpu":
        wrong_N = target_N[(target_N < 0) | (target_N >= len(weight))]
        if len(wrong_N):
            allowed = f"allowed: 0 to {len(weight) - 1}"
            raise ValueError(f"targets: {wrong_N[0].item()} is out of range; {allowed}")
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    h_NC, W = h.reshape(-1, h.size(-1)).to(dtype), weight.to(dtype)
    with torch.autocast(h.device.type, enabled=False):
        if impl == "naive" or target_N.numel() == 0:
            logp_N = -F.cross_entropy(F.linear(h_NC, W) / temperature, target_N, reduction="none")
        else:
            with_kernels = impl == "triton" and dtype == torch.float32
            logp_N = RecomputedLogp.apply(h_NC, W, target_N, temperature, with_kernels)
    return logp_N.view(targets.shape)


class RecomputedLogp(torch.autograd.Function):
    """logp_i = (z_i,target - top_i) - log_sum_i of logits z = h W^T / temperature that are never all in memory.

    top_i is the largest logit of token i, and log_sum_i = log Σ_v exp(z_iv - top_i). In this order no digits are lost
    to a large common offset of the logits. With p = exp((z - top) - log_sum) and any upstream gradient g_i a token,

        dz_iv = g_i ([v = target_i] - p_iv) / temperature        dh = dz W        dW = dz^T h

    Both directions go over chunks of the vocabulary. The backward makes z again: 8·N·C·V FLOPs in all, where "naive"
    takes 6·N·C·V. No atomics: the same bits each time. Within a chunk torch or Triton's kernels do the work.
    """

    @staticmethod
    def forward(ctx, h_NC, W, target_N, temperature, triton):
        statistics = triton_statistics if triton else chunk_statistics
        top_N = torch.full_like(h_NC[:, 0], -torch.inf)
        sum_N, z_target_N = torch.zeros_like(top_N), torch.zeros_like(top_N)
        for columns in column_chunks(len(h_NC), len(W)):
            # Maximum and sum are those of the columns so far (Milakov & Gimelshein 2018, arXiv 1805.02867).
            target_in_chunk_N = target_N - columns.start
            top, total, z_target = statistics(h_NC, W[columns], target_in_chunk_N, temperature)
            higher_N = torch.maximum(top_N, top)
            sum_N = sum_N * (top_N - higher_N).exp() + total * (top - higher_N).exp()
            z_target_N, top_N = z_target_N + z_target, higher_N
        ctx.save_for_backward(h_NC, W, target_N, top_N, sum_N.log())
        ctx.temperature, ctx.triton = temperature, triton
        return (z_target_N - top_N) - sum_N.log()

    @staticmethod
    @once_differentiable
    def backward(ctx, g_N):
        h_NC, W, target_N, top_N, log_sum_N = ctx.saved_tensors
        dz_of_chunk = triton_dz if ctx.triton else chunk_dz
        softmax = top_N, log_sum_N, g_N / ctx.temperature
        dh_NC, dW = torch.zeros_like(h_NC), torch.empty_like(W)
        for columns in column_chunks(len(h_NC), len(W)):
            target_in_chunk_N = target_N - columns.start
            dz = dz_of_chunk(h_NC, W[columns], target_in_chunk_N, softmax, ctx.temperature)
            dh_NC += dz @ W[columns]
            dW[columns] = dz.T @ h_NC  # each row of dW is written once
        return dh_NC, dW, None, None, None


def column_chunks(n_tokens, vocab_size):
    """Slices of the vocabulary for which N tokens have about CHUNK_LOGITS logits; at least 64 columns each."""
    width = max(CHUNK_LOGITS // n_tokens, 64)
    return [slice(start, min(start + width, vocab_size)) for start in range(0, vocab_size, width)]


# Two functions for a chunk of V columns, each in torch and in Triton. *_statistics: maximum, sum of exp(z - maximum),
# logit of the target if it is in the chunk, else 0; (N,) each. *_dz: dz (N, V), from softmax = (top, log_sum, upstream
# gradient / temperature).


def chunk_statistics(h_NC, W, target_N, temperature):
    z = F.linear(h_NC, W) / temperature
    inside_N = (target_N >= 0) & (target_N < len(W))
    z_target_N = z.gather(1, target_N.clamp(0, len(W) - 1)[:, None])[:, 0] * inside_N
    top_N = z.amax(1)
    return top_N, z.sub_(top_N[:, None]).exp_().sum(1), z_target_N


def chunk_dz(h_NC, W, target_N, softmax, temperature):
    top_N, log_sum_N, g_N = softmax
    z = F.linear(h_NC, W) / temperature
    dz = z.sub_(top_N[:, None]).sub_(log_sum_N[:, None]).exp_().mul_(-g_N[:, None])
    inside_N = (target_N >= 0) & (target_N < len(W))
    return dz.scatter_add_(1, target_N.clamp(0, len(W) - 1)[:, None], (g_N * inside_N)[:, None])


# The same on a GPU, logits in registers. Triton comes with torch's CUDA wheels. `kernels` imports it when it is first
# needed, and has it compile the next three functions (or interpret them, with TRITON_INTERPRET=1).

tl = None  # triton.language
# Sizes of a program's tile. No register spills on sm_90 (tests/test_triton.py compiles the kernels).
TILE = dict(ROWS=64, COLUMNS=64, CHANNELS=32, num_warps=4, num_stages=2)


def logits_tile(h, W, rows, columns, N, C, V, scale, CHANNELS: tl.constexpr):
    """Logits of some rows and columns, in float32 without tensor cores; columns from V on are -inf."""
    row_starts = rows.to(tl.int64)[:, None] * C
    column_starts = columns.to(tl.int64)[:, None] * C
    z = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        a = tl.load(h + row_starts + c, (rows < N)[:, None] & (c < C), 0.0)
        b = tl.load(W + column_starts + c, (columns < V)[:, None] & (c < C), 0.0)
        z = tl.dot(a, tl.trans(b), z, input_precision="ieee")
    return tl.where(columns < V, z * scale, -float("inf"))


def statistics_kernel(h, W, target, out, N, C, V, scale,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Statistics of a tile: of some rows and columns. out is (tiles of columns, 3, N)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    z = logits_tile(h, W, rows, columns, N, C, V, scale, CHANNELS)
    wanted = tl.load(target + rows, rows < N, -1)
    top = tl.max(z, 1)
    at = out + tl.program_id(1).to(tl.int64) * 3 * N + rows
    tl.store(at, top, rows < N)
    tl.store(at + N, tl.sum(tl.exp(z - top[:, None]), 1), rows < N)
    found = (columns[None, :] == wanted[:, None]) & (columns < V)[None, :]
    tl.store(at + 2 * N, tl.sum(tl.where(found, z, 0.0), 1), rows < N)


def dz_kernel(h, W, target, top, log_sum, g, dz, N, C, V, scale,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """dz of a tile."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    z = logits_tile(h, W, rows, columns, N, C, V, scale, CHANNELS)
    wanted = tl.load(target + rows, rows < N, -1)
    top_R = tl.load(top + rows, rows < N)
    log_sum_R = tl.load(log_sum + rows, rows < N)
    g_R = tl.load(g + rows, rows < N)
    p = tl.exp((z - top_R[:, None]) - log_sum_R[:, None])
    out = tl.where(columns[None, :] == wanted[:, None], 1.0 - p, -p) * g_R[:, None]
    at = dz + rows.to(tl.int64)[:, None] * V + columns[None, :]
    tl.store(at, out, (rows < N)[:, None] & (columns < V)[None, :])


@functools.cache
def kernels():
    """(statistics_kernel, dz_kernel) for Triton. ImportError where it is not installed."""
    global tl, logits_tile
    import triton
    import triton.language as tl

    logits_tile = triton.jit(logits_tile)
    return triton.jit(statistics_kernel), triton.jit(dz_kernel)


@functools.cache
def why_no_triton(device):
    """Why impl="triton" cannot run on a type of device: "" if it can. The kernels are tried once."""
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on the {device}, not on cuda"
    random = torch.Generator(device).manual_seed(0)
    h = torch.randn(150, 40, device=device, generator=random)
    W = torch.randn(300, 40, device=device, generator=random)
    targets, results = torch.arange(150, device=device) * 2, []
    try:  # so that "auto" never ends a run
        for triton in (False, True):
            with torch.enable_grad():
                inputs = h.clone().requires_grad_(), W.clone().requires_grad_()
                logp = RecomputedLogp.apply(*inputs, targets, 0.8, triton)
                results.append((logp.detach(), *torch.autograd.grad(logp, inputs, h[:, 0])))
    except Exception as error:  # not installed, no compiler, too little shared memory, ...
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    for expected, got in zip(*results):
        if not (got - expected).norm() < 1e-3 * expected.norm():
            return "its kernels disagree with chunked on a small random input"
    return ""


def launch(kernel, tensors, h_NC, W, target_N, temperature):
    """Run a kernel on all tiles of a chunk."""
    (N, C), V = h_NC.shape, len(W)
    grid = math.ceil(N / TILE["ROWS"]), math.ceil(V / TILE["COLUMNS"])
    inputs = h_NC.contiguous(), W.contiguous(), target_N.contiguous()
    kernel[grid](*inputs, *tensors, N, C, V, 1 / temperature, **TILE)


def triton_statistics(h_NC, W, target_N, temperature):
    out = h_NC.new_empty(math.ceil(len(W) / TILE["COLUMNS"]), 3, len(h_NC))
    launch(kernels()[0], [out], h_NC, W, target_N, temperature)
    top_SN, sum_SN, z_target_SN = out.unbind(1)
    top_N = top_SN.amax(0)
    return top_N, (sum_SN * (top_SN - top_N).exp()).sum(0), z_target_SN.sum(0)


def triton_dz(h_NC, W, target_N, softmax, temperature):
    dz = h_NC.new_empty(len(h_NC), len(W))
    launch(kernels()[1], [*softmax, dz], h_NC, W, target_N, temperature)
    return dz
