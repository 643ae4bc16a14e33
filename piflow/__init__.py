"""Distils text-to-image flow models into students that need 1-8 network evaluations.

The modules of this folder are the paper (arXiv 2510.14974): `schedule`, `policies`, `flow`,
`imitation`, `guidance`, `sampling`, `scheduler` and `ema`. They import torch alone (the scheduler
diffusers, too). Every folder is one concept of the field; what may import what is in
`.importlinter`.
"""
