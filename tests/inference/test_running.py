"""Compiled prediction over host batches."""

import jax.numpy as jnp
import numpy as np

from upcycle_jax.inference.decoding import Greedy
from upcycle_jax.inference.running import Runner
from upcycle_jax.models.generation import Decoded
from upcycle_jax.partitioning import Partitioner


class Said:
    """A model whose sequences are known."""

    def __init__(self, tokens):
        self.tokens = jnp.asarray(tokens, jnp.int32)[:, None]

    def predict_batch_with_aux(self, params, batch, *, eos_id, **_):
        assert eos_id == (1, 7, 9)
        return Decoded(tokens=self.tokens, scores=jnp.zeros((len(self.tokens), 1)))

    def score_batch(self, params, batch):
        raise AssertionError("nobody asks")


def test_whatever_ends_a_prediction_eos_stands_there():
    # 0 is a token of many vocabularies: without EOS before them, the zeros at the end were text.
    said = Said([[5, 7, 0, 0], [1, 0, 0, 0], [5, 5, 5, 9], [5, 5, 5, 5], *[[0] * 4] * 4])
    runner = Runner(
        said, Partitioner(), batch_size=8, decoder=Greedy(), eos_ids=(1, 7, 9), max_length=4
    )
    found = runner.predict({}, {"inputs": np.zeros((8, 2), np.int32)}, range(4))
    want = [[5, 1, 0, 0], [1, 0, 0, 0], [5, 5, 5, 1], [5, 5, 5, 5]]
    assert found.tokens[:, 0].tolist() == want
