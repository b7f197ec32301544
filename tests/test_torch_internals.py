"""What torch does not promise, one by one: a release that lost something fails here by name."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from gn_practical.layers import torch_internals as internals


def test_version_counts_writes_in_place():
    x = torch.zeros(3)
    before = internals.version(x)
    x.add_(1)
    assert internals.version(x) == before + 1, "Tensor._version"


def test_a_storage_is_known_by_all_its_views_and_its_key_stays_taken():
    x = torch.zeros(4, 4)
    key, reserved = internals.storage_key(x), internals.reserve_storage(x)
    assert internals.storage_key(x[1:].t()) == key, "UntypedStorage._cdata"
    assert not reserved.expired(), "StorageWeakRef"
    del x
    assert reserved.expired(), "StorageWeakRef keeps the memory"
    others = [torch.zeros(4, 4) for _ in range(100)]
    assert key not in map(internals.storage_key, others), "StorageWeakRef frees the key"


def test_transforms_are_seen():
    assert not internals.transforms_active()
    seen = []
    torch.func.vmap(lambda t: seen.append(internals.transforms_active()) or t)(torch.zeros(2))
    assert seen == [True], "torch._C._are_functorch_transforms_active"


def test_what_sees_operators_is_seen():
    x = torch.zeros(2)
    assert internals.is_plain(x)
    assert internals.is_plain(nn.Parameter(x))
    with FakeTensorMode() as mode:
        assert not internals.is_plain(x), "torch._C._len_torch_dispatch_stack"
    assert not internals.is_plain(mode.from_tensor(x))
    seen = []
    torch.func.vmap(lambda t: seen.append(internals.is_plain(t)) or t)(x)
    assert seen == [False]


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_are_seen(register):
    module = nn.ReLU()
    assert not internals.has_hooks(module)
    handle = getattr(module, register)(lambda *args: None)
    assert internals.has_hooks(module), f"Module's dict of {register}"
    handle.remove()
    assert not internals.has_hooks(module)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_convolution_with_another_weight(mode):
    conv, x = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(internals.convolve(conv, x, conv.weight), conv(x))


def test_backward_operators():
    x, dy = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = nn.functional.batch_norm(x, mean, var, weight, eps=0.0)
    wanted = torch.autograd.grad(y, [weight], dy)[0]
    _, result, _ = internals.batch_norm_backward(
        dy, x, weight, mean, var, None, None, False, 0.0, [False, True, True]
    )
    torch.testing.assert_close(result, wanted)
    flat = x.detach().flatten(1).requires_grad_()
    (wanted,) = torch.autograd.grad(
        nn.functional.layer_norm(flat, flat.shape[1:]), flat, dy.flatten(1)
    )
    var, mean = torch.var_mean(flat.detach(), 1, correction=0, keepdim=True)
    result, _, _ = internals.layer_norm_backward(
        dy.flatten(1), flat, flat.shape[1:], mean, (var + 1e-5).rsqrt(), None, None,
        [True, False, False],
    )  # fmt: skip
    torch.testing.assert_close(result, wanted)
