"""LoRA as in the textbook, with NumPy arrays and no layers.

A pretrained matrix W stays frozen. Two thin factors A and B are trained, and W + A·B takes the place of W.
The script shows that the update has low rank, that it never has to be formed, that its gradients are right,
and that merging it changes no result.

    python examples/textbook_lora.py
"""

import numpy as np

import nplora


def main() -> None:
    W = np.arange(36, dtype=np.float32).reshape(6, 6)  # frozen: 36 numbers
    A = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [2, 0], [0, 2]], np.float32)  # (d_out, r)
    B = np.array([[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0]], np.float32)  # (r, d_in)
    print(f"W has {W.size} numbers; A and B have {A.size + B.size} and give an update of W's shape:")
    print(A @ B)
    print(f"rank of the update: {np.linalg.matrix_rank(A @ B)}")
    assert np.linalg.matrix_rank(A @ B) == 2

    # Forward: y = W x + A (B x). The product A·B is never formed.
    x = np.ones(6, np.float32)
    y, z = nplora.lora_forward(x, W, A, B)
    print(f"\ny = W x + A (B x) = {y}")
    assert np.array_equal(y, (W + A @ B) @ x)

    # Backward: the gradients of A, B and x for a loss. W gets none, it is frozen.
    target = np.array([20, 50, 90, 120, 160, 200], np.float32)
    dy = 2 * (y - target)  # of the loss sum (y - target)²
    dx, dA, dB = nplora.lora_backward(dy, x, z, W, A, B)
    nudged = A.copy()
    nudged[4, 1] += 0.01  # one number of A, a little up
    measured = (squared_error(x, W, nudged, B, target) - squared_error(x, W, A, B, target)) / 0.01
    print(f"gradient of A[4, 1]: {dA[4, 1]:.1f} by lora_backward, {measured:.1f} by a small step")
    assert abs(dA[4, 1] - measured) < 0.2
    assert dx.shape == x.shape
    assert dB.shape == B.shape

    # Merge: W += A·B in place. Later calls need no A and B, so they cost what W alone costs.
    original = W.copy()
    nplora.merge_lora(W, A, B)
    print(f"after the merge, W x = {W @ x}")
    assert np.array_equal(W @ x, y)
    nplora.unmerge_lora(W, A, B)
    assert np.array_equal(W, original)  # these numbers are small integers; others are rounded
    print("after unmerging, W is the original again")


def squared_error(x: np.ndarray, W: np.ndarray, A: np.ndarray, B: np.ndarray, target: np.ndarray) -> float:
    y, _ = nplora.lora_forward(x, W, A, B)
    return float(np.sum((y - target) ** 2))


if __name__ == "__main__":
    main()
