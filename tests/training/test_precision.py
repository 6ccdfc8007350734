"""Computing in bfloat16: as plain PyTorch would do it, and with parameters in float32."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_exp.training.precision import slow_precision
from mnist_exp.training.stack import Stack
from mnist_exp.training.trace import trace
from tests.training.helpers import (
    CPU,
    Build,
    MakeDataset,
    batch,
    cnn,
    fit,
    mlp,
    resnet,
    run,
    seeded,
)

BFLOAT16 = torch.bfloat16


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("build", [mlp, cnn, resnet])
def test_a_model_alone_has_the_gradients_of_a_plain_module_under_autocast(build: Build) -> None:
    stack, given = Stack(build, [0], CPU, BFLOAT16), batch(1)
    grads, buffers, loss, _ = stack.gradients(stack.params, stack.buffers, given)
    module = seeded(build, 0)
    with torch.autocast("cpu", BFLOAT16):
        logits = module(given.x[0])
    expected = F.cross_entropy(logits.float(), given.y[0])
    expected.backward()
    torch.testing.assert_close(loss[0], expected.detach(), rtol=1e-5, atol=1e-6)
    plain = flat([p.grad for p in module.parameters() if p.grad is not None])
    assert (flat([*grads.values()]) - plain).norm() < 0.02 * plain.norm()
    floats = [t for t in (*grads.values(), *buffers.values()) if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("build", [mlp, cnn, resnet])
def test_it_is_close_to_float32_and_not_the_same(build: Build, size: int) -> None:
    stacks = [Stack(build, range(size), CPU, p) for p in (torch.float32, BFLOAT16)]
    given = batch(size)
    exact, rounded = (s.gradients(s.params, s.buffers, given) for s in stacks)
    for k in range(size):
        one, other = (flat([g[k] for g in grads.values()]) for grads, *_ in (exact, rounded))
        assert 1e-4 * one.norm() < (one - other).norm() < 0.3 * one.norm()
    exact_logits, logits = (s.logits(given.x[0]) for s in stacks)
    assert logits.dtype == torch.float32 and not torch.equal(logits, exact_logits)
    torch.testing.assert_close(logits, exact_logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("build", [mlp, cnn, resnet])
def test_stacked_is_near_alone(build: Build, make_dataset: MakeDataset) -> None:
    """Nearer by far than to the model beside it."""
    data, runs = make_dataset(), [run(seed, lr=0.02) for seed in range(3)]
    together = fit(build, data, runs, precision=BFLOAT16).losses
    for k, own in enumerate(runs):
        alone = fit(build, data, [own], precision=BFLOAT16).losses
        distances = np.abs(together / alone - 1).max(0)
        assert distances[k] < 0.03
        assert distances[k] < 0.2 * np.delete(distances, k).min()


def test_logits_are_those_of_a_plain_module_under_autocast() -> None:
    stack, x = Stack(cnn, [0], CPU, BFLOAT16), batch(1).x[0]
    with torch.autocast("cpu", BFLOAT16), torch.no_grad():
        expected = stack.model(0)(x).float()
    torch.testing.assert_close(stack.logits(x)[0], expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("size", [1, 2])
def test_a_trace_computes_the_same(size: int) -> None:
    stack, given = Stack(cnn, range(size), CPU, BFLOAT16), batch(size)
    names = list(stack.params)

    def loss(*tensors: Tensor) -> list[Tensor]:
        params = dict(zip(names, tensors[2:], strict=True))
        asked = given._replace(x=tensors[0], y=tensors[1])
        grads, buffers, mean, correct = stack.gradients(params, stack.buffers, asked)
        return [*grads.values(), *buffers.values(), mean, correct]

    example = [given.x, given.y, *stack.params.values()]
    graph = trace(loss, example)
    assert all(torch.equal(a, b) for a, b in zip(graph(*example), loss(*example), strict=True))


def test_it_learns_what_float32_learns(make_dataset: MakeDataset) -> None:
    data, runs = make_dataset(val=40), [run(0), run(1)]
    exact, rounded = (
        fit(mlp, data, runs, epochs=3, precision=p) for p in (torch.float32, BFLOAT16)
    )
    assert not np.array_equal(exact.losses, rounded.losses)
    np.testing.assert_allclose(rounded.losses, exact.losses, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("capabilities", "is_slow"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, False),
        ({"avx512_bf16": True}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, False),
    ],
)
def test_a_cpu_without_instructions_is_slow(
    capabilities: dict[str, object], is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert ("training.precision=float32" in slow_precision(BFLOAT16, CPU)) == is_slow
    assert slow_precision(torch.float32, CPU) == ""
    assert slow_precision(BFLOAT16, torch.device("cuda")) == ""
