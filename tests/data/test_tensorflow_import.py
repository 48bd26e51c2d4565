"""What the first import of TensorFlow writes."""

import subprocess
import sys

QUIET = """
import os, sys
from upcycle_jax.data import tensorflow_import
sys.stderr.write("before\\n")
with tensorflow_import._without_chatter():
    os.write(2, b"E0000 00:00:1.5 7 cuda_platform.cc:52] failed call to cuInit\\nsomething else\\n")
tensorflow_import.quietly()
import tensorflow as tf
assert tf.constant(1) + 1 == 2
"""


def test_lines_about_missing_gpus_are_left_out_and_nothing_else():
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["before", "something else"]
