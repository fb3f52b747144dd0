"""JSON objects from files that may be damaged, or of strangers."""

import json
from typing import Any

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError, printable
from dmosnet_jax.core.files import Path

# The longest of ours, the checksums of a checkpoint, has some kilobytes.
MAX_BYTES = 2**26


def read_object(path: Path, *, fix: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
      path: the file, or its URL.
      fix: what the user is to do about a damaged file, for the message.

    Raises:
      FileNotFoundError: there is no such file.
      DataError: it cannot be read, is damaged, or holds something else.
    """
    try:
        if files.size(path) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        value = json.loads(files.read(path).decode())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): {fix}") from error
    # Values may be nested deeper than Python recurses.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is damaged, or of another kind ({printable(error)}): {fix}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is damaged, or of another kind (it holds no JSON object): {fix}")
    return value
