"""The demo corpus: the source code of the running Python's own library, as JSONL; no download."""

import hashlib
import sysconfig
from pathlib import Path

import orjson

from modalities import pbin

# Other people's packages, the tests (larger than the rest), and what a program wrote: character tables, manual pages.
NOT_DEMO = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
VALIDATION_SHARE = 0.05
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def write_demo(out: Path, validation: bool, library: Path = LIBRARY) -> None:
    """Write the running Python's own library as JSONL: the training part, or the part held out for validation.

    A document is a source file, `text` and `path`; they are sorted by path.
    """
    with pbin.write_beside(out) as file:
        for path in _library_sources(library):
            name = path.relative_to(library).as_posix()
            if _is_validation(name) == validation:
                text = _decoded(path)
                if text:
                    file.write(orjson.dumps({"text": text, "path": name}) + b"\n")


def _library_sources(library: Path) -> list[Path]:
    found = (path.relative_to(library) for path in library.rglob("*.py"))
    names = sorted(name.as_posix() for name in found if not NOT_DEMO & set(name.parts))
    if not names:
        raise ValueError(f"this Python has no source files in {library}; run one that brings its library's sources")
    return [library / name for name in names]


def _decoded(path: Path) -> str:
    """The text of a source file; empty where it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return ""


def _is_validation(name: str) -> bool:
    """About one name in twenty, the same ones on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < VALIDATION_SHARE * 2**64
