"""ComfyUI's conditioning in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.sampling.conditioning import KEY, load_conditioning, save_conditioning

STATES = torch.randn(1, 4, 6).to(torch.bfloat16)


def test_everything_comes_back_as_it_was(tmp_path: Path):
    base = torch.randn(2, 8)
    others: dict[str, Any] = {
        "pooled_output": base[:1, ::2],  # shares memory with the next, and is not contiguous
        "again": base,
        "guidance": 0.1 + 0.2,
        "area": ("percentage", 0.5, (1, 2)),
        "reference_latents": [torch.zeros(1, 2), torch.ones(1, 3, dtype=torch.float16)],
        "nested": {"on": True, "nothing": None, "count": 3},
    }
    save_conditioning(tmp_path / "new" / "a.safetensors", [[STATES, others], [STATES + 1, {}]])
    (states, read), (second, empty) = load_conditioning(tmp_path / "new" / "a.safetensors")
    assert states.dtype == torch.bfloat16
    assert torch.equal(states, STATES)
    assert torch.equal(second, STATES + 1)
    assert empty == {}
    assert [*read] == [*others]
    for name, value in others.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(read[name], value)
        elif name == "reference_latents":
            assert [(one.dtype, one.tolist()) for one in read[name]] == [(one.dtype, one.tolist()) for one in value]
        else:
            assert (type(read[name]), read[name]) == (type(value), value)


def test_what_a_file_cannot_hold_is_named_and_nothing_is_written(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ConfigError, match="tensors and plain values to be saved, but control is a object; save before"):
        save_conditioning(path, [[STATES, {"control": object()}]])
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_conditioning(tmp_path / "file" / "a.safetensors", [[STATES, {}]])


def test_a_script_may_save_embeddings_alone(tmp_path: Path):
    tensors = {"prompt_embeds": STATES, "pooled_prompt_embeds": torch.ones(1, 3), "attention_mask": torch.ones(1, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    ((states, others),) = load_conditioning(tmp_path / "a.safetensors")
    assert torch.equal(states, STATES)
    assert {name: tuple(one.shape) for name, one in others.items()} == {
        "pooled_output": (1, 3),
        "attention_mask": (1, 4),
    }


@pytest.mark.parametrize(
    ("header", "tensors", "part"),
    [
        (None, {"prompt_embeds": torch.ones(4, 6)}, r"but it holds prompt_embeds \(4, 6\)"),
        (None, {}, "but it holds nothing"),
        ("[", {"0": STATES}, "its header is damaged"),
        (json.dumps([[{"tensor": "gone"}, {}]]), {"0": STATES}, "its header is damaged"),
        (json.dumps([[{"object": ["os.system"]}, {}]]), {"0": STATES}, "its header is damaged"),
        ("7", {"0": STATES}, "its header is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, header: str | None, tensors: dict[str, torch.Tensor], part: str):
    save_file(tensors, tmp_path / "a.safetensors", None if header is None else {KEY: header})
    with pytest.raises(ConfigError, match=part):
        load_conditioning(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="'b.safetensors' must be a file that .* but it cannot be read"):
        load_conditioning(tmp_path / "b.safetensors")
