"""One command in a process forked from one that has loaded everything already; run by the fixture `verbs`.

SETTINGS are `argv`, `folder` to run in, `limit` (bytes that a file may have, or None) and `disk` (KiB of a
disk that is mounted in the folder as `disk`, or None; what was there lies on it, and what is on it afterwards
is copied to `after`). With either of them numba's cache is on that disk, too. Output goes to `out` and `err`
in the folder.
"""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba

SETTINGS: dict[str, Any] = globals()["SETTINGS"]  # given by runpy
limit, disk = SETTINGS["limit"], SETTINGS["disk"]

os.chdir(SETTINGS["folder"])
for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
    stream.flush()
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
if disk is not None:
    Path("disk").rename("before")
    Path("disk").mkdir()
    if ctypes.CDLL(None).unshare(0x20000):  # CLONE_NEWNS: nobody else sees the mount
        sys.exit("no mounts")
    for mount in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={disk}k", "tmpfs", "disk"]):
        if subprocess.run(["mount", *mount], capture_output=True).returncode:
            sys.exit("no mounts")
    shutil.copytree("before", "disk", dirs_exist_ok=True)
if limit is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

if limit is not None or disk is not None:
    os.environ["NUMBA_CACHE_DIR"] = str(Path("disk", "numba").absolute())
    numba.core.config.reload_config()
    for name in [name for name in sys.modules if name.startswith("exflow")]:
        del sys.modules[name]  # whose functions have chosen their cache

import torch  # noqa: E402

from exflow import cli  # noqa: E402

torch.set_num_threads(1)
sys.argv = ["exflow", *SETTINGS["argv"]]
try:
    cli.main()
finally:
    if disk is not None:
        shutil.copytree("disk", "after")
