"""The command line: commands/ has one file for each command."""

try:
    import typer

    from .commands import COMMANDS
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"pefast: the command line needs {missing.name}; `pip install 'pefast[train]'` brings it, "
        "and `python -m pefast.doctor` works without it"
    ) from None

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune transformers at the cost of the frozen model.",
)
for command in COMMANDS:
    app.command(epilog=getattr(command, "epilog", None))(command)


def main() -> None:
    """The `pefast` command."""
    app()


if __name__ == "__main__":
    main()
