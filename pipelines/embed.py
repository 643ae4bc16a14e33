"""Prompts -> embedding store (Ray Data), as the step of a job.

python pipelines/embed.py RECIPE --set embed.encoders=[2,8]
"""

from piflow.cli import run

if __name__ == "__main__":
    run("embed")
