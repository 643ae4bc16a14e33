"""From a recipe to optimiser steps and to the files that they leave.

`preflight.py` checks, `build.py` puts models and trainer together, `placement.py` decides who
holds what. `step.py` is one optimiser step, `objective.py` what it minimises. `checkpoint.py` and
`checkpoint_writer.py` save and restore, `export.py` makes adapters and teachers of checkpoints.

Knows no Ray. May import inference, planning and what stands below them.
"""
