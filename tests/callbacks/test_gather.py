"""Rank 0 gets the rows of every rank; the ranks need not have equally many."""

import json

from fulgurite.callbacks.gather import gather_rows

SCRIPT = """
import json, torch.distributed as dist
from fulgurite.callbacks.gather import gather_rows
dist.init_process_group("gloo")
rank = dist.get_rank()
print(json.dumps(gather_rows([{"id": f"{rank}-{i}"} for i in range(2 + rank)])))
"""


def test_rank_0_gets_all_rows_of_uneven_ranks(pair, tmp_path):
    script = tmp_path / "gather.py"
    script.write_text(SCRIPT)
    outputs = [json.loads(text.splitlines()[-1]) for text in pair.run(script)]
    assert [row["id"] for row in outputs[0]] == ["0-0", "0-1", "1-0", "1-1", "1-2"]
    assert outputs[1] == []


def test_one_process_keeps_its_rows():
    assert gather_rows([1, 2]) == [1, 2]
