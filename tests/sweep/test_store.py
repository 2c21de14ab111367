import json
import multiprocessing
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from helpers.sweep import store as store_module
from helpers.sweep.store import Store, key_of

CONTENT = {"model": "shen_mlp", "batch_size": 64.0, "betas": [0.9, 0.999], "num_train": None}
FRAME = pd.DataFrame({"epochs": [0.0, 1.0], "test_loss": [2.3, np.nan], "label": ["a", "b"], "steps": [0, 938]})
ARRAYS = {"2/weights/head.weight": np.arange(6, dtype=np.float32).reshape(1, 2, 3), "step": np.array([7])}


def entries(store):
    """Names of what lies in the store's folder, the lock apart."""
    return sorted(path.name for path in store.folder.iterdir() if path.name != ".lock")


def test_what_was_put_is_read_back(store_folder):
    store = Store()
    key = store.put(CONTENT, FRAME, ARRAYS, about={"torch": "2"})
    assert key == key_of(CONTENT)
    assert store.has(key)
    assert store.has(key, ARRAYS)
    pd.testing.assert_frame_equal(store.frame(key), FRAME, check_exact=True)
    for name, array in store.arrays(key).items():
        assert array.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(array, ARRAYS[name])
    assert set(store.arrays(key)) == set(ARRAYS)
    record = json.loads((store_folder / key / "entry.json").read_text())
    assert (record["content"], record["about"]) == (CONTENT, {"torch": "2"})


def test_an_entry_without_some_arrays_does_not_count_where_they_are_wanted():
    store = Store()
    key = store.put(CONTENT, FRAME)
    assert store.has(key)
    assert not store.has(key, ["2/weights/head.weight"])
    store.put(CONTENT, FRAME, ARRAYS)
    assert not store.has(key, ["2/weights/head.weight", "30/weights/head.weight"])


def test_what_is_not_there_is_absent():
    store = Store()
    assert not store.has("0" * 24)
    for read in (store.frame, store.arrays):
        with pytest.raises(KeyError, match="no entry 0000"):
            read("0" * 24)


def test_the_key_follows_the_content_and_not_its_order():
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert len({key_of(c) for c in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": None}, {"a": [1]})}) == 5
    assert len(key_of(CONTENT)) == 24


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_content_that_does_not_equal_itself_in_json_is_refused(bad):
    with pytest.raises(ValueError, match="JSON compliant"):
        Store().put({"lr": bad}, FRAME)


def test_a_content_that_json_cannot_hold_is_refused():
    with pytest.raises(TypeError):
        key_of({"model": object()})


def test_a_later_entry_replaces_an_earlier_one_of_its_content():
    store = Store()
    key = store.put(CONTENT, FRAME, ARRAYS)
    assert store.put(CONTENT, FRAME.assign(steps=5)) == key
    assert store.frame(key)["steps"].tolist() == [5, 5]
    assert not store.has(key, ARRAYS)
    assert entries(store) == [key]


def truncated(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def flipped(content):
    """One bit in the middle, of JSON in the first checksum."""
    middle = content.index(b'"arrays.npz": "') + 20 if content.startswith(b"{") else len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def edited(content):
    return content.replace(b"64.0", b"65.0")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, d) for file in ("frame.parquet", "arrays.npz", "entry.json") for d in (truncated, emptied, flipped)),
        ("entry.json", edited),
        ("frame.parquet", None),
        ("arrays.npz", None),
        ("entry.json", None),
    ],
)
def test_a_damaged_entry_is_set_aside_and_can_be_put_again(store_folder, file, damage):
    store = Store()
    key = store.put(CONTENT, FRAME, ARRAYS)
    victim = store_folder / key / file
    if damage is None:
        victim.unlink()
    else:
        before = victim.read_bytes()
        victim.write_bytes(damage(before))
        assert victim.read_bytes() != before
    with pytest.warns(UserWarning, match=f"damaged result set aside in .*{key}"):
        assert not store.has(key)
    with pytest.raises(KeyError):
        store.frame(key)
    assert [path.name.split("-")[0] for path in (store_folder / "damaged").iterdir()] == [key]
    store.put(CONTENT, FRAME, ARRAYS)
    pd.testing.assert_frame_equal(store.frame(key), FRAME)
    assert entries(store) == sorted([key, "damaged"])


@pytest.mark.parametrize("read", ["frame", "arrays"])
def test_reading_a_damaged_entry_raises_instead_of_giving_wrong_figures(store_folder, read):
    store = Store()
    key = store.put(CONTENT, FRAME, ARRAYS)
    victim = store_folder / key / {"frame": "frame.parquet", "arrays": "arrays.npz"}[read]
    victim.write_bytes(flipped(victim.read_bytes()))
    with pytest.warns(UserWarning, match="damaged result"), pytest.raises(KeyError):
        getattr(store, read)(key)


def test_a_writer_that_fails_midway_leaves_nothing(monkeypatch):
    store = Store()

    def disk_full(self, path, **options):
        path.write_bytes(b"PAR1")
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", disk_full)
    with pytest.raises(OSError, match="no space left"):
        store.put(CONTENT, FRAME, ARRAYS)
    assert entries(store) == []
    assert not store.has(key_of(CONTENT))


def test_a_writer_that_fails_midway_leaves_the_older_entry(monkeypatch):
    store = Store()
    key = store.put(CONTENT, FRAME, ARRAYS)
    monkeypatch.setattr(np, "savez", lambda *args, **arrays: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.put(CONTENT, FRAME.assign(steps=5), ARRAYS)
    assert entries(store) == [key]
    pd.testing.assert_frame_equal(store.frame(key), FRAME)


def test_the_store_lies_where_asked_else_in_companion_store(store_folder, tmp_path):
    assert Store().folder == store_folder
    assert Store(tmp_path / "other").folder == tmp_path / "other"
    key = Store().put(CONTENT, FRAME)
    assert (store_folder / key).is_dir()
    assert not Store(tmp_path / "other").has(key)


def write_many(folder, worker):
    store = Store(folder)
    for i in range(8):
        store.put({"shared": i % 2}, FRAME.assign(worker=worker, i=i), {"x": np.full(1000, worker)})
        store.put({"worker": worker, "i": i}, FRAME.assign(worker=worker, i=i))


@pytest.mark.slow
def test_processes_may_write_at_once(store_folder):
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write_many, [store_folder] * 4, range(4)))
    store = Store()
    keys = [key_of({"worker": worker, "i": i}) for worker in range(4) for i in range(8)]
    for key, (worker, i) in zip(keys, np.ndindex(4, 8)):
        pd.testing.assert_frame_equal(store.frame(key), FRAME.assign(worker=worker, i=i))
    shared = [key_of({"shared": i}) for i in range(2)]
    for key in shared:
        assert set(store.arrays(key)["x"]) == set(store.frame(key)["worker"])
    assert entries(store) == sorted([*keys, *shared])


def test_a_writer_waits_for_another_one(store_folder):
    store = Store()
    key = store.put(CONTENT, FRAME)
    writer = threading.Thread(target=store.put, args=(CONTENT, FRAME.assign(steps=5)))
    with FileLock(store_folder / ".lock"):
        writer.start()
        writer.join(0.5)
        assert writer.is_alive()
        assert store.frame(key)["steps"].tolist() == FRAME["steps"].tolist()
    writer.join()
    assert store.frame(key)["steps"].tolist() == [5, 5]


def test_a_reader_does_not_set_aside_the_entry_that_replaces_the_one_it_reads(monkeypatch):
    store, real, calls = Store(), store_module._sha256, []
    key = store.put(CONTENT, FRAME)

    def replaced_meanwhile(file):
        calls.append(file)
        if len(calls) == 1:  # after the reader has read the old record, before it reads the frame
            store.put(CONTENT, FRAME.assign(steps=5))
        return real(file)

    monkeypatch.setattr(store_module, "_sha256", replaced_meanwhile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.has(key)
        assert store.frame(key)["steps"].tolist() == [5, 5]
    assert entries(store) == [key]


def test_pickled_arrays_are_not_loaded(store_folder):
    store = Store()
    key = store.put(CONTENT, FRAME, ARRAYS)
    file, record = store_folder / key / "arrays.npz", store_folder / key / "entry.json"
    before = store_module._sha256(file)
    np.savez(file, **dict.fromkeys(ARRAYS, np.array([{"any": "object"}], dtype=object)))
    record.write_text(record.read_text().replace(before, store_module._sha256(file)))
    with pytest.raises(ValueError, match="allow_pickle"):
        store.arrays(key)


def test_arrays_that_would_have_to_be_pickled_are_refused():
    store = Store()
    with pytest.raises((TypeError, ValueError)):
        store.put(CONTENT, FRAME, {"x": np.array([{"any": "object"}], dtype=object)})
    assert not store.has(key_of(CONTENT))
