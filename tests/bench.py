"""How fast a step is, where its time goes, what the regimes cost, and how that compares with others.

    python tests/bench.py            # phases, regimes, speculative sampling
    python tests/bench.py --logp     # log-probs from hidden states: ours, torch's, Liger, CCE
    python tests/bench.py --peers    # samples/s beside TRL's GRPOTrainer, where trl is installed

The model is untrained and a coin decides rewards: speed does not depend on what has been learnt. The learning rate is
next to nothing, so that all regimes sample the same tokens; dynamic sampling and probes are off. What is compared takes
turns in one process, after one turn to warm up; numbers are medians, in brackets the smallest and the largest.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see train.py

import argparse
import dataclasses
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import eval as evaluation
import model as gpt
import mtp
import rl
import train

SETTINGS = {"default": {}, "wide": dict(n_layer=6, n_embd=256, max_new_tokens=48)}
REGIMES = ["detach", "off", "ce", "policy", "occ", "exact", "occ-ce"]  # others are divided by the first
LOGP_SHAPES = {  # N tokens, C channels, V words
    "cpu": ((65536, 128, 64), (16384, 128, 576), (8192, 256, 50304)),
    "cuda": ((16384, 768, 50304), (32768, 2048, 151936)),
}


class Learner:
    """A config, its model, heads and optimizer, ready to be timed."""

    def __init__(self, **changes):
        self.cfg = train.Config(**{**dict(lr=1e-9, probe_every=0), **changes})
        self.device = train.set_up(self.cfg)
        self.model, self.heads, self.optimizer = evaluation.new_state(self.cfg, self.device)
        self.tok = self.cfg.tok()

    def step(self, step):
        """Seconds, and the record."""
        began = time.perf_counter()
        args = self.cfg, self.model, self.heads, self.optimizer, self.tok, step
        record, _ = train.step_of_rl(*args)
        return time.perf_counter() - began, record


def coin(problem, text):
    return zlib.crc32(text.encode()) % 2 == 0


def shown(values, digits=2):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def seconds_of(function, *args):
    began = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_peak(device, repeats):
    """FLOP/s of a large product of two matrices in the dtype of training."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=gpt.matmul_dtype(device))
    return 2 * n**3 / statistics.median([seconds_of(torch.mm, a, b) for _ in range(repeats + 1)][1:])


def useful_flops(learner, tokens):
    """What one step cannot do without: two FLOPs a weight and token in a matrix product, six with gradients.

    Not counted: attention, padding, the forward passes for old log-probs.
    """
    cfg, K = learner.cfg, learner.cfg.mtp_depth
    samples = cfg.prompts_per_step * cfg.num_generations
    prompts = [p.prompt for p in itertools.islice(rl.training_problems(cfg, 0), 1000)]
    prompt = statistics.mean(map(len, prompts))
    trunk = sum(p.numel() for p in learner.model.blocks.parameters() if p.ndim == 2)
    heads = sum(p.numel() for p in learner.heads.parameters() if p.ndim == 2)
    unembedding, positions = learner.model.lm_head.weight.numel(), samples * prompt + tokens
    rollout = trunk * (cfg.prompts_per_step * prompt + tokens) + unembedding * tokens
    update = (trunk + heads) * positions + (1 + K) * unembedding * tokens
    return 2 * (rollout + 3 * update)


def phases(repeats):
    """Where the time of a step of occ goes, as rows of a table."""
    rows = []
    for name, setting in SETTINGS.items():
        learner = Learner(**setting)
        steps = [learner.step(step) for step in range(repeats + 1)][1:]
        whole = statistics.median(seconds for seconds, _ in steps)
        tokens = statistics.median(record["response_length/sum"] for _, record in steps)
        row = [name, torch.get_num_threads(), f"{256 / whole:.0f}", f"{tokens / whole:.0f}"]
        for phase in ("rollout", "score", "update", "coefficient"):
            seconds = statistics.median(record[f"perf/{phase}_s"] for _, record in steps)
            row.append(f"{100 * seconds / whole:.1f} %")
        rate, peak = useful_flops(learner, tokens) / whole, matmul_peak(learner.device, repeats)
        rows.append([*row, f"{rate / 1e9:.0f}", f"{100 * rate / peak:.0f} %"])
    head = "setting threads samples/s tokens/s rollout score update coefficient GFLOP/s of_the_peak".split()
    return evaluation.markdown(head, rows)


def regimes(repeats):
    """Seconds a step over those of the first regime, in turn, as rows of a table."""
    rows = []
    for name, setting in SETTINGS.items():
        learners = {regime: Learner(regime=regime, **setting) for regime in REGIMES}
        ratios = {regime: [] for regime in REGIMES}
        for step in range(repeats + 1):
            seconds = {regime: learner.step(step)[0] for regime, learner in learners.items()}
            for regime in REGIMES if step else ():
                ratios[regime].append(seconds[regime] / seconds[REGIMES[0]])
        rows.append([name, *(shown(ratios[regime]) for regime in REGIMES)])
    return evaluation.markdown(["setting", *REGIMES], rows)


def speculative(repeats):
    """Both clocks of speculative sampling with the pretrained default base, as lines."""
    learner, lines = Learner(), []
    base = train.pretrained(learner.cfg, learner.device)
    evaluation.load_weights(base, model=learner.model, heads=learner.heads)
    for P, G in ((32, 8), (4, 1)):
        problems = itertools.islice(rl.training_problems(learner.cfg, 0), P)
        prompts = [learner.tok.encode_ordinary(problem.prompt) for problem in problems]
        args, ratios = (prompts, G, 16, learner.tok.eot_token), []
        for _ in range(repeats + 1):
            plain = seconds_of(gpt.generate, learner.model, *args)
            ratios.append(seconds_of(mtp.speculative_generate, learner.model, learner.heads, *args) / plain)
        batch = mtp.speculative_generate(learner.model, learner.heads, *args)
        calls = mtp.speculation_metrics(batch["mask"], batch["draft"], 1)["spec/tokens_per_call"]
        lines.append(f"Speculative, {P} prompts x {G}: {calls:.2f} tokens a pass of the trunk, {shown(ratios[1:])} x the "
                     "seconds of plain sampling")  # fmt: skip
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs from hidden states


def logp_peers(device):
    """{name: f(h, W, targets) -> log-probs}: ours, torch's, and of other libraries those that can be imported."""

    def ours(impl):
        return lambda h, W, targets: mtp.linear_logp(h, W, targets, impl=impl)

    peers = {"naive": ours("naive"), "chunked": ours("chunked")}
    if not mtp.why_no_triton(device.type, gpt.matmul_dtype(device)):
        peers["triton"] = ours("triton")
    peers["naive, torch.compile"] = torch.compile(peers["naive"])
    if hasattr(F, "linear_cross_entropy"):
        peers["torch"] = lambda h, W, t: -F.linear_cross_entropy(h, W, t, reduction="none")
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
        peers["Liger"] = lambda h, W, t: -liger(W, h, t)
    if device.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        peers["CCE, exact"] = lambda h, W, t: -cce(h, W, t, reduction="none", impl="cce_exact")
    return peers


def logp(repeats):
    """Milliseconds forward and backward, ratio to naive, largest error of 64 log-probs against float64."""
    device, lines = gpt.find_device("auto"), []
    for N, C, V in LOGP_SHAPES[device.type]:
        dtype = gpt.matmul_dtype(device)
        h = torch.randn(N, C, device=device).to(dtype).requires_grad_()
        W = (torch.randn(V, C, device=device) / C**0.5).to(dtype).requires_grad_()
        targets, g = torch.randint(V, (N,), device=device), torch.randn(N, device=device)
        exact = mtp.linear_logp(h[:64].detach().double(), W.detach().double(), targets[:64], impl="naive")
        torch._dynamo.reset()  # or what was compiled for one shape would be compiled for any at the next
        times, errors = {name: [] for name in logp_peers(device)}, {}
        for _, (name, f) in itertools.product(range(repeats + 1), logp_peers(device).items()):
            try:
                found = f(h, W, targets)
                errors[name] = f"{(found[:64].double() - exact).abs().max().item():.0e}"
                del found
                times[name].append(seconds_of(lambda: torch.autograd.grad(f(h, W, targets), (h, W), g)))
            except Exception as error:  # too little memory, or what a library lacks: the others go on
                errors[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
        rows = []
        for name, seconds in times.items():
            row = [name, "-", "-", errors[name]]
            if len(seconds) > repeats:
                ratios = [a / b for a, b in zip(seconds[1:], times["naive"][1:])]
                row[1:3] = f"{1e3 * statistics.median(seconds[1:]):.1f}", shown(ratios)
            rows.append(row)
        auto = mtp.pick_impl("auto", N, V, device, dtype)
        lines += ["", f"(N, C, V) = {(N, C, V)}; auto is {auto}", ""]
        lines += evaluation.markdown(["", "ms", "over naive", "error of logp"], rows)
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# TRL

PEER_SETTINGS = {"small": dict(n_embd=64, n_layer=2, max_new_tokens=12),
                 "wide": dict(n_embd=256, n_layer=6, max_new_tokens=48)}  # fmt: skip


def trl_samples_per_second(n_embd, n_layer, max_new_tokens, rollouts):
    """GRPOTrainer on a GPT-2 of this size: 5-digit addition, 32 prompts x 8 samples, 4 updates a rollout."""
    import random

    from datasets import Dataset
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = [*"0123456789+=", "<pad>", "<eos>", "<unk>"]
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                  padding_side="left")  # fmt: skip
    shape = GPT2Config(vocab_size=15, n_positions=64, n_embd=n_embd, n_layer=n_layer, n_head=4, bos_token_id=13,
                       eos_token_id=13, pad_token_id=12)  # fmt: skip
    rng, ends = random.Random(0), []
    rows = [{"prompt": f"{rng.randrange(10**5):05d}+{rng.randrange(10**5):05d}="} for _ in range(4000)]

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    def reward(completions, **kwargs):
        return [float(zlib.crc32(text.encode()) % 2) for text in completions]

    cfg = GRPOConfig(output_dir="out/trl", per_device_train_batch_size=64, steps_per_generation=4, num_generations=8,
                     max_completion_length=max_new_tokens, max_steps=4 * rollouts, learning_rate=1e-9, beta=0.0,
                     report_to=[], use_cpu=True, save_strategy="no", logging_steps=1000, bf16=False, disable_tqdm=True,
                     gradient_checkpointing=False)  # fmt: skip
    GRPOTrainer(model=GPT2LMHeadModel(shape), reward_funcs=reward, args=cfg, train_dataset=Dataset.from_list(rows),
                processing_class=tok, callbacks=[Clock()]).train()  # fmt: skip
    seconds = [ends[i + 4] - ends[i] for i in range(3, len(ends) - 4, 4)]
    return 256 / statistics.median(seconds)


def peers():
    """Samples/s of TRL and of ours, three turns each, TRL in a process of its own."""
    if not importlib.util.find_spec("trl"):
        return ["trl is not installed: pip install trl"]
    rl.ALGOS["dapo"] = dataclasses.replace(rl.ALGOS["dapo"], overlong=False)  # 12 tokens are enough then
    env, rows = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}, []
    for name, setting in PEER_SETTINGS.items():
        rollouts, found = 6 if name == "small" else 4, {"TRL": [], "off": [], "detach": [], "occ": []}
        for _ in range(3):
            command = [sys.executable, __file__, "--trl", name, str(rollouts)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                return [f"TRL failed: {(done.stderr.strip().splitlines() or [''])[-1]}"]
            found["TRL"].append(float(done.stdout.split()[-1]))
            for kind in ("off", "detach", "occ"):
                learner = Learner(task="add", difficulty=5, regime=kind, **setting)
                steps = [learner.step(step) for step in range(rollouts)][1:]
                found[kind].append(256 / statistics.median(seconds for seconds, _ in steps))
        length = statistics.mean(record["response_length/mean"] for _, record in steps)
        trl = statistics.median(found["TRL"])
        ratios = [f"{statistics.median(found[kind]) / trl:.1f}" for kind in ("off", "detach", "occ")]
        rows.append([name, *(shown(values, 0) for values in found.values()), *ratios, f"{length:.1f}"])
    head = "setting TRL,_samples/s off detach occ off/TRL detach/TRL occ/TRL our_length".split()
    return ["Our vocabulary is 257, TRL's is 15.", "", *evaluation.markdown(head, rows)]


def main():
    parser = evaluation.Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--logp", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--trl", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        print(trl_samples_per_second(**PEER_SETTINGS[args.trl[0]], rollouts=int(args.trl[1])))
        return
    rl.is_right = coin
    rl.ALGOS["dapo"] = dataclasses.replace(rl.ALGOS["dapo"], dynamic_sampling=False)
    device, repeats = gpt.find_device("auto"), args.repeats
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {device}; medians of {repeats}\n")
    if args.logp:
        print("\n".join(logp(repeats)))
    elif args.peers:
        print("\n".join(peers()))
    else:
        print("\n".join(phases(repeats)), "\n", flush=True)
        print("\n".join(regimes(repeats)), "\n", flush=True)
        print("\n".join(speculative(repeats)))


if __name__ == "__main__":
    with evaluation.reporting("bench.py"):
        main()
