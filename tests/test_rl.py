"""Problems, advantages, losses and minibatches, each against arithmetic done by hand."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CFG, batch, minibatch, minibatches, tiny

import model as gpt
import mtp
import rl


def test_the_tokenizer_of_bytes():
    tok, text = rl.get_tokenizer("bytes"), "Größe: 3/4 <|endoftext|>"
    assert tok.encode_ordinary(text) == list(text.encode()) and tok.decode(tok.encode_ordinary(text)) == text
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


def test_a_minus_below_the_line_counts():
    for gold, same in (
        ("2/3", "-6/-9"),
        ("1/3", r"-\frac{-1}{3}"),
        ("-2/3", "2/-3"),
        ("-1/3", r"\frac{-1}{3}"),
    ):
        assert rl.answers_equal(gold, same) and not rl.answers_equal(gold, f"-{gold}")
    assert rl.read_number("2 -1/3") is None  # a difference


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
LOSS_AGG = dict(reinforce="token", grpo="sequence", drgrpo="constant", dapo="token", gspo="sequence")
ADVANTAGE = dict(reinforce="batch", grpo="group_std", drgrpo="group", dapo="group_std", gspo="group_std")


def loss_by_hand(name, logp, old, ref, adv, max_new_tokens=8):
    """The loss of each method, token by token, from its paper; sequences start in column 0."""
    B, loss = len(LENGTHS), 0.0
    for b, n in enumerate(LENGTHS):
        sequence_ratio = torch.exp(sum(logp[b, t] - old[b, t] for t in range(n)) / n)
        for t in range(n):
            a = adv[b]
            ratio = sequence_ratio if name == "gspo" else torch.exp(logp[b, t] - old[b, t])
            high = 0.28 if name == "dapo" else 4e-4 if name == "gspo" else 0.2
            low = 3e-4 if name == "gspo" else 0.2
            objective = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            if a < 0:
                objective = max(objective, 10 * a)
            if name == "reinforce":
                objective = a * logp[b, t]
            if name == "grpo":
                r = torch.exp(ref[b, t] - logp[b, t])
                objective = objective - 0.04 * (r - 1 - torch.log(r))
            weight = {"token": 1 / sum(LENGTHS), "sequence": 1 / n / B, "constant": 1 / (B * max_new_tokens)}
            loss = loss - weight[LOSS_AGG[name]] * objective
    return loss


def loss_case(spread=1.5):
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 5, generator=g) * 3
    logp = (old + spread * torch.randn(4, 5, generator=g)).requires_grad_()
    ref = old + 0.3 * torch.randn(4, 5, generator=g)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return {"logp": logp, "old": old, "ref": ref, "adv": torch.tensor([1.0, -0.5, -1.2, 0.7]), "mask": mask}


def whole_loss(name, case, weight=None):
    algo = rl.ALGOS[name]
    weight = rl.token_weights(case["mask"][:, None], algo.loss_agg, 8)[:, 0] if weight is None else weight
    return rl.trunk_policy_loss(case["logp"], case | {"weight": weight}, algo)


@pytest.mark.parametrize("spread", (0.05, 3.0))  # inside the clip, and far beyond it and the dual clip
@pytest.mark.parametrize("name", rl.ALGOS)
def test_losses_by_hand(name, spread):
    case = loss_case(spread)
    assert rl.ALGOS[name].advantage == ADVANTAGE[name]
    loss = whole_loss(name, case)
    expected = loss_by_hand(name, case["logp"], case["old"], case["ref"], case["adv"])
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, case["logp"])[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads)


def test_the_metrics_count_what_is_clipped():
    case = loss_case(spread=3.0)
    args = case["logp"], case["old"], case["adv"], case["mask"], rl.ALGOS["dapo"]
    metrics = rl.ratio_metrics("actor", *args)
    ratio, adv, mask = (case["logp"] - case["old"]).exp(), case["adv"][:, None], case["mask"]
    assert metrics["actor/clip_frac_low"] == ((ratio < 0.8) & (adv < 0) & mask).sum().item() / 13 > 0
    assert metrics["actor/clip_frac_high"] == ((ratio > 1.28) & (adv > 0) & mask).sum().item() / 13 > 0
    assert metrics["actor/ratio_max"] == pytest.approx(ratio[mask].max().item())
    assert (ratio[mask & (adv < 0)] > 10).any()  # the case goes beyond the dual clip too


@pytest.mark.parametrize("name", rl.ALGOS)
def test_losses_do_not_depend_on_padding_order_or_shares(name):
    case = loss_case()
    loss = whole_loss(name, case)
    padded = {k: F.pad(x, (0, 3), value=-7.0 if x.dtype == torch.float else False) if x.ndim > 1 else x
              for k, x in case.items()}  # fmt: skip
    torch.testing.assert_close(whole_loss(name, padded), loss)
    torch.testing.assert_close(whole_loss(name, {k: x[[2, 0, 3, 1]] for k, x in case.items()}), loss)
    weight = rl.token_weights(case["mask"][:, None], rl.ALGOS[name].loss_agg, 8)[:, 0]
    shares = [{k: x[rows] for k, x in case.items()} for rows in ([0], [1, 2], [3])]
    weights = [weight[rows] for rows in ([0], [1, 2], [3])]
    parts = sum(whole_loss(name, share, w) for share, w in zip(shares, weights))
    torch.testing.assert_close(parts, loss)
    if rl.ALGOS[name].loss_agg == "token":  # a mean of the shares' own means is another loss
        assert abs(sum(whole_loss(name, share) for share in shares) / 3 - loss) > 1e-3


@pytest.mark.parametrize("name", rl.ALGOS)
def test_neither_an_empty_response_nor_a_runaway_ratio_is_nan(name):
    case = loss_case()
    one_empty = case["mask"] & torch.tensor([[True], [False], [True], [True]])
    for changes in ({"mask": one_empty}, {"mask": torch.zeros_like(one_empty)}, {"old": case["old"] - 1000}):
        loss = whole_loss(name, case | changes)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, case["logp"])[0]).all()


def test_k3_is_the_kl_on_average_and_never_negative():
    def k3(logp, ref):
        return rl.kl_to_base(logp, {"ref": ref, "weight": torch.ones(len(logp))})

    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    each = torch.stack([k3(p[i : i + 1], q[i : i + 1]) for i in range(3)])
    assert (each >= 0).all() and k3(p, p) == 0
    torch.testing.assert_close((p.exp() * each).sum(), (p.exp() * (p - q)).sum())


def test_overlong_penalty():
    lengths = torch.tensor([0, 15, 16, 18, 20])
    torch.testing.assert_close(rl.overlong_penalty(lengths, 20), torch.tensor([0.0, 0.0, 0.0, -0.5, -1.0]))


def scripted(monkeypatch, rewards):
    """rl.rollout on numbered problems, with a sampler whose rewards follow the script."""
    rewards = iter(rewards)

    def sample(model, tok, problems, G, R, temperature, generator, heads):
        tokens = torch.tensor([[int(p.answer), 9, 9] for p in problems]).repeat_interleave(G, 0)
        mask = torch.ones(len(tokens), 2, dtype=torch.bool)
        reward = torch.tensor([next(rewards) for _ in problems]).flatten()
        return {"tokens": tokens, "mask": mask, "logp": mask * -0.5, "reward": reward}, ["text"] * len(tokens)

    monkeypatch.setattr(rl, "sample", sample)
    problems = (rl.Problem("", "p", str(i)) for i in range(100))
    cfg = SimpleNamespace(**{**vars(CFG), "max_new_tokens": 10})
    return rl.rollout(None, None, None, problems, rl.ALGOS["dapo"], cfg, None)


def test_dynamic_sampling_replaces_groups_without_gradient(monkeypatch):
    script = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    kept, record, _ = scripted(monkeypatch, script)
    assert kept["tokens"][::2, 0].tolist() == [1, 3, 5]  # problems 0, 2 and 4 were all right or all wrong
    assert kept["reward"].tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert record["reward/frac_zero_std"] == 0.5 and record["reward/mean"] == pytest.approx(5 / 12)
    assert record["actor/entropy"] == pytest.approx(0.5) and record["response_length/mean"] == 2
    assert record["response_length/clip_ratio"] == 0


def test_the_overlong_penalty_is_in_the_reward_but_does_not_make_a_group_informative(monkeypatch):
    monkeypatch.setattr(rl, "overlong_penalty", lambda length_B, R: -torch.arange(len(length_B)) / 10)
    script = [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]] + [[0.0, 0.0]] * 9
    kept, record, _ = scripted(monkeypatch, script)
    assert kept["tokens"][::2, 0].tolist() == [1, 2] and record["reward/mean"] < 4 / 12
    torch.testing.assert_close(kept["reward"], torch.tensor([0.8, -0.3, -0.4, 0.5]))


def test_a_sample_is_scored_by_its_text(monkeypatch):
    model, _ = tiny(vocab=257, block=40)
    tok, problems = rl.get_tokenizer("bytes"), rl.held_out_problems("add", 2, 3)
    asked = []
    monkeypatch.setattr(rl, "is_right", lambda problem, text: asked.append((problem, text)) or len(text) % 2)
    samples, texts = rl.sample(model, tok, problems, 4, 10, 1.0, torch.Generator().manual_seed(0))
    assert [problem for problem, _ in asked] == [p for p in problems for _ in range(4)]
    assert samples["reward"].tolist() == [len(text) % 2 for text in texts]
    for tokens, mask, text in zip(samples["tokens"][:, 1:], samples["mask"], texts):
        assert tok.decode([t for t in tokens[mask].tolist() if t != 256]) == text


def test_minibatches_are_whole_groups_and_old_logprobs_are_those_of_the_rollout():
    model, heads = tiny()
    parts, (tokens, mask) = minibatches(model, heads), batch()
    assert [len(mb["adv"]) for mb in parts] == [2, 2]
    logp, logp_mtp, _ = mtp.logprobs(model, heads, tokens, mask)
    for mb, rows, T in zip(parts, (slice(0, 2), slice(2, 4)), (8, 9)):  # each cut to its own longest sequence
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
        logp, valid = logp_mtp[:, k], mb["mask_mtp"][:, k]
        weight = rl.token_weights(valid[:, None], rl.ALGOS[algo].loss_agg, 8)[:, 0]  # not the trunk's
        policy += rl.policy_loss(logp, mb["old_mtp"][:, k], mb["adv"], valid, weight, rl.ALGOS[algo]) / 2
        cross_entropy -= logp[valid].mean() / 2
    torch.testing.assert_close(rl.mtp_loss("policy", logp_mtp, mb, mb["adv"], rl.ALGOS[algo]), policy)
    torch.testing.assert_close(rl.mtp_loss("ce", logp_mtp, mb, mb["adv"], rl.ALGOS[algo]), cross_entropy)


def test_the_metrics_of_a_first_update():
    """The share of drafts of head k that would be accepted is the mean of min(1, q/p) over the tokens it scores."""
    p, q = torch.rand(3, 5), torch.rand(3, 2, 5)
    mask = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
    mb = {"logp": p.log() - 0.5, "mask": mask, "mask_mtp": mtp.aligned_mask(mask, 2)}
    mb |= {"old": p.log(), "old_mtp": q.log(), "adv": torch.zeros(3)}
    metrics = rl.update_metrics(p.log(), q.log(), mb, mb["adv"], rl.ALGOS["dapo"], first=True)
    assert metrics["actor/ratio_max"] == metrics["mtp/ratio_max"] == 1
    for k in (1, 2):
        accepted = [
            min(1, (q[b, k - 1, t] / p[b, t]).item()) for b, n in enumerate((5, 3, 4)) for t in range(k, n)
        ]
        assert metrics[f"mtp/agreement_{k}"] == pytest.approx(sum(accepted) / len(accepted), rel=1e-5)
    assert metrics["rollout/logp_gap"] == pytest.approx(0.5, abs=1e-5)


def test_eos_has_a_weight_and_a_gradient():
    model, heads = tiny()
    samples = gpt.generate(model, [[1, 2, 3]] * 2, 2, 8, eos=5)
    (mb,) = rl.minibatches(model, heads, samples, torch.ones(4), rl.ALGOS["dapo"],
                           SimpleNamespace(**{**vars(CFG), "updates_per_rollout": 1}))  # fmt: skip
    ends = (mb["tokens"][:, 1:] == 5) & mb["mask"]
    assert ends.any() and (mb["weight_mtp"][:, 0][ends] > 0).any()
    logp = mb["logp"].clone().requires_grad_()
    loss = rl.policy_loss(logp, mb["logp"], mb["adv"], mb["mask"], mb["weight"], rl.ALGOS["dapo"])
    assert (torch.autograd.grad(loss, logp)[0][ends] != 0).all()
