"""What a kernel's forward is handed, and what it may read: checked before it is bound."""

import pytest
import torch
from torch import nn

import kernelgraft
import toys
from kernelgraft import KernelConfig
from kernelgraft.errors import PlanError
from kernelgraft.signature import read_attributes, renamed_keywords


class Attention(nn.Module):
    """Echoes what it got, by its own names."""

    def forward(self, hidden_states, mask, scale=1.0, past_key_values=None, **kwargs):
        return {"hidden_states": hidden_states, "mask": mask, "scale": scale, "cache": past_key_values, **kwargs}


class NewAttention(nn.Module):
    def forward(self, hidden_states, mask, scale=1.0, cache=None, **kwargs):
        return {"hidden_states": hidden_states, "mask": mask, "scale": scale, "cache": cache, **kwargs}


def echo(self, hidden_states, mask, scale=1.0, past_key_values=None, **kwargs):
    return {"hidden_states": hidden_states, "mask": mask, "scale": scale, "cache": past_key_values, **kwargs}


def new_echo(self, hidden_states, mask, scale=1.0, cache=None, **kwargs):
    return echo(self, hidden_states, mask, scale, cache, **kwargs)


def renamed_first(self, x, mask, scale=1.0, cache=None, **kwargs):
    return echo(self, x, mask, scale, cache, **kwargs)


def reordered(self, cache=None, scale=1.0, mask=None, hidden_states=None, **kwargs):
    return echo(self, hidden_states, mask, scale, cache, **kwargs)


CALLS = [
    ((1, 2), {}),
    ((1,), {"mask": 2, "scale": 3}),
    ((1, 2, 3, 4), {"position_ids": 5}),
    ((), {"mask": 2, "hidden_states": 1}),
    ((1, 2), {"CACHE": 4}),
]


@pytest.mark.parametrize("original", [Attention, NewAttention])
@pytest.mark.parametrize("forward", [echo, new_echo, renamed_first, reordered])
def test_a_kernel_gets_what_the_original_got_under_its_own_names(original, forward):
    model = nn.Sequential(original())
    name = "past_key_values" if original is Attention else "cache"
    calls = [
        (args, {name if key == "CACHE" else key: value for key, value in kwargs.items()}) for args, kwargs in CALLS
    ]
    expected = [model[0](*args, **kwargs) for args, kwargs in calls]
    with kernelgraft.graft(model, KernelConfig({original.__name__: toys.kernel(forward)})) as grafted:
        assert [model[0](*args, **kwargs) for args, kwargs in calls] == expected
        assert grafted.calls.kernel == len(calls)


@pytest.mark.parametrize("original", [Attention, NewAttention])
@pytest.mark.parametrize("forward", [echo, new_echo])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_arrives_under_whichever_of_its_names_it_is_passed(original, forward, name):
    model = nn.Sequential(original())
    with kernelgraft.graft(model, KernelConfig({original.__name__: toys.kernel(forward)})):
        assert model[0](1, 2, **{name: 4})["cache"] == 4


def loses_mask(self, hidden_states, past_key_values=None, **kwargs):
    return hidden_states


def cache_in_kwargs(self, hidden_states, mask, scale=1.0, **kwargs):
    return hidden_states


def takes_no_more(self, hidden_states, mask, scale=1.0, past_key_values=None):
    return hidden_states


def needs_more(self, hidden_states, mask, scale, past_key_values, block_table, **kwargs):
    return hidden_states


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (loses_mask, "the kernel would not get 'mask', 'scale' by name"),
        (cache_in_kwargs, "the kernel would not get 'past_key_values' by name"),
        (takes_no_more, "the original takes further keywords (**kwargs), the kernel does not"),
        (needs_more, "the kernel needs 'block_table', which the original does not take"),
    ],
)
def test_a_forward_that_cannot_stand_for_the_originals_is_refused_with_both_signatures(forward, why):
    model = nn.Sequential(Attention())
    with pytest.raises(PlanError) as caught:
        kernelgraft.graft(model, KernelConfig({"Attention": toys.kernel(forward)}))
    text = str(caught.value)
    assert why in text
    assert "Fast.forward(self, hidden_states" in text
    assert "Attention.forward(self, hidden_states, mask, scale=1.0, past_key_values=None, **kwargs)" in text
    assert type(model[0]) is Attention


class Scaled(nn.Module):
    def forward(self, x, scale=None):
        return x if scale is None else x * scale


def test_an_optional_parameter_of_the_kernels_own_never_gets_what_stood_at_its_place():
    def with_eps(self, x, eps=1e-6):
        return x + eps

    assert renamed_keywords(toys.kernel(with_eps).forward_class, Scaled) == {}
    model = nn.Sequential(Scaled())
    with kernelgraft.graft(model, KernelConfig({"Scaled": toys.kernel(with_eps)})):
        assert model[0](0.0) == 1e-6
        for args, kwargs in (((0.0, 3.0), {}), ((0.0,), {"scale": 3.0})):
            with pytest.raises(TypeError, match="scale"):
                model[0](*args, **kwargs)


# --- attributes


class Reads(nn.Module):
    offset: torch.Tensor

    def forward(self, hidden_states):
        if hasattr(self, "bias"):
            hidden_states = hidden_states + self.bias
        return hidden_states * self.wieght + self.helper(self.eps)

    def helper(self, eps):
        return eps


def test_the_attributes_that_a_forward_reads_are_found():
    assert sorted(read_attributes(Reads)) == ["eps", "helper", "offset", "wieght"]


def test_an_attribute_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(PlanError) as caught:
        kernelgraft.plan(toys.model(), KernelConfig({"Norm": Reads}))
    text = str(caught.value)
    assert "Reads.forward reads self.offset, self.wieght, which Norm at 'layers.0.norm' does not have" in text
    assert "nearest: ['weight']" in text


def test_an_attribute_of_the_layout_or_of_the_original_may_be_read():
    def forward(self, hidden_states):
        return self.dropout * toys.norm_mlp(self, hidden_states)

    model = toys.model()
    for layer in model.layers:
        layer.norm.dropout = 0.5  # on the original alone: answered from it
    expected = 0.5 * model.layers[0].mlp(model.layers[0].norm(toys.inputs()))
    mapping = {toys.FUSION: toys.kernel(forward, toys.NormMLPLayout)}
    with kernelgraft.graft(model, KernelConfig(mapping), example_inputs=toys.inputs()):
        assert torch.allclose(model.layers[0].norm(toys.inputs()), expected)


@pytest.mark.parametrize("kind", [0, 1])
def test_every_kind_of_module_that_a_name_stands_for_is_checked(kind):
    class Bare(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    class Norm(Bare):
        """Also called so, and without a weight."""

    members = [toys.Norm(toys.H), Norm()]
    model = nn.ModuleList(members if kind else members[::-1])

    def forward(self, hidden_states):
        return hidden_states * self.weight

    with pytest.raises(PlanError, match=f"self.weight, which Norm at '{kind}' does not have"):
        kernelgraft.plan(model, KernelConfig({"Norm": toys.kernel(forward)}))


def test_a_tuple_that_a_forward_builds_is_no_name():
    def forward(self, hidden_states):
        empty = ()
        return hidden_states * (self.scale, *empty)[0]

    assert read_attributes(toys.kernel(forward).forward_class) == ["scale"]
