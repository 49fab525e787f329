#!/usr/bin/env bash
# TensorRT 8.6.0, the Python 3.9 and numpy it wants, and the packages that a GPU machine with torch lacks, in parts:
#     tensorrt86_bundle.sh OUT_DIR [BYTES_A_PART]
# Wants pip, apt-get, gcc, nm, unzip, zstd. 480 MB in all, with a window of 1 GiB, since TensorRT's kernels repeat
# far apart. They go as they are: the builder checks their digest.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
pip download -q --no-deps --python-version 3.9 --only-binary=:all: --platform manylinux_2_17_x86_64 -d wheels \
  tensorrt==8.6.0 numpy==1.26.4
mkdir -p b/site39 b/site312 b/stubs b/py39 apt/lists/partial apt/cache/archives/partial debs
for wheel in wheels/*.whl; do unzip -q -o "$wheel" -d b/site39; done
pip install -q --no-deps --target b/site312 --python-version 3.12 --only-binary=:all: \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \
  onnx==1.23.2 onnxscript onnx_ir ml_dtypes protobuf pydantic pydantic_core annotated_types typing_inspection

# Python 3.9 from Debian's bullseye: unpacked, not installed.
uri=$(grep -rhE '^URIs:' /etc/apt/sources.list.d/ | awk '{print $2}' | grep -i debian | head -n 1)
echo "deb [trusted=yes] $uri bullseye main" > apt/sources.list
apt="-o Dir::Etc::sourcelist=$work/apt/sources.list -o Dir::Etc::sourceparts=/dev/null"
apt="$apt -o Dir::State::lists=$work/apt/lists -o Dir::Cache=$work/apt/cache"
apt-get $apt update -qq
packages="python3.9-minimal=3.9.2-1 libpython3.9-minimal=3.9.2-1 libpython3.9-stdlib=3.9.2-1 libffi7 libssl1.1 libmpdec3"
(cd debs && for package in $packages; do apt-get $apt download -qq "$package"; done)
for deb in debs/*.deb; do dpkg -x "$deb" b/py39; done

# Only TensorRT's plugins link against cuBLAS and cuDNN; an import wants every symbol and never calls one.
trt=b/site39/tensorrt
nm -D --undefined-only $trt/libnvinfer_plugin.so.8 | grep -oE '(cublas|cublasLt|cudnn)[A-Za-z0-9_]+@[^ ]+' | sort -u > syms
for so in $(cut -d@ -f2 syms | sort -u); do
  grep "@$so\$" syms | sed -E 's/@.*//; s/.*/int &(void){return 1;}/' > stub.c
  echo "$so { global: *; };" > stub.map
  gcc -shared -fPIC -o "b/stubs/$so" stub.c -Wl,-soname,"$so" -Wl,--version-script=stub.map
done
rm -rf b/py39/usr/share b/site39/numpy/tests b/site39/numpy/*/tests b/site312/onnx/backend/test
find b/site312 -name __pycache__ -prune -exec rm -rf {} +
# What unpacks the rest where there is no zstd.
pip download -q --no-deps --python-version 3.12 --only-binary=:all: --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 -d unpacker zstandard
mv unpacker/zstandard-*.whl "$out/zstandard.whl"
tar -c -C b . | zstd -q -T2 -9 --long=30 -o all.zst
split -b "${2:-58720256}" -d all.zst "$out/part."
ls -l "$out"
