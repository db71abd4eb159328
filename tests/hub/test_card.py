"""The card parsed back, as the Hub and a Markdown renderer read it: data, tables, links, and code that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from card_folders import FLUX, MISS, make_config, make_folder
from hub_server import HubServer, Repository
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import ModelConfig, RunConfig
from ngrpo_lora.evaluation.statistics import compare_scores
from ngrpo_lora.hub.card import LICENSES, base_license, cell, write_card
from ngrpo_lora.hub.usage import read_pushed
from ngrpo_lora.records.pictures import save_png

MARKDOWN = MarkdownIt("commonmark").enable("table")
PROMPTS = [
    MISS,
    "三つの星 ünïcödé \u2028 🟥 & co: # not a title",
    "- item: {a: 'b'}\n- !!python/object:x",
    "word " * 300,
]


def make_card(folder: Path, config: RunConfig, differences: list[Any], repo: str = "owner/my_lora") -> ModelCard:
    """Written, and read back from its text."""
    path = folder / "README.md"
    write_card(folder, repo, config, 300, differences, base_license(config.model.path)).save(path)
    return ModelCard.load(path)


def tables(markdown: str) -> list[list[list[str]]]:
    """Cells as text, by a Markdown parser."""
    tokens = MARKDOWN.parse(markdown)
    found: list[list[list[str]]] = []
    for before, token in zip(tokens, tokens[1:], strict=False):
        if before.type == "table_open":
            found.append([])
        if before.type == "tr_open":
            found[-1].append([])
        if before.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in token.children or []))
    return found


@pytest.fixture
def differences() -> list[Any]:
    before, after = {"hpsv2": [0.2, 0.3, 0.25], "a|b": [0.0, 1.0, 0.5]}, {"hpsv2": [0.3, 0.4, 0.3], "a|b": [1.0] * 3}
    return compare_scores("run", after, "base", before, ["x", "y", "z"])


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No base model's own card can be had."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_the_data_are_what_the_hub_asks_for(tmp_path: Path, differences: list[Any]):
    config = make_config()
    data = make_card(make_folder(tmp_path, config, ["a red star"]), config, differences).data.to_dict()
    ((model,), (task,)) = data["model-index"], data.pop("model-index")[0]["results"]
    assert model["name"] == "my_lora"
    assert task["task"] == {"type": "text-to-image"}
    assert task["dataset"] == {"name": "world:held_out", "type": "prompts"}
    assert task["metrics"][0] == {"type": "hpsv2", "value": 0.3333, "name": "hpsv2, 0.25 before training"}
    assert data == {
        "base_model": FLUX,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": f"https://huggingface.co/{FLUX}/blob/main/LICENSE.md",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "template:sd-lora", "neighbor-grpo", "flux"],
        "widget": [{"text": "a red star", "output": {"url": "samples/last/0.png"}}],
    }


def test_prompts_of_any_kind_break_neither_the_data_nor_the_tables(tmp_path: Path, differences: list[Any]):
    config = make_config()
    card = make_card(make_folder(tmp_path, config, PROMPTS), config, differences)
    assert [entry["text"] for entry in card.data.to_dict()["widget"]] == PROMPTS
    assert card.data.to_dict()["license"] == "other"
    gained, shown, settings = tables(card.text)
    assert [len(row) for row in gained] == [6] * 3
    assert [row[0] for row in gained] == ["reward", "hpsv2", "a|b"]
    assert [len(row) for row in shown] == [4] * 5
    for row, prompt in zip(shown[1:], PROMPTS, strict=True):
        line = " ".join(prompt.split())
        assert row[0] == (line if len(line) <= 200 else line[:199] + "…")
    assert {len(row) for row in settings} == {2}
    titles = [line for line in card.text.splitlines() if line.startswith("#")]
    sections = ["What it gained", "Use it", "How it was trained", "Limitations", "Citation"]
    assert titles == ["# my\\_lora", *(f"## {title}" for title in sections)]


@pytest.mark.parametrize(
    "text", ["|", "\\|", "\\", "a\\", "`|`", "``", "<!-- x -->", "&amp;", "**a**", "![a](b)", "$$x$$"]
)
def test_a_cell_means_itself(text: str):
    row = tables(f"| a | b |\n|---|---|\n| {cell(text)} | c |")[0][1]
    assert row == [text, "c"]


def test_the_figures_are_those_of_the_comparison(tmp_path: Path, differences: list[Any]):
    config = make_config()
    card = make_card(make_folder(tmp_path, config, PROMPTS), config, differences)
    row = tables(card.text)[0][1]
    assert row == ["hpsv2", "0.250", "0.333", differences[0].difference.show("+.3f"), "100% [44%, 100%]", "3"]
    assert row[3] == "+0.083 [+0.012, +0.155]"
    settings = dict(tables(card.text)[2][1:])
    assert settings["rewards"] == "hpsv2 + pickscore"
    assert settings["images seen"] == str(300 * config.rollout.prompts_per_iteration * config.rollout.group_size)
    assert settings["size"] == "704 x 720 px"


def test_every_link_into_the_repository_has_its_file(tmp_path: Path, differences: list[Any]):
    config = make_config()
    card = make_card(make_folder(tmp_path, config, PROMPTS), config, differences)
    tokens = [child for token in MARKDOWN.parse(card.text) for child in token.children or []]
    links = {str(token.attrs.get("href") or token.attrs.get("src") or "://") for token in tokens}
    links |= {entry["output"]["url"] for entry in card.data.to_dict()["widget"]}
    local = {link for link in links if "://" not in link}
    assert {"summary.png", "evaluation.csv", "config.yaml", "samples/first/0.png", "samples/last/3.png"} <= local
    assert all((tmp_path / link).is_file() for link in local)
    assert "TODO" not in card.content


def test_what_is_missing_is_left_out(tmp_path: Path):
    config = make_config(path="embedded")
    make_folder(tmp_path, config, [])
    (tmp_path / "summary.png").unlink()
    card = make_card(tmp_path, config, [])
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert not {"widget", "base_model", "base_model_relation", "license_name"} & data.keys()
    for word in ("What it gained", "<Gallery />", "samples/", "summary.png", "evaluation.csv", "ComfyUI", "figures"):
        assert word not in card.text
    assert "## Use it" in card.text


def test_a_picture_of_another_prompt_is_not_shown_as_before(tmp_path: Path, differences: list[Any]):
    config = make_config()
    make_folder(tmp_path, config, ["a", "b"])
    save_png(tmp_path / "samples/first/0.png", Image.new("RGB", (8, 8)), {"prompt": "of old", "seed": "1000"})
    card = make_card(tmp_path, config, differences)
    assert [row[0] for row in tables(card.text)[1]] == ["prompt", "b"]
    assert len(card.data.to_dict()["widget"]) == 2


def test_the_card_of_a_model_that_edits_says_what_to_edit(tmp_path: Path):
    config = make_config(path="black-forest-labs/FLUX.1-Kontext-dev")
    own = {"edits": True, "pipeline": "FluxKontextPipeline"}
    card = make_card(make_folder(tmp_path, config, ["a"], **own), config, [])
    assert card.data.to_dict()["pipeline_tag"] == "image-to-image"
    assert "ngrpo sample --adapter owner/my_lora --source picture.png --prompt 'a' --seed 1000" in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert "from PIL import Image\n" in code
    assert code.index('picture = Image.open("picture.png")') < code.index("pipeline('a', seeds=1000, image=picture)")
    plain = make_config()
    (tmp_path / "plain").mkdir()
    other = make_card(make_folder(tmp_path / "plain", plain, ["a"]), plain, [])
    assert "picture.png" not in other.text


@pytest.mark.parametrize("kind", ["Edit", "EditPlus"])
def test_the_card_of_a_qwen_image_edit_names_what_its_processor_needs(kind: str, tmp_path: Path):
    config = make_config(path="Qwen/Qwen-Image-Edit-2509")
    own = {"edits": True, "pipeline": f"QwenImage{kind}Pipeline"}
    card = make_card(make_folder(tmp_path, config, ["a"], "qwen_image", **own), config, [])
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert "LoRA, and torchvision for the processor of its base. By the command line" in card.text
    assert "custom_pipeline='owner/my_lora', trust_remote_code=True" in card.text
    (plain := tmp_path / "plain").mkdir()
    assert "torchvision" not in make_card(make_folder(plain, config, ["a"], "qwen_image"), config, []).text


def test_a_base_in_a_folder_is_named_without_its_place(tmp_path: Path):
    base = tmp_path / "secret" / "my-flux"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    config = make_config(path=str(base))
    card = make_card(make_folder(tmp_path, config, ["a"]), config, [])
    assert card.data.to_dict()["license"] == "mit"
    assert "base_model" not in card.data.to_dict()
    assert "secret" not in card.content
    assert "    'path/to/my-flux', custom_pipeline='owner/my_lora', trust_remote_code=True, dtype=torch.bf" in card.text


def test_a_relative_base_is_no_repository_wherever_it_is_pushed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models" / "flux-finetune").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = make_config(path="models/flux-finetune")
    folder = make_folder(tmp_path, config, ["a"])
    monkeypatch.chdir(tmp_path / "models")
    assert read_pushed(folder / FILE_NAME).hub_id is None
    assert "base_model" not in make_card(folder, config, []).data.to_dict()
    assert ModelConfig(path="models/other").path == "models/other"  # of the Hub


def test_every_preset_has_a_licence_for_its_base():
    from ngrpo_lora.config.presets import preset_files

    assert {preset.model for preset in preset_files()} == set(LICENSES)


def test_the_licence_is_the_base_s_own_where_it_can_be_read(monkeypatch: pytest.MonkeyPatch):
    constants = huggingface_hub.constants
    with HubServer() as hub:
        for name, card in {
            FLUX: "license: other\nlicense_name: new-license\nlicense_link: LICENSE",
            "a/linked": "license: other\nlicense_name: x\nlicense_link: https://example.org/x",
            "a/none": "tags: [x]",
            "a/broken": "license: [",
        }.items():
            files = {"README.md": f"---\n{card}\n---\n# x\n".encode()}
            hub.repositories[name] = Repository(branches={"main": files})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        own = {"license": "other", "license_name": "new-license"}
        assert base_license(FLUX) == own | {"license_link": f"https://huggingface.co/{FLUX}/blob/main/LICENSE"}
        assert base_license("a/linked")["license_link"] == "https://example.org/x"
        assert base_license("a/none") == base_license("a/broken") == base_license("a/gone") == {}
        assert base_license("Qwen/Qwen-Image") == {"license": "apache-2.0"}
