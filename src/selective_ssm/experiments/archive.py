"""Runs that are not done, in one file, to go on elsewhere."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from selective_ssm.errors import FileProblem, UserError
from selective_ssm.experiments.grid import Cell
from selective_ssm.experiments.run import RESULT, STATE, steps_of
from selective_ssm.files import in_words, replacing

MAX_BYTES = 16 * 2**20


def pack(cells: Iterable[Cell], path: Path, root: Path) -> int:
    """Write what is known of cells that are not done: results of runs, and where the others stand.

    Args:
        cells: any cells; those that are done are left out.
        path: the archive, a tar.xz.
        root: the folder to which its names are relative.

    Returns:
        How many runs are in it.

    Raises:
        UserError: it would be larger than 16 MiB; nothing is written then.
    """
    files = [
        file
        for cell in cells
        if cell.wanted()
        for run in cell.runs()
        for file in (cell.folder / run.name / RESULT, cell.folder / run.name / STATE)
        if file.exists()
    ]
    with replacing(path) as temporary:
        with tarfile.open(temporary, "w:xz") as archive:
            for file in files:
                archive.add(file, file.relative_to(root).as_posix())
        size = temporary.stat().st_size
        if size > MAX_BYTES:
            raise UserError(
                f"the runs take {size:,} bytes, more than the {MAX_BYTES:,} of an archive: name fewer cells"
            )
    return len(files)


def unpack(path: Path, root: Path) -> int:
    """Put the runs of an archive into a folder, but for those that are there already, as far or further on.

    Returns:
        How many runs were put there.

    Raises:
        FileProblem: it is not such an archive.
    """
    count = 0
    with in_words("read", path):
        try:
            with tarfile.open(path, "r:xz") as archive:
                for member in archive.getmembers():
                    target = root / member.name
                    is_inside = target.resolve().is_relative_to(root.resolve())
                    if not (member.isfile() and is_inside and target.name in (RESULT, STATE)):
                        raise FileProblem(f"'{path}' is not an archive of runs: it holds '{member.name}'")
                    content = archive.extractfile(member)
                    assert content is not None
                    count += _put(content.read(), target)
        except (tarfile.TarError, EOFError) as error:
            raise FileProblem(f"'{path}' is not a whole archive of runs: {error}") from error
    return count


def _put(content: bytes, target: Path) -> bool:
    """Write a file of a run, unless what is there is as far or further on; whether it was written."""
    if target.with_name(RESULT).exists():
        return False
    if target.name == STATE and target.exists():
        with TemporaryDirectory() as folder:
            (Path(folder) / STATE).write_bytes(content)
            if steps_of(Path(folder)) <= steps_of(target.parent):
                return False
    with replacing(target) as temporary:
        temporary.write_bytes(content)
    return True
