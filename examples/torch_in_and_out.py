"""nplora beside torch: data from a DataLoader, and nplora's kernels inside a torch network.

First a torch `DataLoader` feeds nplora's `Trainer`. Then a `torch.autograd.Function` wraps nplora's forward
and backward, and a torch optimiser trains the factors. The gradients are compared with torch's own.

    pip install torch
    python examples/torch_in_and_out.py
"""

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import nplora


class LoRAFunction(torch.autograd.Function):
    """y = x Wᵀ + scale · (x Bᵀ) Aᵀ by nplora. Tensors and arrays share their memory: nothing is copied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, W: Any, scale: float) -> Any:
        y, z = nplora.lora_forward(x.detach().numpy(), W, A.detach().numpy(), B.detach().numpy(), scale)
        ctx.save_for_backward(x, A, B, torch.from_numpy(z))
        ctx.W, ctx.scale = W, scale
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, A, B, z = (tensor.detach().numpy() for tensor in ctx.saved_tensors)
        dx, dA, dB = nplora.lora_backward(
            dy.contiguous().numpy(), x, z, ctx.W, A, B, ctx.scale, need_dx=ctx.needs_input_grad[0]
        )
        gradients = (None if array is None else torch.from_numpy(array) for array in (dx, dA, dB))
        return *gradients, None, None  # W and scale are constants


class TorchLoRALinear(torch.nn.Module):
    """A torch module with a frozen weight of nplora, here in blocks of 4 bits."""

    def __init__(self, weight: torch.Tensor, rank: int, dtype: str = "q4_1") -> None:
        super().__init__()
        d_out, d_in = weight.shape
        self.W = nplora.FrozenWeight(weight.detach().numpy(), dtype)
        self.A = torch.nn.Parameter(torch.zeros(d_out, rank))
        self.B = torch.nn.Parameter(torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LoRAFunction.apply(x, self.A, self.B, self.W, 2.0)


def main() -> None:
    torch.manual_seed(0)
    pretrained = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    shift = torch.randn(32, 2) @ torch.randn(2, 64) / 8
    x = torch.randn(2000, 64)
    y = x @ (pretrained.weight + shift).T

    from_a_data_loader(pretrained.weight.numpy(), x, y)
    inside_torch(pretrained.weight, x, y)
    same_gradients(pretrained.weight, x[:50])


def from_a_data_loader(W: np.ndarray, x: torch.Tensor, y: torch.Tensor) -> None:
    """Torch in: batches of tensors. Torch out: `torch.from_numpy` of the prediction."""
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    net = nplora.Sequential(nplora.LoRALinear(W, rank=2, rng=0))
    optimizer = nplora.AdamW(lr=2e-2, weight_decay=0.0)
    trainer = nplora.Trainer(net, "mse", optimizer, schedule="cosine", progress=False)
    history = trainer.fit(loader, epochs=10)
    prediction = torch.from_numpy(trainer.predict(x.numpy()))
    loss = torch.nn.functional.mse_loss(prediction, y).item()
    print(f"Trainer with a DataLoader:      loss {history.loss[0]:.3f} -> {loss:.6f}")
    assert loss < 1e-3 * history.loss[0]


def inside_torch(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """A torch network, a torch loss and a torch optimiser; nplora computes the adapted layer."""
    net = torch.nn.Sequential(TorchLoRALinear(weight, rank=4), torch.nn.Identity())
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(10):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(net(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    print(f"torch with nplora's 4-bit layer: loss {losses[0]:.3f} -> {losses[-1]:.6f}")
    assert losses[-1] < 0.05 * losses[0]


def same_gradients(weight: torch.Tensor, x: torch.Tensor) -> None:
    """The same layer in float32, once by nplora and once by torch's autograd."""
    layer = TorchLoRALinear(weight, rank=4, dtype="float32")
    torch.nn.init.normal_(layer.A)
    x = x.clone().requires_grad_()
    inputs = (x, layer.A, layer.B)
    ours = torch.autograd.grad(layer(x).square().sum(), inputs)
    own = x @ weight.T + 2.0 * (x @ layer.B.T) @ layer.A.T
    theirs = torch.autograd.grad(own.square().sum(), inputs)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]
    print("relative difference to torch's gradients of x, A, B: " + ", ".join(f"{e:.1e}" for e in errors))
    assert max(errors) < 1e-5


if __name__ == "__main__":
    main()
