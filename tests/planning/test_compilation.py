"""What the compiler says where a program does not fit."""

import jax

from upcycle_jax.costs.hardware import GIB
from upcycle_jax.planning import compilation


def test_what_the_compiler_says_it_lacks_is_read():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in"
                " memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
            )

    compiled = compilation._compiled("train step", Lowered)
    assert not compiled.fits and compiled.needed_bytes == int(20.5 * GIB)
