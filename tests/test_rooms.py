"""The house: which rooms there are, in which order they import each other, how large they are, and their tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ngrpo_lora"
TESTS = Path(__file__).parent

# From the ground up: a room imports from those before it and from itself. A new room has its place here.
ROOMS = [
    *(
        "errors",
        "ranks",
        "seeds",
        "moved",
        "guests",
        "registry",
        "types",
        "devices",
        "downloads",
        "console",
    ),  # words that all use
    "equations",  # the paper's equations, as functions of tensors
    "records",  # what a run leaves on disk
    "world",  # the embedded world: scenes, verifier, model
    "config",  # one checked RunConfig
    "reports",  # records as pictures, curves and tables
    "prompts",  # where prompts come from
    "models",  # one file a family: encode, velocity, decode
    "adapters",  # LoRA in memory and in files
    "voting",  # people teach a run their taste
    "rewards",  # one file a reward
    "algorithms",  # one file a training objective
    "scoring",  # calls rewards, and adds them up
    "sampling",  # prompt, seed and settings -> picture
    "training",  # Algorithm 1
    "evaluation",  # is it better?
    "hub",  # pushes a run
    "planning",  # foretells memory and time, and what is wrong before a run starts
    "bench",  # measures
    "cli",  # one file a group of commands
    "__main__",
]

MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60

# Modules without a test file of their own name, and where they are tested.
TESTED_IN = {
    "algorithms._dealing": "algorithms/test_dance.py",
    "algorithms._opening": "training/test_setup.py",
    "algorithms._steps": "models/test_experts.py",
    "algorithms._window": "algorithms/test_mix.py",
    "bench.gpu.results": "bench/gpu/test_running.py",
    "bench.paper.figures": "bench/paper/test_report.py",  # with the page that shows them
    "bench.paper.given": "bench/paper/test_search.py",
    "bench.paper.reached": "bench/paper/test_tables.py",
    "bench.paper.published": "bench/paper/test_methods.py",
    "cli.push": "hub/test_pushing.py",
    "cli.reward_server": "rewards/test_remote.py",
    "cli.voting": "voting/test_pairs.py",
    "config.algorithms._forward": "algorithms/test_forward.py",
    "config.algorithms._sde": "algorithms/test_dance.py",
    "config.algorithms._window": "algorithms/test_mix.py",
    "config.algorithms.best_of_n": "algorithms/test_best_of_n.py",
    "config.algorithms.branch": "algorithms/test_branch.py",
    "config.algorithms.dance": "algorithms/test_dance.py",
    "config.algorithms.flow_grpo": "algorithms/test_flow_grpo.py",
    "config.algorithms.mix": "algorithms/test_mix.py",
    "config.algorithms.mix_flash": "algorithms/test_mix_flash.py",
    "config.algorithms.neighbor": "algorithms/test_neighbor.py",
    "config.algorithms.nft": "algorithms/test_nft.py",
    "config.hub": "hub/test_pushing.py",
    "config.rewards.aesthetic": "rewards/test_clip_rewards.py",
    "config.rewards.clip_score": "rewards/test_clip_rewards.py",
    "config.rewards.clip_directional": "rewards/test_clip_rewards.py",
    "config.rewards.geneval": "rewards/test_geneval.py",
    "config.rewards.hpsv2": "rewards/test_clip_rewards.py",
    "config.rewards.hpsv3": "rewards/test_hpsv3.py",
    "config.rewards.imagereward": "rewards/test_imagereward.py",
    "config.rewards.pickscore": "rewards/test_clip_rewards.py",
    "config.rewards.vote": "rewards/test_vote.py",
    "config.model": "config/test_run.py",
    "config.section": "config/test_run.py",  # of sections: they cannot be changed
    "downloads": "adapters/test_finding.py",  # its messages, from a server that speaks the Hub's protocol
    "hub.watching": "hub/test_pushing.py",
    "models._attention": "models/test_base.py",
    "models._edits": "models/test_flux2_edit.py",  # and models/test_wan_first_frame.py
    "models._levels": "models/test_base.py",  # and in every test of a family
    "models._qwen_vl": "models/test_qwen_image_edit.py",
    "models._loading": "models/test_embeddings.py",  # the model in parts; whole ones in every test of a family
    "rewards._blip": "rewards/test_imagereward.py",
    "rewards._clip": "rewards/test_clip_rewards.py",
    "rewards._edits": "world/test_edit_verifier.py",
    "rewards._http": "rewards/test_remote.py",
    "rewards._openai": "rewards/test_judge.py",
    "rewards.aesthetic": "rewards/test_clip_rewards.py",
    "rewards.clip_directional": "rewards/test_clip_rewards.py",
    "rewards.clip_score": "rewards/test_clip_rewards.py",
    "rewards.hpsv2": "rewards/test_clip_rewards.py",
    "rewards.pickscore": "rewards/test_clip_rewards.py",
    "rewards.unifiedreward": "rewards/test_judge.py",
    "rewards.vqascore": "rewards/test_judge.py",
    "rewards.world_edit": "rewards/test_world.py",
    "rewards.world_edit_strict": "rewards/test_world.py",
    "rewards.world_manifold": "rewards/test_world.py",
    "rewards.world_strict": "rewards/test_world.py",
    "scoring.server": "rewards/test_remote.py",  # with its client
    "world._parts": "world/test_pretrain.py",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below `ngrpo_lora`."""
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }


def imports(path: Path) -> Iterator[str]:
    """Names below `ngrpo_lora` that a file imports anywhere: also within functions, and for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} must import absolutely"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.removeprefix("ngrpo_lora.") for name in found if name.startswith("ngrpo_lora."))


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_its_place():
    rooms = {room_of(name) for name in modules()} - {"__init__"}
    assert rooms == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize("module", modules())
def test_no_import_runs_from_a_lower_room_to_a_higher_one(module: str):
    if module == "__init__":
        return  # hands on names of many rooms when they are asked for
    floor = ROOMS.index(room_of(module))
    upwards = [name for name in imports(modules()[module]) if ROOMS.index(room_of(name)) > floor]
    assert not upwards, f"{module} imports {', '.join(upwards)} from above"


def test_no_modules_import_each_other_in_a_circle():
    """Where a name of a room is imported, and not a module, it is the room's own file that is imported."""
    known = modules()

    def module_of(name: str) -> str | None:
        parent = name.rpartition(".")[0]
        return next((m for m in (name, parent, f"{name}.__init__", f"{parent}.__init__") if m in known), None)

    graph = {name: {module_of(found) for found in imports(path)} - {None, name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("module", modules())
def test_modules_and_functions_fit_on_a_screen_or_two(module: str):
    text = modules()[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_every_room_says_what_it_is_for():
    for folder in (path.parent for path in PACKAGE.rglob("__init__.py")):
        charter = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert charter, folder
        assert charter.splitlines()[0].endswith("."), folder


@pytest.mark.parametrize("module", [name for name in modules() if not name.endswith(("__init__", "__main__"))])
def test_every_module_has_its_tests(module: str):
    *room, name = module.split(".")
    own = TESTS.joinpath(*room, f"test_{name.lstrip('_')}.py")
    elsewhere = TESTED_IN.get(module)
    assert own.is_file() != (elsewhere is not None), f"{own} is missing, or {module} needs no entry in TESTED_IN"
    assert elsewhere is None or (TESTS / elsewhere).is_file(), elsewhere
