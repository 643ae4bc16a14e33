"""Recipes and models made small, with the classes of the big ones: for `piflow smoke` and tests.

`shrink.py` makes a recipe small, `models.py` saves a tiny random pipeline of its family.

May import the data and what stands below it.
"""
