"""Paths that specs name: resolved against the file that says them, and refused where they could leave it unseen."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from graphopt.diagnostics import Diagnostic, Place, SpecError, did_you_mean


def problem_in(text: str, place: Place | None, *, absolute: bool) -> Diagnostic | None:
    """Return what is wrong with a path as written, or None."""
    if not text or "\0" in text:
        return Diagnostic("unsafe_path", "a path cannot be empty" if not text else "a path with a null byte", place)
    if not absolute and (PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive):
        help = "write it relative to this file"
        return Diagnostic("unsafe_path", f"'{text}' is absolute", place, (), (help,))
    return None


def beside(file: str, text: str) -> str:
    """Return a path that is written in a file as seen from where that file was."""
    return os.path.normpath(os.path.join(os.path.dirname(file), text))


def not_found(path: str, place: Place | None) -> Diagnostic:
    """Return the diagnostic for a file that is not there, with the closest name beside it."""
    folder = Path(path).parent
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    what = "is not a file" if Path(path).exists() else "does not exist"
    return Diagnostic("missing_file", f"'{path}' {what}", place, (), did_you_mean(Path(path).name, names))


def safe_output(path: str | Path) -> Path:
    """Return a path to write to; one that is empty, has a null byte or climbs with `..` raises SpecError."""
    text = str(path)
    if problem := problem_in(text, None, absolute=True):
        raise SpecError(problem)
    if ".." in PurePosixPath(text).parts or ".." in PureWindowsPath(text).parts:
        help = "name the directory itself"
        raise SpecError.of("unsafe_path", f"an output path cannot contain '..': '{text}'", help=(help,))
    return Path(path)
