"""What the table makes of rows."""

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


def row(case, seconds=1.0, **more):
    peaks = {"RssAnon": 0, "VmRSS": 0}
    return {"case": case, "seconds": seconds, "bytes": 1000, "peaks": peaks, "warm_up": False, "small": False, **more}


def judged(rows, group="cpu"):
    import table

    return {each.work: (each.reached, each.holds) for each in table.judge(table.Rows(rows), group)}


def test_a_target_that_is_reached_and_one_that_is_missed():
    found = judged([row("planning", 0.9)])
    assert found["planning, 100,000 tensors: seconds"] == ("0.900", True)
    found = judged([row("planning", 1.1)])
    assert found["planning, 100,000 tensors: seconds"] == ("1.100", False)


def test_medians_count_and_warm_ups_and_failures_do_not():
    rows = [row("planning", seconds) for seconds in (0.5, 0.7, 9.0)]
    rows += [row("planning", 99.0, warm_up=True), {"case": "planning", "error": "no", "warm_up": False, "small": False}]
    assert judged(rows)["planning, 100,000 tensors: seconds"] == ("0.700", True)


def test_the_limit_is_the_fastest_way_and_is_named():
    rows = [row("limit-registered-4x64", 2.0), row("limit-pread-8x16", 1.0), row("ours-plain", 1.2)]
    found = judged([each | {"our_pinned": 0} for each in rows], "gpu")
    assert found["8B to the GPU, plain: time over the limit's [limit-pread-8x16]"] == ("1.200", True)


def test_what_was_not_measured_is_neither_reached_nor_missed():
    assert {holds for _, holds in judged([]).values()} == {None}
    assert {holds for _, holds in judged([], "gpu").values()} == {None}


def test_host_memory_is_anonymous_and_pinned_together():
    import table

    found = row("ours-plain", torch_pinned=2, our_pinned=3)
    found["peaks"]["RssAnon"] = 5
    assert table.host_bytes(found) == 10


def test_the_rows_as_text():
    import table

    text = table.render(
        [row("planning", 0.9), {"case": "moe-ours", "error": "it broke", "warm_up": False, "small": True}], "cpu"
    )
    assert "moe-ours: it broke" in text
    assert text.endswith("Small models: the numbers say nothing.")
    (line,) = [line for line in text.splitlines() if line.startswith("planning, 100,000")]
    assert line.split()[-1] == "ok"


def test_the_table_of_a_gpu_has_every_line():
    import table

    gpu = {"gpu_allocated": 1200, "torch_pinned": 0, "our_pinned": 5}
    rows = [row(case, **gpu) for case in ("bus", "limit-pread-8x16", "ours-plain", "ours-merged", "save-ours")]
    rows += [row(case, **gpu) for case in ("save-transformers", "save-write-direct")]
    rows.append(row("update", update_s=[1.0, 1.1], stream_s=[1.3], copy_s=[1.0, 1.0], extra_bytes=0, graph=True))
    rows.append(row("sweep", sweep=[[4, 64, 1, False, 0.7]]))
    found = judged(rows, "gpu")
    assert None not in {holds for _, holds in found.values()}
    assert found["update of the grafted 8B over a plain device copy"] == ("1.050", True)
    assert found["the same from an iterator"] == ("1.300", False)
    assert found["update: bytes extra"] == ("0", True)
    assert found["save: times as fast as Transformers'"] == ("1.00", False)
    assert "populate" in table.render(rows, "gpu")


def test_rows_of_two_runs_are_not_compared():
    import table

    machine = {"gpu": None, "cpu": "CPU", "cores": 2, "torch": "2", "source": "abc"}
    rows = [row("dense-ours", 1.0, run="1"), row("dense-transformers", 1.0, run="2")]
    first, second = table.by_run([each | {"group": "cpu", "machine": machine} for each in rows], "cpu")
    assert first.startswith("1 on CPU, 2 cores, torch 2, source abc")
    for text in (first, second):
        (line,) = [line for line in text.splitlines() if line.startswith("dense, nothing re-laid-out: time over")]
        assert line.endswith("not measured")
