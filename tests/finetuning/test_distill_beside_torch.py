"""Distillation beside torch and TRL in float64: losses, and gradients of the adapters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure
from nplora.finetuning.objectives.distill import DistillLoss
from nplora.finetuning.teachers import ModelTeacher
from nplora.lm import LanguageModel
from nplora.models.divergence import DIVERGENCES, Distillation, TopK
from nplora.models.packing import IGNORED, PackedBatch, pack

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
torch_models = pytest.importorskip("torch_models")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]

Array = np.ndarray[Any, Any]
LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]


class Pair:
    """A student with an adapter and a teacher, in torch (float64) and here (float32)."""

    def __init__(self, directory: Path) -> None:
        self.student, self.lm = self._both(directory, 0)
        self.teacher, taught_by = self._both(directory, 1)
        self.ours = ModelTeacher(taught_by)
        options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=LINEARS)
        self.student = peft.get_peft_model(self.student, options)
        torch.manual_seed(3)
        for parameter in self.student.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn_like(parameter)
        self.student.save_pretrained(directory / "adapter", save_embedding_layers=False)
        self.student.double()
        self.lm.add_lora(rank=4, alpha=6, targets=LINEARS)
        nplora.load_adapter(self.lm, directory / "adapter")

    @staticmethod
    def _both(directory: Path, seed: int) -> tuple[Any, LanguageModel]:
        # Other initial values than the tests of logits have: with logits of the order of 10, rounding in the
        # blocks would hide errors of a loss.
        model = torch_models.make("llama", seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5 if parameter.ndim > 1 else 1)
        path = directory / f"model{seed}"
        return model, nplora.load_model(torch_models.save(model, path, "safetensors", "llama"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def batch() -> PackedBatch:
    rng = np.random.default_rng(5)
    sequences = []
    for length, prompt in ((21, 9), (8, 0), (30, 12), (5, 3)):
        ids = rng.integers(0, torch_models.SIZES["vocab_size"], length)
        sequences.append((ids, np.where(np.arange(length) < prompt, IGNORED, ids)))
    return pack(sequences)


def rows_of(model: Any, batch: PackedBatch) -> Any:
    """torch's logits of the rows that have a target."""
    found = []
    for begin, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
        logits = model(torch.from_numpy(batch.ids[None, begin:end])).logits[0]
        found.append(logits[torch.from_numpy(batch.targets[begin:end] != IGNORED)])
    return torch.cat(found)


class TopTeacher(ModelTeacher):
    """Gives torch's most likely tokens."""

    def __init__(self, model: Any, lm: LanguageModel, k: int, temperature: float) -> None:
        super().__init__(lm)
        self._model, self._k, self._temperature = model, k, temperature

    def prepare_batch(self, batch: PackedBatch) -> Any:
        with torch.no_grad():
            log_p = torch.log_softmax(rows_of(self._model, batch).double() / self._temperature, -1)
        top = log_p.topk(self._k)
        rest = log_p.scatter(1, top.indices, -torch.inf).logsumexp(1, keepdim=True)
        stored = TopK(top.indices.numpy(), torch.cat([top.values, rest], 1).numpy())
        places = np.cumsum(batch.targets != IGNORED) - 1
        return lambda rows: stored[places[rows]]


def expected(pair: Pair, batch: PackedBatch, loss: Distillation, k: int | None) -> Any:
    z = rows_of(pair.student, batch)
    with torch.no_grad():
        t = rows_of(pair.teacher.double(), batch)
    log_q, log_p = (torch.log_softmax(x / loss.temperature, -1) for x in (z, t))
    if k is not None:
        ids = log_p.topk(k).indices
        log_p, log_q = (
            torch.cat([x.gather(1, ids), x.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)], 1)
            for x in (log_p, log_q)
        )
    given = (log_q, log_p) if loss.kl == "forward" else (log_p, log_q)
    kl = torch.nn.functional.kl_div(*given, reduction="batchmean", log_target=True)
    labels = torch.from_numpy(batch.targets[batch.targets != IGNORED])
    hard = torch.nn.functional.cross_entropy(z, labels)
    return loss.ratio * loss.temperature**2 * kl + (1 - loss.ratio) * hard


def gradients_of(model: Any, ours: LanguageModel) -> dict[str, Array]:
    """PEFT's gradients by our parameters' names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            found[f"{module}.{'A' if '.lora_B' in name else 'B'}"] = parameter.grad.numpy().copy()
    assert found.keys() == {parameter.name for parameter in ours.parameters()}
    return found


@pytest.mark.parametrize("kl", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "ratio"), [(1.0, 1.0), (1.0, 0.3), (2.5, 0.7)])
@pytest.mark.parametrize("k", [None, 6])
def test_losses_and_gradients_of_adapters_are_those_of_torch(
    pair: Pair, batch: PackedBatch, kl: str, temperature: float, ratio: float, k: int | None, figure: Figure
) -> None:
    formula = Distillation(kl, temperature, ratio)
    pair.student.zero_grad()
    wanted = expected(pair, batch, formula, k)
    wanted.backward()
    gradients = gradients_of(pair.student, pair.lm)
    teacher = pair.ours if k is None else TopTeacher(pair.teacher, pair.lm, k, temperature)
    loss, count = DistillLoss(formula, teacher, micro_tokens=30), batch.num_targets
    pair.lm.zero_grad()
    total = loss.forward_backward(pair.lm, batch, None, 1 / count)
    assert total / count == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.evaluate(pair.lm, batch, None) == pytest.approx(wanted.item(), rel=1e-5)
    errors = {
        p.name: abs(p.grad - gradients[p.name]).max() / abs(gradients[p.name]).max()
        for p in pair.lm.parameters()
    }
    figure("error of an adapter's gradient", max(errors.values()))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("kl", "beta"), [("forward", 0.0), ("reverse", 1.0)])
def test_a_step_is_that_of_trls_gkd_trainer(pair: Pair, batch: PackedBatch, kl: str, beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    temperature, count = 2.0, batch.num_targets
    pair.student.zero_grad()
    z = rows_of(pair.student, batch)[None]
    t = rows_of(pair.teacher.double(), batch)[None].detach()
    labels = torch.zeros(1, count, dtype=torch.long)
    wanted = gkd.GKDTrainer.generalized_jsd_loss(z, t, labels, beta=beta, temperature=temperature)
    (temperature**2 * wanted).backward()  # TRL does not scale with T²
    loss = DistillLoss(Distillation(kl, temperature), pair.ours)
    pair.lm.zero_grad()
    total = loss.forward_backward(pair.lm, batch, None, 1 / count)
    assert total / count == pytest.approx(temperature**2 * wanted.item(), rel=1e-5)
    for parameter in pair.lm.parameters():
        gradient = gradients_of(pair.student, pair.lm)[parameter.name]
        np.testing.assert_allclose(parameter.grad, gradient, atol=1e-5 * abs(gradient).max())
