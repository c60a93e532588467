"""The application: its commands, and how errors are shown."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from typer.core import TyperGroup

from graft.cli import compare, convert, evaluate, fit, generate, inspect, merge, methods, quickstart, show


class _OneSentence(TyperGroup):
    """Prints a user's mistake as its one sentence, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        from graft.core.errors import GraftError, ToldElsewhere

        try:
            with show.long_work():
                return super().invoke(ctx)
        except GraftError as error:
            if not isinstance(error, ToldElsewhere):
                print(f"graft: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("graft: stopped; `graft fit` goes on with --resume, `graft compare` with the same command.", file=sys.stderr)
            raise SystemExit(130) from None


app = typer.Typer(
    cls=_OneSentence, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Adapt pretrained models: every method as a small composable piece. Start with: graft quickstart",
)  # fmt: skip
for name, command in (
    ("quickstart", quickstart.quickstart), ("methods", methods.methods), ("fit", fit.fit), ("compare", compare.compare), ("eval", evaluate.evaluate),
    ("generate", generate.generate), ("merge", merge.merge), ("convert", convert.convert), ("inspect", inspect.inspect),
):  # fmt: skip
    app.command(name, no_args_is_help=name not in ("quickstart", "methods"))(command)
