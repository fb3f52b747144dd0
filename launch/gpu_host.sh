#!/usr/bin/env bash
# One host with any number of GPUs: a single process drives all of them.
#   pip install -U "jax[cuda13]" && launch/gpu_host.sh --config=configs/spcl_luperson.py --workdir=runs/spcl
set -euo pipefail
# JAX takes three quarters of the GPU's memory at the start; the memory tables of LUPerson want more of it.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
exec python -m dmosnet_jax.main "$@"
