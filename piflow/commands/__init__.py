"""The commands of `piflow`, one `main(recipe)` each, from a checked recipe to what is printed.

A command puts together what the other folders do and holds no mathematics of its own. Heavy
imports are inside of `main`, so that a wrong recipe is explained before torch is loaded.

May import everything but the command line.
"""
