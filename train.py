"""Train: pretrain a small GPT with MTP heads, then reinforcement learning in one of the regimes of occ.py.

    python train.py                                    # OCC on six suites of arithmetic, minutes on a laptop CPU
    python train.py --regime detach --seed 1           # the baseline; pretraining is shared by all regimes of a seed
    python train.py --resume out/arithmetic-occ-s0     # go on after an interruption, to the same numbers
    torchrun --nproc_per_node=2 train.py               # several processes, each with a share of every batch

`step_of_rl` is the paper's algorithm (arXiv 2605.28184 §4), with θ the trunk and φ the heads:

    sample with π_old;  A = advantage(rewards);  for each minibatch:  δ = log π - log π_old of the trunk and the heads
    λ_t = λ₊ <δ_RL, δ_MTP> / (‖δ_MTP‖² + ε);    θ -= η (∇ loss_rl + λ_t ∇ loss_mtp);    φ -= η ∇ loss_mtp    (η: Adam's)

A run is a folder: metrics.jsonl (first line: config, seed, commit, versions, device), ckpt.pt, samples.txt, curves.png.
Random numbers are derived from (seed, purpose, step), so a resumed run needs no generator states; those of evaluations
are always the same. Left out: learning-rate schedules and weight decay in RL, gradient accumulation, a value network.
"""

import os

# OpenMP's threads wait for work by spinning. Beside another busy program, spinning makes a step with two threads ten
# times slower, so they sleep instead. This must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from tqdm import tqdm

import eval as evaluation  # eval.py; the builtin keeps its name
import mtp
import occ
import rl
from model import find_device, gather, pad, share, total, total_gradients, world

CORES = torch.get_num_threads()  # torch's default: what this process may use, or OMP_NUM_THREADS


@dataclasses.dataclass
class Config:
    # what is learned
    task: str = "arithmetic"  # six suites, or a comma list of add,sub,mul,mod,chain,linear, gsm8k, FILE.jsonl
    data_dir: str = "data"  # folder of data sets; what is missing there is fetched
    difficulty: int = 2  # digits of the operands, 1 to 8
    careless: float = 0.8  # share of careless solutions in the second half of pretraining
    tokenizer: Literal["bytes", "gpt2"] = "bytes"  # one token a byte, or GPT-2's
    seed: int = 0  # of everything random
    # reinforcement learning
    regime: Literal[tuple(occ.REGIMES)] = "occ"  # what the heads learn by, what reaches the trunk
    algo: Literal[tuple(rl.ALGOS)] = "dapo"  # the policy-gradient method
    steps: int = 250  # rollouts
    lr: float = 2e-4  # of Adam, for trunk and heads
    prompts_per_step: int = 32  # prompts a rollout
    num_generations: int = 8  # samples a prompt
    updates_per_rollout: int = 4  # minibatches a rollout is cut into, one update each
    max_new_tokens: int = 16  # longest response
    temperature: float = 1.0  # of sampling, and of every log-prob
    speculative: bool = False  # the heads draft tokens for the rollout, from the same distribution
    # the coefficient of the MTP loss
    lam: float = 1.0  # lambda of the regimes ce and policy
    lam_plus: float = 1.0  # scale of lambda_t in the regimes with a proxy or exact gradients
    occ_proxy: Literal["logprob", "hidden"] = "logprob"  # the paper's, or from hidden states
    released: bool = False  # occ as in the authors' code, with a lambda_plus of 0.1 / mtp_depth
    # model
    n_layer: int = 4  # blocks of the trunk
    n_head: int = 4  # attention heads
    n_embd: int = 64  # channels
    tied: bool = False  # one matrix for embedding and unembedding
    mtp_depth: int = 1  # MTP heads
    mtp_design: Literal["sequential", "parallel"] = "sequential"  # DeepSeek-V3's, or Gloeckle's
    logp_impl: Literal["auto", "naive", "chunked", "triton"] = "auto"  # see mtp.linear_logp
    # pretraining
    pretrain_steps: int = 1000  # batches of solutions
    pretrain_batch: int = 160  # solutions a batch
    pretrain_lr: float = 3e-3  # of AdamW; Muon has 7 times this
    pretrain_lam: float = 0.3  # weight of the MTP loss, which joins for the last third
    # the run
    out: str = ""  # folder of the run; by default out/<task>-<regime>-s<seed>
    cache_dir: str = "out/base"  # pretrained models, by a hash of what determines them
    save_every: int = 50  # steps between checkpoints
    keep: str = ""  # steps whose checkpoints are kept beside ckpt.pt, as ckpt-STEP.pt: a comma list
    eval_every: int = 25  # steps between evaluations
    eval_problems: int = 32  # held-out problems a suite
    eval_k: int = 8  # samples a problem
    probe_every: int = 10  # steps between measurements of the exact c and v2; 0 is never
    device: str = "auto"  # cuda if there is one, else cpu; or any of torch's: cuda:1, mps, xpu

    def __post_init__(self):
        def need(name, ok, allowed):
            if not ok:
                raise ValueError(f"--{name} {getattr(self, name)}: must be {allowed}")

        may_be_zero = "seed careless pretrain_steps pretrain_lam probe_every".split()
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), get_args(f.type)
            if choices:
                need(f.name, value in choices, f"one of {', '.join(choices)}")
            elif f.name in ("lam", "lam_plus"):
                need(f.name, math.isfinite(value), "a finite number")
            elif f.name in may_be_zero:
                need(f.name, 0 <= value < 2**31, "0 or more")
            elif f.type in (int, float):
                need(f.name, 0 < value < 2**31, "above 0")
        algo = rl.ALGOS[self.algo]
        need("careless", self.careless <= 1, "a share from 0 to 1")
        need("difficulty", self.difficulty <= 8, "1 to 8")
        need("keep", set(self.keep) <= set("0123456789,"), "a comma list of steps, as 0,25,60")
        need("n_embd", self.n_embd % self.n_head == 0, f"a multiple of n_head = {self.n_head}")
        at_most = f"at most prompts_per_step = {self.prompts_per_step}"
        need("updates_per_rollout", self.updates_per_rollout <= self.prompts_per_step, at_most)
        least = 1 if algo.advantage == "batch" and not algo.dynamic_sampling else 2
        need("num_generations", self.num_generations >= least, "2 or more (1 with reinforce)")
        if self.regime == "off":
            need("speculative", not self.speculative, "left out: --regime off has no heads")
        if self.released:
            need("released", self.regime == "occ", "left out, or with --regime occ")
            left_out = "left out with --released, which has its own"
            need("lam_plus", self.lam_plus == Config.lam_plus, left_out)
            need("occ_proxy", self.occ_proxy == Config.occ_proxy, left_out)
        device = find_device(self.device)
        if self.logp_impl == "triton":
            why = mtp.why_no_triton(device.type, torch.float32)
            need("logp_impl", not why, f"auto, naive or chunked here: {why}")
        room = max(rl.longest(s, self.difficulty, self.tok())[2] for s in self.suites()) + 1
        if algo.overlong:  # the penalty takes the last fifth
            room = math.ceil(room * 5 / 4)
        at_least = f"{room} or more for this task and difficulty"
        need("max_new_tokens", self.max_new_tokens >= room, at_least)
        names = self.task if self.task == "arithmetic" else "+".join(map(rl.label, self.suites()))
        self.out = self.out or f"out/{names}-{self.regime}-s{self.seed}"

    def tok(self):
        return rl.get_tokenizer(self.tokenizer)

    def suites(self):
        return rl.suites_of(self.task, self.data_dir)

    def tokens_per_update(self):
        """The most tokens that the responses of one minibatch can have."""
        groups = math.ceil(self.prompts_per_step / self.updates_per_rollout)
        return groups * self.num_generations * self.max_new_tokens


# ----------------------------------------------------------------------------------------------------------------------
# Devices and processes


def set_up(cfg):
    """The device of this process; torchrun's processes meet here. ValueError if there are more of them than GPUs."""
    device, threads = find_device(cfg.device), CORES
    if dist.is_torchelastic_launched():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        threads = (os.cpu_count() or 1) // here
        if device.type == "cuda":
            gpus = torch.cuda.device_count()
            if here > gpus:
                raise ValueError(f"--nproc_per_node {here}: must be at most {gpus}, one a GPU")
            device = torch.device("cuda", dist.get_node_local_rank())
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if cfg.released and world()[1] > 1:
        raise ValueError("--released: one process only: lambda is a mean over pairs of responses")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        # Multiply-adds of an update's largest matrix product. A thread needs 30 million of them to be worth waking. At
        # the default size (17 million) two threads took 1.1 times as long as one, and a step of Muon 8 times.
        work = cfg.tokens_per_update() // world()[1] * 4 * cfg.n_embd**2
        torch.set_num_threads(max(min(work // 30_000_000, threads), 1))
    return device


def say(line):
    """Print, once for all processes."""
    if world()[0] == 0:
        tqdm.write(line)
        sys.stdout.flush()


def progress(steps, name, **kwargs):
    """A bar on a terminal, once for all processes."""
    return tqdm(steps, name, disable=None if world()[0] == 0 else True, **kwargs)


@contextlib.contextmanager
def ctrl_c_waits():
    """Gives a list that gets an item at Ctrl-C or SIGTERM, so that the step can end first.

    A second one ends it at once, but not under torchrun, which sends each one twice.
    """
    requests, handlers = [], {}

    def handler(signum, frame):
        if requests and not dist.is_torchelastic_launched():
            raise KeyboardInterrupt
        requests.append(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        handlers[signum] = signal.signal(signum, handler)
    try:
        yield requests
    finally:
        for signum, before in handlers.items():
            signal.signal(signum, before)


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: the update of a matrix has singular values near 1 (Jordan et al. 2024).

    Differs: torch.optim.Muon computes in bfloat16. On most CPUs float32 is ten times as fast; elsewhere it is no slower
    for matrices of this size.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)  # Nesterov's
                tall = p.size(0) > p.size(1)
                x = x.T if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz takes every singular value close to 1
                    s = x @ x.T
                    x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
                x = x.T if tall else x
                p.sub_(x, alpha=group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def pretraining_batch(cfg, step):
    """Solutions as tokens (B, T) and mask (B, T-1), True where token t+1 is part of the solution or its end."""
    tok, rng = cfg.tok(), random.Random(f"{cfg.seed}/pretrain/{step}")
    # Careful ones first, so that the skill is learnt, then the mixture.
    careless = cfg.careless if step >= cfg.pretrain_steps / 2 else 0.0
    stream = rl.problem_stream(cfg.suites(), cfg.difficulty, rng, careless)
    rows, masks = [], []
    for _ in range(cfg.pretrain_batch):
        problem = next(stream)
        prompt = tok.encode_ordinary(problem.prompt)
        solution = [*tok.encode_ordinary(problem.solution), tok.eot_token]
        rows.append(prompt + solution)
        masks.append([False] * (len(prompt) - 1) + [True] * len(solution))
    tokens_BT, _ = pad(rows)
    mask_BT, _ = pad(masks)
    return tokens_BT, mask_BT


def pretrain(cfg, model, heads, device):
    """Next-token prediction of solutions. Muon moves the matrices but those of tokens and positions, AdamW the rest."""
    inside, rest = [], []
    for name, p in [*model.named_parameters(), *heads.named_parameters()]:
        is_inside = p.ndim == 2 and name not in ("wte.weight", "wpe.weight", "lm_head.weight")
        (inside if is_inside else rest).append(p)
    params = [*model.parameters(), *heads.parameters()]
    muon = Muon(inside, dict(lr=0.0))
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), fused=device.type in ("cpu", "cuda"))
    bar = progress(range(cfg.pretrain_steps), "pretrain")
    for step in bar:
        # A short warm-up, then down in a line.
        schedule = min(1, (step + 1) / 50, max(0.05, 1 - step / cfg.pretrain_steps))
        muon.param_groups[0]["lr"] = 7 * cfg.pretrain_lr * schedule
        adamw.param_groups[0]["lr"] = cfg.pretrain_lr * schedule
        tokens_BT, mask_BT = pretraining_batch(cfg, step)
        # Means are over the whole batch. Each process works on its share of the rows.
        count = mask_BT.sum()
        count_mtp = mtp.aligned_mask(mask_BT, cfg.mtp_depth).sum().clamp(min=1)
        mine = share(len(mask_BT))
        tokens_BT, mask_BT = tokens_BT[mine].to(device), mask_BT[mine].to(device)
        joined = heads if step >= cfg.pretrain_steps * 2 / 3 else None  # for the last third
        logp_BT, logp_BKT, _ = mtp.logprobs(model, joined, tokens_BT, mask_BT, impl=cfg.logp_impl)
        loss = -logp_BT.sum() / count
        muon.zero_grad()
        adamw.zero_grad()
        (loss - cfg.pretrain_lam * logp_BKT.sum() / count_mtp).backward()
        total_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        muon.step()
        adamw.step()
        bar.set_postfix(loss=f"{total(loss.detach()).item():.3f}")


def pretrained(cfg, device):
    """Weights {model, heads} after pretraining: from the cache, if settings and sources are the same there."""
    names = "difficulty careless tokenizer seed tied logp_impl max_new_tokens".split()
    names += [name for name in vars(cfg) if name.startswith(("pretrain_", "n_", "mtp_"))]
    key = [torch.__version__, device.type, *(getattr(cfg, name) for name in names)]
    key += [s if s in rl.SUITES else Path(s).read_bytes().hex() for s in cfg.suites()]
    sources = [sys.modules["model"], mtp, rl, occ.scale_grad, occ._ScaleGrad]
    sources += [evaluation.build, Muon, pretraining_batch, pretrain]
    key += [inspect.getsource(source) for source in sources]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = Path(cfg.cache_dir) / f"{digest[:16]}.pt"
    try:
        base = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # not there or damaged: made (again)
        base = None
    if not all(gather(base is not None)):  # by all processes or by none
        say(f"pretraining: {cfg.pretrain_steps} steps of {cfg.pretrain_batch} solutions")
        model, heads = evaluation.build(cfg, device)
        pretrain(cfg, model, heads, device)
        base = {"model": model.state_dict(), "heads": heads.state_dict()}
        save_atomically(base, path)
    return base


# ----------------------------------------------------------------------------------------------------------------------
# The run folder


def save_atomically(state, path):
    """The first process writes a new file, which then takes the old one's name: a crash leaves the old or the new."""
    if world()[0] > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """The folder of one run. The first process writes there, and locks metrics.jsonl until it ends, however it ends."""

    def __init__(self, cfg, resume):
        """ValueError if another run writes there or, unless this one goes on with it, has written there."""
        self.dir, self.start = Path(cfg.out), time.perf_counter()
        self.metrics, self.logs = None, []
        if world()[0] > 0:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        self.logs = [self.dir / "metrics.jsonl", self.dir / "samples.txt"]
        for path in [*self.logs, self.dir / "ckpt.pt", self.dir / "curves.png"]:
            if not resume and path.exists() and path.stat().st_size:
                there = f"has a {path.name}; go on with --resume {cfg.out}"
                raise ValueError(f"--out {cfg.out}: {there}, or name another folder")
        self.metrics = open(self.logs[0], "a", buffering=1, encoding="utf-8")  # line by line
        try:
            import fcntl

            fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no such locks: there, nothing keeps two runs out of one folder
        except BlockingIOError:
            busy = "another run is writing there; wait, or name another folder"
            raise ValueError(f"{cfg.out}: {busy}") from None
        self.samples = open(self.logs[1], "a", buffering=1, encoding="utf-8")

    def cut(self, last):
        """Remove what the logs hold from after a step (-1: all but the header), and a line that was cut short."""
        for path in self.logs:
            length = 0
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                if path.suffix == ".txt":
                    step = int(line.split()[1])
                else:
                    step = json.loads(line).get("step", -1)  # the header has none
                if step > last:
                    break
                length += len(line)
            os.truncate(path, length)

    def write(self, record):
        """One line of metrics.jsonl."""
        if self.metrics:
            self.metrics.write(json.dumps(record) + "\n")

    def show(self, step, examples):
        """Prompts, completions and rewards, for people."""
        if self.metrics:
            for prompt, text, reward in examples:
                self.samples.write(f"step {step}  reward {reward:g}  {prompt!r} -> {text!r}\n")

    def save(self, cfg, step, model, heads, optimizer):
        state = {"step": step, "steps": cfg.steps, "seconds": self.seconds()}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state["heads"] = heads.state_dict() if heads else None
        save_atomically(state, self.dir / "ckpt.pt")
        if str(step) in cfg.keep.split(","):
            save_atomically(state, self.dir / f"ckpt-{step}.pt")

    def seconds(self):
        """Of training, those before an interruption included."""
        return time.perf_counter() - self.start


def header(cfg, device):
    """The first line of metrics.jsonl."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
        commit = done.stdout.strip() or None  # None outside a git checkout
    except OSError:  # there is no git
        commit = None
    name = f"{device}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    record = {"config": dataclasses.asdict(cfg), "seed": cfg.seed, "commit": commit}
    record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    record["versions"]["nanoocc"] = evaluation.VERSION  # of the folder's format
    record["device"] = f"{world()[1]} x {name}"
    tokens, vocab_size = cfg.tokens_per_update(), cfg.tok().n_vocab
    record["logp_impl"] = mtp.pick_impl(cfg.logp_impl, tokens, vocab_size, device)
    return record


# ----------------------------------------------------------------------------------------------------------------------
# Reinforcement learning


class Clock:
    """Seconds by phase. A call adds the time since the last call to a phase; on CUDA, once its work is done."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, phase):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        name = f"perf/{phase}_s"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def step_of_rl(cfg, model, heads, optimizer, tok, step, reference=None):
    """One rollout and its updates: the paper's algorithm. Returns what to log, and examples to read.

    heads is None in regime off. reference is the frozen base, for a method whose loss has a KL term.
    """
    regime, algo, clock = occ.REGIMES[cfg.regime], rl.ALGOS[cfg.algo], Clock()
    theta = list(model.parameters())
    phi = list(heads.parameters()) if heads else []
    probing = heads and cfg.probe_every and step % cfg.probe_every == 0
    heads_at_rollout = copy.deepcopy(heads) if probing else None

    # 1 rollout: G samples of each prompt, from the distribution that is scored below
    problems = rl.training_problems(cfg, step)
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    batch, record, examples = rl.rollout(model, heads, tok, problems, algo, cfg, generator)
    clock("rollout")

    # 2 rewards -> advantages. A minibatch for each update, with its log-probs before any update. The first needs no
    # extra pass for them.
    adv_B = rl.advantages(batch["reward"].view(-1, cfg.num_generations), algo.advantage).flatten()
    minibatches = rl.minibatches(model, heads, batch, adv_B, algo, cfg, reference)
    clock("score")

    updates = []
    for mb in minibatches:
        # Log-probs of trunk and heads. In the backward, the doors of the trunk multiply the heads' gradient by `lam`.
        # It is 1 while regime exact and the proxy `hidden` measure m in 5, which then sets it to λ_t.
        lam = torch.ones((), device=adv_B.device)
        door = 0.0 if regime.rule == "cut" else lam  # a number cuts the graph
        logp, logp_mtp, h = rl.logprobs(model, heads, mb, cfg, door)
        # In the first update these are the old log-probs: ratios are exactly 1, δ exactly 0.
        mb.setdefault("old", logp.detach())
        mb.setdefault("old_mtp", logp_mtp.detach())
        if cfg.released:  # the authors' code takes the trunk's: the heads' ratios do not start at 1
            mb["old_mtp"] = mb["old"][:, None].expand_as(logp_mtp)
        # δ: how the log-probs have changed since the rollout
        deltas = occ.token_deltas(logp, mb["old"], logp_mtp, mb["old_mtp"], mb["mask_mtp"])

        # 3 policy loss of the trunk
        loss_rl = rl.trunk_policy_loss(logp, mb, algo)
        # 4 MTP loss: m is the gradient of loss_mtp. The heads learn by loss_heads, in most regimes the same.
        adv_mtp = mb["adv"]
        if cfg.released:  # λ scales the advantages, inside the clip
            lam_plus = occ.RELEASED_LAM_PLUS / cfg.mtp_depth
            lam_B = occ.released_coefficient(*deltas, mb["mask_mtp"].any(1), lam_plus)
            adv_mtp = mb["adv"] * lam_B
        loss_mtp = rl.mtp_loss(regime.trunk_loss, logp_mtp, mb, adv_mtp, algo)
        loss_heads = loss_mtp
        if regime.heads_loss != regime.trunk_loss:
            loss_heads = rl.mtp_loss(regime.heads_loss, logp_mtp, mb, adv_mtp, algo)
        clock("update")

        # 5 coefficient λ_t
        if cfg.released:
            lam_t = lam_B.mean()  # only for the log: the loss has it already, and lam stays 1
        else:
            lam_t = occ.coefficient(regime.rule, cfg, deltas, (loss_rl, loss_mtp), h, theta)
            lam.fill_(lam_t)
        clock("coefficient")
        metrics = {}
        if probing and mb is minibatches[-1]:
            metrics, _, _ = rl.probe(model, heads, mb, deltas, regime, algo, cfg, heads_at_rollout)
            clock("probe")

        # 6 backward, and one step of Adam: the trunk's gradient is g + λ_t m, the heads have their own
        optimizer.zero_grad()
        if loss_heads is loss_mtp:
            (loss_rl + loss_mtp).backward()
        else:
            (loss_rl + loss_mtp).backward(inputs=theta, retain_graph=True)
            loss_heads.backward(inputs=phi)
        total_gradients(theta + phi)
        # Clipped apart: with one shared norm the heads would shrink the step of the policy.
        metrics["grad_norm/trunk"] = torch.nn.utils.clip_grad_norm_(theta, 1.0).item()
        metrics["grad_norm/heads"] = torch.nn.utils.clip_grad_norm_(phi, 1.0).item()
        optimizer.step()

        # 7 log
        metrics |= rl.update_metrics(logp, logp_mtp, mb, adv_mtp, algo, first=not updates)
        metrics["actor/loss"] = total(loss_rl.detach()).item()
        metrics["actor/kl"] = total(rl.kl_to_base(logp.detach(), mb)).item()
        if heads:
            metrics |= {"mtp/loss": total(loss_heads.detach()).item(), "occ/lam": float(lam_t)}
            metrics["occ/c_hat"] = occ.inner(*deltas).item()
            metrics["occ/v2_hat"] = occ.inner(deltas[1], deltas[1]).item()
        updates.append(metrics)
        clock("update")

    record |= rl.summary(updates) | clock.seconds
    record["perf/tokens_per_s"] = record["response_length/sum"] / sum(clock.seconds.values())
    return record, examples


def main(cfg, resume=False):
    """A new run, or one that goes on from the checkpoint in cfg.out. Returns the exit code.

    Raises ValueError where the user is to blame, FloatingPointError on a number that is not finite.
    """
    device, tok = set_up(cfg), cfg.tok()
    from_logprobs = occ.REGIMES[cfg.regime].rule == "proxy" and cfg.occ_proxy == "logprob"
    if from_logprobs and cfg.updates_per_rollout == 1:
        say("note: with --updates_per_rollout 1 lambda_t stays 0: nothing changes after a rollout")
    if device.type == "cuda" and cfg.logp_impl == "auto":
        why = mtp.why_no_triton("cuda", torch.float32)  # of hidden states, under autocast too
        if why:
            say(f"note: log-probs are computed in chunks, not by the Triton kernels: {why}")
    Path(cfg.cache_dir).mkdir(parents=True, exist_ok=True)
    run = Run(cfg, resume)
    model, heads, optimizer = evaluation.new_state(cfg, device)
    ckpt = evaluation.read_run(cfg.out)[1] if resume else None
    start = 0
    if ckpt:
        evaluation.load_weights(ckpt, model=model, heads=heads, optimizer=optimizer)
        start = ckpt["step"]
        run.start -= ckpt["seconds"]
    run.cut(start if ckpt else -1)
    if not resume:
        run.write(header(cfg, device))
    kl_coef, reference = rl.ALGOS[cfg.algo].kl_coef, None
    if kl_coef or ckpt is None:
        base = pretrained(cfg, device)
    if kl_coef:
        reference = copy.deepcopy(model)
        evaluation.load_weights(base, model=reference)
    if ckpt is None:
        evaluation.load_weights(base, model=model, heads=heads)
        run.write({"step": 0, "time": run.seconds()} | rl.evaluate(model, tok, cfg))
        run.save(cfg, 0, model, heads, optimizer)
    say(f"reinforcement learning: {cfg.regime}, steps {start + 1} to {cfg.steps}")

    go_on = f"go on with: python train.py --resume {run.dir}"
    began, saved = run.seconds(), start
    bar = progress(range(start + 1, cfg.steps + 1), "train", initial=start, total=cfg.steps)
    with ctrl_c_waits() as stop:
        for step in bar:
            record, examples = step_of_rl(cfg, model, heads, optimizer, tok, step, reference)
            for name, value in record.items():
                if not math.isfinite(value):
                    last = f"the last good checkpoint is that of step {saved}"
                    raise FloatingPointError(f"step {step}: {name} is not finite; {last}; {go_on}")
            if step % cfg.eval_every == 0 or step == cfg.steps:
                record |= rl.evaluate(model, tok, cfg)
                run.show(step, examples)
                lam = record.get("occ/lam", 0.0)
                left = (run.seconds() - began) / (step - start) * (cfg.steps - step) / 60
                now = f"reward {record['reward/mean']:.2f}, score {record['eval/score']:.1f}"
                say(f"step {step}: {now}, λ {lam:.3f}, {left:.1f} minutes left")
            run.write({"step": step, "time": run.seconds()} | record)
            # One process was asked to stop: all end at the same step.
            stopping = any(gather(len(stop)))
            is_last = stopping or step == cfg.steps
            if is_last or step % cfg.save_every == 0 or str(step) in cfg.keep.split(","):
                run.save(cfg, step, model, heads, optimizer)
                saved = step
            if stopping and step < cfg.steps:
                say(f"stopped after step {step}; {go_on}")
                return 130
    if world()[0] == 0:
        evaluation.plot([run.dir], run.dir / "curves.png")
        _, records = evaluation.read_metrics(run.dir)
        scores = [r["eval/score"] for r in records if "eval/score" in r]
        say(f"score {scores[0]:.1f} -> {scores[-1]:.1f} of 100 (held out, avg@{cfg.eval_k}) "
            f"in {run.seconds() / 60:.1f} minutes; the run is in {run.dir}")  # fmt: skip
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def command_line(argv):
    """Arguments -> (config, whether to resume). The flags are the fields of Config."""
    parser = evaluation.Parser(__doc__)
    parser.add_fields(Config)
    parser.add_argument("--resume", metavar="RUN", help="run to go on with, to --steps if given")
    given = vars(parser.parse_args(argv))
    folder = given.pop("resume")
    if folder is None:
        return Config(**given), False
    for name in given:
        if name != "steps":
            raise ValueError(f"--{name}: with --resume a run keeps all its settings but --steps")
    values, ckpt = evaluation.read_run(folder)
    differ = ", ".join(sorted(set(values) ^ set(Config.__dataclass_fields__)))
    if differ:
        raise ValueError(f"{folder}: a run of another version: settings that differ: {differ}")
    if ckpt:
        values["steps"] = ckpt["steps"]
    cfg = Config(**values | given | {"out": folder})
    if ckpt and cfg.steps < ckpt["step"]:
        raise ValueError(f"--steps {cfg.steps}: must be {ckpt['step']} or more: they are done")
    return cfg, True


if __name__ == "__main__":
    with evaluation.reporting("train.py"):
        code = main(*command_line(sys.argv[1:]))
        if dist.is_initialized():
            dist.barrier()  # a process that ended before the others would look dead to them
            dist.destroy_process_group()
        sys.exit(code)
