#!/bin/sh
# run.sh - build and run the tests.
#
#   sh tests/run.sh              every test that takes minutes or less
#   sh tests/run.sh NAME ...     these: a program of tests/, parity, interop, compile, header, and the long ones,
#                                asan, valgrind, wine, isa, fuzz-long, quickstart; full is all of them; by name alone
#                                fullsize (8 GB of disk and of memory), trainer_memory, kills (a trainer killed 200
#                                times), winrate (each loss on the emoji model, 7 minutes), trainer_mpi (needs mpicc),
#                                cuda_device (all that wants a GPU, skipped where there is none)
#   sh tests/run.sh --build      every program of tests/ and examples/ into build/, run nothing
#   sh tests/run.sh --install    first install the compilers that are missing (Debian, as root), then run
#   sh tests/run.sh --list       the names
#
# Programs that use no name with dpoi_ are linked with one object of the implementation (SHARED below), the others
# include it; of those only the ones that test or time kernels are optimised as far as CFLAGS says, the rest with -O1.
# Environment: CC (cc), CFLAGS (-O2), JOBS (2).  What a test prints is kept in build/log/NAME.txt.
# The last line is the sum over the tests: N passed, N failed, N skipped.  Exit status 1 if any failed.
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc}
CFLAGS=${CFLAGS:--O2}
JOBS=${JOBS:-2}
export CC CFLAGS JOBS
GOLDEN="tests/golden ../shared/golden"

have() { command -v "$1" >/dev/null 2>&1; }

# Names of all programs; those of tests/ that run without arguments and end with the line of counts.
programs() { for f in tests/*.c examples/*.c; do [ -f "$f" ] && basename "$f" .c; done; }
tests()    { for f in tests/test_*.c tests/fuzz.c; do [ -f "$f" ] && basename "$f" .c; done; }
scripts()  { for f in tests/test_*.sh; do [ -f "$f" ] && basename "$f" .sh; done; }
source_of() { if [ -f "tests/$1.c" ]; then echo "tests/$1.c"; else echo "examples/$1.c"; fi; }

# ------------------------------------------------------------------------------------------------ building

SHARED="tiny_model test_events test_models test_samplers winrate convert emoji_quality pretrain quickstart sample train"
QUICK="fuzz interop fullsize trainer_memory test_data test_files test_formats test_train test_vae"

# among WORD LIST; prepare_shared: build/use is a copy of tests/ and examples/ without the line that asks for the
# implementation, and a source with nothing else.
among() { case " $2 " in *" $1 "*) ;; *) return 1 ;; esac; }
prepare_shared() {
    mkdir -p build/use/tests build/use/examples
    ln -sf ../../diffdpo.h build/use/diffdpo.h
    for f in tests/*.[ch] examples/*.[ch]; do
        sed 's/^#define DIFFDPO_IMPLEMENTATION.*//' "$f" >build/use/part
        if cmp -s build/use/part "build/use/$f"; then :; else mv build/use/part "build/use/$f"; fi
    done
    rm -f build/use/part
    [ -f build/use/implementation.c ] ||
        printf '#define DIFFDPO_IMPLEMENTATION\n#include "../../diffdpo.h"\n' >build/use/implementation.c
}

# build_one FOLDER NAME: FOLDER/NAME from its source, if that or a header is newer.  FOLDER chooses the compiler.
# NAME `implementation` is the object that those of SHARED are linked with.
build_one() {
    out=$1/$2 src=$(source_of "$2") cc=$CC flags=$CFLAGS libs="-lm -lpthread" log=build/log/build-$2.txt object=
    if among "$2" "$QUICK" && [ "$CFLAGS" = -O2 ]; then flags=-O1; fi
    if among "$2" "$SHARED"; then src=build/use/$src object=$1/implementation.o; fi
    if [ "$2" = implementation ]; then out=$out.o src=build/use/implementation.c object=-c; fi
    case $1 in
    build/asan) cc=$SANITIZING flags="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
                log=build/log/build-asan-$2.txt ;;
    build/valgrind) flags="-g -O1" log=build/log/build-valgrind-$2.txt ;;
    build/wine) cc=x86_64-w64-mingw32-gcc flags="-O2 -static -Ibuild/wine/include" libs="-lm" log=build/log/build-wine-$2.txt ;;
    esac
    if [ "$1" = build/wine ] && [ "$2" != implementation ]; then out=$out.exe; fi
    [ "$object" != -c ] || libs=
    [ -n "$cc" ] || return 1
    mkdir -p "$1" build/log
    if [ -f "$out" ] && [ -z "$(find "$src" diffdpo.h tests/*.h examples/*.h -newer "$out" 2>/dev/null)" ]; then return 0; fi
    # shellcheck disable=SC2086
    if $cc $flags -Wall -Wextra "$src" $object -o "$out.part" $libs >"$log" 2>&1 && mv "$out.part" "$out"; then
        return 0
    fi
    echo "FAIL build of $2:"
    grep -E 'error|undefined|fatal' "$log" | head -5
    rm -f "$out" "$out.part"
    return 1
}

# build FOLDER NAME...: all of them, JOBS at a time.
build() {
    folder=$1
    shift
    [ $# -gt 0 ] || return 0
    mine= shared=
    for p in "$@"; do if among "$p" "$SHARED"; then shared="$shared $p"; else mine="$mine $p"; fi; done
    [ -z "$shared" ] || { prepare_shared; mine="implementation $mine"; }
    # shellcheck disable=SC2086
    printf '%s\n' $mine | xargs -n 1 -P "$JOBS" sh tests/run.sh --one "$folder"
    # shellcheck disable=SC2086
    [ -z "$shared" ] || printf '%s\n' $shared | xargs -n 1 -P "$JOBS" sh tests/run.sh --one "$folder"
}

sanitizing_compiler() {
    for try in clang gcc; do
        have $try && echo 'int main(void) { return 0; }' >build/try.c &&
            $try -fsanitize=address,undefined build/try.c -o build/try >/dev/null 2>&1 && build/try && echo $try && return
    done
}

install_packages() {
    missing=
    have gcc || missing="$missing gcc libc6-dev"
    have g++ || missing="$missing g++"
    have clang || missing="$missing clang"
    have valgrind || missing="$missing valgrind"
    have ctags || missing="$missing universal-ctags"
    have x86_64-w64-mingw32-gcc || missing="$missing gcc-mingw-w64-x86-64"
    have aarch64-linux-gnu-gcc || missing="$missing gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    have qemu-aarch64 || missing="$missing qemu-user"
    [ -f /usr/include/stb/stb_image.h ] || missing="$missing libstb-dev"
    [ -d /usr/include/wasm32-wasi ] || missing="$missing wasi-libc"
    [ -n "$missing" ] || return 0
    if ! have apt-get || [ "$(id -u)" != 0 ]; then
        echo "not root, or not Debian: to run all checks, run: apt-get install$missing"
        return 0
    fi
    export DEBIAN_FRONTEND=noninteractive
    mkdir -p build/log
    apt-get update >build/log/install.txt 2>&1
    # shellcheck disable=SC2086
    apt-get install -y --no-install-recommends $missing >>build/log/install.txt 2>&1 && return 0
    for p in $missing; do       # one that this release does not have must not keep out the others
        apt-get install -y --no-install-recommends "$p" >>build/log/install.txt 2>&1 || echo "could not install $p"
    done
}

# ------------------------------------------------------------------------------------------------ counting

passed=0 failed=0 skipped=0

# count NAME STATUS LOG SECONDS: adds what the last line of LOG says.  A test that died before it, or that says nothing
# of a failure but exits as if there were one, is one failure more.
count() {
    line=$(tail -n 1 "$3" | tr -d '\r' | grep -E '^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$')
    p=$(echo "$line" | sed -n 's/^\([0-9]*\) passed.*/\1/p')
    f=$(echo "$line" | sed -n 's/.* \([0-9]*\) failed.*/\1/p')
    s=$(echo "$line" | sed -n 's/.* \([0-9]*\) skipped.*/\1/p')
    p=${p:-0} f=${f:-0} s=${s:-0} died=
    if [ -z "$line" ]; then f=$((f + 1)) died=", no line of counts (exit status $2)"
    elif [ "$2" != 0 ] && [ "$f" = 0 ]; then f=1 died=", exit status $2"; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    printf '%-36s %5d passed %3d failed %3d skipped %5d s%s\n' "$1" "$p" "$f" "$s" "$4" "$died"
    if [ "$f" != 0 ]; then
        grep -E 'FAIL|ERROR|error|==[0-9]+==' "$3" | head -n 12
        [ -z "$died" ] || tail -n 5 "$3"
        echo "    all of it: $3"
    elif [ "$s" != 0 ]; then
        grep -E '^SKIPPED' "$3" | head -n 6
    fi
}

# run_logged NAME COMMAND...
run_logged() {
    name=$1
    shift
    mkdir -p build/log
    log=build/log/$(echo "$name" | tr '/ ' '--').txt
    start=$(date +%s)
    "$@" >"$log" 2>&1
    status=$?
    count "$name" $status "$log" $(($(date +%s) - start))
}

# later NAME COMMAND...: the same without the counting, for a process beside this one; `collect NAME` counts it.
later() {
    name=$1
    shift
    start=$(date +%s)
    "$@" >"build/log/$name.txt" 2>&1
    echo "$? $(($(date +%s) - start))" >"build/log/$name.done"
}
collect() {
    status=1 seconds=0
    read -r status seconds <"build/log/$1.done"
    count "$1" "$status" "build/log/$1.txt" "$seconds"
}

skip() {
    echo "SKIPPED $1: $2"
    skipped=$((skipped + 1))
}

# ------------------------------------------------------------------------------------------------ the tests

run_program() {                 # FOLDER NAME LABEL [WRAPPER...]
    folder=$1 program=$2 label=$3
    shift 3
    exe=$folder/$program
    [ -f "$exe" ] || exe=$exe.exe
    if [ ! -f "$exe" ]; then
        echo "FAIL $label: not built"
        failed=$((failed + 1))
        return
    fi
    case $program in
    fuzz) set -- "$@" "$exe" ${FUZZ_RUNS:+$FUZZ_RUNS} ;;
    *) set -- "$@" "$exe" ;;
    esac
    run_logged "$label" "$@"
}

run_parity() {                  # EXE LABEL GOLDEN... -- [WRAPPER...]
    exe=$1 label=$2
    shift 2
    cases=
    while [ $# -gt 0 ] && [ "$1" != -- ]; do cases="$cases $1"; shift; done
    [ $# -gt 0 ] && shift
    for root in $cases; do
        [ -d "$root" ] || { skip "$label $root" "not there"; continue; }
        for case in "$root"/*/; do
            [ -d "$case" ] && run_logged "$label ${case%/}" "$@" "$exe" "${case%/}"
        done
    done
}

run_asan() {
    SANITIZING=$(sanitizing_compiler)
    export SANITIZING
    if [ -z "$SANITIZING" ]; then skip asan "no compiler with sanitizers"; return; fi
    # shellcheck disable=SC2046
    build build/asan $(tests) parity
    for t in $(tests); do run_program build/asan "$t" "asan $t"; done
    run_parity build/asan/parity "asan parity" tests/golden --
}

# Valgrind knows no AVX-512 and tells programs so: what it runs is plain C and AVX2.
run_valgrind() {
    if ! have valgrind; then skip valgrind "not installed"; return; fi
    # shellcheck disable=SC2046
    build build/valgrind $(tests) parity
    for t in $(tests); do run_program build/valgrind "$t" "valgrind $t" valgrind -q --leak-check=full --error-exitcode=99; done
    run_parity build/valgrind/parity "valgrind parity" tests/golden -- valgrind -q --leak-check=full --error-exitcode=99
}

# mingw does not look where Debian puts stb.
run_wine() {
    wine=
    for w in wine64 wine /usr/lib/wine/wine64; do have $w && wine=$w && break; done
    if [ -z "$wine" ] || ! have x86_64-w64-mingw32-gcc; then skip wine "wine64 or gcc-mingw-w64-x86-64 is not installed"; return; fi
    WINEPREFIX=$PWD/build/wineprefix WINEDEBUG=-all
    export WINEPREFIX WINEDEBUG
    mkdir -p build/wine/include
    ln -sfn /usr/include/stb build/wine/include/stb
    # shellcheck disable=SC2046
    build build/wine $(tests) parity
    for t in $(tests); do run_program build/wine "$t" "wine $t" $wine; done
    run_parity build/wine/parity.exe "wine parity" tests/golden -- $wine
}

# The reference cases on each instruction set, and with one thread.
run_isa() {
    build build parity
    for isa in plain avx2 avx512; do
        for case in tests/golden/*/; do run_logged "isa $isa ${case%/}" build/parity "${case%/}" --isa $isa; done
    done
    for case in tests/golden/*/; do run_logged "one thread ${case%/}" build/parity "${case%/}" --threads 1; done
}

# The whole quickstart with each judge: as a user runs it, but for where the page goes.  It must teach something.
one_quickstart() {
    mkdir -p "build/quickstart-$1"
    sh examples/quickstart.sh --judge "$1" --out "$PWD/build/quickstart-$1" || { echo "0 passed, 1 failed"; return 1; }
    low=$(tail -n 1 "build/log/quickstart-$1.txt" | sed -n 's/^win rate [0-9.]* (95% CI \([0-9.]*\)-.*/\1/p')
    echo "the interval starts at ${low:-nothing}; 0.75 is wanted"
    if [ -n "$low" ] && [ "$(echo "$low" | awk '{ print ($1 > 0.75) }')" = 1 ]; then echo "1 passed, 0 failed"
    else echo "FAIL quickstart $1"; echo "0 passed, 1 failed"; fi
}
run_quickstart() {
    for judge in warm soft compact; do run_logged "quickstart $judge" one_quickstart $judge; done
}

# Models of the published sizes, in FULLSIZE (sd15 sdxl): made in build/fullsize-work, run, removed.
run_fullsize() {
    build build fullsize
    mkdir -p build/fullsize-work
    for size in ${FULLSIZE:-sd15 sdxl}; do
        need=2500000
        case $size in sdxl|refiner) need=8000000 ;; esac
        if [ "$(df -Pk build | awk 'NR == 2 { print $4 }')" -lt $need ]; then skip "fullsize $size" "less than $need KB of disk"; continue; fi
        run_logged "fullsize $size, making" build/fullsize make $size build/fullsize-work/$size.safetensors
        run_logged "fullsize $size" build/fullsize run build/fullsize-work/$size.safetensors
        grep -E ' s   resident|context held' "build/log/fullsize-$size.txt"
        rm -f build/fullsize-work/$size.safetensors
    done
}

run_named() {
    case $1 in
    compile)    run_logged compile sh tests/compile.sh ;;
    header)     run_logged header sh tests/check_header.sh ;;
    parity)     build build parity
                # shellcheck disable=SC2086
                run_parity build/parity parity $GOLDEN -- ;;
    asan)       run_asan ;;
    valgrind)   run_valgrind ;;
    wine)       run_wine ;;
    isa)        run_isa ;;
    quickstart) run_quickstart ;;
    interop)    build build interop convert; run_logged interop sh tests/interop.sh ;;
    fullsize)   run_fullsize ;;
    cuda_device) run_logged cuda_device sh tests/test_cuda.sh device ;;
    kills)      build build tiny_model quickstart sample train; KILLS=200 run_logged kills sh tests/test_trainer.sh ;;
    fuzz-long)  build build fuzz; FUZZ_RUNS=${FUZZ_RUNS:-200000} run_program build fuzz fuzz-long ;;
    default)    run_default ;;
    full)       run_default; for t in $LONG; do run_named $t; done ;;
    *)          if [ -f "tests/$1.sh" ]; then build build tiny_model quickstart sample train; run_logged "$1" sh "tests/$1.sh"; return; fi
                if [ ! -f "tests/$1.c" ]; then echo "run.sh: there is no test $1"; failed=$((failed + 1)); return; fi
                build build "$1"; run_program build "$1" "$1" ;;
    esac
}
LONG="isa asan valgrind wine fuzz-long quickstart"

# Compilers keep one processor busy while the programs run: the three tests that compile most run beside the others.
BESIDE="test_cuda test_arm compile"
run_default() {
    # shellcheck disable=SC2046
    build build $(programs | grep -vxE 'fullsize|trainer_memory')       # compile.sh parses these
    for p in $(programs); do
        case $p in test_*|fuzz|parity|tiny_model|interop|fullsize|trainer_memory|winrate) continue ;; esac
        if [ -f "build/$p" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi      # that it builds is its test
    done
    CUDA_ARCHS=${CUDA_ARCHS:-90}        # by name, test_cuda compiles for all
    export CUDA_ARCHS
    ( for t in $BESIDE; do rm -f "build/log/$t.done"; JOBS=1 later "$t" sh "tests/$t.sh"; done ) &
    for t in $(tests); do run_program build "$t" "$t"; done
    for t in $(scripts); do among "$t" "$BESIDE" || run_logged "$t" sh "tests/$t.sh"; done
    # shellcheck disable=SC2086
    run_parity build/parity parity $GOLDEN --
    run_named interop
    run_named header
    wait
    for t in $BESIDE; do collect "$t"; done
}

# ------------------------------------------------------------------------------------------------ command line

case ${1:-} in
--one)     build_one "$2" "$3"; exit ;;
--list)    tests; scripts; printf '%s\n' parity interop compile header $LONG full fullsize trainer_memory kills winrate trainer_mpi cuda_device; exit ;;
--build)   # shellcheck disable=SC2046
           mkdir -p build; build build $(programs) || exit 1; exit 0 ;;
--install) install_packages; shift ;;
-*)        sed -n '2,17s/^# \{0,1\}//p' tests/run.sh; exit 2 ;;
esac
mkdir -p build/log
if ! have "${CC%% *}"; then
    echo "run.sh: there is no C compiler $CC (apt-get install gcc libc6-dev, or sh tests/run.sh --install)"
    echo "0 passed, 1 failed"
    exit 1
fi
start_all=$(date +%s)
[ $# -gt 0 ] || set -- default
for t in "$@"; do run_named "$t"; done
echo "$(($(date +%s) - start_all)) s"
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"
else echo "$passed passed, $failed failed"; fi
[ $failed -eq 0 ]
