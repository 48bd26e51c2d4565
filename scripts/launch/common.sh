# shellcheck shell=bash disable=SC2034
# To be sourced by the launchers: options, quoting, running or printing.
#
# A launcher's own options come first and look like --name=value or --name; the first other word is
# a command of the library (train, eval, ...), and everything after it goes to that command
# untouched.
#
# What a command's exit code means here: 0 done; 2 a configuration that cannot run, never tried
# again; anything else (75: told to stop, after saving) is worth another try, which resumes from the
# latest checkpoint of MODEL_DIR.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
DRY_RUN=0
BAD_CONFIGURATION=2

# Prints words so that a shell reads back exactly these words.
quoted() {
    local word out="" quote="'\\''"
    for word in "$@"; do
        if [[ ! "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
            word="'${word//\'/$quote}'"
        fi
        out+="${out:+ }$word"
    done
    printf '%s\n' "$out"
}

# Runs words, or prints them with --dry_run.
run() {
    if ((DRY_RUN)); then
        quoted "$@"
    else
        "$@"
    fi
}

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

die() {
    say "$@"
    exit "$BAD_CONFIGURATION"
}

# parse_options "known names" "$@": sets OPTION_<name> for each of the launcher's own options,
# COMMAND and ARGUMENTS (an array).
parse_options() {
    local known=" $1 dry_run help " name value
    shift
    while (($#)) && [[ "$1" == --* ]]; do
        name="${1#--}"
        value="${name#*=}"
        [[ "$name" == *=* ]] || value=1
        name="${name%%=*}"
        [[ "$known" == *" $name "* ]] || die "no option --$name; there are:${known% }. The command's own flags come after its name: $(basename "$0") [options] train [flags]"
        printf -v "OPTION_$name" '%s' "$value"
        shift
    done
    if [[ -n "${OPTION_help:-}" ]]; then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit 0
    fi
    DRY_RUN="${OPTION_dry_run:-0}"
    (($#)) || die "name a command of the library, e.g. $(basename "$0") [options] train --gin_file=...; --help says more"
    COMMAND="$1"
    shift
    ARGUMENTS=("$@")
    [[ -f "$ROOT/upcycle_jax/$COMMAND.py" ]] || die "there is no command $COMMAND: $ROOT/upcycle_jax/$COMMAND.py does not exist"
}

# require NAME...: stops unless each option was given.
require() {
    local name variable
    for name in "$@"; do
        variable="OPTION_$name"
        [[ -n "${!variable:-}" ]] || die "--$name=... is needed; --help says what it is"
    done
}
