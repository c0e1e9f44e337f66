#!/usr/bin/env bash
# build-web.sh - build the package for browsers, with its page, into target/web.
#
#   tools/build-web.sh          # small and fast
#   tools/build-web.sh --dev    # built in less time, for working on it
#   tools/build-web.sh --test   # the same without names of functions; it has to be small enough even so
#
# The engine is built twice: sterna_web, for one thread, and sterna_web_fast, for threads that share its
# memory and for relaxed SIMD. web/package/builds.js chooses.
#
# A rustc that has the target (rustup target add wasm32-unknown-unknown) builds the first as it is. The
# std that comes with it knows no threads: for the second, std is built once from the compiler's own
# library sources (rustup component add rust-src; on Debian the packages rustc-web and rust-web-src, a
# compiler with its sources, which builds the first too where there is no other). rust-lld of the ordinary
# toolchain or wasm-ld links. Without sources the package has the first engine only, and it is said.
# The command wasm-bindgen, which has to have the version of Cargo.lock, is built once where there is
# none. wasm-opt makes the result smaller where it or npm is found. All of these are kept in
# ${XDG_CACHE_HOME:-~/.cache}/sterna-web.
set -euo pipefail
cd "$(dirname "$0")/.."

target=wasm32-unknown-unknown
cache=${XDG_CACHE_HOME:-$HOME/.cache}/sterna-web
out=target/web
# Most bytes of the engine, compressed: what a visitor waits for.
budget=3000000
binaryen=132.0.0

mode=${1:-}
profile=web
names=''
case $mode in
  '') ;;
  --dev) profile=dev ;;
  --test) profile=dev names=--remove-name-section ;;
  *) echo "unknown argument: $mode; see the head of tools/build-web.sh" >&2; exit 2 ;;
esac
mkdir -p "$cache"

# Where a compiler has the sources of its std.
sources_of() {
  echo "$("$1" --print sysroot 2>/dev/null)/lib/rustlib/src/rust/library"
}

# $(with_std NAME FLAGS): the path of a compiler whose std for the target is built with FLAGS, kept as NAME;
# nothing if no compiler here has sources of std.
with_std() {
  local name=$1 flags=$2 base='' compiler sysroot folder
  for compiler in rustc /usr/bin/rustc; do
    [ -f "$(sources_of $compiler)/std/Cargo.toml" ] && base=$(command -v $compiler) && break
  done
  [ -n "$base" ] || return 0
  sysroot=$cache/sysroot-$($base -vV | sed -n 's/^release: //p')${name:+-$name}
  if [ ! -f "$sysroot/.complete" ]; then
    work=$(mktemp -d)
    # This is a process of its own.
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/src"
    printf '[package]\nname = "stub"\nversion = "0.0.0"\nedition = "2021"\n[workspace]\n' > "$work/Cargo.toml"
    printf '#![no_std]\n' > "$work/src/lib.rs"
    # RUSTC_BOOTSTRAP lets a stable compiler accept -Z build-std, for this one build only.
    ( cd "$work"; RUSTC=$base RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$work/target \
      CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS="$flags -C embed-bitcode=yes" \
      cargo build --release --target $target -Z build-std=std,panic_abort >&2 ) || exit 1
    rm -rf "$sysroot"
    mkdir -p "$sysroot/lib/rustlib/$target/lib"
    find "$work/target/$target/release/deps" -name '*.rlib' ! -name 'libstub-*' \
      -exec cp {} "$sysroot/lib/rustlib/$target/lib/" \;
    # Everything of the host stays where the compiler has it.
    for folder in "$($base --print sysroot)"/lib/rustlib/*; do
      [ "$(basename "$folder")" = $target ] || ln -sfn "$folder" "$sysroot/lib/rustlib/"
    done
    touch "$sysroot/.complete"
  fi
  printf '#!/bin/sh\nexec %q --sysroot %q "$@"\n' "$base" "$sysroot" > "$cache/rustc${name:+-$name}"
  chmod +x "$cache/rustc${name:+-$name}"
  echo "$cache/rustc${name:+-$name}"
}

# The compiler of each engine, if it is not the ordinary one.
plain=''
if ! ls "$(rustc --print target-libdir --target $target 2>/dev/null)"/libstd-*.rlib >/dev/null 2>&1; then
  plain=$(with_std '' '')
  [ -n "$plain" ] || {
    echo "no std for $target: rustup target add $target, or apt install rustc-web rust-web-src" >&2
    exit 1
  }
fi
threads='-C target-feature=+atomics,+bulk-memory,+mutable-globals'
fast=$(with_std threads "$threads")
[ -n "$fast" ] || echo "no std with threads, so no engine with them: rustup component add rust-src, or apt install rustc-web rust-web-src" >&2
linker=''
if [ -n "$plain$fast" ]; then
  linker=$(find "$(rustc --print sysroot)"/lib/rustlib/*/bin /usr/bin -maxdepth 1 -name rust-lld -o -name 'wasm-ld*' | head -n 1)
  [ -n "$linker" ] || { echo "no linker for $target: install lld" >&2; exit 1; }
fi

version=$(awk '/^name = "wasm-bindgen"$/ { getline; gsub(/[^0-9.]/, ""); print; exit }' Cargo.lock)
bindgen=$(command -v wasm-bindgen || true)
if [ -z "$bindgen" ] || [ "$("$bindgen" --version)" != "wasm-bindgen $version" ]; then
  bindgen=$cache/wasm-bindgen-$version/bin/wasm-bindgen
  install_bindgen() {
    # It runs for seconds; to optimise it takes minutes.
    env CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_TARGET_DIR="$cache/build" cargo install --quiet wasm-bindgen-cli \
      --version "$version" --no-default-features --root "$cache/wasm-bindgen-$version" "$@"
  }
  [ -x "$bindgen" ] || {
    echo "wasm-bindgen $version is built, once" >&2
    install_bindgen --locked || {
      echo "what wasm-bindgen-cli was locked to is not all there: built with what is" >&2
      install_bindgen
    }
  }
  rm -rf "$cache/build"
fi

opt=''
if [ $profile = web ]; then
  opt=$(command -v wasm-opt || true)
  if [ -z "$opt" ] && command -v npm >/dev/null; then
    opt=$cache/binaryen-$binaryen/node_modules/.bin/wasm-opt
    [ -x "$opt" ] || npm install --silent --no-audit --no-fund --prefix "$cache/binaryen-$binaryen" binaryen@$binaryen
  fi
  [ -n "$opt" ] || echo "no wasm-opt and no npm to have it from: the result is larger than it could be" >&2
fi

rm -rf "$out"
mkdir -p "$out/model"

# build NAME COMPILER FOLDER FLAGS: one engine. Another compiler's or std's outputs are kept apart.
build() {
  local name=$1 compiler=$2 folder=$3 flags=$4 bytes
  ( [ -z "$compiler" ] || export RUSTC=$compiler CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER=$linker
    export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS=$flags CARGO_TARGET_DIR=$folder
    cargo build --package sterna-web --profile $profile --target $target )
  "$bindgen" --target web $names --out-dir "$out" --out-name "$name" \
    "$folder/$target/$([ $profile = dev ] && echo debug || echo $profile)/sterna_web.wasm"
  local wasm=$out/${name}_bg.wasm
  [ -z "$opt" ] || "$opt" -O3 "$wasm" -o "$wasm"
  bytes=$(gzip -9 < "$wasm" | wc -c)
  echo "$wasm: $(stat -c %s "$wasm") bytes, $bytes compressed"
  if [ "$mode" != --dev ] && [ "$bytes" -gt $budget ]; then
    echo "$wasm takes $bytes bytes compressed, at most $budget are allowed" >&2
    exit 1
  fi
}

build sterna_web "$plain" target/wasm '-C target-feature=+simd128'
if [ -n "$fast" ]; then
  # The memory is made by web/package/builds.js, which knows its first size.
  memory="--shared-memory --import-memory --initial-memory=$((8 << 20)) --max-memory=$((4 << 30))"
  exports='__wasm_init_tls __tls_size __tls_align __tls_base'
  # A stable compiler keeps from the code that it is built with atomics, which are not stable.
  RUSTC_BOOTSTRAP=1 build sterna_web_fast "$fast" target/wasm-fast \
    "$threads -C target-feature=+simd128,+relaxed-simd$(printf ' -C link-arg=%s' $memory)$(printf ' -C link-arg=--export=%s' $exports)"
fi
cp web/package/* web/page/* "$out"
cp LICENSE-APACHE LICENSE-MIT "$out"
for name in config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json; do
  cp "models/stories/$name" "$out/model/"
done

# What is kept for when there is no network; another version of any of it is another version of all.
( cd "$out"
  page=(index.html page.css page.js page.webmanifest icon.svg sterna.js worker.js cache.js download.js measured.js
    builds.js helper.js sterna_web*.js sterna_web*_bg.wasm model/*)
  { printf '["./"'; printf ', "%s"' "${page[@]}"; printf ']\n'; } > files.json
  hash=$(cat "${page[@]}" offline.js | sha256sum | cut -c1-16)
  sed -i "s/BUILD_VERSION/$hash/" offline.js )
