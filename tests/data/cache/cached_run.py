"""`upcycle_jax.train` where nothing that only prepares data can be imported: `python cached_run.py
SECONDS_PER_BATCH FLAG... [-- FLAG...]`, one run after the other.

A process of its own, to be killed. Not a test module.
"""

import sys
import time

REFUSED = (
    "tensorflow",
    "seqio",
    "t5",
    "tensorflow_datasets",
    "tensorflow_text",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
)


def main(seconds: str, *flags: str) -> int:
    for name in REFUSED:
        sys.modules[name] = (
            # importing it fails, and looking for it finds nothing: as where it is not installed
            None
        )
    from upcycle_jax import train
    from upcycle_jax.data.cache import batches

    read = batches.CachedBatchIterator.__next__

    def slowly(self):
        time.sleep(float(seconds))
        return read(self)

    batches.CachedBatchIterator.__next__ = slowly
    words, codes = [*flags, "--"], []
    while words:
        end = words.index("--")
        codes.append(train.main(words[:end]))
        words = words[end + 1 :]
    print(f"exit codes: {codes}")
    found = [
        name
        for name, module in sys.modules.items()
        if module is not None and name.partition(".")[0] in REFUSED
    ]
    print(f"imported: {found}")
    return codes[-1]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
