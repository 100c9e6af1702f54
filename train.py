"""Train: pretrain a small GPT with MTP heads, then reinforcement learning in one of the regimes of occ.py.

    python train.py                                    # OCC on six suites of arithmetic, minutes on a laptop CPU
    python train.py --regime detach --seed 1           # the baseline; pretraining is shared by all regimes of a seed
    python train.py --resume out/arithmetic-occ-s0     # go on after an interruption, to the same numbers
    torchrun --nproc_per_node=2 train.py               # several processes, each with a share of every batch

The algorithm is `step` in rl.py. What is here prepares a base model and calls `step` again and again.

A run is a folder: metrics.jsonl (first line: config, sizes of the model, digests of the data, seed, commit, versions,
device; then a line per step), ckpt.pt, curves.png. Random numbers are derived from (seed, purpose, step), so a resumed
run needs no generator states; those of evaluations are always the same.

Left out: learning-rate schedules and weight decay in RL, gradient accumulation.
"""

import os

# OpenMP's threads wait for work by spinning. Beside another busy program, spinning makes a step with two threads ten
# times slower, so they sleep instead. This must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import copy
import dataclasses
import hashlib
import inspect
import io
import json
import math
import platform
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from tqdm import tqdm

import eval as evaluation  # eval.py; the builtin keeps its name
import model as gpt
import mtp
import occ
import rl
from model import gather, pad, share, total_gradients, world

THREADS = torch.get_num_threads()  # torch's default: what this process may use, or OMP_NUM_THREADS


@dataclasses.dataclass
class Config:
    # what is learned
    task: str = "arithmetic"  # add,sub,mul,mod,chain,linear; or some of them, gsm8k, svamp, mawps, FILE.jsonl
    data_dir: str = "data"  # folder of data sets; what is missing there is fetched
    difficulty: int = 2  # digits of the operands, 1 to 8
    careless: float = 0.8  # share of careless solutions in the second half of pretraining
    tokenizer: Literal["bytes", "gpt2"] = "bytes"  # one token per byte, or GPT-2's
    seed: int = 0  # seed of all random numbers but those of evaluations
    # reinforcement learning
    regime: Literal[tuple(occ.REGIMES)] = "occ"  # the loss of the heads, and a rule for lambda
    algo: Literal[tuple(rl.ALGOS)] = "dapo"  # the policy-gradient method
    steps: int = 250  # steps; each is a rollout and its updates
    lr: float = 2e-4  # step size of Adam, for trunk and heads
    prompts_per_step: int = 32  # prompts per rollout
    num_generations: int = 8  # samples per prompt
    updates_per_rollout: int = 4  # minibatches a rollout is cut into, one update each
    max_new_tokens: int = 16  # most tokens in a response
    temperature: float = 1.0  # temperature of sampling and of every log-prob
    # the coefficient of the MTP loss
    lam: float = 1.0  # lambda of the regimes ce and policy
    lam_plus: float = 1.0  # lambda_plus, a factor of lambda in the regimes occ and exact
    # model
    n_layer: int = 4  # blocks of the trunk
    n_head: int = 4  # attention heads
    n_embd: int = 64  # channels
    tied: bool = False  # use one matrix as embedding and unembedding
    mtp_depth: int = 1  # number of MTP heads
    mtp_design: Literal["sequential", "parallel"] = "sequential"  # DeepSeek-V3's, or Gloeckle's
    logp_impl: Literal["auto", "naive", "chunked", "triton"] = "auto"  # how: see mtp.linear_logp
    # pretraining
    pretrain_steps: int = 1000  # batches of solutions; 0 is none
    pretrain_batch: int = 160  # solutions per batch
    pretrain_lr: float = 3e-3  # learning rate of AdamW; Muon has 7 times this
    pretrain_lam: float = 0.3  # weight of the MTP loss, which joins in the last third
    # the run
    out: str = ""  # folder of the run; by default out/<task>-<regime>-s<seed>
    cache_dir: str = "out/base"  # folder of pretrained models, by a hash of what makes them
    save_every: int = 25  # steps between checkpoints
    keep: str = ""  # comma list of steps whose checkpoints are also kept, as ckpt-STEP.pt
    eval_every: int = 25  # steps between evaluations
    eval_problems: int = 32  # held-out problems per suite
    eval_k: int = 8  # samples per held-out problem
    probe_every: int = 10  # steps between measurements of the real c and v2; 0 is never
    device: str = "auto"  # cuda if there is one, else cpu; or any of torch's: cuda:1, mps, xpu

    def __post_init__(self):
        def need(name, ok, allowed):
            if not ok:
                raise ValueError(f"--{name} {getattr(self, name)}: must be {allowed}")

        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), get_args(f.type)
            if choices:
                need(f.name, value in choices, f"one of {', '.join(choices)}")
            elif f.name in ("lam", "lam_plus"):
                need(f.name, math.isfinite(value), "a finite number")
            elif f.name in ("seed", "careless", "pretrain_steps", "pretrain_lam", "probe_every"):
                need(f.name, 0 <= value < 2**31, "0 or more")
            elif f.type in (int, float):
                need(f.name, 0 < value < 2**31, "above 0")
        need("careless", self.careless <= 1, "a share from 0 to 1")
        need("difficulty", self.difficulty <= 8, "1 to 8")
        need("temperature", self.temperature >= 0.01, "0.01 or more")
        need("keep", re.fullmatch("[0-9,]*", self.keep), "a comma list of steps, as 0,25,60")
        need("n_embd", self.n_embd % self.n_head == 0, f"a multiple of n_head = {self.n_head}")
        at_most = f"at most prompts_per_step = {self.prompts_per_step}"
        need("updates_per_rollout", self.updates_per_rollout <= self.prompts_per_step, at_most)
        least = 1 if self.algo == "reinforce" else 2
        need("num_generations", self.num_generations >= least, "2 or more (1 with reinforce)")
        for name in ("out", "data_dir", "cache_dir"):
            setattr(self, name, os.path.expanduser(getattr(self, name)))
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


# ---- Devices and processes -----------------------------------------------------------------------


def set_up(cfg):
    """The device of this process; torchrun's processes meet here. ValueError if it cannot be used."""
    device, processes = gpt.find_device(cfg.device), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    mtp.pick_impl(cfg.logp_impl, 1, 1, device)  # ValueError if it cannot run here
    if device.type == "cpu":
        # Multiply-adds of an update's largest matrix product. A thread needs 30 million of them to be worth waking. At
        # the default size (17 million) two threads took 1.1 times as long as one, and a step of Muon 8 times.
        work = cfg.tokens_per_update() // world()[1] * 4 * cfg.n_embd**2
        # torchrun tells each process to take one thread, however many cores there are.
        threads = evaluation.cores() // processes if dist.is_initialized() else THREADS
        torch.set_num_threads(max(min(work // 30_000_000, threads), 1))
    return device


def describe(cfg, device):
    """The device in words."""
    dtype = str(gpt.matmul_dtype(device, cfg.n_embd)).removeprefix("torch.")
    name = f"cpu, {torch.get_num_threads()} threads"
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    elif cfg.device == "auto":
        name += " (torch finds no GPU)"
    return f"{world()[1]} x {name}, matrix products in {dtype}"


def say(line):
    """Print, once for all processes."""
    if world()[0] == 0:
        tqdm.write(line)
        sys.stdout.flush()


def progress(steps, name, initial=0, total=None):
    """A bar on a terminal, once for all processes."""
    hidden = None if world()[0] == 0 else True
    return tqdm(steps, name, initial=initial, total=total, disable=hidden)


# ---- Pretraining ---------------------------------------------------------------------------------


class Muon:
    """Momentum, orthogonalised: the update of a matrix has singular values near 1 (Jordan et al. 2024).

    Matrices of one shape are moved as one stack. Differs from torch.optim.Muon, which computes in bfloat16: on most
    CPUs float32 is ten times as fast, and elsewhere it is no slower for matrices of this size.
    """

    def __init__(self, params):
        self.stacks = {}
        for p in params:
            self.stacks.setdefault(p.shape, []).append(p)
        self.momenta = {}
        for shape, stack in self.stacks.items():
            self.momenta[shape] = stack[0].new_zeros(len(stack), *shape)

    @torch.no_grad()
    def step(self, lr):
        for (rows, columns), stack in self.stacks.items():
            # Heads come last and join late: those without a gradient are at the end of the stack.
            moved = [p for p in stack if p.grad is not None]
            if not moved:
                continue
            grad = torch.stack([p.grad for p in moved])
            momentum = self.momenta[rows, columns][: len(moved)].lerp_(grad, 0.05)
            x = grad.lerp(momentum, 0.95)  # Nesterov's
            x = x.mT if rows > columns else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):  # Newton-Schulz takes every singular value close to 1
                s = x @ x.mT
                polynomial = torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315)
                x = torch.baddbmm(x, polynomial, x, beta=3.4445)
            x = x.mT if rows > columns else x
            torch._foreach_sub_(moved, x.unbind(), alpha=lr * max(1, rows / columns) ** 0.5)


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
    return pad(rows), pad(masks)


def pretrain(cfg, model, heads, device):
    """Next-token prediction of solutions. Muon moves all matrices but embeddings and unembedding, AdamW the rest."""
    inside, rest = [], []
    for name, p in [*model.named_parameters(), *heads.named_parameters()]:
        is_inside = p.ndim == 2 and name not in ("wte.weight", "wpe.weight", "lm_head.weight")
        (inside if is_inside else rest).append(p)
    muon, adamw = Muon(inside), torch.optim.AdamW(rest, betas=(0.9, 0.98), fused=True)
    bar = progress(range(cfg.pretrain_steps), "pretrain")
    for step in bar:
        # A short warm-up, then linear decay.
        lr = cfg.pretrain_lr * min(1, (step + 1) / 50, max(0.05, 1 - step / cfg.pretrain_steps))
        tokens_BT, mask_BT = pretraining_batch(cfg, step)
        # Means are over the whole batch. Each process works on its share of the rows.
        count = mask_BT.sum().item()
        count_mtp = max(mtp.aligned_mask(mask_BT, cfg.mtp_depth).sum().item(), 1)
        mine = share(len(mask_BT))
        tokens_BT, mask_BT = tokens_BT[mine].to(device), mask_BT[mine].to(device)
        joined = heads if step >= cfg.pretrain_steps * 2 / 3 else None  # for the last third
        logp_BT, logp_BKT = mtp.logprobs(model, joined, tokens_BT, mask_BT, impl=cfg.logp_impl)
        loss = -logp_BT.sum() / count - cfg.pretrain_lam * logp_BKT.sum() / count_mtp
        model.zero_grad()
        heads.zero_grad()
        loss.backward()
        total_gradients(inside + rest)
        torch.nn.utils.clip_grad_norm_(inside + rest, 1.0)
        muon.step(7 * lr)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        if step % 50 == 0:  # rarely: to look at a number makes the host wait for a GPU
            bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrained(cfg, shape, device):
    """Weights {model, heads} after pretraining: from the cache, if settings and sources are the same there."""
    names = "difficulty careless tokenizer seed logp_impl mtp_depth mtp_design".split()
    names += [name for name in vars(cfg) if name.startswith("pretrain_")]
    key = [torch.__version__, device.type, str(gpt.matmul_dtype(device, shape.n_embd)), world()[1]]
    key += [dataclasses.asdict(shape), *(getattr(cfg, name) for name in names)]
    key += [suite if suite in rl.SUITES else rl.digest(suite) for suite in cfg.suites()]
    key += map(inspect.getsource, [gpt, mtp, rl, Muon, pretraining_batch, pretrain])
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = Path(cfg.cache_dir) / f"{digest[:16]}.pt"
    if all(gather(path.exists())):  # by all processes or by none
        return torch.load(path, map_location=device, weights_only=True)
    say(f"pretraining: {cfg.pretrain_steps} steps of {cfg.pretrain_batch} solutions")
    model, heads = mtp.build(shape, cfg.mtp_depth, cfg.mtp_design, cfg.seed, device)
    pretrain(cfg, model, heads, device)
    base = {"model": model.state_dict(), "heads": heads.state_dict()}
    save(base, path)
    return base


# ---- The run folder ------------------------------------------------------------------------------


def save(state, path):
    """The first process writes a new file, which then takes the old one's name: a crash leaves the old or the new.

    It goes through memory, so that a full disk is an OSError; torch.save's own is a RuntimeError.
    """
    if world()[0] > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, buffer = path.with_name(f"{path.name}.{os.getpid()}.tmp"), io.BytesIO()
    torch.save(state, buffer)
    try:
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """The folder of a run. The first process writes there, and locks metrics.jsonl while it runs."""

    def __init__(self, cfg, resume, last):
        """A run that goes on keeps the lines of the log up to step `last`.

        ValueError if another run writes there or, unless this one goes on with it, has written there.
        """
        self.cfg, path = cfg, Path(cfg.out) / "metrics.jsonl"
        if world()[0] > 0:
            self.log = open(os.devnull, "w", encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in (path, path.with_name("ckpt.pt"), path.with_name("curves.png")):
            if not resume and old.exists() and old.stat().st_size:
                there = f"has a {old.name}; go on with --resume {shlex.quote(cfg.out)}"
                raise ValueError(f"--out {cfg.out}: {there}, or name another folder")
        self.log = open(path, "a", buffering=1, encoding="utf-8")  # line by line
        try:
            import fcntl

            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = "another run is writing there; wait, or name another folder"
            raise ValueError(f"{cfg.out}: {busy}") from None
        except (ImportError, OSError) as error:  # Windows, or a file system without locks
            say(f"note: no lock keeps other runs out of {cfg.out} ({error})")
        length = 0
        for line in path.read_bytes().splitlines(keepends=True):
            # The header has no step. A last line may be torn.
            if not line.endswith(b"\n") or json.loads(line).get("step", -1) > last:
                break
            length += len(line)
        os.truncate(path, length)

    def write(self, record):
        self.log.write(json.dumps(record) + "\n")

    def save(self, step, began, parts):
        state = {name: part.state_dict() if part else None for name, part in parts.items()}
        state |= {"step": step, "steps": self.cfg.steps, "seconds": time.perf_counter() - began}
        save(state, Path(self.cfg.out) / "ckpt.pt")
        if str(step) in self.cfg.keep.split(","):
            save(state, Path(self.cfg.out) / f"ckpt-{step}.pt")


def header(cfg, shape, device):
    """The first line of metrics.jsonl."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # there is no git
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["nanoocc"] = evaluation.VERSION  # of the folder's format
    impl = mtp.pick_impl(cfg.logp_impl, cfg.tokens_per_update(), shape.vocab_size, device)
    return {
        "config": dataclasses.asdict(cfg),
        "shape": dataclasses.asdict(shape),
        "data": {suite: rl.digest(suite) for suite in cfg.suites() if suite not in rl.SUITES},
        "command": sys.argv,
        "seed": cfg.seed,
        "commit": commit,
        "versions": versions,
        "device": describe(cfg, device),
        "logp_impl": impl,
    }


# ---- A run ---------------------------------------------------------------------------------------


def main(cfg, resume=False):
    """A new run, or one that goes on from the checkpoint in cfg.out.

    Raises ValueError where the user is to blame, FloatingPointError on a number that is not finite, OSError where the
    folder cannot be written, and KeyboardInterrupt; the last three say how to go on.
    """
    device, tok, began = set_up(cfg), cfg.tok(), time.perf_counter()
    say(f"{cfg.out}: {describe(cfg, device)}")
    say(f"curves so far, at any time: python eval.py plot {shlex.quote(cfg.out)}")
    if occ.REGIMES[cfg.regime].rule == "proxy" and cfg.updates_per_rollout == 1:
        say("note: with --updates_per_rollout 1 lambda_t stays 0: nothing changes after a rollout")
    ckpt = None
    if resume:
        about, ckpt = evaluation.read_run(cfg.out)
        evaluation.check_data(about)
        shape = gpt.GPTConfig(**about["shape"])
    else:
        block_size, notes = rl.check_room(cfg, tok)
        for note in notes:
            say(note)
        sizes = cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.tied
        shape = gpt.GPTConfig(tok.n_vocab, block_size, *sizes)
    start = saved = ckpt["step"] if ckpt else 0
    began -= ckpt["seconds"] if ckpt else 0
    run = Run(cfg, resume, start if ckpt else -1)
    model, heads, optimizer = evaluation.new_state(cfg, shape, device)
    go_on = f"go on with: python train.py --resume {shlex.quote(cfg.out)}"
    if resume and cfg.steps != (ckpt or about["config"])["steps"]:
        go_on += f" --steps {cfg.steps}"
    try:
        if not resume:
            run.write(header(cfg, shape, device))
        evaluation.load_weights(ckpt or pretrained(cfg, shape, device), model=model, heads=heads)
        reference = copy.deepcopy(model) if rl.ALGOS[cfg.algo].kl_coef else None
        state = {"model": model, "heads": heads, "optimizer": optimizer, "reference": reference}
        if ckpt:
            evaluation.load_weights(ckpt, optimizer=optimizer, reference=reference)
        else:
            record = rl.evaluate(model, tok, cfg)
            run.write({"step": 0, "time": time.perf_counter() - began} | record)
            run.save(0, began, state)
            mixed = f"{100 * record['eval/mixed']:.0f} % of the prompts have both right and wrong samples"
            little = "; RL has little to learn from here" if record["eval/mixed"] < 0.1 else ""
            say(f"step 0: score {record['eval/score']:.1f}; {mixed}{little}")
        for step in progress(range(start + 1, cfg.steps + 1), "train", start, cfg.steps):
            record, examples, _ = rl.step(cfg, model, heads, optimizer, tok, step, reference)
            for name, value in record.items():
                if not math.isfinite(value):
                    last = f"the last good checkpoint is that of step {saved}"
                    raise FloatingPointError(f"step {step}: {name} is not finite; {last}; {go_on}")
            if step % cfg.eval_every == 0 or step == cfg.steps:
                record |= rl.evaluate(model, tok, cfg)
                prompt, text, right = examples[0]
                now = f"right {record['reward/right']:.2f}, score {record['eval/score']:.1f}"
                example = f"{prompt!r} -> {text!r} {'right' if right else 'wrong'}"
                say(f"step {step}: {now}, λ {record.get('occ/lam', 0.0):.3f}   {example}")
            run.write({"step": step, "time": time.perf_counter() - began} | record)
            if step % cfg.save_every == 0 or step == cfg.steps or str(step) in cfg.keep.split(","):
                run.save(step, began, state)
                saved = step
    except KeyboardInterrupt:
        raise KeyboardInterrupt(go_on) from None
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); what was saved before is kept"
        raise OSError(f"{error.filename or cfg.out}: {reason}; make room, then {go_on}") from None
    finally:
        run.log.close()
    if world()[0] == 0:
        curves = Path(cfg.out) / "curves.png"
        evaluation.plot([cfg.out], curves)
        scores = [r["eval/score"] for r in evaluation.read_metrics(cfg.out)[1] if "eval/score" in r]
        minutes = (time.perf_counter() - began) / 60
        change = f"score {scores[0]:.1f} -> {scores[-1]:.1f} of 100"
        say(f"{change} (held out, avg@{cfg.eval_k}) in {minutes:.1f} minutes")
        # Without a second update there is no δ to explain.
        command = "explain" if heads and cfg.updates_per_rollout > 1 else "sample"
        say(f"look at {curves}; then: python eval.py {command} {shlex.quote(cfg.out)}")


# ---- Command line --------------------------------------------------------------------------------


def command_line(argv):
    """Arguments -> (config, whether to resume). The flags are the fields of Config, their comments the help texts."""
    parser = evaluation.Parser(__doc__)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for f in dataclasses.fields(Config):
        kind = str if get_args(f.type) else f.type
        options = {"type": kind, "metavar": "|".join(get_args(f.type)) or kind.__name__}
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        text = comments[f.name] + ("" if f.default == "" else f" [{f.default}]")
        parser.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, **options)
    parser.add_argument(
        "--resume", metavar="RUN", help="folder of a run to go on with, to --steps if given"
    )
    given = vars(parser.parse_args(argv))
    folder = given.pop("resume")
    if folder is None:
        return Config(**given), False
    for name in given:
        if name not in ("steps", "device"):
            kept = "with --resume a run keeps all its settings but --steps and --device"
            raise ValueError(f"--{name}: {kept}")
    folder = os.path.expanduser(folder)
    about, ckpt = evaluation.read_run(folder)
    differ = ", ".join(sorted(set(about["config"]) ^ set(Config.__dataclass_fields__)))
    if differ:
        raise ValueError(f"{folder}: a run of another version: settings that differ: {differ}")
    steps = {"steps": ckpt["steps"]} if ckpt else {}
    cfg = Config(**about["config"] | steps | given | {"out": folder})
    if ckpt and cfg.steps < ckpt["step"]:
        raise ValueError(f"--steps {cfg.steps}: must be {ckpt['step']} or more: it is there")
    return cfg, True


if __name__ == "__main__":
    with evaluation.reporting("train.py"):
        main(*command_line(sys.argv[1:]))
        if dist.is_initialized():
            dist.barrier()  # a process that ended before the others would look dead to them
            dist.destroy_process_group()
