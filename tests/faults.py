"""Transforms with one fault each, and the points of the contract that find it."""

import torch
from torch import nn

from pyro_flows_ext.transforms import FlowTransform, Planar


class Scale(FlowTransform):
    """y = exp(s) x: the sound transform that the others spoil."""

    def __init__(self, input_dim):
        super().__init__()
        self.input_dim = input_dim
        self.s = nn.Parameter(torch.zeros(input_dim))

    def forward_and_ladj(self, x):
        return x * self.s.exp(), self.s.sum().expand(x.shape[:-1])

    def inverse_and_ladj(self, y):
        return y * (-self.s).exp(), -self.s.sum().expand(y.shape[:-1])


class WrongLadj(Scale):
    """Twice the log-det, both ways: consistent with itself, and wrong."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y, 2 * ladj

    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y)
        return x, 2 * ladj


class WrongSign(Scale):
    """Mirrors one coordinate and does not say so in `sign`."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return torch.cat([-y[..., :1], y[..., 1:]], -1), ladj

    def inverse_and_ladj(self, y):
        return super().inverse_and_ladj(torch.cat([-y[..., :1], y[..., 1:]], -1))


class MissingInverse(FlowTransform):
    def __init__(self, input_dim):
        super().__init__()
        self.input_dim = input_dim
        self.s = nn.Parameter(torch.zeros(input_dim))

    def forward_and_ladj(self, x):
        return x * self.s.exp(), self.s.sum().expand(x.shape[:-1])


class CoarseInverse(Scale):
    """Right to six digits: enough in float32, not in float64."""

    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y)
        return x * (1 + 1e-6), ladj


class InverseLadjWithoutMinus(Scale):
    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y)
        return x, -ladj


class SeparateCallDiffers(Scale):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) + 0.5


class RepeatedPass(Scale):
    """No memory: sampling, then scoring, costs two passes."""

    def _store(self, *args, **kwargs):
        pass


class RowCoupling(Scale):
    """Subtracts a mean over the batch, as batch normalisation does in training mode."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y - 0.1 * self._mean(x), ladj

    def inverse_and_ladj(self, y):
        # The mean of x, from that of y = eˢ x - 0.1 mean(x).
        mean = self._mean(y) / (self.s.exp() - 0.1)
        return super().inverse_and_ladj(y + 0.1 * mean)

    def _mean(self, x):
        return x.reshape(-1, x.shape[-1]).mean(0) if x.dim() > 1 else torch.zeros_like(x)


class WrongShape(Scale):
    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y, ladj.unsqueeze(-1)


class SharedDraw(Planar):
    """A transform that hides the batch shape of its context, so that all rows get one draw of the base."""

    def __init__(self, input_dim):
        super().__init__(input_dim, context_dim=2, hidden_dims=(4,))

    def condition(self, context):
        transform = super().condition(context)
        transform.__dict__["batch_shape"] = torch.Size()
        return transform


class ChangesDtype(Scale):
    """Fills a tensor of the default dtype."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        out = torch.zeros(y.shape)
        out[...] = y
        return out, ladj


class Float32Constant(Scale):
    """A constant with seven digits."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y + torch.tensor(0.1), ladj

    def inverse_and_ladj(self, y):
        return super().inverse_and_ladj(y - torch.tensor(0.1))


class ParameterWithoutGradient(Scale):
    def forward_and_ladj(self, x):
        return x * self.s.detach().exp(), self.s.detach().sum().expand(x.shape[:-1])


class WrongInverseGradient(Scale):
    """Right values, as from a root finder without implicit gradients; the parameter's gradient misses a part."""

    def inverse_and_ladj(self, y):
        return y * (-self.s.detach()).exp(), super().inverse_and_ladj(y)[1]


class MeanGradient(Scale):
    """A backward pass that averages over the batch where it should keep rows apart."""

    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y)
        if x.requires_grad and x.dim() == 2:
            x.register_hook(lambda grad: grad.mean(0, keepdim=True).expand_as(grad))
        return x, ladj


class NotPickleable(Scale):
    def __init__(self, input_dim):
        super().__init__(input_dim)
        self.nonlinearity = lambda x: x


class StateAfterUse(Scale):
    """Registers a buffer on first use, so that a fresh module does not know a used one's state."""

    def forward_and_ladj(self, x):
        self.register_buffer("seen", torch.ones(()))
        return super().forward_and_ladj(x)


class CpuOnly(Scale):
    """Makes a tensor without asking for the device."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y + torch.zeros(self.input_dim, dtype=x.dtype), ladj


class CpuOnlyProduct(Scale):
    """Keeps a matrix that no `.to` moves, in a product that the meta device lets pass."""

    def __init__(self, input_dim):
        super().__init__(input_dim)
        self.eye = [torch.eye(input_dim)]

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return nn.functional.linear(y, self.eye[0].to(x.dtype)), ladj


class MutatedInput(Scale):
    def forward_and_ladj(self, x):
        y = x.mul_(self.s.detach().exp()) * (self.s - self.s.detach()).exp()
        return y, self.s.sum().expand(x.shape[:-1])


class FlagChanger(Scale):
    def forward_and_ladj(self, x):
        self.s.requires_grad_(True)
        return super().forward_and_ladj(x)


class StaleCache(Scale):
    """The cache of `torch.distributions.Transform`: the log-det of the last (x, y), whatever has happened since."""

    def __call__(self, x):
        y, ladj = self.forward_and_ladj(x)
        self.__dict__["_last"] = (x, y, ladj)
        return y

    def log_abs_det_jacobian(self, x, y):
        x_last, y_last, ladj = self.__dict__.get("_last", (None, None, None))
        return ladj if x is x_last and y is y_last else super().log_abs_det_jacobian(x, y)

    def _inv_call(self, y):
        x_last, y_last, _ = self.__dict__.get("_last", (None, None, None))
        return x_last if y is y_last else super()._inv_call(y)

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k != "_last"}


class DataDependentBranch(Scale):
    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return (y if x.sum() > 0 else y + 0.0), ladj


class LostMass(Scale):
    """Scales by a factor that its log-det does not have: the density integrates to 1.2^-2."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return 1.2 * y, ladj + 4 * torch.tensor(1.2, dtype=x.dtype).log()

    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y / 1.2)
        return x, ladj - 4 * torch.tensor(1.2, dtype=y.dtype).log()


class SumOverPlate(Scale):
    """A log-det summed over the batch: a plate that subsamples scales the wrong number."""

    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y).sum().expand(x.shape[:-1])


# fault -> the points that find it, its own first. Every other point passes.
FAULTS = {
    MissingInverse: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16],
    CoarseInverse: [1, 2, 16],
    WrongLadj: [2, 14],
    WrongSign: [2],
    LostMass: [14, 2],
    InverseLadjWithoutMinus: [3, 2, 4, 14, 16],
    SeparateCallDiffers: [4, 14, 16],
    RepeatedPass: [4],
    RowCoupling: [5, 8],
    WrongShape: [5, 2, 3, 4, 16],
    ChangesDtype: [6, 1, 7, 10, 16],
    Float32Constant: [6],
    ParameterWithoutGradient: [7],
    WrongInverseGradient: [7],
    MeanGradient: [8, 7],
    NotPickleable: [9],
    StateAfterUse: [9, 11, 12],
    CpuOnly: [10],
    CpuOnlyProduct: [10],
    MutatedInput: [11, 2, 5, 6, 7, 9, 10, 12, 13, 16],
    FlagChanger: [11],
    StaleCache: [12, 4],
    DataDependentBranch: [13, 10],
    SumOverPlate: [16, 4, 14],
}
