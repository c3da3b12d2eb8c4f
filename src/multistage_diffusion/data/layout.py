"""What the names of a collection's files say: which part a picture belongs to, and which class."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from multistage_diffusion.data.decode import PictureError
from multistage_diffusion.errors import DataError

LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")  # of tables and of the .json of a tar
JSON, CSV, CELEBA = "dataset.json", "metadata.csv", "list_attr_celeba.txt"
MEND = "--labels none reads no labels (msd train: --data.labels none)"
_TRAIN = re.compile(r"tr", re.IGNORECASE)  # where a name is that of a part
_SHORT = re.compile(r"trn?|te|tst", re.IGNORECASE)  # parts where all folders are, and else languages
_TRAIN_WORDS, _TEST_WORDS = {"train", "training"}, {"test", "testing", "val", "valid", "validation", "dev", "eval"}
_PICTURES = {"images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "pictures", "photos", "rgb"}
_MARKS = {"masks", "mask", "labels", "annotations", "annotation", "segmentation", "segmentations", "segmentationclass"}
_MARKS |= {"segmentationobject", "gt", "gtfine", "groundtruth", "ground_truth", "depth", "instances", "trimaps"}
_PART = re.compile(
    r"(train(ing)?|trn?|test(ing)?|te|tst|val(id(ation)?)?|dev|eval(uation)?|holdout)"
    r"([-_ ]?(set|data|images|split))?[-_ ]?\d*",
    re.IGNORECASE,
)
MAX_CLASSES = 1_000_000
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Entry:
    """One picture of a collection.

    Attributes:
        name: Its path within the collection, with `/` between the parts.
        read: Gives the content of the file; raises `PictureError`.
        label: Name of its class, where the collection says it.
        test: Whether it is held out, where the collection says it.
        archive: The one of several archives that it lies in.
    """

    name: str
    read: Callable[[], bytes]
    label: str | None = None
    test: bool | None = None
    archive: str = ""

    @property
    def place(self) -> str:
        """Its name where several archives may have the same one."""
        return f"{self.archive}/{self.name}" if self.archive else self.name


def arrange(
    source: str,
    entries: Sequence[Entry],
    files: Mapping[str, Callable[[], bytes]],
    links: Sequence[str] = (),
    *,
    labels: str = "auto",
) -> tuple[list[Entry], dict[str, str]]:
    """Parts and labels of pictures in folders, below the folder that holds them all.

    Parts are folders named like `train`, `val2017` or `test_set`, outermost or inside the folders of classes. Labels
    come from `dataset.json`, else from `metadata.csv`, else from the names of the outermost folders that are no parts.

    Args:
        source: The source, for messages.
        entries: The pictures.
        files: What reads the other files that may hold labels, by name.
        links: Links to folders, which are not followed.
        labels: `none` looks for no labels.

    Returns:
        The pictures with part and label, where there is one; and notes on how both were found.

    Raises:
        DataError: Parts beside pictures that are in none, a file of labels that makes no sense, or a class behind a
            link.
    """
    names = [PurePosixPath(entry.name).parts for entry in entries]
    top = _around_all(names)
    depth = next((depth for depth in (top, top + 1) if _all_parts(names, depth)), None)
    notes = dict[str, str]()
    if depth is not None:
        folders = {name[depth]: _TRAIN.match(name[depth]) is None for name in names}
        held_out = sorted(folder for folder, test in folders.items() if test)
        if held_out and len(held_out) < len(folders):
            entries = [replace(entry, test=folders[name[depth]]) for entry, name in zip(entries, names, strict=True)]
            notes["split"] = f"held out: the folder{'s' * (len(held_out) > 1)} {', '.join(held_out)}"
    else:
        _refuse_mixture(source, names, top)
    if labels == "none":
        return list(entries), notes
    below = "/".join(names[0][:top]) + "/" * (top > 0) if names else ""
    for file, reader in ((JSON, _json_labels), (CSV, _csv_labels)):
        paths = sorted(name for name in files if PurePosixPath(name).name == file)
        paths = [name for name in paths if name in (file, below + file)] if file == JSON else paths
        if paths:
            return _from_files(source, entries, {path: files[path] for path in paths}, reader, notes)
    classes = [next((f for d, f in enumerate(name[top:-1], top) if d != depth), None) for name in names]
    different = sorted({name for name in classes if name is not None})
    if len(different) < 2:
        attributes = f"; {CELEBA} holds attributes, not one class" if any(CELEBA in name for name in files) else ""
        where = f"in one folder of a class, {different[0]}" if different else "in no folders of classes"
        return list(entries), {**notes, "labels": f"none: the pictures lie {where}{attributes}"}
    _refuse_marks(source, different)
    if links:
        raise DataError(
            f"{source}: {shown(links[0])} is a link to a folder, which is not followed, so its pictures would be "
            f"missing from the classes; put the folder there, or remove the link; {MEND}"
        )
    labelled = [replace(entry, label=name) for entry, name in zip(entries, classes, strict=True)]
    return labelled, {**notes, "labels": "the names of folders"}


def require_all(source: str, entries: Sequence[Entry], how: str) -> None:
    """Refuse a collection of which some pictures have a label and others none.

    Raises:
        DataError: It is one; the message names those without.
    """
    without = [entry.place for entry in entries if entry.label is None]
    if without and len(without) < len(entries):
        raise DataError(
            f"{source}: no label for {some(without)} ({len(without)} of {len(entries)} "
            f"pictures; the labels are {how}); label them or move them away; {MEND}"
        )


def number_labels(labels: Sequence[str | None]) -> tuple[tuple[str, ...], Tensor | None]:
    """Numbers for names of classes.

    Args:
        labels: Name of each image's class.

    Returns:
        The classes, numbers in their order before names in theirs, and each image's index; no label if one has none.
    """
    names = {label for label in labels if label is not None}
    if not names or None in labels:
        return (), None
    numeric = all(name.isdecimal() for name in names)
    classes = tuple(sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names))
    index = {name: i for i, name in enumerate(classes)}
    return classes, torch.tensor([index[label] for label in labels if label is not None])


def shown(name: str) -> str:
    """A file's name fit for a message: on one line, without characters that cannot be printed."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def label_text(value: Any) -> str | None:
    """A label of a table or a document as the name of a class; none where it stands for no label.

    Raises:
        ValueError: It is neither a whole number nor text.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == "" or (isinstance(value, int) and value < 0):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"a label must be a whole number or text, got {str(value)[:40]}")
    return str(value)


def _around_all(names: Sequence[tuple[str, ...]]) -> int:
    """How many folders, one in another, hold all pictures."""
    depth = 0
    while names and all(len(name) > depth + 1 and name[depth] == names[0][depth] for name in names):
        depth += 1
    return depth


def _all_parts(names: Sequence[tuple[str, ...]], depth: int) -> bool:
    """Whether all pictures lie in folders of parts, at a depth."""
    return bool(names) and all(len(name) > depth + 1 and _PART.fullmatch(name[depth]) for name in names)


def _refuse_mixture(source: str, names: Sequence[tuple[str, ...]], depth: int) -> None:
    """Parts, and something beside them that could belong to any; or folders of which most are called after parts."""
    folders = {name[depth] for name in names if len(name) > depth + 1}
    parts = {folder for folder in folders if _PART.fullmatch(folder) and not _SHORT.fullmatch(folder)}
    kinds = {_TRAIN.match(part) is None for part in parts}
    others = sorted({name[depth] for name in names} - parts)
    inside = {(name[depth], name[depth + 1]) for name in names if len(name) > depth + 2 and name[depth] in parts}
    divided = len(inside) > len({part for part, _ in inside})
    if others and (len(kinds) == 2 or divided):
        verb, them = ("are parts", "them") if len(parts) > 1 else ("looks like a part", "it")
        raise DataError(
            f"{source}: {some(sorted(parts), ' and ')} {verb} of the set, and beside {them} lies {some(others)}; move "
            "it away, or into one of the parts"
        )
    words = {folder: _words(folder) for folder in sorted(folders)}
    called = [folder for folder, found in words.items() if found & (_TRAIN_WORDS | _TEST_WORDS)]
    every = set[str]().union(*words.values())
    if 2 * len(called) > len(folders) and every & _TRAIN_WORDS and every & _TEST_WORDS:
        raise DataError(
            f"{source}: the folders {some(called)} are called after parts of the set, and not just train or test; make "
            f"them train/NAME and test/NAME, so that they are neither classes nor trained on alike"
        )


def parts_by_words(source: str, names: Sequence[str]) -> list[bool | None]:
    """Whether files are held out, by a word in their names, like val of imagenet-val-000.tar; none where none says it.

    Args:
        source: The source, for messages.
        names: Names of the files.

    Raises:
        DataError: Some are to train on and some held out by their names, and others neither.
    """
    words = [_words(name) for name in names]
    train, test = ([bool(one & kind) for one in words] for kind in (_TRAIN_WORDS, _TEST_WORDS))
    if not (any(train) and any(test)):
        return [None] * len(names)
    strange = [name for name, *is_part in zip(names, train, test, strict=True) if sum(is_part) != 1]
    if strange:
        raise DataError(
            f"{source}: of the files some are called train and some test or val, and {some(strange)} neither or both; "
            "name those that are meant"
        )
    return list(test)


def _words(name: str) -> set[str]:
    """The words in a name, like train and a of trainA, seg and test of seg_test."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def some(names: Sequence[str], last: str = ", ") -> str:
    """The first of several names, for a message."""
    more = ", ..." if len(names) > _SHOWN else ""
    return (last if len(names) == 2 else ", ").join(map(shown, names[:_SHOWN])) + more


def _refuse_marks(source: str, classes: Sequence[str]) -> None:
    """Pictures beside masks of them, which are no classes."""
    marks = [name for name in classes if name.lower() in _MARKS]
    pictures = [name for name in classes if name.lower() in _PICTURES]
    if marks and pictures and len(marks) + len(pictures) == len(classes):
        raise DataError(
            f"{source}: {some(pictures)} and {some(marks)} look like pictures and what is marked in them, not like "
            f"classes; move {some(marks)} away; {MEND}"
        )


_Labels = Callable[[str, bytes], Mapping[str, str | None] | None]


def _from_files(
    source: str,
    entries: Sequence[Entry],
    files: Mapping[str, Callable[[], bytes]],
    read: _Labels,
    notes: dict[str, str],
) -> tuple[list[Entry], dict[str, str]]:
    """Labels from files that name the pictures, each in and below its own folder."""
    labels, file = dict[str, str | None](), ""
    for path, content in files.items():
        folder, _, file = path.rpartition("/")
        try:
            listed = read(f"{source}: {shown(path)}", content())
        except PictureError as error:
            raise DataError(f"{source}: {shown(path)}: {error}") from error
        if listed is None:
            return list(entries), {**notes, "labels": f"none: {file} has none"}
        labels |= {_join(folder, name): label for name, label in listed.items()}
    labelled = [replace(entry, label=labels.get(entry.name)) for entry in entries]
    if any(label is not None for label in labels.values()) and all(entry.label is None for entry in labelled):
        raise DataError(
            f"{source}: {file} names none of the pictures: it has {shown(next(iter(labels)))}, and there is "
            f"{shown(entries[0].name)}; {MEND}"
        )
    return labelled, {**notes, "labels": f"from {file}"}


def _join(folder: str, name: str) -> str:
    """A picture's name within the collection, however a file beside it writes it."""
    return PurePosixPath(folder, name.replace("\\", "/")).as_posix()


def _json_labels(where: str, content: bytes) -> Mapping[str, str | None] | None:
    """Labels of EDM's `dataset.json`: `{"labels": [["00000/img00000.png", 3], ...]}`; none where it says null."""
    try:
        document: Any = json.loads(content)
        pairs = document["labels"]
        if pairs is None:
            return None
        labels = {str(name): label for name, label in pairs}
        if any(type(label) is not int or not 0 <= label < MAX_CLASSES for label in labels.values()):
            raise ValueError("labels must be whole numbers from 0")
        return {name: str(label) for name, label in labels.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f'{where}: {JSON} must be {{"labels": [["NAME", 3], ...]}} ({reason})') from error


def _csv_labels(where: str, content: bytes) -> Mapping[str, str | None] | None:
    """Labels of a `metadata.csv` as folders of the datasets library have it; none where it has no such column."""
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
        columns = rows.fieldnames or ()
        if "file_name" not in columns:
            raise ValueError("it has no column file_name")
        column = next((name for name in LABEL_COLUMNS if name in columns), None)
        return None if column is None else {row["file_name"]: label_text(row[column]) for row in rows}
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{where}: not a table of pictures ({str(error)[:100]})") from error


def summary(names: Iterable[str], reason: str) -> list[str]:
    """Lines for files passed over, one for each ending, like `3 files .txt: not pictures by their name`."""
    counts = dict[str, int]()
    for name in names:
        ending = PurePosixPath(name).suffix.lower() or "without an ending"
        counts[ending] = counts.get(ending, 0) + 1
    return [f"{count} file{'s' * (count > 1)} {shown(ending)}: {reason}" for ending, count in sorted(counts.items())]
