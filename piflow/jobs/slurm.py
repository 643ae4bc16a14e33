"""A Slurm batch script: Ray on all machines of the allocation, by `ray symmetric-run`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from piflow.config import Recipe
from piflow.jobs.demand import Demand, require_reachable
from piflow.jobs.kuberay import run_name
from piflow.jobs.machines import SlurmValues
from piflow.jobs.values import Values

_PORT = 6379
_START_SECONDS = 600  # until Ray is up on all machines


def script(
    recipe: Recipe, values: Values, slurm: SlurmValues, needed: Demand, overrides: Sequence[str]
) -> str:
    """The script; its first argument is the stage.

    Machines are those that training takes at most. Ray's head is on the first one, where this
    script runs as well: it hands Slurm's notice of the end to the driver, which saves.

    Raises:
        ValueError: places of the recipe aren't reached from all machines.
    """
    require_reachable(recipe, "/")
    group = needed.groups[0]
    start = [
        "ray", "symmetric-run", "--address", f'"$head:{_PORT}"',
        "--min-nodes", '"$SLURM_JOB_NUM_NODES"',
        f"--num-cpus={group.cpus}", f"--num-gpus={group.gpus}",
    ]  # fmt: skip
    arguments = shlex.join(
        part for override in overrides for part in ("--set", override)
    )  # of every stage
    driver = (
        f'RAY_ADDRESS="$head:{_PORT}" piflow "$stage" recipe.yaml --quiet {arguments}'.rstrip()
        + ' & echo $! > "$driver_file"; wait $!; code=$?; echo $code > "$driver_file.code"; '
        "exit $code"
    )
    step = ["srun", '--nodes="$SLURM_JOB_NUM_NODES"', "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    if slurm.container:
        mounts = ",".join([f"{place}:{place}" for place in slurm.mounts] + ["$PWD:$PWD"])
        step += [f"--container-image={_enroot(values.image)}", f'--container-mounts="{mounts}"']
        step += ['--container-workdir="$PWD"']
    lines = [
        "#!/bin/bash",
        *_directives(recipe, values, slurm, needed),
        "",
        "# Written by `piflow render`: change the recipe or the values, and render again.",
        "# sbatch piflow.sbatch embed; then distill; then evaluate. The folder must be shared.",
        "set -uo pipefail",
        *slurm.setup,
        'stage="${1:?which stage: embed, distill or evaluate}"',
        'head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        'export stage head driver_file="$PWD/.piflow-$SLURM_JOB_ID"',
        'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$driver_file.token"',
        '(umask 077; head -c 32 /dev/urandom | base64 | tr -d "\\n" > "$RAY_AUTH_TOKEN_PATH")',
        f"export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={_START_SECONDS}",
        *(f"export {key}={shlex.quote(value)}" for key, value in values.environment.items()),
        "",
        "notice=0",
        "pass_on() {  # the driver saves after the step and ends with 143",
        "  notice=1",
        '  test -s "$driver_file" && kill -TERM "$(cat "$driver_file")"',
        "}",
        "trap pass_on TERM",
        "",
        f"{' '.join(step)} \\",
        f"  {' '.join(start)} \\",
        f"  -- bash -c {shlex.quote(driver)} &",
        "step=$!",
        'while kill -0 "$step" 2> /dev/null; do wait "$step"; done',
        'code="$(cat "$driver_file.code" 2> /dev/null || echo 1)"',
        'rm -f "$driver_file" "$driver_file.code" "$driver_file.token"',
        'if test "$notice" = 1 && test "$code" = 143; then',
        '  scontrol requeue "$SLURM_JOB_ID"  # and goes on from the saved step',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _directives(recipe: Recipe, values: Values, slurm: SlurmValues, needed: Demand) -> list[str]:
    group, minutes = needed.groups[0], round(values.limits.hours * 60)
    options = {
        "job-name": run_name(recipe, values),
        "partition": slurm.partition,
        "account": slurm.account,
        "nodes": group.most,
        "ntasks-per-node": 1,
        "cpus-per-task": group.cpus,
        "mem": f"{group.memory_gib}G",
        "gpus-per-node": _gpus(group.gpus, slurm),
        "time": minutes,
        "signal": f"B:TERM@{values.saving_seconds + 60}",
        "requeue": "",
        "open-mode": "append",
        "exclusive": "" if group.gpus else None,
    }
    return [
        f"#SBATCH --{name}" + (f"={value}" if value != "" else "")
        for name, value in options.items()
        if value is not None
    ]


def _gpus(number: int, slurm: SlurmValues) -> str | None:
    if not number:
        return None
    return f"{slurm.gpu_type}:{number}" if slurm.gpu_type else str(number)


def _enroot(image: str) -> str:
    """An image as pyxis names it: ``registry#name@sha256:…``."""
    registry, separator, name = image.partition("/")
    return shlex.quote(f"{registry}#{name}" if separator and "." in registry else image)
