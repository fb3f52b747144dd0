#!/usr/bin/env bash
# The same command on every worker of a Cloud TPU slice; JAX finds the workers by itself.
#   TPU=name ZONE=zone launch/tpu_pod.sh --config=configs/spcl_luperson.py --workdir=/mnt/runs/spcl
# The checkout must be at ~/dmosnet_jax on every worker, with `pip install -U "jax[tpu]" -e ~/dmosnet_jax` done once, by a
# Python of 3.11 or newer (PYTHON=...; the images of some slices have 3.10). The workdir must be in a folder that all
# workers share (a Filestore): local disks are not, and the run says so at its start.
set -euo pipefail
: "${TPU:?set TPU to the name of the TPU VM}" "${ZONE:?set ZONE to its zone}"
python=${PYTHON:-python3}
printf -v arguments '%q ' "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/dmosnet_jax && $python launch/check.py $arguments && $python -m dmosnet_jax.main --distributed $arguments"
