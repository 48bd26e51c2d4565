"""A command line of this project as data, and the folders that commands read and write."""

import dataclasses
import shlex


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the commands read and write.

    Attributes:
      results: folder of the runs; each gets a MODEL_DIR below it.
      dense_checkpoints: folder with `t5_1_1_<size>/checkpoint_1000000` and `vit_<size>`, the dense
        checkpoints (any readable format).
    """

    results: str = "results/paper"
    dense_checkpoints: str = "/data/dense"


@dataclasses.dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
      words: from 'python' on.
      makes: what it gives, in words.
    """

    words: tuple[str, ...]
    makes: str

    @property
    def gin_files(self) -> list[str]:
        """The gin files it reads."""
        return [
            word.removeprefix("--gin_file=")
            for word in self.words
            if word.startswith("--gin_file=")
        ]

    def text(self) -> str:
        """The line as a shell takes it."""
        return " ".join(map(quoted_word, self.words))


def quoted_word(word: str) -> str:
    """A word as a shell takes it; gin's quoted text in double quotes, which people can read."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
