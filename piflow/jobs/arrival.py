"""The first program of a submitted job, on the cluster: is piflow here the one that sent it?

It goes along with the job and needs Python alone, so that it can also tell where piflow is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import socket
import sys

ARRIVED = "piflow: arrived, "


def problem(version: str, modules: list[str]) -> str | None:
    """Why the job can't run here; None: it can.

    Args:
        version: of the piflow that sent it.
        modules: ``module=what to install`` for each that it needs; ``module=`` is the user's own.
    """
    try:
        here = importlib.metadata.version("piflow")
    except importlib.metadata.PackageNotFoundError:
        return f"the cluster's Python ({sys.executable}) has no piflow; use an image with {version}"
    if here != version:
        return (
            f"the cluster has piflow {here} and the job was sent by {version}; install {here} "
            "where you submit, or use an image with the other"
        )
    for module in modules:
        name, _, package = module.partition("=")
        if not _is_there(name):
            remedy = (
                f"pip install '{package}' in it" if package else f"send it along: --with {name}"
            )
            return f"the cluster's image lacks {name}: {remedy}"
    return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what stands before the last dot isn't there
        return False


def main() -> None:
    """Say that all is there, or end with exit code 1 (`piflow.runtime.exits.ExitCode.MISTAKE`)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--piflow", required=True, metavar="VERSION")
    parser.add_argument("--module", action="append", default=[], metavar="NAME=PACKAGE")
    options = parser.parse_args()
    told = problem(options.piflow, options.module)
    if told is not None:
        sys.exit(f"piflow: {told}")
    python = platform.python_version()
    print(f"{ARRIVED}{options.piflow} with Python {python} on {socket.gethostname()}", flush=True)


if __name__ == "__main__":
    main()
