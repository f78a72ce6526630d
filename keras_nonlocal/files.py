"""Files on local disks that appear under their names only when they are complete."""

import contextlib
import os
import uuid


@contextlib.contextmanager
def whole_file(path):
    """A name beside `path`, of the same extension, that becomes `path` once the block has written it.

    Readers see whole files only. Where the block fails nothing is left, and what was at `path` stays.

    Args:
        path: String or path-like.

    Returns:
        A context manager that gives the name, a string.
    """
    folder, name = os.path.split(os.fspath(path))
    scratch = os.path.join(folder, f".{uuid.uuid4().hex}.{name}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def write_text(path, text):
    """Writes a whole text file in UTF-8.

    Args:
        path: String or path-like.
        text: String.
    """
    with whole_file(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
