"""Kernels with one fault each, and where in `subject.Model` they go.

Each is a forward that is right for most inputs, or nearly right for all. `FAULTS` maps a name to the entry of a config
that it takes (`subject.SITES` has the hosts) and the kernel.
"""

import torch
from subject import FUSION, FusedLayout, NormByHand, kernel, norm_gradients, rms_norm
from torch.nn import functional as F

FAULTS = {}


def fault(target, layout=None, **flags):
    def add(forward):
        FAULTS[forward.__name__] = (target, kernel(forward, layout, **flags))
        return forward

    return add


def right(self, x):
    return rms_norm(x, self.weight, self.eps).to(x.dtype)


def fused(self, x, norm=rms_norm, mlp=None):
    gate, up = self.gate_up(norm(x, self.scale, self.eps).to(x.dtype)).chunk(2, -1)
    return self.down(F.silu(gate.contiguous()) * up)


# --- the formula


@fault("Norm")
def wrong_epsilon(self, x):
    return rms_norm(x, self.weight, 1e-5).to(x.dtype)


@fault(FUSION, FusedLayout)
def wrong_epsilon_in_a_fusion(self, x):
    return fused(self, x, lambda x, weight, eps: rms_norm(x, weight, 1.1 * eps))


@fault("Norm")
def epsilon_after_the_root(self, x):
    return (x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight.float()).to(x.dtype)


@fault("Norm")
def no_epsilon(self, x):
    return rms_norm(x, self.weight, 1e-30).to(x.dtype)


@fault("Norm")
def weight_with_an_offset(self, x):
    return rms_norm(x, 1 + self.weight, self.eps).to(x.dtype)


@fault("Norm")
def mean_over_a_padded_size(self, x):
    padded = F.pad(x, (0, 64 - x.shape[-1]))
    return rms_norm(padded, F.pad(self.weight, (0, 64 - x.shape[-1])), self.eps)[..., : x.shape[-1]].to(x.dtype)


@fault("Norm")
def variance_about_the_mean(self, x):
    x_fp32 = x.float()
    about = (x_fp32 - x_fp32.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    return (x_fp32 * torch.rsqrt(about + self.eps) * self.weight.float()).to(x.dtype)


@fault(FUSION, FusedLayout)
def gate_and_up_swapped(self, x):
    up, gate = self.gate_up(rms_norm(x, self.scale, self.eps).to(x.dtype)).chunk(2, -1)
    return self.down(F.silu(gate) * up)


@fault("Square")
def transposed_square_weight(self, x):
    return F.linear(x, self.weight.t(), self.bias)


@fault("Square")
def bias_left_out(self, x):
    return F.linear(x, self.weight)


@fault("Activation")
def gelu_by_tanh(self, x):
    return F.gelu(x, approximate="tanh")


@fault("Activation")
def gelu_cut_off(self, x):
    return torch.where(x > 4, x, F.gelu(x))


@fault("Attention")
def not_causal(self, x):
    return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


@fault("Attention")
def causal_but_for_the_next_token(self, x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(1)
    return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask))


@fault("Attention")
def keys_of_the_first_in_the_batch(self, x):
    return self.o(
        F.scaled_dot_product_attention(self.q(x), self.k(x)[:1].expand_as(x), self.v(x), is_causal=x.shape[1] > 1)
    )


@fault("Attention")
def keys_in_blocks_of_128(self, x):
    whole = max(x.shape[1] // 128 * 128, min(x.shape[1], 128))
    mask = torch.ones(x.shape[1], whole, dtype=torch.bool, device=x.device).tril()
    return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x)[:, :whole], self.v(x)[:, :whole], mask))


# --- numbers


@fault(FUSION, FusedLayout)
def accumulated_in_float16(self, x):
    gate, up = F.linear(rms_norm(x, self.scale, self.eps).half(), self.gate_up.weight.half()).to(x.dtype).chunk(2, -1)
    return self.down(F.silu(gate) * up)


@fault("Norm")
def squares_in_the_dtype_of_the_input(self, x):
    root = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
    return (x * root * self.weight).to(x.dtype)


@fault("Norm")
def rounded_to_bfloat16_on_the_way(self, x):
    return (rms_norm(x.bfloat16(), torch.ones_like(self.weight), self.eps).bfloat16() * self.weight).to(x.dtype)


@fault("Add")
def residual_rounded(self, x, residual):
    return (residual.bfloat16() + x * self.scale).float()


@fault("Add")
def dtype_of_the_residual_dropped(self, x, residual):
    return (residual + x * self.scale).to(x.dtype if x.dtype != torch.float32 else torch.bfloat16)


@fault("Norm")
def small_numbers_flushed(self, x):
    return right(self, torch.where(x.abs() < 1e-5, 0, x))


@fault("Norm")
def large_numbers_cut(self, x):
    return right(self, x.clamp(-3e3, 3e3))


@fault("Norm")
def exponent_approximated(self, x):
    x_fp32 = x.float()
    root = torch.exp2(-0.5 * torch.log2(x_fp32.square().mean(-1, keepdim=True) + self.eps)).half().float()
    return (x_fp32 * root * self.weight).to(x.dtype)


@fault("Square")
def last_feature_of_a_weight_left_out(self, x):
    return F.linear(x[..., :-1], self.weight[:, :-1], self.bias)


# --- shapes


@fault("Norm")
def last_row_unwritten(self, x):
    rows, out = x.flatten(0, -2), torch.empty_like(x).flatten(0, -2)
    out[:-1] = right(self, rows[:-1])
    return out.view_as(x)


@fault("Norm")
def right_for_even_lengths(self, x):
    out = right(self, x)
    if x.shape[1] % 2 and x.shape[1] > 1:
        out[:, -1] = out[:, -2]
    return out


@fault("Norm")
def rows_past_128(self, x):
    rows = x.flatten(0, -2)
    out = right(self, rows)
    out[128:] = right(self, rows[127:-1])[: len(rows) - 128] if len(rows) > 128 else out[128:]
    return out.view_as(x)


@fault("Norm")
def last_row_of_a_full_tile(self, x):
    rows = x.flatten(0, -2)
    out = right(self, rows)
    if len(rows) and len(rows) % 128 == 0:
        out = torch.cat([out[:-1], torch.zeros_like(out[:1])])
    return out.view_as(x)


@fault("Norm")
def one_batch_only(self, x):
    return right(self, x[:1]).expand_as(x).clone() if x.shape[1] == 1 else right(self, x)


@fault("Norm")
def reads_memory_as_if_contiguous(self, x):
    return right(self, torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride()))


@fault("Norm")
def raises_without_tokens(self, x):
    if not x.numel():
        raise ValueError("empty grid")
    return right(self, x)


@fault("Norm")
def one_token_squeezed(self, x):
    out = right(self, x)
    return out.squeeze(1) if x.shape[1] == 1 else out


# --- memory and state


@fault("Activation")
def returns_its_input(self, x):
    y = F.gelu(x)
    with torch.no_grad():
        x.copy_(y)
    return x


@fault("Square")
def changes_its_input(self, x):
    out = F.linear(x, self.weight, self.bias)
    with torch.no_grad():
        x.mul_(1.5)
    return out


@fault("Square")
def writes_the_same_into_its_input(self, x):
    out = F.linear(x, self.weight, self.bias)
    with torch.no_grad():
        x.add_(0)
    return out


@fault("Norm")
def changes_its_input_through_data(self, x):
    out = right(self, x)
    x.data.view(-1)[0] += 1
    return out


@fault("Norm")
def in_place_on_a_view(self, x):
    rows = x.reshape(-1, x.shape[-1])
    return rows.copy_(rms_norm(rows.clone(), self.weight, self.eps)).view_as(x).clone()


@fault("Norm")
def weight_of_the_first_call(self, x):
    if not hasattr(self, "kept"):
        self.kept = self.weight.detach().clone()
    return rms_norm(x, self.weight + (self.kept - self.weight).detach(), self.eps).to(x.dtype)


@fault("Norm")
def one_buffer_for_all_outputs(self, x):
    if torch.is_grad_enabled():
        return right(self, x)
    if getattr(self, "out", None) is None or self.out.shape != x.shape or self.out.dtype != x.dtype:
        self.out = torch.empty_like(x)
    return self.out.copy_(right(self, x))


@fault("Norm")
def second_call_doubled(self, x):
    self.count = getattr(self, "count", 0) + 1
    return right(self, x) * (1 if self.count == 1 else 1.25)


@fault("Norm")
def changes_its_weight(self, x):
    out = right(self, x)
    self.weight.data.mul_(1.0078125)
    return out


@fault("Square")
def returns_nan_for_one_value(self, x):
    out = F.linear(x, self.weight, self.bias).clone()
    out.view(-1)[:1] = torch.nan
    return out


@fault("Norm")
def calls_the_original(self, x):
    return type(self).__mro__[2].forward(self, x)


# --- gradients


class NoWeightGradient(NormByHand):
    @staticmethod
    def backward(ctx, upstream):
        return NormByHand.backward(ctx, upstream)[0], None, None


@fault("Norm")
def no_gradient_of_the_weight(self, x):
    return NoWeightGradient.apply(x, self.weight, self.eps)


class ZeroWeightGradient(NormByHand):
    @staticmethod
    def backward(ctx, upstream):
        dx, dweight, _ = NormByHand.backward(ctx, upstream)
        return dx, torch.zeros_like(dweight), None


@fault("Norm")
def gradient_of_the_weight_is_zero(self, x):
    return ZeroWeightGradient.apply(x, self.weight, self.eps)


ACCUMULATED = {}


class Accumulated(NormByHand):
    @staticmethod
    def backward(ctx, upstream):
        dx, dweight, _ = NormByHand.backward(ctx, upstream)
        key = (dweight.shape, dweight.dtype)
        ACCUMULATED[key] = ACCUMULATED.get(key, torch.zeros_like(dweight)) + dweight
        return dx, ACCUMULATED[key].clone(), None


@fault("Norm")
def gradient_accumulated(self, x):
    return Accumulated.apply(x, self.weight, self.eps)


class NarrowWeightGradient(NormByHand):
    @staticmethod
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensors
        dx, _ = norm_gradients(upstream, x, weight, ctx.eps)
        normed = rms_norm(x, torch.ones_like(weight), ctx.eps)
        rows = (upstream.float() * normed).bfloat16().flatten(0, -2)
        total = torch.zeros_like(weight, dtype=torch.bfloat16)
        for row in rows:
            total += row
        return dx, total.to(weight.dtype), None


@fault("Norm")
def gradient_added_up_in_bfloat16(self, x):
    return NarrowWeightGradient.apply(x, self.weight, self.eps)


class ContiguousUpstream(NormByHand):
    @staticmethod
    def backward(ctx, upstream):
        plain = torch.as_strided(upstream, upstream.shape, torch.empty(upstream.shape, device="meta").stride())
        return NormByHand.backward(ctx, plain)


@fault("Norm")
def upstream_read_as_if_contiguous(self, x):
    return ContiguousUpstream.apply(x, self.weight, self.eps)


class SwappedWhenFrozen(NormByHand):
    @staticmethod
    def backward(ctx, upstream):
        dx, dweight, _ = NormByHand.backward(ctx, upstream)
        return (dx if ctx.needs_input_grad[1] else 2 * dx), dweight, None


@fault("Norm")
def wrong_with_frozen_weights(self, x):
    return SwappedWhenFrozen.apply(x, self.weight, self.eps)


@fault("Norm")
def straight_through(self, x):
    return x * self.weight + (right(self, x) - x * self.weight).detach()


@fault("Norm")
def another_forward_without_gradients(self, x):
    return right(self, x) if torch.is_grad_enabled() else rms_norm(x, self.weight, 1e-3).to(x.dtype)


@fault("Square")
def no_gradient_at_all(self, x):
    return F.linear(x, self.weight, self.bias).detach()


# --- for single tests

DTYPES = {"squares_in_the_dtype_of_the_input": torch.float16}
"""The dtypes in which what is a fault in them alone is tried."""


def of_fixed_epsilon(self, x):
    return rms_norm(x, self.weight, 1e-6).to(x.dtype)
