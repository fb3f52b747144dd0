"""Sees, before a job starts, that every host can run it. Old Pythons read this file too.

`python launch/check.py ARGUMENTS...` looks at the Python, at the packages, and whether --workdir=DIR can be written.
With `--mark` it also leaves an empty file beside the workdir, and prints its name. `--seen=FILE` alone looks at the
Python, at the packages, and whether this host sees that file.
"""

import importlib.util
import os
import socket
import sys
import tempfile
import time

OLDEST = (3, 11)
# Network file systems keep what they know of a folder for some seconds.
SECONDS = 15


def value(arguments, name):
    """The last value of a flag, or None."""
    found = [a.split("=", 1)[1] for a in arguments if a.startswith(f"--{name}=")]
    return found[-1] if found else None


def problem(arguments):
    """What is wrong with this host, or None; prints the mark that was asked for."""
    if sys.version_info < OLDEST:
        version, oldest = (".".join(map(str, parts)) for parts in (sys.version_info[:2], OLDEST))
        return f"{sys.executable} is Python {version}, and {oldest} or newer is needed"
    for package in ("jax", "dmosnet_jax"):
        if importlib.util.find_spec(package) is None:
            return f"{sys.executable} has no package {package}: pip install it on every host"
    seen = value(arguments, "seen")
    if seen is not None:
        until = time.time() + SECONDS
        while os.path.basename(seen) not in os.listdir(os.path.dirname(seen)):
            if time.time() > until:
                return f"{seen} is not seen here: the workdir must be in a folder that all hosts share"
            time.sleep(0.5)
        return None
    workdir = value(arguments, "workdir")
    if workdir is None:
        return "--workdir=DIR is not given: name one in a folder that all hosts share"
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(workdir)))
    os.makedirs(folder, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".check-", dir=folder)
    os.close(handle)
    if "--mark" in arguments:
        print(name)
    else:
        os.unlink(name)
    return None


def main():
    """Prints one line and ends with 2 where something is wrong."""
    try:
        found = problem(sys.argv[1:])
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
    if found:
        sys.stderr.write(f"error: {socket.gethostname()}: {found}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
