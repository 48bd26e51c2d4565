"""scripts/vision_story.sh at its smallest, and called again."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "vision_story.sh"


@pytest.mark.slow
def test_the_whole_story(tmp_path):
    story = tmp_path / "story"
    environ = {**os.environ, "STORY_DIR": str(story), "STORY_PYTHON": sys.executable}
    environ.pop("XLA_FLAGS", None)
    command = [str(SCRIPT), "--smoke"]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for said in ("proof: PASSED", "first batch of glyphs, split validation", "Done. Open"):
        assert said in done.stdout, done.stdout
    for name, step in (("dense", 4), ("dense_continued", 6), ("upcycled", 6)):
        result = json.loads(
            (story / name / "few_shot" / f"glyphs-held_out-2_shots-{step}.json").read_text()
        )
        assert result["classes"] == 20 and len(result["accuracies"]) == 5
    assert (story / "report" / "report.html").is_file()
    again = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    # Three runs, the conversion and figure 15; few-shot results are printed instead.
    assert again.returncode == 0 and again.stdout.count("is there already") == 5
