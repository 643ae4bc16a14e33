"""What the GMFlow policy computes, as the paper writes it: plain and slow, for tests.

Source: arXiv 2504.05304 and arXiv 2510.14974, section 3. The same formula runs centred in
`mixture`, as whole rollouts in `euler` and in one kernel in `gmflow_triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def posterior_mean(
    m: Tensor,
    logweights: Tensor,
    v: Tensor,
    x_src: Tensor,
    sigma_src: Tensor,
    x: Tensor,
    sigma: Tensor,
) -> Tensor:
    """E[x0 | x at sigma], where x0 | x_src at sigma_src is sum_k exp(logweight_k) N(m_k, v).

    Args:
        m: means of x0, (B, K, C, P).
        logweights: (B, K, P), up to a constant over K.
        v: variance of x0, (B,).
        x_src, x: (B, C, P).
        sigma_src, sigma: (B,), above 0; sigma <= sigma_src, or a variance that keeps d above 0:
            else there is no such posterior.

    Returns:
        (B, C, P).
    """
    v, sigma_src, sigma = (value[:, None, None] for value in (v, sigma_src, sigma))
    rho, rho_src = (1 - sigma) / sigma, (1 - sigma_src) / sigma_src
    zeta = rho**2 - rho_src**2
    nu = rho * x / sigma - rho_src * x_src / sigma_src
    d = v * zeta + 1
    m_nu = torch.einsum("bkcp,bcp->bkp", m, nu)
    weights = torch.softmax(logweights + (m_nu - zeta / 2 * m.square().sum(2)) / d, dim=1)
    return (v * nu + torch.einsum("bkp,bkcp->bcp", weights, m)) / d
