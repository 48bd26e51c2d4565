"""Where gin files are found: beside the caller, in the search paths, and among the files that the
project ships.
"""

import difflib
import errno
import io
import os
import pathlib
from collections.abc import Iterable, Sequence

import upcycle_jax

GIN_FOLDER = "gin_configs"


def shipped_folder() -> pathlib.Path:
    """The folder of the shipped gin files: inside the package in an installed wheel, beside it in a
    checkout.

    Raises:
      FileNotFoundError: neither exists, so the installation is broken.
    """
    package = pathlib.Path(upcycle_jax.__file__).resolve().parent
    for folder in (package / GIN_FOLDER, package.parent / GIN_FOLDER):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no {GIN_FOLDER} folder in or beside {package}: the installation is incomplete; install"
        " upcycle_jax again"
    )


def shipped_files() -> list[str]:
    """Names of all shipped gin files, relative to `shipped_folder()`, sorted."""
    folder = shipped_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gin"))


def _is_remote(name: str) -> bool:
    return "://" in name


def _candidates(name: str, search_paths: Sequence[str], beside: str | None) -> Iterable[str]:
    """Every place where `name` may be, best first."""
    yield name
    if _is_remote(name) or pathlib.PurePath(name).is_absolute():
        return
    for folder in search_paths:
        yield f"{str(folder).rstrip('/')}/{name}"
    shipped = shipped_folder()
    yield str(shipped / name)
    parts = pathlib.PurePosixPath(name).parts
    if (
        GIN_FOLDER in parts
        # `gin_configs/models/x.gin` and `some/where/gin_configs/models/x.gin` both mean the shipped
        # `models/x.gin`
    ):
        yield str(shipped.joinpath(*parts[parts.index(GIN_FOLDER) + 1 :]))
    if beside:
        yield f"{beside.rpartition('/')[0] or '.'}/{name}"


def exists(path: str) -> bool:
    """Whether a local or remote file is there."""
    if _is_remote(path):
        from etils import epath

        return epath.Path(path).is_file()
    try:
        return pathlib.Path(path).is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def read(path: str) -> str:
    """The text of a local or remote file, without the byte order mark that some editors put first.

    Raises:
      ValueError: it is not UTF-8.
    """
    if _is_remote(path):
        from etils import epath

        data = epath.Path(path).read_bytes()
    else:
        data = pathlib.Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): save it"
            " as UTF-8, or give a gin file"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} holds null bytes: it is no gin file")
    return io.StringIO(text, newline=None).read()


def find(name: str, search_paths: Sequence[str] = (), *, beside: str | None = None) -> str:
    """The path of a gin file.

    Looked for in this order: as given (so relative to the working directory), in each search path,
    among the shipped files (with or without the leading `gin_configs/`), and in the folder of the
    including file.

    Args:
      name: a path, absolute, relative or remote (`gs://...`).
      search_paths: folders to look in.
      beside: path of the file that includes this one.

    Raises:
      FileNotFoundError: nowhere; the message names the places and the nearest shipped file.
      ValueError: it is a folder.
    """
    tried = list(dict.fromkeys(_candidates(str(name), search_paths, beside)))
    for path in tried:
        if exists(path):
            return path
    if not _is_remote(str(name)) and os.path.isdir(name):
        raise ValueError(
            f"gin file {str(name)!r} is a folder: name a file in it, or give the folder to"
            " --gin_search_paths"
        )
    shipped = shipped_files()
    near = [
        file
        for file in shipped
        if pathlib.PurePosixPath(file).name == pathlib.PurePosixPath(name).name
    ]
    near = near or difflib.get_close_matches(
        str(name).removeprefix(f"{GIN_FOLDER}/"), shipped, n=3, cutoff=0.5
    )
    hint = f" Did you mean {' or '.join(repr(file) for file in near)}?" if near else ""
    raise FileNotFoundError(
        f"gin file {str(name)!r} is in none of {tried}.{hint} --gin_search_paths adds folders to"
        " look in."
    )
