"""One round over the stores of a manifest, which goes on where an interrupted one was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple, Protocol

from jepa_cache.config.machine import state_folder
from jepa_cache.store.audit import Audit, Finding, Scope, check_listed, sign
from jepa_cache.store.damage import StoreDamagedError
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.verify import read_store_file


class Bar(Protocol):
    """What shows how far a round is; a tqdm bar."""

    total: float | None

    def update(self, n: float) -> object:
        """So much more is through."""
        ...


class Round(NamedTuple):
    """What a round found.

    Attributes:
        findings: What is not as the manifest says.
        num_checked: Units that were read now.
        num_skipped: Units that an earlier, unfinished round had read, untouched since.
        num_bytes: That were read now.
    """

    findings: list[Finding]
    num_checked: int
    num_skipped: int
    num_bytes: int


def audit_manifest(manifest: Manifest, root: CacheRoot, scope: Scope, bar: Bar, *, fresh: bool = False) -> Round:
    """Check everything that a manifest lists.

    What was found whole is remembered until a round over everything ends without findings, so that an interrupted round goes on,
    and a round after a repair reads what was repaired. Rounds over a share are not remembered.

    Args:
        manifest: What to check.
        root: Cache root.
        scope: How much is read.
        bar: Shows bytes.
        fresh: Forget an earlier round.

    Raises:
        ValueError: When another version of the program wrote a store.
    """
    progress = _Progress(manifest, root, scope)
    if fresh:
        progress.clear()
    entries = [(part, entry, sign(root, part, entry)) for part, entry in manifest.stores]
    todo = [(part, entry) for part, entry, signature in entries if not progress.has(part, entry, signature)]
    bar.total = sum(_count_bytes(root, part, entry) for part, entry in todo) * scope.share * (1 + scope.read_data)
    num_bytes, findings = 0, check_listed(manifest, root)

    def through(count: int) -> None:
        nonlocal num_bytes
        num_bytes += count
        bar.update(count)

    with Audit(root, scope, through) as audit:
        for part, entry in todo:
            found = audit.check(part, entry)
            findings += found
            if not found:
                progress.add(part, entry, sign(root, part, entry))
    if not findings:
        progress.clear()
    return Round(findings, len(todo), len(entries) - len(todo), num_bytes)


def _count_bytes(root: CacheRoot, part: ManifestPart, entry: ManifestEntry) -> int:
    try:
        return read_store_file(root.tokens(part.fingerprint, entry.unit_digest)).num_bytes
    except (StoreDamagedError, ValueError):
        return 0


class _Progress:
    """The units that were found whole, with what their files looked like then; one line each, in the state folder."""

    def __init__(self, manifest: Manifest, root: CacheRoot, scope: Scope) -> None:
        name = hashlib.sha256(f"{manifest.digest} {root.name} {scope.read_data}".encode()).hexdigest()[:32]
        self._path: Path | None = state_folder() / "verify" / f"{name}.jsonl" if scope.share >= 1 else None
        self._known: dict[str, str] = {}
        if self._path is not None and self._path.is_file():
            for line in self._path.read_text().splitlines():
                try:
                    key, signature = json.loads(line)
                except ValueError:
                    continue  # the last line of a round that was killed
                self._known[key] = signature

    def has(self, part: ManifestPart, entry: ManifestEntry, signature: str) -> bool:
        return self._known.get(f"{part.fingerprint}/{entry.unit_digest}") == signature

    def add(self, part: ManifestPart, entry: ManifestEntry, signature: str) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps([f"{part.fingerprint}/{entry.unit_digest}", signature]) + "\n")

    def clear(self) -> None:
        self._known.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
