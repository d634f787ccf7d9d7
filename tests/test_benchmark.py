"""What `Graft.benchmark` measures, counts, refuses and leaves behind. No test looks at how long anything took."""

import dataclasses
import json
import random

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernelgraft
import toys
import zoo
from kernelgraft import Kernel
from kernelgraft.benchmark import WHOLE_MODEL, Report
from kernelgraft.benchmark._originals import originals_in, originals_of
from kernelgraft.benchmark._tasks import ATTENTIONS
from kernelgraft.errors import GraftError, VerificationError

H, I = toys.H, toys.I  # noqa: E741 - the field's letter
NORM, FUSED = "FastNorm for Norm", "NormMLP for Norm + MLP"
KERNELS = {
    "Norm": Kernel(toys.FastNorm, toys.FastNormLayout),
    toys.FUSION: Kernel(toys.NormMLP, toys.NormMLPLayout),
}
TOKENS = (1, 6)
REPEATS = 3


def grafted(kernels=KERNELS, model=None):
    return kernelgraft.graft(toys.model() if model is None else model, kernels, example_inputs=toys.inputs())


def benchmark(graft, **options):
    return graft.benchmark(toys.inputs(), **{"tokens": TOKENS, "repeats": REPEATS, **options})


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other on a busy machine take longer than these tensors do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def verified():
    """A verification of `KERNELS`."""
    return grafted().verify(toys.inputs(), every_site=False)


@pytest.fixture(scope="module")
def report(verified):
    return benchmark(grafted(), verified=verified)


def rows(report, kind=None):
    return {(row.kind, row.case, row.tokens): row for row in report.rows if kind in (None, row.kind)}


def test_a_row_for_each_kind_direction_and_number_of_tokens(report):
    sites = {(kind, case, n) for kind in (NORM, FUSED) for case in ("forward", "backward") for n in TOKENS}
    assert set(rows(report)) == {*sites, (WHOLE_MODEL, "forward", None), (WHOLE_MODEL, "training step", None)}
    assert len(report.rows) == len(rows(report))
    assert {(row.kind, row.site) for row in report.rows} == {
        (NORM, "norm"),
        (FUSED, "layers.0.norm"),
        (WHOLE_MODEL, ""),
    }
    assert rows(report)[NORM, "forward", 6].input == "hidden_states float32[1, 6, 8]"
    assert report.notes == ("peak memory is not measured on the CPU",)


def test_what_ran_were_the_kernels(report):
    num_sites = {NORM: 1, FUSED: 1, WHOLE_MODEL: 3}
    for row in report.rows:
        assert (row.kernel_calls, row.original_calls) == (REPEATS * num_sites[row.kind], 0)


@pytest.mark.parametrize("tokens", TOKENS)
def test_bytes_and_operations_of_sites(report, tokens):
    x = 4 * tokens * H
    weights = {NORM: 4 * H, FUSED: 4 * (H + 3 * H * I)}
    products = {NORM: 0, FUSED: 3 * 2 * tokens * H * I}
    for kind in (NORM, FUSED):
        forward, backward = (rows(report)[kind, case, tokens] for case in ("forward", "backward"))
        assert forward.bytes == weights[kind] + 2 * x
        assert forward.operations == products[kind]
        # It reads weights, input and the output's gradient, and writes the gradients of weights and input.
        assert backward.bytes == 2 * weights[kind] + 3 * x
        assert backward.operations == 2 * products[kind]


def test_bytes_and_operations_of_the_whole_model(report):
    x, tokens = 4 * 15 * H, 15
    weights = 4 * (2 * (H + 3 * H * I) + H)
    products = 2 * 3 * 2 * tokens * H * I
    forward, step = (rows(report)[WHOLE_MODEL, case, None] for case in ("forward", "training step"))
    assert (forward.bytes, forward.operations) == (weights + 2 * x, products)
    assert (step.bytes, step.operations) == (2 * weights + x, 3 * products)


def test_shares_are_of_what_the_machine_was_measured_to_do(report):
    machine, row = report.machine, rows(report)[FUSED, "forward", 6]
    timing = dataclasses.replace(row.original, median=2000.0)
    assert report.copy_share(row, timing) == pytest.approx(row.bytes / 2 / machine.copy_bandwidth)
    assert report.matrix_share(row, timing) == pytest.approx(row.operations / 2 / machine.matrix_rate)
    assert machine.copy_bandwidth > 0 < machine.matrix_rate
    assert (machine.matrix_dtype, machine.cold_cache) == ("float32", 0)


def test_quantiles_are_in_order(report):
    for row in report.rows:
        for side in (row.original, row.grafted):
            assert 0 < side.p20 <= side.median <= side.p80
            assert side.peak_bytes is None
        assert row.speedup == row.original.median / row.grafted.median


def test_json_there_and_back(report):
    data = json.loads(json.dumps(report.to_json()))
    assert Report.from_json(data) == report
    row = data["rows"][0]
    assert row["speedup"] == report.rows[0].speedup
    assert row["grafted"]["copy_share"] == report.copy_share(report.rows[0], report.rows[0].grafted)


def test_the_page(report):
    page = str(report)
    for text in ("Benchmark of Model on cpu in float32", report.date, f"torch {torch.__version__}", "caches are warm"):
        assert text in page
    for title in (f"{NORM} at norm", f"{FUSED} at layers.0.norm", "The whole model", "note: peak memory"):
        assert title in page
    lines = [line for line in page.splitlines() if line.startswith(("  forward", "  backward", "  training step"))]
    assert len(lines) == len(report.rows)
    assert all("x  " in line for line in lines)


# --- order


def test_original_and_kernel_take_turns():
    ran = []

    class Norm(toys.Norm):
        def forward(self, hidden_states):
            ran.append("original")
            return super().forward(hidden_states)

    def forward(self, hidden_states):
        ran.append("kernel")
        return F.rms_norm(hidden_states, self.scale.shape, self.scale, self.eps)

    model = toys.model(num_layers=0)
    model.norm.__class__ = Norm
    graft = grafted({"Norm": toys.kernel(forward, toys.FastNormLayout, has_backward=False)}, model)
    benchmark(graft, tokens=(6,), repeats=5, whole_model=False)
    assert ran[-10:] == ["original", "kernel"] * 5


# --- refusals


def wrong_norm(self, hidden_states):
    return F.rms_norm(hidden_states, self.scale.shape, self.scale, 0.1)


WRONG = {**KERNELS, "Norm": toys.kernel(wrong_norm, toys.FastNormLayout, "FastNorm")}


def test_a_wrong_kernel_is_not_timed():
    with pytest.raises(VerificationError, match=r"Model is not timed.*\n  FastNorm for Norm \(norm, ") as caught:
        benchmark(grafted(WRONG, toys.model(num_layers=1)), whole_model=False)
    assert FUSED not in str(caught.value)
    assert not caught.value.report.passed


def test_a_report_that_did_not_pass_is_refused():
    graft = grafted({"Norm": WRONG["Norm"]}, toys.model(num_layers=0))
    found = graft.verify(toys.inputs(), whole_model=False)
    with pytest.raises(VerificationError, match="FastNorm for Norm") as caught:
        benchmark(graft, verified=found)
    assert caught.value.report is found


def test_a_report_of_another_graft_is_refused(verified):
    with pytest.raises(
        VerificationError,
        match=r"not of this graft: it is of .*NormMLP.*; this graft is Model on cpu with FastNorm for Norm at 3 sites",
    ):
        benchmark(grafted({"Norm": KERNELS["Norm"]}), verified=verified)


def test_a_report_does_not_vouch_for_what_is_wrong_now(verified):
    with pytest.raises(VerificationError, match="FastNorm for Norm is not timed: the report handed in"):
        benchmark(grafted(WRONG), verified=verified)


def test_what_the_verification_left_out_is_left_out(verified):
    checks = tuple(check for check in verified.checks if check.kind >= 0)
    kinds = tuple(dataclasses.replace(kind, gradients="not asked for") for kind in verified.kinds)
    part = dataclasses.replace(verified, checks=checks, kinds=kinds)
    report = benchmark(grafted(), tokens=(1,), verified=part)
    assert {(row.kind, row.case) for row in report.rows} == {(NORM, "forward"), (FUSED, "forward")}
    assert f"not timed: {WHOLE_MODEL}: the verification did not try it" in report.notes
    assert f"not timed: {NORM}, backward: verification says: not asked for" in report.notes


def test_a_kernel_for_inference_alone_has_no_backward():
    forward_only = toys.kernel(toys.FastNorm.forward, toys.FastNormLayout, "Inference", has_backward=False)
    report = benchmark(grafted({"Norm": forward_only}, toys.model(num_layers=0)), tokens=(6,))
    assert set(rows(report)) == {("Inference for Norm", "forward", 6), (WHOLE_MODEL, "forward", None)}
    said = "not checked: Inference says has_backward = False"
    assert f"not timed: Inference for Norm, backward: verification says: {said}" in report.notes
    assert f"not timed: {WHOLE_MODEL}, training step: Inference for Norm: verification says of gradients: {said}" in (
        report.notes
    )
    assert "has_backward = False" in str(report)


def test_a_call_that_a_kernel_refuses_is_a_note():
    @staticmethod
    def supports(hidden_states):
        return hidden_states.shape[1] < 6 or "too many tokens"

    few = toys.kernel(toys.FastNorm.forward, toys.FastNormLayout, "Few", supports=supports)
    graft = grafted({"Norm": few}, toys.model(num_layers=0))
    report = benchmark(graft, whole_model=False)
    assert {(row.case, row.tokens) for row in report.rows} == {("forward", 1), ("backward", 1)}
    refused = [note for note in report.notes if note.startswith("not timed: Few for Norm, tokens: 6, forward: ")]
    assert "too many tokens" in refused[0]


def test_a_removed_graft():
    graft = grafted()
    graft.remove()
    with pytest.raises(GraftError, match="was removed, so there is nothing to time"):
        benchmark(graft)


@pytest.mark.parametrize("options", [{"repeats": 0}, {"tokens": ()}, {"tokens": (32, 0)}])
def test_numbers_that_cannot_be_meant(options):
    with pytest.raises(GraftError, match="needs at least one run"):
        benchmark(grafted(), **options)


# --- no trace


def test_nothing_stays_behind(verified):
    model = toys.model().train()
    graft = grafted(model=model)
    model.layers[0].eval()
    model(toys.inputs()).sum().backward()
    before, calls = toys.state(model), graft.calls
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate()
    benchmark(graft, verified=verified)
    assert toys.state(model) == before
    assert graft.calls == calls
    assert all(torch.equal(parameter.grad, grads[name]) for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.is_grad_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    graft = grafted(model=toys.model().cuda())
    verified = graft.verify(toys.inputs(), every_site=False)
    benchmark(graft, verified=verified)
    before, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    report = benchmark(graft, verified=verified)
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert report.device.startswith("cuda (")
    assert report.machine.cold_cache >= 2 * torch.cuda.get_device_properties(0).L2_cache_size
    sides = [side for row in report.rows for side in (row.original, row.grafted)]
    assert all(side.peak_bytes > 0 for side in sides)
    assert all(0 < side.p20 <= side.median <= side.p80 for side in sides)


# --- originals


def test_originals_of_every_kind_of_packing_are_what_they_were():
    model = zoo.model()
    with torch.no_grad():
        expected = model(zoo.inputs())
    graft = zoo.graft(model)
    with torch.no_grad(), originals_in(model, originals_of(graft)):
        found = model(zoo.inputs())
    assert torch.equal(found, expected)
    assert graft.calls.kernel == graft.calls.reference == 0


def test_a_stateless_kernel():
    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)

    graft = grafted({"Norm": toys.kernel(forward)}, toys.model(num_layers=0))
    report = benchmark(graft, tokens=(6,), whole_model=False)
    assert {(row.case, row.site) for row in report.rows} == {("forward", "norm"), ("backward", "norm")}
    assert all((row.kernel_calls, row.original_calls) == (REPEATS, 0) for row in report.rows)
    assert report.rows[0].bytes == 4 * (H + 2 * 6 * H)


# --- Transformers


@pytest.mark.transformers
def test_a_language_model():
    tiny = pytest.importorskip("tiny")
    kernels = {tiny.FUSION: f"{tiny.EXAMPLE}:RMSNormMLP"}
    graft = kernelgraft.graft(tiny.model("qwen3", num_hidden_layers=1), kernels)
    verified = graft.verify(every_site=False, dtypes=())
    report = graft.benchmark(tokens=(1, 9, 512), repeats=2, verified=verified)
    whole = rows(report, WHOLE_MODEL)
    cases = {("prefill", 1), ("prefill", 9), ("decode", 1), ("decode", 9), ("training step", 9)}
    assert {(case, tokens) for _, case, tokens in whole} == cases
    assert all(row.original_calls == 0 < row.kernel_calls for row in report.rows)
    assert {row.tokens for row in report.rows if row.kind != WHOLE_MODEL} == {1, 9, 512}
    assert "not timed: 512 tokens in one sequence: the model has positions for 62" in report.notes
    assert any("training step: a single token has none after it" in note for note in report.notes)
    keys_and_values = 4 * 2 * 2 * 8 * 9  # float32, keys and values, heads, head_dim, tokens
    logits = 4 * 64
    weights = sum(each.nbytes for each in (*graft.model.parameters(), *graft.model.buffers()))
    assert whole[WHOLE_MODEL, "decode", 9].bytes == weights + keys_and_values + 8 + logits


def test_operations_of_an_attention_whose_key_heads_are_shared():
    query, key, value = (torch.randn(2, heads, 16, 32, requires_grad=True) for heads in (8, 2, 2))
    with FlopCounterMode(display=False, custom_mapping=ATTENTIONS) as forward:
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with FlopCounterMode(display=False, custom_mapping=ATTENTIONS) as backward:
        out.sum().backward()
    product = 2 * 2 * 8 * 16 * 16 * 32  # scores, or what they weigh
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product


def test_progress_is_told_of_every_row(verified):
    told = []
    options = {"tokens": (1,), "repeats": 1, "verified": verified, "progress": lambda *each: told.append(each)}
    made = kernelgraft.benchmark.benchmark(grafted(), toys.inputs(), **options)
    assert [done for _, done, _ in told] == list(range(len(made.rows)))
    assert all(done < total for _, done, total in told)
