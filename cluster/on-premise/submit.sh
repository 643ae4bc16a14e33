#!/bin/bash
# Written by `piflow render`: change the recipe or the values, and render again.
# bash submit.sh embed; then distill; then evaluate. Prints the job's id.
set -euo pipefail
case "${1:-}" in
  embed) command='RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --no-wait -- piflow embed ~/recipe.yaml --quiet' ;;
  distill) command='RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --no-wait -- piflow distill ~/recipe.yaml --quiet' ;;
  evaluate) command='RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --no-wait -- piflow evaluate ~/recipe.yaml --quiet' ;;
  *) echo 'which stage: embed, distill, evaluate?' >&2; exit 2 ;;
esac
exec ray exec "$(dirname "$0")/cluster.yaml" "$command"
