"""Files and folders that appear whole or not at all.

Purpose: `written_aside` for everything that must survive a kill or a full disk; `check_replaceable` before a model
    replaces a folder; `Hold` for a folder that one process writes.
Principle: write beside the real path, sync to disk, then rename. A hold is a lock of the operating system, which ends with
    the process however that dies.
Properties: at every instant either the old or the new version is complete. On a drive without locks a hold goes by the note
    that its holder left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from minimind_fast.errors import UserError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

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
        raise UserError(f"{path} is a folder; name a file in it, such as {path / 'model.pth'}")
    if not a_file and path.is_file():
        raise UserError(f"{path} is a file; name a folder")
    if not a_file and path.is_dir():
        others = sorted(p.name for p in path.iterdir() if p.is_dir() or not _MODEL_FILE.fullmatch(p.name))
        if others:
            named = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            raise UserError(f"{path} holds other things than a model ({named}), which would be lost; name a new folder")


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


class Hold:
    """Keeps a folder for this process while it lives, so that no second one writes into it.

    The lock lies beside the folder, as `.<name>.lock`: the folder itself may be renamed or not exist yet.

    Args:
        folder: what is held.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder.parent / f".{folder.name}.lock"
        self._file: BinaryIO | None = None

    def take(self) -> None:
        """Take the lock.

        Raises:
            UserError: another process has it; names its host and pid.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+b")  # noqa: SIM115  (kept open: closing it gives the lock up)
        locked = self._lock(file)
        file.seek(0)
        owner = _note(file.read())
        if locked is False or (locked is None and self._may_live(owner)):
            file.close()
            who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')}"
            advice = "wait for it, stop it, or give another --save_weight or --save_dir"
            if locked is None:
                advice += f"; this drive has no file locks: if that process has ended, remove {self.path}"
            raise UserError(f"another run writes to {self.folder} ({who}): {advice}")
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock up; nothing if it is not held."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    @staticmethod
    def _lock(file: BinaryIO) -> bool | None:
        """Whether the lock was free; None where there are no locks, as on some network drives."""
        if fcntl is None:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
        return True

    @staticmethod
    def _may_live(owner: dict[str, Any]) -> bool:
        """Whether the holder that a note names may still run; one on another host may."""
        if not owner or owner.get("pid") == os.getpid():
            return False
        if owner.get("host") != socket.gethostname():
            return True
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return True


def check_free(folder: Path) -> None:
    """Refuse a folder that another process holds.

    Raises:
        UserError: names the process.
    """
    hold = Hold(folder)
    hold.take()
    hold.release()


def _note(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict) and isinstance(found.get("pid"), int):
            return found
    return {}
