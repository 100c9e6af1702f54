"""Problems, advantages, losses and minibatches, each against arithmetic done by hand."""

import random
import re

import pytest
import torch
from conftest import batch, config, minibatch, minibatches, rows_of, tiny, wider

import model as gpt
import mtp
import rl


def test_the_tokenizer_of_bytes():
    tok, text = rl.get_tokenizer("bytes"), "Größe: 3/4 <|endoftext|>"
    assert tok.encode_ordinary(text) == list(text.encode())
    assert tok.decode(tok.encode_ordinary(text)) == text
    assert tok.eot_token == 256 and tok.n_vocab == 257


def solved(prompt):
    """The answer of a prompt by Python's own arithmetic; numbers stand lowest digit first."""
    numbers = [int(digits[::-1]) for digits in re.findall(r"\d+", prompt)]
    if "x" in prompt:  # a x + b = c
        return (numbers[2] - numbers[1]) // numbers[0]
    for sign, operation in (("-", int.__sub__), ("*", int.__mul__), ("%", int.__mod__)):
        if sign in prompt:
            return operation(*numbers)
    return sum(numbers)


@pytest.mark.parametrize("suite", rl.SUITES)
@pytest.mark.parametrize("difficulty", (1, 2, 8))
def test_gold_answers_are_right_and_problems_have_one_width(suite, difficulty):
    rng, widths = random.Random(0), set()
    for _ in range(200):
        p = rl.draw_problem(suite, difficulty, rng)
        assert int(p.answer) == solved(p.prompt), p
        assert rl.is_right(p, p.solution)
        widths.add((len(p.prompt), len(p.solution)))
    assert widths == {rl.longest(suite, difficulty, None)[:2]}


def test_careless_solutions_are_wrong_about_as_often_as_said():
    rng = random.Random(0)
    for suite in rl.SUITES:
        wrong = {}
        for share in (0.5, 1.0):
            problems = [rl.draw_problem(suite, 2, rng, careless=share) for _ in range(1500)]
            wrong[share] = sum(not rl.is_right(p, p.solution) for p in problems) / 1500
        assert 0.1 < wrong[1.0] < 0.9  # each suite has a place to slip
        assert wrong[0.5] == pytest.approx(wrong[1.0] / 2, abs=0.06)


def test_training_and_held_out_problems_are_disjoint():
    """47 + 85 and 85 + 47 are one problem."""
    for suite in rl.SUITES:
        rng = random.Random(1)
        train = {rl.draw_problem(suite, 2, rng).prompt for _ in range(5000)}
        held_out = {p.prompt for p in rl.held_out_problems(suite, 2, 64)}
        if suite == "add":
            held_out |= {"+".join(reversed(p[:-1].split("+"))) + "=" for p in held_out}
        assert len(held_out) >= 64 and not train & held_out


def test_advantages_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    group = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.25, 0.25, 0.25, -0.75]])
    std = torch.tensor([[3**-0.5], [0.5]])
    by_hand = {"group": group, "group_std": group / (std + 1e-6), "batch": reward - 5 / 8}
    for kind, expected in by_hand.items():
        torch.testing.assert_close(rl.advantages(reward, kind), expected)


@pytest.mark.parametrize("value", (0.0, 0.01, 0.3, 1.0))
@pytest.mark.parametrize("kind", ("group_std", "group"))
def test_equal_groups_get_exactly_zero(kind, value):
    reward = torch.full((3, 12), value)
    reward[2, 0] += 1
    adv = rl.advantages(reward, kind)
    assert (adv[:2] == 0).all() and (adv[2] != 0).all()


LENGTHS = (5, 1, 3, 4)
PAPERS = {  # advantage; what the loss is a mean over; clip below and above
    "reinforce": ("batch", "token", 0.0, 0.0),
    "grpo": ("group_std", "sequence", 0.2, 0.2),
    "drgrpo": ("group", "constant", 0.2, 0.2),
    "dapo": ("group_std", "token", 0.2, 0.28),
    "gspo": ("group_std", "sequence", 3e-4, 4e-4),
}


def loss_by_hand(name, case, max_new_tokens=8):
    """The loss of each method, token by token, from its paper; sequences start in column 0."""
    _, mean_over, low, high = PAPERS[name]
    logp, loss = case["logp"], 0.0
    for b, n in enumerate(LENGTHS):
        a, log_ratio = case["adv"][b], (logp - case["old"])[b, :n]
        weight = {"token": 1 / 13, "sequence": 1 / n / 4, "constant": 1 / (4 * max_new_tokens)}
        for t in range(n):
            ratio = torch.exp(log_ratio.mean() if name == "gspo" else log_ratio[t])
            objective = min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
            if a < 0:
                objective = max(objective, 10 * a)
            if name == "reinforce":
                objective = a * logp[b, t]
            if name == "grpo":
                r = torch.exp(case["ref"][b, t] - logp[b, t])
                objective = objective - 0.04 * (r - 1 - torch.log(r))
            loss = loss - weight[mean_over] * objective
    return loss


def loss_case(spread=1.5):
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 5, generator=g) * 3
    logp = (old + spread * torch.randn(4, 5, generator=g)).requires_grad_()
    ref = old + 0.3 * torch.randn(4, 5, generator=g)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    adv = torch.tensor([1.0, -0.5, -1.2, 0.7])
    return {"logp": logp, "old": old, "ref": ref, "adv": adv, "mask": mask}


def weights_of(name, case):
    return rl.token_weights(case["mask"][:, None], rl.ALGOS[name].loss_agg, 8)[:, 0]


def whole_loss(name, case):
    mb = {"weight": weights_of(name, case)} | case
    return rl.trunk_policy_loss(case["logp"], mb, rl.ALGOS[name])


@pytest.mark.parametrize("spread", (0.05, 3.0))  # inside the clip; far beyond it and the dual clip
@pytest.mark.parametrize("name", rl.ALGOS)
def test_losses_by_hand(name, spread):
    case = loss_case(spread)
    assert rl.ALGOS[name].advantage == PAPERS[name][0]
    loss, expected = whole_loss(name, case), loss_by_hand(name, case)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, case["logp"])[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads)


def test_the_metrics_count_what_is_clipped():
    case = loss_case(spread=3.0)
    logp, old, adv, mask = case["logp"], case["old"], case["adv"], case["mask"]
    metrics = rl.ratio_metrics("x", logp, old, adv, mask, rl.ALGOS["dapo"])
    ratio, worse, better = (logp - old).exp(), mask & (adv[:, None] < 0), mask & (adv[:, None] > 0)
    assert metrics["x/clip_frac_low"] == (ratio[worse] < 0.8).sum().item() / 13 > 0
    assert metrics["x/clip_frac_high"] == (ratio[better] > 1.28).sum().item() / 13 > 0
    assert metrics["x/ratio_max"] == pytest.approx(ratio[mask].max().item())
    assert (ratio[worse] > 10).any()  # the case goes beyond the dual clip too


@pytest.mark.parametrize("name", rl.ALGOS)
def test_losses_do_not_depend_on_padding_order_or_shares(name):
    case = loss_case()
    loss = whole_loss(name, case)
    for other in (wider(case), rows_of(case, [2, 0, 3, 1])):
        torch.testing.assert_close(whole_loss(name, other), loss)
    weighted = case | {"weight": weights_of(name, case)}  # of the whole, not of each share
    shares = [0], [1, 2], [3]
    torch.testing.assert_close(sum(whole_loss(name, rows_of(weighted, x)) for x in shares), loss)
    if rl.ALGOS[name].loss_agg == "token":  # a mean of the shares' own means is another loss
        assert abs(sum(whole_loss(name, rows_of(case, x)) for x in shares) / 3 - loss) > 1e-3


@pytest.mark.parametrize("name", rl.ALGOS)
def test_neither_an_empty_response_nor_a_runaway_ratio_is_nan(name):
    case = loss_case()
    one_empty = case["mask"] & torch.tensor([[True], [False], [True], [True]])
    all_empty = torch.zeros_like(one_empty)
    for changes in ({"mask": one_empty}, {"mask": all_empty}, {"old": case["old"] - 1000}):
        loss = whole_loss(name, case | changes)
        (grad,) = torch.autograd.grad(loss, case["logp"])
        assert torch.isfinite(loss) and torch.isfinite(grad).all()


def test_k3_is_the_kl_on_average_and_never_negative():
    def k3(logp, ref):
        return rl.kl_to_base(logp, {"ref": ref, "weight": torch.ones(len(logp))})

    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    each = torch.stack([k3(p[i : i + 1], q[i : i + 1]) for i in range(3)])
    assert (each >= 0).all() and k3(p, p) == 0
    torch.testing.assert_close((p.exp() * each).sum(), (p.exp() * (p - q)).sum())


def test_overlong_penalty():
    penalty = rl.overlong_penalty(torch.tensor([0, 15, 16, 18, 20]), 20)
    torch.testing.assert_close(penalty, torch.tensor([0.0, 0.0, 0.0, -0.5, -1.0]))


@pytest.mark.parametrize("script, kept, rewards, mean", [  # two samples a problem, three problems
    ("11 10 00 01 00 10", [1, 3, 5], [0.8, -0.3, 0.0, 0.9, 1.0, -0.1], 2.8 / 12),
    ("11 10 01 00 00 00 00", [1, 2], [0.8, -0.3, -0.4, 0.5], 2.2 / 12),  # 4 rounds at the most
])  # fmt: skip
def test_dynamic_sampling_replaces_equal_groups(monkeypatch, script, kept, rewards, mean):
    """Equal by correctness: the overlong penalty, here -0.1 times the sample's number, comes after that."""
    scripted = iter(script.split())

    def sample(model, tok, problems, G, R, temperature, generator, heads):
        tokens = torch.tensor([[int(p.answer), 9, 9] for p in problems]).repeat_interleave(G, 0)
        mask = torch.ones(len(tokens), 2, dtype=torch.bool)
        reward = torch.tensor([list(map(float, next(scripted))) for _ in problems]).flatten()
        samples = {"tokens": tokens, "mask": mask, "logp": mask * -0.5, "reward": reward}
        return samples, ["text"] * len(tokens)

    monkeypatch.setattr(rl, "sample", sample)
    monkeypatch.setattr(rl, "overlong_penalty", lambda lengths, R: -torch.arange(len(lengths)) / 10)
    problems = (rl.Problem("", "p", str(i)) for i in range(100))
    algo, cfg = rl.ALGOS["dapo"], config(max_new_tokens=10)
    samples, record, _ = rl.rollout(None, None, None, problems, algo, cfg, None)
    assert samples["tokens"][::2, 0].tolist() == kept
    assert samples["reward"].tolist() == pytest.approx(rewards)
    assert record["reward/mean"] == pytest.approx(mean)
    assert record["reward/frac_zero_std"] == pytest.approx(1 - len(kept) / 6)
    assert record["actor/entropy"] == pytest.approx(0.5) and record["response_length/mean"] == 2
    assert record["response_length/clip_ratio"] == 0


def test_a_sample_is_scored_by_its_text(monkeypatch):
    model, _ = tiny(vocab=257, block=40)
    tok, problems = rl.get_tokenizer("bytes"), rl.held_out_problems("add", 2, 3)
    asked = []

    def is_right(problem, text):
        asked.append(problem)
        return len(text) % 2

    monkeypatch.setattr(rl, "is_right", is_right)
    samples, texts = rl.sample(model, tok, problems, 4, 10, 1.0, torch.Generator().manual_seed(0))
    assert asked == [problems[0]] * 4 + [problems[1]] * 4 + [problems[2]] * 4
    assert samples["reward"].tolist() == [len(text) % 2 for text in texts]
    for tokens, mask, text in zip(samples["tokens"][:, 1:], samples["mask"], texts):
        assert tok.decode([t for t in tokens[mask].tolist() if t != 256]) == text


def test_minibatches_are_whole_groups_and_old_logprobs_are_those_of_the_rollout():
    model, heads = tiny()
    parts, (tokens, mask) = minibatches(model, heads), batch()
    assert [len(mb["adv"]) for mb in parts] == [2, 2]
    logp, logp_mtp, _ = mtp.logprobs(model, heads, tokens, mask)
    # each cut to its own longest sequence
    for mb, rows, T in zip(parts, (slice(0, 2), slice(2, 4)), (8, 9)):
        assert torch.equal(mb["tokens"], tokens[rows, :T]) and not mask[rows, T - 1 :].any()
        torch.testing.assert_close(mb["logp"], logp[rows, : T - 1])
        assert mb["weight"].sum() == pytest.approx(1)
        torch.testing.assert_close(mb["weight_mtp"].sum((0, 2)), torch.ones(2))
    assert "old" not in parts[0]  # the first update takes those of its own forward pass
    torch.testing.assert_close(parts[1]["old"], logp[2:])
    torch.testing.assert_close(parts[1]["old_mtp"], logp_mtp[2:])


@pytest.mark.parametrize("algo", ("dapo", "gspo"))
def test_mtp_loss_is_the_mean_over_depths(algo):
    model, heads = tiny()
    mb = minibatch(model, heads, algo)
    _, logp_mtp, _ = mtp.logprobs(model, heads, mb["tokens"], mb["mask"])
    policy = cross_entropy = 0.0
    for k in range(2):
        logp, old, valid = logp_mtp[:, k], mb["old_mtp"][:, k], mb["mask_mtp"][:, k]
        weight = weights_of(algo, {"mask": valid})  # not the trunk's
        policy += rl.policy_loss(logp, old, mb["adv"], valid, weight, rl.ALGOS[algo]) / 2
        cross_entropy -= logp[valid].mean() / 2
    for kind, expected in (("policy", policy), ("ce", cross_entropy)):
        loss = rl.mtp_loss(kind, logp_mtp, mb, mb["adv"], rl.ALGOS[algo])
        torch.testing.assert_close(loss, expected)


def test_the_metrics_of_a_first_update():
    """The share of drafts of head k that would be accepted is the mean of min(1, q/p) over the tokens it scores."""
    p, q = torch.rand(3, 5), torch.rand(3, 2, 5)
    mask = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
    mb = {"logp": p.log() - 0.5, "mask": mask, "mask_mtp": mtp.aligned_mask(mask, 2)}
    mb |= {"old": p.log(), "old_mtp": q.log(), "adv": torch.zeros(3)}
    metrics = rl.update_metrics(p.log(), q.log(), mb, mb["adv"], rl.ALGOS["dapo"], first=True)
    assert metrics["actor/ratio_max"] == metrics["mtp/ratio_max"] == 1
    for k in (1, 2):
        scored = mask & (torch.arange(5) >= k)
        accepted = (q[:, k - 1] / p)[scored].clamp(max=1)
        assert metrics[f"mtp/agreement_{k}"] == pytest.approx(accepted.mean().item(), rel=1e-5)
    assert metrics["rollout/logp_gap"] == pytest.approx(0.5, abs=1e-5)


def test_eos_has_a_weight_and_a_gradient():
    model, heads = tiny()
    samples = gpt.generate(model, [[1, 2, 3]] * 2, 2, 8, eos=5)
    algo, cfg = rl.ALGOS["dapo"], config(updates_per_rollout=1)
    (mb,) = rl.minibatches(model, heads, samples, torch.ones(4), algo, cfg)
    ends = (mb["tokens"][:, 1:] == 5) & mb["mask"]
    assert ends.any() and (mb["weight_mtp"][:, 0][ends] > 0).any()
    logp = mb["logp"].clone().requires_grad_()
    loss = rl.policy_loss(logp, mb["logp"], mb["adv"], mb["mask"], mb["weight"], algo)
    assert (torch.autograd.grad(loss, logp)[0][ends] != 0).all()
