"""Teacher, student and EMA: three roles that one backbone plays.

`trio.py` holds the roles, `heads.py` the policies' output layers, `lora.py` the adapters,
`guided.py` the teacher under classifier-free guidance, `fp8.py` its forward pass in 8 bits, and
`adapter.py` the published file format of a student.

May import backbones and what stands below them.
"""
