"""Numeric columns from HDF5 files of strangers: nothing outside the file is followed, and sizes are checked before reading."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

MAX_ROWS = 1_000_000  # 18 hours at 15 Hz
# One chunk is decompressed as a whole, however few rows the array has.
MAX_CHUNK_BYTES = 64 << 20
NUMERIC_KINDS = "fiub"


class Hdf5Error(ValueError):
    """An HDF5 file, or an array in it, that cannot be used; the message names both."""


class Hdf5File:
    """An HDF5 file opened for reading; a context manager. Follows hard links only, and returns copies."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            Hdf5Error: It is missing or no HDF5 file.
        """
        import h5py

        self._name = path.name
        # Walked already: opening a group takes longer than reading an episode's column.
        self._groups: dict[str, object] = {}
        try:
            # Without locks: data folders are often mounted read-only, where HDF5's locks fail.
            self._file = h5py.File(path, "r", locking=False)
        except Exception as error:
            raise Hdf5Error(f"{path.name} cannot be opened as HDF5: {error}") from error

    def __enter__(self) -> Hdf5File:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._groups.clear()
        self._file.close()

    def read(self, name: str, width: int) -> np.ndarray | None:
        """Read one array.

        Args:
            name: Its path in the file.
            width: C, its columns; an array of shape [M] has one.

        Returns:
            [M, C] float64, or None where the file has nothing of this name.

        Raises:
            Hdf5Error: A link on the way leads elsewhere, the data lie outside the file, or type, shape or size are wrong.
        """
        import h5py

        try:
            dataset = self._find(name)
            if dataset is None:
                return None
            if not isinstance(dataset, h5py.Dataset):
                raise Hdf5Error(f"{name} in {self._name} is no array")
            self._check(dataset, name, width)
            return np.asarray(dataset[...], np.float64).reshape(len(dataset), width)
        except Hdf5Error:
            raise
        except Exception as error:  # h5py raises OSError, KeyError, RuntimeError and others for damaged files.
            raise Hdf5Error(f"{name} in {self._name} cannot be read: {error}") from error

    def _find(self, name: str):
        """Walk to an object by hard links. Looking a path up at once would open the file that an external link names."""
        import h5py

        above, _, last = name.rpartition("/")
        if above and above not in self._groups:
            self._groups[above] = self._find(above)
        node = self._groups[above] if above else self._file
        if not isinstance(node, h5py.Group) or not node.id.links.exists(last.encode()):
            return None
        if node.id.links.get_info(last.encode()).type != h5py.h5l.TYPE_HARD:
            raise Hdf5Error(
                f"{name} in {self._name} is a soft or external link, which is not followed: it may lead to other files. "
                "Store the array itself (h5repack does not; copy it with h5py)"
            )
        return node[last]

    def _check(self, dataset, name: str, width: int) -> None:
        if dataset.is_virtual or dataset.external:
            raise Hdf5Error(f"the data of {name} lie outside {self._name}; only data within the file are read")
        if dataset.dtype.kind not in NUMERIC_KINDS:
            raise Hdf5Error(f"{name} in {self._name} must be numeric; got {dataset.dtype}")
        shapes = [(width,)] if width > 1 else [(), (1,)]
        if dataset.ndim < 1 or dataset.shape[1:] not in shapes:
            raise Hdf5Error(f"{name} in {self._name} must be [M, {width}]; got {dataset.shape}")
        if len(dataset) > MAX_ROWS:
            raise Hdf5Error(f"{name} in {self._name} states {len(dataset)} rows; at most {MAX_ROWS} are read")
        chunk_bytes = int(np.prod(dataset.chunks or (), dtype=np.float64)) * dataset.dtype.itemsize
        if chunk_bytes > MAX_CHUNK_BYTES:
            raise Hdf5Error(
                f"a chunk of {name} in {self._name} has {chunk_bytes} bytes; at most {MAX_CHUNK_BYTES} are read"
            )
