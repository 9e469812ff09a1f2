#!/usr/bin/env bash
# Start a run on the GPUs of this machine, or on several machines when this is started on each of them:
#
#   scripts/launch.sh RECIPE [options of fire-llm run]
#   NODES=2 NODE_RANK=0 MAIN_ADDRESS=10.0.0.1 scripts/launch.sh RECIPE --output /shared/runs/one
#
# Environment: GPUS (of this machine; all), NODES (1), NODE_RANK (0), MAIN_ADDRESS, MAIN_PORT (29500),
# ACCELERATE_CONFIG (a file of recipes/accelerate; replicas without one).
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

gpus=${GPUS:-$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}
nodes=${NODES:-1}
processes=$((nodes * gpus))
options=(--num_processes "$processes" --num_machines "$nodes" --mixed_precision no --dynamo_backend no)

if [[ -n ${ACCELERATE_CONFIG:-} ]]; then
  options+=(--config_file "$ACCELERATE_CONFIG")
elif ((processes > 1)); then
  options+=(--multi_gpu)
fi
if ((nodes > 1)); then
  : "${MAIN_ADDRESS:?set it to the address of the first machine}"
  options+=(--machine_rank "${NODE_RANK:-0}")
  options+=(--main_process_ip "$MAIN_ADDRESS" --main_process_port "${MAIN_PORT:-29500}")
else
  options+=(--main_process_port 0)
fi

exec accelerate launch "${options[@]}" --module fire_llm run "$@"
