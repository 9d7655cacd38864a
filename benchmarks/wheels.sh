#!/usr/bin/env bash
# Collect the wheels that a bare, offline GPU machine needs beside its own torch and triton: DeepSpeed with its
# dependencies, and Liger-Kernel as the peer to compare with. For Python 3.12 on x86-64.
#
# usage: [SCATTERMOE=SOURCE] benchmarks/wheels.sh [FOLDER]     (default: benchmarks/wheels, which git ignores)
#   SCATTERMOE  also build this peer, which no registry has: git+https://github.com/shawntan/scattermoe, or a checkout
# On that machine `WHEELS=FOLDER benchmarks/gpu.sh` installs them into a separate folder.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/wheels}
pip=(${PYTHON:-python3} -m pip --disable-pip-version-check)
mkdir -p "$folder"

# pip matches platform tags exactly, so list every tag that a wheel may have.
tags=(--only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux1_x86_64 --platform manylinux2014_x86_64)
for glibc in 17 24 27 28 31 34 35; do tags+=(--platform "manylinux_2_${glibc}_x86_64"); done
fetch() { "${pip[@]}" download -q --no-deps "${tags[@]}" -d "$folder" "$@"; }

# DeepSpeed is published as source; without its optional native ops the wheel is pure Python.
[[ -n $(compgen -G "$folder/deepspeed-*.whl") ]] ||
  DS_BUILD_OPS=0 "${pip[@]}" wheel -q --no-deps -w "$folder" deepspeed==0.19.8
fetch hjson==3.1.0 annotated-types==0.7.0 pydantic==2.13.3 liger-kernel==0.8.5
# Liger needs only torch and triton (and packaging, which DeepSpeed needs too); ScatterMoE needs the same two.
[[ -z ${SCATTERMOE:-} ]] || "${pip[@]}" wheel -q --no-deps -w "$folder" "$SCATTERMOE"
# pydantic pins its pydantic-core.
core=$(unzip -p "$folder"/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([0-9a-z.]*\).*/\1/p')
fetch "pydantic-core==$core"
du -sh "$folder"
