#!/usr/bin/env bash
# One host without accelerators (Linux, glibc).
#   launch/cpu_host.sh --config=configs/quickstart.py --workdir=runs/quickstart
set -euo pipefail
# A training step takes gigabytes from malloc and gives them back; with huge pages it spends a third less CPU time, which
# went into page faults.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec python -m dmosnet_jax.main "$@"
