"""The code on a card: it calls what is there, and loads what the run was made of."""

from __future__ import annotations

import ast
import inspect
import runpy
from pathlib import Path

import diffusers
import pytest
import torch
from card_folders import MISS, make_config, make_folder
from PIL import Image
from PIL.ExifTags import Base

from ngrpo_lora import registry
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.hub.card import write_card
from ngrpo_lora.hub.pipeline_file import has_pipeline
from ngrpo_lora.hub.usage import OWN_SIZE, VIDEOS, diffusers_usage, read_pushed
from ngrpo_lora.models._index import pipeline_classes
from ngrpo_lora.prompts.pictures import SourcePicture


@pytest.mark.parametrize("family", registry.names(registry.MODELS))
def test_the_snippet_calls_each_family_s_pipeline_by_names_that_it_has(family: str, tmp_path: Path):
    frames = ["model.num_frames=17"] if family in VIDEOS else []
    config = make_config("model.negative_prompt=blurry", *frames)
    adapter = read_pushed(make_folder(tmp_path, config, [], family) / "pytorch_lora_weights.safetensors")
    text = diffusers_usage("owner/name", None, adapter, MISS, 7)
    code = ast.parse(text)
    (call,) = [n for n in ast.walk(code) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "pipeline"]
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg and k.arg != "generator"}
    if has_pipeline(family):  # which reads the rest from the adapter
        assert given == {"seeds": 7}
        assert ast.literal_eval(call.args[0]) == MISS
        return
    kind = getattr(diffusers, pipeline_classes(family)[0])
    assert given.keys() <= inspect.signature(kind.__call__).parameters.keys()
    assert (given["prompt"], given["height"], given["width"]) == (MISS, 720, 704)
    assert given["num_inference_steps"] == config.rollout.num_steps
    if family == "hunyuan_video15":  # whose guider has the scale
        assert "\npipeline.guider = pipeline.guider.new(guidance_scale=3.5)\n" in text
    else:
        assert given["guidance_scale"] == 3.5
    assert given.get("negative_prompt") == "blurry"
    assert (family in VIDEOS) == ("num_frames" in given)


def test_an_adapter_on_a_branch_is_used_from_there(tmp_path: Path):
    config = make_config()
    folder = make_folder(tmp_path, config, ["a"])
    text = write_card(folder, "owner/name", config, 300, [], {}, "v1").text
    for part in (
        "custom_pipeline='owner/name', custom_revision='v1'",
        "load_lora_weights('owner/name', revision='v1')",
        "hf download owner/name pytorch_lora_weights.safetensors --revision v1 --local-dir .",
        "hf download owner/name config.yaml --revision v1 --local-dir .",
    ):
        assert part in text
    assert "revision" not in write_card(folder, "owner/name", config, 300, [], {}).text


@pytest.mark.parametrize("family", ["flux", "wan"])  # with a pipeline of ours, and without
def test_what_the_base_had_taken_in_is_fused_before_the_adapter_is_loaded(family: str, tmp_path: Path):
    config = make_config("model.fuse={owner/few/steps.safetensors: 0.75}")
    folder = make_folder(tmp_path, config, ["a"], family)
    lines = diffusers_usage("owner/name", None, read_pushed(folder / FILE_NAME), "a", 7).splitlines()
    start = lines.index("pipeline.load_lora_weights('owner/few', weight_name='steps.safetensors')")
    assert lines[start + 1].startswith("pipeline.fuse_lora(lora_scale=0.75)")
    assert lines[start + 2 : start + 4] == [
        "pipeline.unload_lora_weights()",
        "pipeline.load_lora_weights('owner/name')",
    ]
    text = write_card(folder, "owner/name", config, 300, [], {}).text
    assert "owner/few/steps.safetensors at 0.75" in text
    assert "LoraLoaderModelOnly at strength 1.0, `owner/few/steps.safetensors` before it at 0.75, and" in text


@pytest.mark.parametrize("family", registry.names(registry.MODELS))
def test_comfyui_is_given_a_file_whose_names_it_knows(family: str, tmp_path: Path):
    config = make_config()
    text = write_card(make_folder(tmp_path, config, ["a"], family), "owner/name", config, 300, [], {}).text
    _, said, comfyui = text.partition("**ComfyUI**: ")
    assert bool(said) == (family != "sana")  # which ComfyUI does not have
    assert comfyui.startswith("`ngrpo export owner/name --format comfyui` writes it") == (family in VIDEOS)


def test_a_pipeline_without_a_loader_has_files_loaded_by_its_transformer(tmp_path: Path):
    config = make_config("model.fuse={owner/few/steps.safetensors: 0.75}")
    adapter = read_pushed(make_folder(tmp_path, config, ["a"], "hunyuan_video15") / FILE_NAME)
    lines = diffusers_usage("owner/name", "v1", adapter, "a", 7).splitlines()
    few = "'owner/few', weight_name='steps.safetensors', use_safetensors=True"
    start = lines.index(f"pipeline.transformer.load_lora_adapter({few})")
    assert lines[start + 1].startswith("pipeline.transformer.fuse_lora(lora_scale=0.75)")
    own = f"'owner/name', revision='v1', weight_name='{FILE_NAME}'"
    assert lines[start + 2 : start + 4] == [
        "pipeline.transformer.unload_lora()",
        f"pipeline.transformer.load_lora_adapter({own})",
    ]
    assert lines[-1] == 'export_to_video(video, "video.mp4", fps=24)'


def test_the_packages_own_lora_is_imported_by_the_code_and_named_by_the_card(tmp_path: Path):
    config = make_config("model.fuse=embedded-turbo")
    folder = make_folder(tmp_path, config, ["a"], "flux")
    code = diffusers_usage("owner/name", None, read_pushed(folder / FILE_NAME), "a", 7)
    assert "from ngrpo_lora.world import ADAPTERS\n" in code
    assert "pipeline.load_lora_weights(ADAPTERS['embedded-turbo'])\npipeline.fuse_lora(lora_scale=1)" in code
    assert "embedded-turbo at 1" in write_card(folder, "owner/name", config, 300, [], {}).text


def test_a_file_that_the_base_had_taken_in_is_named_without_its_place(tmp_path: Path):
    path = tmp_path / "secret" / "steps.safetensors"
    path.parent.mkdir()
    path.touch()
    config = make_config(f"model.fuse={path}")
    text = write_card(make_folder(tmp_path, config, ["a"]), "owner/name", config, 300, [], {}).text
    assert "path/to/steps.safetensors at 1" in text
    assert "secret" not in text


@pytest.mark.parametrize(("expert", "into"), [("high_noise", ""), ("low_noise", ", load_into_transformer_2=True")])
def test_an_adapter_of_one_of_two_transformers_is_loaded_into_that_one(expert: str, into: str, tmp_path: Path):
    settings = [f"model.expert={expert}", "model.guidance_scale_2=2.5", "model.num_frames=17"]
    fuse = "model.fuse={owner/fast/high_noise.safetensors: 0.5, owner/fast/low_noise.safetensors: 0.75}"
    config = make_config(*settings, fuse)
    adapter = read_pushed(make_folder(tmp_path, config, ["a"], "wan") / FILE_NAME)
    code = diffusers_usage("owner/name", None, adapter, "a", 7)
    ast.parse(code)
    lines = code.splitlines()
    assert f"pipeline.load_lora_weights('owner/name'{into})" in lines
    assert "    guidance_scale_2=2.5," in lines
    first = lines.index("pipeline.load_lora_weights('owner/fast', weight_name='high_noise.safetensors')")
    assert lines[first + 1].startswith("pipeline.fuse_lora(lora_scale=0.5)")
    low = "weight_name='low_noise.safetensors', load_into_transformer_2=True)"
    assert lines[first + 3] == f"pipeline.load_lora_weights('owner/fast', {low}"
    assert lines[first + 4].startswith("pipeline.fuse_lora(['transformer_2'], lora_scale=0.75)")
    text = write_card(tmp_path, "owner/name", config, 300, [], {}).text
    assert "trained transformer | " + expert.replace("_", r"\_") in text
    assert "(high noise) and 2.5 (low noise)" in text


@pytest.mark.parametrize(("expert", "whole"), [("null", ', "image_encoder": torch.float32'), ("high_noise", "")])
def test_a_video_starts_from_a_picture_of_its_size(expert: str, whole: str, tmp_path: Path):
    own = {"edits": True, "pipeline": "WanImageToVideoPipeline"}
    scales = ["model.guidance_scale_2=2.5"] * (expert != "null")
    config = make_config("model.num_frames=17", f"model.expert={expert}", *scales, path="owner/base")
    folder = make_folder(tmp_path, config, ["a"], "wan", **own)
    code = diffusers_usage("owner/name", None, read_pushed(folder / FILE_NAME), "a", 7)
    lines = code.splitlines()
    assert "from PIL import Image, ImageOps" in lines
    start = lines.index("picture = ImageOps.fit(picture, (704, 720), Image.Resampling.LANCZOS)")
    assert lines[start + 1 : start + 3] == ["video = pipeline(", "    image=picture,"]
    types = f'{{"default": torch.bfloat16, "vae": torch.float32{whole}}}'
    assert f"pipeline = DiffusionPipeline.from_pretrained('owner/base', dtype={types}).to(\"cuda\")" in lines
    (call,) = [
        n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "pipeline"
    ]
    known = inspect.signature(diffusers.WanImageToVideoPipeline.__call__).parameters
    assert {k.arg for k in call.keywords} <= known.keys()
    card = write_card(folder, "owner/name", config, 300, [], {})
    assert card.data.to_dict()["pipeline_tag"] == "image-to-video"
    assert "--source picture.png --height 720 --width 704 --prompt 'a'" in card.text
    assert "and ftfy, without which this pipeline of diffusers fails" in card.text


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_a_video_starts_from_the_picture_that_people_see(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a photograph that lies on its side, and of what is transparent, as `ngrpo sample --source` reads them."""
    own = {"edits": True, "pipeline": "WanImageToVideoPipeline"}
    config = make_config("model.num_frames=17", path="owner/base")
    code = diffusers_usage(
        "o/n", None, read_pushed(make_folder(tmp_path, config, ["a"], "wan", **own) / FILE_NAME), "", 7
    )
    pixels = torch.randint(0, 256, (40, 60, 4), dtype=torch.uint8).numpy()
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    Image.fromarray(pixels, "RGBA").convert(mode).save(tmp_path / "picture.png", exif=exif)
    monkeypatch.chdir(tmp_path)
    of_the_picture = [line for line in code.splitlines() if line.startswith(("from PIL", "picture ="))]
    (tmp_path / "snippet.py").write_text("\n".join(of_the_picture), encoding="utf-8")
    found = runpy.run_path(str(tmp_path / "snippet.py"))
    expected = SourcePicture(tmp_path / "picture.png", "picture.png", "here").fitted(704, 720)
    assert found["picture"].mode == "RGB"
    assert found["picture"].tobytes() == expected.tobytes()


def test_a_video_of_hunyuan_video_is_of_the_size_of_its_picture(tmp_path: Path):
    own = {"edits": True, "pipeline": "HunyuanVideo15ImageToVideoPipeline"}
    config = make_config("model.num_frames=17", path="owner/base")
    folder = make_folder(tmp_path, config, ["a"], "hunyuan_video15", **own)
    code = diffusers_usage("owner/name", None, read_pushed(folder / FILE_NAME), "a", 7)
    assert "picture = ImageOps.fit(picture, (704, 720), Image.Resampling.LANCZOS)" in code.splitlines()
    assert f"\n{OWN_SIZE} = lambda height, width, target_size: (height, width)\n" in code
    (call,) = [
        n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "pipeline"
    ]
    known = inspect.signature(diffusers.HunyuanVideo15ImageToVideoPipeline.__call__).parameters
    assert {"image", "prompt", "num_frames", "num_inference_steps"} < {k.arg for k in call.keywords} <= known.keys()
    card = write_card(folder, "owner/name", config, 300, [], {})
    assert card.data.to_dict()["pipeline_tag"] == "image-to-video"
    assert "ftfy" not in card.text
