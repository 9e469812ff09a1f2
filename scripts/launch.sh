#!/usr/bin/env bash
# Start a run on all of this machine, or on several machines when this is started on each of them:
#
#   scripts/launch.sh RECIPE [options of fire-llm run]
#   NODES=2 NODE_RANK=0 MAIN_ADDRESS=10.0.0.1 scripts/launch.sh RECIPE --output /shared/runs/one
#
# Environment: PROCESSES (of this machine, the same on each; one a GPU, one where there is none; GPUS means the same),
# NODES (1), NODE_RANK (0), MAIN_ADDRESS, MAIN_PORT (29500),
# ACCELERATE_CONFIG (a name or a file of recipes/accelerate; replicas without one).
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

processes=${PROCESSES:-${GPUS:-$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}}
nodes=${NODES:-1}
options=(--num-processes $((nodes * processes)))

if [[ -n ${ACCELERATE_CONFIG:-} ]]; then
  options+=(--accelerate-config "$ACCELERATE_CONFIG")
fi
if ((nodes > 1)); then
  : "${MAIN_ADDRESS:?set it to the address of the first machine}"
  options+=(--num-machines "$nodes" --machine-rank "${NODE_RANK:-0}")
  options+=(--main-address "$MAIN_ADDRESS:${MAIN_PORT:-29500}")
fi

exec fire-llm run "$@" "${options[@]}"
