"""Train: pretrain a small GPT with MTP heads, then reinforcement learning in one of the regimes of occ.py.

    python train.py                                    # OCC on six suites of arithmetic, minutes on a laptop CPU
    python train.py --regime detach --seed 1           # the baseline; pretraining is shared by all regimes of a seed
    python train.py --resume out/arithmetic-occ-s0     # go on after an interruption, to the same numbers

The loop is the paper's algorithm (arXiv 2605.28184 §4), with θ the trunk, φ the heads, and losses = -objectives:

    sample with π_old;  A = advantage(rewards);  for each minibatch:  δ = log π - log π_old of the trunk and the heads
    λ_t = λ₊ <δ_RL, δ_MTP> / (‖δ_MTP‖² + ε);    θ -= η (∇ loss_rl + λ_t ∇ loss_mtp);    φ -= η ∇ loss_mtp    (η: Adam's)

A run is a folder: metrics.jsonl (first line: config, seed, commit, versions, device), ckpt.pt, samples.txt, curves.png.
Every random number is derived from (seed, purpose, step), so a resumed run needs no generator states.

Dimension key: B sequences · P prompts · G samples a prompt (B = P·G) · T positions · K MTP depth

Left out: learning-rate schedules and weight decay in RL, gradient accumulation, a value network.
"""

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
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from tqdm import tqdm

import eval as evaluation  # eval.py; the builtin keeps its name
import mtp
import occ
import rl
from model import autocast, pad


@dataclass
class Config:
    # what is learned
    task: str = "arithmetic"  # all six suites, or a comma list of add, sub, mul, mod, chain, linear
    difficulty: int = 2  # digits of the operands, 1 to 8
    careless: float = 0.8  # share of solutions written carelessly, in the second half of pretraining
    tokenizer: Literal["bytes", "gpt2"] = "bytes"  # one token a byte, or GPT-2's
    seed: int = 0  # of everything random
    # reinforcement learning
    regime: Literal[tuple(occ.REGIMES)] = "occ"  # what the MTP heads learn, and how much of it reaches the trunk
    algo: Literal[tuple(rl.ALGOS)] = "dapo"  # the policy-gradient method
    steps: int = 250  # rollouts
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
    occ_proxy: Literal["logprob", "hidden"] = "logprob"  # the paper's, or gradients at the hidden states
    occ_average: Literal["sums", "ratios"] = "sums"  # a ratio of sums (paper) or a mean of ratios (released code)
    mtp_base: Literal["mtp", "main"] = "mtp"  # old log-prob of the heads: their own, or main (released code)
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
    mtp_depth: int = 1  # MTP heads
    mtp_design: Literal["sequential", "parallel"] = "sequential"  # as in DeepSeek-V3, or as in Gloeckle et al.
    logp_impl: Literal["auto", "naive", "chunked"] = "auto"  # how log-probs are computed, see mtp.linear_logp
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

    def __post_init__(self):
        def need(name, ok, allowed):
            if not ok:
                raise ValueError(f"--{name} {getattr(self, name)}: must be {allowed}")

        may_be_zero = "seed careless pretrain_steps pretrain_lam probe_every clip_eps_low clip_eps_high kl_coef"
        for f in dataclasses.fields(self):
            value, literals = getattr(self, f.name), get_args(f.type)
            if isinstance(value, str) and literals:
                need(f.name, value in literals, f"one of {', '.join(filter(None, literals))}")
            if f.name in ("lam", "lam_plus"):
                need(f.name, abs(value) < float("inf"), "a finite number")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                zero = f.name in may_be_zero.split()
                need(f.name, 0 < value < 2**31 or zero and value == 0, "0 or more" if zero else "above 0")
        need("careless", self.careless <= 1, "a share from 0 to 1")
        need("difficulty", self.difficulty <= 8, "1 to 8")
        need("n_embd", self.n_embd % (2 * self.n_head) == 0, f"a multiple of 2·n_head = {2 * self.n_head}")
        most = self.prompts_per_step
        need("updates_per_rollout", self.updates_per_rollout <= most, f"at most prompts_per_step = {most}")
        algo = self.algorithm()
        alone = algo.advantage == "batch" and not algo.dynamic_sampling
        need("num_generations", self.num_generations > 1 or alone, "2 or more (1 with --algo reinforce)")
        need("dual_clip", algo.dual_clip > 1, "above 1")
        need("device", self.device != "cuda" or torch.cuda.is_available(), "cpu here: torch finds no CUDA")
        _, solution = rl.longest(rl.suites_of(self.task), self.difficulty)
        least = (solution + 1) * 5 // 4 if algo.overlong else solution + 1  # the overlong penalty takes the last fifth
        need("max_new_tokens", self.max_new_tokens >= least, f"{least} or more for this task and difficulty")
        self.out = self.out or f"out/{self.task.replace(',', '+')}-{self.regime}-s{self.seed}"

    def algorithm(self):
        """The method that --algo names, with the details that were given by flags."""
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(rl.Algo) if f.name != "ratio"}
        return dataclasses.replace(rl.ALGOS[self.algo], **{k: v for k, v in given.items() if v is not None})


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


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

    The heads join for the last third. Muon for the matrices inside the blocks, AdamW for the rest.
    """
    named = [*model.named_parameters(), *heads.named_parameters()]
    inside = {name for name, p in named if p.ndim == 2 and "wte" not in name and "lm_head" not in name}
    optimizers = [
        torch.optim.Muon([p for name, p in named if name in inside], lr=7 * cfg.pretrain_lr, weight_decay=0.0),
        torch.optim.AdamW([p for name, p in named if name not in inside], cfg.pretrain_lr, (0.9, 0.98), fused=True),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    bar = tqdm(range(cfg.pretrain_steps), "pretrain", disable=None)
    for step in bar:
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50, max(0.05, 1 - step / cfg.pretrain_steps))
            optimizer.zero_grad()
        tokens_BT, mask_BT = (x.to(device) for x in pretraining_batch(cfg, tok, step))
        joined = heads if step >= cfg.pretrain_steps * 2 / 3 else None
        with autocast(device):
            logp_BT, logp_KBT, mask_KBT, _ = mtp.logprobs(model, joined, tokens_BT, mask_BT, impl=cfg.logp_impl)
        loss = -logp_BT.sum() / mask_BT.sum()
        (loss - cfg.pretrain_lam * logp_KBT.sum() / mask_KBT.sum().clamp(min=1)).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if stop:
            raise KeyboardInterrupt(f"during pretraining; go on with: python train.py --resume {cfg.out}")


def pretrained(cfg, tok, device, stop):
    """Weights {model, heads} after pretraining: from the cache, if all that determines them is the same there."""
    model, heads = evaluation.build(cfg, tok, device)
    names = [f.name for f in dataclasses.fields(cfg) if f.name.startswith(("pretrain_", "n_", "mtp_d"))]
    names += ["task", "difficulty", "careless", "tokenizer", "seed", "tied", "logp_impl"]
    code = [Path(inspect.getfile(c)).read_text() for c in (type(model), type(heads), rl)]
    code += [inspect.getsource(f) for f in (evaluation.build, pretraining_batch, pretrain)]
    what = json.dumps([torch.__version__, device.type, code, {name: getattr(cfg, name) for name in names}])
    path = Path(cfg.cache_dir) / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt"
    try:
        evaluation.load_weights(torch.load(path, map_location=device, weights_only=True), model, heads)
    except Exception:  # not there or damaged: made (again)
        pretrain(cfg, tok, model, heads, device, stop)
        save_atomically({"model": model.state_dict(), "heads": heads.state_dict()}, path)
    return {"model": model.state_dict(), "heads": heads.state_dict()}


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
    """The folder of one run: metrics.jsonl and samples.txt only grow; ckpt.pt says how far they count."""

    GROWING = ("metrics.jsonl", "samples.txt")

    def __init__(self, cfg, ckpt=None):
        """Open a run's folder to go on; what its files hold from after the checkpoint (without one: all) is cut off."""
        self.dir, self.steps, self.saved = Path(cfg.out), cfg.steps, ckpt["step"] if ckpt else None
        self.start = time.perf_counter() - (ckpt["seconds"] if ckpt else 0)
        with open(self.dir / "metrics.jsonl", "rb") as f:
            sizes = ckpt["sizes"] if ckpt else {"metrics.jsonl": len(f.readline()), "samples.txt": 0}
        self.files = {name: open(self.dir / name, "a", encoding="utf-8") for name in self.GROWING}
        for name, f in self.files.items():
            if f.tell() < sizes[name]:
                raise ValueError(f"{f.name}: shorter than the {sizes[name]} bytes it had when ckpt.pt was written")
        for name, f in self.files.items():
            f.truncate(sizes[name])
            f.seek(sizes[name])

    @classmethod
    def create(cls, cfg, device):
        """Make the folder and write the first line of metrics.jsonl. A folder that holds a run is left as it is."""
        folder = Path(cfg.out)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*cls.GROWING, "ckpt.pt", "curves.png"):
            if (folder / name).exists():
                raise ValueError(f"--out {folder}: has a {name}; go on with --resume {folder}, or name another folder")
        first = {
            "config": dataclasses.asdict(cfg),
            "seed": cfg.seed,
            "commit": _commit(),
            "versions": {
                "nanoocc": evaluation.VERSION,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        }
        with open(folder / "metrics.jsonl", "x", encoding="utf-8") as f:
            f.write(json.dumps(first) + "\n")
        return cls(cfg)

    def log(self, record):
        self.files["metrics.jsonl"].write(json.dumps(record) + "\n")
        self.files["metrics.jsonl"].flush()

    def show(self, step, examples):
        """Prompts, completions and rewards, for people."""
        lines = [f"step {step}  reward {reward:5.2f}  {prompt!r} -> {text!r}\n" for prompt, text, reward in examples]
        self.files["samples.txt"].write("".join(lines) + "\n")
        self.files["samples.txt"].flush()

    def save(self, step, model, heads, optimizer, scores):
        """A checkpoint after `step`, with the sizes that the growing files have now."""
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())
        sizes = {name: f.tell() for name, f in self.files.items()}
        state = {"version": evaluation.VERSION, "step": step, "steps": self.steps, "seconds": self.seconds()}
        state |= {"sizes": sizes, "scores": scores, "optimizer": optimizer.state_dict()}
        state |= {"model": model.state_dict(), "heads": heads.state_dict() if heads else None}
        save_atomically(state, self.dir / "ckpt.pt")
        self.saved = step

    def seconds(self):
        """Of training, those before an interruption included."""
        return time.perf_counter() - self.start


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


def summary(updates):
    """One step's updates as one record: means, but maxima of ratio_max, and of occ/ the last (the first λ_t is 0)."""
    record = {}
    for name in {name: None for update in updates for name in update}:
        values = [float(update[name]) for update in updates if name in update]
        record[name] = max(values) if "ratio_max" in name else sum(values) / len(values)
        if name.startswith("occ/"):
            record[name] = values[-1]
    return record


def main(cfg, ckpt=None, resume=False, stop=()):
    """Run, or go on with the run in cfg.out from its checkpoint (None: from its start). Returns the exit code.

    stop turns true when the user asks for an end. Raises ValueError or OSError where the user is to blame,
    FloatingPointError on a loss that is not finite.
    """
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    regime, algo, tok = occ.REGIMES[cfg.regime], cfg.algorithm(), rl.get_tokenizer(cfg.tokenizer)
    if regime.rule == "proxy" and cfg.updates_per_rollout == 1:
        tqdm.write("note: with --updates_per_rollout 1 lambda_t stays 0: nothing has changed since the rollout")

    model, heads = evaluation.build(cfg, tok, device)
    heads = heads if regime.objective else None
    trunk, phi = list(model.parameters()), list(heads.parameters()) if heads else []
    optimizer = torch.optim.Adam(trunk + phi, lr=cfg.lr, fused=True)
    if ckpt:
        evaluation.load_weights(ckpt, model, heads, optimizer)
        start, scores = ckpt["step"], ckpt["scores"]
    check_writable(cfg.cache_dir)
    run = Run(cfg, ckpt) if resume else Run.create(cfg, device)  # from here on, files change
    base = pretrained(cfg, tok, device, stop) if ckpt is None or algo.kl_coef else None
    if ckpt is None:
        evaluation.load_weights(base, model, heads)
        evals = evaluation.evaluate(model, tok, cfg)
        start, scores = 0, [evals["eval/score"]]
        run.log({"step": 0, "time": run.seconds()} | evals)
        run.save(0, model, heads, optimizer, scores)
    reference = None
    if algo.kl_coef:
        reference = copy.deepcopy(model).requires_grad_(False)
        evaluation.load_weights(base, reference)

    def forward(mb, on_policy, lam):
        with autocast(device):
            return rl.losses(model, heads, mb, algo, regime.objective, cfg, on_policy, lam)

    bar = tqdm(range(start + 1, cfg.steps + 1), "train", initial=start, total=cfg.steps, disable=None)
    for step in bar:
        began = time.perf_counter()
        # 1 rollout: G samples of each prompt, from exactly the distribution that is scored below
        problems = rl.problem_stream(rl.suites_of(cfg.task), cfg.difficulty, random.Random(f"{cfg.seed}/rl/{step}"))
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        with autocast(device):
            samples, reward_PG, record, examples = rl.collect(model, tok, problems, algo, cfg, generator)
        rolled = time.perf_counter()
        # 2 rewards -> advantages; old log-probs
        adv_B = rl.advantages(reward_PG, algo.advantage).flatten().to(device)
        with autocast(device):
            parts, stats = rl.minibatches(model, heads, samples, adv_B, algo, regime.objective, cfg, reference)
        updates = []
        for i, mb in enumerate(parts):
            lam = torch.ones((), device=device)  # filled in at 5; the backward at 6 reads it
            door, weight = doors(cfg, lam)
            # 3 policy loss · 4 MTP loss
            out = forward(mb, i == 0, door)
            # 5 coefficient λ_t
            value, terms = occ.coefficient(out, trunk, cfg) if heads else (0.0, {})
            if heads and mb is parts[-1] and cfg.probe_every and step % cfg.probe_every == 0:
                halves = mb.halves(cfg.num_generations)
                passes = [functools.partial(forward, half, i == 0, 1.0) for half in halves]
                terms |= occ.probe(passes, trunk, cfg.lam_plus, share=len(halves[0].adv_B) / len(mb.adv_B))
            lam.fill_(value)
            # 6 one backward, one step: the trunk moves by g + λ_t m, the heads by their own gradient
            loss = out.rl + weight * out.mtp
            optimizer.zero_grad()
            loss.backward()
            norms = {"grad_norm/trunk": torch.nn.utils.clip_grad_norm_(trunk, cfg.grad_clip),
                     "grad_norm/heads": torch.nn.utils.clip_grad_norm_(phi, cfg.grad_clip)}  # fmt: skip
            if not torch.isfinite(loss + sum(norms.values())):
                raise FloatingPointError(f"step {step}: the loss or a gradient is not finite; the last good checkpoint "
                                         f"is that of step {run.saved}, {run.dir / 'ckpt.pt'}")  # fmt: skip
            optimizer.step()
            updates.append(out.stats | terms | norms)
        # 7 log
        ended = time.perf_counter()
        record = {"step": step, "time": run.seconds()} | record | stats | summary(updates)
        record |= {"perf/rollout_s": rolled - began, "perf/update_s": ended - rolled,
                   "perf/tokens_per_s": record["response_length/sum"] / (ended - began)}  # fmt: skip
        if step % cfg.eval_every == 0 or step == cfg.steps:
            record |= evaluation.evaluate(model, tok, cfg)
            scores.append(record["eval/score"])
            run.show(step, examples)
        run.log(record)
        reward, lam = record["reward/mean"], record.get("occ/lam", 0.0)
        bar.set_postfix(reward=f"{reward:.2f}", score=f"{scores[-1]:.1f}", lam=f"{lam:.3f}")
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            run.save(step, model, heads, optimizer, scores)
        if stop and step < cfg.steps:
            bar.close()
            print(f"stopped after step {step}; go on with: python train.py --resume {run.dir}")
            return 130
    evaluation.plot([run.dir], run.dir / "curves.png")
    print(f"score {scores[0]:.1f} -> {scores[-1]:.1f} of 100 (held out, avg@{cfg.eval_k}) "
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
    """A list that fills at the first Ctrl-C, to be met at the end of a step. The second is the usual exception."""
    requested = []

    def handler(signum, frame):
        requested.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    return requested


if __name__ == "__main__":
    with evaluation.reporting("train.py"):
        sys.exit(main(*command_line(sys.argv[1:]), on_ctrl_c()))
