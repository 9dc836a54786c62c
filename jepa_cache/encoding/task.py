"""What an encoding process does besides encoding, in the plain run as in a Dask worker.

It loads the encoder and checks that its weights are those that the stores are named by; it claims units one by one, and
finds stores that are whole or damaged.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_cache.config.schema import EncodeConfig
from jepa_cache.encoder import KINDS, weights_identity
from jepa_cache.encoding.groups import EncodingGroup, OpenedEncoder
from jepa_cache.files import Claim
from jepa_cache.sources import Unit
from jepa_cache.store.digests import DigestTable, look_at
from jepa_cache.store.layout import StoreDamagedError, StoreFile
from jepa_cache.store.root import CacheRoot

if TYPE_CHECKING:
    from jepa_cache.encoder.frozen import FrozenEncoder

LIBRARIES = ("torch", "numpy", "zarr", "av", "decord")  # decord is not to be had for every machine
POLL_S = 1.0


def resolve_device(wanted: str) -> str:
    """The device that `encode.device` means on this machine, see `devices.resolve_device`."""
    from jepa_cache import devices

    return devices.resolve_device("encode.device", wanted)


def load_encoder(opened: OpenedEncoder, encode: EncodeConfig, num_threads: int, *, with_gpu: int = 1) -> FrozenEncoder:
    """Build the encoder as the settings use it; `num_threads` becomes the number of torch threads of this process, with a GPU `with_gpu`.

    There each decoding thread would have so many of its own, for work that one does as quickly.

    Raises:
        ValueError: The weights that were loaded are others than those that `opened` was made from, maybe hours ago.

    Cost: hashes the files once, right after they were read.
    """
    import torch

    from jepa_cache.devices import warn_of_bfloat16
    from jepa_cache.encoder.frozen import FrozenEncoder, load_module

    preset, weights, identity = opened
    device = resolve_device(encode.device)
    warn_of_bfloat16("encode.compute_dtype", encode.compute_dtype, device)
    torch.set_num_threads(num_threads if device == "cpu" else with_gpu)
    files = [] if weights is None else [weights, *KINDS[preset.kind].files(weights)]
    before = [look_at(file) for file in files]
    module = load_module(preset, weights)
    found = weights_identity(preset, weights, digest=DigestTable().digest_anew)
    if found != identity or [look_at(file) for file in files] != before:
        raise ValueError(
            f"the weights {weights or preset.name} are not those that the stores are named by: {found} now, {identity} then. They were "
            "replaced meanwhile, or are others on this machine. Nothing was encoded; the same command takes those that are there now"
        )
    return FrozenEncoder(
        preset,
        module,
        device=device,
        compute_dtype=encode.compute_dtype,
        single_frame=encode.single_frame,
        pool=encode.pool,
        compiled=encode.compile,
    )


def describe_machine(encoder: FrozenEncoder, encode: EncodeConfig, num_threads: int) -> dict[str, object]:
    """What is recorded of the making of a store, outside its digest; `fill_batches` where it is on."""
    import torch

    return {
        "batch_size": encode.batch_size,
        **({"fill_batches": True} if encode.fill_batches else {}),
        "device": "cpu" if encoder.device.type == "cpu" else torch.cuda.get_device_name(encoder.device),
        "num_threads": num_threads if encoder.device.type == "cpu" else 1,
        "versions": {name: version(name) for name in LIBRARIES if find_spec(name)}
        | {"python": platform.python_version()},
    }


class Claims:
    """The units of a group that this process has taken, each until its store is there.

    The lock of a process that dies is let go by the kernel, so its units can be taken at once; what it had not
    published is lost, at most one unit.
    """

    def __init__(self, root: CacheRoot, group: EncodingGroup) -> None:
        self.busy: list[Unit] = []  # another encoder held them when it was their turn
        self.num_taken = 0
        self._root, self._group = root, group
        self._held: dict[Path, Claim] = {}

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: Any) -> None:
        with ExitStack() as stack:  # all of them, also when the file of one cannot be removed
            for claim in self._held.values():
                stack.callback(claim.release)
        self._held.clear()

    def take(self) -> Iterator[Unit]:
        """Claim one unit after the other, without those that others hold or have finished meanwhile.

        A store that is there but not whole is removed, by name, once its unit is ours.
        """
        for unit in self._group.units:
            for store in [store for store in self._held if store.is_dir()]:  # published meanwhile
                self._held.pop(store).release()
            store = self._group.tokens(self._root, unit)
            if read_whole(self._root, store) is not None:  # its maker may be holding the claim still
                continue
            if (claim := self._root.claim(store)) is None:
                self.busy.append(unit)
                continue
            self._held[store] = claim
            if remove_damaged(self._root, store, "encoding") is None:
                self.num_taken += 1
                yield unit


def read_whole(root: CacheRoot, store: Path) -> StoreFile | None:
    """What store.json of a store says whose files all have their sizes; else None. Cost: one stat per file."""
    try:
        return root.find_store(store)
    except StoreDamagedError:
        return None


def remove_damaged(root: CacheRoot, store: Path, what: str) -> StoreFile | None:
    """As `read_whole`, but a damaged store is named and removed. Only for who has claimed it."""
    try:
        return root.find_store(store)
    except StoreDamagedError as error:
        print(f"damaged, {what} it again: {error}")
        root.remove(store)
        return None


def wait_for_others(root: CacheRoot, groups: Sequence[EncodingGroup], on_wait: Callable[[str], object]) -> None:
    """Wait until a store that others are making is there or its maker is gone; tells the first unit each second."""
    stores = [group.tokens(root, unit) for group in groups for unit in group.units]
    while all(root.is_claimed(store) and read_whole(root, store) is None for store in stores):
        on_wait(groups[0].units[0].name)
        time.sleep(POLL_S)
