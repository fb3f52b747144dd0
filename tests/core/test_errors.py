import errno

import pytest

from dmosnet_jax.core.errors import ConfigError, DataError, UserError, refusal


def test_exit_statuses():
    assert (ConfigError.exit_status, DataError.exit_status) == (2, 1)
    assert issubclass(ConfigError, UserError)
    assert issubclass(DataError, UserError)


def test_what_a_system_refuses_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as info:
        (tmp_path / "file" / "below").mkdir()
    found = refusal(info.value)
    assert isinstance(found, DataError)
    assert str(found).startswith(f"{tmp_path / 'file' / 'below'}: Not a directory")
    assert refusal(OSError(errno.ENOSPC, "No space left on device", "/x")) is not None


def test_other_system_errors_are_defects():
    assert refusal(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")) is None
    assert refusal(OSError(errno.ENOSPC, "No space left on device")) is None
    assert refusal(OSError("odd")) is None
