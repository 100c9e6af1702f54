"""A decoder-only GPT, and sampling from it with a KV cache.

Block (pre-norm):   x = x + attn(norm(x));   x = x + mlp(norm(x));   h = norm(x);   logits = h @ W.T
LayerNorm, learned positions, ReLU, no biases, torch's attention: fast on a CPU, and at this size as good as newer ones.

Padding is always on the right. A causal model never looks to the right, so training needs no attention mask, and a
row's result does not depend on how far it was padded. The cache has position t of each row in column t. A column that
holds padding is masked until a new token is written there.

Shift convention of every (B, T-1) array in this project: column t is about token t+1.

Dimension key: B sequences · P prompts · G samples per prompt (B = P·G) · T positions · S new positions · R new tokens ·
C channels · H heads · D channels per head · V vocabulary

Left out: dropout (old and new log-probs of RL must come from the same function), rotary positions, grouped queries.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # longest prompt + response
    n_layer: int
    n_head: int
    n_embd: int
    tied: bool = False  # the unembedding is the embedding matrix


class KVCache:
    """Keys and values of all blocks, kv (n_layer, 2, B, T, H, D), made when the first block writes."""

    def __init__(self, n_layer, T):
        self.n_layer, self.T, self.kv = n_layer, T, None

    def begin(self, B, pos_BS, end):
        """Before a pass of B rows over positions pos_BS: each sees the columns up to its own, all < end.

        Row indices and mask are the same in every block, so they are made here, once.
        """
        self.pos_BS, self.end = pos_BS, end
        self.row_B1 = torch.arange(B, device=pos_BS.device)[:, None]
        self.mask = pos_BS[:, None, :, None] >= torch.arange(end, device=pos_BS.device)

    def write(self, layer, kv):
        """Store the new kv (2, B, S, H, D) of one block and return all of its columns < end."""
        if self.kv is None:
            B, heads = kv.size(1), kv.shape[3:]
            self.kv = kv.new_zeros(self.n_layer, 2, B, self.T, *heads)
        self.kv[layer][:, self.row_B1, self.pos_BS] = kv
        return self.kv[layer][:, :, : self.end]

    def select(self, rows):
        """Keep these rows, in this order; a row may be named more than once."""
        self.kv = self.kv.index_select(2, rows)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.n_head = cfg.n_head
        self.norm_attn, self.norm_mlp = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.attn_out = nn.Linear(C, C, bias=False)
        self.mlp_in = nn.Linear(C, 4 * C, bias=False)
        self.mlp_out = nn.Linear(4 * C, C, bias=False)
        nn.init.zeros_(self.attn_out.weight)  # every block starts as the identity
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x, cache=None, layer=0):
        """x (B, S, C). With a KVCache, x is at the positions of its `begin`."""
        B, S, C = x.shape
        qkv = self.qkv(self.norm_attn(x)).view(B, S, 3, self.n_head, C // self.n_head)
        (q, k, v), mask = qkv.unbind(2), None
        if cache is not None:
            k, v = cache.write(layer, qkv[:, :, 1:].movedim(2, 0))
            mask = cache.mask
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, ·, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, S, C))
        return x + self.mlp_out(self.mlp_in(self.norm_mlp(x)).relu_())


class GPT(nn.Module):
    """The trunk. All of its parameters are what the paper calls θ."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.norm_in = nn.LayerNorm(cfg.n_embd, bias=False)
        self.norm_out = nn.LayerNorm(cfg.n_embd, bias=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        # Small embeddings under pre-norm make the policy violently sensitive to each update; rows of length ≥ 1, and
        # norm_in after them, avoid that. A tied matrix also makes the logits, whose variance should be 1: hence C^-0.5.
        std = cfg.n_embd**-0.5 if cfg.tied else 1.0
        nn.init.normal_(self.wte.weight, std=std)
        nn.init.normal_(self.wpe.weight, std=std)
        nn.init.normal_(self.lm_head.weight, std=cfg.n_embd**-0.5)
        if cfg.tied:
            self.lm_head.weight = self.wte.weight

    def hidden(self, tokens_BS, cache=None, pos_BS=None, end=None):
        """Final hidden states (B, S, C), after the last norm: logits are h @ lm_head.weight.T.

        The tokens are at positions pos_BS, by default 0, 1, .. S-1. With a KVCache see KVCache.begin.
        """
        if pos_BS is None:
            pos_BS = torch.arange(tokens_BS.size(1), device=tokens_BS.device)[None]
        if cache is not None:
            cache.begin(len(tokens_BS), pos_BS, end)
        x = self.norm_in(self.wte(tokens_BS) + self.wpe(pos_BS))
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        return self.norm_out(x)

    def logits(self, h):
        """Logits (..., V) in float32, under autocast too: bfloat16 ones would move log-probs by several hundredths."""
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.float(), self.lm_head.weight)

    def forward(self, tokens_BT):
        """Logits (B, T, V)."""
        return self.logits(self.hidden(tokens_BT))


def find_device(name):
    """Make a device the current one and return it; "auto" is cuda where there is one, else cpu.

    Under torchrun each process takes the GPU of its local rank before it touches any other. ValueError where the
    device cannot be used, or where there are more processes than GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if name == "cuda" and processes > gpus > 0:
        few = f"must be at most {gpus}, one per GPU; or add --device cpu"
        raise ValueError(f"--nproc_per_node {processes}: {few}")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = f"cannot be used here ({str(error).splitlines()[0]})"
        allowed = "allowed: auto, cpu, cuda:1, mps, ..."
        raise ValueError(f"--device {name}: {reason}; {allowed}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def matmul_dtype(device, channels):
    """bfloat16 on GPUs that compute in it (capability 8.0 or newer), else float32.

    Below 256 channels autocast adds casts and saves nothing.
    """
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if modern and channels >= 256 else torch.float32


def autocast(model):
    """For forward passes: matrix products in matmul_dtype. Norms, hence final hidden states, stay float32 on CUDA."""
    device = model.wte.weight.device
    low = matmul_dtype(device, model.cfg.n_embd) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


# ---- Sampling ------------------------------------------------------------------------------------


def pad(rows):
    """Lists of numbers -> right-padded (B, T)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def choose(logp_BV, temperature, u_B):
    """Next token (B,) from log-probs. Temperature 0 is greedy; else the cumulative distribution is inverted at 1 - u.

    One uniform number decides one token, so a row's sample depends on nothing else in its batch.
    """
    if temperature == 0:
        return logp_BV.argmax(-1)
    cdf_BV = logp_BV.exp().cumsum(-1)
    u_B1 = (1 - u_B[:, None]) * cdf_BV[:, -1:]  # in (0, total]: never a token of probability 0
    token_B = torch.searchsorted(cdf_BV, u_B1).squeeze(-1)
    return token_B.clamp(max=logp_BV.size(-1) - 1)  # of log-probs that are NaN, too


def width(mask_BT):
    """Columns of a mask up to its last True, 0 if there is none."""
    column = torch.arange(1, mask_BT.size(1) + 1, device=mask_BT.device)
    return int((mask_BT * column).max())


@torch.no_grad()
def generate(model, prompts, num_generations, max_new_tokens, eos, temperature=1.0, u_BR=None):
    """num_generations samples of each prompt; the rows of a prompt are adjacent.

    prompts is a list of token-id lists. u_BR: the uniform random numbers that decide the tokens, drawn here if None.
    Returns a dict of tokens (B, T), mask (B, T-1), True where token t+1 was sampled, its end included, and logp
    (B, T-1), its log-prob at this temperature, 0 off the mask.
    Raises ValueError when a prompt and max_new_tokens do not fit in the model's block_size.
    """
    device = model.wte.weight.device
    tokens_PT, length_P = pad(prompts).to(device), torch.tensor([*map(len, prompts)], device=device)
    longest = tokens_PT.size(1)
    room = longest + max_new_tokens
    if room > model.cfg.block_size:
        sizes = f"prompt of {longest} tokens + max_new_tokens {max_new_tokens} = {room}"
        raise ValueError(f"{sizes} exceeds block_size {model.cfg.block_size}")
    # Each prompt is read once for all of its samples.
    cache = KVCache(model.cfg.n_layer, room)
    h_PTC = model.hidden(tokens_PT, cache, end=longest)
    prompt_B = torch.arange(len(prompts), device=device).repeat_interleave(num_generations)
    cache.select(prompt_B)
    pos_B = length_P[prompt_B]  # where each row's next token goes
    h_BC = h_PTC[prompt_B, pos_B - 1]
    u_BR = torch.rand(len(prompt_B), max_new_tokens) if u_BR is None else u_BR
    u_BR = u_BR.to(device)
    tokens_BT = F.pad(tokens_PT[prompt_B], (0, max_new_tokens))
    mask_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    logp_BT = torch.zeros_like(tokens_BT, dtype=torch.float)
    row_B = torch.arange(len(prompt_B), device=device)
    alive_B = torch.ones_like(row_B, dtype=torch.bool)
    for i in range(max_new_tokens):  # here B are the rows still in the batch; row_B says which
        logits_BV = model.logits(h_BC) / (
            temperature or 1.0
        )  # greedy: log-probs as at temperature 1
        logp_BV = logits_BV.log_softmax(-1)
        token_B = choose(logp_BV, temperature, u_BR[row_B, i])
        # Tokens after a row's end are dropped.
        tokens_BT[row_B, pos_B] = token_B * alive_B
        mask_BT[row_B, pos_B] = alive_B
        logp_BT[row_B, pos_B] = logp_BV.gather(1, token_B[:, None])[:, 0] * alive_B
        alive_B = alive_B & (token_B != eos)
        alive = int(alive_B.sum())  # the only wait for the device in a pass
        if i == max_new_tokens - 1 or alive == 0:
            break
        # Rows that have ended leave together, once they are more than a fifth: leaving copies the cache.
        if alive < 0.8 * len(row_B):
            keep = alive_B.int().argsort(descending=True, stable=True)[:alive]
            cache.select(keep)
            token_B, row_B, pos_B, alive_B = token_B[keep], row_B[keep], pos_B[keep], alive_B[keep]
        h_BC = model.hidden(token_B[:, None], cache, pos_B[:, None], longest + i + 1)[:, 0]
        pos_B = pos_B + 1
    end = width(mask_BT)
    return {"tokens": tokens_BT[:, :end], "mask": mask_BT[:, 1:end], "logp": logp_BT[:, 1:end]}


# ---- Several processes. Without torch.distributed these are the identity: one process whose share is everything.


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
    """Sum the gradients over processes, in one message. Losses are shares of one loss, so this is its gradient."""
    grads = [p.grad for p in params if p.grad is not None]
    if dist.is_initialized():
        nn.utils.vector_to_parameters(total(nn.utils.parameters_to_vector(grads)), grads)


def gather(x):
    """[x of process 0, x of process 1, ...] for any x that pickles, its tensors on the CPU."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return parts
