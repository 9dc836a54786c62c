"""The first episodes of a packed LeRobot file as a data set of their own; their video stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jepa_cache.sources.parsers.lerobot_layout import Layout, Place, list_columns
from jepa_cache.sources.parsers.untrusted import iter_rows


def copy_first_episodes(
    layout: Layout, camera: str, places: Sequence[Place], columns: Sequence[str], folder: Path
) -> Path:
    """Write info.json, the list and the rows of some episodes of one parquet file below an empty folder.

    Rows are read up to the last of these episodes. The video is linked, not copied: it is one file with all others.

    Args:
        layout: Of the data set, v3.0.
        camera: The video key.
        places: The episodes, of one file.
        columns: Of the rows that are wanted, with `episode_index`.
        folder: Receives the data set, under the name that begins its episodes' keys.

    Returns:
        The new data set's folder.

    Raises:
        ValueError: A file cannot be read.
    """
    name = layout.name
    root = folder / name if "/" not in name else folder / f"datasets--{name.replace('/', '--')}" / "snapshots" / "first"
    wanted = [place.index for place in places]
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_bytes((layout.root / "meta/info.json").read_bytes())
    listed = [
        {column: values[np.isin(batch["episode_index"][:, 0], wanted)] for column, values in batch.items()}
        for path in layout.lists()
        for batch in iter_rows(path, list_columns(camera))
    ]
    _write_rows(listed, root / "meta/episodes/chunk-000/file-000.parquet")
    rows, seen = [], set()
    for batch in iter_rows(places[0].data, columns):
        indices = batch["episode_index"][:, 0]
        rows.append({column: values[np.isin(indices, wanted)] for column, values in batch.items()})
        seen |= set(indices.astype(int).tolist()) & set(wanted)
        if len(seen) == len(wanted) and indices[-1] not in wanted:
            break
    _write_rows(rows, root / places[0].data.relative_to(layout.root))
    for video in {place.video for place in places}:
        link = root / video.relative_to(layout.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        if video.is_file():  # else its absence is told by the reader
            link.symlink_to(video.resolve())
    return root


def _write_rows(parts: Sequence[dict[str, np.ndarray]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True)
    columns = {}
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        flat = pa.array(values.reshape(-1))
        columns[name] = flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    pq.write_table(pa.table(columns), path)
