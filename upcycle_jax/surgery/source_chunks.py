"""Where the leaves of a source lie on the disk, be it one checkpoint or several."""

from collections.abc import Iterable

from upcycle_jax.checkpoints.stored_chunks import StoredChunks
from upcycle_jax.checkpoints.stored_sums import BLOCK_BYTES, stored_sums
from upcycle_jax.progress import Progress
from upcycle_jax.surgery.parents import JoinedReader, Reader


class SourceChunks:
    """The stored chunks of a source's leaves; None: of a source that is gone, nothing is known."""

    def __init__(self, source: Reader | None):
        self._source = source
        readers = source.readers if isinstance(source, JoinedReader) else (source,)
        self._chunks = {id(reader): StoredChunks(reader) for reader in readers}

    def origin(self, name: str) -> tuple[StoredChunks, str]:
        """The chunks of the checkpoint that has a leaf, and the leaf's name there."""
        if isinstance(self._source, JoinedReader):
            reader, name = self._source.origin(name)
            return self._chunks[id(reader)], name
        return self._chunks[id(self._source)], name

    def sums(
        self,
        names: Iterable[str],
        *,
        block_bytes: int = BLOCK_BYTES,
        progress: Progress | None = None,
    ) -> dict[str, str]:
        """Checksums of leaves as they are stored (`stored_sums`), of those that have any."""
        by_checkpoint: dict[int, tuple[StoredChunks, dict[str, str]]] = {}
        for name in names:
            chunks, leaf = self.origin(name)
            by_checkpoint.setdefault(id(chunks), (chunks, {}))[1][leaf] = name
        found: dict[str, str] = {}
        for chunks, leaves in by_checkpoint.values():
            texts = stored_sums(
                chunks,
                [(leaf, None) for leaf in leaves],
                block_bytes=block_bytes,
                progress=progress,
            )
            found |= {leaves[leaf]: text for (leaf, _), text in texts.items()}
        return found
