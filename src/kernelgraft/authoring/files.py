"""The text of each file of a new kernel repository."""

import re
import textwrap
from collections import Counter
from collections.abc import Sequence

from kernelgraft.authoring.copying import copied_init, imports_of
from kernelgraft.authoring.members import Norm
from kernelgraft.authoring.pieces import Naming, indented, piece, rules, template
from kernelgraft.authoring.places import Place

_FUTURE = "from __future__ import annotations\n\n"


class Files:
    """The files of a new repository whose kernel is written out from formulas."""

    def __init__(self, name: str, place: Place, triton: bool, merge: bool) -> None:
        words = [word for part in re.split(r"[-_]", name) for word in _words(part)]
        self.repository = "-".join(words).lower()
        self.kernel = name if name[0].isupper() and name.isalnum() else "".join(_capital(word) for word in words)
        self.package = self.repository.replace("-", "_")
        self.module = "kernel"
        self.place, self.triton, self.merge = place, triton, merge
        self.is_fusion = bool(place.patterns)
        self._read_members()

    def _read_members(self) -> None:
        place = self.place
        self.by_init = not self.is_fusion and isinstance(place.members[0], Norm) and place.members[0].has_init
        self.init = None if self.is_fusion or self.by_init or place.cls is None else copied_init(place.cls)
        self.input = place.members[0].input
        self.namings = self._namings()
        self.pieces = [
            piece(member, naming, merge=self.merge, triton=self.triton, x=self.input)
            for member, naming in zip(place.members, self.namings, strict=True)
        ]

    def files(self) -> dict[str, str]:
        """Text by path."""
        code = f"torch-ext/{self.package}"
        said = {"repository": self.repository, "package": self.package, "kernel": self.kernel, "module": self.module}
        return {
            "build.toml": template("build.toml", **said),
            "kernels.toml": self._config(),
            "README.md": template(
                "README.md",
                **said,
                summary=self._summary,
                key=self._key(self.place.names, self.place.patterns),
                commands=self._commands(),
                targets=", then ".join(f"`{name}`" for name in self.place.names),
                parameters=", ".join(f"`{name}`" for name in self._parameters),
                loaders=self._loaders,
            ),
            f"{code}/__init__.py": template("init.py", summary=self._summary),
            f"{code}/layers.py": template("layers.py", **said),
            f"{code}/{self.module}.py": self._code(),
            **{f"{code}/{name}": text for name, text in self._further().items()},
            **{f"tests/{name}": text for name, text in self._tests(said).items()},
        }

    def _further(self) -> dict[str, str]:
        """The package's files beside the kernel's."""
        return {"reference.py": self._reference(), **{k: v for each in self.pieces for k, v in each.files.items()}}

    @property
    def _parameters(self) -> list[str]:
        return [name for each in self.pieces for name in each.packing if "bias" not in name]

    def _namings(self) -> list[Naming]:
        kinds = ["norm" if isinstance(member, Norm) else "mlp" for member in self.place.members]
        total, seen, namings = Counter(kinds), Counter[str](), []
        for index, kind in enumerate(kinds):
            seen[kind] += 1
            argument = kind if total[kind] == 1 else f"{kind}_{seen[kind]}"
            if not self.is_fusion:
                namings.append(Naming(argument, self.place.children[0], self.place.children[0]))
                continue
            prefix = f"{argument}_" if kind == "norm" or total[kind] > 1 else ""
            children = self.place.children
            namings.append(Naming(argument, children[index], children[0], prefix, f"{argument}."))
        return namings

    # --- the package

    def _code(self) -> str:
        imports: dict[str, list[str]] = {}
        for each in self.pieces:
            for module, name in each.imports.items():
                imports.setdefault(module, [])
                imports[module] += [name] if name not in imports[module] else []
        imported = [f"from .{module} import {', '.join(sorted(imports[module]))}\n" for module in sorted(imports)]
        plain, guarded = imports_of([self.init] if self.init else [])
        rules_text = self._rules()
        linear = template("linear.py") if any(each.linear for each in self.pieces) else ""
        forward = [line for each in self.pieces for line in each.forward]
        text = template(
            "kernel.py",
            title=self._title,
            shapes=self._shapes,
            future=_FUTURE if self.init else "",
            **sorted_imports(plain),
            imports="".join(imported),
            rules=f"{guarded_imports(guarded)}{rules_text}{linear}{self._original()}\n",
            kernel=self.kernel,
            made=self._made,
            packing_note="packed name: original name" + ("s, by the arguments of __init__" if self.is_fusion else ""),
            packing=indented([f'"{k}": {_listed(v)},' for each in self.pieces for k, v in each.packing.items()]),
            mapping="    conversion_mapping = _rules()\n" if rules_text else "",
            init=self._init(),
            summary=self._summary,
            note=self._note,
            input=self.input,
            forward=indented(_returning(forward, self.input)),
        )
        return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"\n\n\n(?=    )", "\n\n", text))

    def _rules(self) -> str:
        if not (self.is_fusion or self.init):
            return ""
        lines = rules(self.pieces, self.namings)
        if not lines:
            return ""
        used = [name for name in ("Concatenate", "WeightConverter") if any(f"{name}(" in line for line in lines)]
        return template("rules.py", imported=", ".join([*used, "WeightRenaming"]), rules=indented(lines))

    def _original(self) -> str:
        """The class that the layout builds to see the shapes of its layers."""
        if self.init is None:
            return ""
        said = f"{self.place.cls.__name__} of {self.init.module}" if self.place.cls else ""
        return template("built.py", said=said, init=self.init.indented())

    def _init(self) -> str:
        lines = [line for each in self.pieces for line in each.layout]
        if self.by_init:
            norm = self.place.members[0]
            assert isinstance(norm, Norm)
            tensors = [f"self.{name} = nn.Parameter(torch.ones(size))" for name in self.pieces[0].packing]
            body = ["super().__init__()", *tensors, "self.eps = eps"]
            return f"    def __init__(self, size, eps={norm.eps_value}):\n{indented(body)}\n"
        arguments = ", ".join(naming.argument for naming in self.namings)
        if self.is_fusion:
            return f"    def __init__(self, {arguments}):\n{indented(['super().__init__()', *lines])}\n"
        if self.init is None:
            text = f"    def __init__(self, {arguments}):\n{indented(['super().__init__()', *lines])}\n"
            return (
                f"{text}\n    @classmethod\n    def from_module(cls, {arguments}):\n        return cls({arguments})\n"
            )
        return template(
            "two_inits.py",
            given=self.init.arguments,
            call=self.init.call,
            argument=arguments,
            lines=indented(lines),
        )

    def _reference(self) -> str:
        functions = {name: source for each in self.pieces for name, source in each.functions.items()}
        classes = [each.original for each in self.pieces]
        body = "\n\n".join([*functions.values(), *classes])
        functional = "from torch.nn import functional as F\n" if "F." in body else ""
        said = '"""What the kernel must answer, in plain torch. The tests compare with it."""'
        return f"{said}\n\nimport torch\nfrom torch import nn\n{functional}\n\n{body}"

    # --- what stands beside it

    def _config(self) -> str:
        pairs = ", ".join(f'["{n}", "{p}"]' for n, p in zip(self.place.names, self.place.patterns, strict=False))
        key = f"fuses = [{pairs}]" if self.is_fusion else f'replaces = "{self.place.names[0]}"'
        return f'[[kernel]]\n{key}\nuse = "./torch-ext/{self.package}:{self.kernel}"\n'

    def _tests(self, said: dict[str, str]) -> dict[str, str]:
        originals = [naming.original for naming in self.namings]
        paths = [f"*.{naming.argument}" for naming in self.namings]
        call = "x"
        for naming in self.namings:
            call = f"self.{naming.argument}({call})"
        sizes = "H, I = 64, 96" if any("I" in each.arguments.split(", ") for each in self.pieces) else "H = 64"
        text = template(
            "test.py",
            **said,
            key=self._key(originals, paths if self.is_fusion else ()),
            sizes=sizes,
            block=indented(
                [
                    f"self.{naming.argument} = reference.{naming.original}({each.arguments})"
                    for naming, each in zip(self.namings, self.pieces, strict=True)
                ]
            ),
            call=call,
        )
        return {f"test_{self.package}.py": text}

    def _key(self, names: Sequence[str], patterns: Sequence[str]) -> str:
        if not self.is_fusion:
            return f'    "{names[0]}"'
        pairs = [f'("{name}", "{pattern}"),' for name, pattern in zip(names, patterns, strict=True)]
        return f"    (\n{indented(pairs)}\n    )"

    def _commands(self) -> str:
        name, config = self.repository, f"{self.repository}/kernels.toml"
        commands = [
            (f"pytest {name}/tests", "against plain torch, in a small model"),
            (f"kernelgraft check {name} --model MODEL", "all that is wrong with it, at once"),
            (f"kernelgraft verify MODEL --kernels {config}", "on the activations of a model"),
            (f"kernelgraft bench MODEL --kernels {config}", "is it faster?"),
            (f"kernelgraft export {name}", "writes build/"),
            (f"kernel-builder upload {name} --repo-id owner/{name}", "publishes it"),
        ]
        width = max(len(each) for each, _ in commands)
        return "\n".join(f"{each:<{width}}  # {why}" for each, why in commands)

    # --- words

    @property
    def _title(self) -> str:
        return f"`{self.kernel}`: {self._summary if self.is_fusion else self._summary[0].lower() + self._summary[1:]}"

    @property
    def _summary(self) -> str:
        names = list(self.place.names)
        return f"{', '.join(names[:-1])} and {names[-1]} in one." if self.is_fusion else f"A kernel for {names[0]}."

    @property
    def _note(self) -> str:
        if any(each.files for each in self.pieces):
            return "What is not in Triton yet is right, and as slow as torch is: your kernel goes here."
        return "Right, and as slow as torch is: your kernel goes here."

    @property
    def _shapes(self) -> str:
        shapes = f"Shapes: {self.input} and what comes out (..., H)"
        return f"{shapes}, inside the MLP (..., I)." if any(each.linear for each in self.pieces) else f"{shapes}."

    @property
    def _made(self) -> str:
        if self.by_init or self.init:
            return "Made with what the original is made with."
        return "Made of the modules whose place it takes." if self.is_fusion else "Made of the module that it replaces."

    @property
    def _loaders(self) -> str:
        if self.is_fusion or self.by_init or self.init:
            return (
                "The loader of Transformers itself takes it too, on an accelerator: `use_kernels=True` with its own "
                "`KernelConfig`."
            )
        return "Its layout is made by `from_module`, which the loader of Transformers itself does not know."


def guarded_imports(lines: Sequence[str]) -> str:
    """Imports that may fail: a kernel of the Hub is loaded where torch alone is sure to be."""
    return template("guarded.py", lines=textwrap.indent("\n".join(lines), "    ")) if lines else ""


def sorted_imports(lines: Sequence[str]) -> dict[str, str]:
    """Imports that come before those of torch, and those that come after."""
    first = [line for line in lines if "torch" not in line]
    after = [line for line in lines if "torch" in line]
    block = "".join(f"{line}\n" for line in first)
    return {"first": f"{block}\n" if block else "", "plain": "".join(f"{line}\n" for line in after)}


def _words(part: str) -> list[str]:
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*|[a-z0-9]+", part) or [part]


def _capital(word: str) -> str:
    return word[0].upper() + word[1:]


def _listed(names: Sequence[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return quoted[0] if len(quoted) == 1 else f"[{', '.join(quoted)}]"


def _returning(lines: Sequence[str], x: str) -> list[str]:
    """The lines with the last assignment to `x` as the return."""
    *before, last = lines
    return [*before, f"return {last.removeprefix(f'{x} = ')}"]
