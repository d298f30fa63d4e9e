#!/bin/sh
# Assembles probe.bin beside this script. Needs GNU binutils for x86.
set -eu
cd "$(dirname "$0")"
out=${1:-probe.bin}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
as --64 -o "$tmp/probe.o" probe.S
ld -m elf_x86_64 -N --no-warn-rwx-segments -Ttext=0x100000 -e start --oformat=elf64-x86-64 -o "$tmp/probe.elf" "$tmp/probe.o"
objcopy -O binary -j .text "$tmp/probe.elf" "$out"
