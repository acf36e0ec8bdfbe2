#!/bin/bash
# Finds, or on Debian installs, the programs this project is built and checked with.
#
#   scripts/toolchain.sh wasm      Emscripten 3.1.69 or newer -> .toolchain/emcc
#   scripts/toolchain.sh native    gcc and clang, both with ASan and UBSan
#   scripts/toolchain.sh lint      clang-format, cppcheck
#   scripts/toolchain.sh browser   Chromium -> .toolchain/chromium
#
# Each command leaves a stamp in .toolchain/, so a second run does nothing. Where Emscripten comes from, first match wins:
#   1. emcc on PATH, if new enough;
#   2. the package of this Debian release, if new enough (Debian 13 and later);
#   3. on Debian 12: the Debian 13 package, unpacked inside .toolchain/ beside the C library it wants, with the LLVM 19 of
#      Debian 12. Nothing of Debian 13 is installed in the system; it is fetched from the mirror that apt here already uses.
# .toolchain/env tells the Makefile what was found.
set -euo pipefail

EMCC_MINIMUM=3.1.69
LLVM=19
DONOR=trixie # the release that carries EMCC_MINIMUM
RECIPE=1    # raise when the steps below change, so that existing checkouts run them again

cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=.toolchain

say() { printf 'toolchain: %s\n' "$*" >&2; }
die() {
  say "$@"
  exit 1
}

# at_least A B: version A is B or newer
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# Atomic write of standard input, so that an interrupted run leaves no half file behind
write() { cat >"$1.tmp" && mv -f "$1.tmp" "$1"; }

# --- Debian packages -------------------------------------------------------------------------------------------------

# A subshell, so that the variables of os-release stay in it
codename() { (. /etc/os-release 2>/dev/null && [ "${ID:-}" = debian ] && printf '%s' "${VERSION_CODENAME:-}") || true; }
can_install() { [ -n "$(codename)" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
candidate() { LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: //p' | grep -v '^(none)$' || true; }

apt() {
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 -o Acquire::http::Timeout=30 \
    -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 "$@" </dev/null >"$tools/apt.log" 2>&1
}

# A source of the machine that does not answer must not stop us: what counts is whether the package is found afterwards
apt_update() {
  say 'apt-get update'
  apt update || true
}

# apt_install PACKAGE...: those that are missing; the lists are refreshed only when they do not serve
apt_install() {
  local package missing=() known=yes
  for package in "$@"; do
    installed "$package" || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  can_install || die "missing: ${missing[*]}. On Debian, run this as root, or: apt-get install ${missing[*]}"
  for package in "${missing[@]}"; do
    [ -n "$(candidate "$package")" ] || known=no
  done
  [ $known = yes ] || apt_update
  say "apt-get install ${missing[*]}"
  apt install -y --no-install-recommends "${missing[@]}" && return 0
  [ $known = yes ] && apt_update && apt install -y --no-install-recommends "${missing[@]}" && return 0
  cat "$tools/apt.log" >&2
  die "could not install ${missing[*]}"
}

# --- Emscripten ------------------------------------------------------------------------------------------------------

emcc_version() { "$1" --version 2>/dev/null </dev/null | sed -n '1s/.* \([0-9][0-9.]*[0-9]\).*/\1/p'; }

# The address from which apt here takes this release
mirror() {
  apt-get indextargets --format '$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(CREATED_BY)|$(REPO_URI)' |
    awk -F '|' -v name="$(codename)" '($1 == name || $2 == name) && $3 == "main" && $4 == "Packages" { print $5; exit }'
}

# Fetches and unpacks what Debian 12 lacks into $1: Emscripten, Binaryen, and the C and C++ libraries Binaryen wants
unpack_donor() {
  local root=$1 work=$tools/donor uri package options
  uri=$(mirror)
  [ -n "$uri" ] || { apt_update && uri=$(mirror); }
  [ -n "$uri" ] || die 'apt has no source for this release'
  rm -rf "$work" "$root"
  mkdir -p "$work/lists/partial" "$work/archives/partial" "$root"
  {
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$DONOR"
    for package in /usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
      [ ! -f "$package" ] || { printf 'Signed-By: %s\n' "$package" && break; }
    done
  } >"$work/donor.sources"
  options=(-o "Dir::Etc::sourcelist=$PWD/$work/donor.sources" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::Lists=$PWD/$work/lists" -o "Dir::Cache::archives=$PWD/$work/archives"
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
    -o APT::Update::Post-Invoke-Success::= -o APT::Update::Post-Invoke::=)
  say "fetching Emscripten of Debian $DONOR"
  (
    apt "${options[@]}" update
    tools=$PWD/$tools
    cd "$work/archives"
    apt "${options[@]}" download emscripten binaryen libc6 libstdc++6 libgcc-s1
  ) || {
    cat "$tools/apt.log" >&2
    die "could not fetch Emscripten of Debian $DONOR"
  }
  say 'unpacking'
  for package in binaryen libc6 libstdc++6 libgcc-s1; do
    dpkg-deb -x "$work/archives/${package}"_*.deb "$root"
  done
  # Of 1.6 GB most are prebuilt libraries of kinds not used here: threads, link-time optimisation, sanitizers
  dpkg-deb --fsys-tarfile "$work/archives"/emscripten_*.deb | tar -x -C "$root" \
    --exclude='./usr/share/doc' --exclude='*/share/emscripten/test' --exclude='*/sysroot/lib/wasm64*' \
    --exclude='*/wasm32-emscripten/lto*' --exclude='*/wasm32-emscripten/pic' --exclude='*/wasm32-emscripten/*-mt*' \
    --exclude='*/wasm32-emscripten/*-ww*' --exclude='*/wasm32-emscripten/libsanitizer*' \
    --exclude='*/wasm32-emscripten/*asan*'
  rm -rf "$work"
}

# Wrappers find their place by themselves, so the checkout may be moved
emcc_of_donor() {
  local root=$tools/$DONOR program
  apt_install "clang-$LLVM" "lld-$LLVM" "llvm-$LLVM" python3
  if [ "$(cat "$root/.complete" 2>/dev/null)" != "$RECIPE" ]; then
    unpack_donor "$root"
    mkdir -p "$root/binaryen/bin"
    for program in "$root"/usr/bin/wasm*; do
      program=$(basename "$program")
      write "$root/binaryen/bin/$program" <<'END'
#!/bin/sh
root=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd)
for loader in "$root"/usr/lib*/ld-linux* "$root"/lib*/ld-linux* "$root"/usr/lib/*/ld-linux*; do [ ! -f "$loader" ] || break; done
libraries=$(printf '%s:' "$root"/usr/lib/*-linux-gnu* "$root"/lib/*-linux-gnu*)
exec "$loader" --library-path "$libraries" "$root/usr/bin/$(basename -- "$0")" "$@"
END
      chmod +x "$root/binaryen/bin/$program"
    done
    write "$root/emscripten.config" <<END
import os
here = os.path.dirname(os.environ['EM_CONFIG'])
LLVM_ROOT = '/usr/lib/llvm-$LLVM/bin'
BINARYEN_ROOT = os.path.join(here, 'binaryen')
NODE_JS = 'node'
FROZEN_CACHE = True
END
    printf '%s' $RECIPE | write "$root/.complete"
  fi
  write "$tools/emcc" <<END
#!/bin/sh
here=\$(CDPATH= cd -- "\$(dirname -- "\$0")" && pwd)
EM_CONFIG=\$here/$DONOR/emscripten.config exec python3 -E "\$here/$DONOR/usr/share/emscripten/emcc.py" "\$@"
END
}

emcc_of() {
  write "$tools/emcc" <<END
#!/bin/sh
exec '$1' "\$@"
END
}

find_wasm() {
  local found version release
  release=$(codename)
  found=$(command -v emcc || true)
  [ ! "$found" -ef "$tools/emcc" ] || found= # our own wrapper must not call itself
  if [ -n "$found" ] && version=$(emcc_version "$found") && [ -n "$version" ] && at_least "$version" $EMCC_MINIMUM; then
    emcc_of "$found"
  elif can_install && version=$(candidate emscripten) && at_least "${version%%[+~-]*}" $EMCC_MINIMUM; then
    apt_install emscripten
    emcc_of /usr/bin/emcc
  elif [ "$release" = bookworm ]; then
    emcc_of_donor
  else
    die "no emcc of version $EMCC_MINIMUM or newer on PATH. Install Emscripten with emsdk (emsdk install $EMCC_MINIMUM," \
      "then emsdk activate and source emsdk_env.sh) and run this again."
  fi
  chmod +x "$tools/emcc"
  version=$(emcc_version "$tools/emcc")
  [ -n "$version" ] || die "$tools/emcc does not run: try $tools/emcc --version"
  printf 'EMCC_VERSION := %s\n' "$version" | write "$tools/env"
  say "emcc $version"
}

# --- the rest --------------------------------------------------------------------------------------------------------

# sanitizes COMPILER: builds and runs a program with both sanitizers
sanitizes() {
  local program=$tools/sanitizes
  command -v "$1" >/dev/null || return 1
  echo 'int main(void) { return 0; }' |
    "$1" -x c -fsanitize=address,undefined -o "$program" - >/dev/null 2>&1 && "$program" </dev/null && rm -f "$program"
}

find_native() {
  sanitizes gcc || apt_install gcc libc6-dev
  sanitizes clang || apt_install clang libclang-rt-dev libc6-dev
  sanitizes gcc || die 'gcc with -fsanitize=address,undefined does not work here'
  sanitizes clang || die 'clang with -fsanitize=address,undefined does not work here'
  say 'gcc and clang with sanitizers'
}

find_lint() {
  command -v clang-format >/dev/null || apt_install clang-format
  command -v cppcheck >/dev/null || apt_install cppcheck
  say "$(clang-format --version | sed 's/.*\(clang-format version [0-9.]*\).*/\1/'), $(cppcheck --version)"
}

# CHROMIUM=path wins over what is on PATH
find_browser() {
  local name found=
  for name in ${CHROMIUM:+"$CHROMIUM"} chromium chromium-browser google-chrome google-chrome-stable; do
    [ -n "$found" ] || found=$(command -v "$name" || true)
  done
  if [ -z "$found" ]; then
    apt_install chromium
    found=$(command -v chromium)
  fi
  ln -sfn "$found" "$tools/chromium"
  say "$found"
}

# --- which of them ---------------------------------------------------------------------------------------------------

# What an earlier answer depends on; the answer stands as long as this does not change
key() {
  case $1 in
  wasm) printf '%s %s' $RECIPE "$(command -v emcc || true)" ;;
  native) printf '%s %s %s' $RECIPE "$(command -v gcc || true)" "$(command -v clang || true)" ;;
  lint) printf '%s %s %s' $RECIPE "$(command -v clang-format || true)" "$(command -v cppcheck || true)" ;;
  browser) printf '%s %s' $RECIPE "${CHROMIUM:-}" ;;
  *) die "what is '$1'? Give one or more of: wasm native lint browser" ;;
  esac
}

stands() {
  [ "$(cat "$tools/stamp.$1" 2>/dev/null)" = "$(key "$1")" ] || return 1
  case $1 in
  wasm) [ -x "$tools/emcc" ] && [ -f "$tools/env" ] ;;
  browser) [ -x "$tools/chromium" ] ;;
  esac
}

[ $# -gt 0 ] || die 'give one or more of: wasm native lint browser'
for part in "$@"; do
  key "$part" >/dev/null
done
mkdir -p "$tools"
# Two makes in one checkout take turns
if command -v flock >/dev/null; then
  exec 9>"$tools/lock"
  flock 9
fi
for part in "$@"; do
  stands "$part" && continue
  "find_$part"
  key "$part" | write "$tools/stamp.$part"
done
