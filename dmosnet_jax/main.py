"""Command line: `python -m dmosnet_jax.main --config=configs/<file>.py[:arguments] --workdir=DIR [--config.field=...]`.

Exit status: 0 done, 1 bad data, 2 bad command or config, 143 stopped by a signal (during training with its state
saved), 130 interrupted elsewhere, 75 another process of the job was lost. All processes of a job end with the same.
"""

import importlib
import os
import pathlib
import sys
import types
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from dmosnet_jax.core import files, processes, signals, startup, supervisor
from dmosnet_jax.core.config import read, unknown_field, validate
from dmosnet_jax.core.errors import ConfigError, UserError, one_line, refusal

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: configs/<file>.py[:arguments].", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Where checkpoints, metrics and results go; default runs/<config>.")
_DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "Join the other processes of this job (jax.distributed).")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where the cluster does not tell.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, where the cluster does not tell.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, where the cluster does not tell.")
_JOIN_SECONDS = flags.DEFINE_integer("join_seconds", 300, "How long to wait for the other processes of the job.", 1)
_DRY_RUN = flags.DEFINE_boolean(
    "dry_run", False, "Print devices, settings, shapes, memory, disk, steps and time of a training run, and end."
)
_SAVE_SECONDS = flags.DEFINE_integer(
    "save_seconds", 100, "How long a process of a job that is told to stop may take to save its state and end.", 1
)

# Their workdir is read by every process, or written by all of them.
_SHARING = ("spcl", "spcl_uda", "supervised", "cfs")
_TRAINING = ("spcl", "spcl_uda", "supervised")

_INTERRUPTED = "interrupted; the same command goes on from the last checkpoint, if there is one"
# The folder `configs` lies beside this file where the package is installed, and beside the package in a checkout.
_HERE = pathlib.Path(__file__).resolve().parent
_PACKAGED = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


class _ConfigFile(config_flags.ConfigFileFlagParser):
    """Takes `configs/<file>.py` from the package where the current folder has no such file."""

    def parse(self, path: str) -> Any:
        file, *arguments = path.split(":", 1)
        found = _find(pathlib.Path(file))
        # What a config imports from `configs` is beside it, or else in the package; `sys.path` need not hold either.
        configs = types.ModuleType("configs")
        configs.__path__ = [str(found.parent), str(_PACKAGED)]
        sys.modules["configs"] = configs
        return super().parse(":".join([str(found), *arguments]))


flags.FLAGS["config"].parser = _ConfigFile("config", lock_config=True)


def _find(file: pathlib.Path) -> pathlib.Path:
    if file.is_file():
        return file.absolute()
    missing = f"--config={file}: no such file"
    if file.parent == pathlib.Path("configs"):
        packaged = _PACKAGED / file.name
        if packaged.is_file():
            return packaged
        missing += f", and no {packaged}"
    raise ConfigError(f"{missing}: give configs/<file>.py[:arguments]")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
        if not flags.FLAGS["config"].present:
            raise ConfigError("--config is not set: give --config=configs/<file>.py, e.g. configs/quickstart.py")
        # A file that could not be loaded says so only when it is read.
        read(_CONFIG.value, "recipe")
        if len(rest) > 1:
            raise ConfigError(f"argument {rest[1]!r} is not understood: flags start with --, e.g. --workdir=DIR")
    except ConfigError:
        raise
    except Exception as error:
        if unknown := _unknown_field(argv):
            raise ConfigError(unknown) from error
        # A config file is code of the user's, so anything may come out of it.
        lines = str(error.args[0] if error.args else error).strip().splitlines()
        raise ConfigError(
            f"bad command line: {' '.join(line.strip() for line in lines) or type(error).__name__}"
        ) from error
    return rest


def _unknown_field(argv: Sequence[str]) -> str | None:
    """What to say of the first `--config.FIELD` that the config does not have, None where it has all."""
    given = {name: value for name, _, value in (argument.partition("=") for argument in argv)}
    try:
        config = flags.FLAGS["config"].parser.parse(given["--config"])
    except Exception:
        return None
    fields = (name.removeprefix("--config.") for name in given if name.startswith("--config."))
    return next(filter(None, (unknown_field(config, field) for field in fields)), None)


def _workdir() -> pathlib.Path:
    config_file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    if files.is_remote(_WORKDIR.value):
        raise ConfigError(
            f"--workdir={_WORKDIR.value}: a run's workdir is a local or mounted folder, not a URL: give a path "
            "(--config.data_dir may be a URL)"
        )
    return pathlib.Path(files.tidy(_WORKDIR.value or os.path.join("runs", pathlib.Path(config_file).stem)))


def _run() -> None:
    config: Any = _CONFIG.value
    validate(config)
    workdir, options = _workdir(), {}
    if _DRY_RUN.value:
        if config.recipe not in _TRAINING:
            raise ConfigError(f"--dry_run describes a training run ({', '.join(_TRAINING)}), not {config.recipe}")
        options = {"dry": True}
    if _DISTRIBUTED.value:
        if _COORDINATOR.value and (_PROCESSES.value is None or _PROCESS.value is None):
            raise ConfigError("--coordinator needs --num_processes and --process_id too")
        signals.uninstall()
        supervisor.supervise(save_seconds=_SAVE_SECONDS.value)
        signals.install(_INTERRUPTED)
    # Only now: a wrong config must not wait for the devices.
    recipe = importlib.import_module(f"dmosnet_jax.recipes.{config.recipe}")
    if not _DISTRIBUTED.value:
        recipe.run(config, workdir, **options)
        return
    try:
        processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, seconds=_JOIN_SECONDS.value)
        if config.recipe in _SHARING:
            processes.check_shared(workdir)
        recipe.run(config, workdir, **options)
        processes.finish()
    except Exception as error:
        processes.end(error)
    except (KeyboardInterrupt, signals.StoppedExit) as stopped:
        # Where nothing is saved first: the training loop raises what all processes agreed on.
        status = 130 if isinstance(stopped, KeyboardInterrupt) else int(stopped.code or 0)
        processes.tell(f"{processes.here()} was stopped by a signal: {_INTERRUPTED}", status)
        raise


def main() -> None:
    """Parses the command line and runs the config's recipe."""
    logging.set_verbosity(logging.ERROR)
    # First: a thread that starts before it, as the watch of signals does, has a heap of its own, which others share.
    startup.keep_memory()
    startup.keep_programs()
    startup.outlast_readers()
    startup.quiet_callbacks()
    signals.install(_INTERRUPTED)
    try:
        app.run(lambda _: _run(), flags_parser=_parse)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, 130)
    except signals.StoppedExit as stopped:
        signals.leave(int(stopped.code or 0))
    except Exception as error:
        failure = refusal(error) if isinstance(error, OSError) else error
        if isinstance(failure, UserError):
            _fail(one_line(failure), failure.exit_status)
        # The device's memory too, whose error is a class of JAX, which may not be loaded yet.
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            reason = one_line(str(error).partition("\n")[0]) or "no more is to be had"
            _fail(f"out of memory ({reason}): lower batch_size, image_size or data.cache_mib", UserError.exit_status)
        raise


def _fail(text: str, status: int) -> None:
    """Ends with a line, the last one: what libraries print of their own end would bury it."""
    print(f"error: {text}", file=sys.stderr)
    signals.leave(status)


if __name__ == "__main__":
    main()
