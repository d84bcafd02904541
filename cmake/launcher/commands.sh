# The commands that need the source tree: build, test, package, clean. Sourced by ./moelab after setup.sh.

usage_error() {
  say "moelab: $1"
  exit 2
}

command_build() {
  case ${1:-} in
    "") ;;
    -h | --help) echo "usage: ./moelab [--preset NAME] [--yes] build    configures and builds build/NAME (default: release)"; exit 0 ;;
    *) usage_error "build: unknown argument \"$1\", want none (--preset goes before the command)" ;;
  esac
  if is_built; then
    say "build/$preset is up to date."
  else
    set_up_and_build product
  fi
}

command_clean() {
  case ${1:-} in
    "")
      check_preset
      rm -rf "$build"
      say "Removed build/$preset."
      ;;
    --all)
      local name
      for name in $(sed -n 's/.*"name": *"\([a-z0-9_]*\)".*/\1/p' "$root/CMakePresets.json"); do rm -rf "$root/build/$name"; done
      rm -rf "$root"/build/{venv,tmp,log,.tests}
      say "Removed all build folders and build/venv; the next call sets everything up again."
      ;;
    -h | --help) echo "usage: ./moelab [--preset NAME] clean [--all]    removes build/NAME; --all: every preset's and build/venv" ;;
    *) usage_error "clean: unknown argument \"$1\", want nothing or --all" ;;
  esac
}

command_test() {
  source "$root/cmake/launcher/test.sh"
  test_main "$@"
}

command_package() {
  source "$root/cmake/launcher/package.sh"
  package_main "$@"
}
