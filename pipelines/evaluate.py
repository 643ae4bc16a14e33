"""Checkpoint -> figures against the teacher, and a report, as the step of a job.

python pipelines/evaluate.py RECIPE --checkpoint s3://bucket/run/checkpoints/step_00003000
"""

from piflow.cli import run

if __name__ == "__main__":
    run("evaluate")
