"""Several processes that know of each other, for the tests of distributed training."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, multiprocessing

Work = Callable[[int, Path], None]  # rank and folder; a function of a module


def together(work: Work, folder: Path, size: int = 2) -> None:
    """Run a function in as many processes; what one raises is raised here."""
    multiprocessing.spawn(_begin, args=(size, folder, work), nprocs=size)


def exit_codes(work: Work, folder: Path, size: int = 2) -> list[int | None]:
    """Run a function in as many processes, of which some may die, and return how each ended."""
    spawning = multiprocessing.get_context("spawn")
    begun = [
        spawning.Process(target=_begin, args=(rank, size, folder, work)) for rank in range(size)
    ]
    for process in begun:
        process.start()
    for process in begun:
        process.join()
    return [process.exitcode for process in begun]


def _begin(rank: int, size: int, folder: Path, work: Work) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "none"}  # as torchrun sets them
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    try:
        work(rank, folder)
    finally:
        distributed.destroy_process_group()
