"""Prompt embeddings go into a file and come back to the bit; a pipeline's text encoders serve ComfyUI's own MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_client import Comfy, Graph, Refused
from graphs import PROMPT, drawing, latents_of, node, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from ngrpo_lora.sampling.conditioning import load_conditioning


def folder(comfy: Comfy) -> Path:
    return comfy.base / "models" / "ngrpo_embeddings"


def save(source: list[Any], name: str, overwrite: bool = False) -> dict[str, Any]:
    return node("NGRPO_SavePromptEmbeddings", conditioning=source, name=name, overwrite=overwrite)


def drawn_with(comfy: Comfy, conditioning: list[Any], **nodes: Any) -> Tensor:
    graph: Graph = drawing(seed=7) | nodes
    graph["guider"]["inputs"]["conditioning"] = conditioning
    return latents_of(comfy, comfy.run(graph))


def pipeline(model: str, dtype: str = "auto") -> dict[str, Any]:
    widgets = {"dtype": dtype, "quantization": "none", "text_encoders": "keep", "swap_blocks": 0, "vae_tiling": False}
    return node("NGRPO_LoadPipeline", model=model, **widgets)


def encoding() -> Graph:
    """Only the text encoder."""
    return {name: one for name, one in drawing().items() if name in ("model", "text")}


def refused(comfy: Comfy, graph: Graph) -> str:
    with pytest.raises(Refused) as refusal:
        comfy.run(graph)
    assert refusal.value.status == 400
    return refusal.value.reasons


def test_a_saved_prompt_draws_the_same_latents_to_the_bit(comfy: Comfy):
    expected = drawn_with(comfy, ["text", 0])
    assert comfy.run(drawing() | {"store": save(["text", 0], "a star")}).status == "success"
    listed = comfy.get("/object_info/NGRPO_LoadPromptEmbeddings")["NGRPO_LoadPromptEmbeddings"]["input"]["required"]
    assert "a star.safetensors" in str(listed["name"])
    loaded = drawn_with(comfy, ["stored", 0], stored=node("NGRPO_LoadPromptEmbeddings", name="a star.safetensors"))
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_other_values_of_conditioning_are_kept(comfy: Comfy):
    graph = drawing() | {
        "guided": node("FluxGuidance", conditioning=["text", 0], guidance=2.75),
        "placed": node(
            "ConditioningSetAreaPercentage",
            conditioning=["guided", 0],
            width=0.5,
            height=1.0,
            x=0.25,
            y=0.0,
            strength=0.3,
        ),
        "both": node("ConditioningCombine", conditioning_1=["placed", 0], conditioning_2=["text", 0]),
        "store": save(["both", 0], "area"),
        "stored": node("NGRPO_LoadPromptEmbeddings", name="area.safetensors"),
    }
    without_reader = {name: one for name, one in graph.items() if name != "stored"}
    assert comfy.run(without_reader).status == "success"
    again = {"stored": graph["stored"], "store": save(["stored", 0], "area again")}
    assert comfy.run(again).status == "success"
    first, second = (folder(comfy) / f"{name}.safetensors" for name in ("area", "area again"))
    assert first.read_bytes() == second.read_bytes()
    (_, placed), (_, plain) = load_conditioning(second)
    assert (placed["guidance"], placed["strength"]) == (2.75, 0.3)
    assert placed["area"] == ("percentage", 1.0, 0.5, 0.0, 0.25)
    assert [*plain] == ["pooled_output"]


def test_a_file_is_only_replaced_where_asked(comfy: Comfy):
    other = node("CLIPTextEncode", clip=["model", 1], text="two red squares")
    graph = drawing() | {"other": other, "store": save(["text", 0], "kept")}
    assert comfy.run(graph).status == "success"
    kept = load_file(folder(comfy) / "kept.safetensors")["0"]
    clash = comfy.run(graph | {"store": save(["other", 0], "kept")})
    assert (clash.status, clash.error_node) == ("error", "store")
    assert "'kept.safetensors' is there already, with other contents" in clash.error
    assert torch.equal(load_file(folder(comfy) / "kept.safetensors")["0"], kept)
    assert (
        comfy.run(graph | {"store": save(["text", 0], "kept.safetensors")}).status == "success"
    )  # equal: nothing lost
    assert comfy.run(graph | {"store": save(["other", 0], "kept", overwrite=True)}).status == "success"
    assert not torch.equal(load_file(folder(comfy) / "kept.safetensors")["0"], kept)


@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_a_file_that_is_gone_is_written_again_and_one_that_is_there_is_not(comfy: Comfy, what: str):
    graph = {name: one for name, one in drawing().items() if name in ("model", "text")}
    graph["store"] = save(["text", 0], what, overwrite=True)
    assert comfy.run(graph).status == "success"
    file = folder(comfy) / f"{what}.safetensors"
    content, written = file.read_bytes(), file.stat().st_mtime_ns
    assert comfy.run(graph).status == "success"
    assert file.stat().st_mtime_ns == written
    file.unlink()
    if what == "replaced":
        save_file({"0": torch.zeros(1)}, file)
    assert comfy.run(graph).status == "success"
    assert file.read_bytes() == content


def test_a_file_of_ones_own_script_is_taken(comfy: Comfy):
    comfy.run(drawing() | {"store": save(["text", 0], "plain")})
    stored = load_file(folder(comfy) / "plain.safetensors")
    own = {"prompt_embeds": stored["0"], "pooled_prompt_embeds": stored["0.pooled_output"]}
    save_file(own, folder(comfy) / "script.safetensors")
    loaded = drawn_with(comfy, ["stored", 0], stored=node("NGRPO_LoadPromptEmbeddings", name="script.safetensors"))
    torch.testing.assert_close(loaded, drawn_with(comfy, ["text", 0]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "C:\\x", "a\nb"])
def test_names_with_folders_are_refused(comfy: Comfy, name: str):
    assert "without a folder" in refused(comfy, encoding() | {"store": save(["text", 0], name)})


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "gone.safetensors"])
def test_files_elsewhere_are_refused(comfy: Comfy, name: str):
    graph = {"stored": node("NGRPO_LoadPromptEmbeddings", name=name), "store": save(["stored", 0], "x")}
    assert "name must be one of" in refused(comfy, graph)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [(None, "it cannot be read"), ({"weight": torch.zeros(2)}, "it holds weight (2,)")],
)
def test_a_file_of_another_kind_is_said(comfy: Comfy, tensors: dict[str, Tensor] | None, reason: str):
    path = folder(comfy) / "bad.safetensors"
    path.write_bytes(b"nothing") if tensors is None else save_file(tensors, path)
    graph = {"stored": node("NGRPO_LoadPromptEmbeddings", name=path.name), "store": save(["stored", 0], "bad too")}
    result = comfy.run(graph)
    assert (result.status, result.error_node) == ("error", "stored")
    assert reason in result.error


def test_a_pipelines_encoders_serve_comfyuis_own_model(comfy: Comfy):
    nodes = {
        "pipeline": pipeline("embedded"),
        "coded": node("NGRPO_EncodePrompt", pipeline=["pipeline", 0], prompt=PROMPT),
    }
    encoded = drawn_with(comfy, ["coded", 0], **nodes)
    torch.testing.assert_close(encoded, drawn_with(comfy, ["text", 0]), rtol=0, atol=0)


def test_it_lies_where_comfyuis_own_lies_in_its_number_type(comfy: Comfy):
    graph = {
        "pipeline": pipeline("embedded", dtype="bfloat16"),
        "coded": node("NGRPO_EncodePrompt", pipeline=["pipeline", 0], prompt=PROMPT),
        "name": node("PrimitiveString", value="of bfloat16"),
        "store": save(["coded", 0], "", True),
    }
    graph["store"]["inputs"]["name"] = ["name", 0]
    result = comfy.run(graph)
    assert result.status == "success", result.error
    ((states, others),) = load_conditioning(folder(comfy) / "of bfloat16.safetensors")
    assert {states.dtype, others["pooled_output"].dtype} == {torch.float32}


def test_other_families_give_what_comfyui_has_or_are_refused(comfy: Comfy):
    def encoded(model: str) -> Graph:
        coded = node("NGRPO_EncodePrompt", pipeline=["pipeline", 0], prompt=PROMPT)
        return {"pipeline": pipeline(model), "coded": coded, "store": save(["coded", 0], "of a pipeline", True)}

    assert comfy.run(encoded(tiny_model(comfy, "wan", second=False))).status == "success"
    starts = comfy.run(encoded("embedded-edit"))
    assert (starts.status, starts.error_node) == ("error", "coded")
    assert "a model that draws from text alone to give conditioning, got embedded-edit, which starts" in starts.error
    ((states, others),) = load_conditioning(folder(comfy) / "of a pipeline.safetensors")
    assert (tuple(states.shape), others) == ((1, 512, 16), {})  # as ComfyUI's UMT5: zeros after the prompt
    assert not states[:, 100:].any()
    refusal = comfy.run(encoded(tiny_model(comfy, "flux2_klein", distilled=True)))
    assert (refusal.status, refusal.error_node) == ("error", "coded")
    assert "got flux2_klein; draw it with Sample Pipeline" in refusal.error
