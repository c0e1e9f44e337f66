#!/usr/bin/env bash
# build-web.sh - build the package for browsers, with its page, into target/web.
#
#   tools/build-web.sh          # small and fast
#   tools/build-web.sh --dev    # built in less time, for working on it
#   tools/build-web.sh --test   # the same without names of functions; it has to be small enough even so
#
# A rustc that has the target (rustup target add wasm32-unknown-unknown) is used as it is. Without one, on
# Debian, std is built once from the packages rustc-web and rust-web-src, a compiler and its own library
# sources, and that compiler builds the package; rust-lld of the ordinary toolchain or wasm-ld links it.
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

profile=web
names=''
case ${1:-} in
  '') ;;
  --dev) profile=dev ;;
  --test) profile=dev names=--remove-name-section ;;
  *) echo "unknown argument: $1; see the head of tools/build-web.sh" >&2; exit 2 ;;
esac
mkdir -p "$cache"

if ! ls "$(rustc --print target-libdir --target $target 2>/dev/null)"/libstd-*.rlib >/dev/null 2>&1; then
  base=/usr/bin/rustc
  sources=$($base --print sysroot 2>/dev/null || true)/lib/rustlib/src/rust/library
  [ -f "$sources/std/Cargo.toml" ] || {
    echo "no std for $target: rustup target add $target, or apt install rustc-web rust-web-src" >&2
    exit 1
  }
  sysroot=$cache/sysroot-$($base -vV | sed -n 's/^release: //p')
  if [ ! -f "$sysroot/.complete" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/src"
    printf '[package]\nname = "stub"\nversion = "0.0.0"\nedition = "2021"\n[workspace]\n' > "$work/Cargo.toml"
    printf '#![no_std]\n' > "$work/src/lib.rs"
    # RUSTC_BOOTSTRAP lets a stable compiler accept -Z build-std, for this one build only.
    ( cd "$work"; RUSTC=$base RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$work/target \
      CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS='-C embed-bitcode=yes' \
      cargo build --release --target $target -Z build-std=std,panic_abort,test )
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
  printf '#!/bin/sh\nexec %q --sysroot %q "$@"\n' "$base" "$sysroot" > "$cache/rustc"
  chmod +x "$cache/rustc"
  linker=$(find "$(rustc --print sysroot)"/lib/rustlib/*/bin /usr/bin -maxdepth 1 -name rust-lld -o -name 'wasm-ld*' | head -n 1)
  [ -n "$linker" ] || { echo "no linker for $target: install lld" >&2; exit 1; }
  export RUSTC=$cache/rustc CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER=$linker
fi

version=$(awk '/^name = "wasm-bindgen"$/ { getline; gsub(/[^0-9.]/, ""); print; exit }' Cargo.lock)
bindgen=$(command -v wasm-bindgen || true)
if [ -z "$bindgen" ] || [ "$("$bindgen" --version)" != "wasm-bindgen $version" ]; then
  bindgen=$cache/wasm-bindgen-$version/bin/wasm-bindgen
  [ -x "$bindgen" ] || env -u RUSTC CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_TARGET_DIR="$cache/build" \
    cargo install wasm-bindgen-cli --version "$version" --no-default-features --locked \
    --root "$cache/wasm-bindgen-$version"
  rm -rf "$cache/build"
fi

# Another compiler's outputs are kept apart from the native ones.
CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS='-C target-feature=+simd128' CARGO_TARGET_DIR=target/wasm \
  cargo build --package sterna-web --profile $profile --target $target
built=target/wasm/$target/$([ $profile = dev ] && echo debug || echo $profile)/sterna_web.wasm

rm -rf "$out"
mkdir -p "$out/model"
"$bindgen" --target web $names --out-dir "$out" "$built"
if [ $profile = web ]; then
  opt=$(command -v wasm-opt || true)
  if [ -z "$opt" ] && command -v npm >/dev/null; then
    opt=$cache/binaryen-$binaryen/node_modules/.bin/wasm-opt
    [ -x "$opt" ] || npm install --silent --no-audit --no-fund --prefix "$cache/binaryen-$binaryen" binaryen@$binaryen
  fi
  if [ -n "$opt" ]; then
    "$opt" -O3 "$out/sterna_web_bg.wasm" -o "$out/sterna_web_bg.wasm"
  else
    echo "no wasm-opt and no npm to have it from: the result is larger than it could be" >&2
  fi
fi
cp web/package/* web/page/* "$out"
cp LICENSE-APACHE LICENSE-MIT "$out"
for name in config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json; do
  cp "models/stories/$name" "$out/model/"
done

# What is kept for when there is no network; another version of any of it is another version of all.
( cd "$out"
  page=(index.html page.css page.js page.webmanifest icon.svg sterna.js worker.js download.js measured.js
    sterna_web.js sterna_web_bg.wasm model/*)
  { printf '["./"'; printf ', "%s"' "${page[@]}"; printf ']\n'; } > files.json
  hash=$(cat "${page[@]}" offline.js | sha256sum | cut -c1-16)
  sed -i "s/BUILD_VERSION/$hash/" offline.js )

bytes=$(gzip -9 < "$out/sterna_web_bg.wasm" | wc -c)
echo "$out: engine $(stat -c %s "$out/sterna_web_bg.wasm") bytes, $bytes compressed"
if [ "${1:-}" != --dev ] && [ "$bytes" -gt $budget ]; then
  echo "the engine takes $bytes bytes compressed, at most $budget are allowed" >&2
  exit 1
fi
