"""Makes `pipeline.py` for a repository of the Hub, its own custom pipeline in one file, from `pipelines/`.

diffusers takes `custom_pipeline="owner/name"` from a repository's `pipeline.py`. One file is all that a user has to
read before running it, and it imports nothing of ours.
"""

from __future__ import annotations

import ast
from pathlib import Path

from ngrpo_lora.adapters.header import code_version

__all__ = ["PIPELINE", "SCHEDULER", "SCHEDULER_CLASS", "has_pipeline", "pipeline_file", "scheduler_file", "sources"]

PIPELINE, SCHEDULER, SCHEDULER_CLASS = "pipeline.py", "scheduling_flow_dpm.py", "FlowDPMSolverMultistepScheduler"
FILES = {
    "Flux2KleinPipeline": "flux2_klein",
    "Flux2Pipeline": "flux2",
    "FluxKontextPipeline": "flux_kontext",
    "QwenImageEditPipeline": "qwen_image_edit",
    "QwenImageEditPlusPipeline": "qwen_image_edit_plus",
}
"""By a stock pipeline the file in `pipelines/`; those of all others bear the family's name."""


def sources() -> Path:
    """The folder `pipelines/` of the repository, or its copy in the wheel."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "pipelines", package.parent / "pipelines") if folder.is_dir())


def scheduler_file() -> str:
    """The exact scheduler's source, for families that have no pipeline here."""
    return (sources() / SCHEDULER).read_text(encoding="utf-8")


def has_pipeline(name: str) -> bool:
    """Whether `pipelines/` has a file of this name, which is the family's, or one of `FILES`; else the scheduler."""
    return (sources() / f"{name}.py").is_file()


def pipeline_file(name: str) -> str:
    """The source of a pipeline of `pipelines/` with all files beside it which it imports.

    Modules follow each other, those that are imported first; their names must differ, which a test makes sure of.
    """
    plain: set[str] = set()
    named: dict[str, set[str]] = {}  # by the module that they are imported from
    parts = []
    modules = _modules(name)
    for name, source in modules.items():
        module, lines = ast.parse(source), source.splitlines()
        for node in module.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or 0) - node.lineno + 1)
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module != "__future__":
                named.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
        about = "\n".join(f"# {line}".rstrip() for line in (ast.get_docstring(module) or "").splitlines())
        code = "\n".join(lines[module.body[0].end_lineno :]).strip()
        parts.append(f"# {'-' * 117}\n# {name}.py\n#\n{about}\n\n\n{code}\n")
    files = ", ".join(f"{name}.py" for name in modules)
    head = f'"""{files} in one file, from pipelines/ of ngrpo-lora {code_version()}."""'
    imports = [*sorted(plain), *(f"from {name} import {', '.join(sorted(of))}" for name, of in sorted(named.items()))]
    return f"{head}\n\nfrom __future__ import annotations\n\n" + "\n".join(imports) + "\n\n" + "\n\n".join(parts)


def _modules(name: str) -> dict[str, str]:
    """Sources by module: those that a module imports from beside it, then itself."""
    source = (sources() / f"{name}.py").read_text(encoding="utf-8")
    imported = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom) and node.level]
    return {key: text for node in imported for key, text in _modules(str(node.module)).items()} | {name: source}
