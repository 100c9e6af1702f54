"""Train: pretrain a small GPT with MTP heads, then reinforcement learning in one of the regimes of occ.py.

    python train.py                                    # OCC on six suites of arithmetic, minutes on a laptop CPU
    python train.py --regime detach --seed 1           # the baseline; pretraining is shared by all regimes of a seed
    python train.py --task gsm8k --pretrain_task gsm8k,words --max_new_tokens 200    # real word problems (README)
    python train.py --resume out/arithmetic-occ-s0     # go on after an interruption, to the same numbers
    torchrun --nproc_per_node=2 train.py               # several processes, each with a share of every batch

The loop is the paper's algorithm (arXiv 2605.28184 §4), with θ the trunk, φ the heads, and losses = -objectives:

    sample with π_old;  A = advantage(rewards);  for each minibatch:  δ = log π - log π_old of the trunk and the heads
    λ_t = λ₊ <δ_RL, δ_MTP> / (‖δ_MTP‖² + ε);    θ -= η (∇ loss_rl + λ_t ∇ loss_mtp);    φ -= η ∇ loss_mtp    (η: Adam's)

A run is a folder: metrics.jsonl (first line: config, seed, commit, data, versions, device), ckpt.pt, samples.txt,
curves.png. "data" has a SHA-256 of each data set, for a set that changes must be noticed.
Every random number is derived from (seed, purpose, step), so a resumed run needs no generator states.

Dimension key: B sequences · P prompts · G samples a prompt (B = P·G) · T positions · K MTP depth

Left out: learning-rate schedules and weight decay in RL, gradient accumulation, a value network.
"""

import contextlib
import copy
import dataclasses
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, nothing keeps two runs out of one folder
    fcntl = None

import eval as evaluation  # eval.py; the builtin keeps its name
import mtp
import occ
import rl
from model import autocast, pad, share, total, total_gradients, world

# Multiply-adds of an update's largest matrix product that occupy a thread. With two threads on two cores a step took
# 1.1 times as long as with one at 3 M, 0.85 to 1.08 times at 6.5 M and 0.7 times at 26 M.
THREAD_WORK = 3_000_000
CORES = torch.get_num_threads()  # torch's default: what this process may use, or OMP_NUM_THREADS


@dataclass
class Config:
    # what is learned
    task: str = "arithmetic"  # six suites, or a comma list of add,sub,mul,mod,chain,linear, words, gsm8k, FILE.jsonl
    pretrain_task: str = ""  # what solutions are from in pretraining; by default the task
    data_dir: str = "data"  # folder of data sets; what is missing there is fetched
    difficulty: int = 2  # digits of the operands (words: events in a story), 1 to 8
    careless: float = 0.8  # share of solutions written carelessly, in the second half of pretraining
    tokenizer: Literal["bytes", "gpt2"] = "bytes"  # one token a byte, or GPT-2's
    seed: int = 0  # of everything random
    # reinforcement learning
    regime: Literal[tuple(occ.REGIMES)] = "occ"  # what the MTP heads learn, and how much of it reaches the trunk
    algo: Literal[tuple(rl.ALGOS)] = "dapo"  # the policy-gradient method
    steps: int = 250  # rollouts
    lr: float = 2e-4  # of Adam, for trunk and heads
    prompts_per_step: int = 32  # prompts a rollout
    num_generations: int = 8  # samples a prompt
    updates_per_rollout: int = 4  # minibatches a rollout is cut into, one update each
    max_new_tokens: int = 16  # longest response
    temperature: float = 1.0  # of sampling, and of every log-prob
    speculative: int = 0  # tokens a round that the heads draft for the rollout, from the same distribution; 0: none
    grad_clip: float = 1.0  # largest gradient norm, of the trunk and of the heads apart
    # the coefficient of the MTP loss
    lam: float = 1.0  # lambda of the regimes ce and policy
    lam_plus: float = 1.0  # scale of lambda_t in the regimes occ and exact
    occ_proxy: Literal["logprob", "hidden"] = "logprob"  # the paper's, or gradients at the hidden states
    occ_average: Literal["sums", "ratios"] = "sums"  # a ratio of sums (paper) or a mean of ratios (released code)
    exact_blocks: int = 0  # exact: c and v2 of the gradients of this many last blocks; 0: of the whole trunk
    mtp_base: Literal["mtp", "main"] = "mtp"  # old log-prob of the heads: their own, or main (released code)
    mtp_learn: Literal[None, "ce", "policy"] = None  # what the heads learn by, if not by what enters the trunk
    lam_scope: Literal["trunk", "all"] = "trunk"  # what lambda scales; all: also what the heads learn (released code)
    # one detail of the method changed; by default what --algo says
    advantage: Literal[None, "group_std", "group", "loo", "batch"] = None  # baseline and scale of the rewards
    loss_agg: Literal[None, "token", "sequence", "constant"] = None  # how tokens are averaged
    clip_eps_low: float | None = None  # the ratio is clipped below at 1 - this
    clip_eps_high: float | None = None  # and above at 1 + this
    dual_clip: float | None = None  # bound on the loss of a token with negative advantage, in advantages
    kl_coef: float | None = None  # weight of the KL to the frozen base
    dynamic_sampling: bool | None = None  # replace prompts whose samples all have the same reward
    overlong: bool | None = None  # punish responses that come near max_new_tokens
    # model
    n_layer: int = 4  # blocks of the trunk
    n_head: int = 4  # attention heads
    n_embd: int = 64  # channels
    tied: bool = False  # one matrix for embedding and unembedding
    block_size: int = 0  # longest prompt + response, in tokens; 0: what the task needs
    vocab_size: int = 0  # rows of these matrices; 0: as many as the tokenizer has tokens
    mtp_depth: int = 1  # MTP heads
    mtp_design: Literal["sequential", "parallel"] = "sequential"  # as in DeepSeek-V3, or as in Gloeckle et al.
    logp_impl: Literal["auto", "naive", "chunked", "triton"] = "auto"  # how log-probs are computed, see mtp.linear_logp
    # pretraining
    pretrain_steps: int = 800  # batches of solutions
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
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto is cuda where there is one
    threads: int = 0  # of a process on the CPU; 0: by the size of the model

    def __post_init__(self):
        def need(name, ok, allowed):
            if not ok:
                raise ValueError(f"--{name} {getattr(self, name)}: must be {allowed}")

        may_be_zero = "seed careless pretrain_steps pretrain_lam probe_every clip_eps_low clip_eps_high kl_coef "
        may_be_zero += "vocab_size threads exact_blocks speculative block_size"
        for f in dataclasses.fields(self):
            value, literals = getattr(self, f.name), get_args(f.type)
            if isinstance(value, str) and literals:
                need(f.name, value in literals, f"one of {', '.join(filter(None, literals))}")
            if f.name in ("lam", "lam_plus"):
                need(f.name, abs(value) < float("inf"), "a finite number")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                zero = f.name in may_be_zero.split()
                need(f.name, 0 < value < 2**31 or zero and value == 0, "0 or more" if zero else "above 0")
        need("exact_blocks", self.exact_blocks <= self.n_layer, f"at most n_layer = {self.n_layer}")
        need("careless", self.careless <= 1, "a share from 0 to 1")
        need("difficulty", self.difficulty <= 8, "1 to 8")
        need("n_embd", self.n_embd % (2 * self.n_head) == 0, f"a multiple of 2·n_head = {2 * self.n_head}")
        most = self.prompts_per_step
        need("updates_per_rollout", self.updates_per_rollout <= most, f"at most prompts_per_step = {most}")
        algo = self.algorithm()
        alone = algo.advantage == "batch" and not algo.dynamic_sampling
        need("num_generations", self.num_generations > 1 or alone, "2 or more (1 with --algo reinforce)")
        most = 0 if self.regime == "off" else self.mtp_depth if self.mtp_design == "parallel" else math.inf
        need(
            "speculative",
            self.speculative <= most,
            f"at most {most}: --regime off drafts nothing, parallel heads one each",
        )
        need("mtp_learn", self.mtp_learn is None or self.regime != "off", "left out with --regime off: it has no heads")
        cuda = self.device != "cpu" and torch.cuda.is_available()
        why = mtp.why_no_triton("cuda" if cuda else "cpu") if self.logp_impl == "triton" else ""
        need("logp_impl", not why, f"auto, naive or chunked here: {why}")
        need("dual_clip", algo.dual_clip > 1, "above 1")
        need("device", self.device != "cuda" or torch.cuda.is_available(), "cpu here: torch finds no CUDA")
        suites = rl.suites_of(self.task, self.data_dir)
        names, tok = "+".join(map(rl.label, suites)), rl.get_tokenizer(self.tokenizer)
        _, _, solution = rl.longest(suites, self.difficulty, tok)
        least = (solution + 1) * 5 // 4 if algo.overlong else solution + 1  # the overlong penalty takes the last fifth
        need("max_new_tokens", self.max_new_tokens >= least, f"{least} or more for this task and difficulty")
        prompt, solution, _ = rl.longest(self.suites(), self.difficulty, tok)
        least = prompt + max(solution + 1, self.max_new_tokens)
        self.block_size = self.block_size or least
        need("block_size", self.block_size >= least, f"0, or {least} or more for this task and max_new_tokens")
        self.out = self.out or f"out/{self.task if self.task == 'arithmetic' else names}-{self.regime}-s{self.seed}"

    def pretrain_suites(self):
        return rl.suites_of(self.pretrain_task or self.task, self.data_dir)

    def suites(self):
        """All that a run is trained on."""
        return {*rl.suites_of(self.task, self.data_dir), *self.pretrain_suites()}

    def algorithm(self):
        """The method that --algo names, with the details that were given by flags."""
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(rl.Algo) if f.name != "ratio"}
        return dataclasses.replace(rl.ALGOS[self.algo], **{k: v for k, v in given.items() if v is not None})


# ----------------------------------------------------------------------------------------------------------------------
# Devices and processes


def set_up(cfg):
    """The device of this process; ValueError if there are more processes than GPUs. torchrun's processes meet here."""
    cuda, several, rank = cfg.device != "cpu" and torch.cuda.is_available(), dist.is_torchelastic_launched(), 0
    cores = CORES
    if several:
        rank, here = dist.get_node_local_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
        cores = max(usable_cores() // here, 1)
        if cuda and here > torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node {here}: must be at most {torch.cuda.device_count()}, one process a GPU")
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    sequences = cfg.prompts_per_step * cfg.num_generations // cfg.updates_per_rollout // world()[1]
    work = sequences * cfg.max_new_tokens * 4 * cfg.n_embd**2
    torch.set_num_threads(cfg.threads or max(min(work // THREAD_WORK, cores), 1))
    return torch.device("cpu")


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def leave():
    """The processes part together: one that went ahead would look dead to the others, and abort them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def say(line):
    """Print, once for all processes."""
    if world()[0] == 0:
        tqdm.write(line)


def progress(steps, name, **kwargs):
    """A bar on a terminal, once for all processes."""
    return tqdm(steps, name, disable=None if world()[0] == 0 else True, **kwargs)


def asked(stop):
    """Whether any process was asked to stop: all of them then know, at the same step."""
    return total(torch.tensor(float(bool(stop)))).item() > 0


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


def pretraining_batch(cfg, tok, step):
    """Solutions as tokens_BT and mask_BT (B, T-1), True where token t+1 is part of the solution or its end."""
    rng = random.Random(f"{cfg.seed}/pretrain/{step}")
    careless = cfg.careless if step >= cfg.pretrain_steps / 2 else 0.0
    stream = rl.problem_stream(cfg.pretrain_suites(), cfg.difficulty, rng, careless=careless)
    problems = list(itertools.islice(stream, cfg.pretrain_batch))
    prompts = tok.encode_ordinary_batch([p.prompt for p in problems], num_threads=1)
    solutions = tok.encode_ordinary_batch([p.solution for p in problems], num_threads=1)
    tokens_BT, length_B = pad([p + s + [tok.eot_token] for p, s in zip(prompts, solutions)], "cpu")
    first_B = torch.tensor([len(p) for p in prompts])
    t = torch.arange(1, tokens_BT.size(1))
    return tokens_BT, (t >= first_B[:, None]) & (t < length_B[:, None])


def pretrain(cfg, tok, model, heads, device, stop):
    """Next-token prediction of solutions: careful ones first, so that the skill is learnt, then the mixture.

    The heads join for the last third. Muon for the matrices inside the blocks, AdamW for the rest.
    """
    named = [*model.named_parameters(), *heads.named_parameters()]
    inside = {name for name, p in named if p.ndim == 2 and "wte" not in name and "lm_head" not in name}
    optimizers = [
        torch.optim.Muon([p for name, p in named if name in inside], lr=7 * cfg.pretrain_lr, weight_decay=0.0),
        torch.optim.AdamW([p for name, p in named if name not in inside], cfg.pretrain_lr, (0.9, 0.98), fused=True),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    bar = progress(range(cfg.pretrain_steps), "pretrain")
    for step in bar:
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50, max(0.05, 1 - step / cfg.pretrain_steps))
            optimizer.zero_grad()
        tokens_BT, mask_BT = (x.to(device) for x in pretraining_batch(cfg, tok, step))
        count, count_heads = mask_BT.sum(), sum(m.sum() for m in mtp.aligned_masks(mask_BT, cfg.mtp_depth))
        mine, joined = share(len(mask_BT)), heads if step >= cfg.pretrain_steps * 2 / 3 else None
        with autocast(device):
            logp_BT, logp_KBT, _, _ = mtp.logprobs(model, joined, tokens_BT[mine], mask_BT[mine], impl=cfg.logp_impl)
        loss = -logp_BT.sum() / count
        (loss - cfg.pretrain_lam * logp_KBT.sum() / count_heads.clamp(min=1)).backward()
        total_gradients([p for _, p in named])
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        bar.set_postfix(loss=f"{total(loss.detach()).item():.3f}")
        if asked(stop):
            raise KeyboardInterrupt(f"during pretraining; go on with: python train.py --resume {cfg.out}")


def pretrained(cfg, tok, device, stop):
    """Weights {model, heads} after pretraining: from the cache, if all that determines them is the same there."""
    model, heads = evaluation.build(cfg, tok, device)
    names = [f.name for f in dataclasses.fields(cfg) if f.name.startswith(("pretrain_", "n_", "mtp_d"))]
    names.remove("pretrain_task")  # but what it stands for, below: names of suites, contents of files
    names += ["difficulty", "careless", "tokenizer", "seed", "tied", "vocab_size", "logp_impl"]
    texts = [s if s in rl.SUITES else rl.sha256(rl.read_problems(s)) for s in cfg.pretrain_suites()]
    code = [Path(inspect.getfile(c)).read_text() for c in (type(model), type(heads), rl)]
    code += [inspect.getsource(f) for f in (evaluation.build, pretraining_batch, pretrain)]
    what = json.dumps([torch.__version__, device.type, texts, code, {name: getattr(cfg, name) for name in names}])
    path = Path(cfg.cache_dir) / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt"
    try:
        evaluation.load_weights(torch.load(path, map_location=device, weights_only=True), model, heads)
        found = torch.ones(())
    except Exception:  # not there or damaged: made (again)
        found = torch.zeros(())
    if total(found) < world()[1]:  # by all processes or by none
        model, heads = evaluation.build(cfg, tok, device)
        pretrain(cfg, tok, model, heads, device, stop)
        if world()[0] == 0:
            save_atomically({"model": model.state_dict(), "heads": heads.state_dict()}, path)
    return {"model": model.state_dict(), "heads": heads.state_dict()}


# ----------------------------------------------------------------------------------------------------------------------
# The run folder


def save_atomically(state, path):
    """Write a whole new file beside the old one, then take its name: a reader or a crash sees the old or the new.

    Raises OSError when there is no room; the old file is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        buffer = io.BytesIO()  # torch.save would hide what went wrong with a file
        torch.save(state, buffer)
        with open(temporary, "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """The folder of one run: metrics.jsonl and samples.txt only grow; ckpt.pt says how far they count.

    Of several processes the first writes. It locks metrics.jsonl, so that no two runs share a folder; the lock ends
    with the process, however that ends.
    """

    GROWING = ("metrics.jsonl", "samples.txt")

    def __init__(self, cfg, ckpt=None, header=None):
        """Open a run's folder to go on; what its files hold from after the checkpoint (without one: all) is cut off.

        With a header, it is the first line of a new run. ValueError if another run writes here, or has written.
        """
        self.dir, self.steps, self.saved = Path(cfg.out), cfg.steps, ckpt["step"] if ckpt else None
        self.start, self.files = time.perf_counter() - (ckpt["seconds"] if ckpt else 0), {}
        if world()[0] > 0:
            return
        metrics = open(self.dir / "metrics.jsonl", "ab", buffering=0)
        try:
            fcntl and fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.dir}: another run is writing there; wait, or name another folder") from None
        self.files["metrics.jsonl"] = metrics
        if header is None:
            now = evaluation.read_run(self.dir)[1]  # as it is under the lock
            if (now and now["step"]) != self.saved:
                raise ValueError(f"{self.dir}: another run has just written there; try again")
        else:
            if metrics.tell() > 0:
                raise ValueError(_occupied(self.dir, "metrics.jsonl"))
            self._write("metrics.jsonl", header)
        with open(metrics.name, "rb") as f:
            sizes = ckpt["sizes"] if ckpt else {"metrics.jsonl": len(f.readline()), "samples.txt": 0}
        self.files["samples.txt"] = open(self.dir / "samples.txt", "ab", buffering=0)
        for name, f in self.files.items():
            if f.tell() < sizes[name]:
                raise ValueError(f"{f.name}: shorter than the {sizes[name]} bytes it had when ckpt.pt was written")
        for name, f in self.files.items():
            f.truncate(sizes[name])
            f.seek(sizes[name])
        for left in self.dir.glob("ckpt.pt.*.tmp"):  # by a process that was killed while it saved
            left.unlink()

    @classmethod
    def create(cls, cfg, device):
        """Make the folder and write the first line of metrics.jsonl. A folder that holds a run is left as it is."""
        folder, (rank, size) = Path(cfg.out), world()
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("samples.txt", "ckpt.pt", "curves.png") if rank == 0 else ():
            if (folder / name).exists():
                raise ValueError(_occupied(folder, name))
        cpu = f"cpu, {torch.get_num_threads()} threads"
        header = {
            "config": dataclasses.asdict(cfg),
            "seed": cfg.seed,
            "commit": _commit(),
            "data": {s: rl.sha256(rl.read_problems(s)) for s in cfg.suites() if s not in rl.SUITES},
            "versions": {
                "nanoocc": evaluation.VERSION,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "device": f"{size} x {torch.cuda.get_device_name() if device.type == 'cuda' else cpu}",
        }
        return cls(cfg, header=json.dumps(header) + "\n")

    def _write(self, name, text):
        f, data = self.files[name], text.encode()
        before = f.tell()
        with self._room_for(name):
            try:
                if f.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                f.truncate(before)  # half a line is worse than none
                raise

    @contextlib.contextmanager
    def _room_for(self, name):
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{self.dir / name}: {error.strerror}; {self.how_to_go_on()}") from None

    def how_to_go_on(self):
        """For the last line of a run that breaks down."""
        if self.files and "samples.txt" not in self.files:
            return "nothing has been written yet; start it again"
        kept = "there is no checkpoint yet"
        if self.saved is not None:
            kept = f"the last good checkpoint is that of step {self.saved}"
        return f"{kept}; go on with: python train.py --resume {self.dir}"

    def log(self, record):
        if self.files:
            self._write("metrics.jsonl", json.dumps(record) + "\n")

    def show(self, step, examples):
        """Prompts, completions and rewards, for people."""
        lines = [f"step {step}  reward {reward:5.2f}  {prompt!r} -> {text!r}\n" for prompt, text, reward in examples]
        if self.files:
            self._write("samples.txt", "".join(lines) + "\n")

    def save(self, step, learner, scores):
        """A checkpoint after `step`, with the sizes that the growing files have now."""
        if not self.files:
            self.saved = step
            return
        for f in self.files.values():
            os.fsync(f.fileno())
        sizes = {name: f.tell() for name, f in self.files.items()}
        state = {"version": evaluation.VERSION, "step": step, "steps": self.steps, "seconds": self.seconds()}
        state |= {"sizes": sizes, "scores": scores, "optimizer": learner.optimizer.state_dict()}
        state |= {"model": learner.model.state_dict(), "heads": learner.heads.state_dict() if learner.heads else None}
        with self._room_for("ckpt.pt"):
            save_atomically(state, self.dir / "ckpt.pt")
        self.saved = step

    def seconds(self):
        """Of training, those before an interruption included."""
        return time.perf_counter() - self.start


def _occupied(folder, name):
    return f"--out {folder}: has a {name}; go on with --resume {folder}, or name another folder"


def check_writable(folder):
    """Make the folder if need be. Raises OSError, naming it, when nothing can be written there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _commit():
    """The commit of this code; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Reinforcement learning


def doors(cfg, lam):
    """What the doors of the trunk multiply the MTP gradient by, and what the MTP loss is multiplied by."""
    if occ.REGIMES[cfg.regime].rule == "cut":
        return 0.0, 1.0
    return (lam, 1.0) if cfg.lam_scope == "trunk" else (1.0, lam)


def over_processes(stats):
    """Each process's share of some statistics -> the statistics: sums, or maxima (rl.is_maximum)."""
    for op, maximum in ((dist.ReduceOp.SUM, False), (dist.ReduceOp.MAX, True)):
        names = [name for name in stats if rl.is_maximum(name) == maximum]
        if names and world()[1] > 1:
            stats |= zip(names, total(torch.stack([stats[name].float() for name in names]), op))
    return stats


def summary(updates):
    """One step's updates as one record: means or maxima (rl.is_maximum), and of occ/ the last (the first λ_t is 0)."""
    record = {}
    for name in {name: None for update in updates for name in update}:
        values = [float(update[name]) for update in updates if name in update]
        record[name] = max(values) if rl.is_maximum(name) else sum(values) / len(values)
        if name.startswith("occ/"):
            record[name] = values[-1]
    return record


class Clock:
    """Seconds by phase. A call adds the time since the call before to a phase; on CUDA, once its work is done."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, defaultdict(float), time.perf_counter()

    def __call__(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


class Learner:
    """All that a step of RL reads and changes: trunk, heads (None in regime off), optimizer, frozen base for the KL."""

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.regime, self.algo, self.tok = occ.REGIMES[cfg.regime], cfg.algorithm(), rl.get_tokenizer(cfg.tokenizer)
        self.model, heads = evaluation.build(cfg, self.tok, device)
        self.heads = heads if self.regime.objective else None
        self.trunk, self.phi = list(self.model.parameters()), list(self.heads.parameters()) if self.heads else []
        last = self.model.blocks[-(cfg.exact_blocks or max(cfg.n_layer // 2, 1)) :]
        self.last_blocks = list(last.parameters())
        self.optimizer = torch.optim.Adam(self.trunk + self.phi, lr=cfg.lr, fused=True)
        self.reference = None
        self.spec = mtp.Speculator(self.heads, cfg.speculative) if cfg.speculative else None
        hidden = self.regime.rule == "proxy" and cfg.occ_proxy == "hidden"
        self.at_doors = hidden and cfg.lam_scope == "trunk"  # else λ must be known before the backward begins

    def forward(self, mb, on_policy, lam, watch=None):
        objective = self.regime.objective
        with autocast(self.device):
            return rl.losses(self.model, self.heads, mb, self.algo, objective, self.cfg, on_policy, lam, watch)

    def probe(self, mb, on_policy):
        """What to log of this minibatch, its gradients g and m, and the trunk before the step."""
        passes = [functools.partial(self.forward, half, on_policy, 1.0) for half in mb.halves()]
        terms, g, m = occ.probe(passes, self.trunk, self.last_blocks, self.cfg.lam_plus, mb.half_share, total)
        return terms, g, m, self.flat_trunk()

    def probe_step(self, mb, lam, g, m, before):
        """And of the step that has been made since."""
        g_after = total(occ.flat_grad(self.forward(mb, False, 1.0).rl, self.trunk))
        return occ.step_terms(g + float(lam) * m, g, g_after, self.flat_trunk() - before)

    def flat_trunk(self):
        return torch.nn.utils.parameters_to_vector(self.trunk).detach()

    def step(self, step, clock):
        """One rollout and its updates. Returns what to log, and examples to read."""
        cfg, algo = self.cfg, self.algo
        # 1 rollout: G samples of each prompt, from exactly the distribution that is scored below
        problems = rl.training_problems(cfg, f"{cfg.seed}/rl/{step}")
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        with autocast(self.device):
            samples, reward_PG, record, examples = rl.collect(
                self.model, self.tok, problems, algo, cfg, generator, self.spec
            )
        clock("rollout")
        # 2 rewards -> advantages; old log-probs
        adv_B = rl.advantages(reward_PG, algo.advantage).flatten().to(self.device)
        with autocast(self.device):
            parts, stats = rl.minibatches(self.model, self.heads, samples, adv_B, algo, cfg, self.reference)
        clock("score")
        updates = []
        for i, mb in enumerate(parts):
            lam, terms = torch.ones((), device=self.device), {}  # filled in at 5; the backward at 6 reads lam
            door, weight = doors(cfg, lam)
            watch = occ.hidden_watch(lam, terms, cfg, total) if self.at_doors else None
            # 3 policy loss · 4 MTP loss
            out = self.forward(mb, i == 0, door, watch)
            clock("update")
            # 5 coefficient λ_t (from hidden states: in the backward, at the doors)
            if self.heads and not watch:
                measured = self.last_blocks if cfg.exact_blocks else self.trunk
                value, terms = occ.coefficient(out, measured, cfg, total)
                lam.fill_(value)
            clock("coefficient")
            probing = self.heads and mb is parts[-1] and cfg.probe_every and step % cfg.probe_every == 0
            if probing:
                exact, *before = self.probe(mb, on_policy=i == 0)
                clock("probe")
            # 6 one backward, one step: the trunk moves by g + λ_t m, the heads by their own gradient
            self.optimizer.zero_grad()
            apart = out.heads is not None  # the heads learn from another loss, whose gradient stays theirs
            (out.rl + weight * out.mtp).backward(inputs=self.trunk if apart else None, retain_graph=apart)
            if apart:
                (weight * out.heads).backward(inputs=self.phi)
            total_gradients(self.trunk + self.phi)
            norms = {"grad_norm/trunk": torch.nn.utils.clip_grad_norm_(self.trunk, cfg.grad_clip),
                     "grad_norm/heads": torch.nn.utils.clip_grad_norm_(self.phi, cfg.grad_clip)}  # fmt: skip
            self.optimizer.step()
            clock("update")
            if probing:
                terms |= exact | self.probe_step(mb, terms["occ/lam"], *before)
                clock("probe")
            updates.append(over_processes(out.stats) | terms | norms)
            clock("update")
        # 7 log
        record |= stats | summary(updates)
        record |= {f"perf/{phase}_s": seconds for phase, seconds in clock.seconds.items()}
        record["perf/tokens_per_s"] = record["response_length/sum"] / sum(clock.seconds.values())
        return record, examples


def main(cfg, ckpt=None, resume=False, stop=()):
    """Run, or go on with the run in cfg.out from its checkpoint (None: from its start). Returns the exit code.

    stop turns true when the user asks for an end. Raises ValueError or OSError where the user is to blame,
    FloatingPointError on a loss that is not finite.
    """
    device = set_up(cfg)
    if occ.REGIMES[cfg.regime].rule == "proxy" and cfg.occ_proxy == "logprob" and cfg.updates_per_rollout == 1:
        say("note: with --updates_per_rollout 1 lambda_t stays 0: nothing has changed since the rollout")
    learner = Learner(cfg, device)
    if ckpt:
        evaluation.load_weights(ckpt, learner.model, learner.heads, learner.optimizer)
        start, scores = ckpt["step"], ckpt["scores"]
    check_writable(cfg.cache_dir)
    run = Run(cfg, ckpt) if resume else Run.create(cfg, device)  # from here on, files change
    base = pretrained(cfg, learner.tok, device, stop) if ckpt is None or learner.algo.kl_coef else None
    if learner.algo.kl_coef:
        learner.reference = copy.deepcopy(learner.model).requires_grad_(False)
        evaluation.load_weights(base, learner.reference)
    if ckpt is None:
        evaluation.load_weights(base, learner.model, learner.heads)
        evals = evaluation.evaluate(learner.model, learner.tok, cfg)
        start, scores = 0, [evals["eval/score"]]
        run.log({"step": 0, "time": run.seconds()} | evals)
        run.save(0, learner, scores)

    bar = progress(range(start + 1, cfg.steps + 1), "train", initial=start, total=cfg.steps)
    for step in bar:
        record, examples = learner.step(step, Clock(device))
        broken = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            raise FloatingPointError(f"step {step}: {broken[0]} is not finite; {run.how_to_go_on()}")
        if step % cfg.eval_every == 0 or step == cfg.steps:
            record |= evaluation.evaluate(learner.model, learner.tok, cfg)
            scores.append(record["eval/score"])
            run.show(step, examples)
        run.log({"step": step, "time": run.seconds()} | record)
        reward, lam = record["reward/mean"], record.get("occ/lam", 0.0)
        bar.set_postfix(reward=f"{reward:.2f}", score=f"{scores[-1]:.1f}", lam=f"{lam:.3f}")
        ending = asked(stop)
        if step % cfg.save_every == 0 or step == cfg.steps or ending:
            run.save(step, learner, scores)
        if ending and step < cfg.steps:
            bar.close()
            say(f"stopped after step {step}; go on with: python train.py --resume {run.dir}")
            return 130
    if world()[0] == 0:
        evaluation.plot([run.dir], run.dir / "curves.png")
    say(f"score {scores[0]:.1f} -> {scores[-1]:.1f} of 100 (held out, avg@{cfg.eval_k}) "
        f"in {run.seconds() / 60:.1f} minutes; the run is in {run.dir}")  # fmt: skip
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def command_line(argv):
    """Arguments -> (config, checkpoint or None, whether to resume). The flags are the fields of Config."""
    parser = evaluation.Parser(__doc__)
    parser.add_fields(Config)
    parser.add_argument("--resume", metavar="RUN", help="folder of a run to go on with (to --steps, if given)")
    given = vars(parser.parse_args(argv))
    folder = given.pop("resume")
    if folder is None:
        return Config(**given), None, False
    extra = sorted(set(given) - {"steps"})
    if extra:
        raise ValueError(f"--{extra[0]}: with --resume a run keeps its own settings; only --steps may change")
    values, ckpt = evaluation.read_run(folder)
    unknown = set(values) ^ {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"{folder}: a run of another version: settings that differ: {', '.join(sorted(unknown))}")
    done, steps = (ckpt["step"], ckpt["steps"]) if ckpt else (0, values["steps"])
    cfg = Config(**values | {"steps": steps} | given | {"out": folder})
    if cfg.steps < done:
        raise ValueError(f"--steps {cfg.steps}: must be {done} or more: the run has come so far")
    return cfg, ckpt, True


def on_ctrl_c():
    """A list that fills at the first Ctrl-C or SIGTERM, to be met at the end of a step. A second Ctrl-C is the usual
    exception, but under torchrun, which sends these signals to processes that have had them already."""
    requested = []

    def handler(signum, frame):
        requested.append(signum)
        if not dist.is_torchelastic_launched():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return requested


if __name__ == "__main__":
    with evaluation.reporting("train.py"):
        code = main(*command_line(sys.argv[1:]), on_ctrl_c())
        leave()
        sys.exit(code)
