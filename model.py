"""A decoder-only GPT in today's plain form, and sampling from it with a KV cache.

Block (pre-norm):   x = x + attn(norm(x));   x = x + mlp(norm(x));   h = norm(x);   logits = h Wᵀ
RMSNorm, rotary positions (Su et al. 2021, arXiv 2104.09864), bias-free linears, squared-ReLU MLP, torch's attention.

Padding is always on the right. A causal model never looks right, so training needs no attention mask and no position
ids, and a row's result cannot depend on how far it was padded. When sampling, row b keeps its tokens in cache columns
0..len_b-1, whatever the lengths of the others; what a longer row left to the right is masked until it is overwritten.

Dimension key: B sequences · P prompts · G samples a prompt (B = P·G) · T positions · S new positions · C channels ·
H heads · D channels a head · V vocabulary

Several processes (torchrun) each work on a share of the rows and add up what they find: see the end of this file.

Left out: dropout (old and new log-probs of RL must come from the same function), biases, grouped-query attention.
"""

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

COMPACT = 0.9  # sampling drops finished rows once fewer than this share are alive: then copying the cache pays


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # longest prompt + response
    n_layer: int
    n_head: int
    n_embd: int
    tied: bool = False  # the unembedding is the embedding matrix


class KVCache:
    """Keys and values of every layer: kv is (layers, 2, B, T, H, D), made for the prompts, then for their samples."""

    def __init__(self, cfg, B, T, device, dtype):
        self.kv = torch.zeros(cfg.n_layer, 2, B, T, cfg.n_head, cfg.n_embd // cfg.n_head, device=device, dtype=dtype)

    def expand(self, num_generations, T):
        """Each row num_generations times, adjacent, and room for T columns; only columns in use are copied."""
        L, _, B, used, H, D = self.kv.shape
        old, self.kv = self.kv, self.kv.new_zeros(L, 2, B * num_generations, T, H, D)
        self.kv.view(L, 2, B, num_generations, T, H, D)[:, :, :, :, :used] = old.unsqueeze(3)

    def keep(self, rows, end):
        """Only these rows, moved to the front of the same memory; columns from `end` on hold nothing yet."""
        self.kv[:, :, : len(rows), :end] = self.kv[:, :, :, :end].index_select(2, rows)
        self.kv = self.kv[:, :, : len(rows)]

    def write(self, layer, k, v, pos_BS, end):
        """Store k, v (B, S, H, D) at the columns pos_BS and return columns 0..end-1 of this layer."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        self.kv[layer, 0, rows, pos_BS] = k.to(self.kv.dtype)
        self.kv[layer, 1, rows, pos_BS] = v.to(self.kv.dtype)
        return self.kv[layer, 0, :, :end], self.kv[layer, 1, :, :end]


def rotate(x, rope):
    """Rotary embedding of x (B, S, H, D); rope = (cos, sin), each (B or 1, S, 1, D/2)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class ReluSquared(torch.autograd.Function):
    """relu(x)². Its gradient is 2 relu(x), from what is saved: half of the passes over memory that autograd takes."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return (grad * y).mul_(2)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.n_head = cfg.n_head
        self.norm_attn, self.norm_mlp = nn.RMSNorm(C), nn.RMSNorm(C)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.attn_out = nn.Linear(C, C, bias=False)
        self.mlp_in = nn.Linear(C, 4 * C, bias=False)
        self.mlp_out = nn.Linear(4 * C, C, bias=False)
        nn.init.zeros_(self.attn_out.weight)  # every block starts as the identity
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x, rope, past=None):
        """x (B, S, C). past, when sampling: (write, mask) — `write` stores k, v and returns all of them so far."""
        B, S, C = x.shape
        q, k, v = self.qkv(self.norm_attn(x)).view(B, S, 3, self.n_head, C // self.n_head).unbind(2)  # (B, S, H, D)
        q, k = rotate(q, rope), rotate(k, rope)
        if past is None:
            mask = None
        else:
            write, mask = past
            k, v = (t.type_as(q) for t in write(k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, ·, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, S, C))
        return x + self.mlp_out(ReluSquared.apply(self.mlp_in(self.norm_mlp(x))))


class GPT(nn.Module):
    """The trunk. All of its parameters are what the paper calls θ."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.norm_in, self.norm_out = nn.RMSNorm(cfg.n_embd), nn.RMSNorm(cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        # Small embeddings under pre-norm make the policy violently sensitive to each update; the norm after them and
        # rows of norm ≥ 1 do not. A tied matrix also makes the logits, which want unit variance: hence C^-0.5.
        nn.init.normal_(self.wte.weight, std=cfg.n_embd**-0.5 if cfg.tied else 1.0)
        nn.init.normal_(self.lm_head.weight, std=cfg.n_embd**-0.5)
        if cfg.tied:
            self.lm_head.weight = self.wte.weight
        self.reach(cfg.block_size)

    def reach(self, block_size):
        """Room for so many positions. No weight depends on it, but what is beyond the training's is unknown to them."""
        D, device = self.cfg.n_embd // self.cfg.n_head, self.wte.weight.device
        angle = torch.outer(torch.arange(block_size), 10000 ** (-torch.arange(0, D, 2) / D))  # (T, D/2)
        self.register_buffer("cos", angle.cos()[:, None].to(device), persistent=False)  # (T, 1, D/2)
        self.register_buffer("sin", angle.sin()[:, None].to(device), persistent=False)
        self.cfg.block_size = block_size

    def rope(self, T):
        """(cos, sin) of positions 0..T-1, shaped for `rotate`."""
        return self.cos[None, :T], self.sin[None, :T]

    def hidden(self, tokens_BT, cache=None, pos_BT=None, end=None):
        """Final hidden states (B, T, C), after the last norm: logits are h @ lm_head.weight.T.

        With a cache, tokens_BT are new tokens at positions pos_BT and attend to cache columns < end, up to their own.
        """
        x = self.norm_in(self.wte(tokens_BT))
        if cache is None:
            rope, mask = self.rope(tokens_BT.size(1)), None
        else:
            rope = self.cos[pos_BT], self.sin[pos_BT]
            mask = pos_BT[:, None, :, None] >= torch.arange(end, device=x.device)  # (B, 1, S, end)
        for i, block in enumerate(self.blocks):
            past = None if cache is None else (lambda k, v, i=i: cache.write(i, k, v, pos_BT, end), mask)
            x = block(x, rope, past)
        return self.norm_out(x)

    def logits(self, h):
        """Logits (..., V) in float32, under autocast too: bfloat16 ones would move log-probs by several hundredths."""
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.float(), self.lm_head.weight)

    def forward(self, tokens_BT):
        """Logits (B, T, V)."""
        return self.logits(self.hidden(tokens_BT))


def autocast(device):
    """bfloat16 on CUDA, float32 on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


class Samples(NamedTuple):
    """Right-padded sequences. mask and logp sit at the token they speak of; both are 0 on prompts and padding.

    h_BTC, if kept, is what `GPT.hidden` gives for each row's tokens but the last, which nobody continues.
    """

    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor  # True on sampled tokens, the end-of-sequence token included
    logp_BT: torch.Tensor  # float32 log-prob of each sampled token, at the temperature it was sampled with
    h_BTC: torch.Tensor | None = None

    def map(self, f):
        """f applied to each of the tensors."""
        return Samples(*(None if x is None else f(x) for x in self))


def pad(rows, device):
    """Lists of token ids -> right-padded (B, T) and lengths (B,)."""
    length_B = torch.tensor([len(row) for row in rows])
    tokens_BT = torch.zeros(len(rows), int(length_B.max()), dtype=torch.long)
    tokens_BT[torch.arange(tokens_BT.size(1)) < length_B[:, None]] = torch.tensor([t for row in rows for t in row])
    return tokens_BT.to(device), length_B.to(device)


def choose(logits_BV, temperature, u_B):
    """Next token and its log-prob. Temperature 0 is greedy; else the cumulative distribution is inverted at u < 1.

    One uniform number decides one token, so a row's sample depends on nothing else in its batch.
    """
    logp_BV = F.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_B = logp_BV.argmax(-1)
    else:
        cdf_BV = logp_BV.exp().cumsum(-1)
        u_B1 = (1 - u_B[:, None]) * cdf_BV[:, -1:]  # in (0, total]: never a token of probability 0
        token_B = torch.searchsorted(cdf_BV, u_B1).squeeze(-1)
    return token_B, logp_BV.gather(-1, token_B[:, None]).squeeze(-1)


def read_prompts(model, prompts, max_new_tokens):
    """Prompts, right-padded, with their lengths, hidden states (P, T, C) and KVCache. ValueError if they do not fit."""
    prompt_PT, length_P = pad(prompts, model.wte.weight.device)
    device, longest, size = prompt_PT.device, prompt_PT.size(1), model.cfg.block_size
    if longest + max_new_tokens > size:
        both = f"prompt of {longest} tokens + max_new_tokens {max_new_tokens} = {longest + max_new_tokens}"
        raise ValueError(f"{both} exceeds block_size {size}")
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    cache = KVCache(model.cfg, len(prompts), longest, device, dtype)
    h_PTC = model.hidden(prompt_PT, cache, torch.arange(longest, device=device).expand_as(prompt_PT), end=longest)
    return prompt_PT, length_P, h_PTC, cache


@torch.no_grad()
def generate(model, prompts, num_generations, max_new_tokens, eos, temperature=1.0, u_BR=None, keep_hidden=False):
    """num_generations samples of each prompt: Samples with B = P·G rows, those of a prompt adjacent.

    prompts is a list of token-id lists. Each is read once for all of its samples; finished rows leave the batch. u_BR:
    the uniform random numbers (B, max_new_tokens) that decide the tokens, drawn here if not given.
    Raises ValueError when a prompt and max_new_tokens do not fit in the model's block_size.
    """
    device, P, G, R = model.wte.weight.device, len(prompts), num_generations, max_new_tokens
    prompt_PT, length_P, h_PTC, cache = read_prompts(model, prompts, R)
    longest = prompt_PT.size(1)
    cache.expand(G, longest + R)

    tokens_BT = F.pad(prompt_PT, (0, R)).repeat_interleave(G, 0)
    h_BTC = F.pad(h_PTC, (0, 0, 0, R)).repeat_interleave(G, 0) if keep_hidden else None
    mask_BT, logp_BT = torch.zeros_like(tokens_BT, dtype=torch.bool), torch.zeros(tokens_BT.shape, device=device)
    u_BR = (torch.rand(P * G, R) if u_BR is None else u_BR).to(device)
    # of the rows still here: index, position of the next token, hidden state that predicts it, whether it is wanted
    row, pos = torch.arange(P * G, device=device), length_P.repeat_interleave(G)
    h_BC = h_PTC[torch.arange(P), length_P - 1].repeat_interleave(G, 0)
    alive = torch.ones_like(row, dtype=torch.bool)
    for step in range(R):
        token, logp = choose(model.logits(h_BC), temperature, u_BR[row, step])
        tokens_BT[row, pos], mask_BT[row, pos], logp_BT[row, pos] = token * alive, alive, logp * alive
        alive = alive & (token != eos)
        if step == R - 1 or not alive.any():
            break
        if alive.float().mean() < COMPACT:
            cache.keep(alive.nonzero().squeeze(1), end=longest + step)
            token, row, pos, alive = token[alive], row[alive], pos[alive], alive[alive]
        h_BC = model.hidden(token[:, None], cache, pos[:, None], end=longest + step + 1)[:, 0]
        if keep_hidden:
            h_BTC[row, pos] = h_BC
        pos = pos + 1
    end = int(mask_BT.any(0).nonzero().max()) + 1
    return Samples(tokens_BT, mask_BT, logp_BT, h_BTC).map(lambda x: x[:, :end])


# ----------------------------------------------------------------------------------------------------------------------
# Several processes. Without torch.distributed these are the identity: one process whose share is everything.


def world():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(n):
    """The slice of n things that this process works on. The shares of all processes are disjoint and cover 0..n-1."""
    rank, size = world()
    return slice(n * rank // size, n * (rank + 1) // size)


def total(x, op=dist.ReduceOp.SUM):
    """x, a tensor, summed over processes (or op=MAX), in place: the same bits on all of them."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def total_gradients(params):
    """Sum the gradients over processes. Losses are shares of one loss, so this is its gradient, not an average."""
    grads = [p.grad for p in params if p.grad is not None]
    if dist.is_initialized() and grads:
        flat = total(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


def gather(x):
    """[x of process 0, x of process 1, ...] for any x that pickles, its tensors on the CPU."""
    parts = [x]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, x)
    return parts
