"""Ray Tune on the CPU, without torch: finds the learning rate and size of a small neural network in numpy.

    python moons.py [--trials 12] [--epochs 60]

Two interleaved half moons are to be told apart; each trial trains one network, ASHA ends the poor ones early.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator


def half_moons(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    angle, label = rng.uniform(0, np.pi, n), rng.integers(0, 2, n)
    x = np.where(label == 0, np.cos(angle), 1 - np.cos(angle))
    y = np.where(label == 0, np.sin(angle), 0.5 - np.sin(angle))
    return np.stack([x, y], axis=1) + rng.normal(0, 0.2, (n, 2)), label.astype(float)


def train(config: dict[str, Any]) -> None:
    """One trial: a network with one hidden layer, by gradient descent in mini-batches."""
    rng = np.random.default_rng(0)
    x, y = half_moons(4000, rng)
    test_x, test_y = half_moons(2000, rng)
    hidden, rate = config["hidden"], config["rate"]
    w1, b1 = rng.normal(0, 1, (2, hidden)), np.zeros(hidden)
    w2, b2 = rng.normal(0, hidden**-0.5, hidden), 0.0
    for epoch in range(1, config["epochs"] + 1):
        for batch in np.array_split(rng.permutation(len(x)), 125):
            h = np.tanh(x[batch] @ w1 + b1)
            error = 1 / (1 + np.exp(-(h @ w2 + b2))) - y[batch]
            back = np.outer(error, w2) * (1 - h**2)
            w2 -= rate * h.T @ error / len(batch)
            b2 -= rate * error.mean()
            w1 -= rate * x[batch].T @ back / len(batch)
            b1 -= rate * back.mean(axis=0)
        right = ((np.tanh(test_x @ w1 + b1) @ w2 + b2 > 0) == test_y).mean()
        tune.report({"accuracy": float(right), "epoch": epoch})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()

    ray.init(logging_level="warning")
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    results = tempfile.mkdtemp(prefix="moons-")  # metrics only: no checkpoint that other nodes would need
    began = time.monotonic()
    try:
        tuner = tune.Tuner(
            tune.with_resources(train, {"CPU": 1}),
            param_space={
                "hidden": tune.choice([2, 4, 8, 16, 32]),
                "rate": tune.loguniform(1e-3, 3.0),
                "epochs": args.epochs,
            },
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                num_samples=args.trials,
                search_alg=BasicVariantGenerator(random_state=7),
                scheduler=ASHAScheduler(time_attr="epoch", max_t=args.epochs, grace_period=5),
            ),
            run_config=tune.RunConfig(storage_path=results, verbose=0),
        )
        trials = tuner.fit()
    finally:
        shutil.rmtree(results, ignore_errors=True)
    if trials.errors:
        print(f"{len(trials.errors)} trials failed: {trials.errors[0]}", file=sys.stderr)
        return 1
    print("accuracy  epochs  hidden  rate")
    for trial in sorted(trials, key=lambda t: -t.metrics["accuracy"]):
        config, found = trial.config, trial.metrics
        print(f"{found['accuracy']:8.1%}  {found['epoch']:6}  {config['hidden']:6}  {config['rate']:.4f}")
    best = trials.get_best_result()
    print(f"best: {best.metrics['accuracy']:.1%} of {args.trials} trials in {time.monotonic() - began:.1f} s")
    if best.metrics["accuracy"] < 0.93:
        print("wrong: the moons can be told apart better than that", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
