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

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import Block

CHUNK_LOGITS = 2**22  # logits held at a time by impl="chunked": 16 MiB in float32
AUTO_LOGITS = 2**23  # "auto" is naive up to here: 32 MiB, above which glibc maps and faults in every temporary afresh


class Head(nn.Module):
    """One depth: hidden states (B, S, C) -> hidden states (B, S, C), ready for the unembedding."""

    def __init__(self, cfg, sequential):
        super().__init__()
        C = cfg.n_embd
        self.block, self.norm = Block(cfg), nn.RMSNorm(C)
        if sequential:
            self.norm_h, self.norm_e, self.proj = nn.RMSNorm(C), nn.RMSNorm(C), nn.Linear(2 * C, C, bias=False)

    def forward(self, h, emb, rope):
        x = h if emb is None else self.proj(torch.cat((self.norm_h(h), self.norm_e(emb)), dim=-1))
        return self.norm(self.block(x, rope))


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

    def score(rows, weight):
        h_NC = torch.cat([h[m] for h, m in zip(hiddens[rows], masks[rows])])
        return linear_logp(h_NC, weight, target_DBT[rows][mask_DBT[rows]], temperature, impl)

    flat_N = score(slice(0, 1), model.lm_head.weight)
    if heads:
        flat_N = torch.cat((flat_N, score(slice(1, None), W_heads)))
    logp_DBT = logp_DBT.masked_scatter(mask_DBT, flat_N)
    return logp_DBT[0], logp_DBT[1:], mask_DBT[1:], h_BTC


def pick_impl(impl, n_tokens, vocab_size):
    """The implementation that runs for N tokens and a vocabulary of V: `impl` itself unless it is "auto"."""
    return impl if impl != "auto" else "naive" if n_tokens * vocab_size <= AUTO_LOGITS else "chunked"


def linear_logp(h, weight, targets, temperature=1.0, impl="auto"):
    """log softmax(h @ weight.T / temperature)[targets], float32, with exact gradients for any upstream one per token.

    h (..., C), weight (V, C), targets (...) -> logp (...). impl: "naive" holds all (N, V) logits; "chunked" never
    more than CHUNK_LOGITS of them, and computes them again in the backward; "auto" picks by size (pick_impl).
    Logits, softmax and gradients are accumulated in float32 whatever the input's dtype. ValueError on another impl.
    """
    impl = pick_impl(impl, targets.numel(), weight.size(0))
    if impl not in ("naive", "chunked"):
        raise ValueError(f"impl: {impl!r} is not available here; allowed: auto, naive, chunked")
    with torch.autocast(h.device.type, enabled=False):
        h_NC, target_N = h.reshape(-1, h.size(-1)), targets.reshape(-1)
        if impl == "chunked":
            return ChunkedLogp.apply(h_NC, weight, target_N, temperature).view(targets.shape)
        z_NV = F.linear(_float(h_NC), _float(weight)) / temperature
        return F.log_softmax(z_NV, dim=-1).gather(-1, target_N[:, None]).view(targets.shape)


def _float(x):
    return x if x.dtype == torch.float64 else x.float()


class ChunkedLogp(torch.autograd.Function):
    """z = h Wᵀ / temperature; logp_i = z_i[target_i] - logsumexp(z_i). With p = softmax(z) and upstream g_i per token:

        dz_i = g_i (onehot(target_i) - p_i)        dh = dz W / temperature        dW = dzᵀ h / temperature

    Saved: h, W, targets and one logsumexp a token. FLOPs 8·N·C·V against 6·N·C·V of naive: the logits are made twice.
    """

    @staticmethod
    def forward(ctx, h_NC, weight, target_N, temperature):
        hf, W = _float(h_NC), _float(weight)
        lse_N, logp_N = hf.new_empty(len(hf)), hf.new_empty(len(hf))
        for rows, z in ChunkedLogp.chunks(hf, W, temperature):
            logp_N[rows] = z.gather(-1, target_N[rows, None]).squeeze(-1)
            top = z.amax(-1, keepdim=True)
            lse_N[rows] = z.sub_(top).exp_().sum(-1).log_() + top.squeeze(-1)
        ctx.save_for_backward(h_NC, weight, target_N, lse_N)
        ctx.temperature = temperature
        return logp_N - lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx, g_N):
        h_NC, weight, target_N, lse_N = ctx.saved_tensors
        hf, W = _float(h_NC), _float(weight)
        dh, dW = torch.empty_like(hf), torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        for rows, z in ChunkedLogp.chunks(hf, W, ctx.temperature):
            g = g_N[rows, None] / ctx.temperature
            dz = z.sub_(lse_N[rows, None]).exp_().mul_(-g)
            dz.scatter_add_(-1, target_N[rows, None], g)
            torch.mm(dz, W, out=dh[rows])
            if dW is not None:
                dW.addmm_(dz.T, hf[rows])
        return dh.type_as(h_NC), None if dW is None else dW.type_as(weight), None, None

    @staticmethod
    def chunks(hf, W, temperature):
        """(rows, their logits) for all rows; the logits share one buffer."""
        size = max(CHUNK_LOGITS // len(W), 1)
        buffer = hf.new_empty(min(size, len(hf)), len(W))
        for start in range(0, len(hf), size):
            rows = slice(start, min(start + size, len(hf)))
            z = torch.mm(hf[rows], W.T, out=buffer[: rows.stop - start])
            yield rows, z.div_(temperature)
