"""Rewards in the graph, as nodes that choose them.

A graph may come from a stranger. So it names no code but that of files in models/ngrpo_rewards, no file out of
ComfyUI's folders, and no secret: a server's key is taken from an environment variable that is named for the server.
"""

from __future__ import annotations

import ast
import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig, parse_reward_entries, parse_settings
from ngrpo_lora.config.rewards.vote import Config as VoteConfig
from ngrpo_lora.errors import ConfigError, first_line
from ngrpo_lora.rewards.judge import TEMPLATE
from ngrpo_lora.scoring.scorer import Scorer

from ._api import Node, check_given, check_path, checked, listed, register_folder, schema

FUNCTIONS = "ngrpo_rewards"
"""Folder of models/ whose Python files hold the user's own rewards."""

NO_FUNCTION = f"(no file in models/{FUNCTIONS})"
SERVERS = ["judge", "unifiedreward", "vqascore"]
SECRETS = {"api_key_env": "base_url", "token_env": "url"}
"""Settings that name an environment variable, and the address that its value is sent to."""

NO_PATHS = {"name", "label", "base_url", "url", "template", "pattern", "model", "host"}
"""Settings that are text, but no paths."""

Entries = tuple[RewardConfig, ...]
Rewards = io.Custom("NGRPO_REWARDS")


class Chosen(Entries):
    """Value of NGRPO_REWARDS: entries as in `rewards.train`. What they load lives while ComfyUI keeps the output."""

    scorer: Scorer | None = None
    loading = threading.Lock()  # one for all chains: a load that was cancelled runs on

    def load(self) -> Scorer:
        """Load the rewards at the first call, and return what scores with them.

        Raises:
            ConfigError: one of them asks people, which takes a run.
            UserError: one of them cannot be had.
        """
        if asking := [reward.key for reward in self if reward.asks_people]:
            raise ConfigError(
                f"rewards must ask nobody here, got {', '.join(asking)}; Train waits for votes, and Vote Reward has "
                "who_votes for what earlier votes say of other pictures"
            )
        with self.loading:
            if self.scorer is None:
                with torch.inference_mode(False):
                    self.scorer = Scorer(self, str(comfy.model_management.get_torch_device()))
            return self.scorer

    def unload(self) -> None:
        """Let go of the loaded rewards, so that their memory is free."""
        self.scorer = None


register_folder(FUNCTIONS, ".py")


def functions() -> list[str]:
    """List every function of images in models/ngrpo_rewards as `file.py:function`; files are read, not imported."""
    found = []
    for name in folder_paths.get_filename_list(FUNCTIONS):
        path = folder_paths.get_full_path(FUNCTIONS, name)
        with suppress(OSError, SyntaxError, ValueError):
            body = ast.parse(Path(path).read_bytes()).body
            defined = [one for one in body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
            found += [f"{name}:{one.name}" for one in defined if one.name[0] != "_" and takes_images(one)]
    return found


def takes_images(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function can be a reward: it has a parameter `image` or `images`."""
    arguments = function.args
    return bool({"image", "images"} & {one.arg for one in (*arguments.args, *arguments.kwonlyargs)})


def key_variable(url: str) -> str:
    """The environment variable for the key of a server: each host has its own, so that no graph can send it elsewhere.

    `https://api.example-1.com/v1` -> NGRPO_API_KEY_API_EXAMPLE__1_COM
    """
    host = urlsplit(url).hostname or ""
    if "_" in host:
        raise ConfigError(f"the host of a server with a key must have no _ in its name, got {host!r}")
    return "NGRPO_API_KEY_" + re.sub(r"\W", "_", host.replace("-", "__")).upper()


def admitted(reward: RewardConfig) -> RewardConfig:
    """Check that a graph may ask for a reward, and return it, with its server's key variable.

    Raises:
        ConfigError: a function elsewhere than in models/ngrpo_rewards, a path out of ComfyUI's folders, or a variable
            of the environment.
    """
    if ":" in reward.name:
        target, _ = registry.split_reference(reward.name)
        folders = [Path(folder).resolve() for folder in folder_paths.get_folder_paths(FUNCTIONS)]
        if not target.endswith(".py") or not any(Path(target).resolve().is_relative_to(one) for one in folders):
            raise ConfigError(
                f"name must be a reward's, or a function of a file in models/{FUNCTIONS}, got {reward.name!r}; graphs "
                "run no other code"
            )
    reward = of_people(reward)
    for field in reward.model_fields_set - NO_PATHS:
        value = getattr(reward, field)
        if isinstance(value, str):
            check_path(value, field)
    for secret, address in SECRETS.items():
        if secret in reward.model_fields_set:
            raise ConfigError(
                f"{secret} must not be in a graph, got {getattr(reward, secret)!r}; ComfyUI takes the key for this "
                f"server from the environment variable {key_variable(getattr(reward, address))}"
            )
        if secret in type(reward).model_fields:
            variable = key_variable(getattr(reward, address))
            known = variable if variable in os.environ or secret == "token_env" else None
            return reward.model_copy(update={secret: known})
    return reward


def of_people(reward: RewardConfig) -> RewardConfig:
    """Settings of a reward by votes as ComfyUI has them: a file below its output folder; no browser, as one is open."""
    if not isinstance(reward, VoteConfig):
        return reward
    own: dict[str, Any] = {"open_browser": "open_browser" in reward.model_fields_set and reward.open_browser}
    if reward.votes is not None:
        own["votes"] = str(Path(folder_paths.get_output_directory()) / Path(reward.votes).expanduser())
    return reward.model_copy(update=own)


def entry(name: str, weight: float, settings: str, own: dict[str, Any] | None = None) -> RewardConfig:
    """Make one checked reward; settings that are given as text take precedence over `own`.

    Raises:
        ConfigError: one line per problem.
    """
    given = parse_settings(settings) if settings.strip() else {}
    for widget in ("name", "weight"):
        if widget in given:
            raise ConfigError(f"settings must leave {widget} to its widget, got {widget}={given[widget]!r}")
    (found,) = parse_reward_entries([{"name": name, "weight": weight} | (own or {}) | given])
    return admitted(found)


def joined(earlier: Entries | None, reward: RewardConfig) -> Chosen:
    """Make a chain of rewards that is longer by one."""
    check_given("rewards", earlier or (), RewardConfig, "a reward node")
    return Chosen(parse_reward_entries([*(earlier or ()), reward]))


def weight_input() -> io.Float.Input:
    """Make the input for the weight of a reward."""
    return io.Float.Input(
        "weight",
        default=1.0,
        min=-1000.0,
        max=1000.0,
        step=0.05,
        round=False,
        tooltip="Weight in the sum of several rewards; negative minimises the reward, 0 is refused.",
    )


def settings_input(what: str) -> io.String.Input:
    """Make the input for further settings of a reward as text."""
    return io.String.Input(
        "settings",
        default="",
        multiline=True,
        tooltip=f"{what} One key=value a line, or YAML; empty: the defaults. An unknown key is refused.",
    )


def chain_input() -> io.Input:
    """Make the input for a chain of rewards to add to."""
    return Rewards.Input("rewards", optional=True, tooltip="Further rewards; this one is added to them.")


class Reward(Node):
    """Node that chooses a reward of `ngrpo_lora/rewards` by its name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = registry.names(registry.REWARDS)
        docs = {name: ValueError(registry.docstring(registry.REWARDS, name)) for name in names}
        about = "\n".join(f"{name}: {first_line(doc)}" for name, doc in docs.items())
        return schema(
            "Reward",
            display_name="Reward",
            description="What pictures are judged by, for Score, Compare and Train. Nothing is loaded before it is "
            "used. Several nodes in a chain make a weighted sum.",
            search_aliases=["aesthetic", "clip score", "hpsv2", "imagereward", "pickscore", "preference", "rl"],
            inputs=[
                io.Combo.Input("name", options=names, default="world", tooltip=about),
                weight_input(),
                settings_input("Settings of this reward, as `ngrpo rewards NAME` lists them: label, clip, device, ..."),
                chain_input(),
            ],
            outputs=[Rewards.Output(display_name="rewards")],
        )

    @classmethod
    def validate_inputs(cls, name: str = "", weight: float = 1.0, settings: str = "") -> bool:
        return checked(entry, name, weight, settings) if name else True

    @classmethod
    def execute(cls, name: str, weight: float, settings: str, rewards: Entries | None = None) -> io.NodeOutput:
        return io.NodeOutput(joined(rewards, entry(name, weight, settings)))


class RewardFunction(Node):
    """Node that makes a reward of a Python function of the user's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RewardFunction",
            display_name="Reward by Function",
            description=f"A Python function as a reward. It stands in a file of models/{FUNCTIONS}, for example\n\n"
            "def score(images, prompts):\n    return [numpy.asarray(image).mean() for image in images]\n\n"
            "Graphs come from anywhere: code in a graph, or elsewhere on this computer, is not run.",
            search_aliases=["custom reward", "preference", "python", "rl"],
            inputs=[
                io.Combo.Input(
                    "function",
                    options=functions() or [NO_FUNCTION],
                    tooltip=f"FILE.py:FUNCTION in models/{FUNCTIONS}, with the parameters (images, prompts, metadata) "
                    "or (image, prompt, metadata), of which the last two may be left out. R refreshes the list.",
                ),
                weight_input(),
                settings_input("Settings of any reward: label, clip, range, batch_size, timeout_s, concurrency."),
                chain_input(),
            ],
            outputs=[Rewards.Output(display_name="rewards")],
        )

    @classmethod
    def validate_inputs(cls, function: str = "", weight: float = 1.0, settings: str = "") -> bool:
        return checked(cls.entry, function, weight, settings) if function else True

    @classmethod
    def entry(cls, function: str, weight: float, settings: str) -> RewardConfig:
        """Make the checked reward that the widgets describe."""
        return entry(reference(function), weight, settings)

    @classmethod
    def fingerprint_inputs(cls, function: str | None, **others: Any) -> str:
        return "" if function is None else registry.source_digest(reference(function))

    @classmethod
    def execute(cls, function: str, weight: float, settings: str, rewards: Entries | None = None) -> io.NodeOutput:
        return io.NodeOutput(joined(rewards, cls.entry(function, weight, settings)))


def reference(function: str) -> str:
    """Reference `file.py:function` with the file's whole path.

    Raises:
        ConfigError: there is no such function in models/ngrpo_rewards.
    """
    listed("function", function, functions() or [NO_FUNCTION])
    name, own = registry.split_reference(function)
    return f"{folder_paths.get_full_path_or_raise(FUNCTIONS, name)}:{own}"


class VLMJudge(Node):
    """Node that makes a reward of a vision-language model, which is asked about every picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "VLMJudge",
            display_name="VLM Judge",
            description="A vision-language model behind an OpenAI-compatible server (vLLM, SGLang, Ollama, ...) as a "
            "reward. Its key is never in a graph: for https://api.openai.com/v1 it is the environment variable "
            "NGRPO_API_KEY_API_OPENAI_COM, and likewise for every other host (a - is written __).",
            search_aliases=["llm", "ollama", "openai", "preference", "qwen-vl", "reward"],
            advanced=["answer"],
            inputs=[
                io.Combo.Input(
                    "judge",
                    options=SERVERS,
                    default="judge",
                    tooltip="judge: a question of your own. unifiedreward: a model tuned to judge, 1 to 5. vqascore: "
                    "how probable the model finds it that the picture shows the prompt, 0 to 1.",
                ),
                io.String.Input(
                    "base_url", default="http://localhost:8000/v1", tooltip="Address of the server, with its /v1."
                ),
                io.String.Input("model", default="", tooltip="The model's name there; empty: the only one."),
                io.String.Input(
                    "question",
                    default=TEMPLATE,
                    multiline=True,
                    tooltip="Of judge: {prompt} is where the prompt goes. The others have questions of their own.",
                ),
                io.Combo.Input(
                    "answer",
                    options=["number", "logprobs"],
                    default="number",
                    tooltip="Of judge: number is what follows `Score:` in the answer, 0 to 10 (else: pattern and "
                    "score_range in settings); logprobs is how probable a yes is, 0 to 1.",
                ),
                weight_input(),
                settings_input(
                    "max_tokens, max_retries, attempt_timeout_s, concurrency, label, clip; of judge pattern and "
                    "score_range; of unifiedreward version and aspect."
                ),
                chain_input(),
            ],
            outputs=[Rewards.Output(display_name="rewards")],
        )

    @classmethod
    def entry(
        cls, judge: str, base_url: str, model: str, question: str, answer: str, weight: float, settings: str
    ) -> RewardConfig:
        """Make the checked reward that the widgets describe."""
        listed("judge", judge, SERVERS)
        asked = {"template": question, "answer": answer} if judge == "judge" else {}
        own = {"base_url": base_url.strip(), "model": model.strip() or None} | asked
        return entry(judge, weight, settings, own)

    @classmethod
    def validate_inputs(
        cls,
        judge: str = "",
        base_url: str = "http://localhost",
        model: str = "",
        question: str = TEMPLATE,
        answer: str = "number",
        weight: float = 1.0,
        settings: str = "",
    ) -> bool:
        if not judge:
            return True
        return checked(cls.entry, judge, base_url, model, question, answer, weight, settings)

    @classmethod
    def execute(
        cls,
        judge: str,
        base_url: str,
        model: str,
        question: str,
        answer: str,
        weight: float,
        settings: str,
        rewards: Entries | None = None,
    ) -> io.NodeOutput:
        chosen = cls.entry(judge, base_url, model, question, answer, weight, settings)
        return io.NodeOutput(joined(rewards, chosen))


NODES: list[type[io.ComfyNode]] = [Reward, RewardFunction, VLMJudge]
