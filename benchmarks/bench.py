"""`make bench`: the page of what `benchmarks.measure` measures."""

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import convolutions, first_minute, many_runs, time_to_accuracy
from benchmarks.measure import (
    DEFAULT_STACK,
    GRID,
    GRID_EPOCHS,
    GRID_JOBS,
    PROCESSES,
    ROUNDS,
    TrainingTimes,
    ideal_seconds,
    load_mnist,
    machine,
    matmul_rate,
    measure_seed_recipe,
    stack_epochs,
    time_command,
    time_sweep,
    time_training,
)
from benchmarks.page import write_measurements
from mnist_exp.formatting import MeanStd

# kinds of work in a sweep that benchmarks.timed tells apart, and what they are
KINDS = {
    "upload": "MLflow: the store opened and all 17 records uploaded, in the background",
    "model": "MLflow: the chosen run's model, exported and saved",
    "import": "MLflow: imported, in the background",
    "compile": "compiling, from the cache",
    "steps": "training steps",
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are aligned to the left."""
    rules = ["---"] * left + ["---:"] * (len(header) - left)
    lines = [
        "|".join(["", *(f" {cell} " if cell else " " for cell in row), ""])
        for row in (header, rules, *rows)
    ]
    return "\n".join(lines)


def spread(seconds: Sequence[float], digits: int = 3) -> str:
    """Return "MIN to MAX"."""
    return f"{min(seconds):.{digits}f} to {max(seconds):.{digits}f}"


def training_section(times: TrainingTimes) -> str:
    """Return seconds an epoch of the seed recipe, and what share of the machine that is."""
    medians = {name: statistics.median(seconds) for name, seconds in times.seconds.items()}
    baseline = next(iter(medians.values()))
    ideal = ideal_seconds(times.images, times.rate)
    rows = [
        (name, f"{median:.3f}", spread(times.seconds[name]),
         f"{baseline / median:.1f}", f"{ideal / median:.0%}")
        for name, median in medians.items()
    ]  # fmt: skip
    header = ["", "seconds an epoch", "min to max", "times (a)", "share of the matrix rate"]
    return f"""## Training: the seed recipe, 60,000 images, batch 64

Medians of {ROUNDS} interleaved epochs, each the second of two. Matrix products (2048 x \
2048, float32) run at {times.rate / 1e9:.0f} GFLOP/s here, at which the recipe's arithmetic \
takes {ideal:.3f} s.

{table(header, rows)}"""


def sweep_section(times: TrainingTimes) -> str:
    """Return seconds of a sweep: stacked, one after another, and as the common loop would take."""
    images = 55_000 / 60_000  # the rest is for validation, which the common loop would not pay for
    common_epoch = statistics.median(next(iter(times.seconds.values())))
    expected = GRID_JOBS * GRID_EPOCHS * common_epoch * images
    with TemporaryDirectory() as folder:
        cold = time_sweep(Path(folder), "cold", TORCHINDUCTOR_CACHE_DIR=f"{folder}/cache")
        warm = [time_sweep(Path(folder), f"warm{i}") for i in range(3)]
        basic = time_sweep(Path(folder), "basic", "hydra/launcher=basic")["seconds"]
    typical = sorted(warm, key=lambda sweep: sweep["seconds"])[1]
    seconds = typical["seconds"]
    speeds = [
        (name, f"{s:.1f}", f"{expected / s:.1f}", f"{basic / s:.1f}")
        for name, s in (
            ("(a), extrapolated from its epoch", expected),
            ("one after another: hydra/launcher=basic", basic),
            ("stacked, compilation cache cold", cold["seconds"]),
            ("stacked, compilation cache warm (median of 3)", seconds),
        )
    ]
    spent = [
        (name, f"{typical[kind]:.2f}", f"{typical[kind] / seconds / PROCESSES:.1%}")
        for kind, name in KINDS.items()
    ]
    return f"""## A sweep: 4 learning rates x 4 batch sizes, 5 epochs each, end to end

`mnist-exp train -m {" ".join(GRID)} training.epochs={GRID_EPOCHS}`, as a process: \
start, tracking, test and report included, on a store that is there already.

{table(["(c)", "seconds", "times faster than (a)", "than one after another"], speeds)}

(e) What the stacked sweep, cache warm, spent the {PROCESSES} processors on, for {seconds:.1f} s.

{table(["", "processor seconds", "share"], spent)}"""


def stack_section() -> str:
    """Return seconds an epoch and model for stacks of several sizes, on each device."""
    names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return "\n\n".join(["## (d) Stacks of the seed MLP", *map(_stacks_on, names)])


def _stacks_on(name: str) -> str:
    device = torch.device(name)
    dataset = load_mnist().to(device)
    rate = statistics.median(matmul_rate(device) for _ in range(5))
    ideal = ideal_seconds(len(dataset.train), rate)
    if name == "cpu":
        text = (
            f"On the CPU: batch 64, 60,000 images, compiled; medians of 3 epochs. Matrix "
            f"products run at {rate / 1e9:.0f} GFLOP/s, at which a model's epoch takes "
            f"{ideal:.4f} s. The launcher picks {DEFAULT_STACK} here."
        )
    else:
        text = (
            f"On {torch.cuda.get_device_name()}, steps captured as CUDA graphs; "
            f"{rate / 1e9:.0f} GFLOP/s, {ideal:.4f} s."
        )
    rows = []
    for size in [1, 4, DEFAULT_STACK, 64] if name == "cpu" else [1, 4, DEFAULT_STACK, 64, 256]:
        one_order = stack_epochs(dataset, size, device, [0] * size)
        own_orders = one_order
        if size > 1:
            own_orders = stack_epochs(dataset, size, device, list(range(size)))
        median = statistics.median(one_order)
        share, own = f"{ideal / median:.0%}", f"{statistics.median(own_orders):.4f}"
        rows.append((str(size), f"{median:.4f}", spread(one_order, 4), share, own))
    header = ["models", "seconds an epoch and model", "min to max", "share of the matrix rate"]
    header.append("with data orders of their own")
    return f"{text}\n\n{table(header, rows, left=0)}"


def convolutions_section() -> str:
    """Return seconds an epoch of convolutional networks, and what share of the machine that is."""
    parts = ["## (f) Convolutional networks"]
    for network, words in convolutions.NETWORKS.items():
        times = convolutions.measure(words)
        medians = {name: statistics.median(seconds) for name, seconds in times.seconds.items()}
        baseline = next(iter(medians.values()))
        rows = [
            (name, f"{median:.1f}", spread(times.seconds[name], 1), f"{baseline / median:.1f}",
             f"{times.epoch_flops / median / 1e9:.0f}",
             f"{times.epoch_flops / median / times.rate:.0%}")
            for name, median in medians.items()
        ]  # fmt: skip
        header = ["", "seconds an epoch and model", "min to max", "times the first", "GFLOP/s"]
        header.append("share of the matrix rate")
        augmenting = statistics.median(times.augmentation)
        share = augmenting / medians[convolutions.CORE]
        parts.append(
            f"`{' '.join(words)}`: {network}, 60,000 images, batch {convolutions.BATCH}. Medians "
            f"of {ROUNDS} turns of {convolutions.STEPS} steps, extrapolated to an epoch; the plain "
            f"loops neither augment nor average. Matrix products run at {times.rate / 1e9:.0f} "
            f"GFLOP/s. Preparing the images (taken, augmented, normalised) is {augmenting:.1f} s "
            f"of this core's epoch, {share:.1%}.\n\n{table(header, rows)}"
        )
    return "\n\n".join(parts)


def accuracy_section() -> str:
    """Return the seconds in which recipes reach an accuracy."""
    rows = []
    for name, reached in time_to_accuracy.measure().items():
        accuracy, seconds = MeanStd.of(reached.accuracies), MeanStd.of(reached.seconds)
        rows.append((name, accuracy.percent(), f"{seconds.mean:.1f}", spread(reached.seconds, 1)))
    header = ["", "test accuracy", "seconds, mean", "min to max"]
    return f"""## (g) Time to an accuracy

From the start of training to its end, without what is imported and loaded before, and without the \
test: {time_to_accuracy.SEEDS} seeds each, which take turns.

{table(header, rows)}"""


def start_section() -> str:
    """Return seconds from typing a command to its end."""
    commands = (["--help"], ["train", "--cfg", "job"])
    rows = [(f"mnist-exp {' '.join(words)}", f"{time_command(words):.2f}") for words in commands]
    return f"## Start-up\n\n{table(['command', 'seconds, median of 5'], rows)}"


def first_minute_section() -> str:
    """Return when a terminal shows something, and what commands cost beside their imports."""
    costs, test_seconds = first_minute.measure()
    rows = [
        (
            name if name == first_minute.IMPORTS else f"mnist-exp {name}",
            "" if name == first_minute.IMPORTS else f"{cost.first_line:.2f}",
            *(f"{cost.seconds:.2f}", f"{cost.seconds_ratio:.2f}"),
            *(f"{cost.cpu_seconds:.2f}", f"{cost.cpu_ratio:.2f}"),
        )
        for name, cost in costs.items()
    ]
    header = ["command", "first line", "seconds", "times the imports"]
    header += ["processor seconds", "times the imports"]
    return f"""## The first minute

On a terminal, on a store that is there already; medians of {ROUNDS} rounds, in which the commands \
take turns with what they have to import. The first line tells what will be done. From the last \
epoch of `train debug=fast` to its test accuracy: {test_seconds:.2f} s.

{table(header, rows)}"""


def many_runs_section() -> str:
    """Return what commands take that look at all runs."""
    with TemporaryDirectory() as folder:
        many_runs.make(Path(folder))
        medians = many_runs.measure(Path(folder))
    rows = [(f"mnist-exp {name}", f"{seconds:.2f}") for name, seconds in medians.items()]
    return f"""## Many runs

On a local store of {many_runs.SWEEPS} sweeps of {many_runs.JOBS} jobs each and {many_runs.RUNS} \
runs beside them, made by `benchmarks/many_runs.py`.

{table(["command", f"seconds, median of {ROUNDS}"], rows)}"""


def memory_section() -> str:
    """Return the peak memory of the seed recipe as a process, and its seconds."""
    use = measure_seed_recipe()
    rows = [
        ("peak memory of the process", f"{use.alone / 1e9:.2f} GB"),
        ("peak memory with its children (the C++ compiler)", f"{use.together / 1e9:.2f} GB"),
        ("seconds, process start to end", f"{use.seconds:.0f}"),
    ]
    return f"""## Memory and time of the whole seed recipe

`mnist-exp train experiments=seed_mlp`, 100 epochs, fresh store, compilation cache cold.

{table(["", ""], rows)}"""


def sections() -> Iterator[str]:
    """Measure one thing after another, and yield the section on each."""
    yield f"# Results\n\nWritten by `make bench`.\n\n{machine()}"
    times = time_training()
    yield training_section(times)
    yield sweep_section(times)
    yield stack_section()
    yield convolutions_section()
    yield accuracy_section()
    yield start_section()
    yield first_minute_section()
    yield many_runs_section()
    yield memory_section()


def main() -> None:
    """Print the page as it is measured, and write it to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    arguments = parser.parse_args()
    page = []
    for section in sections():
        print(f"{section}\n", flush=True)
        page.append(section)
    if arguments.output is not None:
        write_measurements(arguments.output, "\n\n".join(page))


if __name__ == "__main__":
    main()
