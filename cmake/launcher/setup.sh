# The launcher's slow path: system packages, the virtual environment with LibTorch and DeepGEMM's headers, configuring, building.
# Sourced by ./moelab, which sets root, build, preset, key, nvcc, assume_yes.

python_wanted="3.11 or 3.12"
torch_wanted=2.11.0

# All messages go to stderr, so that a program's own output stays alone on stdout.
say() { printf '%s\n' "$*" >&2; }
fail() {
  say "moelab: $1"
  shift
  local line
  for line in "$@"; do say "  $line"; done
  exit 1
}

# set_up_and_build TARGET: everything that is missing, then ninja TARGET; returns when build/<preset> is ready.
set_up_and_build() {
  check_preset
  mkdir -p "$root/build" 2> /dev/null || fail "the folder $root/build cannot be written." "Make $root writable, or copy it to a place of your own."
  touch "$root/build/.lock" 2> /dev/null || fail "the folder $root/build cannot be written." "Make it writable, or copy the whole tree to a place of your own."
  exec 9> "$root/build/.lock"
  if ! flock -n 9; then
    say "moelab: another ./moelab is building here; waiting for it."
    flock 9
    # The other one may have done everything.
    [[ $1 == product ]] && is_built && { exec 9>&-; return 0; }
  fi
  install_missing
  configure
  local status=0
  build_target "$1" || status=$?
  exec 9>&-
  return $status
}

check_preset() {
  local names
  names=$(sed -n 's/.*"name": *"\([a-z0-9_]*\)".*/\1/p' "$root/CMakePresets.json" | grep -vx base | tr '\n' ' ')
  if [[ " $names" != *" $preset "* || -z $preset ]]; then
    say "moelab: unknown preset: got \"$preset\", want one of: $names"
    exit 2
  fi
}

# ---- what is missing -------------------------------------------------------------------------------------------------

# Lines of packages.txt as "package|probe", comments and spaces removed.
package_list() { sed -e 's/#.*//' -e '/^[[:space:]]*$/d' -e 's/[[:space:]]*|[[:space:]]*/|/g' "$root/cmake/packages.txt" | cut -d '|' -f 1,2; }

probe() {
  local kind=${1%% *} what=${1#* } one
  if [[ $kind == cmd ]]; then
    type -P "$what" > /dev/null
    return
  fi
  for one in ${what//,/ }; do
    [[ -e /usr/include/$one || -e /usr/local/include/$one ]] && return 0
  done
  return 1
}

# Fills missing_packages.
find_missing_packages() {
  missing_packages=()
  local name how installed=""
  if type -P dpkg-query > /dev/null; then
    installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' 2> /dev/null)
    while IFS='|' read -r name how; do
      [[ $'\n'$installed$'\n' == *$'\n'"$name installed"$'\n'* ]] || missing_packages+=("$name")
    done < <(package_list)
  else
    while IFS='|' read -r name how; do
      probe "$how" || missing_packages+=("$name")
    done < <(package_list)
  fi
}

# The requirement files whose wheels build/venv must hold: LibTorch unless it is installed elsewhere; where nvcc is also its CUDA libraries, and headers
# of packages unless they lie beside that other LibTorch.
requirement_files() {
  [[ -n ${MOELAB_TORCH_DIR:-} ]] || echo requirements.txt
  [[ -n $nvcc ]] || return 0
  [[ -n ${MOELAB_TORCH_DIR:-} ]] || echo requirements_cuda.txt
  [[ -n ${MOELAB_TORCH_DIR:-} ]] && has_headers "${MOELAB_TORCH_DIR%/}/.." || echo requirements_headers.txt
}

# A line for each of them, which changes with the pinned versions.
wanted_requirements() { (cd "$root/cmake" && requirement_files | xargs -r cksum); }

# .moelab_installed holds such lines. One that is missing, as after an update of the project, makes the environment incomplete.
venv_is_ready() {
  local line installed="" wanted
  wanted=$(wanted_requirements)
  [[ -f $root/build/venv/.moelab_installed ]] && installed=$(< "$root/build/venv/.moelab_installed")
  while read -r line; do
    [[ -z $line || $'\n'$installed$'\n' == *$'\n'"$line"$'\n'* ]] || return 1
  done <<< "$wanted"
  [[ -n ${MOELAB_TORCH_DIR:-} ]] || compgen -G "$root/build/venv/lib/python3*/site-packages/torch/version.py" > /dev/null
}

# Whether LibTorch itself need not be fetched.
has_torch() { [[ -n ${MOELAB_TORCH_DIR:-} ]] || compgen -G "$root/build/venv/lib/python3*/site-packages/torch-$torch_wanted*" > /dev/null; }

# What is missing of the environment, for the user.
venv_needs() {
  local size="0.6 GB to fetch, 2 GB on disk"
  [[ -n $nvcc ]] && size="2.5 GB to fetch with the CUDA libraries and DeepGEMM's headers, 5 GB on disk"
  if has_torch; then echo "pinned wheels beside LibTorch (DeepGEMM's headers: 5 MB to fetch, 33 MB on disk)"; else echo "LibTorch $torch_wanted ($size)"; fi
}

install_missing() {
  find_missing_packages
  local need_venv=0
  [[ -z ${MOELAB_TORCH_DIR:-} ]] || torch_dir > /dev/null || exit 1
  venv_is_ready || need_venv=1
  if ((${#missing_packages[@]} + need_venv == 0)); then
    check_tools
    return
  fi
  say "moelab: not set up here yet. Missing:"
  ((${#missing_packages[@]})) && say "  system packages: ${missing_packages[*]}"
  ((need_venv)) && say "  in build/venv, checked by hash: $(venv_needs)"
  ((${#missing_packages[@]})) && require_installer
  if ((!assume_yes)); then
    [[ -t 0 ]] || fail "nobody to ask: this is not a terminal." "Run ./moelab --yes to install what is missing."
    local answer
    read -r -p "Install now? [Y/n] " answer
    [[ -z $answer || $answer == [yY]* ]] || exit 1
  fi
  ((${#missing_packages[@]})) && install_packages
  check_tools
  ((need_venv)) && install_venv
  return 0
}

# Ends with the exact command where this user cannot install packages. Sets as_root.
require_installer() {
  local install="apt-get update && apt-get install -y ${missing_packages[*]}"
  as_root=()
  type -P apt-get > /dev/null || fail "this machine has no apt-get. Install the equivalents of:" "${missing_packages[*]}" "then run ./moelab again."
  ((EUID == 0)) && return
  if type -P sudo > /dev/null && { [[ -t 0 ]] || sudo -n true 2> /dev/null; }; then
    as_root=(sudo)
    return
  fi
  fail "installing packages needs root, and sudo is not available. Ask somebody who has it to run:" "$install" "then run ./moelab again (LibTorch itself needs no root)."
}

check_tools() {
  local version
  version=$(g++ -dumpversion 2> /dev/null) || fail "g++ does not run." "Check that it is in PATH: $PATH"
  ((${version%%.*} >= 12)) || fail "the C++ compiler is too old: got g++ $version, want 12 or newer." "On Ubuntu 22.04: apt-get install g++-12, then make it the default g++ with update-alternatives."
  version=$(cmake --version 2> /dev/null | sed -n '1s/[^0-9]*//p') || fail "cmake does not run."
  [[ $(printf '3.25\n%s\n' "$version" | sort -V | head -1) == 3.25 ]] || fail "cmake is too old: got $version, want 3.25 or newer."
}

# ---- steps -----------------------------------------------------------------------------------------------------------

# step LABEL LOG COMMAND…: runs it with its output in LOG and shows label, time and what progress_<first word> prints.
step() {
  local label=$1 log=$2 start=$SECONDS pid status shown=0 detail
  shift 2
  mkdir -p "${log%/*}"
  "$@" > "$log" 2>&1 < /dev/null 9>&- &
  pid=$!
  trap 'kill $pid 2> /dev/null; wait $pid 2> /dev/null; say ""; exit 130' INT TERM
  [[ -t 2 ]] || say "$label …"
  while kill -0 $pid 2> /dev/null; do
    if [[ -t 2 ]]; then
      detail=$(${progress:-true} "$log")
      printf '\r\033[K%s  %s%d s' "$label" "${detail:+$detail  }" $((SECONDS - start)) >&2
    elif ((SECONDS - start - shown >= 20)); then
      shown=$((SECONDS - start))
      detail=$(${progress:-true} "$log")
      say "  ${detail:+$detail, }$shown s"
    fi
    sleep 0.3
  done
  wait $pid
  status=$?
  trap - INT TERM
  [[ -t 2 ]] && printf '\r\033[K' >&2
  if ((status == 0)); then say "$label: done in $((SECONDS - start)) s"; fi
  return $status
}

install_packages() {
  local log=$root/build/log/apt.log apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o Dpkg::Use-Pty=0)
  [[ ${as_root[*]} == sudo && -t 0 ]] && { sudo -v || exit 1; }
  step "Updating the package lists" "$log" "${apt[@]}" update || fail_log "$log" "apt-get update failed."
  progress=progress_apt step "Installing ${#missing_packages[@]} packages" "$log" "${apt[@]}" install -y --no-install-recommends "${missing_packages[@]}" \
    || fail_log "$log" "apt-get install failed for: ${missing_packages[*]}"
  find_missing_packages
  ((${#missing_packages[@]} == 0)) || fail "still missing after the installation: ${missing_packages[*]}"
}
progress_apt() { printf '%s unpacked, %s set up' "$(grep -c '^Unpacking' "$1")" "$(grep -c '^Setting up' "$1")"; }

# The system's own python3 first: python3-venv belongs to it.
find_python() {
  local candidate
  for candidate in /usr/bin/python3 python3 python3.12 python3.11; do
    "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2> /dev/null && { python=$candidate; return; }
  done
  fail "no Python with the venv module that LibTorch's wheels are pinned for: got $(python3 -V 2>&1), want Python $python_wanted." \
    "Install one (python3.11 and python3.11-venv, for example), or set MOELAB_TORCH_DIR to the torch folder of an installed torch $torch_wanted."
}

install_venv() {
  local venv=$root/build/venv log=$root/build/log/venv.log need_mb=3000 free_mb python name requirements=()
  for name in $(requirement_files); do requirements+=(-r "$root/cmake/$name"); done
  [[ -n $nvcc ]] && need_mb=8000
  has_torch && need_mb=500
  free_mb=$(df -Pm "$root/build" | awk 'NR == 2 { print $4 }')
  ((free_mb >= need_mb)) || fail "the disk is too full for what build/venv holds: got $free_mb MB free in $root/build, want $need_mb MB."
  find_python
  rm -f "$venv/.moelab_installed"
  if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    rm -rf "$venv"
    step "Making build/venv" "$log" "$python" -m venv "$venv" || fail_log "$log" "the virtual environment could not be made with $python."
  fi
  # pip unpacks downloads in TMPDIR; /tmp is often small or in memory.
  mkdir -p "$root/build/tmp"
  progress=progress_venv step "Installing pinned wheels" "$log" env TMPDIR="$root/build/tmp" "$venv/bin/python" -m pip --disable-pip-version-check \
    install --no-deps --require-hashes --only-binary :all: --no-compile "${requirements[@]}" || fail_pip "$log"
  rm -rf "$root/build/tmp"
  wanted_requirements > "$venv/.moelab_installed"
}
progress_venv() { du -sm "$root/build/venv" "$root/build/tmp" 2> /dev/null | awk '{ sum += $1 } END { printf "%d MB", sum }'; }

# The last lines of a log, then the reason.
fail_log() {
  tail -n 15 "$1" | sed 's/^/  | /' >&2
  fail "$2" "The whole output is in ${1#"$root"/}."
}

fail_pip() {
  rm -rf "$root/build/tmp"
  local reason="pip could not install the pinned wheels."
  if grep -q 'DO NOT MATCH THE HASHES' "$1"; then
    reason="a downloaded wheel is not the pinned one (hash mismatch). Nothing of it was installed; check the package index or proxy in use."
  elif grep -q 'No space left on device' "$1"; then
    reason="the disk is full."
  elif grep -qE 'NewConnectionError|NameResolutionError|name resolution|Network is unreachable|ConnectTimeout|ReadTimeout|ProxyError|SSLError' "$1"; then
    reason="the package index cannot be reached: no network, or a proxy that pip does not know (see PIP_INDEX_URL, https_proxy)."
  fi
  fail_log "$1" "$reason"
}

# ---- configure and build ---------------------------------------------------------------------------------------------

torch_dir() {
  local dir=${MOELAB_TORCH_DIR:-}
  [[ -n $dir ]] || dir=$(compgen -G "$root/build/venv/lib/python3*/site-packages/torch" | head -1)
  [[ -f $dir/version.py && -d $dir/include/ATen ]] || fail "LibTorch not found: got MOELAB_TORCH_DIR=\"$dir\", want the folder of an installed torch $torch_wanted (it has include/ and lib/)."
  printf '%s' "$dir"
}

# Whether a folder has the packages of requirements_headers.txt.
has_headers() { [[ -d $1/deep_gemm/include && -f $1/include/cudnn_frontend.h ]]; }

# Beside LibTorch, where pip puts them, or in build/venv. Nothing where no CUDA parts are built.
headers_dir() {
  local dir=${1%/*}
  has_headers "$dir" || dir=$(compgen -G "$root/build/venv/lib/python3*/site-packages" | head -1)
  has_headers "$dir" || dir=
  printf '%s' "$dir"
}

configure() {
  local torch configured="" log=$root/build/log/configure.$preset.log
  [[ -f $build/.moelab_configured ]] && read -r configured < "$build/.moelab_configured"
  if [[ $configured == "$key" && -f $build/build.ninja ]] && { [[ -z $nvcc ]] || grep -q '^MOE_HEADERS_DIR:[A-Z]*=.' "$build/CMakeCache.txt"; }; then return 0; fi
  # A folder that was configured for a tree or a compiler elsewhere cannot be reused.
  if [[ -n $configured && ${configured%|*} != "${key%|*}" ]] || [[ -z $configured && -f $build/CMakeCache.txt ]]; then rm -rf "$build"; fi
  torch=$(torch_dir) || exit 1
  local options=(--preset "$preset" -S "$root" -B "$build" -DMOE_TORCH_DIR="$torch" -DMOE_HEADERS_DIR="$(headers_dir "${torch%/}")")
  [[ $preset == portable ]] || options+=(-DMOE_TESTS="$tests")
  cd "$root" || exit 1
  step "Configuring $preset" "$log" cmake "${options[@]}" || fail_log "$log" "cmake could not configure the $preset preset."
  cd "$here" || exit 1
  printf '%s\n' "$key" > "$build/.moelab_configured"
}

# As many compilers as there are cores and memory for, at 1.5 GB each.
num_jobs() {
  local cores memory
  cores=$(nproc)
  memory=$(awk '/MemAvailable/ { print int($2 / 1500000) }' /proc/meminfo)
  ((memory < 1)) && memory=1
  echo $((memory < cores ? memory : cores))
}

progress_ninja() { tail -c 4000 "$1" | grep -aoE '^\[[0-9]+/[0-9]+\]' | tail -1; }

# build_target TARGET: ninja with a progress line. The stamp takes the time of the start, so that a file saved meanwhile counts
# as changed. With keep_going=1 a failure is returned instead of ending the launcher.
build_target() {
  local log=$root/build/log/build.$preset.log stamp=$build/.moelab_built status
  rm -f "$stamp"
  touch "$stamp.new"
  NINJA_STATUS='[%f/%t] ' progress=progress_ninja step "Building $preset" "$log" ninja -C "$build" -j "$(num_jobs)" ${keep_going:+-k 0} "$1"
  status=$?
  if ((status)); then
    sed -n '/^FAILED:/,$p' "$log" | head -n 60 | sed 's/^/  | /' >&2
    grep -q 'No space left on device' "$log" && fail "the disk is full."
    grep -qE 'Killed signal|fatal error: Killed' "$log" && fail "the compiler was killed: not enough memory. Close something and run ./moelab again."
    [[ -n ${keep_going:-} ]] && return $status
    fail "the build failed. The whole output is in ${log#"$root"/}."
  fi
  # Reuse the touched file's time: writing the key must not move it.
  local started=$stamp.started
  mv "$stamp.new" "$started"
  printf '%s\n' "$key" > "$stamp"
  touch -r "$started" "$stamp"
  rm -f "$started"
  [[ $1 == product && ! -x $build/bin/moelab ]] && fail "the build made no bin/moelab." "The output is in ${log#"$root"/}."
  return 0
}
