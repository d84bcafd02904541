#!/usr/bin/env bash
# The interactive prompt, typed at in a pseudo-terminal (tests/shell/prompt.py; needs a Python 3 with its standard library alone).
set -u
root=${MOELAB_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
build=${MOELAB_BUILD:-$root/build/release}
python=$(type -P python3) || { echo "ok the prompt # skip no python3"; exit 77; }
[[ -x $build/bin/moelab ]] || { echo "not ok the prompt: $build/bin/moelab was not built"; exit 1; }
exec "$python" "$root/tests/shell/prompt.py" "$build/bin/moelab" "$@"
