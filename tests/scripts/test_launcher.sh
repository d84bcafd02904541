#!/usr/bin/env bash
# The launcher: what it adds to a call, and what it says when something is wrong.
set -u
root=${MOELAB_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
preset=${MOELAB_PRESET:-release}
build=${MOELAB_BUILD:-$root/build/$preset}
status=0
scratch=$(mktemp -d) || exit 1
chmod 755 "$scratch"
trap 'rm -rf "$scratch"' EXIT

result() { # result NAME CONDITION-STATUS DETAIL
  if (($2 == 0)); then echo "ok $1"; else echo "not ok $1: $3"; status=1; fi
}

# The median of 15 calls, in microseconds of this shell's clock.
median_us() {
  local i begin times=()
  for ((i = 0; i < 15; i++)); do
    begin=${EPOCHREALTIME/./}
    "$@" > /dev/null 2>&1 < /dev/null
    times+=($((${EPOCHREALTIME/./} - begin)))
  done
  printf '%s\n' "${times[@]}" | sort -n | sed -n 8p
}

# A tree of its own with a binary that does nothing: the launcher's own time, whatever moelab's is. The sources are the real ones,
# because looking at their times is most of the work.
own_time() {
  local tree=$scratch/tree us limit_us=50000
  mkdir -p "$tree/build/release/bin" "$tree/build/venv"
  cp -r "$root"/{moelab,core,lua,shell,configs,cmake,CMakeLists.txt,CMakePresets.json} "$tree/"
  printf '#!/bin/sh\n' > "$tree/build/release/bin/moelab"
  chmod +x "$tree/build/release/bin/moelab"
  touch "$tree/build/venv/.moelab_installed" "$tree/build/release/.moelab_built"
  local nvcc
  nvcc=$(type -P nvcc) || { nvcc=""; [[ -x /usr/local/cuda/bin/nvcc ]] && nvcc=/usr/local/cuda/bin/nvcc; }
  printf '%s|venv|%s|OFF\n' "$tree" "$nvcc" > "$tree/build/release/.moelab_built"
  us=$(($(median_us env -u MOELAB_TORCH_DIR MOELAB_PRESET=release "$tree/moelab") - $(median_us env "$tree/build/release/bin/moelab")))
  # A busy machine is no reason to fail: three times the promise.
  result "a second call adds $((us / 1000)).$((us % 1000 / 100)) ms, promised are under 50 ms" $((us > 3 * limit_us)) "got $us us, want at most $limit_us us (three times that on a busy machine)"

  # From a file that is newer than the stamp on, it must build.
  sleep 0.01
  touch "$tree/core/CMakeLists.txt"
  local text
  text=$(env -u MOELAB_TORCH_DIR PATH="$scratch/bin" MOELAB_PRESET=release /bin/bash "$tree/moelab" 2>&1 < /dev/null)
  result "a changed source is noticed" $((${#text} == 0)) "got no output, want a build"
}

unknown_preset() {
  local text code
  text=$("$root/moelab" --preset relaese 2>&1)
  code=$?
  [[ $code == 2 && $text == *'got "relaese"'* && $text == *release* ]]
  result "an unknown preset is named with those that exist, exit code 2" $? "got code $code, \"$text\""
  text=$("$root/moelab" --preset 2>&1)
  code=$?
  [[ $code == 2 ]]
  result "--preset without a name is wrong usage" $? "got code $code, \"$text\""
  text=$("$root/moelab" test --al 2>&1)
  code=$?
  [[ $code == 2 && $text == *--al* ]]
  result "an unknown option of test is named, exit code 2" $? "got code $code, \"$text\""
}

# As a user without sudo on a machine without our packages: a package list with one that no machine has.
without_root() {
  if ((EUID != 0)) || ! type -P setpriv apt-get dpkg-query > /dev/null; then
    echo "ok without root # skip needs root, setpriv and apt-get"
    return
  fi
  local tree=$scratch/bare text code
  mkdir -p "$tree/build"
  cp -r "$root"/{moelab,cmake,CMakeLists.txt,CMakePresets.json} "$tree/"
  echo "moelab-no-such-package | cmd moelab-no-such-command | a test" >> "$tree/cmake/packages.txt"
  chown -R nobody "$tree"
  text=$(cd / && setpriv --reuid nobody --clear-groups env -u MOELAB_TORCH_DIR -u CI "$tree/moelab" --yes 2>&1 < /dev/null)
  code=$?
  [[ $code == 1 && $text == *'system packages: '*moelab-no-such-package* && $text == *'apt-get install -y '*moelab-no-such-package* && $text == *root* ]]
  result "without root: what is missing and the command that installs it, exit code 1" $? "got code $code, \"$text\""
  text=$(cd / && env -u MOELAB_TORCH_DIR -u CI "$tree/moelab" 2>&1 < /dev/null)
  code=$?
  [[ $code == 1 && $text == *'--yes'* ]]
  result "without a terminal and without --yes nothing is installed" $? "got code $code, \"$text\""
  rm -f "$tree/build/.lock"
  chmod a-w "$tree" "$tree/build"
  text=$(cd / && setpriv --reuid nobody --clear-groups env MOELAB_TORCH_DIR=/nowhere "$tree/moelab" 2>&1 < /dev/null)
  code=$?
  chmod u+w "$tree" "$tree/build"
  [[ $code == 1 && $text == *'cannot be written'* ]]
  result "a tree that cannot be written is named" $? "got code $code, \"$text\""
  sed -i '/moelab-no-such/d' "$tree/cmake/packages.txt"
  text=$(cd / && env MOELAB_TORCH_DIR=/nowhere "$tree/moelab" --yes 2>&1 < /dev/null)
  code=$?
  [[ $code == 1 && $text == *'MOELAB_TORCH_DIR="/nowhere"'* ]]
  result "a wrong MOELAB_TORCH_DIR is named" $? "got code $code, \"$text\""
}

# pip with a wrong hash: a tree whose requirements pin a wheel of this test's own making to another hash.
hash_mismatch() {
  local tree=$scratch/hash text code
  type -P python3 > /dev/null || { echo "ok a wrong hash # skip no python3"; return; }
  mkdir -p "$tree/wheels"
  cp -r "$root"/{moelab,cmake,CMakeLists.txt,CMakePresets.json} "$tree/"
  python3 - "$tree/wheels" << 'END'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1] + "/moelab_dummy-1.0-py3-none-any.whl", "w") as z:
    z.writestr("moelab_dummy.py", "")
    z.writestr("moelab_dummy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: moelab-dummy\nVersion: 1.0\n")
    z.writestr("moelab_dummy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    z.writestr("moelab_dummy-1.0.dist-info/RECORD", "")
END
  printf 'moelab-dummy==1.0 --hash=sha256:%064d\n' 0 > "$tree/cmake/requirements.txt"
  : > "$tree/cmake/requirements_cuda.txt"
  : > "$tree/cmake/requirements_headers.txt"
  text=$(cd / && env -u MOELAB_TORCH_DIR PIP_NO_INDEX=1 PIP_FIND_LINKS="$tree/wheels" "$tree/moelab" --yes 2>&1 < /dev/null)
  code=$?
  if [[ $text == *"no Python with the venv module"* || $text == *"disk is too full"* ]]; then
    echo "ok a wrong hash # skip ${text##*moelab: }"
    return
  fi
  [[ $code == 1 && $text == *'hash mismatch'* && ! -f $tree/build/venv/.moelab_installed ]]
  result "a wheel with another hash is refused" $? "got code $code, \"$text\""
}

# A script that ends well before its first case has shown nothing.
no_case() {
  local counted
  counted=$(
    source "$root/cmake/launcher/test.sh"
    title() { :; }
    root=$scratch reports=$scratch all=0 time_limit_secs=5 passed=0 failed=0 skipped=0 failures=()
    run_file silent true > /dev/null
    run_file speaking echo "ok a case" > /dev/null
    echo "$passed $failed ${failures[*]}"
  )
  [[ $counted == "1 1 silent: "*case* ]]
  result "a script without a case has failed" $? "got \"$counted\""
}

mkdir -p "$scratch/bin"
no_case
own_time
unknown_preset
without_root
hash_mismatch
exit $status
