"""Stage 2, find: small linear algebra on few threads.

Nothing here knows what is computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 2**20  # numbers; the threads of smaller products spend their time waiting for each other
MOST = 4


@contextmanager
def few_threads(work: int) -> Iterator[None]:
    """Cap torch's threads inside the block: one for small work, at most four for large.

    On a busy machine with 2 cores, the first round of the quickstart (540 x 64 numbers) took 105 s
    on two threads and 5 s on one.

    Args:
        work: Numbers in the largest matrix of the block.

    Yields:
        Nothing; the number of threads is restored afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < SMALL else min(before, MOST))
    try:
        yield
    finally:
        torch.set_num_threads(before)
