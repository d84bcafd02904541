# ./moelab package: builds the portable preset and packs it into one archive that runs on another Linux machine with LibTorch
# 2.11. Sourced by commands.sh.

max_archive_mib=40
# What a packed binary may need at run time: LibTorch, CUDA, libc, and the C++ runtime that LibTorch itself needs. (A static
# libstdc++ was tried: it raises the needed glibc from 2.34 to 2.36 through arc4random and _dl_find_object, and puts a second C++
# runtime under LibTorch's.) The MPI plugin may need MPI too.
allowed_libraries='^(libtorch(_cpu|_cuda)?|libc10(_cuda)?|libcudart|libcuda|libcublas(Lt)?|libcudnn|libnccl|libnvrtc|libgomp|libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux-x86-64)\.so'
allowed_in_plugin='^libmpi\.so'

package_main() {
  case ${1:-} in
    "") ;;
    -h | --help) echo "usage: ./moelab package    writes build/moelab-<version>-linux-x86_64.tar.gz: bin/, lib/, experiments/, configs/ and a start script"; exit 0 ;;
    *) usage_error "package: unknown argument \"$1\", want none" ;;
  esac
  local version name
  version=$(sed -n 's/^project(moelab VERSION \([0-9.]*\).*/\1/p' "$root/CMakeLists.txt")
  name=moelab-$version-linux-x86_64
  preset=portable build=$root/build/portable
  is_built || set_up_and_build product
  staging=$(mktemp -d "$build/package.XXXXXX") || fail "no folder can be made in $build."
  trap 'rm -rf "$staging"' EXIT
  stage "$staging/$name"
  local file
  for file in "$staging/$name"/bin/* "$staging/$name"/lib/*.so; do
    [[ -f $file ]] && check_binary "$file"
  done
  tar -C "$staging" --owner=0 --group=0 --sort=name -cf - "$name" | gzip -9 > "$root/build/$name.tar.gz" || fail "the archive could not be written: is the disk full?"
  local size
  size=$(stat -c %s "$root/build/$name.tar.gz")
  ((size <= max_archive_mib << 20)) || fail "the archive is too large: got $((size >> 20)) MiB, want at most $max_archive_mib MiB."
  say "build/$name.tar.gz: $(awk "BEGIN { printf \"%.1f\", $size / 1048576 }") MiB. Unpack it anywhere and run $name/moelab; it finds torch $torch_wanted itself."
  say "It needs $(newest GLIBC) and $(newest GLIBCXX) or newer."
}

stage() {
  local folder
  mkdir -p "$1/bin" "$1/lib"
  cp "$build/bin/moelab" "$1/bin/" || fail "bin/moelab was not built."
  cp "$build"/lib/libmoelab_*.so "$1/lib/" 2> /dev/null
  strip --strip-unneeded "$1"/bin/* "$1"/lib/*.so 2> /dev/null
  needed_by "$1/bin/moelab" | grep -q '^libtorch_cuda' && touch "$1/lib/needs_cuda"
  cp "$root/cmake/launcher/portable_run.sh" "$1/moelab"
  for folder in experiments configs; do
    [[ -d $root/$folder ]] && mkdir -p "$1/$folder" && cp -r "$root/$folder/." "$1/$folder/"
  done
  cp "$root/README.md" "$1/" 2> /dev/null
  return 0
}

# newest GLIBC: the newest version of that library's symbols in any packed binary.
newest() { cat "$staging/$name"/bin/* | grep -aoE "\b$1_[0-9]+(\.[0-9]+)+" | sort -uV | tail -1; }

needed_by() { readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'; }

# Fails on a library that other machines do not have and on a path of this one.
check_binary() {
  local allowed=$allowed_libraries extra
  [[ $1 == *.so ]] && allowed="$allowed|$allowed_in_plugin"
  extra=$(needed_by "$1" | grep -vE "$allowed")
  [[ -z $extra ]] || fail "${1##*/} needs libraries that the archive may not need:" $extra "Link them statically (cmake/README.md)."
  if readelf -d "$1" | grep -qE '\((RPATH|RUNPATH)\)'; then fail "${1##*/} has a library path of this machine: $(readelf -d "$1" | grep -E 'RPATH|RUNPATH')"; fi
  if grep -qaF "$root/" "$1"; then fail "${1##*/} contains a path of this machine: $(strings "$1" | grep -F "$root/" | head -3)"; fi
}
