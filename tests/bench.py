"""How fast a step is, where its time goes, and what the regimes cost.

    python tests/bench.py            # phases and regimes
    python tests/bench.py --logp     # log-probs from hidden states: ours, torch's, Liger, CCE

The model is untrained and a coin decides rewards: speed does not depend on what has been learnt.
The learning rate is next to nothing, so that all regimes sample the same. What is compared takes
turns, after one turn to warm up; numbers are medians, in brackets the smallest and the largest.
"""

import dataclasses
import importlib
import os
import time
from functools import partial
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see train.py

import torch
from conftest import coin, evaluation, mtp, rl, train

import model as gpt

SETTINGS = {"default": {}, "wide": dict(n_layer=6, n_embd=256, max_new_tokens=48)}
REGIMES = "detach off ce policy occ exact".split()  # the others are divided by the first
PHASES = "rollout score update coefficient".split()
LOGP_SHAPES = {  # N tokens, C channels, V words
    "cpu": ((65536, 128, 64), (16384, 128, 576), (8192, 256, 50304)),
    "cuda": ((16384, 768, 50304), (32768, 2048, 151936)),
}
LIGER = "liger_kernel.transformers.functional"
LIBRARIES = {  # name: module, function of (h, W, targets) that returns losses, options
    "torch": ("torch.nn.functional", "linear_cross_entropy", {}),
    "Liger": (LIGER, "liger_fused_linear_cross_entropy", dict(accum_dtype=torch.float32)),
    "CCE": ("cut_cross_entropy", "linear_cross_entropy", dict(impl="cce_exact")),
}


class Learner:
    """A config, its model, heads and optimizer, ready to be timed."""

    def __init__(self, **changes):
        self.cfg = cfg = train.Config(**{**dict(lr=1e-9, probe_every=0), **changes})
        device, self.tok, self.records = train.set_up(cfg), cfg.tok(), []
        room, _ = rl.check_room(cfg, self.tok)
        shape = gpt.GPTConfig(self.tok.n_vocab, room, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.tied)
        self.state = evaluation.new_state(cfg, shape, device)

    def step(self):
        self.records.append(rl.step(self.cfg, *self.state, self.tok, len(self.records))[0])


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
    ratios = [a / b for a, b in zip(seconds, base)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def phases(repeats):
    """Where the time of a step of occ goes."""
    rows = []
    for name, setting in SETTINGS.items():
        learner = Learner(**setting)
        whole = median(in_turns(repeats, {name: learner.step})[name])
        keys = "response_length/sum", *(f"perf/{phase}_s" for phase in PHASES)
        tokens, *parts = (median(r[key] for r in learner.records[1:]) for key in keys)
        rates = f"{256 / whole:.0f}", f"{tokens / whole:.0f}"
        parts = [f"{100 * seconds / whole:.1f} %" for seconds in parts]
        rows.append([name, torch.get_num_threads(), *rates, *parts])
    return evaluation.markdown(["setting", "threads", "samples/s", "tokens/s", *PHASES], rows)


def regimes(repeats):
    """Seconds a step over those of the first regime, in turn."""
    rows = []
    for name, setting in SETTINGS.items():
        steps = {regime: Learner(regime=regime, **setting).step for regime in REGIMES}
        seconds = in_turns(repeats, steps)
        rows.append([name, *(over(seconds[regime], seconds[REGIMES[0]]) for regime in REGIMES)])
    return evaluation.markdown(["setting", *REGIMES], rows)


def of_library(module, name, options, h, W, targets):
    loss = getattr(importlib.import_module(module), name)
    return loss(h, W, targets, reduction="none", **options)


def forward_and_backward(f, h, W, targets, g):
    """The first log-probs; libraries return losses, so without their sign."""
    logp_N = f(h, W, targets)
    torch.autograd.grad(logp_N, (h, W), g)
    return logp_N[:64].detach().double().abs()


def logp(repeats):
    """Milliseconds forward and backward, ratio to naive, largest error against float64."""
    device, lines = gpt.find_device("auto"), []
    peers = {name: partial(mtp.linear_logp, impl=name) for name in ("naive", "chunked", "triton")}
    peers["naive, torch.compile"] = torch.compile(peers["naive"])
    peers |= {name: partial(of_library, *library) for name, library in LIBRARIES.items()}
    for N, C, V in LOGP_SHAPES[device.type]:
        dtype = gpt.matmul_dtype(device, C)
        h = torch.randn(N, C, device=device).to(dtype).requires_grad_()
        W = (torch.randn(V, C, device=device) / C**0.5).to(dtype).requires_grad_()
        targets, g = torch.randint(V, (N,), device=device), torch.randn(N, device=device)
        exact = mtp.linear_logp(h[:64].double(), W.double(), targets[:64], impl="naive").abs()
        torch._dynamo.reset()  # or what was compiled for one shape would be for any at the next
        functions, errors, rows = {}, {}, []
        for name, f in peers.items():
            function = partial(forward_and_backward, f, h, W, targets, g)
            try:
                errors[name] = f"{(function() - exact).abs().max():.0e}"
                functions[name] = function
            except Exception as error:  # not installed, too little memory, ...: the others go on
                reason = (str(error).splitlines() or [""])[0][:80]
                rows.append([name, "-", "-", f"failed: {type(error).__name__}: {reason}"])
        seconds = in_turns(repeats, functions)
        for name, times in seconds.items():
            ratio = over(times, seconds["naive"]) if "naive" in seconds else "-"
            rows.append([name, f"{1e3 * median(times):.1f}", ratio, errors[name]])
        lines += ["", f"(N, C, V) = {N, C, V}; auto is {mtp.pick_impl('auto', N, V, device)}", ""]
        lines += evaluation.markdown(["", "ms", "over naive", "error of logp"], rows)
    return lines


if __name__ == "__main__":
    parser = evaluation.Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--logp", action="store_true")
    with evaluation.reporting("bench.py"):
        args = parser.parse_args()
        rl.is_right = coin
        rl.ALGOS["dapo"] = dataclasses.replace(rl.ALGOS["dapo"], dynamic_sampling=False)
        print(f"torch {torch.__version__}, {evaluation.cores()} cores, {gpt.find_device('auto')}\n")
        for measure in (logp,) if args.logp else (phases, regimes):
            print("\n".join(measure(args.repeats)), "\n", flush=True)
