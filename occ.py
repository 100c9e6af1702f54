"""Optimal Coefficient Calibration: how much of the MTP gradient enters the trunk (Wang et al. 2026, arXiv 2605.28184).

θ are the parameters of the trunk. g is the gradient of the policy loss at θ, m that of the loss of the MTP heads. A step
against g + λ m changes the objective J, if J is L-smooth, by at least what RL alone guarantees, plus

    Δ_MTP(λ) = η λ (1 - Lη) c - (L η² λ² / 2) v²        c = <g, m>   first-order correlation
                                                        v² = ‖m‖²   second-order penalty
    λ* = (1 - Lη)/(Lη) · c/v²                           the top of this parabola

OCC follows c/v² without computing g or m. With δ = log π_θ - log π_old on the response tokens since the rollout,

    λ_t = λ₊ · <δ_RL, δ_MTP> / (‖δ_MTP‖² + ε)           the least-squares coefficient of δ_RL on δ_MTP

One mechanism serves every regime. The heads read the trunk through three doors: hidden states, embedding rows (not in
the parallel design) and the unembedding matrix. At each door `scale_grad` multiplies the gradient that goes on into the
trunk by λ: as if the loss of the heads had been multiplied by λ, for the trunk alone.

Dimension key: B sequences · K MTP depth · T positions · N tokens or numbers, flattened

Differs: λ scales the gradient at the doors. In the authors' code it scales the advantages of the heads inside the clip,
and is a mean of per-token ratios; `released_coefficient` has that, for train.py --released.
"""

from typing import NamedTuple

import torch

from model import total


class Regime(NamedTuple):
    # what the heads learn by: "ce" cross-entropy, "policy" the clipped policy loss, None: there are no heads
    heads_loss: str | None
    # the loss whose gradient is m, which enters the trunk times λ
    trunk_loss: str | None
    # for λ: "cut" 0 · "fixed" --lam · "proxy" --occ_proxy · "exact" from g and m
    rule: str


REGIMES = {
    "off": Regime(None, None, "cut"),
    "detach": Regime("ce", "ce", "cut"),
    "ce": Regime("ce", "ce", "fixed"),
    "policy": Regime("policy", "policy", "fixed"),
    "occ": Regime("policy", "policy", "proxy"),
    "exact": Regime("policy", "policy", "exact"),
    # beyond the paper: the heads stay drafters, and the trunk gets the policy gradient through them
    "occ-ce": Regime("ce", "policy", "proxy"),
    "exact-ce": Regime("ce", "policy", "exact"),
}


# ----------------------------------------------------------------------------------------------------------------------
# The doors of the trunk


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lam):
        ctx.lam = lam
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        # A λ of zero lets nothing through, not even 0·inf.
        return torch.where(ctx.lam == 0, torch.zeros_like(grad), grad * ctx.lam), None


def scale_grad(x, lam):
    """x forward; λ times the gradient backward.

    lam is a tensor of one element that is read during the backward: it may be filled in after the forward, when the
    log-probs are known. Or it is a number: 0 cuts the graph.
    """
    if isinstance(lam, torch.Tensor):
        return _ScaleGrad.apply(x, lam)
    if lam == 0:
        return x.detach()
    return _ScaleGrad.apply(x, torch.tensor(float(lam), device=x.device))


# ----------------------------------------------------------------------------------------------------------------------
# λ without a backward pass through the trunk


def wide(x):
    """x without its graph, in float64 where the device has it."""
    return x.detach().double() if x.device.type in ("cpu", "cuda") else x.detach().float()


def inner(a, b):
    """<a, b> over all elements of two tensors of one shape, and over all processes."""
    assert a.shape == b.shape, f"inner product of {tuple(a.shape)} and {tuple(b.shape)}"
    return total((wide(a) * wide(b)).sum())


def logprob_coefficient(delta_rl, delta_mtp, lam_plus=1.0, eps=1e-8):
    """λ_t of the paper (§4) from changes of log-probs since the rollout: same tokens, same shape, 0 where there is none.

    Right after a rollout every δ is 0, hence λ_t is. Returns a tensor of one element, any sign.
    """
    return lam_plus * inner(delta_rl, delta_mtp) / (inner(delta_mtp, delta_mtp) + eps)


def hidden_coefficient(grad_rl, grad_mtp, lam_plus=1.0, eps=1e-20):
    """λ from the gradients of both losses at the trunk's final hidden states.

    Not in the paper. Both losses reach the trunk mostly through these states (the bound of Sener & Koltun 2018, arXiv
    1810.04650), and their gradients there need no backward through the trunk.
    """
    return lam_plus * inner(grad_rl, grad_mtp) / (inner(grad_mtp, grad_mtp) + eps)


RELEASED_LAM_PLUS = 0.1  # over the number of heads: λ₊ in the authors' script


def released_coefficient(delta_rl_BT, delta_mtp_BT, mask_BT, lam_plus=1.0, eps=1e-8):
    """λ of each response (B,), as in the authors' code: one for each pair of neighbours, their micro-batch.

    It is the mean of the per-token ratios δ_RL δ_MTP / (δ_MTP² + ε) over the real tokens of the pair.
    Differs: their mean also counts the padding, as zeros.
    """
    ratio_BT = delta_rl_BT * delta_mtp_BT / (delta_mtp_BT.square() + eps) * mask_BT
    pair = torch.arange(len(mask_BT), device=mask_BT.device) // 2
    sums, counts = torch.zeros(2, len(mask_BT), device=mask_BT.device)
    sums.index_add_(0, pair, ratio_BT.sum(1))
    counts.index_add_(0, pair, mask_BT.sum(1).float())
    return lam_plus * (sums / counts.clamp(min=1))[pair]


def token_deltas(logp_BT, old_BT, logp_mtp_BKT, old_mtp_BKT, mask_mtp_BKT):
    """δ_RL and δ_MTP (B, T-1) of the tokens that some head scores, 0 elsewhere; δ_MTP is the mean over those depths."""
    depths_BT = mask_mtp_BKT.sum(1)
    delta_rl_BT = (logp_BT - old_BT) * (depths_BT > 0)
    delta_mtp_BT = ((logp_mtp_BKT - old_mtp_BKT) * mask_mtp_BKT).sum(1) / depths_BT.clamp(min=1)
    return delta_rl_BT.detach(), delta_mtp_BT.detach()


# ----------------------------------------------------------------------------------------------------------------------
# The decomposition, and its terms from the real gradients


def delta_mtp(lam, c, v2, eta, L):
    """Δ_MTP(λ), not δ_MTP: what MTP adds to the guaranteed gain of one step of size eta, for an L-smooth objective."""
    first_order = eta * lam * (1 - L * eta) * c
    second_order = L * eta**2 * lam**2 / 2 * v2
    return first_order - second_order


def lam_star(c, v2, eta, L):
    """The λ that maximises delta_mtp. Its scale (1 - Lη)/(Lη) is not known in practice: λ₊ stands for it."""
    return (1 - L * eta) / (L * eta) * c / v2


def flat_grad(loss, params):
    """d loss / d params, summed over processes, as one flat vector. The graph is kept; what is not reached counts 0."""
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    flat = [(torch.zeros_like(p) if grad is None else grad).flatten() for p, grad in zip(params, grads)]
    return total(torch.cat(flat))


def product(a, b):
    """<a, b> of two vectors that are the same on all processes, as a number."""
    return (wide(a) * wide(b)).sum().item()


def exact_terms(g, m, lam_plus=1.0):
    """c, v², ‖g‖², their cosine and λ = λ₊ c/v² of two flat gradients. Without an MTP gradient, cosine and λ are 0."""
    c, v2, g2 = product(g, m), product(m, m), product(g, g)
    cos = c / (g2 * v2) ** 0.5 if g2 * v2 > 0 else 0.0
    return {"c": c, "v2": v2, "g2": g2, "cos": cos, "lam_star": lam_plus * c / v2 if v2 > 0 else 0.0}


def coefficient(rule, cfg, deltas, losses, h_BTC, trunk):
    """λ of one minibatch by a regime's rule, a number or a tensor of one element.

    deltas: (δ_RL, δ_MTP). losses: (loss_rl, loss_mtp), whose graph has its doors open. h_BTC: the hidden states at the
    door. trunk: its parameters. Only "exact" and --occ_proxy hidden differentiate, and they keep the graph.
    """
    if rule == "fixed":
        return cfg.lam
    if rule == "proxy" and cfg.occ_proxy == "logprob":
        return logprob_coefficient(*deltas, cfg.lam_plus)
    if rule == "proxy":
        grads = [torch.autograd.grad(loss, h_BTC, retain_graph=True)[0] for loss in losses]
        return hidden_coefficient(*grads, cfg.lam_plus)
    if rule == "exact":
        g, m = [flat_grad(loss, trunk) for loss in losses]
        return exact_terms(g, m, cfg.lam_plus)["lam_star"]
    return 0.0
