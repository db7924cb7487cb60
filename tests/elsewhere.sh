#!/usr/bin/env bash
# The tests as a stranger's machine may run them: in random order, in the background (SIGINT ignored), without a
# terminal, with a home that cannot be written, umask 077, the C locale and a clock of another day; where this is root, as
# another user in a copy of the tree.    tests/elsewhere.sh [PYTEST ARGUMENTS]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
git clone --quiet "$root" "$place/tree"
mkdir "$place/home" "$place/tmp"
chmod 755 "$place"
as=()
if [ "$(id -u)" = 0 ]; then
    as=(setpriv --reuid=65534 --regid=65534 --clear-groups)
    chown -R 65534:65534 "$place/tree" "$place/tmp"
    if ! "${as[@]}" "$python" -c '' 2>/dev/null; then
        echo "elsewhere: another user cannot run $(readlink -f "$python"), so everything runs as root" >&2
        as=()
    fi
fi
chmod 555 "$place/home"
tree=$place/tree
cd "$tree"
umask 077
trap '' INT
set +e
"${as[@]}" env -i PATH="$root/.venv/bin:/usr/bin:/bin" PYTHONPATH="$tree:$tree/export:$tree/runtime" HOME="$place/home" \
    TMPDIR="$place/tmp" LC_ALL=C TERM=dumb TZ=Pacific/Kiritimati MUJOCO_GL="${MUJOCO_GL:-egl}" \
    "$python" -m pytest -o addopts="--import-mode=importlib -ra -m 'not integration'" -p no:cacheprovider -n auto --dist loadfile "$@" </dev/null
