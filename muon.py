"""Muon: gradient descent for matrices, with every update made orthogonal.

    python -m pytest tests/test_train.py      # the same steps as torch.optim.Muon

    m <- m + (1 - momentum) (g - m)           a running mean of the gradient
    W <- W - rate * sqrt(max(1, rows / columns)) * orthogonal(g + momentum (m - g))

where orthogonal(U S V^T) is near U V^T: all directions of an update count alike, however small their gradients. Five
Newton-Schulz iterations do without the decomposition. Jordan et al., "Muon: an optimizer for hidden layers in neural networks"
(2024); momentum in Nesterov's form and coefficients as there.

torch.optim.Muon does the same, but in bfloat16 always: on a CPU without native bfloat16 its iterations took 235 of the 400 ms of
a training step. In float32, in batches of matrices of one shape, they take 7 of 90 on any of the two.
"""

import torch

from inputs import fast_bfloat16

COEFFICIENTS = 3.4445, -4.7750, 2.0315       # of the quintic polynomial that pulls all singular values towards 1
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonal(X):
    """Matrices (n, rows, columns), rows <= columns, with singular values near 1."""
    a, b, c = COEFFICIENTS
    if X.is_cuda and fast_bfloat16(X.device):    # on a CPU float32, whatever it can: 7 instead of 5 of the step's 90 ms
        X = X.to(torch.bfloat16)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)          # a X + (b A + c A^2) X
    return X.float()


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions alone."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}                                         # by shape, lying: (short side, long side)
            for W in group["params"]:
                if W.grad is not None:
                    if "momentum" not in self.state[W]:
                        self.state[W]["momentum"] = torch.zeros_like(W)
                    m = self.state[W]["momentum"]
                    m.lerp_(W.grad, 1 - MOMENTUM)
                    update = W.grad.lerp(m, MOMENTUM)
                    lying = update if W.shape[0] <= W.shape[1] else update.mT
                    batches.setdefault(lying.shape, []).append((W, lying))
            for batch in batches.values():
                updates = orthogonal(torch.stack([lying for _, lying in batch]))
                for (W, _), update in zip(batch, updates):
                    rows, columns = W.shape
                    W.add_(update if rows <= columns else update.mT,
                           alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
