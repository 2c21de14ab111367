import gzip
import io
import os
import socket
import struct
import urllib.request

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from torchvision import datasets

from helpers.problems import data

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
    known = [(f"{file}.gz", data._md5(raw / f"{file}.gz")) for file in IDX_FILES]
    monkeypatch.setattr(datasets.FashionMNIST, "resources", known)


def no_mirror_answers(monkeypatch):
    monkeypatch.setattr(data, "_answers", lambda mirrors, file, patience: False)


def test_blobs_are_brownlees_problem_and_split():
    inputs, targets = make_blobs(n_samples=1000, centers=3, n_features=2, cluster_std=2, random_state=2)
    blobs = data.load("blobs", device="cpu")
    np.testing.assert_array_equal(blobs.train_inputs.numpy(), inputs[:500].astype(np.float32))
    np.testing.assert_array_equal(blobs.test_inputs.numpy(), inputs[500:].astype(np.float32))
    np.testing.assert_array_equal(blobs.train_targets.numpy(), targets[:500])
    np.testing.assert_array_equal(blobs.test_targets.numpy(), targets[500:])
    assert blobs.num_classes == 3
    assert blobs.input_shape == (2,)


def test_digits_are_split_1297_to_500_by_class_and_normalised():
    digits = data.load("digits", device="cpu")
    assert (digits.num_train, len(digits.test_targets), digits.input_shape) == (1297, 500, (1, 8, 8))
    assert digits.num_classes == 10
    assert digits.train_inputs.mean().item() == pytest.approx(0.0, abs=0.01)
    assert digits.train_inputs.std().item() == pytest.approx(1.0, abs=0.01)
    train, test = (np.bincount(y.numpy(), minlength=10) for y in (digits.train_targets, digits.test_targets))
    np.testing.assert_allclose(test, (train + test) * 500 / 1797, atol=1)


@pytest.mark.parametrize("name", ["digits", "blobs"])
def test_tensors_have_the_promised_types_and_the_size_known_beforehand(name):
    dataset = data.load(name, device="cpu")
    assert dataset.train_inputs.dtype == dataset.test_inputs.dtype == torch.float32
    assert dataset.train_targets.dtype == dataset.test_targets.dtype == torch.int64
    assert dataset.num_train == data.TRAIN_SIZES[name]


def test_an_unknown_dataset_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'cifar'.*auto, mnist, fashion_mnist, kmnist, digits, blobs"):
        data.load("cifar")


@pytest.mark.parametrize("num_train", [-1, 0, 9, 1298])
def test_a_subset_of_impossible_size_is_refused(num_train):
    with pytest.raises(ValueError, match=f"num_train is {num_train}; expected 10 .* to 1297"):
        data.load("digits", num_train=num_train, device="cpu")


@pytest.mark.parametrize("num_train", [10, 11, 100, 777, 1296])
def test_in_a_subset_each_class_keeps_its_share_to_within_one_example(num_train):
    whole = np.bincount(data.load("digits", device="cpu").train_targets.numpy())
    for seed in range(3):
        subset = data.load("digits", num_train=num_train, subset_seed=seed, device="cpu")
        assert subset.num_train == num_train
        assert len(subset.test_targets) == 500
        counts = np.bincount(subset.train_targets.numpy(), minlength=10)
        assert np.abs(counts - whole * num_train / 1297).max() <= 1


def test_a_subset_is_a_function_of_its_seed():
    first, second = (data.load("digits", num_train=100, subset_seed=seed, device="cpu") for seed in (1, 2))
    data._load.cache_clear()
    again = data.load("digits", num_train=100, subset_seed=1, device="cpu")
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert not torch.equal(first.train_inputs, second.train_inputs)


def test_a_larger_subset_contains_a_smaller_one_of_its_seed():
    targets = data.load("digits", device="cpu").train_targets.numpy()
    smaller = set()
    for num_train in (10, 50, 51, 400, 1297):
        chosen = set(data._stratified(targets, num_train, seed=3).tolist())
        assert len(chosen) == num_train
        assert smaller < chosen
        smaller = chosen


def test_an_epochs_order_is_a_permutation_given_by_seed_and_epoch():
    orders = {(seed, epoch): data.epoch_order(500, seed, epoch) for seed in (0, 1, 7) for epoch in (0, 1, 7)}
    for (seed, epoch), order in orders.items():
        assert sorted(order.tolist()) == list(range(500))
        assert torch.equal(order, data.epoch_order(500, seed, epoch))
    assert len({tuple(order.tolist()) for order in orders.values()}) == len(orders)


def test_an_epochs_order_leaves_torchs_own_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    data.epoch_order(500, 0, 0)
    assert torch.equal(torch.rand(3), expected)


def test_the_fingerprint_follows_the_content():
    def fingerprint(**subset):
        data._load.cache_clear()
        return data.load("digits", device="cpu", **subset).fingerprint

    whole, subset, other = fingerprint(), fingerprint(num_train=100), fingerprint(num_train=100, subset_seed=1)
    assert len({whole, subset, other, data.load("blobs", device="cpu").fingerprint}) == 4
    assert fingerprint() == whole
    assert fingerprint(num_train=100) == subset
    assert fingerprint(num_train=1297) == whole


def test_mnist_is_the_files_pixels_normalised_as_in_the_write_up(mnist_root):
    mnist = data.load("mnist", root=mnist_root, device="cpu")
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
    assert data.resolve("auto", mnist_root) == ("mnist", "")


def test_mnist_files_with_other_content_are_called_damaged(tmp_path):
    raw = write_idx_files(tmp_path, "MNIST")
    with pytest.raises(data.DataError, match=rf"damaged file {raw}/train-images-idx3-ubyte: .*MD5"):
        data.load("mnist", root=tmp_path)


def test_damaged_mnist_is_reported_and_not_replaced_by_digits(tmp_path, monkeypatch):
    no_mirror_answers(monkeypatch)
    write_idx_files(tmp_path, "MNIST")
    with pytest.raises(data.DataError, match="damaged file"):
        data.resolve("auto", tmp_path)


def test_fashion_mnist_files_of_the_right_form_load(tmp_path):
    write_idx_files(tmp_path, "FashionMNIST")
    fashion = data.load("fashion_mnist", num_train=1000, root=tmp_path, device="cpu")
    assert (fashion.num_train, len(fashion.test_targets), fashion.num_classes) == (1000, 10_000, 10)
    assert fashion.train_inputs[0, 0, 0, 0].item() == pytest.approx(-0.2860 / 0.3530)


@pytest.mark.parametrize("file", IDX_FILES)
def test_a_truncated_file_is_named(tmp_path, file):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    content = (raw / file).read_bytes()
    (raw / file).write_bytes(content[:-1])
    with pytest.raises(data.DataError, match=rf"damaged file {raw}/{file}: {len(content) - 1:,} bytes"):
        data.resolve("fashion_mnist", tmp_path)


def test_a_wrong_header_is_named(tmp_path):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    content = bytearray((raw / "t10k-images-idx3-ubyte").read_bytes())
    content[11] = 27
    (raw / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(data.DataError, match=f"damaged file {raw}/t10k-images-idx3-ubyte"):
        data.resolve("fashion_mnist", tmp_path)


def test_a_file_that_differs_from_its_archive_is_named(tmp_path, monkeypatch):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    pack(raw, monkeypatch)
    assert data.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
    content = bytearray((raw / "t10k-labels-idx1-ubyte").read_bytes())
    content[100] ^= 1
    (raw / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(
        data.DataError, match=rf"{raw}/t10k-labels-idx1-ubyte: .*differs from t10k-labels-idx1-ubyte.gz"
    ):
        data.resolve("fashion_mnist", tmp_path)


@pytest.fixture
def verified(monkeypatch):
    """The names of the files read to verify them, archives and unpacked ones."""
    names, md5, damage = [], data._md5, data._damage
    monkeypatch.setattr(data, "_md5", lambda file: names.append(file.name) or md5(file))
    monkeypatch.setattr(data, "_damage", lambda file, *rest: names.append(file.name) or damage(file, *rest))
    return names


def test_files_that_have_not_changed_are_not_verified_again(tmp_path, monkeypatch, verified):
    pack(write_idx_files(tmp_path, "FashionMNIST"), monkeypatch)
    verified.clear()
    assert data.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
    assert sorted(verified) == sorted([*IDX_FILES, *(f"{file}.gz" for file in IDX_FILES)])
    verified.clear()
    for _ in range(3):
        assert data.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
    assert verified == []
    write_idx_files(tmp_path / "other", "FashionMNIST")
    data.resolve("fashion_mnist", tmp_path / "other")  # the same files in another place
    assert sorted(verified) == sorted(IDX_FILES)


@pytest.mark.parametrize("change", ["shorter", "rewritten", "touched", "an archive rewritten"])
def test_files_that_have_changed_are_verified_again(tmp_path, monkeypatch, verified, change):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    pack(raw, monkeypatch)
    data.resolve("fashion_mnist", tmp_path)
    file = raw / ("t10k-labels-idx1-ubyte" + ".gz" * change.startswith("an archive"))
    before, content = file.stat(), bytearray(file.read_bytes())
    verified.clear()
    if change != "touched":
        content[-1] ^= 1
        file.write_bytes(content[: -1 if change == "shorter" else None])
    later = before.st_mtime_ns + (0 if change == "shorter" else 1_000_000)  # by size, or by time
    os.utime(file, ns=(later, later))
    if change == "touched":
        assert data.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
        assert len(verified) == 8
        return
    for _ in range(2):  # what is damaged is not taken for verified
        with pytest.raises(data.DataError, match=f"damaged file {file}: "):
            data.resolve("fashion_mnist", tmp_path)


def test_a_damaged_archive_is_named(tmp_path):
    archive = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(gzip.compress(bytes(100)))
    with pytest.raises(data.DataError, match=f"damaged file {archive}"):
        data.resolve("auto", tmp_path)


def test_archives_added_by_hand_are_unpacked_without_a_network(tmp_path, monkeypatch):
    raw = write_idx_files(tmp_path, "FashionMNIST")
    pack(raw, monkeypatch)
    monkeypatch.setitem(data._MIRRORS, "fashion_mnist", ["https://127.0.0.1:9/"])
    before = {file: (raw / file).read_bytes() for file in IDX_FILES}
    for file in IDX_FILES:
        (raw / file).unlink()
    assert data.resolve("fashion_mnist", tmp_path) == ("fashion_mnist", "")
    assert {file: (raw / file).read_bytes() for file in IDX_FILES} == before
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_a_failed_download_names_the_four_archives_and_their_folder(tmp_path, monkeypatch, name):
    no_mirror_answers(monkeypatch)
    with pytest.raises(data.DataError) as caught:
        data.load(name, root=tmp_path)
    for expected in (*(f"{file}.gz" for file in IDX_FILES), str(tmp_path / name.upper() / "raw")):
        assert expected in str(caught.value)


def test_a_download_that_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_answers", lambda mirrors, file, patience: True)
    monkeypatch.setitem(data._MIRRORS, "mnist", ["https://127.0.0.1:9/"])
    before = socket.getdefaulttimeout()
    with pytest.raises(data.DataError, match="could not be downloaded"):
        data.download("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == before


class Reply(io.BytesIO):
    length = None


def test_archives_are_downloaded_verified_and_unpacked_and_torchvision_asks_nobody(tmp_path, monkeypatch):
    raw = write_idx_files(tmp_path / "there", "FashionMNIST")
    pack(raw, monkeypatch)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("torchvision asked a host"))
    asked = []

    def serve(url, **_):
        asked.append(url)
        return Reply((raw / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr(data, "_open", serve)
    data.download("fashion_mnist", tmp_path / "here")
    assert data.resolve("fashion_mnist", tmp_path / "here") == ("fashion_mnist", "")
    for file in IDX_FILES:
        assert (tmp_path / "here/FashionMNIST/raw" / file).read_bytes() == (raw / file).read_bytes()
    assert len(set(asked)) == 4


def test_an_archive_with_another_checksum_is_refused_and_nothing_is_kept_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("torchvision asked a host"))
    monkeypatch.setattr(data, "_open", lambda url, **_: Reply(gzip.compress(b"something else")))
    with pytest.raises(data.DataError, match="MD5 is not"):
        data.download("kmnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_auto_settles_for_digits_and_says_so(tmp_path, monkeypatch):
    no_mirror_answers(monkeypatch)
    name, note = data.resolve("auto", tmp_path)
    assert name == "digits"
    assert "MNIST IS NOT HERE" in note
    assert "t10k-labels-idx1-ubyte.gz" in note
    with pytest.warns(UserWarning, match="MNIST IS NOT HERE"):
        digits = data.load("auto", root=tmp_path, device="cpu")
    assert digits.fingerprint == data.load("digits", device="cpu").fingerprint


@pytest.mark.parametrize("kind", ["refuses", "never answers"])
def test_a_dead_mirror_does_not_stop_auto(tmp_path, monkeypatch, kind):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = 9 if kind == "refuses" else silent.getsockname()[1]
        monkeypatch.setitem(data._MIRRORS, "mnist", [f"https://127.0.0.1:{port}/"])
        monkeypatch.setitem(data.download.__kwdefaults__, "patience", 1.0)
        assert data.resolve("auto", tmp_path)[0] == "digits"


def test_data_lies_where_asked_else_in_companion_data(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "b"))
    assert data.data_root(tmp_path / "a") == tmp_path / "a"
    assert data.data_root() == tmp_path / "b"
