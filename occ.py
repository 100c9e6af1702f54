"""Optimal Coefficient Calibration: how much of the MTP gradient enters the trunk (Wang et al. 2026, arXiv 2605.28184).

θ are the parameters of the trunk, the GPT without its MTP heads. g is the gradient of the policy loss at θ (g_RL in the
plots), m that of the heads' loss (g_MTP). If the objective is L-smooth, a step of size η against g + λ m has the
guaranteed gain of RL alone, and on top of it

    Δ_MTP(λ) = η λ (1 - Lη) c - (L η² λ² / 2) v²        c = <g, m>   first-order correlation
                                                        v² = ‖m‖²   second-order penalty
    λ* = (1 - Lη)/(Lη) · c/v²                           the top of this parabola

So m helps as far as it points where g points, and costs by its length alone. To find c and v² takes two backward
passes through the trunk, for g and for m. OCC needs none. A small step changes the log-prob of each token by the inner
product of the step and that token's gradient. So the log-probs of the response tokens show, for free, what the updates
since the rollout have done: δ = log π_θ - log π_old, δ_RL of the trunk, δ_MTP of the heads. The more alike they are,
the more g and m agree. That compares in the space of log-probs what c compares in the space of parameters:

    λ_t = λ₊ · <δ_RL, δ_MTP> / (‖δ_MTP‖² + ε)           the least-squares coefficient of δ_RL on δ_MTP

It is a proxy, because δ_MTP also holds what the heads themselves have learnt. λ₊ stands for the factor (1 - Lη)/(Lη),
which nobody knows while training. In the first update of a rollout every δ is 0, and so is λ_t.

Noise. The formula is for gradients without noise. A minibatch has estimates ĝ and m̂; E is the mean over minibatches. A
step of size η against ĝ + λ m̂ adds on average

    η λ c  -  η² λ E ĝᵀHm̂  -  (η² λ² / 2) E m̂ᵀHm̂         c = <E ĝ, E m̂>, H the Hessian of the policy loss

The first term sees means only. The others see curvature, and there noise counts: the noise that ĝ and m̂ of the same
samples share, and the noise of m̂ itself. See `noisy_terms`.

One mechanism serves every regime. The heads read the trunk through three doors: hidden states, embedding rows (not in
the parallel design) and the unembedding matrix. At each, `scale_grad` multiplies the gradient that enters the trunk by
λ; the heads themselves learn in full. Behind the doors g and λ m are one gradient, so there is one λ for all layers.

Dimension key: B sequences · K MTP depth · T positions

Differs from the authors' code: there λ scales the advantages of the heads inside the clip, here gradients at the doors.
"""

from typing import NamedTuple

import torch

from model import total


class Regime(NamedTuple):
    # the heads' loss, whose gradient in the trunk is m: "ce" cross-entropy on the sampled tokens, "policy" the clipped
    # policy loss, None: no heads
    loss: str | None
    # λ, how much of m enters the trunk: "zero" nothing, "fixed" --lam, "proxy" λ_t, "exact" λ₊ c/v² of the minibatch
    rule: str


REGIMES = {
    "off": Regime(None, "zero"),
    "detach": Regime("ce", "zero"),
    "ce": Regime("ce", "fixed"),
    "policy": Regime("policy", "fixed"),
    "occ": Regime("policy", "proxy"),
    "exact": Regime("policy", "exact"),
}


def scale_grad(x, lam):
    """x forward; λ times the gradient backward. lam None: the gradient as it is.

    lam is a tensor of one element, which is read during the backward only. So it may be filled in after the forward,
    when the log-probs are known. A λ of 0 lets nothing through, not even 0·inf.
    """
    y = x.view_as(x)
    if lam is not None and y.requires_grad:
        y.register_hook(lambda grad: torch.where(lam == 0, 0.0, grad * lam))
    return y


# ---- λ_t from log-probs --------------------------------------------------------------------------


def dot(a, b):
    """<a, b> over all elements of two tensors of one shape, as a tensor; in float64 where the device has it."""
    assert a.shape == b.shape, f"inner product of {tuple(a.shape)} and {tuple(b.shape)}"
    dtype = torch.float64 if a.device.type in ("cpu", "cuda") else torch.float32
    return (a.detach().to(dtype) * b.detach().to(dtype)).sum()


def inner(a, b):
    """`dot` summed over processes, each of which has a share of the tensors."""
    return total(dot(a, b))


def token_deltas(logp_BT, logp_mtp_BKT, mb):
    """δ_RL and δ_MTP (B, T-1): how log-probs have changed since the rollout, for the tokens that any head scores.

    mb, of rl.minibatches, has the log-probs at the rollout, old (B, T-1) and old_mtp (B, K, T-1), and mask_mtp. δ_MTP
    is the mean over the heads that score the token. Other tokens have 0.
    """
    depths_BT = mb["mask_mtp"].sum(1)  # how many heads score a token
    delta_rl_BT = (logp_BT - mb["old"]) * (depths_BT > 0)
    delta_mtp_BKT = (logp_mtp_BKT - mb["old_mtp"]) * mb["mask_mtp"]
    delta_mtp_BT = delta_mtp_BKT.sum(1) / depths_BT.clamp(min=1)
    return delta_rl_BT.detach(), delta_mtp_BT.detach()


def logprob_coefficient(delta_rl, delta_mtp, lam_plus=1.0, eps=1e-8):
    """λ_t of the paper (§4), a tensor of one element, of any sign. Right after a rollout every δ is 0, and so is λ_t.

    delta_rl and delta_mtp have the same shape and are about the same tokens. Where there is no token they are 0.
    """
    return lam_plus * inner(delta_rl, delta_mtp) / (inner(delta_mtp, delta_mtp) + eps)


# ---- The decomposition, and its terms from the real gradients ------------------------------------


def delta_mtp(lam, c, v2, eta, L):
    """Δ_MTP(λ): what MTP adds to the guaranteed gain of one step of size eta, if the objective is L-smooth."""
    first_order = eta * lam * (1 - L * eta) * c
    second_order = L * eta**2 * lam**2 / 2 * v2
    return first_order - second_order


def lam_star(c, v2, eta, L):
    """λ*, which maximises delta_mtp. Its factor (1 - Lη)/(Lη) is not known in practice, and λ₊ takes its place."""
    return (1 - L * eta) / (L * eta) * c / v2


def noisy_terms(lam, c, ghm, mhm, eta):
    """(first order, shared noise, penalty): what MTP adds to the mean gain of a plain (SGD) step against ĝ + λ m̂.

    c = <E ĝ, E m̂>, ghm = E ĝᵀHm̂ (curvature between the means, and the noise that both share), mhm = E m̂ᵀHm̂. Without
    noise and with H = L·1 the sum is delta_mtp. If mhm > 0, it is largest at λ* = (c - η ghm) / (η mhm).
    """
    first_order = eta * lam * c
    shared_noise = -(eta**2) * lam * ghm
    penalty = -(eta**2) * lam**2 / 2 * mhm
    return first_order, shared_noise, penalty


def flat_grad(loss, params):
    """d loss / d params, summed over processes, as one flat vector; 0 for parameters not reached. The graph is kept."""
    grads = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
    return total(torch.cat([grad.flatten() for grad in grads]).detach())


def exact_terms(g, m, lam_plus=1.0):
    """c, v², ‖g‖², the cosine of g and m, and λ = λ₊ c/v², as numbers. A division by 0 gives 0."""
    c, v2, g2 = torch.stack((dot(g, m), dot(m, m), dot(g, g))).tolist()
    cos = c / (g2 * v2) ** 0.5 if g2 * v2 > 0 else 0.0
    lam = lam_plus * c / v2 if v2 > 0 else 0.0
    return {"c": c, "v2": v2, "g2": g2, "cos": cos, "lam_exact": lam}


def coefficient(rule, cfg, deltas, terms):
    """λ of one minibatch by a regime's rule: a number, or a tensor of one element.

    deltas: (δ_RL, δ_MTP). terms: from exact_terms, only for "exact".
    """
    if rule == "fixed":
        return cfg.lam
    if rule == "proxy":
        return logprob_coefficient(*deltas, cfg.lam_plus)
    if rule == "exact":
        return terms["lam_exact"]
    assert rule == "zero", f"unknown rule: {rule}"
    return 0.0
