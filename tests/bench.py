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
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import eval as evaluation
import model as gpt
import mtp
import rl
import train

SETTINGS = {"default": {}, "wide": dict(n_layer=6, n_embd=256, max_new_tokens=48)}
REGIMES = "detach off ce policy occ exact occ-ce".split()  # the others are divided by the first
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
        self.tok, self.records = self.cfg.tok(), []

    def step(self):
        state = self.model, self.heads, self.optimizer, self.tok
        record, _ = train.step_of_rl(self.cfg, *state, step=len(self.records))
        self.records.append(record)


def in_turns(repeats, functions):
    """{name: seconds of each call}. The functions take turns, after one turn to warm up."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def over(seconds, base):
    return [a / b for a, b in zip(seconds, base)]


def shown(values, digits=2):
    middle, low, high = median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def coin(problem, text):
    return zlib.crc32(text.encode()) % 2 == 0


def matmul_peak(device, repeats):
    """FLOP/s of a large product of two matrices in the dtype of training."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=gpt.matmul_dtype(device))
    seconds = in_turns(repeats, {"product": partial(torch.mm, a, b)})
    return 2 * n**3 / median(seconds["product"])


def useful_flops(learner, tokens):
    """What one step cannot do without: two FLOPs a weight and token in a matrix product, six with gradients.

    Not counted: attention, padding, the forward passes for old log-probs.
    """
    cfg, K = learner.cfg, learner.cfg.mtp_depth
    samples = cfg.prompts_per_step * cfg.num_generations
    prompts = [p.prompt for p in itertools.islice(rl.training_problems(cfg, 0), 1000)]
    prompt = mean(map(len, prompts))
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
        whole = median(in_turns(repeats, {name: learner.step})[name])
        tokens = median(record["response_length/sum"] for record in learner.records[1:])
        row = [name, torch.get_num_threads(), f"{256 / whole:.0f}", f"{tokens / whole:.0f}"]
        for phase in ("rollout", "score", "update", "coefficient"):
            seconds = median(record[f"perf/{phase}_s"] for record in learner.records[1:])
            row.append(f"{100 * seconds / whole:.1f} %")
        rate, peak = useful_flops(learner, tokens) / whole, matmul_peak(learner.device, repeats)
        rows.append([*row, f"{rate / 1e9:.0f}", f"{100 * rate / peak:.0f} %"])
    head = "setting threads samples/s tokens/s rollout score update coefficient GFLOP/s of_the_peak"
    return evaluation.markdown(head.split(), rows)


def regimes(repeats):
    """Seconds a step over those of the first regime, in turn, as rows of a table."""
    rows = []
    for name, setting in SETTINGS.items():
        steps = {regime: Learner(regime=regime, **setting).step for regime in REGIMES}
        seconds = in_turns(repeats, steps)
        base = seconds[REGIMES[0]]
        rows.append([name, *(shown(over(seconds[regime], base)) for regime in REGIMES)])
    return evaluation.markdown(["setting", *REGIMES], rows)


def speculative(repeats):
    """Both clocks of speculative sampling with the pretrained default base, as lines."""
    learner, lines = Learner(), []
    model, heads, tok = learner.model, learner.heads, learner.tok
    base = train.pretrained(learner.cfg, learner.device)
    evaluation.load_weights(base, model=model, heads=heads)
    for P, G in ((32, 8), (4, 1)):
        problems = itertools.islice(rl.training_problems(learner.cfg, 0), P)
        args = [tok.encode_ordinary(p.prompt) for p in problems], G, 16, tok.eot_token
        plain = partial(gpt.generate, model, *args)
        drafted = partial(mtp.speculative_generate, model, heads, *args)
        seconds = in_turns(repeats, {"plain": plain, "drafted": drafted})
        batch = drafted()
        calls = mtp.speculation_metrics(batch["mask"], batch["draft"], 1)["spec/tokens_per_call"]
        ratio = shown(over(seconds["drafted"], seconds["plain"]))
        line = f"Speculative, {P} prompts x {G}: {calls:.2f} tokens a pass of the trunk"
        lines.append(f"{line}, {ratio} x the seconds of plain sampling")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs from hidden states


def logp_peers(device):
    """{name: f(h, W, targets) -> log-probs}: ours, torch's, and of other libraries those that can be imported."""
    impls = ["naive", "chunked"]
    if not mtp.why_no_triton(device.type, gpt.matmul_dtype(device)):
        impls.append("triton")
    peers = {impl: partial(mtp.linear_logp, impl=impl) for impl in impls}
    peers["naive, torch.compile"] = torch.compile(peers["naive"])
    if hasattr(F, "linear_cross_entropy"):
        peers["torch"] = lambda h, W, t: -F.linear_cross_entropy(h, W, t, reduction="none")
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as Liger

        liger = Liger(reduction="none", accum_dtype=torch.float32)
        peers["Liger"] = lambda h, W, t: -liger(W, h, t)
    if device.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        peers["CCE, exact"] = lambda h, W, t: -cce(h, W, t, reduction="none", impl="cce_exact")
    return peers


def forward_and_backward(f, h, W, targets, g):
    """The log-probs of the first tokens."""
    logp_N = f(h, W, targets)
    torch.autograd.grad(logp_N, (h, W), g)
    return logp_N[:64].detach().double()


def logp(repeats):
    """Milliseconds forward and backward, ratio to naive, largest error of 64 log-probs against float64."""
    device, lines = gpt.find_device("auto"), []
    for N, C, V in LOGP_SHAPES[device.type]:
        dtype = gpt.matmul_dtype(device)
        h = torch.randn(N, C, device=device).to(dtype).requires_grad_()
        W = (torch.randn(V, C, device=device) / C**0.5).to(dtype).requires_grad_()
        targets, g = torch.randint(V, (N,), device=device), torch.randn(N, device=device)
        in_float64 = h[:64].detach().double(), W.detach().double(), targets[:64]
        exact = mtp.linear_logp(*in_float64, impl="naive")
        torch._dynamo.reset()  # or what was compiled for one shape would be for any at the next
        functions, errors, rows = {}, {}, []
        for name, f in logp_peers(device).items():
            function = partial(forward_and_backward, f, h, W, targets, g)
            try:
                errors[name] = f"{(function() - exact).abs().max().item():.0e}"
                functions[name] = function
            except Exception as error:  # too little memory, or what a library lacks: others go on
                reason = (str(error).splitlines() or [""])[0][:80]
                rows.append([name, "-", "-", f"failed: {type(error).__name__}: {reason}"])
        seconds = in_turns(repeats, functions)
        for name, times in seconds.items():
            ratio = shown(over(times, seconds["naive"])) if "naive" in seconds else "-"
            rows.append([name, f"{1e3 * median(times):.1f}", ratio, errors[name]])
        auto = mtp.pick_impl("auto", N, V, device, dtype)
        lines += ["", f"(N, C, V) = {(N, C, V)}; auto is {auto}", ""]
        lines += evaluation.markdown(["", "ms", "over naive", "error of logp"], rows)
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# TRL

PEER_SETTINGS = {
    "small": dict(n_embd=64, n_layer=2, max_new_tokens=12),
    "wide": dict(n_embd=256, n_layer=6, max_new_tokens=48),
}
ROLLOUTS = {"small": 6, "wide": 4}  # of each turn, the first to warm up


def trl_samples_per_second(name):
    """GRPOTrainer on a GPT-2 of this size: 5-digit addition, 32 prompts x 8 samples, 4 updates a rollout."""
    import random

    from datasets import Dataset
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    setting = PEER_SETTINGS[name]
    words = [*"0123456789+=", "<pad>", "<eos>", "<unk>"]
    vocab = {word: i for i, word in enumerate(words)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, padding_side="left", **special)
    shape = GPT2Config(
        vocab_size=15, n_positions=64, n_embd=setting["n_embd"], n_layer=setting["n_layer"], n_head=4,
        bos_token_id=13, eos_token_id=13, pad_token_id=12,
    )  # fmt: skip
    cfg = GRPOConfig(
        output_dir="out/trl", per_device_train_batch_size=64, steps_per_generation=4, num_generations=8,
        max_completion_length=setting["max_new_tokens"], max_steps=4 * ROLLOUTS[name],
        learning_rate=1e-9, beta=0.0, report_to=[], use_cpu=True, save_strategy="no",
        logging_steps=1000, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    rng, prompts, ends = random.Random(0), [], []
    for _ in range(4000):
        prompts.append({"prompt": f"{rng.randrange(10**5):05d}+{rng.randrange(10**5):05d}="})

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    def reward(completions, **kwargs):
        return [float(coin(None, text)) for text in completions]

    data = dict(train_dataset=Dataset.from_list(prompts), processing_class=tok)
    model = GPT2LMHeadModel(shape)
    GRPOTrainer(model=model, reward_funcs=reward, args=cfg, callbacks=[Clock()], **data).train()
    seconds = [ends[i + 4] - ends[i] for i in range(3, len(ends) - 4, 4)]
    return 256 / median(seconds)


def peers():
    """Samples/s of TRL and of ours, three turns each, TRL in a process of its own."""
    if not importlib.util.find_spec("trl"):
        return ["trl is not installed: pip install trl"]
    rl.ALGOS["dapo"] = dataclasses.replace(rl.ALGOS["dapo"], overlong=False)  # 12 tokens are enough
    env, rows = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}, []
    kinds = "off", "detach", "occ"
    for name, setting in PEER_SETTINGS.items():
        found = {kind: [] for kind in ("TRL", *kinds)}
        for _ in range(3):
            command = [sys.executable, __file__, "--trl", name]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                return [f"TRL failed: {(done.stderr.strip().splitlines() or [''])[-1]}"]
            found["TRL"].append(float(done.stdout.split()[-1]))
            for kind in kinds:
                learner = Learner(task="add", difficulty=5, regime=kind, **setting)
                seconds = in_turns(ROLLOUTS[name] - 1, {kind: learner.step})[kind]
                found[kind].append(256 / median(seconds))
        length = mean(record["response_length/mean"] for record in learner.records[1:])
        rates = [shown(values, 0) for values in found.values()]
        ratios = [f"{median(found[kind]) / median(found['TRL']):.1f}" for kind in kinds]
        rows.append([name, *rates, *ratios, f"{length:.1f}"])
    head = "setting TRL,_samples/s off detach occ off/TRL detach/TRL occ/TRL our_length".split()
    return ["Our vocabulary is 257, TRL's is 15.", "", *evaluation.markdown(head, rows)]


def main():
    parser = evaluation.Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--logp", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--trl", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        print(trl_samples_per_second(args.trl))
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
        for measure in (phases, regimes, speculative):
            print("\n".join(measure(repeats)), "\n", flush=True)


if __name__ == "__main__":
    with evaluation.reporting("bench.py"):
        main()
