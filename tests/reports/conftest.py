"""A made-up continual test: two domains, three modes, answers known one by one."""

import math

import av
import numpy as np
import pytest

from fulgurite.reports.video_qa import ContinualTest
from fulgurite.samples import Sample, Stage

NAMES = {
    "dynamic": "dynamic merging",
    "router": "router only",
    "last": "last adapter",
    "oracle": "oracle domain",
}
# Who is right, question by question: dynamic, router, last, oracle.
OUTCOMES = {
    "red": [(1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 0, 1), (1, 1, 0, 1), (0, 0, 0, 0), (1, 1, 0, 0)],
    "blue": [(1, 1, 1, 1), (1, 0, 1, 1), (0, 0, 1, 1), (1, 1, 1, 0)],
}


@pytest.fixture
def continual() -> ContinualTest:
    answers, samples = [], []
    for domain, rows in OUTCOMES.items():
        for j, row in enumerate(rows):
            name = f"{domain}/{j}"
            given = {m: "yes" if ok else "<i>no</i>" for m, ok in zip(NAMES, row)}
            kind = "count" if j % 2 else "colour"
            answers.append(
                {"id": name, "domain": domain, "kind": kind, "gold": {"yes": 1.0}, "answers": given}
                | {"weights": {domain: 0.75, "initial": 0.25}}
            )
            samples.append(Sample(id=name, domain=domain, question=f"Is <{name}> it?", answers={"yes": 1.0}, kind=kind))
    modes = {}
    for i, mode in enumerate(NAMES):
        final = [sum(row[i] for row in rows) / len(rows) for rows in OUTCOMES.values()]
        before = 0.9 if mode == "last" else final[0]
        modes[mode] = {
            "matrix": [[0.1, 0.2], [before, 0.25], final],
            "by_kind": [[0.5, 0.25, math.nan], [0.5, 0.75, math.nan]],
            "top10": [1.0, 1.0],
            "average": sum(final) / 2,
            "forgetting": before - final[0],
        }
    results = {
        "modes": modes,
        "confusion": [[[5, 1], [1, 3]]],
        "domains": list(OUTCOMES),
        "kinds": ["colour", "count", "order"],
        "mode": "dynamic",
    }
    stages = [Stage("red", ("red",), 1, 3), Stage("blue", ("blue",), 1, 3)]
    return ContinualTest(results, answers, samples, stages, NAMES)


@pytest.fixture
def moving_square(tmp_path):
    """A video of 12 frames."""
    path = tmp_path / "square.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for i in range(12):
            picture = np.zeros((128, 128, 3), np.uint8)
            picture[:, 10 * i : 10 * i + 10] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
