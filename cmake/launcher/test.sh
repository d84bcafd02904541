# ./moelab test: builds everything, runs every kind of test in sequence, counts cases. Sourced by commands.sh.
#
#   tests/unit/<folder>/*.cpp    bin/test_<folder>            Catch2
#   tests/*/                     bin/mpitest_<name>           Catch2, as MPI ranks with one thread each; rank 0 is counted
#   tests/lua/*.lua              bin/moelab run FILE          "ok name" and "not ok name" lines, exit code
#   tests/scripts/*.sh           bash FILE                    the same; exit code 77 is a skip
#
# A test that was not built, crashed, or ran out of time counts as failed.

test_usage() {
  cat << 'END'
usage: ./moelab [--preset NAME] test [--all] [--setup] [FILTER]
  --all     the slow ones too
  --setup   installs what only tests need, again
  FILTER    an executable (model, test_model), a test file (test_router, smoke.lua), or text of Catch2 test names or a [tag]
Ends with the line "N passed, N failed, N skipped"; exit code 1 when something failed or nothing ran.
END
}

test_main() {
  local all=0 filter="" setup=0
  while (($#)); do
    case $1 in
      --all) all=1 ;;
      --setup) setup=1 ;;
      -h | --help) test_usage; exit 0 ;;
      --*) usage_error "test: unknown option \"$1\", want --all, --setup or a filter" ;;
      *)
        [[ -z $filter ]] || usage_error "test: two filters, \"$filter\" and \"$1\"; want one"
        filter=$1
        ;;
    esac
    shift
  done
  [[ $preset == portable ]] && usage_error "test: the portable preset builds no tests; want another, e.g. --preset release"
  passed=0 failed=0 skipped=0 failures=()
  time_limit_secs=${MOELAB_TEST_LIMIT_SECS:-$((all ? 3600 : 600))}
  test_setup $setup
  local build_failed=0
  keep_going=1 set_up_and_build_tests || build_failed=1
  reports=$(mktemp -d "$build/tests.XXXXXX") || fail "no folder for test reports can be made in $build."
  trap 'rm -rf "$reports"' EXIT
  test_environment
  run_unit_tests
  run_files lua
  run_files scripts
  if ((build_failed)); then count_failure "build" "some targets did not compile"; fi
  test_summary
}

# Makes the tests part of the configuration; packages.txt holds what they need.
test_setup() {
  if (($1)) || [[ ! -f $root/build/.tests ]]; then
    mkdir -p "$root/build"
    (($1)) && rm -f "$build/.moelab_configured"
    touch "$root/build/.tests" || fail "the folder $root/build cannot be written."
  fi
  tests=ON
  key="${key%|*}|ON"
}

# A failed build does not end the run: what was built is tested, what was not counts as failed.
set_up_and_build_tests() { set_up_and_build all; }

test_environment() {
  export MOELAB_ROOT=$root MOELAB_BUILD=$build MOELAB_PRESET=$preset OMP_NUM_THREADS=2
  # MPI refuses to start as root otherwise, and busy-waits when there are more ranks than cores.
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  # LibTorch is not instrumented: its own one-time allocations and locks are not ours to report. A small
  # quarantine: tests that hold memory to a bound would count 256 MB of it. What no memory has room for is refused, as without a sanitizer.
  export ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0:quarantine_size_mb=32:allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}" UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
  export TSAN_OPTIONS="ignore_noninstrumented_modules=1:allocator_may_return_null=1${TSAN_OPTIONS:+:$TSAN_OPTIONS}"
}

count_failure() {
  failed=$((failed + 1))
  failures+=("$1: $2")
}

# title NAME: a line above a test's output.
title() { if [[ -t 1 ]]; then printf '\033[1m== %s\033[0m\n' "$1"; else printf '== %s\n' "$1"; fi; }

# ---- Catch2 executables ----------------------------------------------------------------------------------------------

run_unit_tests() {
  local targets name folder
  targets=$(ninja -C "$build" -t targets all 2> /dev/null | sed -nE 's#^bin/((test|mpitest)_[^:]*):.*#\1#p' | sort)
  for folder in "$root"/tests/unit/*/; do
    compgen -G "${folder}*.cpp" > /dev/null || continue
    name=test_$(basename "$folder")
    [[ $'\n'$targets$'\n' == *$'\n'"$name"$'\n'* ]] || targets+=$'\n'$name
  done
  for name in $targets; do
    local arguments=()
    choose_cases "$name" || continue
    if [[ $name == mpitest_* ]]; then
      local ranks variables
      while read -r ranks variables; do run_catch "$name" "$ranks" "$variables"; done < <(rank_variants "$name")
    else
      run_catch "$name"
    fi
  done
}

# How often, with how many ranks and with what environment a test of several ranks runs: "ranks NAME=value …" a line, as its
# CMakeLists.txt registered it for ctest; two ranks where it did not.
rank_variants() {
  local file variants
  variants=$(cat "$build"/tests/*/CTestTestfile.cmake 2> /dev/null | awk -v name="$1" '
    /^add_test\(/ && index($0, "/" name "\"") { ranks = $0; sub(/.*"-n" "/, "", ranks); sub(/".*/, "", ranks); next }
    ranks != "" { line = ranks; while (match($0, /MOELAB_[A-Z0-9_]+=[^;"]*/)) { line = line " " substr($0, RSTART, RLENGTH); $0 = substr($0, RSTART + RLENGTH) } print line; ranks = "" }')
  printf '%s\n' "${variants:-2}"
}

# Sets `arguments` for one executable; false when the filter names another one.
choose_cases() {
  local name=$1 base=${filter%.cpp} file
  base=${base##*/}
  ((all)) || arguments=('~[slow]~[.]')
  [[ -z $filter || $filter == "$name" || mpitest_$filter == "$name" || test_$filter == "$name" ]] && return 0
  [[ -d $root/tests/unit/$filter || $filter == test_* && -d $root/tests/unit/${filter#test_} ]] && return 1
  [[ $filter == mpitest_* || -f $root/tests/lua/${base%.lua}.lua || -f $root/tests/scripts/${base%.sh}.sh ]] && return 1
  file=$(find "$root/tests" -name "$base.cpp" -print -quit)
  if [[ -n $file ]]; then
    [[ $file == */unit/"${name#test_}"/* || $name == mpitest_* && $(basename "$base") == "$name" ]] || return 1
    arguments=(-# "[#$base]")
    return 0
  fi
  if [[ $filter == *[\[,~*]* ]]; then arguments=("$filter"); else arguments=("*$filter*"); fi
}

# After a failed build an old executable may lie there whose sources no longer compile: ask ninja for this one again.
is_current() {
  ((!build_failed)) || ninja -C "$build" "bin/$1" > "$reports/$1.build" 2>&1 9>&- || return 1
  [[ -x $build/bin/$1 ]]
}

# run_catch NAME [RANKS [VARIABLES]]
run_catch() {
  local name=$1 ranks=${2:-} variables=${3:-} report=$reports/$1.report log=$reports/$1.log status start=$SECONDS
  local label=$name${ranks:+ on $ranks ranks}${variables:+, $variables}
  if ! is_current "$name"; then
    title "$name"
    count_failure "$name" "was not built"
    return
  fi
  : > "$report"
  if [[ $name == mpitest_* ]]; then
    run_ranks
  else
    # The outer redirection is for bash's own word about a killed child.
    { MOELAB_TEST_REPORT=$report timeout -k 10 "$time_limit_secs" "$build/bin/$name" "${arguments[@]}" > "$log" 2>&1 < /dev/null; } 2> /dev/null
  fi
  status=$?
  # A filter that matches nothing here is not worth a line.
  [[ -n $filter && ! -s $report ]] && grep -qi 'no test\( case\)\?s \(matched\|ran\)' "$log" && return
  title "$label ($((SECONDS - start)) s)"
  cat "$log"
  count_catch "$label" $status
}

# Each rank has a log of its own: rank 0's cases are counted, rank 1's log is shown when something fails.
run_ranks() {
  rm -f "$log".*
  MOELAB_TEST_REPORT_BASE=$report MOELAB_TEST_LOG=$log OMP_NUM_THREADS=1 timeout -k 10 "$time_limit_secs" env $variables \
    mpirun -n "$ranks" --oversubscribe --mca btl self,vader --mca mpi_yield_when_idle 1 \
    bash -c 'rank=$OMPI_COMM_WORLD_RANK; ((rank)) && log=$MOELAB_TEST_LOG.$rank || log=$MOELAB_TEST_LOG
             ((rank)) || export MOELAB_TEST_REPORT=$MOELAB_TEST_REPORT_BASE; exec "$0" "$@" > "$log" 2>&1' \
    "$build/bin/$name" "${arguments[@]}" > "$log.mpirun" 2>&1 < /dev/null
  local status=$?
  if ((status)) && [[ -s $log.1 ]]; then
    { echo "-- rank 1:"; tail -n 60 "$log.1"; echo "-- mpirun:"; tail -n 10 "$log.mpirun"; } >> "$log"
  fi
  return $status
}

# Adds one executable's cases. Where it has a main of its own and writes no report, Catch2's last lines are read instead.
count_catch() {
  local name=$1 status=$2 now_passed now_failed now_skipped now_started
  now_started=$(grep -c '^started ' "$report")
  if ((now_started)); then
    now_passed=$(grep -c '^passed ' "$report")
    now_failed=$(grep -c '^failed ' "$report")
    now_skipped=$(grep -c '^skipped ' "$report")
    local line
    while read -r line; do failures+=("$name: $line"); done < <(sed -n 's/^failed //p' "$report")
    if ((now_started > now_passed + now_failed + now_skipped)); then
      now_failed=$((now_failed + 1))
      failures+=("$name: $(tail -n 1 "$report" | sed 's/^started //') ($(why $status))")
      status=0
    fi
  else
    now_passed=$(sed -nE 's/^All tests passed .* in ([0-9]+) test cases?\).*/\1/p; s/^test cases:.* ([0-9]+) passed.*/\1/p' "$log" | tail -1)
    now_failed=$(sed -nE 's/^test cases:.* ([0-9]+) failed.*/\1/p' "$log" | tail -1)
    now_skipped=$(grep -c '^skipped:' "$log")
    now_passed=${now_passed:-0} now_failed=${now_failed:-0}
    ((now_skipped > now_passed)) && now_skipped=$now_passed
    now_passed=$((now_passed - now_skipped))
    ((now_failed)) && failures+=("$name: $now_failed cases")
    ((now_passed + now_failed + now_skipped == 0 && status == 0)) && status=-1
  fi
  passed=$((passed + now_passed)) failed=$((failed + now_failed)) skipped=$((skipped + now_skipped))
  ((status != 0 && now_failed == 0)) && count_failure "$name" "$(why $status)"
  return 0
}

why() {
  case $1 in
    -1) echo "ran no test case" ;;
    124) echo "ran out of its time of $time_limit_secs s" ;;
    137) echo "was killed: out of memory, or deaf to the end of its time of $time_limit_secs s" ;;
    *) if (($1 > 128)); then echo "crashed with signal $(($1 - 128))"; else echo "ended with exit code $1"; fi ;;
  esac
}

# ---- Lua and shell files ---------------------------------------------------------------------------------------------

# run_files lua|scripts: each file is a test, or as many as it prints "ok" and "not ok" lines.
run_files() {
  local file name
  for file in "$root/tests/$1"/*; do
    name=$(basename "$file")
    [[ $1 == lua && $name == *.lua || $1 == scripts && $name == test_*.sh ]] || continue
    [[ -z $filter || $filter == "$name" || $filter == "${name%.*}" || $filter == "$1" || ${file%/*}/${filter##*/} == "$file" ]] || continue
    if [[ $1 == lua ]]; then run_file "$name" "$build/bin/moelab" run "$file"; else run_file "$name" bash "$file"; fi
  done
}

run_file() {
  local name=$1 log=$reports/$1.log status start=$SECONDS now_passed now_failed now_skipped
  shift
  if [[ ! -x $1 && $1 == */* ]]; then
    title "$name"
    count_failure "$name" "bin/moelab was not built"
    return
  fi
  (cd "$root" && MOELAB_TEST_ALL=$all timeout -k 10 "$time_limit_secs" "$@") > "$log" 2>&1 < /dev/null
  status=$?
  title "$name ($((SECONDS - start)) s)"
  cat "$log"
  now_skipped=$(grep -cE '^ok .*# skip' "$log")
  now_passed=$(($(grep -c '^ok ' "$log") - now_skipped))
  now_failed=$(grep -c '^not ok ' "$log")
  local line
  while read -r line; do failures+=("$name: $line"); done < <(sed -n 's/^not ok //p' "$log")
  if ((status == 77)); then
    now_skipped=$((now_skipped + 1))
  elif ((status != 0 && now_failed == 0)); then
    now_failed=1
    failures+=("$name: $(why $status)")
  elif ((now_passed + now_failed + now_skipped == 0)); then
    now_failed=1
    failures+=("$name: ended without having tried a case")
  fi
  passed=$((passed + now_passed)) failed=$((failed + now_failed)) skipped=$((skipped + now_skipped))
}

test_summary() {
  local colour="" end="" line
  ((${#failures[@]})) && { title "failed"; for line in "${failures[@]}"; do printf '%s\n' "$line"; done; }
  if [[ -t 1 ]]; then
    colour=$'\033[32m' end=$'\033[0m'
    ((failed || passed == 0)) && colour=$'\033[31m'
  fi
  ((passed + failed == 0)) && say "moelab: test: nothing ran${filter:+ for the filter \"$filter\"}"
  printf '%s%d passed, %d failed, %d skipped%s\n' "$colour" $passed $failed $skipped "$end"
  ((failed == 0 && passed > 0))
  exit
}
