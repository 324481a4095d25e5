"""Optimisers, the learning rate and the weight average of train.py.

    python -m pytest tests/test_optim.py

    build_optimisers   Adam, or Muon for matrices and Adam for the rest
    rate_factor        warm-up, then a rate that is divided by ten twice
    update_ema         the average of the weights, which is what is scored and kept
"""

import torch

from common import fast_bfloat16

MUON_RATE = 20           # Muon's rate divided by Adam's, measured (docs/lab.md)
# Matrices and kernels that Adam learns: M's, as Muon's steps, all of one size, saturate its softmax; and the
# first convolution's
ADAM_ALONE = (".M1.weight", ".M2.weight", "backbone.conv1.weight")
DECAY_AT = (2 / 3, 13 / 15)              # fractions of the training after which the rate is divided by ten:
#                                          epochs 200 and 260 of 300, DistilPose's
WARM_UP = 500                            # steps, at most a tenth of the training
EMA_FRACTION = 0.02                      # window of the weight average, as a fraction of all steps
MOMENTUM, ITERATIONS = 0.95, 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315    # of the quintic polynomial that pulls all singular values towards 1


def rate_factor(step, steps):
    """Learning rate divided by its maximum: linear warm-up, then 1, divided by ten at each of DECAY_AT."""
    warm = min(1, (step + 1) / min(WARM_UP, max(1, steps // 10)))
    return warm * 0.1 ** sum(step >= fraction * steps for fraction in DECAY_AT)


@torch.no_grad()
def update_ema(ema, model, step, steps):
    """Move the weight average towards the model's weights.

        ema <- ema + w (model - ema),    w = max(1 / (step + 1), min(1, 1 / (EMA_FRACTION * steps)))

    It starts as a plain mean and forgets what lies before the last decay of the rate.
    """
    w = max(1 / (step + 1), min(1, 1 / (EMA_FRACTION * steps)))
    for mean, now in zip(ema.state_dict().values(), model.state_dict().values()):
        if mean.is_floating_point():     # weights and batch norms' statistics, not their counters
            mean.lerp_(now, w)


def build_optimisers(model, name, lr):
    """A list of optimisers that together learn all weights of the model.

    'adam': Adam for all. 'muon': Muon, at MUON_RATE times lr, for the matrices of the encoder's blocks and
    the backbone's convolutions but those of ADAM_ALONE; Adam for the rest. So Muon learns W1 and W2 of a
    dynamic filter, and Adam every K, which has three dimensions.
    """
    learning = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    if name == "adam":
        return [torch.optim.Adam(learning.values(), lr=lr, fused=True)]
    matrices = [key for key, weight in learning.items()
                if (".blocks." in key and weight.ndim == 2 or "backbone." in key and weight.ndim == 4)
                and not key.endswith(ADAM_ALONE)]
    others = [key for key in learning if key not in matrices]
    return [Muon([learning[key] for key in matrices], lr=MUON_RATE * lr),
            torch.optim.Adam([learning[key] for key in others], lr=lr, fused=True)]


def orthogonal(X):
    """Matrices (n, rows, columns), rows <= columns -> matrices with the same singular vectors, values near 1.

    Newton-Schulz iterations, each X <- a X + (b A + c A^2) X with A = X X^T. On GPUs in bfloat16.
    """
    a, b, c = COEFFICIENTS
    if X.is_cuda and fast_bfloat16(X.device):
        X = X.to(torch.bfloat16)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        A = X @ X.mT
        polynomial = torch.baddbmm(A, A, A, beta=b, alpha=c)                   # b A + c A^2
        X = torch.baddbmm(X, polynomial, X, beta=a)                            # a X + polynomial X
    return X.float()


class Muon(torch.optim.Optimizer):
    """Muon: momentum descent for matrices, with every update orthogonalised.

    A convolution's kernel (outputs, inputs, h, w) counts as a matrix of outputs x (inputs h w).

        m <- m + (1 - momentum) (g - m)
        W <- W - rate * sqrt(max(1, rows / columns)) * orthogonal(g + momentum (m - g))

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. torch.optim.Muon takes the
    same steps, but takes no convolutions, and always iterates in bfloat16, which is slow on most CPUs. Here
    matrices of one shape are one batch.
    """

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}                             # by shape; transposed where rows > columns
            for W in group["params"]:
                if W.grad is None:
                    continue
                if "momentum" not in self.state[W]:
                    self.state[W]["momentum"] = torch.zeros_like(W)
                m = self.state[W]["momentum"]
                m.lerp_(W.grad, 1 - MOMENTUM)
                update = W.grad.lerp(m, MOMENTUM).flatten(1)
                update = update if update.shape[0] <= update.shape[1] else update.mT
                batches.setdefault(update.shape, []).append((W, update))
            for batch in batches.values():
                updates = orthogonal(torch.stack([update for _, update in batch]))
                for (W, _), update in zip(batch, updates):
                    rows, columns = len(W), W[0].numel()
                    update = update if rows <= columns else update.mT
                    W.add_(update.reshape(W.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
