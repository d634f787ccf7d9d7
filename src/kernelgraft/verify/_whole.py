"""The whole model with its kernels beside the same model on its originals: outputs, greedy tokens with a cache, loss.

There is no copy of the model in a higher precision to measure both against. What stands in its place is the original's
own noise: the model on its originals once more, with the output of every site moved by a rounding. A right kernel
changes the model's outputs by about as much.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from kernelgraft.graft import Graft
from kernelgraft.verify._choices import Choices
from kernelgraft.verify._drawing import Drawing, ModelInputs, cache_name, following, takes
from kernelgraft.verify._tolerance import MARGIN, distance, rounding
from kernelgraft.verify._values import direct, spelt
from kernelgraft.verify.report import WHOLE_MODEL, Check, Figure

NEIGHBOURS = (1, 1, 1, *[MARGIN] * 12)
"""By how many roundings outputs are moved in runs of the originals, made one by one until the kernels are no further
off than the one that strays furthest, row by row: at first by one, then by as many as a right kernel may be off."""

NUM_STEPS = 8
"""Tokens of the greedy search, after a prompt of one batch."""


@dataclass(frozen=True)
class _Subject:
    graft: Graft
    on_originals: Callable[[], AbstractContextManager[None]]
    training: bool
    seed: int

    @property
    def paths(self) -> list[str]:
        """The modules that kernels run in."""
        return [path for installed in self.graft._installed for path in installed.modules]

    def kernels(self, run: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        torch.manual_seed(self.seed)
        return run()

    def originals(self, run: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        torch.manual_seed(self.seed)
        with self.on_originals():
            return run()

    def noisy(self, run: Callable[[], dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        for draw, times in enumerate(NEIGHBOURS):
            generator = torch.Generator().manual_seed(self.seed + draw)
            with ExitStack() as stack:
                for installed in self.graft._installed:
                    last = list(installed.modules.values())[-1]
                    handle = last.register_forward_hook(_moving(generator, times))
                    stack.callback(handle.remove)
                moved = self.originals(run)
            yield moved


def _moving(generator: torch.Generator, times: float) -> Callable[..., Any]:
    def moved(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return _moved(output, generator, times)
        if type(output) is tuple:
            return tuple(_moved(each, generator, times) if isinstance(each, torch.Tensor) else each for each in output)
        for name, tensor in direct(output, ""):
            output[name.removeprefix(".")] = _moved(tensor, generator, times)
        return output

    return moved


def _moved(tensor: torch.Tensor, generator: torch.Generator, times: float) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
    step = 2 * times * rounding(tensor.dtype, tensor.shape[-1] if tensor.ndim else 1)
    return (tensor.double() * (1 + signs * step)).to(tensor.dtype)


class WholeModel:
    """The checks of a whole model. What its originals give is computed once, so that they can be repeated.

    Args:
        graft: The graft.
        inputs: What the model is called with.
        drawing: Draws the prompt.
        on_originals: Makes a block inside which sites run their originals.
        training: The mode in which the kernels can run.
        seed: What is drawn is drawn with it.
    """

    def __init__(
        self,
        graft: Graft,
        inputs: ModelInputs,
        drawing: Drawing,
        on_originals: Callable[[], AbstractContextManager[None]],
        training: bool,
        seed: int,
    ) -> None:
        self._subject = _Subject(graft, on_originals, training, seed)
        self._plain = inputs.without_cache(graft.model)
        self._labels = _labels(graft.model, inputs)
        self._drawing = drawing
        self._comparisons: list[_Comparison] = []
        self._more = self._made()

    def checks(self) -> Iterator[Check]:
        """Outputs for the inputs; of a language model also the loss, and the greedy tokens with a cache."""
        for made in self._comparisons:
            yield made.check()
        for made in self._more:
            self._comparisons.append(made)
            yield made.check()

    def order_of(self, paths: Iterable[str]) -> dict[str, int]:
        """Where modules stand in the order in which they run first, on their originals; what does not run is last."""
        model = self._subject.graft.model
        modules = {path: model.get_submodule(path) for path in paths}
        ran: dict[str, int] = {}
        with ExitStack() as stack:
            for path, module in modules.items():
                hook = partial(_note, path, ran)
                stack.callback(module.register_forward_pre_hook(hook).remove)
            self._subject.originals(lambda: _outputs(self._plain.run(model)))
        return {path: ran.get(path, len(modules)) for path in modules}

    def _made(self) -> "Iterator[_Comparison]":
        model, plain = self._subject.graft.model, self._plain
        yield _Comparison(self._subject, "outputs", plain, lambda: _outputs(plain.run(model)))
        if self._labels is not None:
            with_labels = plain.having(labels=self._labels)
            yield _Comparison(self._subject, "loss", with_labels, lambda: {"loss": with_labels.run(model).loss})
        prompt = self._drawing.inputs() if not self._subject.training and cache_name(model) else None
        if prompt is not None and {"input_ids", "decoder_input_ids"} & prompt.kwargs.keys():
            yield _Decoding(self._subject, prompt)


def _note(path: str, ran: dict[str, int], *_: Any) -> None:
    ran.setdefault(path, len(ran))


def _outputs(out: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix("output."): tensor for name, tensor in direct(out, "output")}


def _labels(model: nn.Module, inputs: ModelInputs) -> torch.Tensor | None:
    """The tokens themselves, for a language model: one that takes as many labels as tokens."""
    tokens = inputs.kwargs.get("decoder_input_ids", inputs.kwargs.get("input_ids"))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return tokens if takes(model, "labels") and head is not None and isinstance(tokens, torch.Tensor) else None


class _Comparison:
    """One check: what a run gives with kernels beside what it gives without."""

    def __init__(
        self,
        subject: _Subject,
        case: str,
        inputs: ModelInputs,
        run: Callable[[], dict[str, torch.Tensor]],
        expected: dict[str, torch.Tensor] | None = None,
    ) -> None:
        mode = "train" if subject.training else "eval"
        said = spelt(dict(each for name, value in _named(inputs) for each in direct(value, name)))
        self.subject, self.run = subject, run
        self.made = Check(-1, WHOLE_MODEL, case, mode, "", said)
        self.expected = subject.originals(run) if expected is None else expected
        self.noise = _Noise(subject, run)

    def check(self) -> Check:
        """Run with the kernels as they are switched now."""
        before = self.subject.graft.calls
        try:
            found = self.subject.kernels(self.run)
        except Exception as error:
            return replace(self.made, faults=(f"with kernels it raises {type(error).__name__}: {error}",))
        after = self.subject.graft.calls
        faults, figures = self._held(found)
        note = self.noted(_Ran(found, after.kernel - before.kernel, after.reference - before.reference))
        if faults:
            choices = Choices(self.subject.graft.model, self.subject.paths)
            with choices.recorded():
                self.subject.originals(self.run)
            with choices.forced():
                found = self.subject.kernels(self.run)
            if choices.are_few:
                faults, figures = self._held(found)
                note = f"{note}; {choices}"
        return replace(self.made, faults=tuple(faults), figures=tuple(figures), note=note)

    def _held(self, found: dict[str, torch.Tensor]) -> tuple[list[str], list[Figure]]:
        """What is wrong with what a run gave, and the figures."""
        faults, figures = [], []
        for name, exact in self.expected.items():
            fault, figure = _compared(name, found.get(name), exact, self.noise)
            faults += [fault] if fault else []
            figures += [figure] if figure else []
        return faults, figures

    def noted(self, ran: "_Ran") -> str:
        """What a reader should know besides the figures."""
        return f"kernels ran {ran.kernels} times, originals {ran.originals} times"


class _Ran(NamedTuple):
    """What a run gave, and how often kernels and originals ran in it."""

    found: dict[str, torch.Tensor]
    kernels: int
    originals: int


class _Noise:
    """The runs of originals whose outputs are moved, made as they are asked for."""

    def __init__(self, subject: _Subject, run: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._more = subject.noisy(run)
        self._runs: list[dict[str, torch.Tensor]] = []

    def of(self, name: str, count: int) -> list[torch.Tensor]:
        while len(self._runs) < count:
            self._runs.append(next(self._more))
        return [each[name] for each in self._runs if name in each]


def _named(inputs: ModelInputs) -> Iterator[tuple[str, Any]]:
    yield from ((f"args[{index}]", value) for index, value in enumerate(inputs.args))
    yield from inputs.kwargs.items()


def _compared(name: str, found: torch.Tensor | None, exact: torch.Tensor, noise: _Noise) -> tuple[str, Figure | None]:
    if found is None or found.shape != exact.shape or found.dtype != exact.dtype:
        have = "missing" if found is None else f"{found.dtype}{list(found.shape)}"
        return f"{name} is {have}, and the original's {exact.dtype}{list(exact.shape)}", None
    if not exact.is_floating_point() or not exact.numel():
        return ("" if torch.equal(found, exact) else f"{name} is not equal"), None
    lost = exact.isfinite() & ~found.isfinite()
    if lost.any():
        return f"{name}: {int(lost.sum())} of {lost.numel()} values are not finite", None
    length = exact.shape[-1] if exact.ndim else 1
    measured = distance(found, [exact], exact, exact.dtype, length)
    for count in range(1, len(NEIGHBOURS) + 1) if not torch.equal(found, exact) else ():
        measured = distance(found, noise.of(name, count), exact, exact.dtype, length)
        if measured.is_close:
            break
    figure = Figure.of(name, measured, exact.ndim > 1)
    return ("" if figure.passed else str(figure)), figure


# --- greedy search


class _Decoding(_Comparison):
    """Each step after the original's own tokens, so that all steps can be compared, and one tie does not end it."""

    def __init__(self, subject: _Subject, prompt: ModelInputs) -> None:
        model = subject.graft.model
        chosen = subject.originals(lambda: _steps(model, prompt, None))
        self.forced = chosen.pop("tokens")
        case = f"{NUM_STEPS} greedy tokens with a cache"
        super().__init__(subject, case, prompt, lambda: _steps(model, prompt, self.forced), chosen)

    def noted(self, ran: _Ran) -> str:
        """How many tokens are the original's."""
        return f"{int((ran.found['tokens'] == self.forced).sum())} of {self.forced.numel()} tokens are the original's"


def _steps(model: nn.Module, prompt: ModelInputs, forced: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Logits (steps, B, vocab) and the likeliest tokens (steps, B), going on after `forced` or after those."""
    out = prompt.having(use_cache=True).run(model)
    logits = [out.logits[:, -1]]
    tokens = [logits[0].argmax(-1)]
    for step in range(NUM_STEPS - 1):
        out = following(model, out, (tokens[-1] if forced is None else forced[step])[:, None]).run(model)
        logits.append(out.logits[:, -1])
        tokens.append(logits[-1].argmax(-1))
    return {"logits": torch.stack(logits), "tokens": torch.stack(tokens)}
