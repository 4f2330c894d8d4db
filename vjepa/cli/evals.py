"""The verbs `vjepa eval NAME MODEL DATA`, with a verb for each entry of `vjepa.evals.registry`.

The options of an evaluation are the fields of its settings class, and the docstrings of the fields are their help. A
field can also be given as a setting (name=value). So a new evaluation needs no code here.
"""

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from vjepa.cli.app import SETTINGS_HINT, Overwrite, Part, Settings, Several, next_in_help, verb_group
from vjepa.evals.registry import EVALUATIONS

EVAL = verb_group("eval", "Evaluate frozen features.")


def declare(name: str) -> None:
    """Declare the verb of an evaluation of the registry. Its settings class is imported when the verb is used."""
    summary = EVALUATIONS[name].summary
    text = f"{summary[0].upper()}{summary[1:]}."
    EVAL.command(f"{__name__}:{name}", name=name, help=text, sort_key=next_in_help())


for _name in EVALUATIONS:
    declare(_name)


def __getattr__(name: str) -> App:
    """Make the command of an evaluation when cyclopts asks this module for it: its settings class imports torch."""
    if name not in EVALUATIONS:
        raise AttributeError(name)
    from vjepa.evals.shell import settings_class

    def run(model: Path, data: Path, /, **arguments: Any) -> None:
        evaluate(name, model, data, **arguments)

    fields = settings_class(name).model_fields
    shared = [parameter for parameter in inspect.signature(evaluate).parameters.values() if is_shown(parameter, name)]
    run.__signature__ = inspect.Signature([*shared, *make_options(settings_class(name))])  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {}
    required = "".join(f"--{field} {field.upper()} " for field in fields if fields[field].is_required())
    example = f"Example: vjepa eval {name} model corpus {required}--out {name}.json"
    app = App(name=name, help_epilogue=f"{SETTINGS_HINT}{example}", version_flags=())
    app.default(run)
    return app


def is_shown(parameter: inspect.Parameter, name: str) -> bool:
    """Return whether a parameter of `evaluate` is an argument of the evaluation's verb."""
    return parameter.name not in ("name", "options") and (parameter.name != "query" or name == "knn")


def make_options(settings: type[Any]) -> list[inspect.Parameter]:
    """Make an option for each field of a settings class. Its values stay words, which the class itself converts."""
    from docstring_parser import parse_from_object

    classes = [base for base in reversed(settings.__mro__) if base.__module__.split(".")[0] != "pydantic"]
    texts = {text.arg_name: text.description for base in classes[1:] for text in parse_from_object(base).params}
    options = []
    for name, field in settings.model_fields.items():
        type_text = getattr(field.annotation, "__name__", str(field.annotation))
        default = "" if field.is_required() or field.default is None or field.default is False else field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        parameter = Parameter(
            help=" ".join((texts.get(name) or "").split()) + (" Required." if field.is_required() else ""),
            show_default=(lambda value, shown=shown: shown) if shown else False,
            metavar=next((word for word in ("int", "float") if word in type_text), "str").upper(),
        )
        if field.annotation is bool:
            words, missing = Annotated[bool, parameter], False
        else:
            words = tuple[str, ...] if "tuple" in str(field.annotation) else str
            words, missing = Annotated[words | None, Several, parameter], None
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=missing, annotation=words))
    return options


def evaluate(
    name: str,
    model: Annotated[Path, Parameter(help="A run, a checkpoint, or an export.")],
    data: Annotated[Path, Parameter(help="A corpus, whose samples carry labels if the evaluation reads labels.")],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="File for the result.")] = None,
    part: Part = "target",
    overwrite: Overwrite = False,
    wandb: Annotated[bool, Parameter(help="Add the scores to the record of the run at W&B.")] = False,
    query: Annotated[Path | None, Parameter(help="Write a page of the clips most similar to this video.")] = None,
    settings: Settings,
    **options: Any,
) -> None:
    """Run an evaluation and print its scores."""
    from vjepa.evals.results import format_table
    from vjepa.evals.shell import run_evaluation, settings_class
    from vjepa_data.config_files import load_settings
    from vjepa_data.errors import BadInput

    if query is not None:
        from vjepa.evals.nearest import nearest_page

        if out is None or "label" in options:
            raise BadInput("--query needs --out page.html, and excludes --label")
        split = options.get("split", "val")
        for clip in nearest_page(
            model, data, query, out, split=split, short=options.get("short"), part=part, overwrite=overwrite
        ):
            print(f"{clip.cosine:.3f}  {clip.key}")
        return
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None and value is not False]
    loaded = load_settings(settings_class(name), None, [*given, *settings]).settings
    print(format_table(run_evaluation(name, model, data, loaded, out=out, part=part, overwrite=overwrite, wandb=wandb)))
