"""``trimtab plan``: parsing; ``studies/plan_command.py`` plans, shows and writes."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from trimtab.errors import InputError

PLAN = "will it fit, how long will it take, what will it cost: before the run, without its weights"

OURS = ("method", "devices", "engine")
"""Options of a plan without a file that the command sets itself: from METHOD, --devices and --device."""
USAGE = """trimtab plan METHOD CONFIG.toml [--section.key value ...]   the plan of exactly this run
       trimtab plan METHOD --model MODEL [--key value ...]         without a file
       trimtab plan all|METHOD,METHOD --model MODEL [...]          several methods, a row each
       trimtab plan --calibrate                                    measure this machine once, for all plans"""


def plan(arguments: list[str], parser: argparse.ArgumentParser) -> int:
    """0 where it fits or nobody knows, 1 where it does not."""
    _own_options(parser)
    if any(word in ("-h", "--help") for word in arguments):
        _help(parser, arguments[0])
    known, rest = parser.parse_known_args(arguments)
    values = vars(known)
    advise = not values.pop("no_advice")
    from trimtab.studies.plan_command import PlanSettings, method_names, plan_models, plan_nothing

    settings = PlanSettings(advise=advise, **values)
    if not rest:
        return plan_nothing(settings)
    if rest[0].startswith("-"):
        raise InputError(f"trimtab plan: a method comes before {rest[0]}; see trimtab plan --help")
    methods, *rest = rest
    names = method_names(methods)
    if any(word == "--model" or word.startswith("--model=") for word in rest):
        return plan_models(names, _quick_options(methods, rest), settings)
    if len(names) > 1:
        raise InputError("trimtab plan: several methods are planned from --model: a file is one method's")
    return _from_file(names[0], rest, settings)


def _own_options(parser: argparse.ArgumentParser) -> None:
    """What both ways to plan share."""
    parser.usage = USAGE
    parser.allow_abbrev = False
    parser.add_argument("--device", metavar="NAME", help="a device by its card (default this machine)")
    parser.add_argument("--devices", type=int, metavar="N", help="processes, one on each (default 1)")
    parser.add_argument("--memory", metavar="SIZE", help="24GiB, 512MiB: instead of what the device has")
    parser.add_argument("--price", type=float, metavar="P", help="of a device and hour, in any currency")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine first, in seconds")
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON; - prints it and nothing else")
    parser.add_argument("--svg", metavar="FILE", help="draw the memory, a bar for each phase or method")
    parser.add_argument("--write", metavar="FILE", help="write CONFIG.toml with what is advised")
    parser.add_argument("--no-advice", action="store_true", help="do not look for changes that make it fit")


def _from_file(name: str, rest: list[str], settings: Any) -> int:
    from trimtab.cli.main import _configured
    from trimtab.studies.plan_command import plan_file

    if not rest or all(word.startswith("-") for word in rest):
        raise InputError(f"trimtab plan: {name}: give its CONFIG.toml, or --model to plan without one")

    def config_class() -> Any:
        from trimtab import methods

        return methods.find(name).Config

    file, overrides = _configured(f"trimtab plan {name}", PLAN, config_class, rest)
    assert file is not None
    return plan_file(name, file, overrides, settings)


def _quick_options(methods: str, rest: list[str]) -> dict[str, Any]:
    """``--key value`` of a plan without a file. Raises InputError that names the nearest option."""
    from trimtab.config import fields
    from trimtab.planning.quick_config import QuickConfig

    kinds = {key: kind for key, kind, *_ in fields(QuickConfig) if key not in OURS}
    given, left = dict[str, Any](), list(rest)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            if word.endswith(".toml"):
                raise InputError(
                    f"trimtab plan: --model plans without a file: with {word} the model is --model.path"
                )
            raise InputError(f"trimtab plan: unexpected argument {word!r}; options are --key value")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean --{near[0]}?" if near else f"see trimtab plan {methods} --help"
            raise InputError(f"trimtab plan: --{key} is no option of a plan without a file; {hint}")
        if not equals:
            if not left or left[0].startswith("--"):
                one_of = " (true or false)" if kinds[key] == "bool" else ""
                raise InputError(f"trimtab plan: --{key} needs a value{one_of}")
            value = left.pop(0)
        given[key] = _names(key, value) if kinds[key] == "list[str]" else value
    return given


def _names(key: str, text: str) -> str | list[str]:
    """``q_proj,v_proj``; a TOML list stays as it is. Raises InputError for an empty name."""
    if text.lstrip().startswith("["):
        return text
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise InputError(f"trimtab plan: --{key} {text!r} has an empty name: names are as in q_proj,v_proj")
    return names


def _help(parser: argparse.ArgumentParser, methods: str) -> NoReturn:
    """The options of both ways; a file's are those of the method itself."""
    from trimtab.config import fields
    from trimtab.planning.quick_config import QuickConfig

    group = parser.add_argument_group("without a file", "what is left out takes the method's own default")
    for key, kind, text, default in fields(QuickConfig):
        if key not in OURS:
            shown = "" if default in (..., None, "", [], {}) else f" (default {default})"
            metavar = kind if "|" in kind else kind.upper()
            group.add_argument(f"--{key}", metavar=metavar, help=(text + shown).replace("%", "%%"))
    whose = "METHOD" if methods.startswith("-") or methods == "all" or "," in methods else methods
    parser.epilog = f"With a file, every option of trimtab {whose} (trimtab {whose} --help) may follow it."
    parser.print_help()
    raise SystemExit(0)
