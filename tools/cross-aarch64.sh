#!/usr/bin/env bash
# cross-aarch64.sh - build and run the tests for AArch64 on a Debian x86-64 machine, under QEMU.
#
#   tools/cross-aarch64.sh test --test it simd     # any cargo command
#
# Needs the packages qemu-user-static, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross. A rustc that
# has the target (rustup target add aarch64-unknown-linux-gnu) is used as it is; without one, std is
# built once from the packages rustc-web and rust-web-src, a compiler and its own library sources,
# into ${XDG_CACHE_HOME:-~/.cache}/cross-aarch64. Output goes to target/aarch64.
set -euo pipefail

target=aarch64-unknown-linux-gnu
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cross-aarch64

if ! ls "$(rustc --print target-libdir --target $target 2>/dev/null)"/libstd-*.rlib >/dev/null 2>&1; then
  base=/usr/bin/rustc
  [ -f "$($base --print sysroot)/lib/rustlib/src/rust/library/std/Cargo.toml" ] || {
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
      cargo build --release --target $target -Z build-std=std,panic_unwind,test )
    rm -rf "$sysroot"
    mkdir -p "$sysroot/lib/rustlib/$target/lib"
    cp "$work/target/$target/release/deps"/*.rlib "$sysroot/lib/rustlib/$target/lib/"
    rm -f "$sysroot/lib/rustlib/$target/lib"/libstub-*
    for host in "$($base --print sysroot)"/lib/rustlib/*; do
      [ "${host##*/}" = $target ] || ln -sfn "$host" "$sysroot/lib/rustlib/${host##*/}"
    done
    touch "$sysroot/.complete"
  fi
  wrapper=$cache/rustc
  printf '#!/bin/sh\nexec %q --sysroot %q "$@"\n' "$base" "$sysroot" > "$wrapper"
  chmod +x "$wrapper"
  export RUSTC=$wrapper
fi

export CARGO_BUILD_TARGET=$target CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/aarch64}
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu"
exec cargo "$@"
