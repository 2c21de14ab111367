import torch

from helpers.engine.order import epoch_order


def test_an_epochs_order_is_a_permutation_given_by_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(500, seed, epoch) for seed in (0, 1, 7) for epoch in (0, 1, 7)}
    for (seed, epoch), order in orders.items():
        assert sorted(order.tolist()) == list(range(500))
        assert torch.equal(order, epoch_order(500, seed, epoch))
    assert len({tuple(order.tolist()) for order in orders.values()}) == len(orders)


def test_an_epochs_order_leaves_torchs_own_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    epoch_order(500, 0, 0)
    assert torch.equal(torch.rand(3), expected)
