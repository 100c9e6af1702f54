"""Optimal Coefficient Calibration: how much of the MTP gradient enters the trunk (Wang et al. 2026, arXiv 2605.28184).

θ are the parameters of the trunk. g is the gradient of the policy loss at θ (g_RL in the plots), m that of the loss of
the MTP heads (g_MTP). If the objective is L-smooth, a step of size η against g + λ m gains at least what RL alone is
sure to gain, plus

    Δ_MTP(λ) = η λ (1 - Lη) c - (L η² λ² / 2) v²        c = <g, m>   first-order correlation
                                                        v² = ‖m‖²   second-order penalty
    λ* = (1 - Lη)/(Lη) · c/v²                           the top of this parabola

OCC estimates c/v² without computing g or m. δ = log π_θ - log π_old is how much the log-prob of a response token has
changed since the rollout: δ_RL that of the trunk, δ_MTP that of the heads. λ₊ stands for the unknown (1 - Lη)/(Lη).

    λ_t = λ₊ · <δ_RL, δ_MTP> / (‖δ_MTP‖² + ε)           the least-squares coefficient of δ_RL on δ_MTP

One mechanism serves every regime. The heads read the trunk through three doors: hidden states, embedding rows (not in
the parallel design) and the unembedding matrix. At each, `scale_grad` multiplies the gradient that enters the trunk by
λ. What the heads themselves learn is left as it is.

Dimension key: B sequences · K MTP depth · T positions

Differs: λ scales the gradient at the doors. In the authors' code it scales the advantages of the heads inside the clip,
and it is a mean of per-token ratios; `released_coefficient` has that, for train.py --released.
"""

from typing import NamedTuple

import torch

from model import total


class Regime(NamedTuple):
    # what the heads learn by: "ce" cross-entropy · "policy" the clipped policy loss · None: there are no heads
    heads_loss: str | None
    # the loss whose gradient is m, which enters the trunk times λ
    trunk_loss: str | None
    # what λ is: "cut" 0 · "fixed" --lam · "proxy" an estimate, by --occ_proxy · "exact" λ₊ c/v² of g and m
    rule: str


REGIMES = {
    "off": Regime(None, None, "cut"),
    "detach": Regime("ce", "ce", "cut"),
    "ce": Regime("ce", "ce", "fixed"),
    "policy": Regime("policy", "policy", "fixed"),
    "occ": Regime("policy", "policy", "proxy"),
    "exact": Regime("policy", "policy", "exact"),
    # beyond the paper: the heads stay good drafters, while the trunk gets the policy gradient through them
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
    """x forward; λ times the gradient backward. lam is a number, where 0 cuts the graph, or a tensor of one element.

    The tensor is read during the backward only. So it may be filled in after the forward, when the log-probs are known.
    """
    if not isinstance(lam, torch.Tensor):
        if lam == 0:
            return x.detach()
        lam = torch.tensor(float(lam), device=x.device)
    return _ScaleGrad.apply(x, lam)


# ----------------------------------------------------------------------------------------------------------------------
# λ without a backward pass through the trunk: the proxies


def wide(x):
    """x without its graph, in float64 where the device has it."""
    return x.detach().double() if x.device.type in ("cpu", "cuda") else x.detach().float()


def inner(a, b):
    """<a, b> over all elements of two tensors of one shape, and over all processes."""
    assert a.shape == b.shape, f"inner product of {tuple(a.shape)} and {tuple(b.shape)}"
    return total((wide(a) * wide(b)).sum())


def logprob_coefficient(delta_rl, delta_mtp, lam_plus=1.0, eps=1e-8):
    """λ_t of the paper (§4), a tensor of one element, of any sign. Right after a rollout every δ is 0, and so is λ_t.

    delta_rl and delta_mtp have the same shape and speak of the same tokens. Where there is no token they are 0.
    """
    return lam_plus * inner(delta_rl, delta_mtp) / (inner(delta_mtp, delta_mtp) + eps)


def hidden_coefficient(grad_rl, grad_mtp, lam_plus=1.0, eps=1e-20):
    """λ from the gradients of both losses at the trunk's final hidden states.

    Not in the paper. Both losses reach the trunk mostly through these states (as in Sener & Koltun 2018, arXiv
    1810.04650), and to find their gradients there takes no backward pass through the trunk.
    """
    return lam_plus * inner(grad_rl, grad_mtp) / (inner(grad_mtp, grad_mtp) + eps)


RELEASED_LAM_PLUS = 0.1  # divided by the number of heads, this is λ₊ in the authors' script


def released_coefficient(delta_rl_BT, delta_mtp_BT, mask_BT, lam_plus=1.0, eps=1e-8):
    """λ of each response (B,), as in the authors' code: two neighbouring responses, a micro-batch there, share one.

    It is the mean of δ_RL δ_MTP / (δ_MTP² + ε) over the pair's tokens. Differs: theirs also counts padding, as zeros.
    """
    ratio_BT = delta_rl_BT * delta_mtp_BT / (delta_mtp_BT.square() + eps)
    pairs = zip((ratio_BT * mask_BT).split(2), mask_BT.split(2))
    mean = torch.stack([ratio.sum() / mask.sum().clamp(min=1) for ratio, mask in pairs])
    return lam_plus * mean.repeat_interleave(2)[: len(mask_BT)]


def token_deltas(logp_BT, old_BT, logp_mtp_BKT, old_mtp_BKT, mask_mtp_BKT):
    """δ_RL and δ_MTP (B, T-1) of the tokens that some head scores, 0 elsewhere; δ_MTP is the mean of these heads' δ."""
    depths_BT = mask_mtp_BKT.sum(1)  # how many heads score a token
    delta_rl_BT = (logp_BT - old_BT) * (depths_BT > 0)
    delta_mtp_BT = ((logp_mtp_BKT - old_mtp_BKT) * mask_mtp_BKT).sum(1) / depths_BT.clamp(min=1)
    return delta_rl_BT.detach(), delta_mtp_BT.detach()


# ----------------------------------------------------------------------------------------------------------------------
# The decomposition, and its terms from the real gradients


def delta_mtp(lam, c, v2, eta, L):
    """Δ_MTP(λ): what MTP adds to the guaranteed gain of one step of size eta, if the objective is L-smooth."""
    first_order = eta * lam * (1 - L * eta) * c
    second_order = L * eta**2 * lam**2 / 2 * v2
    return first_order - second_order


def lam_star(c, v2, eta, L):
    """λ*, which maximises delta_mtp. Its factor (1 - Lη)/(Lη) is not known in practice, and λ₊ takes its place."""
    return (1 - L * eta) / (L * eta) * c / v2


def flat_grad(loss, params):
    """d loss / d params, summed over processes, as one flat vector; 0 for parameters not reached. The graph is kept."""
    grads = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
    return total(torch.cat([grad.flatten() for grad in grads]).detach())


def dot(a, b):
    """<a, b> as a number, of two vectors that every process has whole (`inner` adds up over processes)."""
    return (wide(a) * wide(b)).sum().item()


def exact_terms(g, m, lam_plus=1.0):
    """c, v², ‖g‖², the cosine of g and m, and λ = λ₊ c/v². What would be a division by 0 is 0."""
    c = dot(g, m)
    v2 = dot(m, m)
    g2 = dot(g, g)
    cos = c / (g2 * v2) ** 0.5 if g2 * v2 > 0 else 0.0
    lam = lam_plus * c / v2 if v2 > 0 else 0.0
    return {"c": c, "v2": v2, "g2": g2, "cos": cos, "lam_exact": lam}


def coefficient(rule, cfg, deltas, losses, h_BTC, trunk):
    """λ of one minibatch by a regime's rule: a number, or a tensor of one element.

    deltas: (δ_RL, δ_MTP). losses: (loss_rl, loss_mtp), with λ = 1 at the doors. h_BTC: the hidden states at the door.
    trunk: its parameters. Only "exact" and --occ_proxy hidden differentiate, and they keep the graph.
    """
    if rule == "fixed":
        return cfg.lam
    if rule == "exact":
        g, m = [flat_grad(loss, trunk) for loss in losses]
        return exact_terms(g, m, cfg.lam_plus)["lam_exact"]
    if rule == "proxy" and cfg.occ_proxy == "hidden":
        grads = [torch.autograd.grad(loss, h_BTC, retain_graph=True)[0] for loss in losses]
        return hidden_coefficient(*grads, cfg.lam_plus)
    if rule == "proxy":
        return logprob_coefficient(*deltas, cfg.lam_plus)
    assert rule == "cut", f"a rule that nobody wrote: {rule}"
    return 0.0
