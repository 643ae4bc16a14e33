"""Prompts, pictures, the embedding store and the training stream.

A store is planned in `layout.py`, described by `manifest.py`, written by `embed.py` and
`writer.py`, and read by `reader.py`. `order.py` says which prompts every step sees; `stream.py`
hands them to a worker, `blocks.py` and `ray_reader.py` read them. `online.py` encodes prompts
while training runs, without a store.

Ray Data is used here. May import the roles and what stands below them, and the demo's pictures.
"""
