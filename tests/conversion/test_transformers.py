"""Every conversion that the installed Transformers registers, run on lazy tensors and on plain ones.

Loading (`converter`) and saving (`converter.reverse_transform()`) are both run, by Transformers' own code.
"""

import copy
import inspect
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from kernelgraft.conversion import LazyTensor, Program, TensorSource, eager_steps

loading = pytest.importorskip("transformers.core_model_loading")
registry = pytest.importorskip("transformers.conversion_mapping")

pytestmark = pytest.mark.transformers

# These compute values (dequantization) or bring in elements that no source has (zero padding).
COMPUTING = {"Inkling2LoopDequantizeExperts", "Inkling2UnpadVocab"}
# Inkling2LoopDequantizeExperts and its reverse have inputs of their own; see the test below.
OWN_INPUTS = {"Inkling2LoopDequantizeExperts"}

NUM_EXPERTS = 4
# The first shape that an operation takes is used; sizes differ so that a swapped dim shows.
SHAPES = [(24, 6), (2, 24, 6), (24, 2, 3, 1, 4), (24,)]


class Config(SimpleNamespace):
    def get_text_config(self):
        return self


class Model:
    """Answers for the parameters that operations ask about, whatever they are called."""

    def __init__(self, shapes, dtype):
        self.shapes, self.dtype = list(shapes), dtype

    def get_parameter(self, name):
        shape = self.shapes.pop(0)
        self.shapes.append(shape)
        return torch.empty(shape, dtype=self.dtype)


def config_for(operations):
    config = Config(num_attention_heads=2, vocab_size=30, unpadded_vocab_size=20)
    config.vision_config = Config(num_attention_heads=3)
    for op in operations:
        if getattr(op, "num_shards_attribute", None):
            setattr(config, op.num_shards_attribute, 3)
    return config


def model_for(operations, shape, num_targets):
    """Parameters in turn: for a split uneven shares of the whole, otherwise the transposed shape in another dtype."""
    if any(type(op).__name__ == "Split" for op in operations):
        shares = [2] * (num_targets - 1) + [shape[0] - 2 * (num_targets - 1)]
        return Model([(share, *shape[1:]) for share in shares], torch.float32)
    return Model([tuple(reversed(shape))], torch.bfloat16)


def inputs(converter, shape):
    """A list of tensors for each source pattern: several where it stands for a list of modules."""
    tensors, first = {}, 0
    takes_lists = any(type(op).__name__.startswith(("MergeModulelist", "ErnieFuse")) for op in converter.operations)
    for pattern in converter.source_patterns:
        count = NUM_EXPERTS if "*" in pattern and takes_lists else 1
        tensors[pattern] = []
        for _ in range(count):
            one = torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
            tensors[pattern].append(one)
            first += one.numel()
    return tensors


def convert(converter, tensors, shape):
    """Runs Transformers' own code on a copy of the converter."""
    converter = copy.deepcopy(converter)
    name = f"model.layers.0.{converter.target_patterns[0]}"
    for pattern, group in tensors.items():
        for i, tensor in enumerate(group):
            converter.add_tensor(name, f"{pattern}.{i}", pattern, tensor)
    model = model_for(converter.operations, shape, len(converter.target_patterns))
    results = converter.convert(name, model=model, config=config_for(converter.operations))
    return {key: value[0] if isinstance(value, list) else value for key, value in results.items()}


def check(converter, tensors, shape):
    """Lazy equals eager bit for bit; returns the eager steps."""
    eager = convert(converter, tensors, shape)
    lazies = {
        pattern: [LazyTensor.of(TensorSource(f"{pattern}.{i}", tensor)) for i, tensor in enumerate(group)]
        for pattern, group in tensors.items()
    }
    with eager_steps() as steps:
        lazy = convert(converter, lazies, shape)
    assert list(lazy) == list(eager)
    for name, result in lazy.items():
        value = result.materialize() if isinstance(result, LazyTensor) else result
        assert value.dtype == eager[name].dtype
        assert torch.equal(value, eager[name]), (converter, name)
    sources = {str(tensor.sources[0].name): tensor for group in lazies.values() for tensor in group}
    check_program(lazy, sources)
    return steps


def check_program(lazy, sources):
    program = Program.trace(lazy, sources)
    program.check_filled()
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program
    targets = {
        name: value.materialize() if isinstance(value, LazyTensor) else value.clone() for name, value in lazy.items()
    }
    for name, source in sources.items():
        if name not in program.irreversible:
            assert torch.equal(program.part(name).read(targets.__getitem__), source.materialize())


def registered():
    """Every registered converter and its reverse, once each, with the model types that have it."""
    found = {}
    for model_type in registry._build_checkpoint_conversion_mapping():
        for rule in registry.get_checkpoint_conversion_mapping(model_type) or ():
            if not isinstance(rule, loading.WeightConverter):
                continue
            for converter in (rule, reverse(rule)):
                if converter is not None:
                    key = repr((converter, [(type(op), vars(op)) for op in converter.operations]))
                    found.setdefault(key, (converter, []))[1].append(model_type)
    return list(found.values())


def reverse(rule):
    try:
        return rule.reverse_transform()
    except (NotImplementedError, ValueError):
        return None  # Transformers itself cannot save these


def names(operations):
    return {type(op).__name__ for op in operations}


def first_fitting_shape(converter):
    errors = []
    for shape in SHAPES:
        tensors = inputs(converter, shape)
        try:
            convert(converter, tensors, shape)
        except (ValueError, IndexError, RuntimeError, StopIteration) as error:
            errors.append(f"{shape}: {error}")
        else:
            return shape, tensors
    raise AssertionError(f"{converter} with {converter.operations} takes none of the shapes: {errors}")


def test_every_registered_conversion_and_every_operation():
    exercised, eager, model_types = set(), Counter(), set()
    converters = registered()
    for converter, types in converters:
        if names(converter.operations) & OWN_INPUTS:
            continue
        shape, tensors = first_fitting_shape(converter)
        steps = check(converter, tensors, shape)
        exercised |= names(converter.operations)
        model_types |= set(types)
        if steps.total:
            assert names(converter.operations) & COMPUTING, (converter, steps)
            eager.update(names(converter.operations))
    for operation in unregistered_operations():
        exercised.add(type(operation).__name__)
        check_operation(operation)
    if hasattr(loading, "Inkling2LoopDequantizeExperts"):
        eager.update(check_dequantization())
        exercised.add("Inkling2LoopDequantizeExperts")
    lost = sum(reverse(converter) is None for converter, _ in converters)
    print(
        f"{len(converters)} conversions of {len(model_types)} model types, {lost} of which Transformers itself cannot "
        f"reverse; eager: {dict(eager) or 'none'}"
    )
    assert len(converters) > 50
    assert set(eager) <= COMPUTING
    assert all_operations() - exercised == set()


def all_operations():
    classes = inspect.getmembers(loading, inspect.isclass)
    return {
        name for name, cls in classes if issubclass(cls, loading.ConversionOps) and cls is not loading.ConversionOps
    }


def unregistered_operations():
    """Operations that no registered conversion uses."""
    names = ["q_proj", "k_proj"]
    return [
        loading._IdentityOp(),
        loading.Conv3dToLinear(2, (3, 1, 4)),
        loading.LinearToConv3d(2, (3, 1, 4)),
        loading.VisionFuseAndPermuteForRope(0, names),
        loading.VisionUnfuseAndPermuteForRope(0, names),
    ]


def check_operation(operation):
    several, one = ["q_proj", "k_proj", "v_proj"], ["qkv"]
    sources, targets = (one, several) if type(operation).__name__.startswith("VisionUnfuse") else (one, one)
    if type(operation).__name__.startswith("VisionFuse"):
        sources = several
    shape = (24, 24) if type(operation).__name__ == "LinearToConv3d" else (24, 2, 3, 1, 4)
    shape = (72, 6) if type(operation).__name__.startswith("Vision") else shape
    converter = loading.WeightConverter(sources, targets, [operation])
    assert check(converter, inputs(converter, shape), shape).total == 0


def check_dequantization():
    """NVFP4 and MXFP8 experts, and experts that are not quantized (which are only passed on)."""
    operation, patterns = loading.Inkling2LoopDequantizeExperts(), ["w", "w_scale", "w_amax", "w_denominator"]
    experts, rows = 10, 4
    nvfp4 = {
        "w": [torch.randint(0, 256, (experts, rows, 16), dtype=torch.uint8)],
        "w_scale": [torch.rand(experts, rows, 2).to(torch.float8_e4m3fn)],
        "w_amax": [torch.rand(experts)],
        "w_denominator": [torch.tensor(2688.0)],
    }
    mxfp8 = {
        "w": [torch.rand(experts, rows, 64).to(torch.float8_e4m3fn)],
        "w_scale": [torch.randint(120, 130, (experts, rows, 2), dtype=torch.uint8)],
    }
    plain = {"w": [torch.rand(experts, rows, 64)]}
    for tensors, goes_eager in ((nvfp4, True), (mxfp8, True), (plain, False)):
        converter = loading.WeightConverter(patterns, ["gate_up_proj"], [operation, loading.Interleave(dim=1)])
        steps = check(converter, tensors, (experts, rows, 32))
        assert bool(steps.total) == goes_eager
    return {"Inkling2LoopDequantizeExperts": 2}
