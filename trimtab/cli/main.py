"""Parsing only: every command imports what it needs when it runs, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from trimtab import __version__
from trimtab.cli import choose, explore, plan, registry
from trimtab.cli.alone import only_process
from trimtab.cli.show import show, show_table
from trimtab.errors import InputError, Lost, Terminated

METHODS = {
    "sft": "supervised fine-tuning on demonstrations",
    "reward": "a reward model on pairs, rankings or ratings",
    "process-reward": "a reward model of steps, on labelled steps",
    "dpo": "Direct Preference Optimization on pairs",
    "ipo": "Identity Preference Optimization on pairs: a squared loss with a finite target",
    "simpo": "Simple Preference Optimization on pairs: mean log-probabilities, a margin, no reference",
    "orpo": "Odds Ratio Preference Optimization on pairs: with supervised fine-tuning in one stage",
    "kto": "Kahneman-Tversky Optimization on thumbs up and down",
    "rank": "a policy on rankings or ratings of several responses",
    "mixed": "pairs, labels and demonstrations in one run, each with the loss it is for",
    "spin": "Self-Play Fine-Tuning: demonstrations against the model's own answers",
    "online-dpo": "DPO on pairs of the policy's own answers, judged as they are sampled",
    "ppo": "Proximal Policy Optimization with a critic on sampled responses",
    "grpo": "Group Relative Policy Optimization on sampled groups",
    "dr-grpo": "GRPO without its two divisors: no deviation, no mean over length",
    "rloo": "REINFORCE with a leave-one-out baseline, the KL inside the reward",
    "dapo": "GRPO for long answers: higher clip, token loss, groups that differ, soft length limit",
    "gspo": "GRPO with one ratio for a whole response",
    "cispo": "GRPO that clips the importance weight and keeps every token's gradient",
}
"""One line for each method; a test holds it against the files in ``trimtab/methods``."""


OWN_DATA = "compare methods on your own feedback: which one, by how much, at what cost"
"""What ``trimtab compare`` does without a study's file."""
FORCE = "train even where the plan says that memory cannot be enough"
LAUNCHED = {"RANK", "WORLD_SIZE", "SLURM_PROCID"}
"""Variables by which a launcher says that there may be several processes."""
_PROGRAM = False
"""This process is a command and ends with it: nobody else's signals are changed."""
END_S = 10.0
"""What a process of several that has failed has for its last threads."""
USERS_TO_MEND = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
}
"""What the system says of a path or a disk that no option of ours could make good."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


class _OneLineEach(argparse.HelpFormatter):
    """One line an option, however long; a terminal wraps it, and grep finds it whole."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=120, width=1000)


def run(arguments: list[str]) -> int:
    """Run one command; the exit code. Bad input is one line on stderr and 2, Ctrl-C is 130, SIGTERM 143.

    75 where another process of the run was lost. Of many processes one says the line.
    """
    try:
        return _dispatch(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted{_go_on(arguments)}", file=sys.stderr)
        return 130
    except Terminated as ended:
        print(f"terminated: {ended}{_go_on(arguments)}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except Lost as ended:
        if str(ended):
            print(f"lost: {ended}", file=sys.stderr)
        return ended.code
    except BrokenPipeError:
        return 141
    except OSError as error:
        if error.errno not in USERS_TO_MEND:
            raise
        where = f"{str(error.filename)[:200]}: " if error.filename else ""
        print(f"error: {InputError(f'{where}{error.strerror}')}", file=sys.stderr)
        return 2


def _go_on(arguments: list[str]) -> str:
    """How a command that was ended early goes on."""
    ways = {
        "compare": "--resume true",
        "pipeline": "--resume auto",
        "sweep": "--resume auto",
        "quickstart": "--resume",
        "label": "the same command: every answer so far is in the judge's cache",
        **dict.fromkeys(METHODS, "--resume auto"),
    }
    way = ways.get(arguments[0]) if arguments else None
    return f"; go on with {way}" if way else ""


def _dispatch(arguments: list[str]) -> int:
    for argument in arguments:
        if "\0" in argument or (not argument.isascii() and any("\ud800" <= c <= "\udfff" for c in argument)):
            raise InputError(f"trimtab: the argument {argument[:80]!r} is not UTF-8 text, as all are")
    parser = Parser(
        prog="trimtab",
        description="Tune language models on preferences and rewards.",
        formatter_class=_OneLineEach,
        epilog="Each command has its own --help. Everything here is also a Python call; see the docs.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    summaries = {**METHODS, **{name: summary for name, (summary, _) in COMMANDS.items()}}
    for name, summary in summaries.items():
        commands.add_parser(name, help=summary, add_help=False)
    if not arguments:
        parser.print_help()
        return 0
    try:
        known, rest = parser.parse_known_args(arguments[:1]), arguments[1:]
    except InputError:
        if os.environ.keys() & LAUNCHED:
            from trimtab.parallel.environment import quiet

            if quiet():  # another process says the same
                raise Lost(code=2) from None
        raise
    command = known[0].command
    if command is None:
        raise InputError(f"trimtab: {arguments[0]!r} is no command; see trimtab --help")
    if command in METHODS:
        return _method(command, rest)
    only_process(command)
    return COMMANDS[command][1](rest)


def _parser(
    prog: str, summary: str, config_class: Any, *, file: bool = True, takes: str = "CONFIG.toml"
) -> Parser:
    """One line for each option of a configuration; ``file``: it is read from a file (``takes``) first."""
    from trimtab.config import fields

    parser = Parser(
        prog=prog,
        description=summary,
        usage=f"{prog} {takes} [--section.key value ...]"
        if file
        else f"{prog} --model MODEL --data FILE [--budget 30m] [--section.key value ...]",
        allow_abbrev=False,
        formatter_class=_OneLineEach,
    )
    if file:
        parser.add_argument("config", metavar=takes, help="configuration file")
    else:
        for name, text in (("model", "folder or hub name"), ("data", "file, folder or hub name of feedback")):
            parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar="PATH", help=text)
    for key, kind, text, default in fields(config_class):
        shown = "" if default in (..., None, "", [], {}) else f" (default {default})"
        parser.add_argument(
            f"--{key}",
            *(["--resume"] if key == "run.resume" else []),
            metavar=kind if "|" in kind else kind.upper(),  # choices are typed as they stand
            default=argparse.SUPPRESS,
            help=(text + shown).replace("%", "%%"),
        )
        if key == "run.resume":  # no option of a run, whose configuration would then always be forced
            parser.add_argument("--force", metavar="BOOL", default=argparse.SUPPRESS, help=FORCE)
    return parser


def _configured(
    prog: str,
    summary: str,
    config_class: Callable[[], Any],
    arguments: list[str],
    *,
    file: bool = True,
    takes: str = "CONFIG.toml",
) -> tuple[str | None, dict[str, Any]]:
    """Parse ``CONFIG.toml [--section.key value]``: the file (None without ``file``) and the overrides."""
    parser = _parser(prog, summary, config_class(), file=file, takes=takes)
    if any(a in ("-h", "--help") for a in arguments):
        parser.parse_args(["--help"])
    known, unknown = parser.parse_known_args(_with_force(arguments))
    overrides = {k: v for k, v in vars(known).items() if k != "config"}
    # Keys below a free-form section (stages.dpo.train.lr) are not listed one by one; validation names
    # whatever is not known.
    return getattr(known, "config", None), overrides | _dotted(prog, unknown)


def _dotted(prog: str, unknown: list[str]) -> dict[str, Any]:
    """``--section.key value`` and ``--section.key=value`` by key. Raises InputError for anything else."""
    overrides: dict[str, Any] = {}
    while unknown:
        key = unknown.pop(0)
        if not key.startswith("--"):
            raise InputError(f"{prog}: unexpected argument {key!r}; options are --section.key value")
        key, equals, value = key[2:].partition("=")
        if not equals:
            if not unknown or unknown[0].startswith("--"):
                raise InputError(f"{prog}: --{key} needs a value")
            value = unknown.pop(0)
        overrides[key] = value
    return overrides


def _with_force(arguments: list[str]) -> list[str]:
    """``--force`` alone means true, as a flag does."""
    following = [*arguments[1:], ""]
    return [
        "--force=true" if argument == "--force" and after not in ("true", "false") else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def _method(name: str, arguments: list[str]) -> int:
    """One process, or one of those that a launcher started."""
    if not os.environ.keys() & LAUNCHED:
        return _train(name, *_read_method(name, arguments))
    # Before PyTorch is imported: what its sockets meet where a process ends is said in our own line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from trimtab.parallel.environment import launched
    from trimtab.parallel.start import joined

    if launched() == 1:
        return _train(name, *_read_method(name, arguments))
    wrong, given = None, None
    try:
        given = _read_method(name, arguments)
    except InputError as error:  # which the others have to hear of
        wrong = error
    waits, device = {}, "cpu"
    if given is not None:
        parallel, device = given[0].parallel, given[0].model.device
        waits = {"wait_s": parallel.wait_s, "lost_after_s": parallel.lost_after_s}
    # Within, SIGTERM is heard. Behind it this process ends, and is not to be ended before it has said why:
    # torchrun asks the others to end when one has.
    if _PROGRAM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with joined(device, **waits):
        if given is None:
            raise wrong or InputError(f"trimtab {name}: no configuration")
        return _train(name, *given)


def _read_method(name: str, arguments: list[str]) -> tuple[Any, bool]:
    """A method's configuration, and whether it is forced."""
    from trimtab import methods
    from trimtab.config import load_config, parse_value

    def config_class() -> Any:
        return methods.find(name).Config

    file, overrides = _configured(f"trimtab {name}", METHODS[name], config_class, arguments)
    force = parse_value(overrides.pop("force", "false"))
    if not isinstance(force, bool):
        raise InputError(f"trimtab {name}: --force takes true or false, not {force!r}")
    return load_config(methods.find(name).Config, file, overrides), force


def _train(name: str, config: Any, force: bool) -> int:
    from trimtab.evaluation.watching.during import heldout_evaluation
    from trimtab.parallel.world import world
    from trimtab.studies import launch

    result = launch.train(name, config, on_eval=heldout_evaluation(config), force=force)
    best = f", of step {result.model_step}" if result.model_step != result.state.step else ""
    if world().first:
        print(f"{name}: {result.state.step} steps, model in {result.out / 'model'}{best}")
    return 0


def _compare(arguments: list[str]) -> int:
    """With a study's file, or with ``--model`` and ``--data``."""
    from trimtab.config import load_config

    if any(a in ("-h", "--help") for a in arguments):
        _compare_help()
    # A study's file may stand behind its options; without one it is the user's own data.
    if arguments and arguments[0].startswith("-") and not any(a.endswith(".toml") for a in arguments):
        from trimtab.studies.own_data import OwnDataConfig, run_own_data

        _, overrides = _configured("trimtab compare", OWN_DATA, lambda: OwnDataConfig, arguments, file=False)
        for short in ("model", "data"):
            if short in overrides:
                overrides[f"{short}.path"] = overrides.pop(short)
        own_config = load_config(OwnDataConfig, None, overrides)
        show(run_own_data(own_config), own_config.out)
        return 0
    from trimtab.studies.compare import StudyConfig, run_study

    file, overrides = _configured("trimtab compare", COMMANDS["compare"][0], lambda: StudyConfig, arguments)
    config = load_config(StudyConfig, file, overrides)
    show(run_study(config), config.out)
    return 0


def _pipeline(arguments: list[str]) -> int:
    from trimtab.config import load_config
    from trimtab.studies.pipeline import PipelineConfig, run_pipeline, stages_table

    file, overrides = _configured(
        "trimtab pipeline", COMMANDS["pipeline"][0], lambda: PipelineConfig, arguments
    )
    config = load_config(PipelineConfig, file, overrides)
    summary = run_pipeline(config)
    show_table(summary["title"], *stages_table(summary))
    if "methods" in summary:
        show({**summary, "title": None}, config.out)
    else:
        print(f"\nsummary  {config.out}/summary.json")
    print(f"model    {summary['final']}")
    return 0


def _sweep(arguments: list[str]) -> int:
    """1 where a run failed: the others stand in the table."""
    from trimtab.config import load_config
    from trimtab.evaluation.pages.sweep_report import bracket_note, sweep_sentences, sweep_table
    from trimtab.studies.grid import SweepConfig
    from trimtab.studies.sweep import run_sweep

    file, overrides = _configured("trimtab sweep", COMMANDS["sweep"][0], lambda: SweepConfig, arguments)
    config = load_config(SweepConfig, file, overrides)
    summary = run_sweep(config)
    show_table(summary["title"], *sweep_table(summary))
    print("\n".join([bracket_note(summary), *sweep_sentences(summary)]))
    print(f"\nsummary  {config.out}/summary.json\nreport   {config.out}/report.html")
    return 1 if any("failed" in run for run in summary["runs"].values()) else 0


def _compare_help() -> NoReturn:
    """Both ways to compare, one after the other."""
    from trimtab.studies.compare import StudyConfig
    from trimtab.studies.own_data import OwnDataConfig

    for summary, config_class, file in (
        (OWN_DATA, OwnDataConfig, False),
        (COMMANDS["compare"][0], StudyConfig, True),
    ):
        print(_parser("trimtab compare", summary, config_class, file=file).format_help())
    raise SystemExit(0)


def _quickstart(arguments: list[str]) -> int:
    parser = Parser(
        prog="trimtab quickstart",
        description=COMMANDS["quickstart"][0],
        epilog="options of its study are taken too: --stages.dpo.train.steps 60",
    )
    parser.add_argument("--out", default="runs/quickstart", help="folder for everything that is written")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the model and the training")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted quickstart")
    parser.add_argument("--force", action="store_true", help=FORCE)
    options, unknown = parser.parse_known_args(arguments)
    overrides = {**_dotted("trimtab quickstart", unknown), "force": options.force}
    from trimtab.studies.quickstart import run_quickstart

    config, summary = run_quickstart(options.out, options.seed, overrides, resume=options.resume)
    show(summary, config.out)
    return 0


def _eval(arguments: list[str]) -> int:
    """``[RUN|MODEL] [CONFIG.toml] [--options]``; 1 where a safety gate failed."""
    from trimtab.config import load_config
    from trimtab.evaluation.command import run_eval
    from trimtab.evaluation.eval_config import EvalConfig
    from trimtab.studies.eval_run import eval_config

    extra = None
    if len(arguments) > 1 and arguments[1].endswith(".toml") and not arguments[0].startswith("-"):
        extra, arguments = arguments[1], [arguments[0], *arguments[2:]]
    what, overrides = _configured(
        "trimtab eval", COMMANDS["eval"][0], lambda: EvalConfig, arguments, takes="RUN|MODEL|CONFIG.toml"
    )
    assert what is not None
    if what.endswith(".toml"):
        if extra is not None:
            raise InputError("trimtab eval: two CONFIG.toml files; give a run or a model, and one file")
        config = load_config(EvalConfig, what, overrides)
    else:
        config = eval_config(what, extra, overrides)
    told, passed = run_eval(config)
    print(told)
    return 0 if passed else 1


def _audit(arguments: list[str]) -> int:
    from trimtab.config import load_config
    from trimtab.evaluation.audit.command import run_audit
    from trimtab.evaluation.audit.config import AuditConfig

    file, overrides = _configured("trimtab audit", COMMANDS["audit"][0], lambda: AuditConfig, arguments)
    print(run_audit(load_config(AuditConfig, file, overrides)))
    return 0


def _label(arguments: list[str]) -> int:
    from trimtab.config import load_config
    from trimtab.evaluation.judging.label import LabelConfig, run_label

    file, overrides = _configured("trimtab label", COMMANDS["label"][0], lambda: LabelConfig, arguments)
    print(run_label(load_config(LabelConfig, file, overrides)))
    return 0


def _report(arguments: list[str]) -> int:
    parser = Parser(prog="trimtab report", description=COMMANDS["report"][0])
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="evaluated runs (eval.json), several for one page; or an audit's, or a study's (summary.json)",
    )
    parser.add_argument("--out", default=None, help="the page's file; else in the folder, or comparison.html")
    options = parser.parse_args(arguments)
    from pathlib import Path

    from trimtab.evaluation.pages.command import report

    [first, *more] = options.folders
    if more or not (Path(first) / "summary.json").exists():
        print(report(options.folders, options.out))
        return 0
    if options.out is not None:
        raise InputError("trimtab report: --out has no effect on a study, whose page is its report.html")
    from trimtab.studies.compare import rewrite_report

    try:
        print(rewrite_report(first))
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{first}: its files are not as a study writes them ({error})") from error
    return 0


def _diagnose(arguments: list[str]) -> int:
    from trimtab.config import load_config
    from trimtab.studies.diagnose import DiagnoseConfig, run_diagnose

    summary = COMMANDS["diagnose"][0]
    file, overrides = _configured("trimtab diagnose", summary, lambda: DiagnoseConfig, arguments)
    print(run_diagnose(load_config(DiagnoseConfig, file, overrides)))
    return 0


def _generate(arguments: list[str]) -> int:
    parser = Parser(prog="trimtab generate", description=COMMANDS["generate"][0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument(
        "prompts", nargs="*", help="prompts; none reads one prompt a line from standard input"
    )
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user's message")
    parser.add_argument("--n", type=int, default=1, help="responses a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest response")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args(arguments)
    from trimtab.evaluation.generate import generate

    prompts = options.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for prompt, responses in generate(
        options.model,
        prompts,
        n=options.n,
        chat=options.chat,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
    ):
        for response in responses:
            print(f"{prompt}\t{response}" if len(prompts) > 1 or options.n > 1 else response)
    return 0


def _export(arguments: list[str]) -> int:
    parser = Parser(prog="trimtab export", description=COMMANDS["export"][0])
    parser.add_argument("model", help="folder or hub name of a model or an adapter")
    parser.add_argument("out", help="new folder for it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    options = parser.parse_args(arguments)
    from trimtab.training.export import export_model

    print(export_model(options.model, options.out, options.dtype))
    return 0


def _lines(name: str, summary: str) -> Parser:
    return Parser(prog=f"trimtab {name}", description=summary, formatter_class=_OneLineEach)


def _plan(arguments: list[str]) -> int:
    return plan.plan(arguments, _lines("plan", plan.PLAN))


def _runs(arguments: list[str]) -> int:
    return registry.runs(arguments, _lines("runs", registry.RUNS))


def _verify(arguments: list[str]) -> int:
    return registry.verify(arguments, _lines("verify", registry.VERIFY))


def _choose(arguments: list[str]) -> int:
    return choose.choose(arguments, _lines("choose", choose.CHOOSE))


def _explore(arguments: list[str]) -> int:
    return explore.explore(arguments, _lines("explore", explore.EXPLORE))


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "plan": (plan.PLAN, _plan),
    "choose": (choose.CHOOSE, _choose),
    "explore": (explore.EXPLORE, _explore),
    "compare": ("run several methods from one model and compare them on equal terms", _compare),
    "pipeline": ("run stages in order, each from the policy that the one before it made", _pipeline),
    "sweep": ("run methods over options and seeds, with a table and plots", _sweep),
    "quickstart": ("train, tune and compare in a small world of its own, within minutes", _quickstart),
    "eval": ("is a run or a model better than another, at what cost, and where is it worse", _eval),
    "audit": ("put a reward or a judge on trial: what else does it pay for?", _audit),
    "label": ("let a judge write pairs, rankings or ratings", _label),
    "diagnose": ("hold a PPO run's critic against sampled completions, token by token", _diagnose),
    "report": ("write the page of evaluated runs, an audit or a study again", _report),
    "generate": ("sample from a model", _generate),
    "runs": (registry.RUNS, _runs),
    "verify": (registry.VERIFY, _verify),
    "export": ("write a model whole, an adapter merged into its base", _export),
}


def main() -> NoReturn:
    """The ``trimtab`` process: run the command, and end with its code."""
    global _PROGRAM
    _PROGRAM, code = True, 1
    try:
        code = run(sys.argv[1:])
    finally:
        if code and os.environ.keys() & LAUNCHED:
            _end_within(END_S, code)
    sys.exit(code)


def _end_within(seconds: float, code: int) -> None:
    """A thread that still waits for a process which is gone must not keep this one."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


if __name__ == "__main__":
    main()
