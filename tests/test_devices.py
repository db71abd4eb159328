"""Which device and number type a network gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.devices import lent, resolve_device, resolve_dtype, use_device, without_cudnn_attention
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._loading import load_family


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")],
)
def test_auto_is_bfloat16_where_the_cpu_has_instructions_for_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", "cpu") == expected
    assert load_family(ModelConfig(dtype="auto", device="cpu")).transformer.dtype == getattr(torch, expected)


def test_auto_is_float32_where_pytorch_cannot_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert resolve_dtype("auto", "cpu") == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_named_type_is_taken_at_its_word(dtype: str):
    assert resolve_dtype(dtype, "cpu") == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="needs a GPU that PyTorch can use"):
        resolve_device("cuda:1")


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_without_a_number_is_the_first(monkeypatch: pytest.MonkeyPatch, device: str, index: int):
    chosen: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    use_device(device)
    assert chosen == [index]
    use_device("cpu")
    assert chosen == [index]


class Tied(nn.Module):
    """Two layers that share a weight, one of them without a bias, and statistics that a pass renews."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)
        self.second.weight = self.first.weight
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x)))


def test_a_network_is_lent_as_copies_and_nothing_is_copied_back():
    network = Tied()
    before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in network.state_dict().items()}
    held = [*network.parameters(), *network.buffers()]
    with lent(network, "meta"):
        assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}
        assert network.second.weight is network.first.weight
        assert network(torch.ones(3, 2, device="meta")).device.type == "meta"
    assert all(now is then for now, then in zip([*network.parameters(), *network.buffers()], held, strict=True))
    for name, tensor in network.state_dict().items():
        assert tensor.data_ptr() == before[name][1]
        assert torch.equal(tensor, before[name][2])


def test_a_network_that_a_device_has_no_room_for_stays_whole(monkeypatch: pytest.MonkeyPatch):
    network = Tied()
    to, moved = Tensor.to, []

    def full(tensor: Tensor, device: str) -> Tensor:
        moved.append(tensor)
        if len(moved) > 2:
            raise torch.OutOfMemoryError
        return to(tensor, device)

    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError), lent(network, "meta"):
        pass
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}


@pytest.mark.gpu
def test_attention_of_flux_has_a_backward_pass_on_a_gpu():
    query = torch.randn(1, 24, 2025 + 512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with without_cudnn_attention():
        torch.nn.functional.scaled_dot_product_attention(query, query, query).square().mean().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
