"""The next-token loss, position by position."""

from __future__ import annotations

import torch

from lfm2_mm.train.objectives import IGNORE, next_token_loss


def test_mean_over_positions_that_count() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 4, 6, generator=draw), torch.randn(9, 6, generator=draw)
    targets = torch.tensor([[3, IGNORE, 0, 8], [IGNORE, IGNORE, 5, IGNORE]])
    terms = [
        -(hidden[b, t] @ head.T).log_softmax(-1)[targets[b, t]]
        for b in range(2)
        for t in range(4)
        if targets[b, t] != IGNORE
    ]
    assert len(terms) == 4
    torch.testing.assert_close(next_token_loss(hidden, head, targets), torch.stack(terms).mean())


def test_positions_that_do_not_count_get_no_gradient() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    targets = torch.tensor([[IGNORE, 1, IGNORE]])
    torch.autograd.backward(next_token_loss(hidden, torch.randn(5, 4), targets))
    assert hidden.grad is not None
    assert hidden.grad[0, 1].abs().sum() > 0
    assert not hidden.grad[0, [0, 2]].any()


def test_a_batch_without_targets_costs_nothing() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    loss = next_token_loss(hidden, torch.randn(5, 4), torch.full((1, 3), IGNORE))
    torch.autograd.backward(loss)
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
