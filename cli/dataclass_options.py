"""Options of a command declared once: as the annotated fields of a dataclass."""

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, fields
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo


def takes_options(options: type) -> Callable[[Callable], Callable]:
    """Decorator: give a command one option for each annotated field of the dataclass `options`.

        @dataclass(frozen=True, kw_only=True)
        class ModelOptions:
            panel = "Model"
            layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 6

        @takes_options(ModelOptions)
        def train(options: ModelOptions, written: frozenset[str]) -> None: ...

    The command receives the values as `options`. A command with a parameter `written` also receives
    the names of the fields that the user wrote on the command line, with their default or not. Its
    other parameters stay its own. Typer reads the signature that is set here.
    """

    def decorate(command: Callable) -> Callable:
        own = dict(inspect.signature(command).parameters)
        del own["options"]
        pass_written = own.pop("written", None) is not None
        declared = {p.name: p for p in _parameters(options)}

        @wraps(command)
        def call(ctx: typer.Context, **values: Any) -> Any:
            given = {name: values.pop(name) for name in declared}
            made = options(**_as_fields(options, given))
            if pass_written:
                values["written"] = frozenset(n for n in declared if _is_written(ctx, n))
            return command(options=made, **values)

        context = inspect.Parameter("ctx", _KEYWORD, annotation=typer.Context)
        parameters = [context, *declared.values(), *(_keyword(p) for p in own.values())]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _keyword(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(kind=_KEYWORD)


def _parameters(options: type) -> Iterator[inspect.Parameter]:
    """Yield a parameter for each field with a `typer.Option`; base classes come first."""
    hints = get_type_hints(options, include_extras=True)
    for f in fields(options):
        annotation, *more = get_args(hints[f.name]) or [None]
        declaration = next((m for m in more if isinstance(m, OptionInfo)), None)
        if declaration is None:
            continue
        declaration = copy(declaration)
        declaration.rich_help_panel = _panel(options, f.name)
        default = f.default
        if _is_repeatable(annotation):
            annotation = list[str] | None
            default = None
        assert default is not MISSING, f"option {f.name} has no default"
        shown = Annotated[annotation, declaration]  # type: ignore[valid-type]
        yield inspect.Parameter(f.name, _KEYWORD, default=default, annotation=shown)


def _panel(options: type, name: str) -> str | None:
    """Return the help panel of the class that declares the field."""
    owner = next(c for c in options.__mro__ if name in inspect.get_annotations(c))
    return vars(owner).get("panel")


def _is_repeatable(annotation: Any) -> bool:
    """Whether the field is a `tuple[str, ...]`: an option that may be written several times."""
    return get_origin(annotation) is tuple


def _as_fields(options: type, values: dict[str, Any]) -> dict[str, Any]:
    """Turn the lists of repeatable options into tuples."""
    repeatable = {n for n, kind in get_type_hints(options).items() if _is_repeatable(kind)}
    return {n: tuple(v or ()) if n in repeatable else v for n, v in values.items()}


def _is_written(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
