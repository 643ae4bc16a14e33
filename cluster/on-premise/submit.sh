#!/bin/bash
# Written by `piflow render`: change the recipe or the values, and render again.
# Runs the recipe's stages as one job, attaches to it, or goes on; needs the tunnel that
# `ray dashboard cluster.yaml` opens. Takes the options of `piflow submit`, as --follow.
set -euo pipefail
export RAY_AUTH_MODE=token
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
exec piflow submit "$(dirname "$0")/recipe.yaml" "$@"
