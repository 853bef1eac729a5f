#!/bin/sh
# quickstart.sh - from a fresh clone to quickstart.html: installs what is missing, builds, runs.
#
#   sh examples/quickstart.sh [--seed N] [--judge warm|soft|compact] [--steps N] [--out DIR] ...
#
# All arguments go to build/quickstart (see quickstart.c), and its exit status comes back.  The page and the folder
# quickstart-out/ appear in the root of the project, wherever this is called from, unless --out names another place.

CDPATH=''
root=$(cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
packages='gcc libc6-dev libstb-dev'
cc=${CC:-cc}

fail() { echo "quickstart: $*" >&2; exit 1; }

# A compiler, its C library, and stb in one of the two places where diffdpo.h looks for it.
have_all() {
    command -v "$cc" >/dev/null 2>&1 || return 1
    for folder in stb/ ''; do
        printf '#include <%s>\n' stdio.h "${folder}stb_image.h" "${folder}stb_image_write.h" |
            "$cc" -E - >/dev/null 2>&1 && return 0
    done
    return 1
}

# Only root may install, and only where there is apt; everyone else is told the line.
install_packages() {
    command -v apt-get >/dev/null 2>&1 || fail "please install a C compiler and stb (github.com/nothings/stb)"
    [ "$(id -u)" = 0 ] || fail "something is missing; please run: sudo apt-get install -y $packages"
    echo "installing $packages" >&2
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    { apt-get -qq update; apt-get -qq install -y --no-install-recommends $packages; } >&2 ||
        fail "apt-get could not install what is missing; please run: apt-get install -y $packages"
    have_all || fail "$cc or stb is still missing; please run: apt-get install -y $packages"
}

# The program is built under another name first, so that an interrupted build leaves nothing that looks finished.
build() {
    have_all || install_packages
    mkdir -p "$root/build" 2>/dev/null && [ -w "$root/build" ] || fail "cannot write into $root/build"
    echo "building build/quickstart" >&2
    ( cd "$root" && "$cc" -O2 examples/quickstart.c -o build/quickstart.$$ -lm -lpthread &&
        mv -f build/quickstart.$$ build/quickstart ) || { rm -f "$root/build/quickstart.$$"; fail "could not build"; }
}

[ -r "$root/diffdpo.h" ] || fail "$root/diffdpo.h is missing"
newer=$(find "$root/diffdpo.h" "$root"/examples/quickstart*.[ch] -newer "$root/build/quickstart" 2>&1)
[ -z "$newer" ] || build            # without a program, find complains: that is an answer, too
exec "$root/build/quickstart" --model "$root/examples/emoji" --out "$root" "$@"
