"""What the tests share: the project's root on the path, small models, minibatches of random tokens, and small runs."""

import contextlib
import functools
import io
import os
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import mtp  # noqa: E402
import rl  # noqa: E402
import train  # noqa: E402
from model import GPTConfig  # noqa: E402

PLOT = evaluation.plot


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors here are too small for two


def tiny(
    vocab=11, layers=2, channels=16, tied=False, depth=2, design="sequential", block=24, seed=0
):
    """A trunk and its heads whose every weight matters: residual projections are zero at initialisation."""
    shape = GPTConfig(vocab, block, layers, 2, channels, tied)
    model, heads = mtp.build(shape, depth, design, seed, "cpu")
    for name, p in [*model.named_parameters(), *heads.named_parameters()]:
        if name.endswith(("attn_out.weight", "mlp_out.weight")):
            torch.nn.init.normal_(p, std=0.2)
    return model, heads


def batch(vocab=11, lengths=((3, 5), (2, 2), (4, 1), (3, 6)), seed=1):
    """Right-padded random sequences of (prompt, response) lengths: tokens (B, T), mask (B, T-1) of response tokens."""
    generator = torch.Generator().manual_seed(seed)
    T = max(p + r for p, r in lengths)
    tokens = torch.randint(1, vocab, (len(lengths), T), generator=generator)
    t = torch.arange(T)
    p, r = torch.tensor(lengths).T[:, :, None]
    tokens = tokens.masked_fill(t >= p + r, 0)
    return tokens, ((t >= p) & (t < p + r))[:, 1:]


CFG = SimpleNamespace(
    temperature=1.0, logp_impl="naive", updates_per_rollout=2, num_generations=2, max_new_tokens=8,
    prompts_per_step=3, lam=0.5, lam_plus=1.0,
)  # fmt: skip


def config(**changes):
    return SimpleNamespace(**{**vars(CFG), **changes})


def minibatches(model, heads, algo="dapo", **changes):
    """The sequences of `batch`, two groups of two, cut into minibatches as in training."""
    tokens, mask = batch()
    logp, _ = mtp.logprobs(model, None, tokens, mask)
    samples = {"tokens": tokens, "mask": mask, "logp": logp.detach()}
    adv = torch.tensor([1.0, -1.0, 0.5, -0.5])
    return rl.minibatches(model, heads, samples, adv, rl.ALGOS[algo], config(**changes))


def minibatch(model, heads, algo="dapo"):
    """All of it as one minibatch, with the log-probs from before an update that then happens."""
    (mb,) = minibatches(model, heads, algo, updates_per_rollout=1)
    logp, logp_mtp = mtp.logprobs(model, heads, mb["tokens"], mb["mask"])
    mb |= {"old": logp.detach(), "old_mtp": logp_mtp.detach()}
    with torch.no_grad():
        for p in [*model.parameters(), *heads.parameters()]:
            p.add_(0.02 * torch.randn_like(p))
    return mb


def rows_of(mb, rows):
    return {name: x[rows] for name, x in mb.items()}


def wider(mb):
    """With three more columns of padding, whose numbers are wrong: nobody may read them."""
    out = {}
    for name, x in mb.items():
        wrong = -7.0 if x.is_floating_point() else 0
        out[name] = F.pad(x, (0, 3), value=wrong) if x.ndim > 1 else x
    return out


def plain_logp(model, tokens, temperature=1.0):
    """Log-probs (B, T-1) of all tokens but the first, from all logits at once."""
    logp = (model(tokens)[:, :-1] / temperature).log_softmax(-1)
    return logp.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def chi_square(drawn, probs):
    """Of integers against the probabilities of each."""
    expected = len(drawn) * probs
    counts = torch.bincount(drawn, minlength=len(probs))
    return ((counts - expected).square() / expected).sum().item()


SMALL = dict(
    lr=3e-4, n_layer=1, n_head=2, n_embd=16, pretrain_steps=3, pretrain_batch=8, device="cpu", steps=4,
    prompts_per_step=4, num_generations=4, updates_per_rollout=2, max_new_tokens=12, eval_problems=2,
    eval_k=2, eval_every=2, save_every=2, probe_every=2,
)  # fmt: skip


def coin(problem, text):
    """A reward for models that can do nothing: tossed by the completion."""
    return zlib.crc32(text.encode()) % 2 == 0


def make_quick(monkeypatch):
    """Rewards are a coin, and there are no plots: they are most of a small run's time."""
    monkeypatch.setattr(rl, "is_right", coin)
    monkeypatch.setattr(evaluation, "plot", lambda folders, path: [])


def small_config(folder, name="run", **changes):
    """Of a run in folder / name that takes a fraction of a second."""
    paths = dict(out=str(folder / name), cache_dir=str(folder / "base"))
    return train.Config(**{**SMALL, **paths, **changes})


@pytest.fixture
def small(tmp_path, monkeypatch):
    make_quick(monkeypatch)
    return functools.partial(small_config, tmp_path)


@pytest.fixture
def trained(small):
    """The Config of a small run that has come to its end."""

    def run(name="run", **changes):
        cfg = small(name, **changes)
        train.main(cfg)
        return cfg

    return run


def in_this_process(command, **options):
    """As subprocess.run of our own scripts, without the seconds that torch takes to start."""
    script, errors, code = Path(command[1]), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", command[1:])
        try:
            with evaluation.reporting(script.name):
                if script == Path(train.__file__):
                    train.main(*train.command_line(command[2:]))
                else:
                    evaluation.main(evaluation.parse(command[2:]))
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stderr=errors.getvalue())


def metrics(cfg, clock=False):
    """The lines of metrics.jsonl behind its header, without what depends on the clock."""
    _, records = evaluation.read_metrics(cfg.out)
    untimed = [{k: v for k, v in r.items() if not k.startswith(("time", "perf/"))} for r in records]
    return records if clock else untimed
