"""What the command lines of this package share: flags of their own, failures in one line, and signals."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from dmosnet_jax.core import signals, startup
from dmosnet_jax.core.errors import ConfigError, UserError, one_line, refusal

_INTERRUPTED = 130


def own_flags() -> flags.FlagValues:
    """Flags of one command, with help; importing its module must not add flags to the program that imports it."""
    own = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this help.", own, short_name="h")
    return own


def parse(own: flags.FlagValues, argv: Sequence[str], about: str | None) -> bool:
    """Sets a command's flags from `argv`, whatever they were set to before, or prints `about` and the flags.

    Returns:
      Whether help was asked for.

    Raises:
      ConfigError: an argument is not understood.
    """
    own.unparse_flags()
    for flag in own:
        own[flag].unparse()
    try:
        rest = own(list(argv))[1:]
    except flags.Error as error:
        raise ConfigError(f"{error}; see --help") from error
    if own["help"].value:
        print(f"{about}\nFlags:{own.get_help()}")
        return True
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: every option is given as --name=value")
    return False


def given(own: flags.FlagValues, names: Sequence[str]) -> dict[str, Any]:
    """Values of those of some flags that were given."""
    return {name: own[name].value for name in names if own[name].value is not None}


def guarded(run: Callable[[Sequence[str]], int], argv: Sequence[str], *, interrupted: str = "interrupted") -> int:
    """The exit status of a command; errors in its input, and an interrupt, are printed as one line."""
    try:
        return run(argv)
    except (UserError, OSError) as error:
        failure = refusal(error) if isinstance(error, OSError) else error
        if failure is None:
            raise
        print(f"error: {one_line(failure)}", file=sys.stderr)
        return failure.exit_status
    except KeyboardInterrupt as error:
        print(str(error) or interrupted, file=sys.stderr)
        return _INTERRUPTED


def start(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a command as the program."""
    # Schedulers end jobs with SIGTERM; unwinding removes what is half-written.
    signals.install("interrupted")
    startup.outlast_readers()
    sys.exit(main(sys.argv))
