"""Stands in for `python -m upcycle_jax.train` in tests of sweeps: `fake_cell.py upcycle_jax.train
--gin...`. Not a test module.

Writes what a run writes (manifest, metrics, checkpoints), a step every FAKE_SECONDS, resumes from
its last step, ends on SIGTERM with the code for interrupted runs. A RANDOM_SEED of 13 fails. Every
start and every step is appended to `history.txt` of its folder.
"""

import json
import os
import pathlib
import signal
import sys
import time


def main() -> int:
    values = dict(
        word.removeprefix("--gin.").split("=", 1)
        for word in sys.argv[2:]
        if word.startswith("--gin.")
    )
    folder = pathlib.Path(values["MODEL_DIR"].strip("'"))
    total, seed, factor = (
        int(values["TRAIN_STEPS"]),
        int(values.get("RANDOM_SEED", 0)),
        float(values.get("FACTOR", 1.0)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    if seed == 13:
        print("the loss of step 3 is nan", flush=True)
        return 1
    start = 0
    if "INITIAL_CHECKPOINT_PATH" in values:
        source = pathlib.Path(values["INITIAL_CHECKPOINT_PATH"].strip("'"))
        assert source.is_dir(), f"{source} is not there yet"
        start = int(source.name.removeprefix("checkpoint_"))
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    position = folder / "position"
    step = int(position.read_text()) if position.exists() else start
    history = (folder / "history.txt").open("a")
    print(f"start at {step}", file=history, flush=True)
    evaluation = folder / "training_eval" / "task" / "metrics.jsonl"
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    while step < total:
        time.sleep(float(os.environ["FAKE_SECONDS"]))
        if stop:
            return int(os.environ["UPCYCLE_JAX_INTERRUPTED_CODE"])
        step += 1
        print(f"step {step}", file=history, flush=True)
        with evaluation.open("a") as stream:
            row = {"step": step, "cross_ent_loss": factor + 1.0 / (step + seed), "accuracy": 0.5}
            stream.write(json.dumps(row) + "\n")
        position.write_text(str(step))
    (folder / f"checkpoint_{total}").mkdir(exist_ok=True)
    identity = {"start_step": start, "parameters": 10, "train_flops_per_step": 1e9}
    (folder / "manifest.json").write_text(
        json.dumps({"status": "finished", "step": total, **identity})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
