"""Ranks that are threads of one process and meet at a barrier."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fulgurite.methods.ranks import Ranks


class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank, size, barrier, board):
        super().__init__(rank, size)
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "board", board)

    def gather(self, value):
        self.board[self.rank] = pickle.dumps(value)  # as between processes
        self.barrier.wait(timeout=20)
        values = [pickle.loads(self.board[rank]) for rank in range(self.size)]
        self.barrier.wait(timeout=20)
        return values


def run_on_ranks(size, work):
    """``work(ranks)`` on every rank at the same time: results, or exceptions, in order of rank."""
    barrier, board = threading.Barrier(size), {}

    def one(rank):
        try:
            return work(ThreadRanks(rank, size, barrier, board))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.fixture
def on_ranks():
    return run_on_ranks
