"""What a run will need, estimated before anything is rented.

`memory.py`: bytes of a replica and of a shard. Training's placement asks it.

May import the configuration alone.
"""
