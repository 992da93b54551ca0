"""`lossk completion`: a script by which bash or zsh completes commands, options, choices and files."""

from __future__ import annotations

import argparse
import shlex

HEAD = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}
SCRIPT = """{head}_lossk() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    case "${{COMP_WORDS[1]}} $before" in
{choices}
    esac
    if [ -z "$words" ] && [ "$COMP_CWORD" -gt 1 ]; then
        case "$word" in -*) case "${{COMP_WORDS[1]}}" in
{options}
        esac ;; esac
    elif [ "$COMP_CWORD" -eq 1 ]; then
        words={commands}
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _lossk lossk
"""


def run_completion(options: argparse.Namespace) -> None:
    from lossk.cli.main import build_parser

    print(script(build_parser(), options.shell), end="")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script; where it knows no word the shell completes the name of a file."""
    commands = commands_of(parser)
    options, choices = [], []
    for name, command in commands.items():
        words = [text for action in command._actions for text in action.option_strings if text.startswith("--")]
        options.append(f"        {name}) words={shlex.quote(' '.join(words))} ;;")
        for action in command._actions:
            if action.choices:
                before = [f'"{name} {text}"' for text in action.option_strings or [name]]
                choices.append(f"    {'|'.join(before)}) words={shlex.quote(' '.join(action.choices))} ;;")
    return SCRIPT.format(
        head=HEAD[shell],
        choices="\n".join(choices),
        options="\n".join(options),
        commands=shlex.quote(" ".join(commands)),
    )


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(subparsers.choices)
