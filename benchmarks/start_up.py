"""Start-up of the command line against the imports it cannot avoid. Fresh processes, interleaved, minima.

Bars: ``--help`` and ``--version`` at most 0.4 s; ``fit --help`` at most ``import lightning`` + 0.7 s; a command
without training (``inspect --help``) at most ``import torch`` + 0.5 s.

Run: python benchmarks/start_up.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

CLI = Path(__file__).resolve().parent.parent / "cli.py"
CASES = {
    "python": [sys.executable, "-c", ""],
    "import torch": [sys.executable, "-c", "import torch"],
    "import lightning": [sys.executable, "-c", "import lightning"],
    "--help": [sys.executable, str(CLI), "--help"],
    "--version": [sys.executable, str(CLI), "--version"],
    "inspect --help": [sys.executable, str(CLI), "inspect", "--help"],
    "fit --help": [sys.executable, str(CLI), "fit", "--help"],
}


def seconds(command: list[str]) -> float:
    """Wall time of one fresh process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    packages = ("torch", "lightning", "jsonargparse")
    print(f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages), sep=", ")
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}, {rounds} rounds after one to warm the cache")
    for command in CASES.values():
        seconds(command)
    best = dict.fromkeys(CASES, float("inf"))
    for _ in range(rounds):
        for name, command in CASES.items():
            best[name] = min(best[name], seconds(command))
    for name, value in best.items():
        print(f"{name:<18} {value:6.2f} s")
    bars = [
        ("--help", best["--help"], 0.4),
        ("--version", best["--version"], 0.4),
        ("inspect --help over import torch", best["inspect --help"] - best["import torch"], 0.5),
        ("fit --help over import lightning", best["fit --help"] - best["import lightning"], 0.7),
    ]
    print(f"fit --help / import lightning: {best['fit --help'] / best['import lightning']:.2f}")
    for name, value, bar in bars:
        print(f"{name}: {value:.2f} s, bar {bar} s: {'kept' if value <= bar else 'MISSED'}")
    print(f"load after {os.getloadavg()[0]:.1f}")
    return 0 if all(value <= bar for _, value, bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
