"""The trainer: its schedule, its averages, and that stopping anywhere changes nothing."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfm2_mm.errors import InputError
from lfm2_mm.train.trainer import Schedule, Trainer

STEPS = 12


class Net(nn.Module):
    """Has a matrix, a bias, a count of its steps, and a part that takes no part in some."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.late = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("steps", torch.zeros(()))


def batch(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def batches(start: int, stop: int = STEPS) -> Iterator[Tensor]:
    return (batch(step) for step in range(start, stop))


def trainer(folder: Path, **options: object) -> Trainer:
    torch.manual_seed(0)
    net = Net()

    def loss(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        hidden = net.body(x).tanh()
        net.steps += 1
        value = (hidden - x.flip(-1)).square().mean()
        if float(x[0, 0]) > 0:  # the late part learns in some steps only
            value = value + net.late(hidden).square().mean()
        return value, {"part": float(value.detach())}

    schedule = Schedule(steps=STEPS, warmup=3, peak=1e-2)
    return Trainer(net, loss, schedule, folder, **{"autocast": False, **options})  # type: ignore[arg-type]


def run(made: Trainer, stop: int = STEPS, **options: int) -> Trainer:
    made.run(batches(made.step, stop), **{"save_every": 100, **options}, say=lambda line: None)
    return made


def state(made: Trainer) -> list[Tensor]:
    moments = [value for p in made.params for _, value in sorted(made.optimizer.state[p].items())]
    return [*(p.detach() for p in made.params), *made.mean, *made.buffers.values(), *moments]


# --- schedule


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    schedule = Schedule(steps=110, warmup=10, peak=2.0, floor=0.1)
    assert [schedule.rate(step) for step in (0, 4, 9)] == [0.2, 1.0, 2.0]
    assert schedule.rate(10) == 2.0
    assert schedule.rate(60) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert schedule.rate(35) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert schedule.rate(110) == schedule.rate(500) == pytest.approx(0.2)
    rates = [schedule.rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert Schedule(steps=5, warmup=0, peak=1.0).rate(0) == 1.0


def test_a_held_rate_falls_as_a_root_whatever_the_length() -> None:
    short, long = (Schedule(steps=n, warmup=10, peak=2.0, hold=40) for n in (100, 1000))
    assert [short.rate(step) for step in (0, 9, 10, 40)] == [0.2, 2.0, 2.0, 2.0]
    assert short.rate(90) == pytest.approx(2.0 * 2 / 3)
    assert [short.rate(step) for step in range(100)] == [long.rate(step) for step in range(100)]


def test_the_optimizer_gets_the_rate_of_the_step(tmp_path: Path) -> None:
    made = run(trainer(tmp_path), 5)
    assert {group["lr"] for group in made.optimizer.param_groups} == {made.schedule.rate(4)}
    decays = [group["weight_decay"] for group in made.optimizer.param_groups]
    assert decays == [0.02, 0.0]
    assert [p.dim() for p in made.optimizer.param_groups[1]["params"]] == [1, 1]


# --- resuming


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_resumed_run_equals_an_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    whole = run(trainer(tmp_path / "whole"))
    run(trainer(tmp_path / "parts"), stop)
    resumed = trainer(tmp_path / "parts")
    assert resumed.resume()
    assert resumed.step == stop
    run(resumed)
    assert resumed.step == whole.step == STEPS
    assert all(map(torch.equal, state(resumed), state(whole)))


def test_training_changes_the_weights(tmp_path: Path) -> None:
    before, after = trainer(tmp_path), run(trainer(tmp_path))
    assert not any(map(torch.equal, before.params, after.params))
    assert list(after.averaged()) == ["body.weight", "body.bias", "late.weight", "late.bias"]


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    made = trainer(tmp_path / "new")
    assert not made.resume()
    assert made.step == 0


@pytest.mark.parametrize("phase", ["forward", "update"])
def test_ctrl_c_at_any_moment_leaves_a_state_to_resume(phase: str, tmp_path: Path) -> None:
    whole = run(trainer(tmp_path / "whole"))
    made = trainer(tmp_path / "parts")
    run(made, 4)
    said: list[str] = []

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    if phase == "forward":
        made.model.body.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
    else:
        made.optimizer.register_step_post_hook(interrupt)  # weights changed, step not counted
    with pytest.raises(KeyboardInterrupt):
        made.run(batches(4), say=said.append)
    assert said == [f"interrupted at step 4; checkpoint kept in {tmp_path / 'parts'}"]
    resumed = trainer(tmp_path / "parts")
    resumed.resume()
    assert resumed.step == 4
    assert all(map(torch.equal, state(run(resumed)), state(whole)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_keep_a_checkpoint_also_where_a_shell_ignores_them(
    number: signal.Signals, tmp_path: Path
) -> None:
    made = trainer(tmp_path)
    run(made, 3)
    made.model.body.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda *_: os.kill(os.getpid(), number)
    )
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(made)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    resumed = trainer(tmp_path)
    assert resumed.resume() and resumed.step == 3


@pytest.mark.parametrize("broken", ["other", "cut"])
def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(
    broken: str, tmp_path: Path
) -> None:
    run(trainer(tmp_path), 2)
    path = tmp_path / "trainer.safetensors"
    if broken == "cut":
        path.write_bytes(path.read_bytes()[:50])
    made = trainer(tmp_path)
    if broken == "other":
        made.names[0] = "another.weight"
    with pytest.raises(InputError, match=r"the checkpoint in .* cannot be read \(.+\); begin anew"):
        made.resume()
    assert made.step == 0


def test_an_interrupted_backward_pass_leaves_no_gradients(tmp_path: Path) -> None:
    whole, made = run(trainer(tmp_path / "whole")), trainer(tmp_path / "parts")
    run(made, 4)

    def interrupt(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    parameter: Any = made.params[0]
    hook = parameter.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    hook.remove()
    run(made)  # goes on in the same process
    assert all(map(torch.equal, state(made), state(whole)))


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path) -> None:
    made = run(trainer(tmp_path), 3)
    before = [tensor.clone() for tensor in state(made)]
    broken = torch.full((8, 4), math.nan)
    with pytest.raises(FloatingPointError, match="gradient of step 3 is nan at a loss of nan; low"):
        made.run([broken], say=lambda line: None)
    assert all(map(torch.equal, before, state(made)))
    assert made.step == 3


# --- the rest


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    made = trainer(tmp_path, average=0.9)
    mean = made.params[0].detach().clone()
    for step in range(STEPS):
        run(made, step + 1)
        decay = min(0.9, (step + 1) / (step + 10))
        mean = decay * mean + (1 - decay) * made.params[0].detach()
        torch.testing.assert_close(made.averaged()["body.weight"], mean)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    free, tight = (trainer(tmp_path / str(clip), clip=clip) for clip in (1e9, 1e-3))
    for made in (free, tight):
        run(made, 1, log_every=1)
    norms = [
        json.loads((made.folder / "log.jsonl").read_text())["grad_norm"] for made in (free, tight)
    ]
    assert norms[0] == norms[1] > 1e-3  # what is logged is what it was
    moments = [made.optimizer.state[made.params[0]]["exp_avg"].norm() for made in (free, tight)]
    assert moments[1] < moments[0] / 10


def test_the_log_holds_means_and_rates(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    said: list[str] = []
    made.run(batches(0), save_every=5, log_every=4, say=said.append)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[0]["loss"] == rows[0]["part"] > rows[2]["loss"]
    assert rows[2]["lr"] == round(made.schedule.rate(12), 7)
    assert said[0].startswith("step 4 steps_per_s ")
    assert not list(tmp_path.glob("*.part"))


def test_bf16_keeps_weights_in_fp32(tmp_path: Path) -> None:
    made = run(trainer(tmp_path, autocast=True))
    assert {p.dtype for p in made.params} == {torch.float32}
    exact = run(trainer(tmp_path / "exact"))
    assert not torch.equal(made.params[0], exact.params[0])
    assert torch.allclose(made.params[0], exact.params[0], atol=0.05)
