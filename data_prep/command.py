"""What the command lines of this package share: flags of their own, and their arguments as a list."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from dmosnet_jax.core import command
from dmosnet_jax.core.errors import ConfigError


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


def start(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a command as the program."""
    command.run_program(lambda: main(sys.argv))
