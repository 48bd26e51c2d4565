"""The files of a job of predictions: finished ones, chunks of unfinished ones, and what they were
made with.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from upcycle_jax import distributed
from upcycle_jax.data import fingerprints
from upcycle_jax.files import replacing, write_whole
from upcycle_jax.training import full_disk, holding

_log = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
KEPT = "Finished batches are kept"


@dataclasses.dataclass(frozen=True)
class JobFiles:
    """The files of one job. Process 0 writes; the others wait where they will read.

    Attributes:
      mode: what is written of each example.
      output_dir: where the files are.
      part: which part of the examples, as file names say it: '00000-of-00001'.
      settings: what the results are made with, as JSON gives it back.
    """

    mode: str
    output_dir: epath.Path
    part: str
    settings: Mapping[str, Any]

    def file(self, task: str) -> epath.Path:
        """The finished file."""
        return self.output_dir / f"{task}-{self.mode}.jsonl-{self.part}"

    def _folder(self, task: str) -> epath.Path:
        return self.output_dir / f"tmp-{task}-{self.mode}-{self.part}"

    def _chunk(self, task: str, index: int) -> epath.Path:
        return self._folder(task) / f"chunk-{index:06}.jsonl"

    def _settings_of_file(self, task: str) -> epath.Path:
        return self.output_dir / f"settings-{task}-{self.mode}-{self.part}.json"

    def check(self, task: str) -> None:
        """Raises a ValueError where work of other settings is in the way."""
        finished = self.file(task).exists()
        path = self._settings_of_file(task) if finished else self._folder(task) / SETTINGS_FILE
        if not path.exists():
            if finished:
                _log.warning(
                    "%s is there, and nothing says what it was made with: it is left as it is",
                    self.file(task),
                )
            return
        different = [
            line.partition(":")[0]
            for line in fingerprints.differences(json.loads(path.read_text()), self.settings)
        ]
        if different:
            what = (
                f"{self.file(task)} is the result"
                if finished
                else f"{path.parent} holds an unfinished job"
            )
            raise ValueError(
                f"{what} of other settings ({', '.join(different)}): "
                + ("remove it" if finished else "finish it with those, remove the folder")
                + ", or choose another INFER_OUTPUT_DIR"
            )

    def _lease(self, task: str) -> str:
        return f"{task}-{self.mode}-{self.part}"

    def hold(self, task: str) -> contextlib.AbstractContextManager[holding.Hold]:
        """The lease of one task's part: other parts and tasks are other calls' to write."""
        return holding.hold_results(self.output_dir, self._lease(task), setting="INFER_OUTPUT_DIR")

    def refuse_if_held(self, task: str) -> None:
        """Raises a ValueError where another call that lives works on the task."""
        holding.refuse_if_results_held(
            self.output_dir, self._lease(task), setting="INFER_OUTPUT_DIR"
        )

    def write_files(self, files: Mapping[str, str]) -> None:
        """Leaves small files in the output folder."""
        if distributed.is_first():
            with full_disk.explained(str(self.output_dir), kept=KEPT):
                self.output_dir.mkdir(parents=True, exist_ok=True)
                for name, text in files.items():
                    (self.output_dir / name).write_text(text)

    def begin(self, task: str) -> int:
        """Makes the folder of chunks; returns how many of them are finished."""
        if distributed.is_first():
            folder = self._folder(task)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS_FILE).write_text(json.dumps(self.settings, indent=1))
        distributed.barrier(f"chunks of {task}")
        finished = 0
        while self._chunk(task, finished).exists():
            finished += 1
        distributed.barrier(f"chunks of {task} counted")
        return finished

    def write_chunk(self, task: str, index: int, lines: Sequence[str]) -> None:
        """Writes a chunk; one that is there is whole."""
        if distributed.is_first():
            write_whole(self._chunk(task, index), "".join(f"{line}\n" for line in lines))

    def merge(self, task: str, chunks: int) -> None:
        """Joins all chunks into the finished file, notes its settings and removes the chunks'
        folder.
        """
        if distributed.is_first():
            file = self.file(task)
            with replacing(file) as out:
                for index in range(chunks):
                    out.write(self._chunk(task, index).read_text())
                # Settings without their file are harmless; a file without settings is not.
                self._settings_of_file(task).write_text(json.dumps(self.settings, indent=1))
            _log.info("wrote %s", file)
        self.remove_chunks(task)
        distributed.barrier(f"{task} merged")

    def remove_chunks(self, task: str) -> None:
        """Removes the folder of chunks, which a call that was killed after the file was whole has
        left.
        """
        if distributed.is_first() and self._folder(task).exists():
            self._folder(task).rmtree()
