"""A run of dynamics on disk: a small state, and series that are only ever added to.

``run.npz`` holds positions, momenta and forces of the last saved step, and how far the series beside it
are valid: ``run.npz.energies`` (potential and kinetic energy of every step, eV) and ``run.npz.frames``
(kept positions, Å), rows of float64 and nothing else. Saving appends what is new to the series and then
replaces the state in one move, so that it costs the same at the end of a long run as at its start, and a
kill at any moment leaves a state whose series are whole: what stands behind the valid rows is cut off
before the next are written. Checksums in the state tell series that are damaged, or of another run.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FileFormatError

_STATE = ("positions", "momenta", "forces")
_NUMBER = np.dtype("<f8")


@dataclass
class State:
    """Where a run stands.

    Attributes:
        positions, momenta, forces: of the last good step.
        energies: ``(room, 2)``, potential and kinetic energy (eV) of each step, the start included.
        frames: ``(room, n, 3)``, positions of the start and every ``keep_every`` steps.
        keep_every: steps between them.
        step: the last good step, as far as ``energies`` and ``frames`` are filled.
        diverged: why the run cannot go on, or "".
    """

    positions: np.ndarray
    momenta: np.ndarray
    forces: np.ndarray
    energies: np.ndarray
    frames: np.ndarray
    keep_every: int
    step: int = 0
    diverged: str = ""

    @property
    def series(self) -> dict[str, np.ndarray]:
        """What is filled, by name."""
        return {
            "energies": self.energies[: self.step + 1],
            "frames": self.frames[: self.step // self.keep_every + 1],
        }


def room(steps: int, keep_every: int, atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Energies and frames of a run of so many steps, to be filled."""
    return np.empty((steps + 1, 2)), np.empty((steps // keep_every + 1, atoms, 3))


class Checkpoint:
    """The files of one run.

    Args:
        path: of the state; the series lie beside it.
        identity: what has to be the same for a run to be continued.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self._rows = {"energies": 0, "frames": 0}  # that the state on disk vouches for
        self._sums = {"energies": 0, "frames": 0}
        self._ours = False  # whether the files end where this object left them

    def read(self, steps: int, keep_every: int) -> State | None:
        """The state with room for a run of ``steps`` steps; None where nothing was saved.

        Raises:
            FileFormatError: if a file is damaged or of another run.
        """
        if not self.path.exists():
            return None
        try:
            content = self._content()
            step, diverged = int(content["step"]), str(content["diverged"])
            positions, momenta, forces = (content[name] for name in _STATE)
            self._sums = {name: int(content[f"{name}_sum"]) for name in self._sums}
            energies, frames = room(max(steps, step), keep_every, len(positions))
            state = State(positions, momenta, forces, energies, frames, keep_every, step, diverged)
            for name, rows in state.series.items():
                self._fill(name, rows)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, FileFormatError):
                raise
            raise self._damaged(self.path, str(error)) from error
        return state

    def write(self, state: State) -> None:
        """Save: first the series' new rows, then the state that counts them.

        Raises:
            FileFormatError: if another process has written to the series meanwhile.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        series = state.series
        for name, rows in series.items():
            self._append(name, rows)
        self._ours = True
        self._rows = {name: len(rows) for name, rows in series.items()}
        temporary = self.path.with_name(self.path.name + ".part")
        content = {name: getattr(state, name) for name in (*_STATE, "step", "diverged")}
        content |= {f"{name}_sum": value for name, value in self._sums.items()} | {"identity": self.identity}
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: np.asarray(value) for name, value in content.items()})
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _content(self) -> dict[str, np.ndarray]:
        stored = np.load(self.path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("one array alone")
        with stored:
            content = {name: stored[name] for name in stored.files}
        if str(content["identity"]) != self.identity:
            raise FileFormatError(
                "a checkpoint of another run: its structure, seed, settings or format differ",
                where=str(self.path),
                fix="delete it, or give another file",
            )
        return content

    def _file(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{name}")

    def _fill(self, name: str, rows: np.ndarray) -> None:
        """Read the valid part of a series into ``rows``."""
        file = self._file(name)
        found = np.fromfile(file, dtype=_NUMBER, count=rows.size)
        if len(found) < rows.size:
            raise self._damaged(file, f"{len(found)} numbers where {rows.size} were saved")
        if zlib.crc32(found.data) != self._sums[name]:
            raise self._damaged(file, "its checksum differs")
        rows[:] = found.reshape(rows.shape)
        self._rows[name] = len(rows)

    def _append(self, name: str, rows: np.ndarray) -> None:
        """Add the rows that the file lacks, after the valid ones."""
        file = self._file(name)
        begin = self._rows[name] * rows[:1].size * _NUMBER.itemsize
        new = np.ascontiguousarray(rows[self._rows[name] :], dtype=_NUMBER)
        with file.open("r+b" if file.exists() else "w+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size < begin or (self._ours and size > begin):
                raise FileFormatError(
                    "a series that something else has changed",
                    where=str(file),
                    fix="run each dynamics in one process at a time",
                )
            stream.truncate(begin)  # of what a killed process wrote, the state knows nothing
            stream.seek(begin)
            stream.write(new.data)
            stream.flush()
            os.fsync(stream.fileno())
        self._sums[name] = zlib.crc32(new.data, self._sums[name])

    def _damaged(self, file: Path, why: str) -> FileFormatError:
        return FileFormatError(
            f"a checkpoint that cannot be read: {why}", where=str(file), fix=f"delete {self.path}"
        )
