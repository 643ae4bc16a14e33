"""Policies: what a student's one evaluation stands for, and rollouts along them.

A policy is a velocity field in closed form that needs no network (arXiv 2510.14974, section 3):
`gmflow.py` a Gaussian mixture per latent pixel, `dx.py` values over time. `rollout.py` integrates
them; `mixture.py`, `tensor_products.py`, `euler.py` and the Triton kernel are the fast ways of
the same.

May import the schedule alone.
"""

from piflow.policies.base import Policy
from piflow.policies.dx import DXPolicy
from piflow.policies.gmflow import GMFlowPolicy, auto_temperature
from piflow.policies.rollout import mean_velocity, rollout

__all__ = [
    "DXPolicy",
    "GMFlowPolicy",
    "Policy",
    "auto_temperature",
    "mean_velocity",
    "rollout",
]
