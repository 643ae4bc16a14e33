"""What a run will need, counted and estimated before anything is rented.

`counting.py`: operations, bytes and live memory of a computation without values. `model.py`: a
recipe's weights, by the units that are gathered at once. `passes.py`: one micro-batch's passes.
From these `memory.py`, `traffic.py` and `speed.py` make parts of a `plan.py`, on the GPUs and at
the prices of `hardware.py`; `settling.py` decides what a recipe leaves
open; `choices.py` looks for other ways, `report.py` writes them down. Training's
placement and `piflow check` ask for memory alone.

May import the roles, the backbones, the paper and the configuration.
"""
