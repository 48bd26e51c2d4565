"""What faults are injected into: a cached task, a tiny dense run, its conversions. Made once."""

import dataclasses
import pathlib
import subprocess
import sys

from lab import Lab, leaves

LENGTHS = "{'inputs': 64, 'targets': 24}"
DENSE, SPARSE = "models/t5_1_1_tiny.gin", "models/t5_1_1_tiny_upcycled.gin"
STEPS, PERIOD = 8, 2
TASK = "text"


@dataclasses.dataclass(frozen=True)
class Subjects:
    """Paths of what was made.

    Attributes:
      text: a file of JSON lines.
      cache: folder of the task's cache.
      dense: MODEL_DIR of a dense run that nothing disturbed, with checkpoints every 2 steps.
      converted: a conversion of its last checkpoint by reference.
    """

    text: pathlib.Path
    cache: pathlib.Path
    dense: pathlib.Path
    converted: pathlib.Path

    @property
    def checkpoint(self) -> pathlib.Path:
        return self.dense / f"checkpoint_{STEPS}"

    def train_words(self, model_dir: pathlib.Path, *, steps: int = STEPS) -> list[str]:
        """The command line of the dense run, on cached data."""
        bindings = {
            "MIXTURE_OR_TASK_NAME": repr(TASK),
            "TEXT_FILES": repr({"a": [str(self.text)]}),
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "USE_CACHED_TASKS": "True",
            "MODEL_DIR": repr(str(model_dir)),
            "TRAIN_STEPS": str(steps),
            "SAVING_PERIOD": str(PERIOD),
            "STATS_PERIOD": "1",
            "EVAL_PERIOD": "None",
            "EVAL_STEPS": "1",
            "BATCH_SIZE": "8",
            "VOCAB_SIZE": "384",
            "KEEP_CHECKPOINTS": "None",
            "train.train_eval_dataset_cfg": "None",
        }
        return [
            f"--gin_file={DENSE}",
            "--gin_file=runs/pretrain.gin",
            *(f"--gin.{name}={value}" for name, value in bindings.items()),
            f"--seqio_additional_cache_dirs={self.cache}",
        ]

    def upcycle_words(self, output: pathlib.Path, *extra: str) -> list[str]:
        """The command line of a conversion of the dense run's last checkpoint."""
        return [
            f"--gin_file={SPARSE}",
            "--gin_file=runs/upcycle.gin",
            "--gin.VOCAB_SIZE=384",
            "--gin.NUM_EXPERTS=8",
            f"--gin.INITIAL_CHECKPOINT_PATH={str(self.checkpoint)!r}",
            f"--gin.OUTPUT_CHECKPOINT_PATH={str(output)!r}",
            *extra,
        ]


def make(lab: Lab) -> Subjects:
    """Makes what is missing.

    Raises:
      RuntimeError: one of the commands failed; with its last line.
    """
    root = lab.folder / "subjects"
    subjects = Subjects(
        root / "text.jsonl",
        root / "cache",
        root / "dense",
        root / "converted" / f"checkpoint_{STEPS}",
    )
    if (subjects.converted / "proof.json").exists():
        return subjects
    root.mkdir(parents=True, exist_ok=True)
    sentences = (f"Sentence {n} speaks of {n * n}, the square of {n}." for n in range(4000))
    lines = [" ".join(next(sentences) for _ in range(10)) for _ in range(400)]
    subjects.text.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    # The only step that needs TensorFlow: in a process of its own, so that no fork inherits it.
    words = subjects.train_words(root / "nowhere")
    cached = subprocess.run(
        [
            sys.executable,
            "-m",
            "upcycle_jax.cache_tasks",
            *(
                word
                for word in words
                if "additional_cache" not in word and "USE_CACHED" not in word
            ),
            f"--tasks={TASK}",
            f"--output_cache_dir={subjects.cache}",
        ],
        capture_output=True,
        text=True,
    )
    if cached.returncode:
        raise RuntimeError(f"cache_tasks failed: {cached.stderr[-2000:]}")
    for command, argv in (
        ("train", subjects.train_words(subjects.dense)),
        ("upcycle", subjects.upcycle_words(subjects.converted)),
    ):
        done = lab.run(command, *argv, name=f"make_{command}")
        if done.code:
            raise RuntimeError(f"{command} failed with {done.code}: {done.text[-2000:]}")
    return subjects


def reference(lab: Lab, path: pathlib.Path) -> dict[str, str]:
    """Checksums of a checkpoint's leaves, computed in a child."""
    return lab.in_child(lambda: leaves(path))
