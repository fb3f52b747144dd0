#!/usr/bin/env bash
# Several processes on this machine, connected over the loopback: to try a multi-host set-up before paying for one.
#   launch/local_processes.sh 2 --config=configs/spcl_market1501.py --workdir=runs/two --config.data_dir=data
set -euo pipefail
processes=$1
shift
python launch/check.py "$@"
port=${PORT:-29500}
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((id = 0; id < processes; id++)); do
  python -m dmosnet_jax.main --distributed --coordinator="127.0.0.1:$port" --num_processes="$processes" \
    --process_id="$id" "$@" &
  pids+=($!)
done
# All of them end with the same status.
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
trap - EXIT
exit "$status"
