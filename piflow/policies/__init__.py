"""Policies: what a student's one evaluation stands for, and rollouts along them."""

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
