# counts.sh - read by test_arm.sh and test_cuda.sh, which keep passed and failed and name a file in log.

# counts NAME COMMAND...: a program that ends with the line of counts, which are added.  One that ends without it, or with
# a status that the line does not tell of, is one failure.
counts() {
    name=$1
    shift
    "$@" >$log 2>&1
    status=$?
    last=$(grep -E '^[0-9]+ passed, [0-9]+ failed' $log | tail -n 1)
    grep -E 'FAIL|SKIPPED' $log | head -n 10
    if [ -z "$last" ] || { [ $status -ne 0 ] && [ "${last#*passed, 0 failed}" != "$last" ]; }; then
        echo "FAIL  $name: ended with status $status"; tail -n 5 $log; failed=$((failed + 1)); return
    fi
    echo "ok    $name: $last"
    passed=$((passed + ${last%% passed*}))
    f=${last#*passed, }
    failed=$((failed + ${f%% failed*}))
}
