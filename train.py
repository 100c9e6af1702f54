"""Train: pretrain a small GPT with MTP heads, then reinforcement learning in one of the regimes of occ.py.

    python train.py                                    # OCC on six suites of arithmetic, minutes on a laptop CPU
    python train.py --regime detach --seed 1           # the baseline; pretraining is shared by all regimes of a seed
    python train.py --resume out/arithmetic-occ-s0     # go on after an interruption, to the same numbers

The loop is the paper's algorithm (arXiv 2605.28184 §4), with θ the trunk, φ the heads, and losses = -objectives:

    sample with π_old;  A = advantage(rewards);  for each minibatch:  δ = log π - log π_old for the trunk and the heads
    λ_t = λ₊ <δ_RL, δ_MTP> / (‖δ_MTP‖² + ε);    θ -= η (∇ loss_rl + λ_t ∇ loss_mtp);    φ -= η ∇ loss_mtp     (η: Adam's)

A run is a folder: metrics.jsonl (first line: config, seed, commit, versions, device), ckpt.pt, samples.txt, curves.png.
Every random number is derived from (seed, purpose, step), so a resumed run needs no generator states.

Dimension key: B sequences · P prompts · G samples a prompt (B = P·G) · T positions · K MTP depth

Left out: learning-rate schedules and weight decay in RL, gradient accumulation, a value network.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from tqdm import tqdm

import mtp
import occ
import rl
from model import GPT, GPTConfig, pad

VERSION = 1  # of the run folder's format


CHOICES = {
    "tokenizer": ("bytes", "gpt2"),
    "regime": tuple(occ.REGIMES),
    "algo": tuple(rl.ALGOS),
    "occ_proxy": ("logprob", "hidden"),
    "occ_average": ("sums", "ratios"),
    "mtp_base": ("mtp", "main"),
    "lam_scope": ("trunk", "all"),
    "advantage": (None, "group_std", "group", "loo", "batch"),
    "loss_agg": (None, "token", "sequence", "constant"),
    "mtp_design": ("sequential", "parallel"),
    "logp_impl": ("auto", "naive", "chunked"),
    "device": ("auto", "cpu", "cuda"),
}
POSITIVE = (
    "difficulty steps lr prompts_per_step num_generations updates_per_rollout max_new_tokens temperature grad_clip "
    "n_layer n_head n_embd mtp_depth pretrain_batch pretrain_lr save_every eval_every eval_problems eval_k"
).split()
NOT_NEGATIVE = (
    "seed careless pretrain_steps pretrain_lam probe_every clip_eps_low clip_eps_high dual_clip kl_coef"
).split()


@dataclass
class Config:
    # what is learned
    task: str = "arithmetic"  # all six suites, or a comma list of add, sub, mul, mod, chain, linear
    difficulty: int = 2  # digits of the operands
    careless: float = 0.8  # share of careless solutions in the second half of pretraining
    tokenizer: str = "bytes"  # bytes or gpt2
    seed: int = 0  # of everything random
    # reinforcement learning
    regime: str = "occ"  # off, detach, ce, policy, occ or exact: what the heads learn and what reaches the trunk
    algo: str = "dapo"  # reinforce, grpo, drgrpo, dapo or gspo
    steps: int = 200  # rollouts
    lr: float = 3e-4  # of Adam, for trunk and heads
    prompts_per_step: int = 32  # prompts a rollout
    num_generations: int = 8  # samples a prompt
    updates_per_rollout: int = 4  # minibatches a rollout is cut into, one update each
    max_new_tokens: int = 16  # longest response
    temperature: float = 1.0  # of sampling, and of every log-prob
    grad_clip: float = 1.0  # largest gradient norm, of the trunk and of the heads apart
    # the coefficient of the MTP loss
    lam: float = 1.0  # lambda of the regimes ce and policy
    lam_plus: float = 1.0  # scale of lambda_t in the regimes occ and exact
    occ_proxy: str = "logprob"  # logprob (the paper) or hidden (gradients at the hidden states)
    occ_average: str = "sums"  # sums: one ratio of sums (the paper), or ratios: mean of per-token ratios (released code)
    mtp_base: str = "mtp"  # old log-prob that the heads are compared with: mtp (their own) or main (released code)
    lam_scope: str = "trunk"  # what lambda scales: trunk, or all: the heads' own learning instead (released code)
    # one detail of the algorithm changed; by default what --algo says
    advantage: str | None = None  # group_std, group, loo or batch
    loss_agg: str | None = None  # token, sequence or constant
    clip_eps_low: float | None = None  # the ratio is clipped at 1 - this
    clip_eps_high: float | None = None  # and at 1 + this
    dual_clip: float | None = None  # bound on the loss of a token with negative advantage, in advantages
    kl_coef: float | None = None  # weight of the KL to the frozen base
    dynamic_sampling: bool | None = None  # replace prompts whose samples all have the same reward
    overlong: bool | None = None  # punish responses that come near max_new_tokens
    # model
    n_layer: int = 4  # blocks of the trunk
    n_head: int = 4  # attention heads
    n_embd: int = 64  # channels
    tied: bool = False  # one matrix for embedding and unembedding
    mtp_depth: int = 1  # MTP heads
    mtp_design: str = "sequential"  # sequential (DeepSeek-V3) or parallel (Gloeckle et al.)
    logp_impl: str = "auto"  # how log-probs are computed: auto, naive or chunked
    # pretraining
    pretrain_steps: int = 600  # batches of solutions
    pretrain_batch: int = 256  # solutions a batch
    pretrain_lr: float = 3e-3  # of AdamW; Muon has 7 times this
    pretrain_lam: float = 0.3  # weight of the MTP loss, in the trunk too, over the last third of pretraining
    # the run
    out: str = ""  # folder of the run; by default out/<task>-<regime>-s<seed>
    cache_dir: str = "out/base"  # pretrained models, by a hash of what determines them
    save_every: int = 50  # steps between checkpoints
    eval_every: int = 25  # steps between evaluations
    eval_problems: int = 32  # held-out problems a suite
    eval_k: int = 8  # samples a problem
    probe_every: int = 10  # steps between measurements of the exact c and v2; 0 is never
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            _check(getattr(self, name) in allowed, name, getattr(self, name), f"one of {', '.join(map(str, allowed))}")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float):
                _check(value == value and abs(value) != float("inf"), f.name, value, "a finite number")
        for name in POSITIVE:
            _check(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        for name in NOT_NEGATIVE:
            _check((getattr(self, name) or 0) >= 0, name, getattr(self, name), "0 or above")
        _check(0 <= self.careless <= 1, "careless", self.careless, "a share from 0 to 1")
        _check(1 <= self.difficulty <= 8, "difficulty", self.difficulty, "1 to 8")
        _check(self.n_embd % (2 * self.n_head) == 0, "n_embd", self.n_embd, f"a multiple of 2·n_head = {2 * self.n_head}")
        _check(self.prompts_per_step >= self.updates_per_rollout, "updates_per_rollout", self.updates_per_rollout,
               f"at most prompts_per_step = {self.prompts_per_step}")  # fmt: skip
        grouped = self.algorithm().advantage != "batch"
        _check(self.num_generations > 1 or not grouped, "num_generations", self.num_generations,
               "2 or more, for an advantage relative to the group (1 only with --advantage batch)")  # fmt: skip
        rl.suites_of(self.task)
        rl.get_tokenizer(self.tokenizer)
        self.out = self.out or f"out/{self.task.replace(',', '+')}-{self.regime}-s{self.seed}"

    def algorithm(self):
        changed = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(rl.Algo)}
        changed["ratio"] = None  # names no flag
        return dataclasses.replace(rl.ALGOS[self.algo], **{k: v for k, v in changed.items() if v is not None})


def _check(ok, name, value, allowed):
    if not ok:
        raise ValueError(f"--{name} {value}: must be {allowed}")


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


def autocast(device):
    """bfloat16 on CUDA, float32 on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def build(cfg, tok, device):
    """The trunk and its heads, initialised from the seed."""
    torch.manual_seed(cfg.seed)
    longest = max(len(tok.encode_ordinary(p.prompt)) for s in rl.suites_of(cfg.task)
                  for p in rl.held_out_problems(s, cfg.difficulty, 8))  # fmt: skip
    shape = GPTConfig(tok.n_vocab, 0, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.tied)
    shape.block_size = -(-(longest + 2 + cfg.max_new_tokens) // 8) * 8
    return GPT(shape).to(device), mtp.MTPHeads(shape, cfg.mtp_depth, cfg.mtp_design).to(device)


def pretraining_batch(cfg, tok, step):
    """Solutions as tokens_BT and mask_BT (B, T-1), True where token t+1 is part of the solution or its end."""
    rng = random.Random(f"{cfg.seed}/pretrain/{step}")
    careless = cfg.careless if step >= cfg.pretrain_steps / 2 else 0.0
    stream = rl.problem_stream(rl.suites_of(cfg.task), cfg.difficulty, rng, careless=careless)
    problems = list(itertools.islice(stream, cfg.pretrain_batch))
    prompts = tok.encode_ordinary_batch([p.prompt for p in problems], num_threads=1)
    solutions = tok.encode_ordinary_batch([p.solution for p in problems], num_threads=1)
    tokens_BT, length_B = pad([p + s + [tok.eot_token] for p, s in zip(prompts, solutions)], "cpu")
    first_B = torch.tensor([len(p) for p in prompts])
    t = torch.arange(1, tokens_BT.size(1))
    return tokens_BT, (t >= first_B[:, None]) & (t < length_B[:, None])


def pretrain(cfg, tok, model, heads, device, stop):
    """Next-token prediction of solutions: careful ones first, so that the skill is learnt, then the mixture.

    The heads join for the last third. Muon for the matrices inside the blocks, AdamW for the rest. Steps are few and
    the result is shared by all regimes of a seed, so an interruption starts it again.
    """
    modules = [model, heads]
    named = [(name, p) for module in modules for name, p in module.named_parameters()]
    matrices = [p for name, p in named if p.ndim == 2 and "wte" not in name and "lm_head" not in name]
    others = [p for name, p in named if not any(p is q for q in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=7 * cfg.pretrain_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=cfg.pretrain_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    base_lr = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    bar = tqdm(range(cfg.pretrain_steps), "pretrain", disable=None)
    for step in bar:
        for optimizer, lr in zip(optimizers, base_lr):
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * max(0.05, 1 - step / cfg.pretrain_steps)
            optimizer.zero_grad()
        tokens_BT, mask_BT = (x.to(device) for x in pretraining_batch(cfg, tok, step))
        joined = heads if step >= cfg.pretrain_steps * 2 / 3 else None
        with autocast(device):
            logp_BT, logp_KBT, mask_KBT, _ = mtp.logprobs(model, joined, tokens_BT, mask_BT, impl=cfg.logp_impl)
        loss = -logp_BT.sum() / mask_BT.sum()
        total = loss - cfg.pretrain_lam * logp_KBT.sum() / mask_KBT.sum().clamp(min=1)
        total.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if stop.requested:
            raise KeyboardInterrupt


def pretrained(cfg, tok, device, stop):
    """A model and heads after pretraining, from the cache if all that determines them is the same: data, sizes, code."""
    model, heads = build(cfg, tok, device)
    names = [f.name for f in dataclasses.fields(Config) if f.name.startswith(("pretrain_", "n_", "mtp_d"))]
    names += ["task", "difficulty", "careless", "tokenizer", "seed", "tied", "max_new_tokens"]
    code = [Path(inspect.getfile(module)).read_text() for module in (sys.modules["model"], mtp, rl)]
    code += [inspect.getsource(f) for f in (build, pretraining_batch, pretrain)]
    what = json.dumps([VERSION, torch.__version__, device.type, code, {name: getattr(cfg, name) for name in names}])
    path = Path(cfg.cache_dir) / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt"
    if path.exists():
        with contextlib.suppress(Exception):  # a damaged cache is made again
            saved = torch.load(path, map_location=device, weights_only=True)
            model.load_state_dict(saved["model"])
            heads.load_state_dict(saved["heads"])
            return model, heads
    pretrain(cfg, tok, model, heads, device, stop)
    save_atomically({"model": model.state_dict(), "heads": heads.state_dict()}, path)
    return model, heads


# ----------------------------------------------------------------------------------------------------------------------
# The run folder


def save_atomically(state, path):
    """Write a whole new file beside the old one, then take its name: a reader or a crash sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """The folder of one run: metrics.jsonl and samples.txt, which only grow, and ckpt.pt, which says how far they count."""

    def __init__(self, cfg):
        self.dir = Path(cfg.out)
        self.files = {name: open(self.dir / name, "a", encoding="utf-8") for name in ("metrics.jsonl", "samples.txt")}
        self.start = time.perf_counter()

    @classmethod
    def create(cls, cfg, device):
        folder = Path(cfg.out)
        if (folder / "metrics.jsonl").exists():
            raise ValueError(f"--out {folder}: holds a run already; go on with --resume {folder}, or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(cfg)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "nanoocc": VERSION}
        run.log({"config": dataclasses.asdict(cfg), "seed": cfg.seed, "commit": _commit(), "versions": versions,
                 "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"})  # fmt: skip
        return run

    def log(self, record):
        self.files["metrics.jsonl"].write(json.dumps(record) + "\n")
        self.files["metrics.jsonl"].flush()

    def show(self, step, examples):
        """Prompts, completions and rewards, for people."""
        lines = [f"step {step}  reward {reward:5.2f}  {prompt!r} -> {text!r}\n" for prompt, text, reward in examples]
        self.files["samples.txt"].write("".join(lines) + "\n")

    def save(self, state):
        """A checkpoint, with the sizes that the growing files have now."""
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())
        sizes = {name: (self.dir / name).stat().st_size for name in self.files}
        save_atomically({**state, "version": VERSION, "sizes": sizes, "seconds": self.seconds()}, self.dir / "ckpt.pt")

    def rewind(self, ckpt):
        """Cut the growing files back to where the checkpoint was made (to the header, if there is none)."""
        header = len((self.dir / "metrics.jsonl").open("rb").readline())
        sizes = ckpt["sizes"] if ckpt else {"metrics.jsonl": header, "samples.txt": 0}
        for name, size in sizes.items():
            if (self.dir / name).stat().st_size < size:
                raise ValueError(f"{self.dir / name}: shorter than when {self.dir / 'ckpt.pt'} was written ({size} bytes)")
            os.truncate(self.dir / name, size)
        self.start -= ckpt["seconds"] if ckpt else 0

    def seconds(self):
        return time.perf_counter() - self.start


def _commit():
    """The commit of this code, "+" added when files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_run(folder):
    """(config, checkpoint or None) of a run folder. Raises ValueError, in one line, on anything that is not a whole run."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder}: not a run: it has no metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            header = json.loads(f.readline())
        version, values = header["versions"]["nanoocc"], header["config"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}:1: not the header of a run (expected config, seed, commit, versions, device)") from None
    unknown = set(values) ^ {f.name for f in dataclasses.fields(Config)}
    if version != VERSION or unknown:
        raise ValueError(f"{path}:1: a run of another version ({version}, here {VERSION}; "
                         f"settings that differ: {', '.join(sorted(unknown)) or 'none'})")  # fmt: skip
    cfg = Config(**{**values, "out": str(folder)})
    path = Path(folder) / "ckpt.pt"
    if not path.exists():
        return cfg, None
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        found = ckpt["version"]
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if found != VERSION:
        raise ValueError(f"{path}: a checkpoint of version {found}; this is version {VERSION}")
    return cfg, ckpt


def load_run(folder, device):
    """Config, tokenizer, model and heads (None without MTP) of a run's last checkpoint, for evaluation."""
    cfg, ckpt = read_run(folder)
    if ckpt is None:
        raise ValueError(f"{folder}: the run has no checkpoint yet; finish it with python train.py --resume {folder}")
    tok = rl.get_tokenizer(cfg.tokenizer)
    model, heads = build(cfg, tok, device)
    load_state(ckpt, model, heads if ckpt["heads"] else None, folder)
    return cfg, tok, model.eval(), heads if ckpt["heads"] else None


def load_state(ckpt, model, heads, folder):
    try:
        model.load_state_dict(ckpt["model"])
        if heads:
            heads.load_state_dict(ckpt["heads"])
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{Path(folder) / 'ckpt.pt'}: its weights do not fit the sizes in its config") from None


class Stop:
    """Turns the first Ctrl-C into a request that is met at the end of a step; a second one is the usual exception."""

    requested = False

    def __enter__(self):
        with contextlib.suppress(ValueError):  # signals belong to the main thread
            self.before = signal.signal(signal.SIGINT, self.on_signal)
        return self

    def on_signal(self, *_):
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, self.before)


# ----------------------------------------------------------------------------------------------------------------------
# Reinforcement learning


class Minibatch(NamedTuple):
    """What one update sees. (B, T-1) arrays follow the shift convention of mtp.py: column t speaks of token t+1."""

    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor
    adv_B: torch.Tensor
    logp_old_BT: torch.Tensor
    logp_ref_BT: torch.Tensor  # of the frozen base; zeros without KL
    logp_old_KBT: torch.Tensor  # of each head, aligned
    weight_BT: torch.Tensor | None = None  # what each token counts in loss_rl
    weight_KBT: torch.Tensor | None = None  # and in the loss of each head

    def rows(self, index):
        """The same for some of the sequences."""
        pick = {n: x[:, index] if n.endswith("_KBT") else x[index] for n, x in self._asdict().items() if x is not None}
        return Minibatch(**pick)


@torch.no_grad()
def score(model, heads, samples, adv_B, cfg, reference):
    """A rollout as one Minibatch: old log-probs of the trunk come with the samples, those of the heads are made here.

    Also returns mtp/agreement_k: the share of sampled tokens that a speculative sampler drafting from head k would
    accept, sum_v min(p_v, q_v), estimated without bias by the mean of min(1, q/p) over tokens sampled from p.
    """
    mask_BT, logp_old_BT = samples.mask_BT[:, 1:], samples.logp_BT[:, 1:]
    rest = (cfg.temperature, cfg.logp_impl)
    stats, logp_KBT, logp_ref_BT = {}, logp_old_BT.new_zeros(0, *mask_BT.shape), torch.zeros_like(logp_old_BT)
    if heads:
        _, logp_KBT, mask_KBT, _ = mtp.logprobs(model, heads, samples.tokens_BT, mask_BT, *rest)
        accepted_KBT = (logp_KBT - logp_old_BT).exp().clamp(max=1) * mask_KBT
        shares = accepted_KBT.sum((1, 2)) / mask_KBT.sum((1, 2)).clamp(min=1)
        stats = {f"mtp/agreement_{k}": share for k, share in enumerate(shares.tolist(), 1)}
    if reference:
        logp_ref_BT = mtp.logprobs(reference, None, samples.tokens_BT, mask_BT, *rest)[0]
    return Minibatch(samples.tokens_BT, mask_BT, adv_B, logp_old_BT, logp_ref_BT, logp_KBT), stats


def minibatches(batch, cfg, algo):
    """The rollout cut into updates_per_rollout parts, whole groups in each (fewer parts if there are fewer groups)."""
    P = len(batch.adv_B) // cfg.num_generations
    for part in torch.arange(len(batch.adv_B)).view(P, -1).tensor_split(min(cfg.updates_per_rollout, P)) if P else ():
        mb = batch.rows(part.flatten())
        agg = algo.loss_agg if occ.REGIMES[cfg.regime].objective == "policy" else "token"
        masks = mtp.aligned_masks(mb.mask_BT, len(mb.logp_old_KBT))
        weights = [rl.token_weights(mask_BT, agg, cfg.max_new_tokens) for mask_BT in masks]
        weight_BT = rl.token_weights(mb.mask_BT, algo.loss_agg, cfg.max_new_tokens)
        yield mb._replace(weight_BT=weight_BT, weight_KBT=torch.stack(weights) if weights else mb.logp_old_KBT)


class Losses(NamedTuple):
    rl: torch.Tensor
    mtp: torch.Tensor  # mean over depths
    delta_rl_N: torch.Tensor  # change of log-prob since the rollout, on the tokens that some head scores
    delta_mtp_N: torch.Tensor  # the same of the heads, mean over the depths that score the token
    h_BTC: torch.Tensor
    stats: dict


def losses(model, heads, mb, cfg, algo, lam, on_policy):
    """Forward pass of a minibatch. lam is what the backward will let through the doors of the trunk (occ.scale_grad).

    on_policy: nothing has been updated since the rollout, so old log-probs are those of this very pass; the ratio is
    exactly 1 and δ exactly 0, not rounding noise for OCC to divide.
    """
    door = functools.partial(occ.scale_grad, lam=lam)
    logp_BT, logp_KBT, mask_KBT, h_BTC = mtp.logprobs(
        model, heads, mb.tokens_BT, mb.mask_BT, cfg.temperature, cfg.logp_impl, door
    )
    old_BT, old_KBT = (logp_BT.detach(), logp_KBT.detach()) if on_policy else (mb.logp_old_BT, mb.logp_old_KBT)
    if cfg.mtp_base == "main":
        old_KBT = old_BT.expand_as(logp_KBT)

    loss_rl, seen = rl.policy_loss(logp_BT, old_BT, mb.adv_B, mb.mask_BT, mb.weight_BT, algo)
    if algo.kl_coef:
        seen["kl"] = rl.k3_kl(logp_BT, mb.logp_ref_BT, mb.weight_BT)
        loss_rl = loss_rl + algo.kl_coef * seen["kl"]
    stats = {f"actor/{name}": value for name, value in seen.items()} | {"actor/loss": loss_rl}

    loss_mtp = torch.zeros((), device=logp_BT.device)
    for k in range(len(logp_KBT)):
        loss_k, seen = rl.policy_loss(logp_KBT[k], old_KBT[k], mb.adv_B, mask_KBT[k], mb.weight_KBT[k], algo)
        if occ.REGIMES[cfg.regime].objective == "ce":
            loss_k = -(mb.weight_KBT[k] * logp_KBT[k]).sum()
        loss_mtp = loss_mtp + loss_k / len(logp_KBT)
        stats |= {f"mtp/loss_{k + 1}": loss_k, f"mtp/ratio_max_{k + 1}": seen["ratio_max"],
                  f"mtp/clip_frac_{k + 1}": seen["clip_frac_low"] + seen["clip_frac_high"]}  # fmt: skip

    depths_BT = mask_KBT.sum(0)
    scored = depths_BT > 0
    delta_mtp_BT = ((logp_KBT - old_KBT) * mask_KBT).sum(0) / depths_BT.clamp(min=1)
    deltas = ((logp_BT - old_BT)[scored].detach(), delta_mtp_BT[scored].detach())
    return Losses(loss_rl, loss_mtp, *deltas, h_BTC, {name: value.detach() for name, value in stats.items()})


def coefficient(out, cfg, trunk):
    """λ_t of the configured regime, and the sums ĉ and v̂² of its proxy. Called while the doors still pass everything."""
    rule, proxy = occ.REGIMES[cfg.regime].rule, cfg.occ_proxy
    a, b, find = out.delta_rl_N, out.delta_mtp_N, functools.partial(occ.logprob_coefficient, average=cfg.occ_average)
    if rule == "proxy" and proxy == "hidden":
        a, b = (torch.autograd.grad(loss, out.h_BTC, retain_graph=True)[0] for loss in (out.rl, out.mtp))
        find = occ.hidden_coefficient
    if rule == "exact":
        terms = occ.exact_terms(*(occ.flat_grad(loss, trunk) for loss in (out.rl, out.mtp)), cfg.lam_plus)
        lam = terms["lam_star"]
    else:
        lam = {"cut": 0.0, "fixed": cfg.lam}[rule] if rule != "proxy" else find(a, b, cfg.lam_plus)
    return lam, {"occ/lam": float(lam), "occ/c_hat": occ.inner(a, b).item(), "occ/v2_hat": occ.inner(b, b).item()}


def probe(model, heads, mb, cfg, algo, on_policy, trunk):
    """The exact terms on this minibatch, whatever the regime: as one estimate, and across its two halves of groups."""
    middle = len(mb.adv_B) // cfg.num_generations // 2 * cfg.num_generations
    g, m = [], []
    for part in (slice(0, middle), slice(middle, None)):
        out = losses(model, heads, mb.rows(part), cfg, algo, 1.0, on_policy)
        g.append(occ.flat_grad(out.rl, trunk))
        m.append(occ.flat_grad(out.mtp, trunk))
    terms = occ.exact_terms(g[0] + g[1], m[0] + m[1], cfg.lam_plus) | occ.split_terms(g[0], m[0], g[1], m[1])
    return {f"occ/{name}": value for name, value in terms.items()}


def clip(params, grad_clip):
    """Clip the norm of one group's gradients. The groups are apart, or large gradients of the heads would shrink the
    step of the policy. Returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(params, grad_clip) if params else torch.zeros(())


def evaluation(model, tok, cfg, device):
    """Held-out score in points of 100: {eval/score, eval/<suite>}, avg@eval_k. The same problems and numbers every time."""
    suites = rl.suites_of(cfg.task)
    problems = [p for suite in suites for p in rl.held_out_problems(suite, cfg.difficulty, cfg.eval_problems)]
    with autocast(device):
        right = rl.evaluate(model, tok, problems, cfg.eval_k, cfg.max_new_tokens, cfg.temperature)
    mean = {s: 100 * right[[i for i, p in enumerate(problems) if p.suite == s]].mean().item() for s in suites}
    return {"eval/score": sum(mean.values()) / len(mean)} | {f"eval/{s}": value for s, value in mean.items()}


def summary(updates):
    """One step's updates as one record: means, but maxima of *_max, and the last λ_t with its terms (the first is 0)."""
    record = {}
    for name in {name: None for update in updates for name in update}:
        values = [float(update[name]) for update in updates if name in update]
        last, largest = name.startswith("occ/"), "ratio_max" in name
        record[name] = values[-1] if last else max(values) if largest else sum(values) / len(values)
    return record


def main(cfg, ckpt=None, stop=Stop()):
    """Run, or go on from a checkpoint. Returns the exit code. Raises ValueError where the user is to blame."""
    device = torch.device("cuda" if cfg.device == "auto" and torch.cuda.is_available() else cfg.device.replace("auto", "cpu"))
    regime, algo, tok = occ.REGIMES[cfg.regime], cfg.algorithm(), rl.get_tokenizer(cfg.tokenizer)
    run = Run.create(cfg, device) if ckpt is None and not (Path(cfg.out) / "metrics.jsonl").exists() else Run(cfg)
    run.rewind(ckpt)
    if regime.rule == "proxy" and cfg.updates_per_rollout == 1:
        tqdm.write("note: with --updates_per_rollout 1 lambda_t stays 0: nothing changes between rollout and update")

    if ckpt is None or algo.kl_coef:
        model, heads = pretrained(cfg, tok, device, stop)
    else:
        model, heads = build(cfg, tok, device)
    reference = copy.deepcopy(model).requires_grad_(False) if algo.kl_coef else None
    heads = heads if regime.objective else None
    trunk, phi = list(model.parameters()), list(heads.parameters()) if heads else []
    optimizer = torch.optim.Adam(trunk + phi, lr=cfg.lr, fused=True)
    if ckpt:
        load_state(ckpt, model, heads, run.dir)
        optimizer.load_state_dict(ckpt["optimizer"])

    def save(step):
        run.save({"step": step, "model": model.state_dict(), "heads": heads.state_dict() if heads else None,
                  "optimizer": optimizer.state_dict(), "first_score": first_score, "score": score_now})  # fmt: skip

    first_score, score_now = (ckpt["first_score"], ckpt["score"]) if ckpt else (None, None)
    start = ckpt["step"] if ckpt else 0
    if start == 0 and not ckpt:
        evals = evaluation(model, tok, cfg, device)
        first_score = score_now = evals["eval/score"]
        run.log({"step": 0, "time": run.seconds()} | evals)
        save(0)

    bar = tqdm(range(start + 1, cfg.steps + 1), "train", initial=start, total=cfg.steps, disable=None)
    for step in bar:
        began = time.perf_counter()
        # 1 rollout: G samples of each prompt, from exactly the distribution that is scored below
        with autocast(device):
            problems = rl.problem_stream(rl.suites_of(cfg.task), cfg.difficulty, random.Random(f"{cfg.seed}/rl/{step}"))
            generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
            samples, reward_PG, record, examples = rl.collect(
                model, tok, problems, algo, cfg.prompts_per_step, cfg.num_generations, cfg.max_new_tokens,
                cfg.temperature, generator)  # fmt: skip
        rolled = time.perf_counter()
        # 2 rewards -> advantages; old log-probs
        adv_B = rl.advantages(reward_PG, algo.advantage).flatten().to(device)
        with autocast(device):
            batch, agreement = score(model, heads, samples, adv_B, cfg, reference)
        updates, parts = [], list(minibatches(batch, cfg, algo))
        for i, mb in enumerate(parts):
            lam = torch.ones((), device=device)  # filled in at 5; the backward at 6 reads it at the doors of the trunk
            door, weight = (lam, 1.0) if cfg.lam_scope == "trunk" else (1.0, lam)
            # 3 policy loss · 4 MTP loss
            with autocast(device):
                out = losses(model, heads, mb, cfg, algo, 0.0 if regime.rule == "cut" else door, on_policy=i == 0)
            # 5 coefficient λ_t
            value, terms = coefficient(out, cfg, trunk) if heads else (0.0, {})
            if cfg.probe_every and step % cfg.probe_every == 0 and mb is parts[-1] and heads:
                terms |= probe(model, heads, mb, cfg, algo, i == 0, trunk)
            lam.fill_(value if regime.rule != "cut" else 1.0)
            # 6 one backward, one step
            loss = out.rl + weight * out.mtp
            optimizer.zero_grad()
            loss.backward()
            norms = {"grad_norm/trunk": clip(trunk, cfg.grad_clip), "grad_norm/heads": clip(phi, cfg.grad_clip)}
            if not torch.isfinite(loss + norms["grad_norm/trunk"] + norms["grad_norm/heads"]):
                raise FloatingPointError(f"step {step}: the loss or a gradient is not finite; "
                                         f"the last good checkpoint is {run.dir / 'ckpt.pt'}")  # fmt: skip
            optimizer.step()
            updates.append(out.stats | terms | norms)
        # 7 log
        ended = time.perf_counter()
        tokens = batch.mask_BT.sum().item()
        record = {"step": step, "time": run.seconds()} | record | agreement | summary(updates)
        record |= {"perf/rollout_s": rolled - began, "perf/update_s": ended - rolled,
                   "perf/tokens_per_s": tokens / (ended - began)}  # fmt: skip
        if step % cfg.eval_every == 0 or step == cfg.steps:
            record |= evaluation(model, tok, cfg, device)
            score_now = record["eval/score"]
            run.show(step, examples[:8])
        run.log(record)
        bar.set_postfix(reward=f"{record['reward/mean']:.2f}", score=f"{score_now:.1f}", lam=f"{record.get('occ/lam', 0):.3f}")
        if step % cfg.save_every == 0 or step == cfg.steps or stop.requested:
            save(step)
        if stop.requested and step < cfg.steps:
            tqdm.write(f"stopped after step {step}; go on with: python train.py --resume {run.dir}")
            return 130
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """A mistake is one line on stderr and exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser_of_config():
    """A flag for each field of Config; the comment behind the field is its help text."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)  # fmt: skip
    for f in dataclasses.fields(Config):
        kind = next((t for t in get_args(f.type) if t is not type(None)), f.type)
        action = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__}
        default = "" if f.default in (None, "") else f" [{f.default}]"
        parser.add_argument(f"--{f.name}", help=(comments[f.name] + default).replace("%", "%%"), **action)
    parser.add_argument("--resume", metavar="RUN", help="folder of a run to go on with; of the other flags only --steps may be given")
    return parser


def command_line(argv):
    """Config and checkpoint (or None) from the arguments."""
    given = vars(parser_of_config().parse_args(argv))
    folder = given.pop("resume", None)
    if folder is None:
        return Config(**given), None
    extra = sorted(set(given) - {"steps"})
    if extra:
        raise ValueError(f"--{extra[0]}: with --resume the run keeps its own settings; only --steps may change")
    cfg, ckpt = read_run(folder)
    return dataclasses.replace(cfg, **given), ckpt


if __name__ == "__main__":
    with Stop() as stop:
        try:
            sys.exit(main(*command_line(sys.argv[1:]), stop))
        except (ValueError, OSError) as error:
            sys.exit(f"train.py: error: {error}" if False else (print(f"train.py: error: {error}", file=sys.stderr), 2)[1])
        except KeyboardInterrupt:
            sys.exit(130)
