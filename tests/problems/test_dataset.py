import pickle

import numpy as np
import pytest
import torch

from helpers import Dataset
from helpers.problems import DataError

X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


class Items(list):
    """A map-style dataset."""


# In memory


def test_arrays_become_tensors_of_the_promised_types():
    data = Dataset.of(X.numpy().astype(np.float64), Y.numpy().astype(np.int8), X[:5], Y[:5], name="mine", device="cpu")
    assert (data.train_inputs.dtype, data.train_targets.dtype) == (torch.float32, torch.int64)
    assert (data.num_train, data.num_test, data.size("test"), data.in_memory) == (12, 5, 5, True)
    assert (data.input_shape, data.num_classes) == ((3,), 3)
    assert data.description == "mine, 12 training and 5 test examples"


def test_a_batch_is_the_examples_asked_for_also_with_an_axis_of_replicas():
    data = Dataset.of(X, Y, X[:5], Y[:5], device="cpu")
    indices = torch.tensor([[3, 0], [11, 3]])
    inputs, targets = data.batch(indices)
    assert torch.equal(inputs, X[indices]) and torch.equal(targets, Y[indices])
    assert torch.equal(data.batch(torch.tensor([4]), "test")[0], X[4:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, Y[:11]), "x has 12 examples and its targets 11"),
        ((X[:0], Y[:0]), "x has 0 examples"),
        ((X, Y, X[:2]), "needs both x_test and y_test"),
        ((X, Y, X[:2], Y[:3]), "x_test has 2 examples and its targets 3"),
        ((torch.tensor(1.0), Y), "x is a single number"),
        ((torch.where(X[4, 1] == X, torch.nan, X), Y), "x has NaN or infinity in 1 of 12 examples: 4$"),
        ((X, torch.full((12,), torch.inf)), "y has NaN or infinity in 12 of 12 examples: 0, 1, 2, 3, 4…"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_line(arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        Dataset.of(*arguments)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_the_content_alone():
    first = Dataset.of(X, Y, name="a").fingerprint
    assert first == Dataset.of(X.clone().numpy(), Y, name="b").fingerprint
    others = [Dataset.of(X + 1, Y), Dataset.of(X, Y.flip(0)), Dataset.of(X, Y, X, Y), Dataset.of(X.view(12, 3, 1), Y)]
    assert len({first, *(other.fingerprint for other in others)}) == 5


def test_a_dataset_travels_with_its_content():
    data = Dataset.of(X, Y, name="mine", device="cpu")
    found = pickle.loads(pickle.dumps(data))
    assert torch.equal(found.train_inputs, X) and found.fingerprint == data.fingerprint and found.num_test == 0


# Map-style


def test_items_of_a_map_style_dataset_are_collated_as_dataloader_does():
    data = Dataset.of_map(Items(zip(X, Y)), Items(zip(X[:2], Y[:2])), device="cpu")
    inputs, targets = data.batch(torch.tensor([3, 0]))
    assert torch.equal(inputs, X[[3, 0]]) and torch.equal(targets, Y[[3, 0]])
    assert (data.in_memory, data.num_train, data.num_test) == (False, 12, 2)


def test_a_collate_fn_may_give_inputs_as_a_tuple_or_a_dict():
    items = Items(({"ids": torch.tensor([1, 2])}, 0) for _ in range(3))
    (inputs, targets) = Dataset.of_map(items, device="cpu").batch(torch.tensor([0, 1]))
    assert inputs["ids"].shape == (2, 2) and targets.tolist() == [0, 0]
    data = Dataset.of_map(items, collate_fn=lambda chosen: ((torch.ones(len(chosen)),) * 2, torch.zeros(len(chosen))))
    assert isinstance(data.batch(torch.tensor([0]))[0], tuple)


def test_items_that_differ_in_length_ask_for_a_collate_fn():
    items = Items((torch.ones(n), 0) for n in (2, 3))
    with pytest.raises(DataError, match=r"do not make a pair \(inputs, targets\): .*; give a collate_fn"):
        Dataset.of_map(items).batch(torch.tensor([0, 1]))


def test_an_empty_training_set_is_refused():
    with pytest.raises(DataError, match="the training set is empty"):
        Dataset.of_map(Items())


def test_an_item_that_is_not_finite_is_named_when_it_is_read():
    data = Dataset.of_map(Items([(torch.tensor([torch.nan]), 0), (torch.ones(1), 1)]), name="mine")
    data.batch(torch.tensor([1]))
    with pytest.raises(DataError, match="mine: NaN or infinity among the train examples 1, 0"):
        data.batch(torch.tensor([1, 0]))


def test_a_map_style_datasets_fingerprint_is_of_its_items_or_its_key():
    items = Items(zip(X, Y))
    first = Dataset.of_map(items).fingerprint
    assert first == Dataset.of_map(Items(zip(X, Y)), name="b").fingerprint
    assert first != Dataset.of_map(Items(zip(X + 1, Y))).fingerprint
    assert Dataset.of_map(items, key="v1").fingerprint == Dataset.of_map(Items(zip(X + 1, Y)), key="v1").fingerprint
    assert Dataset.of_map(items, key="v1").fingerprint != Dataset.of_map(items, key="v2").fingerprint


def test_items_that_change_from_read_to_read_need_a_key():
    class Augmented:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.rand(2), 0

    with pytest.raises(DataError, match=r"item 0 of data \(train\) changes from read to read; give of_map"):
        _ = Dataset.of_map(Augmented()).fingerprint
    assert Dataset.of_map(Augmented(), key="augmented").fingerprint


@pytest.mark.parametrize("make", [
    lambda: Dataset.of(X[:8], Y[:8], X[8:], Y[8:], device="cpu"),
    lambda: Dataset.of_map(Items(zip(X[:8], Y[:8])), Items(zip(X[8:], Y[8:])), device="cpu"),
])  # fmt: skip
@pytest.mark.parametrize(("split", "offset"), [("test", 8), ("train", 0)])
def test_selected_examples_are_those_asked_for(make, split, offset):
    data = make().select(torch.tensor([5, 2, 2]), torch.tensor([3, 0]), split)
    assert (data.num_train, data.num_test) == (3, 2)
    for indices, part in (([5, 2, 2], "train"), ([3 + offset, 0 + offset], "test")):
        inputs, targets = data.batch(torch.arange(len(indices)), part)
        assert torch.equal(inputs, X[indices]) and torch.equal(targets, Y[indices])
