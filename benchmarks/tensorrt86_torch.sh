#!/usr/bin/env bash
# On a GPU machine with torch 2.11.0, from the repository's root:
#     tensorrt86_torch.sh BUNDLE BUNDLE310 [options of tensorrt86_torch.py | any command of Python 3.10's, after --]
# The folders hold the parts that tensorrt86_bundle.sh and tensorrt86_python310.sh made; they are unpacked there once.
set -euo pipefail
bundle=$1 bundle310=$2
shift 2
unpack() {
  [ -e "$1/ready" ] && return
  cat "$1"/part.* | PYTHONPATH=$bundle/unpacker python3 -c '
import sys, zstandard
unpack = zstandard.ZstdDecompressor(max_window_size=2**30)
unpack.copy_stream(sys.stdin.buffer, sys.stdout.buffer, read_size=2**22, write_size=2**22)' | tar -x -C "$1"
  touch "$1/ready"
}
[ -e "$bundle/unpacker" ] || python3 -m zipfile -e "$bundle/zstandard.whl" "$bundle/unpacker"
unpack "$bundle" &
unpack "$bundle310"
wait $!
# What does not depend on the Python is the machine's own: libraries of torch and CUDA, and Triton's tools.
site=$bundle310/site310
other=$(python3 -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("torch").origin).parent.parent)')
for part in "$other"/torch/lib/*.so* "$other"/torch/bin/torch_shm_manager "$other"/triton/backends/nvidia/{bin,lib,include} "$other"/nvidia; do
  link=$site/${part#"$other"/}
  mkdir -p "$(dirname "$link")"
  [ -e "$link" ] || ln -sfn "$part" "$link"
done
export LD_LIBRARY_PATH=$bundle310/py310/lib:$bundle/stubs:$bundle/site39/tensorrt${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONHOME=$bundle310/py310 PYTHONPATH=$site:$PWD PYTHONNOUSERSITE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_MODULE_LOADING=LAZY
python=$bundle310/py310/bin/python3.10
if [ "${1:-}" = -- ]; then
  shift
  exec "$python" -W ignore "$@"
fi
exec "$python" -W ignore benchmarks/tensorrt86_torch.py "$@"
