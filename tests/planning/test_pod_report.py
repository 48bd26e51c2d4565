"""Whether a run fits a slice, and what it sends: eight CPU devices stand in for the slice."""

import contextlib
import dataclasses
import io
import re

import jax
import pytest

from upcycle_jax import precompile
from upcycle_jax.costs.hardware import GIB
from upcycle_jax.planning import compilation, pod_report, topologies
from upcycle_jax.planning.collectives import Traffic
from upcycle_jax.planning.topologies import Chip, Topology

TINY = [
    "--gin_file=models/t5_1_1_tiny_upcycled.gin",
    "--gin_file=runs/continue_pretrain.gin",
    "--gin.RECIPE=@Recipe()",
    # One sparse layer in each stack.
    "--gin.T5Config.num_encoder_layers=1",
    "--gin.T5Config.num_decoder_layers=1",
    "--gin.ENCODER_SPARSE_LAYOUT=(0,)",
    "--gin.DECODER_SPARSE_LAYOUT=(0,)",
    "--gin.NUM_EXPERTS=8",
    "--gin.GROUP_SIZE=16",
    "--gin.BATCH_SIZE=16",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}",
]


def test_rounds_of_unknown_number_are_reported_as_such(compiled):
    report, rounds = compiled[0], Traffic("all-to-all", 4, 16, 3 * 2**20, open_ended=True)
    assert (
        "only the running program knows" not in report.text()
        and "at even load" not in report.text()
    )
    report = dataclasses.replace(report, step=dataclasses.replace(report.step, traffic=(rounds,)))
    line = (
        "all-to-all              16 x,    3.0 MiB per device, among groups of 4; per round of loops"
        " whose length only the running program"
    )
    assert line in report.text()
    assert (
        report.cells()[pod_report.COLUMNS.index("all-to-all / device / step")]
        == "3.0 MiB per round"
    )


def stand_in(patch):
    """Eight CPU devices stand in for whatever slice is asked for."""
    chip = Chip("v0", GIB, 1e12, 1e11, 1e10, "v0")
    patch.setattr(topologies, "prepare_environment", lambda: None)
    patch.setattr(topologies, "topology", lambda name: Topology(name, chip, tuple(jax.devices())))


@pytest.fixture
def on_cpu(monkeypatch):
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def compiled():
    """The report of a tiny model on a 2 x 4 mesh, through the command, and what the command printed
    and returned.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        stand_in(patch)
        reports, build = [], pod_report.build
        patch.setattr(pod_report, "build", lambda *args: reports.append(build(*args)) or reports[0])
        code = precompile.main([*TINY, "--topology=v0:2x4", "--gin.NUM_EXPERT_PARTITIONS=4"])
    return reports[0], printed.getvalue(), code


def with_memory(report, nbytes):
    chip = dataclasses.replace(report.topology.chip, memory_bytes=nbytes)
    return dataclasses.replace(report, topology=dataclasses.replace(report.topology, chip=chip))


def test_a_run_that_fits_says_what_it_needs_and_sends(compiled):
    report, text, code = compiled
    assert code == 0 and report.text() == text
    assert "mesh           data 2 x expert 4 x model 1" in text
    assert "train step: compiled in" in text and re.search(
        r"all-to-all +\d+ x, .* among groups of 4", text
    )
    # One program for wi_0 and wi_1, one for wo; both only place what is there.
    assert len(re.findall(r"upcycling restore of float32\[8,\d+,\d+\]: compiled", text)) == 2
    assert text.count("no collectives") == 2 and text.splitlines()[-1].startswith("FITS: ")


def test_a_run_that_does_not_fit_fails_and_names_what_to_change(
    compiled, on_cpu, monkeypatch, capsys
):
    monkeypatch.setattr(pod_report, "build", lambda *args: with_memory(compiled[0], 1000))
    code = precompile.main([*TINY, "--topology=v0:2x4"])
    text = capsys.readouterr().out
    assert code == 1 and "DOES NOT FIT" in text
    for change in (
        "NUM_EXPERT_PARTITIONS = 8:",
        "Partitioner.fsdp = True:",
        "NUM_MODEL_PARTITIONS = 2:",
        "a larger topology",
    ):
        assert change in text
    assert "state and gradients" in text and "instead of" in text


def test_the_program_is_compared_with_what_the_model_needs(compiled):
    """Nothing is computed again, and every device has its share of the work."""
    report, text, _ = compiled
    found = report.roofline
    assert found is not None and 0.98 < found.waste < 1.1
    assert f"{found.waste:.3f} times the model's; " in text
    assert f"MFU is at most {found.mfu_bound:.0%} ({found.limit})" in text
    place = pod_report.COLUMNS.index("program / model FLOPs")
    assert report.cells()[place : place + 3] == [
        f"{found.waste:.3f}",
        f"{found.bytes_per_flop:.2g} (0.1)",
        f"{found.mfu_bound:.0%} ({found.limit})",
    ]


def test_nothing_is_sent_that_is_not_expected(compiled):
    report, text, _ = compiled
    assert "every collective is an exchange of experts, a sum, or FSDP's" in text
    gather = Traffic("all-gather", 4, 3, 2**20)
    traffic = (*report.step.traffic, gather)
    report = dataclasses.replace(report, step=dataclasses.replace(report.step, traffic=traffic))
    assert "  NOT EXPECTED: all-gather               3 x," in report.text()


def test_a_row_of_the_table(compiled):
    head, rule, row = pod_report.markdown([compiled[0]]).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == len(pod_report.COLUMNS) + 1
    assert row.startswith("| continue_pretrain | ") and "data 2 x expert 4 x model 1" in row


def test_a_program_that_jax_cannot_read_is_reported_as_such(compiled):
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError(
                "INTERNAL: RET_CHECK failure: async-update instruction should have 1 operands but"
                " sees 3"
            )

    assert compilation._text(Unreadable()) is None
    report = dataclasses.replace(
        compiled[0], step=dataclasses.replace(compiled[0].step, traffic=None)
    )
    assert "collectives unknown" in report.text() and report.fits
    assert report.cells()[pod_report.COLUMNS.index("all-to-all / device / step")] == "unknown"
