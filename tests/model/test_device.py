import pytest
import torch

from exflow.errors import InputError
from exflow.model.device import choose_device


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("available", [False, True])
def test_cuda_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device(None) == torch.device("cuda" if available else "cpu")
    if available:
        assert choose_device("cuda") == torch.device("cuda")
    else:
        with pytest.raises(InputError) as error:
            choose_device("cuda")
        assert str(error.value) == (
            "device cuda: torch sees no CUDA GPU; give cpu, or install a CUDA build of torch"
        )


def test_another_name_is_refused() -> None:
    with pytest.raises(InputError) as error:
        choose_device("tpu")
    assert str(error.value) == "device 'tpu' is unknown; give cpu or cuda"
