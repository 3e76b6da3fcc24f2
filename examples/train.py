"""Train small models twice, with torch's losses and with fusedloss's, and compare the loss curves.

Both runs of a task start from the same weights and see the same batches, so that only rounding may
tell them apart; the exit status is 1 where the curves part by more than that (see `allowance`).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot it draws with Agg: no display is needed
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

import fusedloss

Pair = tuple[Tensor, Tensor]  # inputs and targets

BATCH, LEARNING_RATE = 128, 2e-3
# With its usual epsilon of 1e-8, Adam cancels any constant factor in the gradient, so that a loss
# with 1.001 times the right gradient would train just as well. This one lets the curves show it.
ADAM_EPSILON = 1e-3
TEMPERATURE, SOFT_SHARE = 4.0, 0.7
CONTROLS, DRIFT_MULTIPLE, FLOOR_ULPS = 2, 8, 16
ULP = torch.finfo(torch.float32).eps


class Task(NamedTuple):
    name: str
    losses: str
    model: Callable[[], nn.Module]
    train: tuple[Tensor, ...]  # the inputs, then what the loss takes after the logits
    test: Pair
    loss_torch: Callable[..., Tensor]
    loss_ours: Callable[..., Tensor]
    predict: Callable[[Tensor], Tensor]  # logits -> labels; their accuracy is the metric


class Run(NamedTuple):
    curve: np.ndarray  # the loss of each step's batch
    loss: float  # over the whole training set, after the last step
    accuracy: float
    model: nn.Module


Result = tuple[Task, Run, Run, np.ndarray, np.ndarray]  # torch's and our run; gap, allowance


def mlp(*widths: int) -> nn.Module:
    layers = [layer for fan in pairwise(widths) for layer in (nn.Linear(*fan), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def supervised(device: str) -> Iterator[Task]:
    def split(x: np.ndarray, y: np.ndarray, classes: np.ndarray) -> tuple[Pair, Pair]:
        x0, x1, y0, y1 = train_test_split(x, y, test_size=0.25, stratify=classes, random_state=0)
        scale = StandardScaler().fit(x0).transform  # from the training part: the test stays unseen
        parts = (scale(x0).astype(np.float32), y0, scale(x1).astype(np.float32), y1)
        a, b, c, d = (torch.tensor(part, device=device) for part in parts)
        return (a, b), (c, d)

    def binary(name: str, model: Callable[[], nn.Module], *data: np.ndarray) -> Task:
        train, test = split(*data)
        weight = 1 / train[1].mean(0) - 1  # negatives per positive: both answers count the same
        ours = partial(fusedloss.binary_cross_entropy_with_logits, pos_weight=weight)
        theirs = partial(F.binary_cross_entropy_with_logits, pos_weight=weight)
        losses = "binary_cross_entropy_with_logits with pos_weight"
        return Task(name, losses, model, train, test, theirs, ours, lambda logits: logits > 0)

    x, y = load_digits(return_X_y=True)
    ce = (F.cross_entropy, fusedloss.cross_entropy, lambda logits: logits.argmax(-1))
    model = partial(mlp, 64, 128, 10)
    yield Task("Digits, 10 classes", "cross_entropy", model, *split(x, y, y), *ce)
    inputs, benign = load_breast_cancer(return_X_y=True)
    malignant = (benign == 0).astype(np.float32)[:, None]
    yield binary("Malignant tumours", partial(mlp, 30, 32, 1), inputs, malignant, benign)
    prime, loop = np.isin(y, [2, 3, 5, 7]), np.isin(y, [0, 4, 6, 8, 9])
    labels = np.stack([y % 2 == 0, prime, y > 4, loop, y % 3 == 0], axis=1).astype(np.float32)
    yield binary("Digits, 5 labels", partial(mlp, 64, 128, 5), x, labels, y)


def distillation(taught: Task, teacher: Run) -> Task:
    def composed_kl(input: Tensor, target: Tensor, *, temperature: float) -> Tensor:
        student, goal = (F.log_softmax(z / temperature, dim=-1) for z in (input, target))
        return temperature**2 * F.kl_div(student, goal, reduction="batchmean", log_target=True)

    def mixed(kl: Callable, ce: Callable, logits: Tensor, labels: Tensor, soft: Tensor) -> Tensor:
        distance = kl(logits, soft, temperature=TEMPERATURE)
        return SOFT_SHARE * distance + (1 - SOFT_SHARE) * ce(logits, labels)

    with torch.no_grad():
        soft = teacher.model(taught.train[0])
    theirs = partial(mixed, composed_kl, F.cross_entropy)
    ours = partial(mixed, fusedloss.kl_div_with_logits, fusedloss.cross_entropy)
    losses = f"{SOFT_SHARE:.0%} kl_div_with_logits at T = {TEMPERATURE:g}, else cross_entropy"
    data = ((*taught.train, soft), taught.test)
    small = partial(mlp, 64, 16, 10)
    return Task("Digits, distilled", losses, small, *data, theirs, ours, taught.predict)


def train(task: Task, loss: Callable[..., Tensor], steps: int, seed: int, bar: tqdm) -> Run:
    torch.manual_seed(seed)
    inputs, *targets = task.train
    model = task.model().to(inputs.device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, eps=ADAM_EPSILON)
    shuffle = torch.Generator().manual_seed(seed)  # its own, so that no loss can move the batches
    curve: list[Tensor] = []
    for _ in range(steps):
        rows = torch.randperm(len(inputs), generator=shuffle)[:BATCH].to(inputs.device)
        value = loss(model(inputs[rows]), *(target[rows] for target in targets))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.detach())  # read at the end: .item() here would stall a GPU each step
        bar.update()
    with torch.no_grad():
        final = loss(model(inputs), *targets).item()
        hits = task.predict(model(task.test[0])) == task.test[1]
    return Run(torch.stack(curve).double().cpu().numpy(), final, hits.float().mean().item(), model)


def allowance(curve: np.ndarray, controls: list[np.ndarray]) -> np.ndarray:
    """How far from torch's curve another correct float32 loss may be, at each step.

    Training amplifies rounding, by how much depends on the task, so it is measured: the controls
    are torch's own losses on logits moved up or down, at random, by one ulp (1's ulp below 1, as
    the log-sum-exp rounds at that size), the error of computing exp(x) as exp2(x * log2 e). A
    kernel makes a handful of such errors (max, exp, sum, log, gradient) and drift grows in
    proportion: hence 8 times the controls' largest drift so far. The jitter averages out over a
    batch where a kernel's bias need not: hence 16 ulp of the curve's largest value on top. That is
    2e-6 for a loss of 1, where an error of 0.1 % makes 1e-3.
    """
    drift = np.max([np.abs(control - curve) for control in controls], axis=0)
    return DRIFT_MULTIPLE * np.maximum.accumulate(drift) + FLOOR_ULPS * ULP * max(1, curve.max())


def compare(task: Task, steps: int, seed: int, bar: tqdm) -> Result:
    def jittered(coin: torch.Generator, logits: Tensor, *targets: Tensor) -> Tensor:
        sign = torch.randint(0, 2, logits.shape, generator=coin).to(logits) * 2 - 1
        return task.loss_torch(logits + sign * ULP * logits.detach().abs().clamp(min=1), *targets)

    bar.set_description(task.name)
    coins = [torch.Generator().manual_seed(number) for number in range(CONTROLS)]
    run = partial(train, task, steps=steps, seed=seed, bar=bar)
    theirs, ours = run(task.loss_torch), run(task.loss_ours)
    allowed = allowance(theirs.curve, [run(partial(jittered, coin)).curve for coin in coins])
    return task, theirs, ours, np.abs(ours.curve - theirs.curve), allowed


def draw(axes: Axes, result: Result) -> None:
    task, theirs, ours, gap, _ = result
    window = min(15, len(gap))  # the noise of single batches would hide the dashes
    axes.plot(np.arange(1, len(gap) + 1), theirs.curve, color="#f2a65a", alpha=0.3, lw=0.8)
    styles = (("torch", "#ef8f35", "-", 6), ("fusedloss", "#1d3557", "--", 1.8))
    for run, (name, color, dashes, width) in zip((theirs, ours), styles, strict=True):
        y = np.convolve(run.curve, np.full(window, 1 / window), mode="valid")
        steps = np.arange(len(y)) + (window + 1) / 2  # the middle of each window
        axes.plot(steps, y, dashes, color=color, lw=width)
        at = len(y) // (5 if run is theirs else 2)
        spot, line = (steps[at], y[at]), {"arrowstyle": "-", "color": color}
        axes.annotate(name, spot, (26, 22), "data", "offset points", line, color=color, size=12)
    axes.set(yscale="log", xlabel="step", ylabel="training loss")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_title(task.name, loc="left", weight="bold", pad=20)
    axes.text(0, 1.025, task.losses, transform=axes.transAxes, color="#666666", size=9)
    note = f"largest gap {gap.max():.1e}\ntest accuracy {ours.accuracy:.1%}"
    axes.text(0.98, 0.95, note, transform=axes.transAxes, ha="right", va="top", color="#444444")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8e8e8")


def main() -> str | None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "train.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # such small matrices lose more to waiting for a second core
    print(f"device {args.device}, path {fusedloss.path(torch.zeros(9, 9, device=args.device))}")
    with tqdm(total=4 * (2 + CONTROLS) * args.steps, unit="step") as bar:
        run = partial(compare, steps=args.steps, seed=args.seed, bar=bar)
        results = [run(task) for task in supervised(args.device)]
        results.append(run(distillation(*results[0][:2])))
    heads = "task", "loss\ntorch", "\nours", "acc.\ntorch", "\nours", "largest\ngap", "used"
    table = Table(*heads, caption="training loss, test accuracy, share of what rounding explains")
    figure = Figure(figsize=(12, 8), layout="constrained")
    bad = [task.name for task, *_, gap, allowed in results if not (gap <= allowed).all()]  # or NaN
    for number, result in enumerate(results, start=1):
        draw(figure.add_subplot(2, 2, number), result)
        task, *runs, gap, allowed = result
        cells = [f"{run.loss:.5f}" for run in runs] + [f"{run.accuracy:.1%}" for run in runs]
        used = f"{(gap / allowed).max():.0%} " + ("[red]PART[/]" if task.name in bad else "ok")
        table.add_row(task.name, *cells, f"{gap.max():.1e}", used)
    Console().print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150, bbox_inches="tight", pad_inches=0.2)
    print(f"plot in {args.out}")
    return f"more than rounding parts the loss curves of: {'; '.join(bad)}" if bad else None


if __name__ == "__main__":
    sys.exit(main())  # with a message the status is 1
