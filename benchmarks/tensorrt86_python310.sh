#!/usr/bin/env bash
# Python 3.10 with arrcoc's dependencies and TensorRT 8.6.0's binding for it, in parts, for a GPU machine that has
# torch 2.11.0 for another Python, and what tensorrt86_bundle.sh made:
#     tensorrt86_python310.sh OUT_DIR [BYTES_A_PART]
# Wants pip, unzip, strip, zstd and a Python 3.10 to copy: PYTHON310, or the python3.10 on the path (pyenv's, uv's).
# Of torch and Triton only what depends on the Python is taken; tensorrt86_torch.sh links the machine's own rest.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$("${PYTHON310:-python3.10}" -c 'import sys; assert sys.version_info[:2] == (3, 10); print(sys.base_prefix)')
cd "$work"
site=b/site310
mkdir -p b/py310/bin b/py310/lib b/py310/include $site wheels

cp -L "$prefix/bin/python3.10" b/py310/bin/
cp -L "$prefix/lib/libpython3.10.so.1.0" b/py310/lib/
cp -r "$prefix/include/python3.10" b/py310/include/
tar -c -C "$prefix/lib" --exclude=__pycache__ --exclude=test --exclude=tests --exclude=site-packages \
  --exclude='config-3.10*' --exclude=idlelib --exclude=tkinter --exclude=turtledemo --exclude=ensurepip \
  --exclude=lib2to3 --exclude='_tkinter*' python3.10 | tar -x -C b/py310/lib
strip --strip-debug b/py310/lib/libpython3.10.so.1.0 b/py310/lib/python3.10/lib-dynload/*.so
# Libraries that its modules want, where the machine may have others.
for so in b/py310/lib/python3.10/lib-dynload/*.so; do ldd "$so"; done |
  grep -oE '/[^ ]*/lib(ffi|ssl|crypto|lzma|bz2|z|sqlite3|uuid)\.so[^ ]*' | sort -u | xargs cp -L -t b/py310/lib

get="--no-deps --python-version 3.10 --only-binary=:all: --platform manylinux_2_28_x86_64"
for tag in _2_27 _2_17 2014 2010; do get="$get --platform manylinux${tag}_x86_64"; done
pip install -q $get --target $site \
  numpy==1.26.4 ml_dtypes==0.5.4 scikit-image==0.25.2 lazy-loader==0.6 pillow==12.3.0 matplotlib==3.10.9 \
  torchvision==0.26.0 kornia==0.8.2 kornia_rs==0.2.0 einops==0.8.2 \
  transformers==5.17.0 tokenizers==0.23.3 safetensors==0.8.0 huggingface_hub==1.33.0 qwen-vl-utils==0.0.14 \
  regex==2026.9.29 requests==2.34.2 urllib3==2.8.0 idna==3.20 certifi charset-normalizer==3.5.2 tqdm==4.70.1 \
  httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0 filelock==4.1.0 fsspec==2026.9.0 packaging==26.3 \
  PyYAML==6.0.3 onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 protobuf==7.36.2 \
  pydantic==2.14.3 pydantic_core==2.50.4 annotated-types==0.8.0 annotated-doc==0.0.6 typing-inspection==0.4.5 \
  typing_extensions==4.16.0 typer==0.29.1 click==8.5.1 shellingham==1.5.4 rich==15.0.0 Pygments==2.21.0 \
  markdown-it-py==4.3.0 mdurl==0.1.2 sympy==1.14.0 mpmath==1.3.0 networkx==3.4.2 Jinja2==3.1.6 \
  MarkupSafe==3.0.4 setuptools==80.9.0 pytest==9.2.0 pluggy==1.7.0 iniconfig==2.3.1 tomli==2.5.0 \
  exceptiongroup==1.3.1 hypothesis==6.168.5 sortedcontainers==2.4.0
# WHEELS may name a folder that has the three large ones.
pip download -q $get ${WHEELS:+--find-links "$WHEELS"} -d wheels tensorrt==8.6.0 torch==2.11.0 triton==3.6.0
unzip -q wheels/tensorrt-*.whl 'tensorrt/__init__.py' tensorrt/tensorrt.so 'tensorrt-*' -d $site
unzip -q wheels/torch-*.whl -x 'torch/include/*' 'torch/share/*' 'torch/test/*' 'torch/bin/*' 'torch/lib/lib*' -d $site
unzip -q wheels/torch-*.whl torch/lib/libtorch_python.so -d $site
unzip -q wheels/triton-*.whl -x 'triton/backends/nvidia/bin/*' 'triton/backends/nvidia/lib/*' \
  'triton/backends/nvidia/include/*' 'triton/backends/amd/lib/*' 'triton/backends/amd/include/*' \
  triton/_C/libproton.so -d $site
strip $site/triton/_C/libtriton.so

find b -name __pycache__ -prune -exec rm -rf {} +
find $site/{sympy,networkx,numpy,skimage,onnx,mpmath} -name tests -prune -exec rm -rf {} +
rm -rf $site/onnx/backend/test $site/{bin,share} $site/matplotlib/tests
tar -c --sort=name -C b . | zstd -q -T2 -"${LEVEL:-19}" --long=27 -o all.zst
split -b "${2:-58720256}" -d all.zst "$out/part."
ls -l "$out"
