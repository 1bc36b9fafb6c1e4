"""Trains toy runs and kills them again and again: `python kill_driver.py SETTINGS`, for test_train_kills.py.

A process of its own, because it forks: the libraries are imported once, and each attempt is a fork that resumes the
run. An attempt kills itself with SIGKILL at a random moment: in the middle of a step, in the middle of a file of a
checkpoint, or just before the checkpoint gets its final name. The random numbers differ from attempt to attempt.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path


def kill_in_step(step: int) -> None:
    """Arrange a kill after the forward pass of a step."""
    from train.objective import Objective

    losses, calls = Objective.losses, []

    def dying(self, encoded, draws):
        calls.append(None)
        result = losses(self, encoded, draws)
        if len(calls) > step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Objective.losses = dying


def kill_in_file(number: int) -> None:
    """Arrange a kill when half of a checkpoint's file has been written."""
    from train import checkpoint

    save_file, calls = checkpoint.save_file, []

    def dying(tensors, path):
        calls.append(None)
        save_file(tensors, path)
        if len(calls) > number:
            with open(path, "r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = dying


def kill_before_rename(number: int) -> None:
    """Arrange a kill when a checkpoint is complete but has no final name yet."""
    from train import checkpoint

    flush, calls = checkpoint._flush, []

    def dying(path):
        flush(path)
        if path.is_dir() and path.name.startswith("unfinished_"):
            calls.append(None)
            if len(calls) > number:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._flush = dying


def main() -> None:
    from toy_training import toy_config

    from train.trainer import run

    kills = [(kill_in_step, 4), (kill_in_file, 5), (kill_before_rename, 1)]  # and the largest argument of each
    for settings in json.loads(sys.argv[1]):
        config, rng = (
            toy_config("mini", Path(settings["out"]), settings["assignments"]),
            random.Random(settings["seed"]),
        )
        killed = 0
        while True:
            arrange, largest = kills[killed % len(kills)]
            argument = rng.randint(0, largest)
            pid = os.fork()
            if pid == 0:
                if killed < settings["kills"]:
                    arrange(argument)
                run(config, resume=True)
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                killed += 1
            elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
                break
            else:
                sys.exit(f"an attempt ended with status {status}")
        print(json.dumps({"killed": killed}))


if __name__ == "__main__":
    main()
