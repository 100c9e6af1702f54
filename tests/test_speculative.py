"""Speculative sampling changes how often the trunk runs, and nothing else."""

from unittest.mock import Mock

import pytest
import torch
from conftest import chi_square, tiny

from model import generate
from mtp import speculative_sample as sample


@pytest.mark.parametrize("quality, accepted", [(-1.0, 0.54), (0.5, 0.87)])
def test_samples_have_the_trunks_distribution(quality, accepted, monkeypatch):
    """With bad heads and good ones: logits, which the last token decides, of quality · trunk's."""
    table = torch.tensor([[0.0, 1.5, -0.5], [1.0, 0.0, 1.0], [-1.0, 0.5, 0.7]])
    model = Mock(hidden=table.__getitem__, logits=torch.nn.Identity())
    model.wte = torch.nn.Embedding.from_pretrained(quality * table)
    heads = Mock(heads=[1, 2], side_effect=lambda h, emb: emb[:, None, :-1].expand(-1, 2, -1, -1))
    p = (table / 1.4).softmax(-1)
    probs = torch.einsum("i,ij,jk->ijk", p[1], p, p).flatten()
    for right, share in ((True, accepted), (False, 1)):
        drawn = torch.tensor([sample(model, heads, [0, 1], 3, 99, 1.4) for _ in range(1000)])
        chi2 = chi_square(drawn[:, 0] @ torch.tensor([9, 3, 1]), probs)  # of the 27 responses
        assert (chi2 < 54.1) == right  # the 99.9 % point
        assert drawn[:, 1, 1].float().mean().item() == pytest.approx(share, abs=0.05)
        monkeypatch.setattr(torch, "rand", Mock(return_value=0 * table.sum()))  # accepts all drafts


@pytest.mark.parametrize("design", ("sequential", "parallel"))
def test_greedy_is_plain_greedy_and_depths_are_those_of_the_drafts_kept(design):
    ends, kept = 0, []  # ends inside drafts; the limit of length is that of the trunk's positions
    for R in (2, 3, 4, 5, 8) * 18:
        model, heads = tiny(vocab=4, block=3 + R, layers=1, design=design, seed=len(kept))
        plain = generate(model, [[1, 2, 3]], 1, R, eos=0, temperature=0)["tokens"]
        new, depths = sample(model, heads, [1, 2, 3], R, 0, temperature=0)
        assert [1, 2, 3, *new] == plain[0].tolist()
        said = model.logits(heads(model.hidden(plain), model.wte(plain))).argmax(-1)[0]
        turn = 3  # of heads 1 and 2, then of the trunk
        for t, (token, depth) in enumerate(zip(new, depths)):
            accepted = turn <= 2 and said[turn - 1, t + 2] == token
            assert depth == (turn if accepted else 0)
            turn = turn + 1 if accepted else 1
        kept, ends = kept + depths, ends + (new[-1] == 0 and depths[-1] > 0)
    assert min(ends, kept.count(1), kept.count(2)) > 2
