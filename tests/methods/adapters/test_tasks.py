"""The task of every sample, as adapters see it."""

import threading

import pytest
import torch

from fulgurite.methods.adapters.tasks import current_tasks, grouped_by_task, tasks_of

TASKS = ("vqa", "gqa", "caption")


def rows_of(mixture, num_rows):
    """The task of every row, as the groups say it."""
    out = torch.full((num_rows,), -1)
    for group in mixture.groups:
        out[group.rows] = group.experts[0]
    return out.tolist()


def test_blocks_nest_and_other_threads_see_none():
    index = torch.tensor([0, 2])
    assert current_tasks() is None
    with tasks_of(index):
        assert current_tasks() is index
        with tasks_of(None):
            assert current_tasks() is None
        seen = []
        thread = threading.Thread(target=lambda: seen.append(current_tasks()))
        thread.start()
        thread.join()
        assert seen == [None]
        assert current_tasks() is index
    assert current_tasks() is None


def test_rows_are_grouped_once_and_beams_follow_their_sample():
    with tasks_of(torch.tensor([2, 0, 2])):
        mixture = grouped_by_task(TASKS, torch.zeros(3, 5))
        assert rows_of(mixture, 3) == [2, 0, 2]
        assert grouped_by_task(TASKS, torch.ones(3, 7)) is mixture
        assert rows_of(grouped_by_task(TASKS, torch.zeros(6, 5)), 6) == [2, 2, 0, 0, 2, 2]


def test_what_does_not_fit_is_one_clear_error():
    with pytest.raises(ValueError, match=r"'vqa', 'gqa', 'caption'\] need to know the task .* tasks_of\(index\)"):
        grouped_by_task(TASKS, torch.zeros(3, 5))
    with tasks_of(torch.tensor([0, 3])):
        with pytest.raises(ValueError, match="outside 0 to 2"):
            grouped_by_task(TASKS, torch.zeros(2, 5))
        with pytest.raises(ValueError, match="2 tasks were given for 3 rows"):
            grouped_by_task(TASKS, torch.zeros(3, 5))
    for index in (torch.zeros(2), torch.zeros(2, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"an index \(B,\) long"), tasks_of(index):
            pass
