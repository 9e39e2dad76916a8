"""The trainer: parameters that appear during a run, and compiled steps that have to stop."""

from functools import partial

import pytest
import torch
from torch import nn

from pyro_flows_ext.infer.compiled.unsupported import UnsupportedForCompilation
from pyro_flows_ext.infer.training.trainer import Trainer


class Growing:
    """Half the squared distance from 1 of one parameter, and of a second one from the second call on."""

    def __init__(self):
        self.params = [nn.Parameter(torch.zeros(())) for _ in range(2)]
        self.calls = 0

    def __call__(self):
        self.calls += 1
        read = self.params[: min(self.calls, 2)]
        loss = torch.stack([(p - 1).square() / 2 for p in read]).sum()
        loss.backward()
        return loss.item(), read


def test_a_parameter_that_appears_later_trains_at_the_rate_of_the_others():
    objective = Growing()
    trainer = Trainer(objective, partial(torch.optim.SGD, lr=0.1), 0.1, None)
    first, second = objective.params
    assert trainer.step() == 0.5
    assert [first.item(), second.item()] == pytest.approx([0.1, 0.0])
    trainer.step(0.5)
    # A step of .1 x .5 from .1 and from 0 towards 1.
    assert [first.item(), second.item()] == pytest.approx([0.145, 0.05])
    trainer.step()
    assert second.item() == pytest.approx(0.145)
    assert len(trainer.state()["params"]) == 2


def test_a_scheduler_refuses_a_parameter_that_appears_later():
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    trainer = Trainer(Growing(), partial(torch.optim.SGD, lr=0.1), 0.1, None, scheduler)
    trainer.step()
    with pytest.raises(ValueError, match=r"got 1 later ones.*use schedule="):
        trainer.step()


def test_a_compiled_step_that_has_to_stop_is_taken_eagerly():
    class Outdated:
        def step(self):
            raise UnsupportedForCompilation("the model has changed")

    objective = Growing()
    trainer = Trainer(objective, partial(torch.optim.SGD, lr=0.1), 0.1, None)
    trainer.compiled = Outdated()
    with pytest.warns(UserWarning, match="eager steps: the model has changed"):
        assert trainer.step() == 0.5
    assert objective.params[0].item() == pytest.approx(0.1)
    assert trainer.compiled is None
    trainer.step()
    assert objective.calls == 2
