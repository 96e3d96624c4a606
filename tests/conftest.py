"""Tests run side by side, one a core: each keeps to one thread, or they would wait for each other. And offline."""

import os
import signal
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402  (it reads the line above)

from modalities import stopping  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command that a test calls in this process notes signals until the process ends; the next test must not."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    if stopping.noting():
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        stopping.noted.clear()
