#!/usr/bin/env bash
# Starts moelab from the portable archive: finds LibTorch 2.11 on this machine, then becomes bin/moelab.
set -u
self=$(readlink -f -- "${BASH_SOURCE[0]}")
root=${self%/*}

# The folder of the torch package that a Python knows, without importing it (that takes seconds).
torch_of() {
  "$1" -c 'import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] if s else "")' 2> /dev/null
}
version_of() { sed -n "s/^__version__ = '\(.*\)'/\1/p" "$1/version.py" 2> /dev/null; }

tried=()
torch=""
consider() {
  [[ -n $torch || -z $1 ]] && return
  local version
  version=$(version_of "$1")
  if [[ $version != 2.11.* ]]; then
    tried+=("$1: ${version:-no torch package}")
  elif [[ -f $root/lib/needs_cuda && ! -f $1/lib/libtorch_cuda.so ]]; then
    tried+=("$1: $version is a CPU-only build, and this moelab has CUDA parts")
  else
    torch=$1
  fi
}
if [[ -n ${MOELAB_TORCH_DIR:-} ]]; then
  consider "$MOELAB_TORCH_DIR"
else
  for python in python3 python python3.12 python3.11; do
    [[ -z $torch ]] && type -P "$python" > /dev/null && consider "$(torch_of "$python")"
  done
fi
if [[ -z $torch ]]; then
  echo "moelab: LibTorch 2.11 not found on this machine." >&2
  ((${#tried[@]})) && printf '  looked at %s\n' "${tried[@]}" >&2
  echo "  Install it (pip install torch==2.11.0), or set MOELAB_TORCH_DIR to the folder of the installed torch package." >&2
  exit 1
fi

libraries=$torch/lib
for folder in "$torch"/../nvidia/*/lib; do [[ -d $folder ]] && libraries+=:$folder; done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec "$root/bin/moelab" "$@"
