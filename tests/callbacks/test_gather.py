"""Rank 0 gets the rows of every rank; the ranks need not have equally many."""

import json
import os
import socket
import subprocess
import sys

from fulgurite.callbacks.gather import gather_rows

SCRIPT = """
import json, os, torch.distributed as dist
from fulgurite.callbacks.gather import gather_rows
dist.init_process_group("gloo")
rank = dist.get_rank()
print(json.dumps(gather_rows([{"id": f"{rank}-{i}"} for i in range(2 + rank)])))
"""


def test_rank_0_gets_all_rows_of_uneven_ranks():
    world = 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=common | {"RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(world)
    ]
    outputs = [json.loads(r.communicate(timeout=120)[0]) for r in ranks]
    assert [row["id"] for row in outputs[0]] == ["0-0", "0-1", "1-0", "1-1", "1-2"]
    assert outputs[1] == []


def test_one_process_keeps_its_rows():
    assert gather_rows([1, 2]) == [1, 2]
