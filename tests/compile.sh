#!/bin/sh
# compile.sh - does diffdpo.h compile, without a warning, wherever it should?
#
#   sh tests/compile.sh [--all]     --all: also after every header of the C library, one by one
#
# The header alone and with its implementation: C99, C11, C++11, C++17, CUDA, Windows, WebAssembly; implementation in
# one file and use in another; each configuration macro; after system headers, with and without their feature macros;
# the program in its first comment.  A compiler that is not there is skipped, and counted.  JOBS (2) run at a time.
cd "$(dirname "$0")/.." || exit 1
root=$PWD
work=$root/build/compile
rm -rf "$work"
mkdir -p "$work"
n=0 skipped=0
W="-Wall -Wextra -pedantic -Werror"

# clang names everything unused while it parses, gcc and g++ only when they generate code.
parse_with() { case $1 in clang*) echo "$1 -fsyntax-only" ;; *) echo "$1 -O0 -c -o o" ;; esac; }

have() { command -v "$1" >/dev/null 2>&1; }

# check NAME COMMAND: to be run later, in its own folder; fails if the command does.
check() {
    n=$((n + 1))
    id=$(printf '%04d' $n)
    mkdir "$work/$id"
    echo "$1" >"$work/$id/name"
    printf 'cd "%s" || exit 1\n%s\n' "$work/$id" "$2" >"$work/$id/run"
}

skip() {
    echo "SKIPPED $1: $2"
    skipped=$((skipped + 1))
}

alone="$work/alone.c"
impl="$work/impl.c"
printf '#include "%s/diffdpo.h"\nint main(void) { return 0; }\n' "$root" >"$alone"
printf '#define DIFFDPO_IMPLEMENTATION\n#include "%s/diffdpo.h"\nint main(void) { return 0; }\n' "$root" >"$impl"
cp "$alone" "$work/alone.cpp"; cp "$impl" "$work/impl.cpp"
cp "$alone" "$work/alone.cu"; cp "$impl" "$work/impl.cu"
MACROS="DIFFDPO_NO_STB DIFFDPO_NO_SIMD DIFFDPO_NO_THREADS DIFFDPO_NO_MMAP DIFFDPO_STATIC DIFFDPO_CUDA"

# ------------------------------------------------------------------------------------------------ languages

c_compilers=
for cc in gcc clang; do if have $cc; then c_compilers="$c_compilers $cc"; else skip "$cc" "not installed"; fi; done
[ -n "$c_compilers" ] || c_compilers=${CC:-cc}
first=${c_compilers# }
first=${first%% *}
for cc in $c_compilers; do
    for std in c99 c11; do
        check "$cc $std, header alone" "$cc -std=$std $W -fsyntax-only $alone"
        check "$cc $std, implementation" "$(parse_with "$cc") -std=$std $W $impl"
    done
    check "$cc gnu17, header alone" "$cc -std=gnu17 $W -fsyntax-only $alone"
    check "$cc c99 -O2, implementation" "$cc -std=c99 $W -O2 -c $impl -o o"
done
if have g++; then
    for std in c++11 c++17; do
        check "g++ $std, header alone" "g++ -std=$std $W -fsyntax-only $work/alone.cpp"
        check "g++ $std, implementation" "g++ -std=$std $W -O0 -c $work/impl.cpp -o o"
    done
else skip "g++" "not installed"; fi
if have clang++; then
    for std in c++11 c++17; do
        check "clang++ $std, implementation" "clang++ -std=$std $W -fsyntax-only $work/impl.cpp"
    done
else skip "clang++" "not installed"; fi

nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
if [ -x "$nvcc" ]; then
    strict="-Werror all-warnings -Xcompiler -Wall,-Wextra -x cu -c"
    check "nvcc c++11, header alone" "$nvcc -std=c++11 $strict $work/alone.cu -o o"
    check "nvcc c++17, header alone" "$nvcc -std=c++17 $strict $work/alone.cu -o o"
    check "nvcc c++17, implementation" "$nvcc -std=c++17 $strict $work/impl.cu -o o"
else skip nvcc "not installed"; fi

# -ffast-math removes the guards against NaN: the header must refuse it, by name.
for cc in $c_compilers; do
    check "$cc -ffast-math is refused" "$cc -ffast-math -fsyntax-only $impl 2>log && exit 1; grep -q IEEE log"
done

# ------------------------------------------------------------------------------------------------ configurations

all=
for m in $MACROS; do
    all="$all -D$m"
    for cc in $c_compilers; do      # gcc only where clang is missing: it has to generate code to find what is unused
        case $cc in clang) ;; *) have clang && [ $m != DIFFDPO_STATIC ] && continue ;; esac
        check "$cc -D$m" "$(parse_with "$cc") -std=c99 $W -D$m $impl"
    done
    if have clang++; then check "clang++ -D$m" "clang++ -fsyntax-only -std=c++11 $W -D$m $work/impl.cpp"; fi
    case $m in *STATIC) ;; *) check "$first -D$m, header alone" "$first -std=c99 $W -D$m -fsyntax-only $alone" ;; esac
done
for cc in $c_compilers; do check "$cc, all macros" "$(parse_with "$cc") -std=c99 $W $all $impl"; done
slim=$(echo "$all" | sed 's/-DDIFFDPO_STATIC//; s/-DDIFFDPO_CUDA//')

# Implementation in one file, use in another, in C and C++.  Only names with dpo_ may leave the object, so that nothing else
# in a program can collide; no mutable data; nothing called that ends the program or depends on its surroundings.
use=$root/tests/compile/use.c
one=$root/tests/compile/impl.c
banned='exit|_exit|abort|getenv|setlocale|strtod|strtof|atof|rand|srand|signal|printf|puts|putchar'
script="$first -std=c99 $W -c $one -o a.o && $first -std=c99 $W -c $use -o b.o && $first a.o b.o -o program -lm -lpthread && ./program"
if have g++; then
    script="$script && g++ -std=c++11 $W -x c++ -c $use -o c.o && g++ a.o c.o -o program -lm -lpthread && ./program"
    check "two files, implementation in C++, use in C" "g++ -std=c++11 $W -x c++ -c $one -o a.o &&
        $first -std=c99 $W -c $use -o b.o && g++ a.o b.o -o program -lm -lpthread && ./program"
fi
check "two files, implementation in C, use in C and C++, only dpo_ names" "$script &&
    ! nm -g --defined-only a.o | awk '{ print \$3 }' | grep -v '^dpo_'"
check "two files, all macros, linked and run, no mutable data, no exit or printf" "
    $first -std=c99 $W -fno-pic $slim -c $one -o a.o && $first -std=c99 $W $slim -c $use -o b.o &&
    $first -no-pie a.o b.o -o program -lm -lpthread && ./program && ! nm a.o | grep -E ' [bBdDcC] ' && ! nm -u a.o | grep -wE '$banned'"

# The program in the header's first comment must be one.
check "the program in the header's first comment" "awk '/^   A WHOLE PROGRAM/ { on = 1; next } on && /^   [A-Z]/ { exit }
    on { sub(/^       /, \"\"); sub(\"\\\"diffdpo.h\\\"\", \"\\\"$root/diffdpo.h\\\"\"); print }' $root/diffdpo.h > program.c &&
    grep -q main program.c && $first -std=c99 -Wall -Wextra -Werror program.c -o program -lm -lpthread"

if [ -f README.md ] && grep -q '^```c$' README.md; then
    check "the program in README.md" "awk '/^\`\`\`c\$/ { on = 1; next } on && /^\`\`\`/ { exit }
        on { sub(\"\\\"diffdpo.h\\\"\", \"\\\"$root/diffdpo.h\\\"\"); print }' $root/README.md > program.c &&
        grep -q main program.c && $first -std=c99 -Wall -Wextra -Werror program.c -o program -lm -lpthread"
fi

# Every example is built by one line, which stands at its top.
for e in examples/*.c; do
    [ -f "$e" ] && check "build line of $e" "head -n 12 $root/$e | grep -qE '^ +build +cc -O2 $e -o [a-z_/]+ '"
done

# Programs that run.sh builds only when they are asked for by name.
for t in fullsize trainer_memory; do check "tests/$t.c" "$first -fsyntax-only -Wall -Wextra -Werror $root/tests/$t.c"; done

# ------------------------------------------------------------------------------------------------ Windows, WebAssembly

win=x86_64-w64-mingw32-gcc
if have $win; then
    check "$win c99, header alone" "$win -std=c99 $W -fsyntax-only $alone"
    check "$win c99, two files, linked" "$win -std=c99 $W $one $use -o program.exe"
    check "$win gnu11, parsed" "$win -std=gnu11 $W -fsyntax-only $impl"
    check "$win, test_ops.exe" "$win -O0 -static $root/tests/test_ops.c -o test_ops.exe"
    for h in windows.h winsock2.h; do
        printf '#include <%s>\n#include "%s"\n' $h "$impl" >"$work/before_$h.c"
        printf '#include "%s"\n#include <%s>\nDWORD last(void);\nDWORD last(void) { return GetLastError(); }\n' "$impl" $h >"$work/after_$h.c"
        check "$win, after <$h>" "$win -std=gnu11 $W -fsyntax-only $work/before_$h.c"
        check "$win, before <$h>" "$win -std=gnu11 $W -fsyntax-only $work/after_$h.c"
    done
    for m in -DUNICODE -D_UNICODE -DWIN32_LEAN_AND_MEAN -DNOMINMAX -D_WIN32_WINNT=0x0601; do
        check "$win $m" "$win -std=gnu11 $W $m -fsyntax-only $impl"
    done
else skip "$win" "not installed (gcc-mingw-w64-x86-64)"; fi

wasm="clang --target=wasm32-wasi $W -DDIFFDPO_NO_THREADS -DDIFFDPO_NO_MMAP -DDIFFDPO_NO_STB"
if have clang && [ -d /usr/include/wasm32-wasi ]; then
    check "wasm32, header alone" "$wasm -std=c99 -fsyntax-only $alone"
    check "wasm32, implementation" "$wasm -std=c99 -O0 -c $impl -o o"
    check "wasm32, implementation, no macro set" "clang --target=wasm32-wasi $W -std=c99 -fsyntax-only $impl"
elif have clang; then
    # Without a C library for it the bodies cannot be compiled, but the declarations can.
    check "wasm32, header alone" "clang --target=wasm32 $W -std=c99 -ffreestanding -fsyntax-only -DDIFFDPO_NO_THREADS -DDIFFDPO_NO_MMAP $alone"
    skip "wasm32, implementation" "no C library for it (wasi-libc)"
else skip wasm32 "clang is not installed"; fi

# ------------------------------------------------------------------------------------------------ system headers

# Fastest of those there: clang parses the implementation in a second, and names what is unused, too.
if have clang; then parse=$(parse_with clang); else parse=$(parse_with "$first"); fi
std_headers="assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdarg stdbool stddef
    stdint stdio stdlib string tgmath time wchar wctype"
posix_headers="dirent dlfcn fcntl fnmatch glob grp iconv langinfo libgen netdb poll pthread pwd regex sched search semaphore
    spawn strings syslog termios unistd utime wordexp aio sys/mman sys/param sys/resource sys/select sys/socket sys/stat
    sys/time sys/times sys/types sys/uio sys/utsname sys/wait netinet/in arpa/inet"
other_headers="alloca endian err error getopt malloc sys/cdefs sys/ioctl sys/syscall sys/sysinfo sys/ucontext ucontext
    execinfo link features byteswap"

# header_check LABEL FLAGS HEADER...: the implementation after these headers, and before them.
header_check() {
    label=$1 flags=$2
    shift 2
    n2=$((${n2:-0} + 1))
    before=$work/headers_$n2.c
    after=$work/headers_after_$n2.c
    : >"$before"
    for h in "$@"; do
        if echo "#include <$h.h>" | $parse -D_GNU_SOURCE -x c - >/dev/null 2>&1; then echo "#include <$h.h>" >>"$before"; fi
    done
    { echo "#include \"$impl\""; cat "$before"; } >"$after"
    echo "#include \"$impl\"" >>"$before"
    check "after $label $flags" "$parse $flags $W -Wno-error=cpp $before"
    check "before $label $flags" "$parse $flags $W -Wno-error=cpp $after"
}

for h in $std_headers unistd pthread sys/types sys/mman sys/param termios sys/ucontext; do
    n2=$((${n2:-0} + 1))
    printf '#include <%s.h>\n#include "%s"\n' "$h" "$impl" >"$work/header_$n2.c"
    check "after <$h.h>" "$parse -std=c99 $W $work/header_$n2.c"
done
for flags in -std=c99 "-std=gnu11 -D_GNU_SOURCE" "-std=c99 -D_POSIX_C_SOURCE=200809L" "-std=c99 -D_POSIX_C_SOURCE=200112L" \
             "-std=c99 -D_XOPEN_SOURCE=700" "-std=c99 -D_GNU_SOURCE" "-std=c99 -D_DEFAULT_SOURCE" "-std=c99 -D_FILE_OFFSET_BITS=64"; do
    # shellcheck disable=SC2086
    header_check "all of C" "$flags" $std_headers
done
# shellcheck disable=SC2086
header_check "all of C and POSIX" "-std=gnu11" $std_headers $posix_headers
# shellcheck disable=SC2086
header_check "all of C, POSIX and the rest" "-std=gnu11 -D_GNU_SOURCE" $std_headers $posix_headers $other_headers
if have g++; then
    printf '#include <algorithm>\n#include <cmath>\n#include <complex>\n#include <string>\n#include <thread>\n#include <vector>\n#include <complex.h>\n#include "%s"\n' \
        "$work/impl.cpp" >"$work/cpp_headers.cpp"
    check "g++, after C++ headers" "g++ -std=c++11 $W -O0 -c $work/cpp_headers.cpp -o o"
fi
if [ "${1:-}" = --all ]; then
    for h in $(cd /usr/include && find . -maxdepth 2 -name '*.h' | sed 's|^\./||; s|\.h$||' | grep -E '^(sys/|net|arpa/|[a-z_]*$)' | sort); do
        printf '#include <%s.h>\n' "$h" >"$work/try.c"
        $parse -std=gnu11 -D_GNU_SOURCE "$work/try.c" >/dev/null 2>&1 || continue
        n2=$((n2 + 1))
        printf '#include <%s.h>\n#include "%s"\n' "$h" "$impl" >"$work/header_$n2.c"
        check "after <$h.h>, gnu11" "$parse -std=gnu11 -D_GNU_SOURCE $W $work/header_$n2.c"
    done
fi

# ------------------------------------------------------------------------------------------------ run and report

find "$work" -name run | sort | xargs -n 1 -P "${JOBS:-2}" sh -c 'd=${1%/run}; sh "$1" >"$d/out" 2>&1; echo $? >"$d/status"' sh
passed=0 failed=0
for d in "$work"/[0-9]*/; do
    if [ "$(cat "$d/status")" = 0 ]; then
        passed=$((passed + 1))
        echo "ok    $(cat "$d/name")"
    else
        failed=$((failed + 1))
        echo "FAIL  $(cat "$d/name")"
        grep -E 'error|undefined' "$d/out" | head -n 5
    fi
    rm -f "$d"/o "$d"/*.o "$d"/*.exe "$d"/program
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
