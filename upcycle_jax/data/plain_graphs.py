"""tf.data pipelines built without AutoGraph, which rewrites the source of each step: that takes
longer than all the rest of building one.
"""

from collections.abc import Callable

import tensorflow as tf


def without_autograph(build: Callable[[], tf.data.Dataset]) -> tf.data.Dataset:
    """Builds a dataset with AutoGraph off, and once more with it where a step needs it.

    AutoGraph gives Python's `if`, `while`, `for` and `and` a meaning for tensors. A step that uses
    them so cannot be traced without it: TensorFlow refuses to take a tensor for a bool or to loop
    over one. A step that can be traced without it gives the same graph.

    Args:
      build: makes the dataset; called a second time where the first one raises.
    """
    try:
        return tf.autograph.experimental.do_not_convert(build)()
    except Exception:  # Steps may wrap what TensorFlow raises; what is wrong is raised again.
        return build()
