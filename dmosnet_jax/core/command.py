"""What the command lines share: failures in one line, signals, and readers that leave."""

import argparse
import sys
from collections.abc import Callable

from dmosnet_jax.core import signals, startup
from dmosnet_jax.core.errors import UserError, one_line, refusal

_INTERRUPTED = 130


def parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of a module's command line; `about` is its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def guarded(run: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """The exit status of a command; errors in its input, and an interrupt, are printed as one line.

    Args:
      run: the command; its status, None for 0.
      interrupted: what is printed on an interrupt that says nothing itself.
    """
    try:
        return run() or 0
    except (UserError, OSError) as error:
        failure = refusal(error) if isinstance(error, OSError) else error
        if failure is None:
            raise
        print(f"error: {one_line(failure)}", file=sys.stderr)
        return failure.exit_status
    except KeyboardInterrupt as error:
        print(str(error) or interrupted, file=sys.stderr)
        return _INTERRUPTED


def run_program(main: Callable[[], int], *, watch: bool = True) -> None:
    """Runs a command as the program.

    Args:
      main: gives the exit status.
      watch: for signals, where the command has no handlers of its own.
    """
    if watch:
        # Schedulers end jobs with SIGTERM; unwinding removes what is half-written.
        signals.install("interrupted")
    startup.outlast_readers()
    sys.exit(main())
