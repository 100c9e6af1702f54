"""Optimal Coefficient Calibration: how much of the MTP gradient enters the trunk (Wang et al. 2026, arXiv 2605.28184).

θ: the trunk. g = ∇θ J the policy gradient, m = ∇θ J_MTP the gradient of the heads' objective. A step of ascent moves
θ by η (g + λ m); if J is L-smooth, MTP adds to the guaranteed gain (the paper's decomposition)

    Δ_MTP(λ) = η λ (1 - Lη) c - (L η² λ² / 2) v²        c = <g, m>   first-order correlation
                                                        v² = ‖m‖²   second-order penalty
    λ* = (1 - Lη)/(Lη) · c/v²                           the top of this parabola

OCC follows c/v² without computing g or m. With δ = log π_θ - log π_old on the response tokens since the rollout,

    λ_t = λ₊ · <δ_RL, δ_MTP> / (‖δ_MTP‖² + ε)           the least-squares coefficient of δ_RL on δ_MTP

One mechanism serves every regime: the heads always learn from their own objective with weight 1, and `scale_grad` at
the three doors of the trunk (hidden states, embedding rows, unembedding) multiplies what goes on into the trunk by λ.

Dimension key: N tokens or numbers, any shape, flattened

Differs: one ratio of sums over all real response tokens of the minibatch, as in the paper; its released code averages
per-token ratios, padding included (average="ratios": without the padding). λ scales gradients at the doors; there it
scales advantages inside the clip, where a negative one changes the side that is clipped.
"""

from typing import NamedTuple

import torch


class Regime(NamedTuple):
    objective: str | None  # of the heads: "ce" the log-prob of sampled tokens, "policy" the clipped policy objective
    rule: str  # for λ: "cut" 0 · "fixed" --lam · "proxy" from log-probs or hidden states · "exact" from g and m


REGIMES = {
    "off": Regime(None, "cut"),  # no heads at all
    "detach": Regime("ce", "cut"),
    "ce": Regime("ce", "fixed"),
    "policy": Regime("policy", "fixed"),
    "occ": Regime("policy", "proxy"),
    "exact": Regime("policy", "exact"),
}


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

    lam is a number, or a tensor of one element that is read during the backward: it may be filled in after the forward,
    when log-probs are known. A number 0 cuts the graph.
    """
    if isinstance(lam, torch.Tensor):
        return _ScaleGrad.apply(x, lam)
    return x.detach() if lam == 0 else x if lam == 1 else _ScaleGrad.apply(x, torch.tensor(float(lam)))


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, see, *tensors):
        ctx.see = see
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        ctx.see(*grads)
        return None, *grads


def itself(x):
    """The total over one process."""
    return x


def inner(a, b, total=itself):
    """<a, b> over all elements of two tensors of one shape, summed in float64, and over processes by `total`."""
    assert a.shape == b.shape, f"inner product of {tuple(a.shape)} and {tuple(b.shape)}"
    return total((a.detach().double() * b.detach().double()).sum())


def logprob_coefficient(delta_rl, delta_mtp, lam_plus=1.0, eps=1e-8, average="sums", total=itself):
    """λ_t of the paper from changes of log-probs since the rollout: same tokens, same shape, no padding among them.

    average="sums": λ₊ Σ δ_RL δ_MTP / (Σ δ_MTP² + ε). "ratios": λ₊ mean(δ_RL δ_MTP / (δ_MTP² + ε)), the released code.
    Right after a rollout every δ is 0, hence λ is. total(x) sums x over processes that hold a share of the tokens each.
    Returns a float64 tensor of one element, any sign.
    """
    if average == "sums":
        return lam_plus * inner(delta_rl, delta_mtp, total) / (inner(delta_mtp, delta_mtp, total) + eps)
    rl, mtp = delta_rl.detach().double(), delta_mtp.detach().double()
    count = total(torch.tensor(float(rl.numel()), device=rl.device)).clamp(min=1)
    return lam_plus * total((rl * mtp / (mtp.square() + eps)).sum()) / count


def hidden_coefficient(grad_rl, grad_mtp, lam_plus=1.0, eps=1e-20, total=itself):
    """λ from the gradients a, b of both objectives at the trunk's hidden states: λ₊ <a, b> / (‖b‖² + ε).

    Not in the paper. Both objectives reach the trunk mostly through these states (the bound of Sener & Koltun 2018,
    arXiv 1810.04650), and their gradients there cost one backward through the heads, none through the trunk.
    """
    return lam_plus * inner(grad_rl, grad_mtp, total) / (inner(grad_mtp, grad_mtp, total) + eps)


def hidden_watch(lam, terms, cfg, total=itself):
    """hidden_coefficient without a backward of its own: λ is set when the backward comes to the doors.

    Returns watch(h, h_heads, emb, W) -> the same four, to stand between the doors (scale_grad with the tensor `lam`)
    and what reads them: the trunk's own head reads the first, the MTP heads the others. Both gradients at h, a and b,
    then pass here before the doors; lam and terms (see coefficient) are filled in.
    """

    def see(a, b, *_):
        lam.fill_(hidden_coefficient(a, b, cfg.lam_plus, total=total))
        terms.update(_terms(lam.clone(), a, b, total))

    return lambda *tensors: _Watch.apply(see, *tensors)


def _terms(lam, a, b, total):
    return {"occ/lam": lam, "occ/c_hat": inner(a, b, total), "occ/v2_hat": inner(b, b, total)}


def delta_mtp(lam, c, v2, eta, L):
    """Δ_MTP(λ): what MTP adds to the guaranteed gain of one step of size eta, for an L-smooth objective."""
    first_order = eta * lam * (1 - L * eta) * c
    second_order = L * eta**2 * lam**2 / 2 * v2
    return first_order - second_order


def lam_star(c, v2, eta, L):
    """The λ that maximises delta_mtp. Its scale (1 - Lη)/(Lη) is not known in practice: λ₊ stands for it."""
    return (1 - L * eta) / (L * eta) * c / v2


def flat_grad(loss, params):
    """d loss / d params as one flat vector; parameters that the loss does not reach count as 0. The graph is kept."""
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads)])


def exact_terms(g, m, lam_plus=1.0):
    """c, v², cos and λ = λ₊ c/v² of two flat gradient vectors, as a dict of numbers. No MTP gradient, no λ: 0."""
    c, v2, g2 = inner(g, m).item(), inner(m, m).item(), inner(g, g).item()
    cos = c / (g2 * v2) ** 0.5 if g2 * v2 > 0 else 0.0
    return {"c": c, "v2": v2, "g2": g2, "cos": cos, "lam_star": lam_plus * c / v2 if v2 > 0 else 0.0}


def split_terms(g_a, m_a, g_b, m_b, share=0.5):
    """c, v² and ‖g‖² without the noise that g and m share when they come from the same samples.

    The arguments are the contributions of two parts of a minibatch, g = g_a + g_b, the first with `share` of it.
    Products across the parts are of independent estimates, so the mean of <g_a, m_b> is share (1 - share) <E g, E m>;
    within a part it contains the covariance too.
    """
    across = share * (1 - share)
    c_split = (inner(g_a, m_b) + inner(g_b, m_a)).item() / (2 * across)
    return {
        "c_split": c_split,
        "v2_split": inner(m_a, m_b).item() / across,
        "g2_split": inner(g_a, g_b).item() / across,
    }


def coefficient(out, params, cfg, total=itself):
    """λ of one minibatch by the rule of cfg.regime, with the ĉ and v̂² of its proxy (over tokens, or products at h).

    out: rl and mtp (losses whose graph has its doors open), delta_rl_N and delta_mtp_N, and h_BTC, the hidden states
    at the door. params: those of the trunk, or of some blocks, for "exact". cfg: regime, lam, lam_plus, occ_proxy,
    occ_average. total: sums over processes.
    Only "hidden" and "exact" differentiate, and keep the graph. Returns (λ, {"occ/lam", "occ/c_hat", "occ/v2_hat"}),
    numbers or tensors of one element.
    """
    rule, a, b = REGIMES[cfg.regime].rule, out.delta_rl_N, out.delta_mtp_N
    if rule == "proxy" and cfg.occ_proxy == "hidden":
        a, b = (torch.autograd.grad(loss, out.h_BTC, retain_graph=True)[0] for loss in (out.rl, out.mtp))
        lam = hidden_coefficient(a, b, cfg.lam_plus, total=total)
    elif rule == "proxy":
        lam = logprob_coefficient(a, b, cfg.lam_plus, average=cfg.occ_average, total=total)
    elif rule == "exact":
        g, m = (total(flat_grad(loss, params)) for loss in (out.rl, out.mtp))
        lam = exact_terms(g, m, cfg.lam_plus)["lam_star"]
    else:
        lam = cfg.lam if rule == "fixed" else 0.0
    return lam, _terms(lam, a, b, total)


def probe(parts, trunk, last_blocks, lam_plus=1.0, share=0.5, total=itself):
    """The exact terms of one minibatch, whatever the regime, and what each proxy makes of it, for the log.

    parts: one or two functions, each running the forward of a part of the minibatch with open doors and returning an
    object as `coefficient` takes it. With two, the first being `share` of it, split_terms too. last_blocks: the
    parameters of some blocks, to see what their gradients alone would say.
    Returns the terms, and the gradients g and m of the two losses.
    """
    grads, deltas, at_h, at_blocks = [], [], [], []
    for run in parts:
        out = run()
        grads.append((total(flat_grad(out.rl, trunk)), total(flat_grad(out.mtp, trunk))))
        at_blocks.append([total(flat_grad(loss, last_blocks)) for loss in (out.rl, out.mtp)])
        deltas.append((out.delta_rl_N, out.delta_mtp_N))
        at_h.append(tuple(flat_grad(loss, [out.h_BTC]) for loss in (out.rl, out.mtp)))
    g, m = (sum(x) for x in zip(*grads))
    terms = exact_terms(g, m, lam_plus)
    if len(grads) == 2:
        terms |= split_terms(*grads[0], *grads[1], share)
    terms["lam_blocks"] = exact_terms(*(sum(x) for x in zip(*at_blocks)), lam_plus)["lam_star"]
    delta_rl_N, delta_mtp_N = (torch.cat(x) for x in zip(*deltas))
    terms["lam_hidden"] = hidden_coefficient(*(torch.cat(x) for x in zip(*at_h)), lam_plus, total=total).item()
    for average in ("sums", "ratios"):
        lam = logprob_coefficient(delta_rl_N, delta_mtp_N, lam_plus, average=average, total=total)
        terms[f"lam_{average}"] = lam.item()
    return {f"occ/{name}": value for name, value in terms.items()}, g, m


def step_terms(u, g, g_after, delta):
    """η and L of a step that was made, for delta_mtp: u = g + λ m, delta the step, all gradients of losses (-J).

    η = ‖delta‖/‖u‖: the plain gradient step of the same length, whatever the optimizer and clipping made of u.
    L = <g_after - g, delta>/‖delta‖²: how fast the slope of the objective falls along this step; it may be negative.
    """
    length2 = inner(delta, delta).item()
    eta = (length2 / max(inner(u, u).item(), 1e-30)) ** 0.5
    return {"occ/eta": eta, "occ/L": inner(g_after - g, delta).item() / max(length2, 1e-30)}
