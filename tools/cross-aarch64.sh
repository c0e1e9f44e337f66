#!/usr/bin/env bash
# cross-aarch64.sh - build and run the tests for AArch64 on a Debian x86-64 machine, under QEMU.
#
#   tools/cross-aarch64.sh test --test it simd     # any cargo command
#
# Needs the packages qemu-user-static, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross. A rustc that
# has the target (rustup target add aarch64-unknown-linux-gnu) is used as it is; without one, that of
# the package rustc-web, with std from its package for arm64, which is unpacked into
# ${XDG_CACHE_HOME:-~/.cache}/cross-aarch64 and not installed. Output goes to target/aarch64.
set -euo pipefail

target=aarch64-unknown-linux-gnu
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cross-aarch64

if ! ls "$(rustc --print target-libdir --target $target 2>/dev/null)"/libstd-*.rlib >/dev/null 2>&1; then
  base=/usr/bin/rustc
  version=$(dpkg-query --show --showformat '${Version}' rustc-web 2>/dev/null) || {
    echo "no std for $target: rustup target add $target, or apt install rustc-web" >&2
    exit 1
  }
  sysroot=$cache/sysroot-$version
  if [ ! -f "$sysroot/.complete" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Lists of its own: arm64 is no architecture of this machine, nor becomes one.
    mkdir -p "$work/lists/partial"
    options=(-qq -o APT::Architectures::=amd64 -o APT::Architectures::=arm64 -o Dir::State::Lists="$work/lists"
      -o Dir::Cache="$work" -o APT::Sandbox::User="$(id -un)")
    apt-get "${options[@]}" update
    ( cd "$work"; apt-get "${options[@]}" download "libstd-rust-web-dev:arm64=$version"; dpkg-deb -x ./*.deb std )
    rm -rf "$sysroot"
    mkdir -p "$sysroot/lib/rustlib"
    cp -r "$work/std/usr/lib/rustlib/$target" "$sysroot/lib/rustlib/"
    for host in "$($base --print sysroot)"/lib/rustlib/*; do
      [ "${host##*/}" = $target ] || ln -sfn "$host" "$sysroot/lib/rustlib/${host##*/}"
    done
    rm -rf "$work"
    touch "$sysroot/.complete"
  fi
  wrapper=$cache/rustc
  printf '#!/bin/sh\nexec %q --sysroot %q "$@"\n' "$base" "$sysroot" > "$wrapper"
  chmod +x "$wrapper"
  export RUSTC=$wrapper
fi

export CARGO_BUILD_TARGET=$target CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/aarch64}
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu -E STERNA_EMULATED=1"
exec cargo "$@"
