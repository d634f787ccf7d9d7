"""Which tensors of a checkpoint belong together, and which blocks of them are alike."""

from kernelgraft.checkpoint.blocks import blocks_of, one_of_each
from kernelgraft.checkpoint.files import FileTensor
from kernelgraft.checkpoint.header import TensorEntry


def tensors(*names, kind="BF16", shape=(2, 3)):
    return {name: FileTensor(None, TensorEntry(name, kind, shape, 0, 12)) for name in names}


def layer(index, *names, prefix="model.layers", **options):
    return tensors(
        *(f"{prefix}.{index}.{name}" for name in names or ("up.weight", "experts.0.w", "experts.1.w")), **options
    )


def test_layers_are_blocks_and_what_has_no_number_is_in_none():
    found = blocks_of(tensors("embed.weight", "fc1.weight", "head.0") | layer(0) | layer(11))
    assert list(found.single) == ["embed.weight", "fc1.weight", "head.0"]
    assert list(found.blocks) == ["model.layers.0.", "model.layers.11."]
    assert list(found.blocks["model.layers.11."]) == ["up.weight", "experts.0.w", "experts.1.w"]
    assert found.kinds == [["model.layers.0.", "model.layers.11."]]


def test_the_order_of_names_in_the_files_does_not_matter():
    mixed = dict(sorted((layer(1) | layer(2) | layer(10)).items(), key=lambda item: item[0][::-1]))
    found = blocks_of(mixed)
    assert sorted(found.blocks) == ["model.layers.1.", "model.layers.10.", "model.layers.2."]
    assert [sorted(kind) for kind in found.kinds] == [["model.layers.1.", "model.layers.10.", "model.layers.2."]]
    assert all(tensor.name == head + rest for head, block in found.blocks.items() for rest, tensor in block.items())


def test_blocks_of_other_names_shapes_dtypes_or_places_are_other_kinds():
    checkpoint = (
        layer(0, "up.weight")
        | layer(1)
        | layer(2, shape=(3, 2))
        | layer(3, kind="F16")
        | layer(4, "up.weight", "experts.0.w", "experts.2.w")
        | layer(5)
        | layer(6, prefix="encoder.layers")
        | layer("07")
    )
    found = blocks_of(checkpoint)
    assert [[head.split(".")[-2] for head in kind] for kind in found.kinds] == [
        ["0"],
        ["1", "5"],
        ["2"],
        ["3"],
        ["4"],
        ["6"],
        ["0", "1"],
    ]
    # A number that is written with a zero in front is none.
    assert "model.layers.07.experts.0." in found.blocks
    assert "model.layers.07.up.weight" in found.single


def test_one_of_each():
    assert one_of_each(["1.w", "22.w", "a.1.2", "a.3.40", "b.w1", "b.w2", "c"]) == [
        "22.w",
        "a.3.40",
        "b.w1",
        "b.w2",
        "c",
    ]
