"""Completion of what is typed behind `mnist-exp`, in bash, zsh and fish.

A shell's script hands over the line as far as the cursor and gets the candidates, one a line, each
with its description behind a tab. What can stand where is read from the verbs' own parsers: the
metavar of an argument says what it is.
"""

import argparse
import contextlib
import shlex
from collections import Counter
from collections.abc import Sequence

from mnist_exp.cli.commands import HYDRAS_OWN, VERBS, Verb
from mnist_exp.errors import ConfigError

FILES = ":files"  # instead of candidates: the shell is to complete the name of a file
OFFERED = 50  # runs
# metavar -> is it a sweep
_KINDS = {"RUN": False, "SWEEP": True, "RUN_OR_SWEEP": None, "RUN_OR_FOLDER": None}

Candidates = list[tuple[str, str]]  # with their descriptions


def answer(shell: str, line: str, breaks: str = "") -> list[str]:
    """What a shell's script is told. `breaks`: where bash divides words (its COMP_WORDBREAKS)."""
    words, quoted = _split(line)
    if len(words) < 2:
        return []
    found = candidates(words[1:])
    if shell != "bash" or found == [FILES]:
        return found
    # bash replaces only what stands behind the last break, and shows no descriptions
    cut = 0 if quoted else 1 + max(words[-1].rfind(sign) for sign in breaks or " ")
    return [text.partition("\t")[0][cut:] for text in found]


def _split(line: str) -> tuple[list[str], bool]:
    """The words of a line that ends at the cursor; whether the last one stands in quotes."""
    for quote in ("", "'", '"'):
        with contextlib.suppress(ValueError):  # a quote is still open
            *words, last = shlex.split(f"{line}x{quote}")  # x: behind a blank, a word begins
            return [*words, last[:-1]], bool(quote)
    return [], False


def candidates(words: Sequence[str]) -> list[str]:
    """For the last one of the words, which may be empty, behind those before it."""
    *before, word = words
    found: Candidates = []
    files = False
    if not before:
        found = [(verb.name, verb.summary) for verb in VERBS.values()]
        found += [("--help", ""), ("--version", "")] if word.startswith("-") else []
    elif before[0] in VERBS:
        found, files = _arguments(VERBS[before[0]], before[1:], word)
    fitting = [f"{text}\t{said}" if said else text for text, said in found if text.startswith(word)]
    return fitting or [FILES] * files


def _arguments(verb: Verb, before: Sequence[str], word: str) -> tuple[Candidates, bool]:
    """What can stand there, and whether it can be a file."""
    actions = _actions(verb)
    options = {name: action for action in actions for name in action.option_strings}
    values: dict[str, str] = {}  # of the options
    places: list[str] = []  # the other words
    waits: argparse.Action | None = None  # an option whose value comes next
    for typed in before:
        if waits is not None:
            values[waits.dest], waits = typed, None
        elif not typed.startswith("-"):
            places.append(typed)
        elif typed in options and options[typed].nargs is None:
            waits = options[typed]
    if waits is not None:
        return _choices(waits), _takes_files(waits, word)
    name, equals, _ = word.partition("=")
    if equals and name in options:
        choices = [(f"{name}={value}", "") for value, _ in _choices(options[name])]
        return choices, _takes_files(options[name], word)
    if word.startswith("-"):
        shown = [a for a in actions if a.help != argparse.SUPPRESS]
        return [(o, _line(a.help)) for a in shown for o in a.option_strings if o[:2] == "--"], False
    return _positional([a for a in actions if not a.option_strings], places, values, word)


def _positional(
    arguments: Sequence[argparse.Action], before: Sequence[str], values: dict[str, str], word: str
) -> tuple[Candidates, bool]:
    if not arguments:
        return [], False
    place = min(sum("=" not in typed for typed in before), len(arguments) - 1)
    if arguments[place].nargs == "?" and ("=" in word or "." in word):  # it was left out
        place += 1
    argument = arguments[place]
    overrides = [typed for typed in before if "=" in typed or typed.startswith("~")]
    if argument.metavar == "OVERRIDE":
        found = _overrides(word, overrides, values)
    elif argument.metavar in _KINDS:
        found = _runs(_KINDS[argument.metavar], overrides)
    else:
        found = _choices(argument)
    return found, _takes_files(argument, word)


def _choices(action: argparse.Action) -> Candidates:
    return [(value, "") for value in action.choices or ()]


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _actions(verb: Verb) -> list[argparse.Action]:
    actions = verb.parser()._actions
    if verb.name != "train":
        return actions
    from mnist_exp.config.hydra_adapter import hydra_flags

    # -h is known already; Hydra's own completion knows nothing of what is above
    more = {*HYDRAS_OWN} - {"--help", "-h", "--shell-completion", "-sc"}
    return actions + [a for a in hydra_flags()._actions if more & {*a.option_strings}]


def _takes_files(action: argparse.Action, word: str) -> bool:
    if action.metavar == "OVERRIDE":
        return "=" in word
    is_hydras = action.dest == "config_path"
    return is_hydras or action.metavar in ("FILE", "FOLDER", "IMAGE", "RUN_OR_FOLDER")


def _overrides(word: str, others: Sequence[str], values: dict[str, str]) -> Candidates:
    from mnist_exp.config.candidates import candidates as override_candidates

    config_name, config_dir = values.get("config_name", "config"), values.get("config_dir")
    return [(text, "") for text in override_candidates(word, others, config_name, config_dir)]


def _runs(sweep: bool | None, overrides: Sequence[str]) -> Candidates:
    from mnist_exp.config import paths
    from mnist_exp.config.compose import compose
    from mnist_exp.tracking import store as tracking

    try:
        asked = compose([o for o in overrides if o.startswith("tracking.")])
        uri = tracking.store_uri(asked.tracking.uri, paths.output_root())
        tracking.check_store(uri)
    except ConfigError:
        return []
    runs = tracking.list_runs(uri, sweep)
    alike = Counter(run_id[:8] for run_id, _ in runs)
    short = [(r[:8] if alike[r[:8]] == 1 else r, name) for r, name in runs[:OFFERED]]
    return [("last", "the newest"), *short] if short else []


# The line is what all three can tell; what one of them says goes nowhere, as somebody is typing.
SCRIPTS = {
    "bash": r"""
_mnist_exp() {
    local candidate
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("$candidate")
    done < <("${1/#\~/$HOME}" completion bash --breaks "$COMP_WORDBREAKS" \
        --line "${COMP_LINE:0:COMP_POINT}" 2>/dev/null </dev/null)
    case ${COMPREPLY[0]-} in
        :files) COMPREPLY=(); compopt -o default ;;
        *[=./]) compopt -o nospace ;;
    esac
}
complete -o nosort -F _mnist_exp mnist-exp
""",
    "zsh": r"""
_mnist_exp() {
    local line text
    local -a found texts shown how
    found=(${(f)"$(${~${(Q)words[1]}} completion zsh \
        --line "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null </dev/null)"})
    if [[ $found == :files ]]; then
        compset -P '*='
        _files
        return
    fi
    texts=(${found%%$'\t'*})
    local -i width=${#${(O@)texts//?/x}[1]}
    for line in $found; do
        text=${line%%$'\t'*} how=()
        if [[ $line == *$'\t'* ]]; then
            shown=("${(r:width:)text}  -- ${line#*$'\t'}")
            shown=(${shown[1][1,COLUMNS-1]})
            how=(-l -d shown)
        fi
        [[ $text == *[=./] ]] && how+=(-S '')
        compadd -V mnist-exp "${how[@]}" -- "$text"
    done
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
compdef _mnist_exp mnist-exp
""",
    "fish": r"""
function __mnist_exp
    set -l words (commandline -opc)
    set -l program (string replace -r '^~' $HOME -- $words[1])
    set -l found ($program completion fish --line (commandline -cp) 2>/dev/null </dev/null)
    if test "$found" = :files
        set -l word (commandline -ct | string unescape)
        set -l key (string match -r '^[^/]*=' -- $word)
        set -l path (string replace -- "$key" '' $word)
        string join \n -- "$key"(__fish_complete_path "$path")
    else
        string join \n -- $found
    end
end
complete -c mnist-exp -k -f -a '(__mnist_exp)'
""",
}
