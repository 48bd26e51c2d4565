# To be sourced: make_venv EXTRAS makes $VENV (default .venv of the checkout) if absent and installs
# the project into it. The installation is repeated only when the requirements, the extras or the
# interpreter have changed.

VENV="${VENV:-$root/.venv}"
[[ "$VENV" = /* ]] || VENV="$PWD/$VENV"
# XLA's CPU backend takes and gives back large buffers in every step. In huge pages (glibc 2.35 or
# newer), and kept by the allocator instead of given back to the system, that costs far fewer page
# faults: docs/benchmarks.md has the difference.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1}"

make_venv() {
    local extras="$1" python="${PYTHON:-python3}" stamp wanted
    if [ ! -x "$VENV/bin/python" ]; then
        command -v "$python" >/dev/null || { echo "no $python: install Python 3.11 or newer (apt-get install python3 python3-venv), or set PYTHON" >&2; return 1; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$("$python" --version) is too old: Python 3.11 or newer is needed; set PYTHON" >&2; return 1; }
        "$python" -c 'import ensurepip, venv' 2>/dev/null || { echo "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; return 1; }
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    stamp="$VENV/upcycle_jax.$extras"
    wanted="$(cat "$root/setup.py" "$root/pyproject.toml" | cksum) $root"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing upcycle_jax[$extras] into $VENV (a few minutes the first time)"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}"
        echo "$wanted" >"$stamp"
    fi
}
