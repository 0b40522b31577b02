#!/usr/bin/env bash
# Format, lint and types: ruff, mypy --strict, clang-format
# needs: tools
# processors: 1
. "$(dirname "$0")/../environment.sh"

ruff check .
ruff format --check $(git ls-files '*.py' '*.pyi')
mypy --strict python/nplora
git ls-files '*.h' '*.cpp' | xargs clang-format --dry-run -Werror
