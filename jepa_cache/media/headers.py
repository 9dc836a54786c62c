"""How long the videos of a tar shard are, from the tar's headers and each video's own header; no video is read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jepa_cache.media.probe import DecodeError, VideoInfo, header_counts, probe_video
from jepa_cache.media.tar import list_samples

VIDEO_SUFFIXES = ("mp4", "mkv", "webm", "mov", "avi")
RECORD_SUFFIXES = ("jsonl", "json")
BUFFER_BYTES = 64 << 10


class TarVideo(NamedTuple):
    """One recording of a tar shard: its video's header, or None and why it cannot be used."""

    key: str
    info: VideoInfo | None
    problem: str


def iter_tar_videos(path: Path) -> Iterator[TarVideo]:
    """Yield every recording of a tar shard, by its header.

    Cost: the tar's headers, and some 70 kB and a few milliseconds a video.
    """
    for sample in list_samples(path, (*VIDEO_SUFFIXES, *RECORD_SUFFIXES)):
        videos = [place for suffix, place in sample.places.items() if suffix in VIDEO_SUFFIXES]
        if sample.problem is not None or not videos or not set(RECORD_SUFFIXES) & sample.places.keys():
            yield TarVideo(sample.key, None, sample.problem or "video or records are missing")
            continue
        try:
            with header_counts(), FilePart(path, *videos[0]) as part:
                yield TarVideo(sample.key, probe_video(io.BufferedReader(part, BUFFER_BYTES)), "")
        except DecodeError as error:
            yield TarVideo(sample.key, None, str(error))


class FilePart(io.RawIOBase):
    """A run of bytes of a file, as a file of its own: what lies in a tar is read where it lies.

    Attributes:
        num_read: Bytes read so far.
    """

    def __init__(self, path: Path, offset: int, num_bytes: int) -> None:
        """Open the file."""
        self._file = path.open("rb", buffering=0)
        self._offset, self._num_bytes, self._position = offset, num_bytes, 0
        self.num_read = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position counted from the part's start, the present one, or the part's end."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, origin + position)
        return self._position

    def tell(self) -> int:
        """The position in the part."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill as much of the buffer as one read gives."""
        wanted = min(len(buffer), self._num_bytes - self._position)
        if wanted <= 0:
            return 0
        self._file.seek(self._offset + self._position)
        got = self._file.readinto(memoryview(buffer)[:wanted])
        self._position += got
        self.num_read += got
        return got

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
