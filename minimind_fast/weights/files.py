"""Files and folders that appear whole or not at all.

Purpose: `written_aside` for everything that must survive a kill or a full disk; `check_replaceable` before a model
    replaces a folder.
Principle: write beside the real path, sync to disk, then rename.
Properties: at every instant either the old or the new version is complete.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

# Files of a model folder, as written here and by Transformers: a new model may replace them.
_MODEL_FILE = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|[\w.]+\.index\.json|\.DS_Store|chat_template\.jinja|merges\.txt"
    r"|model\.gguf|Modelfile|modeling_minimind\.py"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
)


def check_replaceable(path: Path, a_file: bool = False) -> None:
    """Refuse to replace anything but a model with a model.

    Args:
        path: where a model is to be written.
        a_file: write a file, not a folder.

    Raises:
        ValueError: the folder holds other files, or there is a folder where a file is wanted, or the reverse.
    """
    if a_file and path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it, such as {path / 'model.pth'}")
    if not a_file and path.is_file():
        raise ValueError(f"{path} is a file; name a folder")
    if not a_file and path.is_dir():
        others = sorted(p.name for p in path.iterdir() if p.is_dir() or not _MODEL_FILE.fullmatch(p.name))
        if others:
            named = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            raise ValueError(
                f"{path} holds other things than a model ({named}), which would be lost; name a new folder"
            )


class written_aside:
    """A temporary path beside the real one, which it replaces on success.

    Whatever happens (an exception, a kill, a full disk), the old file or folder stays intact: under its own name, or,
    during a folder's swap, as `.<name>.old-*` beside it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.aside = self.path.with_name(f".{self.path.name}.new-{os.getpid()}-{uuid.uuid4().hex[:6]}")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.aside

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._put()
        finally:  # after success there is nothing to remove
            _remove(self.aside)

    def _put(self) -> None:
        sync_to_disk(self.aside)
        if self.path.is_dir():
            old = self.path.with_name(f"{old_prefix(self.path)}{uuid.uuid4().hex[:6]}")
            os.replace(self.path, old)
            try:
                os.replace(self.aside, self.path)
            except OSError:
                os.replace(old, self.path)
                raise
            _remove(old)
        else:
            os.replace(self.aside, self.path)


def old_prefix(path: Path) -> str:
    return f".{path.name}.old-"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Sync a file, or all files of a folder, to disk."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
