"""Data sets of the Hugging Face hub, fetched into its local cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PREFIX = "hub:"
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def fetch_dataset(text: str, patterns: Sequence[str]) -> Path:
    """Fetch the files of `hub:owner/name` or `hub:owner/name@revision` that match `patterns`.

    Returns:
        The folder of the snapshot in the hub's cache; what is there already is not fetched again.

    Raises:
        ValueError: No such form, or the data set cannot be fetched; the message says how to fetch it elsewhere.
    """
    from huggingface_hub import snapshot_download

    match = HUB_ID.fullmatch(text.removeprefix(PREFIX))
    if match is None:
        raise ValueError(f"{text!r} names no data set of the hub; write hub:owner/name or hub:owner/name@revision")
    try:
        folder = snapshot_download(
            match["id"], repo_type="dataset", revision=match["revision"], allow_patterns=list(patterns)
        )
    except Exception as error:  # Network, authorisation and cache errors share no base class.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"the data set {match['id']} cannot be fetched from the hub ({type(error).__name__}: {reason[:200]}). Is there a "
            "network, and does the data set need `hf auth login`? On a machine that reaches the hub: hf download "
            f"--repo-type dataset {match['id']} --local-dir DIR; then give that folder as the input"
        ) from error
    return Path(folder)
