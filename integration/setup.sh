# shellcheck shell=bash
# Set-up shared by integration/quickstart and tests/run; to be sourced. Every step looks first at what
# is there, so that a second call costs seconds.
#
#   setup_system [extra apt packages...]   compilers and libraries
#   setup_python [extra pip packages...]   .venv (or $VENV) with torch ($TORCH_VERSION) and the tools
#   setup_package                          builds torch_distro and installs it into .venv

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
torch_version=${TORCH_VERSION:-2.15.0}
logs=$root/build/logs

apt_packages=(g++ cmake ninja-build pkg-config libzmq3-dev cppzmq-dev libsodium-dev libtbb-dev
  libxxhash-dev libspdlog-dev libfmt-dev nlohmann-json3-dev libcli11-dev libbenchmark-dev)
pip_packages=(numpy tqdm matplotlib rich scikit-build-core)
# Of the matrix: what integration/frameworks is run with besides torch.
framework_packages=(lightning==2.6.6 accelerate==1.15.0 transformers==5.24.0)

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# stage NAME COMMAND...: runs a command quietly and prints the seconds it took; shows its output and
# exits when it fails.
stage() {
  local name=$1 begin=$SECONDS log
  shift
  mkdir -p "$logs"
  log=$logs/${name//[^a-zA-Z0-9.]/-}.log
  printf '%-44s' "$name"
  if ! ("$@") >"$log" 2>&1 </dev/null; then
    printf 'failed after %d s\n' $((SECONDS - begin))
    tail -n 200 "$log" >&2
    die "FAILED: $name (all of its output: $log)"
  fi
  printf '%5d s\n' $((SECONDS - begin))
}

as_root() {
  if [[ $EUID -eq 0 ]]; then
    env DEBIAN_FRONTEND=noninteractive "$@"
  else
    sudo env DEBIAN_FRONTEND=noninteractive "$@"
  fi
}

apt_install() {
  as_root apt-get update &&
    as_root apt-get install --yes --no-install-recommends "$@"
}

# Distributions of a pip list (names, or name==version) that .venv lacks.
pip_missing() {
  "$venv/bin/python" - "$@" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

for wanted in sys.argv[1:]:
    name, _, pin = wanted.partition("==")
    try:
        found = version(name).partition("+")[0]
    except PackageNotFoundError:
        found = None
    if found is None or (pin and found != pin):
        print(wanted)
PYTHON
}

setup_system() {
  local package missing=()
  for package in "${apt_packages[@]}" "$@"; do
    if [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) != installed ]]; then
      missing+=("$package")
    fi
  done
  # A python3 that brings its own venv and headers needs neither package.
  command -v python3 >/dev/null || missing+=(python3)
  python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
  python3 -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' \
    2>/dev/null || missing+=(python3-dev)
  [[ ${#missing[@]} -eq 0 ]] && return
  command -v apt-get >/dev/null ||
    die "This set-up installs by apt-get, which is not here. It wants: ${missing[*]}"
  [[ $EUID -eq 0 ]] || command -v sudo >/dev/null ||
    die "Neither root nor sudo. Let an administrator run: apt-get install ${missing[*]}"
  stage "${#missing[@]} system packages" apt_install "${missing[@]}"
}

setup_python() {
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "Python >= 3.10 is needed; $(command -v python3) is $(python3 --version 2>&1)"
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    stage ".venv" python3 -m venv --clear "$venv"
  fi
  local missing
  missing=$(pip_missing "torch==$torch_version" "${pip_packages[@]}" "$@")
  [[ -z $missing ]] && return
  mapfile -t missing <<<"$missing"
  stage "${#missing[@]} Python packages (torch $torch_version)" \
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile "${missing[@]}"
}

# A hash of all that the installed package depends on.
package_stamp() {
  (
    cd "$root" || exit
    printf '%s\n' "$torch_version" "$("$venv/bin/python" --version)"
    find CMakeLists.txt pyproject.toml kernels plugins transport backend bindings integration/emulator \
      -type f -not -name '*.pyc' -not -name '*.so' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
  ) | sha256sum
}

setup_package() {
  local stamp
  stamp=$(package_stamp)
  if [[ -z $(pip_missing torch-distro) && $(cat "$venv/torch-distro.stamp" 2>/dev/null) == "$stamp" ]]; then
    return
  fi
  stage "torch_distro" "$venv/bin/python" -m pip install --disable-pip-version-check \
    --no-build-isolation --no-deps --force-reinstall \
    --config-settings=build-dir="build/package-torch-$torch_version" "$root"
  printf '%s\n' "$stamp" >"$venv/torch-distro.stamp"
}
