"""Jobs whose ranks are forked from one process: torch is loaded once, not by each of many ranks.

`forked_ranks.py SCRIPT FOLDER RANKS [FOLDER RANKS ...]` runs main(FOLDER) of SCRIPT, a module beside this
one, on the ranks of one job after the other.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

from torch.distributed import TCPStore


def run(script: str, folder: Path, ranks: int) -> None:
    """One job, to its end. Exits with code 1, and ends the other ranks, where a rank fails."""
    job = {"TORCHELASTIC_RUN_ID": "forked", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    job |= {"MASTER_ADDR": "localhost", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    port, told = os.pipe()
    places = [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    children = {start(script, folder, place, port) for place in places}
    # as torchrun's agent has it; it has threads, and a child forked beside them can wait for ever
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.write(told, f"{store.port:5}".encode() * ranks)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:  # which would wait for it
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def start(script: str, folder: Path, place: dict[str, str], port: int) -> int:
    """The process id of a rank, which reads from the file `port` where the store is."""
    if child := os.fork():
        return child
    try:
        os.environ.update(place, MASTER_PORT=os.read(port, 5).decode().strip())
        importlib.import_module(script).main(folder)
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


if __name__ == "__main__":
    importlib.import_module(sys.argv[1])  # before the ranks are forked
    for folder, ranks in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        run(sys.argv[1], Path(folder), int(ranks))
