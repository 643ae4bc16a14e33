"""How good a student is, beside its teacher and from the same noise.

`drawing.py` draws, `compare.py` measures, `metrics.py` has the figures with their intervals,
`report.py` makes one HTML page of them, `sheet.py` puts pictures side by side.

May import training and what stands below it.
"""
