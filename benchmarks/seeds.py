"""The README's table: the main job over three seeds and its baselines, each as its own process.

Every record trains the same epochs per question (configs/dam/seeds.yaml). A finished run is not repeated. About an hour
of one core for all; two jobs run side by side.

    python benchmarks/seeds.py [--runs DIR] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEED_FLAGS = ("--seed_everything", "--data.seed", "--model.backbone.projection_seed")
BASELINES = {
    "multitask": "last",
    "individual": "oracle",
    "question_only": "oracle",
    "single_frame": "oracle",
}  # overlay -> its strongest mode


def run(runs: Path, overlay: str | None, seed: int) -> dict[str, float]:
    """Metrics of one record and seed, trained now unless its folder is complete."""
    folder = runs / f"{overlay or 'main'}-{seed}"
    if not (folder / "report.html").exists():
        configs = ["quickstart.yaml", "dam/seeds.yaml", *([f"dam/{overlay}.yaml"] if overlay else [])]
        command = [sys.executable, str(ROOT / "cli.py"), "fit", "--run", str(folder), "--resume", "auto"]
        command += [part for name in configs for part in ("--config", str(ROOT / "configs" / name))]
        command += [part for flag in SEED_FLAGS for part in (flag, str(seed))]
        command += ["--trainer.enable_progress_bar", "false"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads((folder / "metrics.json").read_text())


def spread(values: list[float]) -> str:
    """Mean and standard deviation in per cent."""
    shown = f"{100 * statistics.mean(values):.1f}"
    return shown if len(values) < 2 else f"{shown} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    jobs = [(None, seed) for seed in options.seeds]
    jobs += [(name, options.seeds[0]) for name in BASELINES]
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(jobs, pool.map(lambda job: run(options.runs, *job), jobs)))
    main_runs = [results[None, seed] for seed in options.seeds]
    modes = [key.split("/")[1] for key in main_runs[0] if key.startswith("test/") and key.endswith("/average")]
    print("| mode | average | forgetting |\n|---|---|---|")
    for mode in modes:
        average = [metrics[f"test/{mode}/average"] for metrics in main_runs]
        forgetting = [metrics[f"test/{mode}/forgetting"] for metrics in main_runs]
        print(f"| {mode} | {spread(average)} | {spread(forgetting)} |")
    for name in ("router_accuracy", "second_router_accuracy"):
        print(f"| {name} | {spread([metrics[f'test/{name}'] for metrics in main_runs])} | |")
    for name, mode in BASELINES.items():
        print(f"| {name} ({mode}, one seed) | {spread([results[name, options.seeds[0]][f'test/{mode}/average']])} | |")


if __name__ == "__main__":
    main()
