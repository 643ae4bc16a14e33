"""Checkpoint -> adapter and registered model version, as the step of a job.

python pipelines/export.py RECIPE --out s3://bucket/adapters/student
"""

from piflow.cli import run

if __name__ == "__main__":
    run("export")
