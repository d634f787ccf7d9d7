"""What one member of a new kernel adds to its files: parameters, rules, a forward, and plain torch to compare with."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Any

from kernelgraft.authoring import formulas
from kernelgraft.authoring.members import GatedMLP, Member, Norm, TwoLayerMLP

INDENT = "        "


@dataclass(frozen=True)
class Naming:
    """How one member is called.

    Attributes:
        argument: The argument of the layout's `__init__` that holds it.
        child: What its parent in the model calls it; "" for a single module.
        host: What the parent calls the member at which the layout stands.
        prefix: What packed names begin with.
        source: What original names begin with in `packing`.
    """

    argument: str
    child: str = ""
    host: str = ""
    prefix: str = ""
    source: str = ""

    @property
    def original(self) -> str:
        """The class in `reference.py`."""
        words = {"mlp": "MLP"}
        return "Original" + "".join(words.get(word, word.capitalize()) for word in self.argument.split("_"))


@dataclass
class Piece:
    """Text for each place; lines are without their indentation.

    Attributes:
        functions: Sources of functions for `reference.py`, by name.
        original: The class that computes the member in plain torch.
        arguments: What that class is built with in the tests.
        layout: Lines of the layout's `__init__`.
        packing: Packed name to original names.
        forward: Lines that turn `x` into `x`.
        imports: Names to import, by module of the package.
        files: Further files of the package, by name.
        linear: Whether `_linear` is needed.
    """

    original: str
    arguments: str
    layout: list[str]
    packing: dict[str, list[str]]
    forward: list[str]
    functions: dict[str, str] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    linear: bool = False


def template(name: str, **values: Any) -> str:
    """A file of `templates/` with its placeholders filled."""
    text = resources.files("kernelgraft.authoring").joinpath("templates", f"{name}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def piece(member: Member, naming: Naming, *, merge: bool, triton: bool, x: str) -> Piece:
    """What a member adds.

    Args:
        member: What it computes.
        naming: How it is called.
        merge: Whether gate and up become one parameter.
        triton: Whether Triton computes what there is a template for.
        x: The name of the variable that flows through the forward.
    """
    if isinstance(member, Norm):
        return _norm(member, naming, triton, x)
    if isinstance(member, GatedMLP):
        return _gated(member, naming, merge and bool(member.up), triton, x)
    return _two_layers(member, naming, x)


def in_triton(member: Member) -> bool:
    """Whether there is a Triton template for what a member computes."""
    if isinstance(member, Norm):
        return member.formula.__name__ in formulas.IN_TRITON
    return isinstance(member, GatedMLP) and member.is_silu


def rules(pieces: Sequence[Piece], namings: Sequence[Naming]) -> list[str]:
    """The packing as rules of Transformers, whose names are those of the parent's children.

    A rule for a layer leaves out `.weight`, so that it carries the bias too where there is one.
    """
    found: dict[str, None] = {}
    for each, naming in zip(pieces, namings, strict=True):
        for packed, sources in each.packing.items():
            # "mlp.up_proj.weight" becomes "mlp.up_proj"; "norm.weight" stays, as it is no layer inside a member.
            inner = [source.removeprefix(naming.source) for source in sources]
            names = [f"{naming.child}.{each}".removeprefix(".") for each in inner]
            target = f"{naming.host}.{packed}".removeprefix(".")
            if all("." in each for each in inner):
                names, target = [name.rpartition(".")[0] for name in names], target.rpartition(".")[0]
            if names == [target]:
                continue
            if len(names) == 1:
                found[f"WeightRenaming({_quoted(names[0])}, {_quoted(target)}),"] = None
            else:
                listed = ", ".join(map(_quoted, names))
                found[f"WeightConverter([{listed}], {_quoted(target)}, [Concatenate(dim=0)]),"] = None
    return list(found)


def _quoted(text: str) -> str:
    return f'"{text}"'


def _norm(member: Norm, naming: Naming, triton: bool, x: str) -> Piece:
    name, p, m = member.formula.__name__, naming.prefix, naming.argument
    tensors = [each for each in (member.weight, member.bias) if each]
    given = ", ".join(f"self.{p}{each}" for each in tensors)
    original = template(
        "original_norm.py",
        original=naming.original,
        input=member.input,
        eps_value=member.eps_value,
        eps=member.eps,
        weight=member.weight,
        bias=f"        self.{member.bias} = nn.Parameter(torch.zeros(size))\n" if member.bias else "",
        formula=name,
        given=", ".join(f"self.{each}" for each in tensors),
    )
    made = Piece(
        original=original,
        arguments="H",
        layout=[
            *(f"self.{p}{each} = nn.Parameter(torch.empty_like({m}.{each}))" for each in tensors),
            f"self.{p}eps = {m}.{member.eps}",
        ],
        packing={f"{p}{each}": [f"{naming.source}{each}"] for each in tensors},
        forward=[f"{x} = {name}({x}, {given}, self.{p}eps)"],
        functions={name: inspect.getsource(member.formula)},
        imports={"reference": name},
    )
    if triton and name in formulas.IN_TRITON:
        made.files = {f"triton_{name}.py": template("triton_norm.py", formula=name, **formulas.IN_TRITON[name])}
        made.imports = {f"triton_{name}": name}
    return made


def _gated(member: GatedMLP, naming: Naming, merged: bool, triton: bool, x: str) -> Piece:
    p, m, s = naming.prefix, naming.argument, naming.source
    one = merged or not member.up
    first = "gate_up_proj" if merged else member.gate
    if merged:
        layout = [f"self.{p}{first} = _linear({m}.{member.gate}, {_rows(m, member.gate)} + {_rows(m, member.up)})"]
    else:
        layout = [f"self.{p}{each} = _linear({m}.{each})" for each in (member.gate, member.up) if each]
    layout.append(f"self.{p}{member.down} = _linear({m}.{member.down})")
    packing = {}
    for tensor in ("weight", "bias"):
        if merged:
            packing[f"{p}{first}.{tensor}"] = [f"{s}{each}.{tensor}" for each in (member.gate, member.up)]
        for each in (*(() if merged else (member.gate, member.up)), member.down):
            if each:
                packing[f"{p}{each}.{tensor}"] = [f"{s}{each}.{tensor}"]
    halves = "gate, up" if member.gate_first else "up, gate"
    forward = [f"{halves} = self.{p}{first}({x}).chunk(2, dim=-1)"]
    if not one:
        forward = [f"gate, up = self.{p}{member.gate}({x}), self.{p}{member.up}({x})"]
    made = Piece("", "H, I", layout, packing, forward, linear=True)
    if triton and member.is_silu:
        name = f"type({m}.{member.act}).__name__"
        layout += [
            f'if "silu" not in {name}.lower():',
            f'    raise ValueError(f"this kernel computes silu, and the activation is {{{name}}}")',
        ]
        made.files = {"triton_silu_mul.py": template("triton_silu_mul.py")}
        made.imports = {"triton_silu_mul": "silu_mul"}
        forward.append(f"{x} = self.{p}{member.down}(silu_mul(gate, up))")
    else:
        layout.append(f"self.{p}{member.act} = {m}.{member.act}")
        if one:
            forward.append("# In one run, as the original's: on a CPU exp may differ in the last bit at a run's end.")
        gate = "gate.contiguous()" if one else "gate"
        forward.append(f"{x} = self.{p}{member.down}(self.{p}{member.act}({gate}) * up)")
    made.original = _original_gated(member, naming, halves)
    return made


def _original_gated(member: GatedMLP, naming: Naming, halves: str) -> str:
    x = member.input
    if member.up:
        layers = [f"self.{each} = nn.Linear(size, inner, bias=bias)" for each in (member.gate, member.up)]
        forward = [f"return self.{member.down}(self.{member.act}(self.{member.gate}({x})) * self.{member.up}({x}))"]
    else:
        layers = [f"self.{member.gate} = nn.Linear(size, 2 * inner, bias=bias)"]
        forward = [
            f"{halves} = self.{member.gate}({x}).chunk(2, dim=-1)",
            f"return self.{member.down}(self.{member.act}(gate) * up)",
        ]
    return template(
        "original_gated.py",
        original=naming.original,
        input=x,
        layers=indented(layers),
        down=member.down,
        act=member.act,
        activation="SiLU" if member.is_silu else "GELU",
        forward=indented(forward),
    )


def _two_layers(member: TwoLayerMLP, naming: Naming, x: str) -> Piece:
    p, m, s = naming.prefix, naming.argument, naming.source
    layers = (member.first, member.second)
    return Piece(
        original=template(
            "original_two.py",
            original=naming.original,
            input=member.input,
            first=member.first,
            second=member.second,
            act=member.act,
        ),
        arguments="H, I",
        layout=[
            *(f"self.{p}{each} = _linear({m}.{each})" for each in layers),
            f"self.{p}{member.act} = {m}.{member.act}",
        ],
        packing={f"{p}{each}.{t}": [f"{s}{each}.{t}"] for each in layers for t in ("weight", "bias")},
        forward=[f"{x} = self.{p}{member.second}(self.{p}{member.act}(self.{p}{member.first}({x})))"],
        linear=True,
    )


def _rows(module: str, layer: str) -> str:
    return f"{module}.{layer}.weight.shape[0]"


def indented(lines: Sequence[str], by: str = INDENT) -> str:
    """Lines as they stand in a file."""
    return "\n".join(f"{by}{line}" for line in lines)
