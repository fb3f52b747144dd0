import errno

import pytest

from dmosnet_jax.core.errors import ConfigError, DataError, UserError, first, one_line, refusal


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


def test_one_line_is_printable_bounded_and_keeps_both_ends():
    text = one_line("a\nb\x1b[2J\u202e" + "x" * 100_000 + "the fix")
    assert text.isprintable()
    assert len(text) < 5_000
    assert text.startswith("a\\nb\\x1b[2J")
    assert text.endswith("the fix")
    assert one_line("\udcff.jpg") == "\\udcff.jpg"
    assert one_line("ü") == "ü"


def test_the_first_of_many():
    assert first(["a", "b"]) == "a; b"
    assert first(list("abc"), join=", ", most=2) == "a, b, and 1 more"
