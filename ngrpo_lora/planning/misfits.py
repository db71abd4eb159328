"""Whether the prompts of a run go with its model, its rewards and measures, before any of these is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig, RunConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.prompts.checking import check_sources, warn_of_cropping
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.sources import Split, needed_prompts, read_split

__all__ = ["check_prompts", "misfits", "watched"]

KEEPER = "preservation"  # the reward that compares what a mask leaves as it was

Reader = Callable[[str], object]

HELD_OUT = "prompts.held_out"
OWN = "ngrpo_lora."


def check_prompts(config: RunConfig) -> None:
    """Check that the prompts of a run can be read, and go with its model and rewards; looks up what the model is.

    Raises:
        ConfigError: one line per problem.
        UserError: as `misfits`.
    """
    if problems := [*misfits(config, read_split(config.prompts))]:
        raise ConfigError(problems)


def misfits(config: RunConfig, split: Split) -> Iterator[str]:
    """What does not go together: source pictures and the model, or prompts or a size and a reward or measure.

    Args:
        split: the tables of the run's prompts.
    Raises:
        UserError: as `edits_pictures`.
    """
    from ngrpo_lora.models._index import edits_pictures  # the client of the Hub is slow to import

    edits, needed = edits_pictures(config.model), needed_prompts(config, split)
    trained = any(reward.name == KEEPER for reward in config.rewards.train)
    evaluated = trained or any(reward.name == KEEPER for reward in watched(config).values())
    for key, prompts in needed.items():
        keeper = KEEPER if trained or (evaluated and key == HELD_OUT) else ""
        try:
            sizes = check_sources(key, prompts, edits, config.model.path, keeper=keeper)
        except ConfigError as error:
            yield from error.problems
            return
        warn_of_cropping(key, sizes, (config.model.width_px, config.model.height_px))
    yield from _unread(config, needed, edits)
    yield from _oblong(config)
    yield from _unasked(config, edits)


def watched(config: RunConfig) -> dict[str, RewardConfig]:
    """The rewards that evaluations add, by where they are set, and the pass-or-fail one."""
    found = {f"evaluation.rewards ({reward.key})": reward for reward in config.evaluation.rewards}
    return found | ({} if config.strict_reward is None else {"evaluation.strict": config.strict_reward})


def _trained(config: RunConfig) -> dict[str, RewardConfig]:
    """The rewards that are trained on, by where they are set."""
    return {f"rewards ({reward.key})": reward for reward in config.rewards.train}


def _unasked(config: RunConfig, edits: bool) -> Iterator[str]:
    """The questions of one's own that a judge would not ask, as the model edits, or as it does not."""
    asked, other = ("edit_template", "template") if edits else ("template", "edit_template")
    makes = "of edits, which {} makes" if edits else "of edits alone, and {} makes none"
    how = "asked with the source before the result" if edits else "asked of pictures that are drawn"
    for where, reward in (_trained(config) | watched(config)).items():
        fields = type(reward).model_fields
        own = {name for name in (asked, other) if name in fields and getattr(reward, name) != fields[name].default}
        if own == {other} and asked in fields:
            why = f"{other} is {'not ' if edits else ''}asked {makes.format(repr(config.model.path))}"
            yield f"{where}: {why}; give your question as {asked}, which is {how}"


def _unread(config: RunConfig, needed: Mapping[str, Sequence[Prompt]], edits: bool) -> Iterator[str]:
    """The rewards and measures of the package that have no figure for a prompt, as they read certain ones alone."""
    trained, measures = _trained(config), _measures(config)
    for where, reward in (trained | watched(config)).items():
        yield from _lacking(where, reward, {key: needed[key] for key in needed if where in trained or key == HELD_OUT})
    for where, name in _judges(config).items():
        reads = _reader(name)
        for key in needed if where in trained else [HELD_OUT]:
            if reads is not None and (refused := _refused(reads, needed[key])):
                count = f"{len(refused):,} of {len(needed[key]):,} in {key} {'is' if len(refused) == 1 else 'are'} not"
                (prompt, rule), *_ = refused
                if where in measures:
                    remedy = "leave it out, or give other prompts"
                else:
                    others = [name for name, other in _readers(edits).items() if not _refused(other, needed[key])]
                    remedy = f"give {' or '.join(others) or 'another reward, or other prompts'}"
                yield f"{where}: {rule}, but {count}, first {prompt.told}; {remedy}"
                break


def _oblong(config: RunConfig) -> Iterator[str]:
    """The rewards and measures of the package that have no figure for a picture that is no square."""
    width_px, height_px = config.model.width_px, config.model.height_px
    for where, name in _judges(config).items() if width_px != height_px else ():
        if (module := _module(name)) is not None and registry.defines(*module, "SQUARE"):
            yield (
                f"{where} must have square pictures, got model.width_px={width_px} and model.height_px={height_px}; "
                "give both the same, or leave it out"
            )


def _judges(config: RunConfig) -> dict[str, str]:
    """What judges pictures, rewards and measures, by where it is set: the name of each."""
    rewards = _trained(config) | watched(config)
    return {where: reward.name for where, reward in rewards.items()} | _measures(config)


def _measures(config: RunConfig) -> dict[str, str]:
    """The functions of `evaluation.measures` by where they are set."""
    return {f"evaluation.measures ({name})": name for name in config.evaluation.measures}


def _module(name: str) -> tuple[str, str] | None:
    """The package and the file of a reward, or of a function of this package; None of files and packages of others."""
    if ":" not in name:
        return registry.REWARDS, name
    package, _, file = registry.split_reference(name)[0].rpartition(".")
    return (package, file) if f"{package}.".startswith(OWN) else None


def _lacking(where: str, reward: RewardConfig, needed: Mapping[str, Sequence[Prompt]]) -> Iterator[str]:
    """What a reward of the package finds no metadata for, with the first prompt: it would end the run later."""
    if ":" in reward.name or not registry.defines(registry.REWARDS, reward.name, "check_metadata"):
        return
    check = registry.load(registry.REWARDS, reward.name).check_metadata
    for key, prompts in needed.items():
        refused = [(prompt, str(error)) for prompt in prompts if (error := _error(check, prompt.metadata))]
        if refused:
            count = f"{len(refused):,} of {len(prompts):,} in {key} {'does' if len(refused) == 1 else 'do'} not fit"
            (prompt, problem), *_ = refused
            yield f"{where}: {count}, first {prompt.told}: {problem}"
            return


def _error(check: Callable[[Mapping[str, object]], None], metadata: Mapping[str, object]) -> UserError | None:
    """What a check raises, if it does."""
    try:
        check(metadata)
    except UserError as error:
        return error
    return None


def _reader(name: str) -> Reader | None:
    """What a reward or measure of the package reads prompts with; None for one that takes any."""
    if (module := _module(name)) is None or not registry.defines(*module, "reads"):
        return None
    return registry.load(*module).reads


def _readers(edits: bool) -> dict[str, Reader]:
    """What rewards of the package read prompts with that judge edits, or pictures drawn from text."""
    known = {name: _reader(name) for name in registry.names(registry.REWARDS)}
    fitting = {name: reads for name, reads in known.items() if reads is not None}
    return {name: reads for name, reads in fitting.items() if RewardConfig(name=name).judges_edits == edits}


def _refused(reads: Reader, prompts: Sequence[Prompt]) -> list[tuple[Prompt, str]]:
    """The prompts that a reward does not read, each with what it should be."""
    found: list[tuple[Prompt, str]] = []
    for prompt in prompts:
        try:
            reads(prompt.text)
        except ValueError as error:
            found.append((prompt, str(error).partition(", got ")[0]))
    return found
