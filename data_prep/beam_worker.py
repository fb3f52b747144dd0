"""A worker process of the local Beam pipeline: `python beam_worker.py FOLDER`; leaves its process id in the folder.

It ends with the process that started it, however that ends, and at once on SIGTERM.
"""

import ctypes
import os
import pathlib
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs Beam's own worker."""
    root = pathlib.Path(__file__).resolve().parent.parent
    # Run by its path, so that it is found wherever it is started; its folder is no place to import from.
    sys.path[0] = str(root)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # Ctrl-C goes to all processes of a terminal; what becomes of workers is for the first one to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv[:1])


if __name__ == "__main__":
    main()
