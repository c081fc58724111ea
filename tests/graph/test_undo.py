"""The undo log puts a model back as it was at the last commit: values, replaced parameters and everything else."""

from __future__ import annotations

import torch
from torch import nn

from wrapq.graph.undo import UndoLog


def test_changed_and_replaced_parameters_come_back_and_undo_runs_last_first() -> None:
    model, calls = nn.Sequential(nn.Linear(3, 2, bias=False)), []
    weight, before = model[0].weight, model[0].weight.detach().clone()
    log = UndoLog(model)
    log.save("0", "weight")
    model[0].weight.data.mul_(2)
    log.save("0", "weight")  # the first values are the ones to restore
    log.replace("0", "bias", nn.Parameter(torch.ones(2)))
    log.append(lambda: calls.append("first"))
    log.append(lambda: calls.append("last"))
    log.restore()
    assert model[0].weight is weight and torch.equal(weight, before) and model[0].bias is None
    assert calls == ["last", "first"]


def test_committed_changes_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    log = UndoLog(model)
    log.save("0", "weight")
    model[0].weight.data.fill_(5)
    log.commit()
    log.replace("0", "weight", nn.Parameter(torch.zeros(2, 3)))
    model[0].weight.data.add_(1)
    log.restore()
    assert bool((model[0].weight == 5).all())
