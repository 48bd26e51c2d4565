"""Damage after the conversion is found and told by side: source, result or record."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from upcycle_jax import surgery
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint, stored_sums
from upcycle_jax.checkpoints.ocdbt import stored_values
from upcycle_jax.checkpoints.orbax_reader import OrbaxReader
from upcycle_jax.checkpoints.reader import METADATA_KEY
from upcycle_jax.checkpoints.stored_chunks import StoredChunks
from upcycle_jax.moe import roles
from upcycle_jax.surgery.recorded import (
    PLAN_FILE,
    PROOF_FILE,
    SEAL,
    read_recorded,
    sealed,
    small_files,
)
from upcycle_jax.trees import LeafSpec

DENSE = "target/encoder/layers_1/mlp/wi_0/kernel"
EXPERT = "target/encoder/layers_1/mlp/expert/wi_0/kernel"
ROUTER = "target/encoder/layers_1/mlp/router/router_weights/w/kernel"
SIZES = {"d": 32, "f": 48}


def save(path, arrays):
    specs = roles.inferred(
        {name: LeafSpec(array.shape, array.dtype) for name, array in arrays.items()}
    )
    with create_checkpoint(path, specs, step=1000, metadata={}) as writer:
        for name, array in arrays.items():
            if name != "state/step":
                writer.write(name, None, array)
        writer.finalize()
    return open_checkpoint(path)


class Pair:
    """A dense checkpoint and what became of it, on disk."""

    def __init__(self, small, folder, init=None, optimizer_state="tiled", **options):
        self.source = folder / "dense"
        self.target = folder / "sparse"
        source = save(self.source, small.filled(small.tree(**SIZES)))
        self.specs = small.tree(sparse=(1,), **SIZES)
        recipe = surgery.Recipe(
            expert_init=init or surgery.CopyExperts(), optimizer_state=optimizer_state, seed=4
        )
        self.plan = surgery.make_plan(source.specs(), self.specs, recipe)
        surgery.apply_offline(self.plan, source, self.target, **options)
        self.first = self.prove()
        assert self.first.ok, self.first.text()
        (self.target / PLAN_FILE).write_text(json.dumps(self.plan.json()))
        self.first.context["files"] = small_files(open_checkpoint(self.target))
        self.first.write(self.target)
        self.values = self.read()

    def prove(self, *, gone=False):
        source = None if gone else open_checkpoint(self.source)
        target = open_checkpoint(self.target)
        assert not gone or read_recorded(target).specs == source_specs(self.plan)
        return surgery.prove(self.plan, source, target)

    def read(self):
        reader = open_checkpoint(self.target)
        return {name: reader.read(name).tobytes() for name in reader.specs()}


def source_specs(plan):
    used = {n: s for row in plan.rows for n, s in zip(row.sources, row.source_specs, strict=True)}
    used |= {item.source: item.spec for item in plan.dropped}
    return roles.inferred(
        {name: LeafSpec(spec.shape, spec.dtype) for name, spec in sorted(used.items())}
    )


@pytest.fixture
def pair(small, tmp_path):
    return Pair(small, tmp_path)


@pytest.fixture
def noisy(small, tmp_path):
    (tmp_path / "noisy").mkdir()
    return Pair(small, tmp_path / "noisy", surgery.NoisyCopies(0.05))


def place_of(folder, key):
    """The file and the middle of a stored value."""
    reader = open_checkpoint(folder)
    value = stored_values(pathlib.Path(reader.item), reader.context)[key]
    assert value.file, f"{key} lies in the index"
    return pathlib.Path(reader.item) / value.file, value.offset + value.length // 2


def flip(path, at, bit=1):
    with open(path, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ bit]))


def test_every_copy_is_proved_by_the_chunks_it_shares(pair):
    experts = [leaf for leaf in pair.first.leaves if leaf.operation == "tile x4"]
    assert experts and all(leaf.shared == leaf.identical == leaf.elements for leaf in experts)
    copies = [leaf for leaf in pair.first.leaves if leaf.operation == "copy"]
    assert sum(leaf.shared for leaf in copies) > 0
    assert all(leaf.identical == leaf.elements for leaf in copies)
    shared = sum(leaf.shared for leaf in pair.first.leaves)
    assert f"{shared} values are proved by stored chunks that they share" in pair.first.text()
    record = open_checkpoint(pair.target).metadata()["surgery"]
    assert set(record["leaves"]) == set(open_checkpoint(pair.source).specs())
    assert record["leaves"][DENSE]["checksum"].startswith("sum64:")


class Counted:
    """The stored bytes that are read for their checksums, and the leaves that are decoded."""

    def __init__(self, monkeypatch):
        self.ranges, self.decoded = [], []
        read, parts = stored_sums.read_into, OrbaxReader.read_parts

        def read_into(file, value, start, room):
            if value.inline is None:
                number = os.fstat(file.open(value.file).fileno()).st_ino
                self.ranges.append((number, value.offset + start, room.size))
            return read(file, value, start, room)

        def read_parts(reader, name, indices):
            self.decoded.append((reader.path.name, name))
            return parts(reader, name, indices)

        monkeypatch.setattr(stored_sums, "read_into", read_into)
        monkeypatch.setattr(OrbaxReader, "read_parts", read_parts)


def data_ranges(folder):
    """Where the values of all leaves lie that are not in the index, each once."""
    reader = open_checkpoint(folder)
    return sorted(
        (os.stat(pathlib.Path(reader.item) / value.file).st_ino, value.offset, value.length)
        for key, value in stored_values(pathlib.Path(reader.item), reader.context).items()
        if value.file and not key.endswith(".zarray")
    )


@pytest.mark.parametrize("gone", [False, True])
def test_the_proof_reads_the_shared_bytes_once_and_decodes_none_of_them(pair, gone, monkeypatch):
    stored = data_ranges(pair.source)  # Before the source is gone.
    experts = {row.target for row in pair.plan.rows if row.operation.stacked}
    if gone:
        pair.source.rename(pair.source.with_name("elsewhere"))
    counted = Counted(monkeypatch)
    proof = pair.prove(gone=gone)
    assert proof.ok, proof.text()
    assert sorted(counted.ranges) == [place for place in stored if place in counted.ranges]
    assert gone or sorted(counted.ranges) == stored
    assert not experts & {name for _, name in counted.decoded}
    if not gone:  # What is decoded: the step, the router drawn anew and its slots.
        assert {path for path, name in counted.decoded if name != "state/step"} <= {"sparse"}
        assert all("router" in name for _, name in counted.decoded if name != "state/step")


def test_a_record_without_checksums_of_stored_bytes_is_proved_by_decoding(pair, monkeypatch):
    """Results of older versions."""
    path = pair.target / "_CHECKPOINT_METADATA"
    (pair.target / PROOF_FILE).unlink()
    content = json.loads(path.read_text())
    record = content["custom_metadata"][METADATA_KEY]
    leaves = record["surgery"]["leaves"]
    assert all(leaf.pop("stored").startswith("stored64:") for leaf in leaves.values())
    content["custom_metadata"][METADATA_KEY] = sealed(
        {name: value for name, value in record.items() if name != SEAL}
    )
    path.write_text(json.dumps(content))
    counted = Counted(monkeypatch)
    for gone in (False, True):
        proof = pair.prove(gone=gone)
        assert proof.ok, proof.text()
        if not gone:
            assert [leaf.identical for leaf in proof.leaves] == [
                leaf.identical for leaf in pair.first.leaves
            ]
    assert not counted.ranges
    assert ("dense", DENSE) in counted.decoded and ("sparse", EXPERT) in counted.decoded


def test_values_that_are_not_finite_have_no_checksum_of_stored_bytes(small, tmp_path):
    """So that every proof looks at them, and says so."""
    arrays = small.filled(small.tree(**SIZES))
    slot = "state/param_states/encoder/layers_1/mlp/wi_0/kernel/v_row"
    arrays[slot][1] = np.inf
    source = save(tmp_path / "dense", arrays)
    plan = surgery.make_plan(
        source.specs(), small.tree(sparse=(1,), **SIZES), surgery.Recipe(optimizer_state="tiled")
    )
    surgery.apply_offline(plan, source, tmp_path / "sparse")
    recorded = read_recorded(open_checkpoint(tmp_path / "sparse"))
    assert set(recorded.checksums) - set(recorded.stored) == {slot}
    proof = surgery.prove(plan, source, open_checkpoint(tmp_path / "sparse"))
    assert [leaf.problems for leaf in proof.leaves if not leaf.ok] == [["1 values are not finite"]]


def test_a_source_that_is_stored_anew_is_the_same_by_its_values(small, tmp_path):
    """Other chunks of the same values: the bytes differ, the leaves do not."""
    pair = Pair(small, tmp_path, materialize=True)
    reader = open_checkpoint(pair.source)
    specs = reader.specs()
    arrays = {name: reader.read(name) for name in specs}
    shutil.rmtree(pair.source)
    with create_checkpoint(pair.source, specs, step=1000, metadata={}, compress=False) as writer:
        for name, array in arrays.items():
            if name != "state/step":
                writer.write(name, None, array)
        writer.finalize()
    proof = pair.prove()
    assert proof.ok, proof.text()


def test_damage_in_a_chunk_that_both_share(pair):
    file, at = place_of(pair.source, "target.encoder.layers_1.mlp.wi_0.kernel/0.0")
    assert os.stat(file).st_nlink == 2
    before = open_checkpoint(pair.source).read(DENSE)
    flip(file, at)
    proof = pair.prove()
    assert not proof.ok and not proof.leaves_ok
    text = proof.text()
    assert "source: DAMAGED" in text and "result: DAMAGED" in text and "record: intact" in text
    for side in ("source", "result"):
        (line,) = proof.damage[side]
        assert line.startswith({"source": DENSE, "result": EXPERT}[side]) and file.name in line
    try:
        assert (open_checkpoint(pair.source).read(DENSE) != before).any()
    except ValueError:
        assert "cannot be read" in text
    flip(file, at)
    assert pair.prove().ok


def test_a_source_that_changed_later_and_a_result_that_did_not(small, tmp_path):
    pair = Pair(small, tmp_path, materialize=True)
    assert all(
        not leaf.shared or leaf.operation == "copy" or leaf.elements < 2000
        for leaf in pair.first.leaves
    )
    shutil.rmtree(pair.source)
    arrays = small.filled(small.tree(**SIZES))
    arrays[DENSE][3, 4] += 1
    save(pair.source, arrays)
    proof = pair.prove()
    assert not proof.ok and [leaf.path for leaf in proof.leaves if not leaf.ok] == [EXPERT]
    assert [line.split()[0] for line in proof.damage["source"]] == [DENSE]
    assert not proof.damage["result"] and not proof.damage["record"]
    assert pair.prove(gone=True).ok


def test_a_source_leaf_that_was_dropped_is_watched_too(small, tmp_path):
    pair = Pair(small, tmp_path, optimizer_state="reset")
    (slot,) = [
        d.source for d in pair.plan.dropped if d.source.endswith("layers_1/mlp/wo/kernel/v_row")
    ]
    reader = open_checkpoint(pair.source)
    reader._array(slot).write(reader.read(slot) + 1).result()
    proof = pair.prove()
    assert not proof.ok and proof.leaves_ok and not proof.damage["result"]
    assert [line.split()[0] for line in proof.damage["source"]] == [slot]


def test_one_expert_of_the_result_is_damaged(small, tmp_path):
    pair = Pair(small, tmp_path, materialize=True)
    file, at = place_of(pair.target, "target.encoder.layers_1.mlp.expert.wi_0.kernel/2.0.0")
    flip(file, at)
    for gone in (False, True):
        proof = pair.prove(gone=gone)
        assert not proof.ok and not proof.damage["source"]
        assert [line.partition(",")[0] for line in proof.damage["result"]] == [EXPERT]
        (wrong,) = [leaf for leaf in proof.leaves if not leaf.ok]
        assert wrong.path == EXPERT and ("expert 2" in wrong.problems[0] or not wrong.readable)


def test_a_drawn_value_off_by_less_than_the_generator_may_be(noisy):
    """Once proved, the bits of drawn values count, too."""
    reader = open_checkpoint(noisy.target)
    changed = reader.read(EXPERT)
    changed[1, 2, 3] = np.nextafter(changed[1, 2, 3], np.float32(9))
    reader._array(EXPERT)[1:2].write(changed[1:2]).result()
    proof = noisy.prove()
    (wrong,) = [leaf for leaf in proof.leaves if not leaf.ok]
    assert wrong.path == EXPERT and wrong.max_ulps == 1 and wrong.blame == "result"
    assert "is not what was proved at the conversion" in wrong.problems[0]


def test_a_source_that_is_gone(pair, noisy):
    pair.source.rename(pair.source.with_name("elsewhere"))
    for each in (pair, noisy):
        proof = each.prove(gone=True)
        assert proof.ok, proof.text()
        assert "source: gone: the result is proved against the checksums" in proof.text()
        assert proof.json()["source_gone"]
        # What needs no source is drawn and compared as ever.
        (router,) = [leaf for leaf in proof.leaves if leaf.path == ROUTER]
        assert router.drawn == router.regenerated == router.elements
        total = sum(leaf.identical + leaf.by_checksum + leaf.drawn for leaf in proof.leaves)
        assert total == sum(leaf.elements for leaf in proof.leaves)
    (noisy.target / PROOF_FILE).unlink()
    proof = noisy.prove(gone=True)
    assert not proof.ok and "no checksum of this leaf is recorded" in proof.text()
    assert all("/expert/" in leaf.path for leaf in proof.leaves if not leaf.ok)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", PROOF_FILE, PLAN_FILE])
def test_damage_in_the_record(pair, name):
    path = pair.target / name
    whole = path.read_bytes()
    digits = [at for at, byte in enumerate(whole) if chr(byte).isdigit()]
    for content in (
        whole[: len(whole) // 2],
        b"\xff" + whole,
        b"[]",
        b"",
        whole[: digits[len(digits) // 2]] + b"x" + whole[digits[len(digits) // 2] + 1 :],
        whole.replace(b'"seal"', b'"sael"').replace(b'"seed"', b'"sead"'),
    ):
        assert content != whole
        path.write_bytes(content)
        proof = pair.prove()
        assert not proof.ok and proof.leaves_ok, proof.text()
        assert "record: DAMAGED" in proof.text()
        assert any(name in line for line in proof.damage["record"])
        assert not proof.damage["source"] and not proof.damage["result"]
    path.write_bytes(whole)
    assert pair.prove().ok


def test_random_mutations_of_all_files_are_named_or_change_no_value(pair):
    """A byte in any file of either side; nothing that changes a value passes."""
    rng = np.random.default_rng(0)
    files = sorted(
        path
        for folder in (pair.source, pair.target)
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size
    )
    named = 0
    for _ in range(36):
        path = files[rng.integers(len(files))]
        at, bit = int(rng.integers(path.stat().st_size)), 1 << int(rng.integers(8))
        flip(path, at, bit)
        try:
            proof = pair.prove()
            if proof.ok:
                assert pair.read() == pair.values, path
                inside = path.relative_to(pair.target) if pair.target in path.parents else None
                assert inside is None or inside.parts[0] == "state", path
            else:
                assert any(proof.damage.values()), proof.text()
                named += 1
        except ValueError as error:
            assert str(path.parents[-2]) in str(error)
            named += 1
        flip(path, at, bit)
    assert named > 18
    assert pair.prove().ok


def test_chunks_are_the_same_only_by_their_place(pair):
    """An expert that refers to another leaf's chunk is not taken for a copy."""
    reader = open_checkpoint(pair.target)
    key = "target.encoder.layers_1.mlp.expert.{}.kernel/2.0.0"
    value = reader.store.read(key.format("wi_1")).result().value
    reader.store.write(key.format("wi_0"), value).result()
    proof = pair.prove()
    (wrong,) = [leaf for leaf in proof.leaves if not leaf.ok]
    assert wrong.path == EXPERT and wrong.problems[0].startswith("expert 2: ")
    assert "these are the bits of source leaf" in wrong.problems[0]
    assert wrong.shared == 3 * wrong.elements // 4
    assert StoredChunks(open_checkpoint(pair.target)).slab(EXPERT, 2) != StoredChunks(
        open_checkpoint(pair.target)
    ).slab(EXPERT, 1)
