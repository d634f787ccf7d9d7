"""Programs: what is proved about them, how originals read from packed tensors, and what is refused."""

from collections import Counter
from random import Random

import pytest
import torch
from torch import nn

from kernelgraft.conversion import LazyTensor, Piece, Program, TensorSource, View
from kernelgraft.conversion.coverage import covered_once, written
from kernelgraft.conversion.moves import Dim, Move
from kernelgraft.errors import ConversionError

H, I = 6, 4  # noqa: E741 -- hidden and intermediate size


def sources(**shapes):
    tensors = {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}
    return tensors, {name: LazyTensor.of(TensorSource(name, tensor)) for name, tensor in tensors.items()}


TENSORS, LAZY = sources(gate=(I, H), up=(I, H), down=(H, I), norm=(H,))
MLP = Program.trace(
    {
        "gate_up": torch.cat([LAZY["gate"], LAZY["up"]]),
        "down": LAZY["down"].t(),
        "scale": LAZY["norm"],
    },
    LAZY,
)


def trace(**outputs):
    return Program.trace(outputs, LAZY)


def test_the_common_case_is_exactly_one_narrow():
    assert [reading.steps for reading in MLP.part("up").readings] == [(("narrow", 0, I, I),)]
    assert all(not reading.finish for name in TENSORS for reading in MLP.part(name).readings)
    assert {name: MLP.part(name).kind for name in TENSORS} == {
        "gate": "view",
        "up": "view",
        "down": "view",
        "norm": "whole",
    }
    assert {name: MLP.part(name).describe() for name in TENSORS} == {
        "gate": "gate_up[0:4]",
        "up": "gate_up[4:8]",
        "down": "down.transpose(0, 1)",
        "norm": "scale",
    }
    assert {name: MLP.describe(name) for name in MLP.targets} == {
        "gate_up": "cat(gate, up, dim=0)",
        "down": "down.transpose(0, 1)",
        "scale": "norm",
    }
    assert (MLP.irreversible, MLP.computed, MLP.casts) == ((), {}, {})


@pytest.mark.parametrize(
    ("output", "kind", "text"),
    [
        (torch.stack([LAZY["gate"], LAZY["up"]]), "view", "p[1]"),
        (torch.cat([LAZY["gate"], LAZY["up"]], 1), "view", "p[:, 6:12]"),
        (torch.stack([LAZY["gate"], LAZY["up"]], 1).flatten(0, 1), "view", "p[1:8:2]"),
        (torch.cat([LAZY["up"][:2], LAZY["gate"], LAZY["up"][2:]]), "assembled", "cat(p[0:2], p[6:8], dim=0)"),
        (LAZY["up"].view(2, 2, H).transpose(0, 1).reshape(I, H), "assembled", "p.unflatten(0, (2, 2)).transpose(0, 1)"),
        (LAZY["up"].reshape(-1), "view", "p.view((4, 6))"),
        (LAZY["up"].unsqueeze(0), "view", "p.view((4, 6))"),
        (torch.stack([LAZY["gate"].t(), LAZY["up"].t()]), "view", "p[1].transpose(0, 1)"),
    ],
)
def test_how_a_part_is_said(output, kind, text):
    part = trace(p=output).part("up")
    assert part.kind == kind
    assert part.describe().startswith(text)
    packed = {"p": output.materialize(copy=True)}
    assert torch.equal(part.read(packed.__getitem__), TENSORS["up"])


PARTS = {name: MLP.part(name) for name in TENSORS}


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.cat([TENSORS["gate"], TENSORS["up"]]))
        self.down = nn.Parameter(TENSORS["down"].t().contiguous())

    def forward(self, x):
        gate, up, down = (PARTS[name].read(lambda name: getattr(self, name)) for name in ("gate", "up", "down"))
        return (x @ gate.t() * (x @ up.t())) @ down.t()


def test_parts_work_through_torchs_transformations():
    module, x = Packed(), torch.randn(3, H)
    expected = (x @ TENSORS["gate"].t() * (x @ TENSORS["up"].t())) @ TENSORS["down"].t()
    torch.testing.assert_close(module(x), expected)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    parameters = {name: torch.stack([p.detach(), p.detach() * 2]) for name, p in module.named_parameters()}
    results = torch.func.vmap(lambda p: torch.func.functional_call(module, p, (x,)))(parameters)
    torch.testing.assert_close(results[0], expected)
    torch.testing.assert_close(results[1], expected * 8)
    module(x).sum().backward()
    assert module.gate_up.grad.abs().sum() > 0


def test_parts_are_live_and_write_in_place():
    packed = {name: nn.Parameter(torch.zeros(shape)) for name, shape in MLP.targets.items()}
    for name, tensor in TENSORS.items():
        MLP.part(name).write(packed.__getitem__, tensor.to(torch.float64))
    assert torch.equal(packed["gate_up"], torch.cat([TENSORS["gate"], TENSORS["up"]]))
    before = MLP.part("up").read(packed.__getitem__)
    with torch.no_grad():
        packed["gate_up"][I:] = 7
    assert (before == 7).all()
    with pytest.raises(ConversionError, match=r"up has shape \(4, 6\), and a value of shape \(5, 6\)"):
        MLP.part("up").write(packed.__getitem__, torch.zeros(5, H))


def test_casts():
    program = Program.trace({"p": torch.cat([LAZY["gate"], LAZY["up"]]).to(torch.bfloat16)}, LAZY)
    assert program.casts == {"p": "bfloat16"}
    assert program.describe("p") == "cat(gate, up, dim=0).to(bfloat16)"
    assert program.lossy == ("gate", "up")
    assert program.why("gate") == "a cast on the way narrows its values"
    out = torch.empty(2 * I, H)
    program.fill("p", out, TENSORS.__getitem__)
    assert torch.equal(out, torch.cat([TENSORS["gate"], TENSORS["up"]]).bfloat16().float())
    wider = Program.trace({"p": LAZY["gate"].to(torch.float64)}, LAZY)
    assert "gate" not in wider.irreversible
    assert Program.from_json(program.to_json()) == program


def test_what_cannot_be_had_back():
    program = Program.trace(
        {
            "sliced": LAZY["gate"][1:],
            "twice": torch.cat([LAZY["up"], LAZY["up"]]),
            "spread": LAZY["norm"].expand(3, H),
            "computed": LAZY["down"] * 2,
        },
        LAZY,
        {"computed": ("down",)},
    )
    assert {name: program.why(name) for name in program.irreversible} == {
        "gate": "6 of its 24 elements are in no packed parameter",
        "up": "its 24 elements are used 48 times, so one value could be changed without the other",
        "down": "it is only used to compute computed",
        "norm": "its 6 elements are used 18 times, so one value could be changed without the other",
    }
    program.check_filled()
    assert program.inverse().targets == {}
    assert program.describe("computed") == "computed from down"
    part = program.part("gate")
    assert part.kind == "lost"
    for use in (lambda: part.read(TENSORS.__getitem__), lambda: part.write(TENSORS.__getitem__, TENSORS["gate"])):
        with pytest.raises(ConversionError, match=r"6 of its 24 elements .* list the name in `dropped`"):
            use()
    with pytest.raises(ConversionError, match="computed is computed from down and not only moved"):
        program.fill("computed", torch.empty(H, I), TENSORS.__getitem__)
    partly = torch.cat([LAZY["gate"][:2], LAZY["gate"][:2]])
    assert "some of its elements are used twice" in Program.trace({"p": partly}, LAZY).why("gate")


def test_lazy_sources_are_pulled_through():
    """The model's parameters may be lazy themselves, over the keys of a checkpoint."""
    halves = {
        name: [LazyTensor.of(TensorSource(f"{name}{i}", t)) for i, t in enumerate(tensor.split(2))]
        for name, tensor in TENSORS.items()
    }
    originals = {name: torch.cat(parts) for name, parts in halves.items()}
    for name in MLP.targets:
        out = torch.empty(MLP.targets[name])
        MLP.fill(name, out, originals.__getitem__)
        expected = torch.empty(MLP.targets[name])
        MLP.fill(name, expected, TENSORS.__getitem__)
        assert torch.equal(out, expected)


def test_sites_whose_sources_are_laid_out_alike_or_otherwise():
    """Expert by expert, as a checkpoint has them, in two sites alike, and in a third one in another order."""
    whole = LazyTensor.of(TensorSource("experts", torch.empty(3, I, H)))
    program = Program.trace({"packed": whole.transpose(1, 2)}, {"experts": whole})
    for order in ([0, 1, 2], [0, 1, 2], [2, 1, 0]):
        experts = [torch.randn(I, H) for _ in order]
        lazies = [LazyTensor.of(TensorSource(f"{index}", expert)) for index, expert in enumerate(experts)]
        found = program.lazy("packed", {"experts": torch.stack([lazies[index] for index in order])})
        expected = torch.stack([experts[index] for index in order]).transpose(1, 2)
        assert torch.equal(found.materialize(), expected)
        assert {source.name for source in found.sources} == {"0", "1", "2"}


def by_hand(*regions, shape=(4, 6)):
    pieces = [
        Piece(View("p", size, stride, offset), View("s", size, stride, offset)) for size, stride, offset in regions
    ]
    return Program({"p": shape}, {"s": shape}, tuple(pieces), {}, {})


@pytest.mark.parametrize(
    "regions",
    [
        [((24,), (1,), 0)],
        [((2, 6), (12, 1), 0), ((2, 6), (12, 1), 6)],
        [((4, 2), (6, 1), 0), ((4, 4), (6, 1), 2)],
        [((8,), (3,), 0), ((8,), (3,), 1), ((8,), (3,), 2)],
        [((2, 3), (6, 2), 0), ((2, 3), (6, 2), 1), ((12,), (1,), 12)],
        [((3,), (8,), 0), ((7,), (1,), 1), ((7,), (1,), 9), ((7,), (1,), 17)],
    ],
)
def test_filled_exactly_once(regions):
    by_hand(*regions).check_filled()
    assert by_hand(*regions).irreversible == ()


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [((23,), (1,), 0)],
        [((24,), (1,), 0), ((1,), (1,), 3)],
        [((12,), (1,), 0), ((12,), (1,), 11)],
        [((2, 6), (12, 1), 0), ((2, 6), (12, 1), 7)],
        [((8,), (3,), 0), ((8,), (3,), 1), ((8,), (3,), 1)],
        [((24,), (0,), 0)],
    ],
)
def test_not_filled_exactly_once(regions):
    program = by_hand(*regions)
    with pytest.raises(ConversionError, match=r"each of the 24 elements of p \[4, 6\] must be written exactly once"):
        program.check_filled()


def test_the_proof_agrees_with_counting():
    random = Random(0)
    agreed = 0
    for _ in range(4000):
        moves, counts = [], Counter()
        for _ in range(random.randint(1, 3)):
            n, m, s, t, offset = (random.randint(low, 4) for low in (1, 1, 1, 1, 0))
            moves.append(Move("s", (Dim(n, s * t, 1), Dim(m, s, 1)), offset, 0))
            counts.update(offset + i * s * t + j * s for i in range(n) for j in range(m))
        numel = counts.total()
        expected = all(counts[place] == 1 for place in range(numel))
        assert covered_once(written(moves), numel) is expected
        agreed += expected
    assert agreed > 20


def test_a_large_tensor_is_proved_without_marking_it():
    big = {name: LazyTensor.of(TensorSource(name, torch.empty(8192, 16384, device="meta"))) for name in ("a", "b", "c")}
    for output in (torch.cat(list(big.values()), 1), torch.stack(list(big.values()), -1).transpose(0, 1)):
        program = Program.trace({"p": output}, big)
        program.check_filled()
        assert program.irreversible == ()


def test_unknown_names_and_wrong_shapes():
    with pytest.raises(ConversionError, match="'q' is no source of this conversion; it has gate, up, down, norm"):
        MLP.part("q")
    with pytest.raises(ConversionError, match="'q' is no target"):
        MLP.fill("q", torch.empty(1), TENSORS.__getitem__)
    with pytest.raises(ConversionError, match=r"scale has shape \(6,\)"):
        MLP.fill("scale", torch.empty(7), TENSORS.__getitem__)
    with pytest.raises(ConversionError, match=r"norm has shape \(6,\)"):
        MLP.fill("scale", torch.empty(6), lambda _: torch.empty(7))
    with pytest.raises(ConversionError, match="reads gate, which the conversion was not given"):
        Program.trace({"p": LAZY["gate"]}, {"up": LAZY["up"]})


def test_tensors_without_elements():
    tensors, lazies = sources(a=(0, 4), b=(3, 4))
    program = Program.trace({"p": torch.cat([lazies["a"], lazies["b"]]), "q": lazies["a"]}, lazies)
    program.check_filled()
    assert program.irreversible == ()
    packed = {"p": tensors["b"], "q": tensors["a"]}
    for name, tensor in tensors.items():
        part = program.part(name)
        assert torch.equal(part.read(packed.__getitem__), tensor)
        part.write(packed.__getitem__, tensor)


def test_parts_that_need_strides_take_values_from_anywhere_in_memory():
    sources = {"a": torch.arange(90.0), "b": torch.arange(90.0, 92.0)}
    lazies = {name: LazyTensor.of(TensorSource(name, tensor)) for name, tensor in sources.items()}
    halves = torch.cat([lazies["a"], lazies["b"]]).reshape(23, 4).chunk(2, 1)
    program = Program.trace({"x": halves[0].contiguous(), "y": halves[1].contiguous()}, lazies)
    packed = {name: torch.zeros(30, 2)[5:28] for name in "xy"}
    wide = torch.stack([sources["a"], -sources["a"]], 1)
    for value in (sources["a"], torch.cat([torch.zeros(3), sources["a"]])[3:], wide[:, 0]):
        for target in packed.values():
            target.zero_()
        program.part("a").write(packed.__getitem__, value)
        assert torch.equal(program.part("a").read(packed.__getitem__), sources["a"])
