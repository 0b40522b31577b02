#!/usr/bin/env python3
"""Train small models, save the loss of each step, and compare it with what another machine saved.

Usage: same_losses.py FILE [OTHER_FILE]

The scripts that test other systems run this script on the native system and on the other one. If both use the
same instruction set on the same architecture, all losses must be equal, even with another compiler or C
library. WebAssembly counts as x86-64 here.
"""

import platform
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import nplora  # noqa: E402
from small_llama import save_small_llama  # noqa: E402

STORAGES = ["float32", "bfloat16", "q8_0", "q4_1"]
STEPS, TOKENS = 20, 48
MOST = 1e-5  # eight times the largest difference seen on aarch64
PROCESSOR = {"amd64": "x86_64", "arm64": "aarch64", "wasm32": "x86_64"}


def losses(storage: str, directory: Path) -> np.ndarray:
    lm = nplora.load_model(save_small_llama(directory / f"{storage}.gguf", storage))
    lm.add_lora(rank=4, seed=3)
    optimizer = nplora.AdamW(lr=1e-2)
    ids = np.random.default_rng(7).integers(1, lm.vocab_size, size=(2, TOKENS))
    return np.array([lm.train_step(ids, ids, optimizer) for _ in range(STEPS)])


def main() -> None:
    file = Path(sys.argv[1])
    processor = platform.machine().lower()
    arithmetic = f"{nplora._core.config()['isa']} of {PROCESSOR.get(processor, processor)}"
    found = {storage: losses(storage, file.parent) for storage in STORAGES}
    np.savez(file, arithmetic=np.array(arithmetic), **found)
    if len(sys.argv) < 3:
        return
    others = np.load(sys.argv[2])
    other_arithmetic = str(others["arithmetic"])
    most = 0.0 if arithmetic == other_arithmetic else MOST
    print(f"{arithmetic} and {other_arithmetic}: the losses may differ by at most {most:g}")
    different = []
    for storage, values in found.items():
        difference = np.abs(values - others[storage])
        equal = int((values == others[storage]).sum())
        print(
            f"{storage}: loss {values[0]:.4f} to {values[-1]:.4f}; equal in {equal} of {STEPS} steps; "
            f"the largest difference is {difference.max():.1e}"
        )
        if not (difference <= most).all():  # also if a loss is NaN
            different.append(storage)
    if different:
        sys.exit(f"the losses differ by more than {most:g}: {', '.join(different)}")


if __name__ == "__main__":
    main()
