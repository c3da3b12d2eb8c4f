"""Which files of a source are no longer what they were: damage that decodes shows only against a record."""

from __future__ import annotations

import hashlib
from pathlib import Path

from multistage_diffusion.data.cache import cache_directory
from multistage_diffusion.data.collection import Collection
from multistage_diffusion.data.layout import shown
from multistage_diffusion.files import write_atomic

_SHOWN = 5  # names in a message


def changes_since(place: str, collection: Collection) -> str | None:
    """Compare a source's files with the record that `remember` made.

    Args:
        place: Where the source is, however the user wrote it.
        collection: What was read.

    Returns:
        What changed, by name; none if nothing did, or there is no record.
    """
    path = _record(place)
    if not collection.files or not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    before = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    now = {shown(name): digest for name, digest in collection.files.items()}
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    told = [
        _list(what, names)
        for what, names in (
            ("changed", changed),
            ("gone", sorted(before.keys() - now.keys())),
            ("new", sorted(now.keys() - before.keys())),
        )
        if names
    ]
    return f"{', '.join(told)} since it was looked at" if told else None


def remember(place: str, collection: Collection) -> None:
    """Record the files of a source, in the form of `sha256sum`, in the cache.

    Args:
        place: Where the source is, however the user wrote it.
        collection: What was read.

    Raises:
        CheckpointError: The cache cannot be written.
    """
    if collection.files:
        lines = [f"{digest}  {shown(name)}\n" for name, digest in collection.files.items()]
        write_atomic(_record(place), "".join(lines).encode("utf-8"))


def _record(place: str) -> Path:
    name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_directory() / "files" / f"{name}.sha256"


def _list(what: str, names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"
