"""Which losses see the tokens that credit chose, by their gradients, and which are found out."""

from __future__ import annotations

import pytest
import torch

from rhythm_kernels import rhythm_credit, shape_advantages
from rhythm_kernels.integrations.reach import credit_is_seen

ADVANTAGES = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, 0.0])


def batch(seed=0, tokens=400, **options):
    """Log-probabilities, advantages shaped by credit, and a mask with responses of different lengths."""
    g = torch.Generator().manual_seed(seed)
    log_probs = (-torch.rand(6, tokens, generator=g)).requires_grad_()
    mask = torch.arange(tokens) < torch.tensor([1, 0.8, 0.2, 0.5, 0, 0.3])[:, None] * tokens
    gamma = rhythm_credit(torch.rand(6, tokens, generator=g), torch.rand(6, tokens, generator=g), mask, **options)
    return log_probs, shape_advantages(ADVANTAGES, gamma), mask


def noisy(log_probs, size, seed=1):
    """What the log-probabilities were before some steps."""
    noise = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(seed))
    return log_probs.detach() + size * noise


def token_loss(log_probs, advantages, mask, old):
    ratio = (log_probs - old).exp()
    least = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(least * mask).sum() / mask.sum()


def sequence_loss(log_probs, advantages, mask, old):
    """GSPO's: one ratio a response, the mean of its tokens'."""
    ratio = (((log_probs - old) * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()[:, None]
    return -(torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * mask).sum() / mask.sum()


def scalar_loss(log_probs, advantages, mask, old):
    """One that takes `(B, T)` and reads the first column."""
    return token_loss(log_probs, advantages[:, :1].expand_as(mask), mask, old)


def reinforce(log_probs, advantages, mask, old):
    return -(log_probs * advantages * mask).sum(1).mean()


def with_penalty(log_probs, advantages, mask, old):
    difference = old - 0.3 - log_probs
    penalty = ((difference.exp() - difference - 1) * mask).sum() / mask.sum()
    return token_loss(log_probs, advantages, mask, old) + 0.05 * penalty


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.05])
@pytest.mark.parametrize("loss", [token_loss, reinforce, with_penalty])
@pytest.mark.parametrize("mode", ["coupled", "local", "random"])
def test_losses_of_token_advantages_are_let_pass(loss, mode, noise):
    log_probs, advantages, mask = batch(mode=mode)
    assert credit_is_seen(loss(log_probs, advantages, mask, noisy(log_probs, noise)), log_probs, advantages, mask)


@pytest.mark.parametrize("weight", [3.0, 100.0])
def test_terms_that_pull_harder_at_the_same_tokens_do_not_hide_credit(weight):
    """As supervised fine-tuning beside the policy gradient does: it pulls at every token alike."""
    for seed in range(10):
        log_probs, advantages, mask = batch(seed)
        extra = -weight * (log_probs * mask).sum() / mask.sum()
        seen = token_loss(log_probs, advantages, mask, log_probs.detach()) + extra
        assert credit_is_seen(seen, log_probs, advantages, mask)
        for noise in (0.0, 0.05):
            blind = scalar_loss(log_probs, advantages, mask, noisy(log_probs, noise, seed)) + extra
            with pytest.raises(RuntimeError, match="does not see which tokens"):
                credit_is_seen(blind, log_probs, advantages, mask)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.05])
@pytest.mark.parametrize("loss", [sequence_loss, scalar_loss])
def test_losses_that_see_responses_alone_are_found_out(loss, noise):
    log_probs, advantages, mask = batch()
    with pytest.raises(RuntimeError, match="does not see which tokens credit chose"):
        credit_is_seen(loss(log_probs, advantages, mask, noisy(log_probs, noise)), log_probs, advantages, mask)


@pytest.mark.parametrize("loss", [token_loss, scalar_loss])
def test_is_never_wrong_under_heavy_weights(loss):
    """Weights of tokens that have nothing to do with credit: it may not know, but it does not say the opposite."""
    certain = 0
    for seed in range(40):
        log_probs, advantages, mask = batch(seed)
        total = loss(log_probs, advantages, mask, noisy(log_probs, 0.0)) * 0
        weight = noisy(log_probs, 0.5, seed).sub(log_probs.detach()).exp()
        shaped = advantages if loss is token_loss else advantages[:, :1].expand_as(mask)
        total = total - (weight * log_probs * shaped * mask).sum()
        try:
            seen = credit_is_seen(total, log_probs, advantages, mask)
        except RuntimeError:
            assert loss is scalar_loss
            certain += 1
        else:
            assert not seen or loss is token_loss
            certain += seen
    assert certain >= 30


def test_shifted_by_one_token_is_found_out():
    log_probs, advantages, mask = batch(mode="random")
    with pytest.raises(RuntimeError, match="does not see"):
        credit_is_seen(reinforce(log_probs, advantages.roll(1, dims=1), mask, None), log_probs, advantages, mask)


def test_few_tokens_are_enough_without_other_weights():
    log_probs, advantages, mask = batch(tokens=12)
    assert credit_is_seen(reinforce(log_probs, advantages, mask, None), log_probs, advantages, mask)
    with pytest.raises(RuntimeError, match="does not see"):
        credit_is_seen(scalar_loss(log_probs, advantages, mask, log_probs.detach()), log_probs, advantages, mask)


def test_too_few_tokens_beside_other_weights_cannot_say():
    """A line through three or four points, which the weights bend: in some batches it looks certain and is wrong."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        log_probs = torch.zeros(1, 3 + seed % 2, requires_grad=True)
        advantages = torch.tensor([[1.5, 1.0, 1.0, 1.5]])[:, : log_probs.shape[1]]
        weight = (0.3 * torch.randn(log_probs.shape, generator=generator)).exp()
        loss = -(weight * advantages * log_probs).sum()
        assert not credit_is_seen(loss, log_probs, advantages, torch.ones_like(log_probs))


def test_what_half_precision_rounds_away_cannot_say():
    """Gradients too small for float16, which a trainer scales before it differentiates."""
    for seed in range(5):
        log_probs, advantages, mask = batch(seed, gamma_amp=1.02, mode="random")
        log_probs = log_probs.detach().half().requires_grad_()
        loss = 1e-3 * token_loss(log_probs, advantages, mask, log_probs.detach())
        assert not credit_is_seen(loss, log_probs, advantages, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    log_probs, advantages, mask = batch()
    log_probs = log_probs.detach().to(dtype).requires_grad_()
    low = advantages.to(dtype)
    assert credit_is_seen(token_loss(log_probs, low, mask, log_probs.detach()), log_probs, low, mask)
    with pytest.raises(RuntimeError, match="does not see"):
        credit_is_seen(scalar_loss(log_probs, low, mask, log_probs.detach()), log_probs, low, mask)


def test_batches_that_cannot_say():
    log_probs, advantages, mask = batch()
    plain = shape_advantages(ADVANTAGES, torch.ones_like(log_probs))
    for case in (torch.zeros_like(plain), plain):
        assert not credit_is_seen(token_loss(log_probs, case, mask, log_probs.detach()), log_probs, case, mask)
    nothing = torch.zeros_like(mask)
    loss = (token_loss(log_probs, advantages, mask, log_probs.detach()) * 0).sum()
    assert not credit_is_seen(loss, log_probs, advantages, nothing)
    with torch.no_grad():
        loss = token_loss(log_probs, advantages, mask, log_probs)
    assert not credit_is_seen(loss, log_probs, advantages, mask)


def test_a_loss_of_other_log_probs():
    log_probs, advantages, mask = batch()
    other = log_probs.detach().clone().requires_grad_()
    for given in (log_probs, log_probs.detach()):
        with pytest.raises(RuntimeError, match="the loss is not made of log_probs, so credit does not reach it"):
            credit_is_seen(reinforce(other, advantages, mask, None), given, advantages, mask)


def test_what_does_not_fit_is_named():
    log_probs, advantages, mask = batch()
    loss = (log_probs * 1.5).mul(advantages * mask).exp().sum()
    with pytest.raises(ValueError, match="response_mask must be bool or 0/1, got other values"):
        credit_is_seen(loss, log_probs, mask, advantages)
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(6, 400\)"):
        credit_is_seen(log_probs * 1, log_probs, advantages, mask)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"credit_is_seen must come before loss.backward\(\)"):
        credit_is_seen(loss, log_probs, advantages, mask)


def test_packed_and_the_loss_stays_differentiable():
    log_probs, advantages, mask = batch()
    flat = log_probs.detach().flatten().requires_grad_()
    loss = -(flat * advantages.flatten() * mask.flatten()).sum()
    assert credit_is_seen(loss, flat, advantages.flatten(), mask.flatten())
    assert flat.grad is None
    loss.backward()
    torch.testing.assert_close(flat.grad, -(advantages * mask).flatten())


@pytest.mark.parametrize("shape", [(-1,), (1, -1)])
@pytest.mark.parametrize("loss", [token_loss, sequence_loss, scalar_loss])
def test_packed_responses_are_told_apart_by_where_they_begin(loss, shape):
    """Else one whose advantages differ between responses alone would pass."""
    log_probs, advantages, mask = batch()
    lengths = mask.sum(1)
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    flat = log_probs.detach()[mask].view(shape).requires_grad_()
    rows = torch.zeros_like(advantages).masked_scatter(mask, flat)
    value = loss(rows, advantages, mask, rows.detach())
    packed = (value, flat, advantages[mask].view(shape), torch.ones_like(flat))
    if loss is token_loss:
        assert credit_is_seen(*packed, cu_seqlens=cu_seqlens)
    else:
        with pytest.raises(RuntimeError, match="does not see which tokens credit chose"):
            credit_is_seen(*packed, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=rf"cu_seqlens must end with the {int(mask.sum())} tokens of log_probs, got"):
        credit_is_seen(*packed, cu_seqlens=cu_seqlens[:-2])


def test_other_shapes():
    log_probs, advantages, mask = batch()
    loss = reinforce(log_probs, advantages, mask, None)
    with pytest.raises(ValueError, match=r"advantages must have the shape of log_probs, \(6, 400\), got \(6,\)"):
        credit_is_seen(loss, log_probs, advantages[:, 0], mask)
