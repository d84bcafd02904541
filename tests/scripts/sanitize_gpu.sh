#!/usr/bin/env bash
# The [gpu] cases of test_kernels under compute-sanitizer: memory, races in shared memory, memory that nobody wrote. Only errors in our kernels count: those of libraries are
# left out by name. Every tool runs the cases in several processes at once, since each of them mostly waits for its own launches. Needs minutes on one GPU, so it is no part
# of ./moelab test: run it by hand.  SANITIZE_TOOLS, SANITIZE_SECS and SANITIZE_CASES (a regular expression over names) narrow it.
# racecheck follows an arrival at an mbarrier only for the lane that executes it: run it on a build configured with -DCMAKE_CUDA_FLAGS=-DMOE_RACECHECK, in which all lanes arrive
# (core/kernels/mla_decode/README.md); MOELAB_TEST_KERNELS names its test_kernels.
set -u
root=${MOELAB_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
program=${MOELAB_TEST_KERNELS:-${MOELAB_BUILD:-$root/build/${MOELAB_PRESET:-release}}/bin/test_kernels}
tools=${SANITIZE_TOOLS:-memcheck racecheck initcheck}
secs=${SANITIZE_SECS:-120}
wanted=${SANITIZE_CASES:-.}
processes=5

skip() { echo "ok sanitize: our kernels under compute-sanitizer # skip $1"; exit 77; }
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2> /dev/null | head -1)
[ -n "$sanitizer" ] || skip "no compute-sanitizer"
nvidia-smi -L > /dev/null 2>&1 || skip "no GPU"
[ -x "$program" ] || skip "no $program"

scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
# Catch2 2 and 3 list names in ways of their own; what the exit code says differs too, so the names tell whether it worked.
"$program" "[gpu]" --list-test-names-only > "$scratch/list" 2> /dev/null
grep -q '^cuda ' "$scratch/list" || "$program" "[gpu]" --list-tests --verbosity quiet > "$scratch/list" 2> /dev/null
sed 's/^ *//' "$scratch/list" | grep '^cuda ' | grep -E -- "$wanted" > "$scratch/names"
[ -s "$scratch/names" ] || { echo "not ok sanitize: no [gpu] cases that match $wanted in $program"; exit 1; }

# What a tool checks. memcheck: each tensor has an allocation of its own, so that an access just past its end is seen; a graph cannot be captured then.
# initcheck sees only what it instruments, so libraries' kernels have to be: the cases that need none of their large ones.
options_of() {
  case $1 in
    memcheck | racecheck) echo "--tool $1 --kernel-name kns=3moe7kernels --report-api-errors no" ;;
    *) echo "--tool $1" ;;
  esac
}
cases_of() {
  case $1 in
    memcheck) grep -v "replayed graph" "$scratch/names" ;;
    racecheck) cat "$scratch/names" ;;
    *) grep -E "rmsnorm|swiglu|embed|adamw|sort_by_expert|permute|route|count_pairs|quantize|append_latent" "$scratch/names" | grep -v linear ;;
  esac
}
run_part() { # run_part TOOL PART
  local memory=PYTORCH_NO_CUDA_MEMORY_CACHING=1             # any value of it counts
  [ "$1" = racecheck ] && memory=SANITIZE=1
  # shellcheck disable=SC2046
  env "$memory" OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 timeout -k 5 "$secs" \
    "$sanitizer" $(options_of "$1") --show-backtrace no --print-limit 50 --target-processes application-only "$program" -f "$scratch/$1.$2" -d yes > "$scratch/$1.$2.log" 2>&1
  echo $? > "$scratch/$1.$2.rc"
}

status=0
started=$SECONDS
for tool in $tools; do
  cases_of "$tool" > "$scratch/$tool.all"
  [ -s "$scratch/$tool.all" ] || continue
  sed 's/,/\\,/g' "$scratch/$tool.all" | split -n "r/$processes" -d -a 1 - "$scratch/$tool."      # a comma parts names in Catch2's files
  for part in $(seq 0 $((processes - 1))); do
    [ -s "$scratch/$tool.$part" ] && run_part "$tool" "$part" &
  done
done
wait

for tool in $tools; do
  [ -s "$scratch/$tool.all" ] || continue
  cat "$scratch/$tool".?.log > "$scratch/$tool.log"
  # Every error names its kernel in a line of its own ("at void moe::kernels::…"), a race both of its accesses.
  grep '^=========' "$scratch/$tool.log" | grep 'moe::kernels' | sed 's/^=* *//' > "$scratch/$tool.errors"
  finished=$(grep -c ' s: ' "$scratch/$tool.log")
  problems=""
  [ -s "$scratch/$tool.errors" ] && problems="$(wc -l < "$scratch/$tool.errors") lines of errors in our kernels"
  grep -q '^skipped:' "$scratch/$tool.log" && problems="$problems; cases skipped themselves"
  for rc in "$scratch/$tool".?.rc; do
    case $(cat "$rc") in
      0) ;;
      124 | 137) problems="$problems; process $(basename "$rc" .rc) ran out of $secs s" ;;
      *) problems="$problems; process $(basename "$rc" .rc) ended with $(cat "$rc")" ;;
    esac
  done
  if [ -z "$problems" ]; then
    echo "ok sanitize: $tool finds nothing in our kernels ($finished cases, $((SECONDS - started)) s)"
  else
    status=1
    echo "not ok sanitize: $tool: ${problems#; } ($finished of $(wc -l < "$scratch/$tool.all") cases done)"
    sort "$scratch/$tool.errors" | uniq -c | sort -rn | cut -c 1-220 | head -12
    grep -E 'FAILED|test cases|terminate|Device not supported|^========= (Error|Target|Unable)' "$scratch/$tool.log" | sort | uniq -c | head -12
    [ -n "${OUT:-}" ] && cp "$scratch/$tool.log" "$OUT/"
  fi
done
exit $status
