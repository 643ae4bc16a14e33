"""Embedding store and pictures -> a small teacher (Ray Train), as the step of a job.

python pipelines/pretrain.py RECIPE
"""

from piflow.cli import run

if __name__ == "__main__":
    run("pretrain")
