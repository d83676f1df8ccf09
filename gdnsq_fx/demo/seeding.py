"""Runs that follow from their seed alone, on one CPU thread."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Generator[None, None, None]:
    """Seed the CPU's random state for a while, then put the old state back."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would lastingly seed the accelerators too.
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """Hold torch to one CPU thread, then give back as many as before."""
    # Two threads gain a quarter of the time here, and lose tenfold where another
    # process holds a core: each tiny convolution then waits for the slower thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
