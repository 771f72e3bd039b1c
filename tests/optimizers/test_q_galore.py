"""Q-GaLore: the quantiser, stochastic rounding, 8-bit layers, lazy refreshes, packed bytes."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from drive import drive, gradients, groups, parameter, reloaded, trained
from torch import Tensor, nn

from eckart.forms.grids import Uniform
from eckart.optimizers import GaLore, Int8Linear, Lazy, QGaLore, int8_linears, param_groups, plain_linears
from eckart.optimizers.int8 import layer_of
from eckart.optimizers.storage import Blocks


def layer(out: int = 12, in_: int = 20, seed: int = 0, **settings: int) -> Int8Linear:
    linear = nn.Linear(in_, out)
    linear.weight.data.copy_(parameter(out, in_, seed=seed))
    return Int8Linear(linear, **settings)


def scales(module: Int8Linear) -> Tensor:
    """The step of the grid at every weight."""
    return module.scale.expand(-1, 256).flatten()[: 12 * 20].view(12, 20)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0], ids=["around zero", "positive", "negative"])
def test_numbers_are_within_half_a_step(bits: int, shift: float) -> None:
    x, state = parameter(7, 50).detach() + shift, {}
    storage = Blocks(bits, 64, Uniform())
    storage.put(state, "x", x)
    steps = state["x.scale"].expand(-1, 64).flatten()[:350].view(7, 50)
    # zero is on the grid and rounded to a code, which may cost another half step at the ends
    assert ((storage.get(state, "x") - x).abs() <= steps * (0.5 if shift else 1) * (1 + 1e-5)).all()
    codes = sum(t.nbytes for name, t in state.items() if name.endswith("codes"))
    assert codes == 6 * 64 * bits // 8
    assert sum(t.nbytes for t in state.values() if isinstance(t, Tensor)) == storage.nbytes((7, 50), x.dtype)


def test_equal_numbers_and_zeros_are_kept() -> None:
    for value in (0.0, 3.0, -2.0):
        state: dict[str, object] = {}
        Blocks(4, 16, Uniform()).put(state, "x", torch.full((4, 8), value))
        torch.testing.assert_close(Blocks(4, 16, Uniform()).get(state, "x"), torch.full((4, 8), value))


def test_stochastic_rounding_is_unbiased() -> None:
    module, generator = layer(), torch.Generator().manual_seed(0)
    W = module.dequantized()
    W = W + 0.37 * scales(module) * (W.abs() < 0.8 * W.abs().max())
    draws, n = torch.zeros(12, 20, dtype=torch.float64), 4000
    squares = torch.zeros_like(draws)
    for _ in range(n):
        module.requantize(W, generator)
        found = module.dequantized().double()
        draws += found
        squares += found.square()
    mean = draws / n
    error = ((squares / n - mean.square()).clamp(min=0) / n).sqrt()
    assert ((mean - W).abs() <= 4.5 * error + 1e-5).all()
    assert (error > 0).sum() > 100


def test_small_updates_are_lost_without_it_and_arrive_with_it() -> None:
    nearest, stochastic = layer(), layer()
    start, generator = nearest.dequantized(), torch.Generator().manual_seed(0)
    inner = (start > 0.8 * start.min()) & (start < 0.8 * start.max())  # the block's ends, which set its scale, stay
    step = 1e-3 * scales(nearest) * inner
    for _ in range(1000):
        nearest.requantize(nearest.dequantized() - step)
        stochastic.requantize(stochastic.dequantized() - step, generator)
    torch.testing.assert_close(nearest.dequantized(), start, atol=1e-5, rtol=0)
    moved = ((start - stochastic.dequantized()) / scales(nearest))[inner].mean()
    assert 0.8 < float(moved) < 1.2  # a thousand times a thousandth of a step


def test_layers_compute_what_linear_layers_with_their_weight_do() -> None:
    module, x = layer(), parameter(2, 3, 20, seed=4)
    W = nn.Parameter(module.dequantized())
    bias = nn.Parameter(module.bias.detach().clone())
    y, z = parameter(2, 3, 20, seed=4), x
    for scale in (1.0, 0.5):  # two accumulation steps
        ours, theirs = module(z), nn.functional.linear(y, W, bias)
        assert torch.equal(ours, theirs)
        (scale * ours.square().sum()).backward()
        (scale * theirs.square().sum()).backward()
    for found, wanted in ((z, y), (module.weight, W), (module.bias, bias)):
        torch.testing.assert_close(found.grad, wanted.grad)
    assert module.weight.grad.shape == (12, 20)


def test_weights_take_a_byte_each_and_their_stand_in_next_to_none() -> None:
    module = layer()
    assert module.nbytes == 240 + 8 == module.blocks.nbytes((12, 20), torch.float32)
    big = Int8Linear(nn.Linear(64, 32))
    assert big.nbytes == 32 * 64 + 8 * 8
    for moved in (big, copy.deepcopy(big), big.to(torch.bfloat16), big.double()):
        assert moved.weight.shape == (32, 64)
        assert moved.weight.untyped_storage().nbytes() <= 8
        assert moved.scale.dtype == moved.zero.dtype == torch.float32
    saved = []

    def keep(x: Tensor) -> Tensor:
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        big.float()(torch.ones(3, 64, requires_grad=True))
    assert saved == [(3, 64)]


def test_layers_work_under_autocast_and_can_be_pickled() -> None:
    module, x = layer(), parameter(5, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module.weight.grad.dtype == x.grad.dtype == module.bias.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, module.dequantized().sum(0).expand(5, -1), rtol=0.02, atol=0.1)
    other = pickle.loads(pickle.dumps(module))
    assert torch.equal(other.dequantized(), module.dequantized())
    assert layer_of(module.weight) is module
    assert layer_of(other.weight) is None
    assert other(x).shape == (5, 12)
    assert layer_of(other.weight) is other


def test_layers_are_saved_and_loaded_exactly() -> None:
    module, other = layer(), layer(seed=1)
    state = reloaded(module.state_dict())
    assert sorted(state) == ["bias", "codes", "scale", "zero"]
    other.load_state_dict(state)
    assert all(torch.equal(getattr(module, n), getattr(other, n)) for n in ("codes", "scale", "zero"))
    copied = copy.deepcopy(module)
    copied.requantize(torch.zeros(12, 20))
    assert torch.equal(module.dequantized(), other.dequantized())
    with pytest.raises(ValueError, match="NaN"):
        Int8Linear(nn.Linear(3, 3).requires_grad_(False).apply(lambda m: m.weight.fill_(torch.nan)))


def test_models_go_to_8_bits_and_back() -> None:
    model, x = net(), parameter(4, 16).detach()
    int8_linears(model)
    y = model(x)
    assert plain_linears(model) == ["0", "2"]
    assert torch.equal(model(x), y)
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(ValueError, match="weight of head is tied"):
        int8_linears(tied, include="head")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))


@pytest.mark.parametrize("hooks", [False, True])
def test_8_bit_models_learn(hooks: bool) -> None:
    model = net()
    assert int8_linears(model) == ["0", "2"]
    optimizer = QGaLore(param_groups(model, rank=6, interval=10), lr=0.02, scale=1.0, weight_decay=1e-3)
    if hooks:
        optimizer.update_in_backward()
    x, losses = parameter(64, 16).detach(), []
    target = torch.tanh(x @ parameter(16, 16, seed=3).detach() / 4)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert all(module.codes.dtype == torch.uint8 for module in model if isinstance(module, Int8Linear))


def test_8_bit_training_resumes_bit_for_bit() -> None:
    def run(model: nn.Module, optimizer: QGaLore, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(parameter(8, 16, seed=step)).square().sum().backward()
            optimizer.step()

    def made() -> tuple[nn.Module, QGaLore]:
        model = net()
        int8_linears(model)
        return model, QGaLore(param_groups(model, rank=6, interval=3), lr=0.02)

    (model, optimizer), (other, resumed) = made(), made()
    run(model, optimizer, range(4))
    other.load_state_dict(reloaded(model.state_dict()))
    resumed.load_state_dict(reloaded(optimizer.state_dict()))
    run(model, optimizer, range(4, 9))
    run(other, resumed, range(4, 9))
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def refreshes(grads: list[Tensor], interval: int = 2) -> tuple[list[int], QGaLore, nn.Parameter]:
    """The steps at which the subspace was chosen."""
    p, found = parameter(*grads[0].shape), []
    optimizer = QGaLore([{"params": [p], "rank": 2}], lr=1e-3, interval=interval)
    for step, G in enumerate(grads):
        before = optimizer.state[p].get("refreshes", 0)
        drive(optimizer, p, [G])
        if optimizer.state[p]["refreshes"] > before:
            found.append(step)
    return found, optimizer, p


def test_a_constant_gradient_settles_after_six_refreshes() -> None:
    steps, optimizer, p = refreshes(gradients((12, 8), 1) * 60)
    waits = [b - a for a, b in itertools.pairwise(steps)]
    assert waits == [2, 2, 2, 2, 2, 4, 8, 16]
    assert len(optimizer.state[p]["cosines"]) == 5


def test_random_gradients_never_settle() -> None:
    steps, *_ = refreshes([parameter(60, 50, seed=i).detach() for i in range(40)])
    assert steps == list(range(0, 40, 2))


def test_the_sign_of_a_singular_vector_does_not_matter() -> None:
    v = {0: parameter(9, 2).detach()}
    waits = []
    for sign in (1.0, -1.0):
        state: dict[str, object] = {"step": 0}
        waits.append([Lazy().wait(state, 10, v, {0: v[0] * sign**i}) for i in range(8)])
    assert waits[0] == waits[1] == [10, 10, 10, 10, 20, 40, 80, 160]


def test_the_projector_is_packed() -> None:
    p = parameter(48, 32)
    optimizer = QGaLore([{"params": [p], "rank": 16}], lr=0.1)
    drive(optimizer, p, gradients((48, 32), 1))
    held = optimizer.state[p]
    assert held["basis_1.codes"].nbytes == 32 * 16 // 2
    assert held["basis_1.scale"].nbytes + held["basis_1.zero"].nbytes == 2 * (4 + 1)
    moments = 2 * (48 * 16 + 3 * 4)
    assert optimizer.state_bytes() == 32 * 16 // 2 + 2 * (4 + 1) + moments == optimizer.expected_state_bytes()


def test_it_learns_as_galore_does_with_fewer_decompositions() -> None:
    kept: list[torch.optim.Optimizer] = []

    def made(cls: type[torch.optim.Optimizer]) -> object:
        return lambda model, lr: kept.append(cls(groups(model, rank=8), lr=lr, scale=1.0, interval=5)) or kept[-1]

    galore, ours = trained(made(GaLore)), trained(made(QGaLore))
    counts = [sum(s.get("refreshes", 0) for s in optimizer.state.values()) for optimizer in kept]
    assert counts[1] < counts[0] == 60
    assert ours < 1.02 * galore


def test_impossible_settings_are_refused() -> None:
    p = parameter(4, 4)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        QGaLore([{"params": [p], "rank": 2}], bits=9)
    with pytest.raises(ValueError, match="queue of at least 1"):
        QGaLore([{"params": [p], "rank": 2}], queue=0)
    with pytest.raises(ValueError, match="unknown inner rule 'adamm'; did you mean"):
        QGaLore([{"params": [p], "rank": 2}], inner="adamm")
    with pytest.raises(ValueError, match="no linear layer"):
        int8_linears(nn.Sequential(nn.Linear(3, 3)), include="attention")
