#!/usr/bin/env bash
# On a GPU machine, from the repository's root: tensorrt86.sh BUNDLE_DIR [options of tensorrt86.py].
# BUNDLE_DIR holds the parts that tensorrt86_bundle.sh made; they are unpacked there once.
set -euo pipefail
bundle=$1
shift
if [ ! -e "$bundle/ready" ]; then
  python -m zipfile -e "$bundle/zstandard.whl" "$bundle/unpacker"
  cat "$bundle"/part.* | PYTHONPATH=$bundle/unpacker python -c '
import sys, zstandard
unpack = zstandard.ZstdDecompressor(max_window_size=2**30)
unpack.copy_stream(sys.stdin.buffer, sys.stdout.buffer, read_size=2**22, write_size=2**22)' | tar -x -C "$bundle"
  touch "$bundle/ready"
fi
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD:$bundle/site312" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -W ignore benchmarks/tensorrt86.py --bundle "$bundle" "$@"
