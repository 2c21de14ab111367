import gzip
import os
import pickle
import shutil
import struct
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from torchvision import datasets

from helpers.problems import DataError, builtin

# name: (magic number, examples, bytes an example)
IDX_FILES = {
    "train-images-idx3-ubyte": (2051, 60_000, 784),
    "train-labels-idx1-ubyte": (2049, 60_000, 1),
    "t10k-images-idx3-ubyte": (2051, 10_000, 784),
    "t10k-labels-idx1-ubyte": (2049, 10_000, 1),
}


def write_idx_files(root, name):
    """A dataset in MNIST's format, of full size: black images, labels 0 to 9 in turn."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for file, (magic, examples, size) in IDX_FILES.items():
        header = struct.pack(">4I", magic, examples, 28, 28) if size > 1 else struct.pack(">2I", magic, examples)
        content = bytes(examples * size) if size > 1 else (np.arange(examples) % 10).astype(np.uint8).tobytes()
        (raw / file).write_bytes(header + content)
    return raw


def pack(raw, monkeypatch):
    """The archives of a FashionMNIST folder, their checksums made known to torchvision."""
    for file in IDX_FILES:
        (raw / f"{file}.gz").write_bytes(gzip.compress((raw / file).read_bytes(), compresslevel=1, mtime=0))
    known = [(f"{file}.gz", builtin._md5(raw / f"{file}.gz")) for file in IDX_FILES]
    monkeypatch.setattr(datasets.FashionMNIST, "resources", known)


@pytest.fixture
def offline(monkeypatch):
    """No host can be reached."""

    def urlopen(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_blobs_are_brownlees_problem_and_split():
    inputs, targets = make_blobs(n_samples=1000, centers=3, n_features=2, cluster_std=2, random_state=2)
    blobs = builtin.load("blobs", device="cpu")
    np.testing.assert_array_equal(blobs.train_inputs.numpy(), inputs[:500].astype(np.float32))
    np.testing.assert_array_equal(blobs.test_inputs.numpy(), inputs[500:].astype(np.float32))
    np.testing.assert_array_equal(blobs.train_targets.numpy(), targets[:500])
    np.testing.assert_array_equal(blobs.test_targets.numpy(), targets[500:])
    assert blobs.num_classes == 3
    assert blobs.input_shape == (2,)


def test_digits_are_split_1297_to_500_by_class_and_normalised():
    digits = builtin.load("digits", device="cpu")
    assert (digits.num_train, len(digits.test_targets), digits.input_shape) == (1297, 500, (1, 8, 8))
    assert digits.num_classes == 10
    assert digits.train_inputs.mean().item() == pytest.approx(0.0, abs=0.01)
    assert digits.train_inputs.std().item() == pytest.approx(1.0, abs=0.01)
    train, test = (np.bincount(y.numpy(), minlength=10) for y in (digits.train_targets, digits.test_targets))
    np.testing.assert_allclose(test, (train + test) * 500 / 1797, atol=1)


@pytest.mark.parametrize("name", [name for name, one in builtin.DATASETS.items() if one.read])
def test_tensors_have_the_promised_types_and_the_size_known_beforehand(name):
    dataset = builtin.load(name, device="cpu")
    assert dataset.train_inputs.dtype == dataset.test_inputs.dtype == torch.float32
    assert dataset.train_targets.dtype == dataset.test_targets.dtype == torch.int64
    assert (dataset.num_train, dataset.num_test) == (builtin.TRAIN_SIZES[name], builtin.TEST_SIZES[name])
    assert set(dataset.train_targets.tolist()) == set(range(dataset.num_classes))


def test_an_unknown_dataset_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'cifar'.*auto, mnist, fashion_mnist, kmnist, digits, blobs"):
        builtin.load("cifar")


@pytest.mark.parametrize("num_train", [-1, 0, 9, 1298])
def test_a_subset_of_impossible_size_is_refused(num_train):
    with pytest.raises(ValueError, match=f"num_train is {num_train}; expected 10 .* to 1297"):
        builtin.load("digits", num_train=num_train, device="cpu")


@pytest.mark.parametrize("num_train", [10, 11, 777, 1296])
def test_in_a_subset_each_class_keeps_its_share_to_within_one_example(num_train):
    whole = np.bincount(builtin.load("digits", device="cpu").train_targets.numpy())
    for seed in range(3):
        subset = builtin.load("digits", num_train=num_train, subset_seed=seed, device="cpu")
        assert subset.num_train == num_train
        assert len(subset.test_targets) == 500
        counts = np.bincount(subset.train_targets.numpy(), minlength=10)
        assert np.abs(counts - whole * num_train / 1297).max() <= 1


def test_a_subset_is_a_function_of_its_seed():
    first, second = (builtin.load("digits", num_train=100, subset_seed=seed, device="cpu") for seed in (1, 2))
    builtin._load.cache_clear()
    again = builtin.load("digits", num_train=100, subset_seed=1, device="cpu")
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert not torch.equal(first.train_inputs, second.train_inputs)


def test_a_larger_subset_contains_a_smaller_one_of_its_seed():
    targets = builtin.load("digits", device="cpu").train_targets.numpy()
    smaller = set()
    for num_train in (10, 50, 51, 400, 1297):
        chosen = set(builtin._stratified(targets, num_train, seed=3).tolist())
        assert len(chosen) == num_train
        assert smaller < chosen
        smaller = chosen


def test_the_fingerprint_follows_the_content():
    def fingerprint(**subset):
        builtin._load.cache_clear()
        return builtin.load("digits", device="cpu", **subset).fingerprint

    whole, subset, other = fingerprint(), fingerprint(num_train=100), fingerprint(num_train=100, subset_seed=1)
    assert len({whole, subset, other, builtin.load("blobs", device="cpu").fingerprint}) == 4
    assert fingerprint() == whole
    assert fingerprint(num_train=100) == subset
    assert fingerprint(num_train=1297) == whole


def test_mnist_is_the_files_pixels_normalised_as_in_the_write_up(mnist_root):
    mnist = builtin.load("mnist", root=mnist_root, device="cpu")
    raw = mnist_root / "MNIST/raw"
    for prefix, inputs, targets, examples in (
        ("train", mnist.train_inputs, mnist.train_targets, 60_000),
        ("t10k", mnist.test_inputs, mnist.test_targets, 10_000),
    ):
        pixels = np.fromfile(raw / f"{prefix}-images-idx3-ubyte", np.uint8, offset=16).reshape(examples, 1, 28, 28)
        labels = np.fromfile(raw / f"{prefix}-labels-idx1-ubyte", np.uint8, offset=8)
        assert inputs.shape == (examples, 1, 28, 28)
        some = slice(None, None, 7)
        np.testing.assert_allclose(inputs[some].numpy(), (pixels[some] / 255 - 0.1307) / 0.3081, atol=1e-6)
        np.testing.assert_array_equal(targets.numpy(), labels)
    assert builtin.resolve("auto", mnist_root) == ("mnist", "")


def test_mnist_files_with_other_content_are_called_damaged(tmp_path):
    raw = write_idx_files(tmp_path, "MNIST")
    with pytest.raises(DataError, match=rf"damaged file {raw}/train-images-idx3-ubyte: .*MD5"):
        builtin.load("mnist", root=tmp_path)


def test_damaged_mnist_is_reported_and_not_replaced_by_digits(tmp_path, offline):
    write_idx_files(tmp_path, "MNIST")
    with pytest.raises(DataError, match="damaged file"):
        builtin.resolve("auto", tmp_path)


def test_fashion_mnist_files_of_the_right_form_load(tmp_path):
    write_idx_files(tmp_path, "FashionMNIST")
    fashion = builtin.load("fashion_mnist", num_train=1000, root=tmp_path, device="cpu")
    assert (fashion.num_train, len(fashion.test_targets), fashion.num_classes) == (1000, 10_000, 10)
    assert fashion.train_inputs[0, 0, 0, 0].item() == pytest.approx(-0.2860 / 0.3530)


@pytest.mark.parametrize("file", IDX_FILES)
def test_a_truncated_file_is_named(tmp_path, file):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    content = (raw / file).read_bytes()
    (raw / file).write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"damaged file {raw}/{file}: {len(content) - 1:,} bytes"):
        builtin.resolve("fashion_mnist", tmp_path)


def test_a_wrong_header_is_named(tmp_path):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    content = bytearray((raw / "t10k-images-idx3-ubyte").read_bytes())
    content[11] = 27
    (raw / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=f"damaged file {raw}/t10k-images-idx3-ubyte"):
        builtin.resolve("fashion_mnist", tmp_path)


def test_a_file_that_differs_from_its_archive_is_named(tmp_path, monkeypatch):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    pack(raw, monkeypatch)
    assert builtin.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
    content = bytearray((raw / "t10k-labels-idx1-ubyte").read_bytes())
    content[100] ^= 1
    (raw / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=rf"{raw}/t10k-labels-idx1-ubyte: .*differs from t10k-labels-idx1-ubyte.gz"):
        builtin.resolve("fashion_mnist", tmp_path)


@pytest.fixture
def verified(monkeypatch):
    """The names of the files read to verify them, archives and unpacked ones."""
    names, md5, damage = [], builtin._md5, builtin._damage
    monkeypatch.setattr(builtin, "_md5", lambda file: names.append(file.name) or md5(file))
    monkeypatch.setattr(builtin, "_damage", lambda file, *rest: names.append(file.name) or damage(file, *rest))
    return names


def test_files_that_have_not_changed_are_not_verified_again(tmp_path, monkeypatch, verified):
    pack(write_idx_files(tmp_path, "FashionMNIST"), monkeypatch)
    verified.clear()
    assert builtin.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
    assert sorted(verified) == sorted([*IDX_FILES, *(f"{file}.gz" for file in IDX_FILES)])
    verified.clear()
    for _ in range(3):
        assert builtin.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
    assert verified == []
    write_idx_files(tmp_path / "other", "FashionMNIST")
    builtin.resolve("fashion_mnist", tmp_path / "other")  # the same files in another place
    assert sorted(verified) == sorted(IDX_FILES)


@pytest.mark.parametrize("change", ["shorter", "rewritten", "touched", "an archive rewritten"])
def test_files_that_have_changed_are_verified_again(tmp_path, monkeypatch, verified, change):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    pack(raw, monkeypatch)
    builtin.resolve("fashion_mnist", tmp_path)
    file = raw / ("t10k-labels-idx1-ubyte" + ".gz" * change.startswith("an archive"))
    before, content = file.stat(), bytearray(file.read_bytes())
    verified.clear()
    if change != "touched":
        content[-1] ^= 1
        file.write_bytes(content[: -1 if change == "shorter" else None])
    later = before.st_mtime_ns + (0 if change == "shorter" else 1_000_000)  # by size, or by time
    os.utime(file, ns=(later, later))
    if change == "touched":
        assert builtin.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
        assert len(verified) == 8
        return
    for _ in range(2):  # what is damaged is not taken for verified
        with pytest.raises(DataError, match=f"damaged file {file}: "):
            builtin.resolve("fashion_mnist", tmp_path)


def test_a_damaged_archive_is_named(tmp_path):
    archive = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(gzip.compress(bytes(100)))
    with pytest.raises(DataError, match=f"damaged file {archive}"):
        builtin.resolve("auto", tmp_path)


def test_archives_added_by_hand_are_unpacked_without_a_network(tmp_path, monkeypatch, offline):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    pack(raw, monkeypatch)
    before = {file: (raw / file).read_bytes() for file in IDX_FILES}
    for file in IDX_FILES:
        (raw / file).unlink()
    assert builtin.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
    assert {file: (raw / file).read_bytes() for file in IDX_FILES} == before
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_a_failed_download_names_the_four_archives_and_their_folder_and_leaves_nothing(tmp_path, offline, name):
    with pytest.raises(DataError) as caught:
        builtin.load(name, root=tmp_path)
    for expected in (*(f"{file}.gz" for file in IDX_FILES), str(tmp_path / name.upper() / "raw")):
        assert expected in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Torchvision:
    """What ``builtin`` uses of torchvision's FashionMNIST; its ``write`` is the download."""

    __name__ = "FashionMNIST"

    def __init__(self, there, write):
        self.resources = [(f"{file}.gz", builtin._md5(there / f"{file}.gz")) for file in IDX_FILES]
        self.there, self.write = there, write

    def __call__(self, root, train=True, download=False):
        assert download
        self.write(self.there, Path(root) / "FashionMNIST" / "raw")


@pytest.fixture
def torchvision(tmp_path, monkeypatch):
    """Replace torchvision by a class whose download is a function (there, raw folder)."""
    there = write_idx_files(tmp_path / "there", "FashionMNIST")
    pack(there, monkeypatch)

    def replace(write):
        monkeypatch.setattr(builtin, "_torchvision_class", lambda name: Torchvision(there, write))
        return there

    return replace


def test_a_download_takes_its_place_as_a_whole(tmp_path, torchvision):
    there = torchvision(lambda there, raw: shutil.copytree(there, raw, dirs_exist_ok=True))
    builtin.download("fashion_mnist", tmp_path / "here")
    raw = tmp_path / "here/FashionMNIST/raw"
    assert {file.name: file.read_bytes() for file in raw.iterdir()} == {f.name: f.read_bytes() for f in there.iterdir()}
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["FashionMNIST"]
    assert builtin.resolve("fashion_mnist", tmp_path / "here") == ("fashion_mnist", "")


def test_a_download_that_breaks_off_leaves_nothing_behind(tmp_path, torchvision):
    def breaks_off(there, raw):
        shutil.copy(there / "t10k-labels-idx1-ubyte.gz", raw)
        raise RuntimeError("File not found or corrupted.")

    torchvision(breaks_off)
    with pytest.raises(DataError, match=r"could not be downloaded into .*\(File not found or corrupted"):
        builtin.download("fashion_mnist", tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_download_is_given_up_when_nothing_arrives_and_not_while_something_does(tmp_path, torchvision):
    end = threading.Event()
    torchvision(lambda there, raw: end.wait(60))
    started = time.monotonic()
    with pytest.raises(DataError, match=r"nothing arrived within 0\.4 s"):
        builtin.download("fashion_mnist", tmp_path / "here", patience=0.4)
    end.set()
    assert time.monotonic() - started < 10
    assert list((tmp_path / "here").iterdir()) == []

    def trickles(there, raw):
        with (raw / "archive").open("wb", buffering=0) as file:
            for _ in range(8):
                file.write(b"x")
                time.sleep(0.2)

    torchvision(trickles)
    builtin.download("fashion_mnist", tmp_path / "here", patience=1.0)  # 1.6 s in all
    assert (tmp_path / "here/FashionMNIST/raw/archive").read_bytes() == b"x" * 8


def test_files_travel_to_a_worker_that_lacks_them(tmp_path, monkeypatch):
    pack(write_idx_files(tmp_path / "here", "FashionMNIST"), monkeypatch)
    files = builtin.files_of("fashion_mnist", tmp_path / "here")
    builtin.put_files("fashion_mnist", files, tmp_path / "there")
    assert builtin.resolve("fashion_mnist", tmp_path / "there") == ("fashion_mnist", "")
    assert builtin.files_of("digits") == builtin.files_of("") == {}


def test_auto_settles_for_digits_and_says_so(tmp_path, offline):
    name, note = builtin.resolve("auto", tmp_path)
    assert name == "digits"
    assert "MNIST IS NOT HERE" in note
    assert "t10k-labels-idx1-ubyte.gz" in note
    with pytest.warns(UserWarning, match="MNIST IS NOT HERE"):
        digits = builtin.load("auto", root=tmp_path, device="cpu")
    assert digits.fingerprint == builtin.load("digits", device="cpu").fingerprint


def test_data_lies_where_asked_else_in_companion_data(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "b"))
    assert builtin.data_root(tmp_path / "a") == tmp_path / "a"
    assert builtin.data_root() == tmp_path / "b"


# Problems by name


def test_a_named_problem_travels_by_its_name_and_keeps_its_content():
    problem = builtin.named("digits", "small_mlp", num_train=100, norm="batch", norm_batch_size=5, loss="squared")
    sent = pickle.dumps(problem)
    assert len(sent) < 5_000  # not its data
    found = pickle.loads(sent)
    assert found.names == problem.names and found.dataset.fingerprint == problem.dataset.fingerprint
    assert torch.equal(found.net.module(3).head.weight, problem.net.module(3).head.weight)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"model": "resnet"}, "unknown model 'resnet'; choose one of: brownlee_mlp, small_mlp"),
        ({"loss": "hinge"}, "unknown loss 'hinge'; choose one of: cross_entropy, squared"),
        ({"norm": "layer"}, "unknown norm 'layer'; choose one of: none, batch, group"),
        ({"norm": "group", "norm_batch_size": 8}, "only norm='batch' takes one"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(names, message):
    with pytest.raises(ValueError, match=message):
        builtin.named("blobs", **{"model": "brownlee_mlp", **names})


def test_a_cnn_on_anything_but_images_is_refused():
    with pytest.raises(ValueError, match="a CNN needs images"):
        builtin.named("blobs", "plain_cnn").net.module(0)


MINE = """
import torch
from torch import nn
from helpers import Dataset, Net, Problem

def problem():
    data = Dataset.of(torch.randn(20, 3), torch.arange(20) % 2)
    return Problem(data, Net(lambda: nn.Linear(3, 2)))

made = problem()
number = 3
unfit = Problem(made.dataset, Net(lambda: nn.Linear(4, 2)))
"""


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    (tmp_path / "mine_h6.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "mine_h6"
    sys.modules.pop("mine_h6", None)


def test_a_problem_of_a_module_is_chosen_by_its_name_whether_made_or_a_function(my_module):
    assert builtin.choose(f"{my_module}:problem").num_train == 20
    made = builtin.choose(f"{my_module}:made")
    assert made is builtin.choose(f"{my_module}:made")
    assert builtin.choose("", "blobs", "brownlee_mlp", norm="group").names["norm"] == "group"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine_h6", "expected module:name, such as my_module:problem"),
        ("mine_h6:other", "cannot be found"),
        ("no_module_h6:problem", "cannot be found: No module named 'no_module_h6'"),
        ("mine_h6:number", "is a int; expected a Problem"),
        ("mine_h6:unfit", "the net cannot take this data"),
    ],
)
def test_a_problem_that_cannot_be_chosen_is_refused_in_one_line(my_module, spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        builtin.choose(spec)
    assert "\n" not in str(caught.value)
