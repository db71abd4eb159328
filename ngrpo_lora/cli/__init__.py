"""The `ngrpo` command: one file a group of commands, each of which imports what it needs when it is called."""

from ngrpo_lora.cli import adapters, bench, doctor, evaluate, inspect, push, reward_server, sample, train, voting
from ngrpo_lora.cli.app import app, group

__all__ = ["app"]

for command in (
    *(train.train, sample.sample, adapters.info, adapters.formats, adapters.export, adapters.merge),
    *(evaluate.score, evaluate.compare, evaluate.curves, evaluate.report, push.push),
    *(inspect.config, inspect.plan, inspect.presets, inspect.rewards, reward_server.reward_server),
    *(voting.votes, doctor.doctor),
):
    app.command()(command)

bench_app = group("bench", "Measure this machine.")
for command in (
    bench.overhead,
    bench.gpu,
    bench.solver,
    bench.pipeline,
    bench.gradient,
    bench.scaling,
    bench.vote,
    bench.paper,
    bench.report,
):
    bench_app.command()(command)

group("prompts", "Look at prompts before training on them.").command()(inspect.inspect)
