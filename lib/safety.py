"""A run and the world around it: a lock on its folder, and the system's errors as one sentence each."""

import datetime
import errno
import fcntl
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from lib.command_line import exit_with, quote_path, require

LOCK = ".lock"
# errors that a user can mend: disk, permission, a file in the place of a folder
MENDABLE = (
    "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR EISDIR EEXIST ENOTEMPTY ENAMETOOLONG EMFILE ENFILE"
).split()
held = {}  # (process, folder): open lock file


# ---------------------------------------------------------------- the lock on a folder


def take_lock(folder):
    """Makes a folder and locks it for this process until `release_locks`; exits if another one holds it.

    The system gives a lock back when its process ends, however it ends, so a dead holder's is simply taken.
    Where the file system knows no locks, there is none.
    """
    folder = Path(folder)
    key = (os.getpid(), folder.absolute())
    is_folder = folder.is_dir() or not (folder.exists() or folder.is_symlink())
    require(is_folder, f"{folder} is a file or a link to nothing; set OUT to a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if key in held:
        return
    path = folder / LOCK
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read().strip() or "another process"
                exit_with(f"{folder} is in use by {holder}; wait for its end, or set another OUT.")
            break
        # the holder before may have removed the file between our opening and locking it
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()
    now = datetime.datetime.now().isoformat(" ", "seconds")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
    file.flush()
    held[key] = file


def release_locks(folder=None):
    """Gives back this process's lock on a folder, or all of its locks."""
    for key in list(held):
        process, locked = key
        if process == os.getpid() and folder in (None, locked):
            (locked / LOCK).unlink(missing_ok=True)
            held.pop(key).close()


def release_lock(folder):
    """Gives back the lock on one folder."""
    release_locks(Path(folder).absolute())


# ---------------------------------------------------------------- errors of the system


def explain(error):
    """A sentence on Ctrl-C or on an error of the system that a user can mend; "" for any other error."""
    if isinstance(error, KeyboardInterrupt):
        afresh = [word for word in sys.argv[1:] if word in ("RESUME=never", "RESUME=False")]
        without = f" without {afresh[0]}" if afresh else ""
        return f"Stopped. What is finished is kept; the same command{without} goes on from there."
    code = getattr(error, "errno", None) if isinstance(error, OSError) else None
    # safetensors and other libraries that are no Python hand the system's number on as text
    found = re.search(r"\(os error (\d+)\)", str(error))
    if code is None and found:
        code = int(found[1])
    if errno.errorcode.get(code) not in MENDABLE:
        return ""
    name = getattr(error, "filename", None)
    place = f"{quote_path(name)}: " if name else ""
    return f"{place}{os.strerror(code)}. Mend that, and the same command goes on from what is finished."


def report_errors():
    """From here on, what `explain` knows ends the program with one sentence instead of a traceback."""

    def report(kind, error, trace):
        sentence = explain(error)
        if not sentence:
            sys.__excepthook__(kind, error, trace)
        elif not isinstance(error, KeyboardInterrupt) or os.environ.get("RANK", "0") == "0":
            print(f"\n{sentence}", file=sys.stderr, flush=True)

    sys.excepthook = report


# ---------------------------------------------------------------- the end of a parent


def end_with_parent():
    """Ends this process as soon as its parent has ended, as torchrun does when it is killed."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
