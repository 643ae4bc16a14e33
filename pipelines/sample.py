"""Adapter + prompts -> pictures, as the step of a job.

python pipelines/sample.py ADAPTER --prompt "a red heart"
"""

from piflow.cli import run

if __name__ == "__main__":
    run("sample")
