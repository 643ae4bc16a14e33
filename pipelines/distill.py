"""Embedding store -> few-step student (Ray Train), as the step of a job; run again to go on.

python pipelines/distill.py RECIPE --set runtime.num_workers=8
"""

from piflow.cli import run

if __name__ == "__main__":
    run("distill")
