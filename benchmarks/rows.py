"""The rows of the table: what is timed against what, and what both sides must agree on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import cloudpickle
import joblib
import nbformat
import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines
from benchmarks.timing import Line, Mismatch, Side, Skipped, compare, interleave, same
from companion import grid, run
from helpers import Net, Problem, Solution, Training, problems, sweep
from helpers.engine import kernels
from helpers.engine.order import epoch_order
from helpers.measure import fits, gradients, memory, noise
from helpers.problems import builtin, nets
from helpers.problems.dataset import Tensors
from helpers.sweep import cluster
from helpers.sweep import settings as of_runs
from helpers.sweep import store as of_results
from helpers.sweep.store import Store, key_of

LR = 0.01  # the write-up's
NORMALISATION = {"mnist": (0.1307, 0.3081), "digits": (0.3053, 0.3763)}
STARTED = "worker processes of ours are started by the warm-up"


@dataclass(frozen=True)
class Bench:
    """How much is run: ``pairs``, and with ``smoke`` as little as shows that everything works, on digits."""

    pairs: int = 5
    smoke: bool = False

    @property
    def dataset(self) -> str:
        return self.pick("mnist", "digits")

    @property
    def epoch_sizes(self) -> tuple[int, int]:
        """Training and test images of the timed epochs: a fifth of MNIST's, so that both have their share."""
        return self.pick((12_000, 2_000), (512, 100))

    def pick(self, full, smoke):
        """One of two sizes."""
        return smoke if self.smoke else full

    def images(self, num_train: int, num_test: int) -> Tensors:
        """The first of MNIST's training and test examples. Raises Skipped where MNIST cannot be had."""
        try:
            whole = problems.load(self.dataset)
        except problems.DataError as error:
            raise Skipped(str(error)) from error
        return first_of(whole, num_train, num_test)


def first_of(dataset: Tensors, num_train: int, num_test: int) -> Tensors:
    """The first of a dataset's examples."""
    train, test = dataset.tensors("train"), dataset.tensors("test")
    return Tensors(dataset.name, *(t[:num_train] for t in train), *(t[:num_test] for t in test))


def problem_of(dataset: Tensors, net: Callable = nets.NETS["shen_mlp"]) -> Problem:
    """A built-in net on a dataset."""
    return Problem(dataset, Net(functools.partial(net, dataset.input_shape, dataset.num_classes)))


def ours_training(dataset: Tensors, net: Callable = nets.NETS["shen_mlp"], **options: object) -> Training:
    """Our engine, as all rows make it."""
    return Training(problem_of(dataset, net), **{"lr": LR, **options})


def mnist_epoch(bench: Bench) -> list[Line]:
    """An epoch of Shen's net with evaluation, against torchvision's dataset, a DataLoader and SGD."""
    dataset = bench.images(*bench.epoch_sizes)
    targets = bench.pick({16: 4.0, 64: 5.0, 256: 7.5, 1024: 7.0}, {64: 5.0, 256: 7.5})
    with tempfile.TemporaryDirectory() as folder:
        root = _as_mnist_files(dataset, Path(folder)) if bench.smoke else builtin.data_root()
        return [line for case in targets.items() for line in _mnist_epoch(bench, dataset, root, *case)]


def _mnist_epoch(bench: Bench, dataset: Tensors, root: Path, batch_size: int, target: float) -> list[Line]:
    def ours():
        training = ours_training(dataset, batch_size=batch_size)

        def epoch() -> list[float]:
            training.advance(epochs=1, record=False)
            training.record()
            return [training.latest[name].item() for name in ("train_accuracy", "test_accuracy")]

        return epoch

    def loop(workers: int, *sizes: int) -> Side:
        loaders = baselines.mnist_loaders(root, NORMALISATION[bench.dataset], batch_size, workers, *sizes)

        def prepare():
            torch.manual_seed(0)
            net = baselines.copied(ours_training(dataset).weights())  # so that accuracies differ by the order alone
            return functools.partial(baselines.mnist_epoch, net, loaders, LR)

        return prepare

    case, part = f"batch {batch_size}", bench.pick((2_000, 300), (128, 50))
    trial, _ = interleave(f"workers for {case}", {w: loop(w, *part) for w in (0, 2)}, 1)
    tried = {w: seconds[0] for w, seconds in trial.items()}
    workers = min(tried, key=tried.get)
    name = f"DataLoader, {workers} workers"
    note = "{:,} training and {:,} test images; ".format(*bench.epoch_sizes) + "for a part of them the DataLoader took "
    note += " and ".join(f"{seconds:.2f} s with {w} workers" for w, seconds in tried.items())
    steps, chunk = _split(dataset.num_train, batch_size), kernels.Model.evaluation_chunk
    chunks = [size for n in (dataset.num_train, len(dataset.test_targets)) for size in _split(n, chunk)]
    limit = functools.partial(baselines.step_products, _widths(dataset), steps, chunks)
    sides = {"ours": ours, name: loop(workers, *bench.epoch_sizes)}

    def check(results: Mapping) -> str:
        return same("train and test accuracy, mean", results["ours"], results[name], within=0.04)

    return _with_limit("mnist-epoch", case, sides, target, limit, bench, check, note)


def _with_limit(
    row: str,
    case: str,
    sides: Mapping[str, Side],
    target: float,
    limit: Side,
    bench: Bench,
    check: Callable[[Mapping], str],
    note: str,
    scaled: Mapping[str, tuple[float, str]] | None = None,
) -> list[Line]:
    """The first side against the second; and how often ``limit`` goes into the second, timed in turn with both."""
    _, name = sides
    sides, targets = {**sides, "limit": limit}, {name: target, "limit": target}
    against, at_best = compare(row, case, sides, targets, bench.pairs, check, note, scaled)
    reachable = statistics.median(a / b for a, b in zip(against.theirs, at_best.theirs))
    return [dataclasses.replace(against, limit=reachable)]


def _widths(dataset: Tensors) -> list[int]:
    """Of Shen's net."""
    return [dataset.train_inputs[0].numel(), 1024, 1024, dataset.num_classes]


def _split(examples: int, batch_size: int) -> list[int]:
    return [len(one) for one in torch.arange(examples).split(batch_size)]


def _operations(dataset: Tensors) -> tuple[int, int]:
    """Floating-point operations an example of Shen's net: to train on it, and forward alone; 2 a multiply-add.

    Training: forward, gradients by the weights, gradients by the inputs of all layers but the first.
    """
    first, *others = [given * out for given, out in itertools.pairwise(_widths(dataset))]
    return 2 * (2 * first + 3 * sum(others)), 2 * (first + sum(others))


def _as_mnist_files(dataset: Tensors, root: Path) -> Path:
    """Digits in MNIST's files, for torchvision to read."""
    raw, (mean, std) = root / "MNIST/raw", NORMALISATION["digits"]
    raw.mkdir(parents=True)
    for name, part in (("train", "train"), ("t10k", "test")):
        x, y = (getattr(dataset, f"{part}_{k}").cpu() for k in ("inputs", "targets"))
        for kind, values in (("images-idx3", (x.squeeze(1) * std + mean) * 255), ("labels-idx1", y)):
            header = struct.pack(f">{values.ndim + 1}I", 2048 + values.ndim, *values.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + values.round().byte().numpy().tobytes())
    return root


def mnist_roofline(bench: Bench) -> list[Line]:
    """Floating-point operations a second of that epoch's training alone, as a share of a square product's."""
    dataset = bench.images(*bench.epoch_sizes)
    inputs, classes, (flops, _) = dataset.train_inputs[0].numel(), dataset.num_classes, _operations(dataset)
    net, few = baselines.shen_net(inputs, classes), (dataset.train_inputs[:8], dataset.train_targets[:8])
    with FlopCounterMode(display=False) as counter:
        baselines.train_epoch(net, [few], torch.optim.SGD(net.parameters()))
    counted = same("operations an example, ours and PyTorch's count,", flops, counter.get_total_flops() / 8, within=0)
    work, best = flops * dataset.num_train, {}
    for size in bench.pick((1024, 2048), (128, 256)):
        repeats = round(work / 2 / (2 * size**3)) + 1
        found, _ = interleave(f"products of {size}", {"": functools.partial(baselines.gemm, size, repeats)}, 1)
        best[size, repeats] = 2 * size**3 * repeats / found[""][0]
    size, repeats = max(best, key=best.get)
    note = f"peak: {repeats} products of {size} × {size} float32 matrices; {counted}"

    def ours(batch_size: int) -> Callable[[], object]:
        training = ours_training(dataset, batch_size=batch_size)
        return lambda: training.advance(epochs=1, record=False).take_losses()

    lines = []
    for batch_size, target in bench.pick({16: 28, 64: 50, 256: 75, 1024: 90}, {256: 75}).items():
        sides = {"": functools.partial(ours, batch_size), "GEMM": functools.partial(baselines.gemm, size, repeats)}
        steps = _split(dataset.num_train, batch_size)
        sides["limit"] = functools.partial(baselines.step_products, _widths(dataset), steps)
        times, peak, products = interleave(f"mnist-roofline, batch {batch_size}", sides, bench.pairs)[0].values()
        share, reachable = (
            [100 * work / a / (2 * size**3 * repeats / b) for a, b in zip(each, peak)] for each in (times, products)
        )
        about = {"ours": times, "theirs": peak, "note": note, "limit": statistics.median(reachable)}
        lines.append(Line("mnist-roofline", f"batch {batch_size}", "GEMM peak", share, target, "%", **about))
    return lines


def perceptron(bench: Bench) -> list[Line]:
    """An epoch of Shen's net in memory, against PyTorch, compiled too, and JAX."""
    dataset, lines = bench.images(bench.pick(6_144, 512), 1), []
    for batch_size in bench.pick((16, 64, 256, 1024), (64,)):
        training = ours_training(dataset, batch_size=batch_size)
        ways = (baselines.jax_perceptron(training.weights(), first) for first in (False, True))
        in_jax = dict(zip(("JAX, out × in", "JAX, in × out"), ways))
        lines.append(_against_best(bench, "perceptron", training, in_jax))
    return lines


def small_mlp(bench: Bench) -> list[Line]:
    """An epoch of small_mlp in memory: seeds, and ten rates, side by side."""
    images, lines = {1: 768, 4: 1_536}, []
    for batch_size in bench.pick([1, 4, 16, 64, 256, 1024], [4, 64]):
        dataset = bench.images(bench.pick(images.get(batch_size, 6_144), 128), 1)
        stacks = [{"seeds": range(count)} for count in bench.pick((1, 30), (1, 2))]
        if batch_size <= 64:
            stacks.append({"seeds": [0] * 10, "lr": [0.002 * 1.2**i for i in range(10)]})
        lines += [_perceptron_line(bench, "small-mlp", dataset, "small_mlp", batch_size, **stack) for stack in stacks]
    return lines


def blobs_mlp(bench: Bench) -> list[Line]:
    """An epoch of brownlee_mlp in memory, on 20 copies of blobs."""
    blobs, copies, seeds = problems.load("blobs", device="cpu"), *bench.pick((20, 30), (1, 2))
    x, y = blobs.tensors("train")
    dataset = Tensors("blobs", x.repeat(copies, 1), y.repeat(copies), x[:1], y[:1])
    sizes = bench.pick([1, 4, 32, 450], [32, 450])
    return [_perceptron_line(bench, "blobs-mlp", dataset, "brownlee_mlp", b, seeds=range(seeds)) for b in sizes]


def _perceptron_line(
    bench: Bench, row: str, dataset: Tensors, model: str, batch_size: int, seeds: Sequence[int], lr: object = LR
) -> Line:
    training = ours_training(dataset, nets.NETS[model], seeds=seeds, batch_size=batch_size, lr=lr)
    ways = (baselines.jax_perceptron(training.weights(), first) for first in (False, True))
    return _against_best(bench, row, training, dict(zip(("JAX, out × in", "JAX, in × out"), ways)))


def cnn(bench: Bench) -> list[Line]:
    """An epoch of ``plain_cnn`` in memory, one seed and three, and its evaluation, against the same."""
    net, lines, channels_last = nets.NETS["plain_cnn"], [], {"channels_last": {"channels_last": True}}
    dataset = bench.images(bench.pick(2_048, 256), 1)
    for count, batch_size in bench.pick([(1, 32), (1, 128), (1, 1024), (3, 128)], [(1, 64), (3, 64)]):
        training = ours_training(dataset, net, seeds=range(count), batch_size=batch_size)
        in_jax = {"JAX": baselines.jax_cnn(training.weights())}
        lines.append(_against_best(bench, "cnn", training, in_jax, channels_last))
    dataset, chunk = bench.images(bench.pick(4_000, 200), 1), kernels.CNN.evaluation_chunk
    training, x = ours_training(dataset, net), dataset.train_inputs
    ways, module = {"PyTorch": {}, "torch.compile": {"compiled": True}, **channels_last}, training.problem.net.module
    peers = {name: baselines.torch_logits(module(0), x, chunk, **way) for name, way in ways.items()}
    peers["JAX"] = baselines.jax_logits(*baselines.jax_cnn(training.weights()), x, chunk)

    @torch.inference_mode()
    def ours() -> torch.Tensor:
        return torch.cat([training.stack.eval().outputs(part)[0] for part in x.split(chunk)])

    return [*lines, _best(bench, "cnn", "evaluation", lambda: ours, peers, len(x))]


def _against_best(
    bench: Bench, row: str, training: Training, in_jax: Mapping[str, tuple], more: Mapping[str, dict] | None = None
) -> Line:
    """An epoch of a training against the fastest of PyTorch's ways, with ``more``, and JAX's, by each step's loss."""
    if not shutil.which("g++"):
        raise Skipped("torch.compile needs a C++ compiler, g++")
    problem, seeds, batch_size, lr = training.problem, training.seeds, training.batch_size, training.lr
    order = torch.stack([epoch_order(problem.num_train, seed, 0) for seed in dict.fromkeys(seeds)])
    peers = {}
    if len(seeds) <= 5:  # in turn: of many small runs, JAX's side by side are the peer
        ways = {f"PyTorch, {way}": {way: True} for way in ("foreach", "fused")}
        ways |= {"torch.compile": {"compiled": True}, **(more or {})}
        peers = {n: baselines.torch_epoch(problem, seeds, order, batch_size, lr=lr, **way) for n, way in ways.items()}
    for name, way in in_jax.items():
        peers[name] = baselines.jax_epoch(*way, problem.dataset, order, batch_size, lr)

    def ours() -> Callable[[], torch.Tensor]:
        fresh = Training(problem, seeds=seeds, batch_size=batch_size, lr=lr)
        return lambda: fresh.advance(epochs=1, record=False).take_losses()[1].T

    several = f", {len(seeds)} {'rates' if isinstance(lr, tuple) else 'seeds'}" * (len(seeds) > 1)
    return _best(bench, row, f"training, batch {batch_size}{several}", ours, peers, problem.num_train * len(seeds))


def _best(
    bench: Bench, row: str, case: str, ours: Side, peers: Mapping[str, tuple[Side, float]], examples: int
) -> Line:
    """Ours against the fastest of ``peers``, each with the seconds that compiling took; the note has them all."""

    def check(results: Mapping) -> str:
        first, *others = (np.asarray(found).squeeze() for found in results.values())
        for name, other in zip(peers, others):  # over more steps rounding grows
            same(f"results of ours and {name},", first[..., :20], other[..., :20], within=1e-3)
            same(f"mean results of ours and {name},", first.mean(), other.mean(), within=1e-2)
        return "the first 20 results within 0.001 of ours, the mean of all within 0.01"

    sides = {"ours": ours, **{name: side for name, (side, _) in peers.items()}}
    seconds, checked = interleave(f"{row}, {case}", sides, bench.pairs, check)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    best = min(peers, key=middle.get)
    note = f"examples a second: {', '.join(f'{name} {examples / s:,.0f}' for name, s in middle.items())}; compiled in "
    note += ", ".join(f"{s:.1f} s ({name})" for name, (_, s) in peers.items() if s) + f"; {checked}"
    ratios = [b / a for a, b in zip(seconds["ours"], seconds[best])]
    return Line(row, case, f"the best peer: {best}", ratios, 1.0, ours=seconds["ours"], theirs=seconds[best], note=note)


def blobs_sweep(bench: Bench) -> list[Line]:
    """Notebook 01's sweep, against plain loops in turn and Keras's fit."""
    sizes, (seeds, epochs) = bench.pick([4, 8, 16, 32, 64, 128, 256, 450], [32, 450]), bench.pick((30, 200), (3, 12))
    part, keras_part = bench.pick((50, 5), (6, 2))  # epochs run, of one seed
    dataset, how = problems.load("blobs", device="cpu"), {"lr": LR, "momentum": 0.9}
    base = {"dataset": "blobs", "model": "brownlee_mlp", "epochs": epochs, **how}

    def loop(loader: bool, threads: int, sizes: Sequence[int], epochs: int) -> Callable[[], list]:
        torch.manual_seed(0)
        return lambda: [baselines.blobs_loop(dataset, b, epochs, **how, loader=loader, threads=threads) for b in sizes]

    ways = {
        f"{name}, {threads} thread{'s' * (threads > 1)}": (name == "DataLoader", threads)
        for name, threads in itertools.product(("DataLoader", "randperm"), sorted({1, torch.get_num_threads()}))
    }
    trial = {name: functools.partial(loop, *way, [32], 5) for name, way in ways.items()}
    tried = {name: seconds[0] for name, seconds in interleave("ways to loop", trial, 1)[0].items()}
    best = min(tried, key=tried.get)
    note = "5 epochs of the loop: " + "; ".join(f"{name} {1000 * s:.0f} ms" for name, s in tried.items())
    plain, keras = f"PyTorch loop ({best})", f"Keras fit on {baselines.keras_backend()}"

    def fit() -> Callable[[], list]:
        ready = [baselines.keras_fit(dataset, b, keras_part, **how) for b in sizes]
        return lambda: [call() for call in ready]

    def check(results: Mapping) -> str:
        texts = []
        for name, epoch, last, within in ((plain, part // 2 + 1, part, 0.03), (keras, 2, keras_part + 1, 0.08)):
            ours = results["ours"][results["ours"].epochs.between(epoch, last)].test_accuracy.mean()
            theirs = np.array(results[name])[:, epoch - last - 1 :, 1].mean()
            what = f"{name}: test accuracy, mean over sizes and epochs {epoch} to {last},"
            texts.append(same(what, ours, theirs, within=bench.pick(within, 0.2)))
        return "; ".join(texts)

    sides = {"ours": _sweep(sweep.grid(base, batch_size=sizes), seeds), keras: fit}
    sides[plain] = functools.partial(loop, *ways[best], sizes, part)
    scaled = {
        plain: (seeds * epochs / part, f"1 of {seeds} seeds, {part} of {epochs} epochs"),
        keras: (
            seeds * epochs / keras_part,
            f"1 of {seeds} seeds, {keras_part} of {epochs} epochs after one that compiles",
        ),
    }
    case, note = f"{len(sizes)} sizes × {seeds} seeds × {epochs} epochs", f"{note}; {STARTED}"
    return compare("blobs-sweep", case, sides, {plain: 15, keras: 50}, bench.pairs, check, note, scaled)


def _sweep(settings: Sequence[Mapping], seeds: int, jobs: int | None = None) -> Side:
    """``sweep.run`` into a store of its own, so that nothing is there already."""

    def prepare():
        folder = tempfile.TemporaryDirectory()

        def run():
            with folder:
                return sweep.run(settings, seeds, jobs=jobs, store=Store(folder.name))

        return run

    return prepare


def seeds(bench: Bench) -> list[Line]:
    """Five seeds of Shen's net by ``sweep.run``, against five trainings in turn that have all cores each.

    As many epochs of few images to an evaluation as give it about the share that it has in a sweep over all of MNIST.
    """
    (num_train, epochs), count, lines = bench.pick((6_000, 4), (200, 2)), 5, []
    bench.images(num_train, 1)  # or Skipped
    dataset = problems.load(bench.dataset, num_train=num_train)
    num_test, cores = len(dataset.test_targets), joblib.cpu_count()
    trained, forward = _operations(dataset)
    evaluated = 2 * forward * (num_train + num_test)  # at the start and at the end
    share = evaluated / (trained * num_train * epochs + evaluated)
    whole = forward * 70_000 / (trained * 60_000 + forward * 70_000)
    note = f"{epochs} epochs of {num_train:,} images, evaluated at the start and at the end: {share:.0%} of "
    rounds = math.ceil(count / cores)
    note += f"the arithmetic, of an epoch of all of MNIST {whole:.0%}; a job has one thread, so that its result does "
    note += f"not depend on the cores: {count} jobs on {cores} take {rounds} rounds, and the limit is so many times "
    note += "what one takes by itself"

    def in_turn(batch_size: int, seeds: Sequence[int] = range(count)) -> list[float]:
        found = []
        for seed in seeds:
            run = ours_training(dataset, seeds=[seed], batch_size=batch_size)
            run.record()
            run.advance(epochs=epochs, record=False).record()
            found.append(run.latest["test_accuracy"].item())
        return found

    def alone(batch_size: int) -> list[float]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return in_turn(batch_size, [0])
        finally:
            torch.set_num_threads(before)

    def check(results: Mapping) -> str:
        ours = results["ours"][results["ours"].epochs == epochs].sort_values("seed").test_accuracy
        return same("test accuracy, seed by seed,", ours, results["in turn"], within=0.005)

    for batch_size, target in bench.pick({16: 1.5, 64: 1.5, 1024: 1.0}, {64: 1.5}).items():
        settings = {"dataset": bench.dataset, "num_train": num_train, "batch_size": batch_size, "lr": LR}
        settings |= {"epochs": epochs, "record_every": epochs}
        sides = {"ours": _sweep([settings], count), "in turn": lambda b=batch_size: functools.partial(in_turn, b)}
        scaled = {"limit": (rounds, f"1 of {rounds} rounds")}
        case, limit = f"{count} seeds, batch {batch_size}", lambda b=batch_size: functools.partial(alone, b)
        lines += _with_limit("seeds", case, sides, target, limit, bench, check, f"{note}; {STARTED}", scaled)
    return lines


def walk(bench: Bench) -> list[Line]:
    """Section 1d by ``sweep.measure``, against its direct port."""
    sizes = bench.pick([*range(1, 9), 16, 32, 64, 128, 256, 512, 1024], [2, 8])
    trials, draw_size, num_train, large = bench.pick((20, 1024, 6_000, 1024), (2, 16, 200, 64))
    bench.images(num_train, 1)  # or Skipped
    dataset = problems.load(bench.dataset, num_train=num_train)
    settings = {"dataset": bench.dataset, "num_train": num_train, "batch_size": large, "lr": LR, "epochs": 1}
    options = {"epochs": [1], "trials": trials, "batch_sizes": sizes, "draw_size": draw_size, "lr": LR}
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "trained"
        weights = sweep.weights(settings, 1, 1, store=Store(trained))[0].weights

        def ours():
            fresh = tempfile.mkdtemp(dir=folder)
            shutil.copytree(trained, fresh, dirs_exist_ok=True)
            return functools.partial(sweep.measure, "walk", [settings], 1, store=Store(fresh), **options)

        def port():
            draws = [gradients.draw(dataset.num_train, draw_size, 0, 0)]
            return functools.partial(baselines.walk_port, weights, dataset, draws, sizes, LR)

        def check(results: Mapping) -> str:
            ours = results["ours"][results["ours"].trial == 0].set_index("measured_batch_size").gradient_norm[sizes]
            return same("norms of a trial", ours, results["direct port"][0], within=0.01, relative=True)

        case, note = f"{len(sizes)} sizes, {trials} trials", f"checkpoint after 1 epoch; {STARTED}"
        note += "; the limit is the port's arithmetic at the speed of square products, not all of which ours need do"
        sides, part = {"ours": ours, "direct port": port}, (trials, f"1 of {trials} trials")
        work, size = _operations(dataset)[0] * draw_size * len(sizes), bench.pick(1024, 128)
        limit = functools.partial(baselines.gemm, size, max(1, round(work / (2 * size**3))))
        return _with_limit("walk", case, sides, 4, limit, bench, check, note, {"direct port": part, "limit": part})


def own_module(bench: Bench) -> list[Line]:
    """A pass over the training set by a module of a user's own, against the plain loop of the same module."""
    from torchvision.models import resnet18

    generator, n = torch.Generator().manual_seed(0), bench.pick(1_024, 8)

    def random(*shape: int) -> Tensors:
        x, y = torch.randn(n, *shape, generator=generator), torch.randint(10, (n,), generator=generator)
        return Tensors("random", x, y, x, y)

    tokens = torch.randint(65, (n, 65), generator=generator)
    text = Tensors("tokens", *(tokens[:, :-1], tokens[:, 1:]) * 2)
    small = functools.partial(_sequential, 2, 50, 3)
    cases = [  # the module, the data, and its batch sizes with the examples of a pass
        ("784-128-10", functools.partial(_sequential, 784, 128, 10), random(784), {1: 128, 16: 1_024, 256: 1_024}),
        (
            "2-50-3",
            small,
            Tensors("points", *((t := random(2)).train_inputs, t.train_targets % 3) * 2),
            {1: 128, 16: 1_024},
        ),
        ("transformer", baselines.CausalTransformer, text, {1: 32, 16: 128}),
        ("ResNet-18", functools.partial(resnet18, num_classes=10), random(3, 32, 32), {32: 64}),
    ]
    lines = []
    for name, factory, dataset, sizes in cases[: bench.pick(4, 3)]:
        for (batch_size, examples), count in itertools.product(sizes.items(), (1, 5)):
            target = 2.0 if count > 1 and name == "2-50-3" else 0.95
            few = Problem(first_of(dataset, min(examples, n), 1), Net(factory, key=name))
            case = f"{name}, batch {batch_size}, {count} seed{'s' * (count > 1)}"
            lines += _own_module(bench, case, few, min(batch_size, few.num_train), range(count), target)
    return lines


def _sequential(inputs: int, hidden: int, classes: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes))


def _own_module(bench: Bench, case: str, problem: Problem, batch_size: int, seeds: range, target: float) -> list[Line]:
    def ours() -> Callable[[], Mapping]:
        training = Training(problem, seeds=seeds, batch_size=batch_size, lr=1e-3, optimizer="adamw")
        return lambda: training.advance(epochs=1, record=False).stack.parameters

    def loops() -> Callable[[], list]:
        nets, dataset = [problem.net.module(seed).to(problem.dataset.device) for seed in seeds], problem.dataset
        orders = [epoch_order(problem.num_train, seed, 0).to(dataset.device) for seed in seeds]
        return lambda: [baselines.own_loop(net, *dataset.batch(o), batch_size) for net, o in zip(nets, orders)]

    def check(results: Mapping) -> str:
        apart = [(results["ours"][n][i] - p).abs().max().item() for i, own in enumerate(results["loops"])
                 for n, p in own.items()]  # fmt: skip
        return same("weights' distance", max(apart), 0.0, within=1e-3)

    sides = {"ours": ours, "loops": loops}
    return compare("own-module", case, sides, {"loops": target}, bench.pairs, check, "AdamW, fused, both")


def per_example(bench: Bench) -> list[Line]:
    """Per-example squared gradient norms and tr Σ, against BackPACK and ``vmap(grad)``; and the memory it takes."""
    examples, part, chunk = bench.pick((10_000, 100, 1_000), (400, 40, 200))
    dataset = bench.images(examples, 1)
    x, y, weights = dataset.train_inputs, dataset.train_targets, ours_training(dataset).weights()
    backpack, both, vmap = "BackPACK BatchL2Grad", "BackPACK BatchL2Grad, SumGradSquared", "vmap(grad)"

    def side(function: Callable, *arguments: object) -> Side:
        return lambda: functools.partial(function, baselines.copied(weights), *arguments)

    sides = {
        "ours": lambda: functools.partial(ours_per_example, dataset, weights),
        backpack: side(baselines.backpack_norms, x, y, chunk, False),
        both: side(baselines.backpack_norms, x, y, chunk, True),
        vmap: side(baselines.vmap_norms, x[:part], y[:part], 20),
    }

    def check(results: Mapping) -> str:
        norms, trace = results["ours"]
        texts = []
        for name in (backpack, both, vmap):
            theirs, their_trace = results[name]
            texts.append(same(f"{name}: norms²", norms[: len(theirs)], theirs, within=1e-3, relative=True))
            if len(theirs) == examples:
                texts.append(same("tr Σ", trace, their_trace, within=1e-3, relative=True))
        return "; ".join(texts)

    case, scaled = f"{examples:,} examples", {vmap: (examples / part, f"{part} of {examples:,} examples")}
    lines = compare("per-example", case, sides, {backpack: 1, both: 1, vmap: 20}, bench.pairs, check, scaled=scaled)
    few = examples // 4
    calls = [functools.partial(ours_per_example, first_of(dataset, n, 1), weights) for n in (few, examples)]
    low, high = memory.peaks(calls, dataset.device)
    note = f"peak beyond what was in use: {low / 1e6:.0f} MB with {few:,}, {high / 1e6:.0f} MB with {examples:,}"
    growth = [high / low]
    return [
        *lines,
        Line("per-example", f"peak memory, {case}", f"{few:,} examples", growth, 1.25, at_least=False, note=note),
    ]


def ours_per_example(dataset: Tensors, weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Squared gradient norms and tr Σ, by ``noise.exact``."""
    found = noise.exact(Solution(problem_of(dataset), weights))
    return found.squared_norms[0], found.trace.item()


def frozen(bench: Bench) -> list[Line]:
    """Norms of minibatches' gradients at frozen weights, from one pool, against autograd's."""
    pool, draws, part = bench.pick((1_024, 10_000, 100), (64, 20, 2))
    sizes = bench.pick([2**k for k in range(1, 11)], [2, 16])
    dataset = bench.images(pool, 1)
    weights = ours_training(dataset).weights()
    options = {"batch_sizes": sizes, "draws": draws, "draw_size": draws * sizes[-1], "replace": True}
    drawn = [torch.from_numpy(one) for b in sizes for one in noise._drawn(pool, b, part, True, 0)]  # the same ones
    sides = {
        "ours": lambda: functools.partial(noise.minibatches, Solution(problem_of(dataset), weights), **options),
        "autograd": lambda: functools.partial(baselines.minibatch_norms, baselines.copied(weights), dataset, drawn),
    }

    def check(results: Mapping) -> str:
        ours = results["ours"].groupby("batch_size").head(part).squared_norm ** 0.5
        return same("norms of the same minibatches", ours, results["autograd"], within=1e-4, relative=True)

    counts = {"ours": draws * len(sizes), "autograd": part * len(sizes)}
    scaled = {name: (1e6 / count, f"{count:,} norms") for name, count in counts.items()}
    case, note = f"1,000,000 norms, batch {sizes[0]}…{sizes[-1]}", f"pool of {pool:,} examples"
    return compare("frozen", case, sides, {"autograd": 100}, bench.pairs, check, note, scaled)


def start(bench: Bench) -> list[Line]:
    """Whole fresh processes, from their start to their end."""
    code = {
        "import torch": "import torch",
        "the packages": bench.pick("import torch, pandas, seaborn, ipywidgets, IPython.display", "import torch"),
        "import helpers": "import helpers",
        "a notebook's imports": bench.pick(
            "from helpers import Book, Training, plots, problems, sweep; sweep.run",
            "from helpers import problems",
        ),
        "companion --help": "import sys; from companion import cli; cli.main(['--help'], standalone_mode=False); "
        "print('with torch' if 'torch' in sys.modules else 'without torch')",
    }

    def process(text: str) -> Callable[[], str]:
        command = [sys.executable, "-c", text]
        return lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def check(results: Mapping[str, str]) -> str:
        if "Usage:" not in results["companion --help"] or "without torch" not in results["companion --help"]:
            raise Mismatch("companion --help imports torch, or does not say its usage")
        return "it does not import torch"

    sides = {name: functools.partial(process, text) for name, text in code.items()}
    seconds, checked = interleave("start", sides, bench.pairs, check)
    theirs, against = seconds["import torch"], {"target": 1.15, "at_least": False}
    lines = []
    for name in ("import helpers", "a notebook's imports"):
        ratios = [a / b for a, b in zip(seconds[name], theirs)]
        lines.append(Line("start", name, "import torch", ratios, **against, ours=seconds[name], theirs=theirs))
    # Every notebook draws with seaborn from tables of pandas, and shows widgets: no code of ours starts before those.
    packages = seconds["the packages"]
    floor = statistics.median(a / b for a, b in zip(packages, theirs))
    note = f"the limit is `{code['the packages']}`, which all need: {statistics.median(packages):.2g} s; seaborn loads "
    lines[-1] = dataclasses.replace(lines[-1], limit=floor, note=note + "scipy.stats")
    ratios = [a / b for a, b in zip(seconds["a notebook's imports"], packages)]
    beyond = {"ours": seconds["a notebook's imports"], "theirs": packages}
    lines.append(Line("start", "a notebook's imports", "the packages it needs", ratios, **against, **beyond))
    times = seconds["companion --help"]
    return [*lines, Line("start", "companion --help", "half a second", times, 0.5, "s", False, times, note=checked)]


def cluster_scaling(bench: Bench) -> list[Line]:
    """A sweep on one and on two workers of a Dask scheduler; and what a job and its result cost the one writer."""
    jobs, num_train = bench.pick((8, 3_000), (4, 100))
    bench.images(num_train, 1)  # or Skipped
    of = {"dataset": bench.dataset, "num_train": num_train, "batch_size": 64, "lr": LR, "epochs": 2}
    with baselines.dask_scheduler() as (address, start_worker):
        environment = {"COMPANION_CLUSTER": address}

        def on(workers: int) -> Side:
            def prepare():
                start_worker(workers)
                # What each worker does once: import the package, read the data.
                cluster.connect(address).run(of_runs.checked, of)
                call = _sweep([of], jobs)()

                def run():
                    with mock.patch.dict(os.environ, environment):
                        return call()

                return run

            return prepare

        def check(results: Mapping) -> str:
            one, two = (results[f"{n} worker{'s' * (n > 1)}"].test_accuracy for n in (1, 2))
            return same("test accuracies", one, two, within=0)

        sides = {"1 worker": on(1), "2 workers": on(2)}
        seconds, checked = interleave(f"cluster, {jobs} jobs", sides, bench.pairs, check)
        cluster.connect(address).close()
    one, two = seconds.values()
    each = statistics.median(one) / jobs
    writes, size = _cost_of_a_result(of)
    most = each / writes
    note = f"{checked}; a job takes {each:.2g} s, and its {size / 1e3:.0f} kB {1000 * writes:.1f} ms of the runner; "
    note += (
        f"so 100 workers would be at most {min(100, most):.0f} times as fast as one, and {most:.0f} of them would keep "
    )
    note += "the runner busy with results: more are of use to longer jobs alone"
    ratios = [a / b for a, b in zip(one, two)]
    return [Line("cluster", f"{jobs} jobs, 2 workers", "1 worker", ratios, 1.6, ours=two, theirs=one, note=note)]


def _cost_of_a_result(settings: Mapping) -> tuple[float, int]:
    """Seconds that the runner spends on a job's result beyond its training, and the result's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        frame = sweep.run([settings], 1, store=store).drop(columns="run")
        packed, took = cloudpickle.dumps(frame), []
        for k in range(20):
            started = time.perf_counter()
            claim = store.claim(key_of({"k": k}))
            key = store.put({"k": k}, cloudpickle.loads(packed))
            store.settle(key, claim)
            took.append(time.perf_counter() - started)
    return statistics.median(took), len(packed)


def cost_growth(bench: Bench) -> list[Line]:
    """The exponents with which time grows, one fit to each round of interleaved sizes."""
    model, counts = bench.pick("shen_mlp", "small_mlp"), bench.pick((1, 2, 4, 8), (1, 2, 3))
    base, (few, width) = (
        {"dataset": "digits", "model": model, "epochs": 1, "lr": LR},
        bench.pick((1_500, 256), (100, 16)),
    )

    def training(num_train: int, net: Callable = nets.NETS[model]) -> Side:
        x, y = torch.rand(num_train, 784, generator=torch.Generator().manual_seed(0)), torch.arange(num_train) % 10
        dataset = Tensors("random", x, y, x[:few], y[:few])
        return lambda: functools.partial(ours_training(dataset, net).advance, epochs=1, record=False)

    quantities = {
        "seeds": {n: _sweep([base], n, 1) for n in counts},
        "batch sizes": {n: _sweep(sweep.grid(base, batch_size=[64 + i for i in range(n)]), 1, 1) for n in counts},
        "training examples": {few * n: training(few * n) for n in counts},
        "width (one hidden layer)": {width * n: training(few, _one_hidden_layer(width * n)) for n in counts},
        "notebooks": {n: functools.partial(_run_of, n) for n in counts[:3]},
        "points of a grid": {few // 30 * n: functools.partial(_grid_of, few // 30 * n) for n in counts},
        "entries of the store": {few // 15 * n: functools.partial(_store_of, few // 15 * n) for n in counts},
    }
    lines = []
    for name, sides in quantities.items():
        seconds, _ = interleave(f"cost-growth, {name}", sides, bench.pairs)
        exponents = [fits.fit_power(list(sides), times).slope for times in zip(*seconds.values())]
        error = statistics.stdev(exponents) / len(exponents) ** 0.5 if len(exponents) > 1 else 0.0
        times = ", ".join(f"{statistics.median(s):.3g} s at {n:,}" for n, s in seconds.items())
        note = f"standard error {error:.2g} over rounds; {times}"
        lines.append(Line("cost-growth", name, "linear", exponents, 1.0, "", False, note=note, error=error))
    return lines


def _run_of(count: int) -> Callable[[], object]:
    """A run of so many notebooks that compute nothing, one after the other."""
    folder = Path(tempfile.mkdtemp())
    (folder / "profiles.yml").write_text("quick: {}", encoding="utf-8")
    cells = [nbformat.v4.new_code_cell('output_dir = ""', metadata={"tags": ["parameters"]})]
    kernel = {"name": "python3", "display_name": "", "language": "python"}
    for number in range(count):
        empty = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(empty, folder / f"{number:02}_empty.ipynb")

    def execute():
        with tempfile.TemporaryDirectory() as out:
            if run.run("quick", jobs=1, out=out, folder=folder, say=str):
                raise Mismatch("an empty notebook failed")
        shutil.rmtree(folder)

    return execute


def _grid_of(count: int) -> Callable[[], object]:
    """The plan of so many points, and their results on a page, each with a small table."""
    out, about = Path(tempfile.mkdtemp()), dict.fromkeys(("main_figure", "title", "note", "notebook", "profile"), "")
    for number in range(count):
        (out / f"seed={number}/tables").mkdir(parents=True)
        pd.DataFrame({"x": [1.0]}).to_parquet(out / f"seed={number}/tables/02_x.parquet")

    def collect():
        points = grid.plan("02", [{"seed": list(range(count))}], "quick", "digits")
        for point in points:
            point.folder, point.status = out / point.label, "ok"
        grid.collect(points, out, about | dict.fromkeys(("dataset", "started", "machine"), ""))
        shutil.rmtree(out)

    return collect


def _store_of(count: int) -> Callable[[], object]:
    """What ``companion status`` asks of a store of so many entries, and a sweep of each: is it there, its frame."""
    store = Store(tempfile.mkdtemp())
    keys = [store.put({"k": k}, pd.DataFrame({"x": [1.0]})) for k in range(count)]

    def look():
        of_results.size(store.folder)
        frames = [store.frame(key) for key in store.all_keys() if store.has(key)]
        shutil.rmtree(store.folder)
        return len(keys) == len(frames)

    return look


def _one_hidden_layer(width: int) -> Callable:
    return functools.partial(nets.MLP, hidden=(width,), initialise=nets.he_uniform_then_xavier_uniform)


ROWS: dict[str, Callable[[Bench], list[Line]]] = {
    "mnist-epoch": mnist_epoch, "mnist-roofline": mnist_roofline, "perceptron": perceptron, "cnn": cnn,
    "small-mlp": small_mlp, "blobs-mlp": blobs_mlp, "own-module": own_module, "blobs-sweep": blobs_sweep,
    "seeds": seeds, "walk": walk, "per-example": per_example, "frozen": frozen, "start": start,
    "cluster": cluster_scaling, "cost-growth": cost_growth,
}  # fmt: skip
