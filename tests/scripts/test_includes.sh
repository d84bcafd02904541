#!/usr/bin/env bash
# The rules of the source tree that a compiler does not check: which folder may include which, where LibTorch may not be, that
# moe::Error is the only exception, that nothing in core/ and lua/ ends the process, that no path of a build machine is written down.
# A second half plants a violation of every rule into a copy and wants it found: a rule that cannot fail is none.
set -u
root=${MOELAB_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}

# folder: folders that it may include besides itself and what those may include. A new folder gets a line here.
# "=" instead of ":" takes the list as it is, without what follows from it: the outer layers see the next one, not all below.
table='
core/base:
core/config: core/base
core/tensor: core/base
core/kernels: core/tensor
core/dist: core/tensor core/config
core/param: core/dist
core/routing: core/kernels core/dist core/config
core/model: core/routing core/param core/kernels core/config
core/data: core/tensor core/config
core/plan: core/config
core/store: core/param core/config
core/metrics: core/base
core/draw: core/base
core/infer: core/model core/store
core/train: core/model core/data core/store core/metrics core/plan
lua/bind: core/train core/infer core/draw
lua/session= lua/bind core/base core/config
shell= lua/session core/base core/config
jupyter= lua/session core/base core/config
viz: core/base core/metrics
'
# Files that may throw something else, with the reason; one a line.
other_throws='
core/dist/mpi/mpi_plugin.cpp links nothing of ours; core/dist turns what it throws into moe::Error
'

sources() { (cd "$1" && find core lua shell jupyter viz tests -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2> /dev/null | LC_ALL=C sort); }

# violations ROOT: one line "file:line: what" for each.
violations() {
  sources "$1" | (cd "$1" && xargs -r awk -v table="$table" -v other_throws="$other_throws" '
    function folder_of(path, parts) { split(path, parts, "/"); return parts[1] ~ /^(core|lua)$/ ? parts[1] "/" parts[2] : parts[1] }
    function report(what) { print FILENAME ":" FNR ": " what }
    # Marks everything that "from" may include.
    function close_over(from, at, i, n, next_ones) {
      n = split(direct[at], next_ones, " ")
      for (i = 1; i <= n; i++) if (!((from, next_ones[i]) in may)) { may[from, next_ones[i]] = 1; close_over(from, next_ones[i]) }
    }
    BEGIN {
      n = split(table, lines, "\n")
      for (i = 1; i <= n; i++) if (match(lines[i], /[:=]/)) {
        name = substr(lines[i], 1, RSTART - 1); known[name] = 1
        direct[name] = substr(lines[i], RSTART + 1); exact[name] = substr(lines[i], RSTART, 1) == "="
      }
      for (name in known) {
        if (exact[name]) { m = split(direct[name], ones, " "); for (j = 1; j <= m; j++) may[name, ones[j]] = 1 } else close_over(name, name)
      }
    }
    FNR == 1 {
      folder = folder_of(FILENAME); in_comment = 0; is_test = folder == "tests"
      if (!is_test && !(folder in known) && FILENAME ~ /\/.*\//) report("folder " folder " is not in the table of test_includes.sh")
    }
    /^[ \t]*#[ \t]*include/ {
      if (!match($0, /[<"][^>"]+[>"]/)) next
      quoted = substr($0, RSTART, 1) == "\""; path = substr($0, RSTART + 1, RLENGTH - 2)
      if (path == "torch/torch.h" || path == "torch/extension.h") report("<" path ">: take <ATen/core/Tensor.h> and single <ATen/ops/*.h>")
      if (path ~ /^(torch|ATen|c10)\//) torch_in[FILENAME] = FNR ": <" path ">"
      if (quoted && path !~ /^(core|lua|shell|jupyter|viz|tests)\//) report("\"" path "\": write the path from the root")
      if (quoted) includes[FILENAME] = includes[FILENAME] " " path
      if (folder ~ /^core\// && path ~ /^(lua|lauxlib|lualib)\.h|^lua\.hpp|^(imgui|implot|xeus)/) report("<" path "> in core/, which knows no Lua, Jupyter or ImGui")
      if (is_test || !quoted) next
      target = folder_of(path)
      if (target != folder && !((folder, target) in may)) report(folder " may not include " target " (\"" path "\")")
      next
    }
    {
      line = $0
      gsub(/\\"/, "", line); gsub(/"[^"]*"/, "\"\"", line); sub(/\/\/.*/, "", line)
      if (is_test) next
      if (match(line, /(^|[^A-Za-z0-9_])throw[ \t]+[^; \t]/)) {
        rest = substr(line, RSTART); sub(/^[^t]?throw[ \t]+/, "", rest)
        if (rest !~ /^(::)?(moe::)?Error[ \t]*[({]/ && index(other_throws, "\n" FILENAME) == 0) report("throws something that is not moe::Error")
      }
      # Not the verbs of a class: "Tensor exit(x)" declares one, "Layout::exit(x)" and "layout.exit(x)" name it.
      gsub(/std::|(^|[^A-Za-z0-9_])::/, " ; ", line); gsub(/(return|else|do)[ \t]/, " ; ", line); gsub(/[A-Za-z0-9_>&*]([ \t]+|::)(exit|abort)[ \t]*\(/, "(", line)
      if (folder ~ /^(core|lua)\// && line ~ /(^|[^A-Za-z0-9_.>])(_exit|_Exit|exit|quick_exit|abort|assert|terminate)[ \t]*\(/)
        report("ends the process; throw moe::Error")
    }
    # What a file includes, through our own headers too.
    function find_torch(file, i, n, ones, found) {
      if (file in torch_in) return file ":" torch_in[file]
      if (file in seen) return ""
      seen[file] = 1
      n = split(includes[file], ones, " ")
      for (i = 1; i <= n; i++) { found = find_torch(ones[i]); if (found != "") return found }
      return ""
    }
    END {
      for (i = 1; i < ARGC; i++) if (ARGV[i] ~ /\.cuh?$/ || ARGV[i] ~ /^(core\/metrics|viz)\//) {
        split("", seen)
        found = find_torch(ARGV[i])
        if (found != "") print ARGV[i] ": reaches LibTorch through " found
      }
    }')
  written_paths "$1"
  linked_targets "$1"
}

# Paths of somebody's machine in what we ship.
written_paths() {
  (cd "$1" && find core lua shell jupyter viz cmake configs experiments tests moelab CMakeLists.txt CMakePresets.json -type f \
    ! -name test_includes.sh \( -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '*.lua' -o -name '*.json' -o -name '*.cmake' -o -name '*.sh' -o -name '*.txt' -o -name moelab \) -print0 2> /dev/null \
    | xargs -0 -r grep -nE '(^|[^A-Za-z0-9_./$}{])/(home|root|work|Users|tmp/venv)/[A-Za-z0-9_]' /dev/null | sed 's/$/   (a path of one machine)/')
}

# The links in CMake must not allow more than the table does.
linked_targets() {
  (cd "$1" && grep -HnoE 'moe_library\([a-z]+ DEPS[^)]*' core/*/CMakeLists.txt 2> /dev/null) | awk -v table="$table" '
    function close_over(from, at, i, n, ones) { n = split(direct[at], ones, " "); for (i = 1; i <= n; i++) if (!((from, ones[i]) in may)) { may[from, ones[i]] = 1; close_over(from, ones[i]) } }
    BEGIN { n = split(table, lines, "\n"); for (i = 1; i <= n; i++) if (match(lines[i], /[:=]/)) direct[substr(lines[i], 1, RSTART - 1)] = substr(lines[i], RSTART + 1); for (name in direct) close_over(name, name) }
    { text = $0; sub(/.*moe_library\(/, "", text); n = split(text, words, /[ \t]+/)
      for (i = 3; i <= n; i++) if (words[i] ~ /^moe_/) { target = "core/" substr(words[i], 5); if (!(("core/" words[1], target) in may)) { place = $0; sub(/:moe_library.*/, "", place); print place ": core/" words[1] " may not link " words[i] } } }'
}

status=0
found=$(violations "$root")
if [[ -n $found ]]; then
  printf '%s\n' "$found"
  echo "not ok the tree keeps its rules"
  status=1
else
  echo "ok the tree keeps its rules ($(sources "$root" | wc -l) files)"
fi

# ---- each rule can fail ----------------------------------------------------------------------------------------------
copy=$(mktemp -d) || exit 1
trap 'rm -rf "$copy"' EXIT

# planted NAME FILE TEXT WANT: a tree of that one file (and clean ones beside it) must give a violation that contains WANT;
# an empty WANT wants none.
planted() {
  rm -rf "${copy:?}"/*
  mkdir -p "$copy/core/tensor" "$copy/$(dirname "$2")"
  printf '#pragma once\n#include <ATen/core/Tensor.h>\n' > "$copy/core/tensor/weight.h"
  printf '%b\n' "$3" > "$copy/$2"
  local got
  got=$(violations "$copy")
  if [[ -z $4 && -z $got ]] || [[ -n $4 && $got == *"$4"* ]]; then
    echo "ok planted: $1"
  else
    echo "not ok planted: $1 (got \"$got\", want \"$4\")"
    status=1
  fi
}
planted "an upward include" core/base/a.h '#include "core/model/model.h"' 'core/base may not include core/model'
planted "a sideways include" core/metrics/a.cpp '#  include "core/config/config.h"' 'core/metrics may not include core/config'
planted "core that knows Lua" core/train/a.cpp '#include <lua.hpp>' 'which knows no Lua'
planted "a shell that skips the session" shell/a.cpp '#include "core/train/run.h"' 'shell may not include core/train'
planted "a folder outside the table" core/misc/a.cpp 'int a;' 'is not in the table'
planted "a relative include" core/base/a.cpp '#include "error.h"' 'path from the root'
planted "torch/torch.h" tests/unit/base/a.cpp '#include <torch/torch.h>' 'take <ATen/core/Tensor.h>'
planted "LibTorch in a .cu file, through a header" core/kernels/a/a.cu '#include "core/tensor/weight.h"' 'reaches LibTorch through core/tensor/weight.h'
planted "LibTorch in metrics" core/metrics/a.cpp '#include <c10/util/Exception.h>' 'reaches LibTorch'
planted "another exception" core/base/a.cpp 'void f() { throw std::runtime_error("x"); }' 'not moe::Error'
planted "a thrown number" lua/bind/a.cpp 'void f() { if (1) throw 1; }' 'not moe::Error'
planted "exit" core/base/a.cpp 'void f() { std::exit(1); }' 'ends the process'
planted "exit of the global namespace" core/base/a.cpp 'int f() { return ::exit(1), 0; }' 'ends the process'
planted "assert" lua/bind/a.cpp 'void f() { assert(a == b); }' 'ends the process'
planted "a path of one machine" core/base/a.cpp 'const char* p = "/home/somebody/torch";' 'a path of one machine'
planted "a link that the table does not allow" core/tensor/CMakeLists.txt 'moe_library(tensor DEPS moe_base moe_dist)' 'core/tensor may not link moe_dist'
planted "nothing wrong" core/train/a.cpp '#include "core/base/error.h"\n#include "core/tensor/weight.h"\n// throw std::x, exit(1)\nstatic_assert(1);\nTensor exit(int x);\nvoid f() { throw moe::Error(p); group.abort(); Group::exit(x); const char* s = "exit(1)"; throw; }' ''
exit $status
