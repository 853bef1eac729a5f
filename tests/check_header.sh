#!/bin/sh
# check_header.sh - does diffdpo.h keep to the rules that a reader relies on?
#
#   sh tests/check_header.sh [FILE]
#
# The contents list names every section, in order; functions are short; comments are neither rare nor endless; the text
# is ASCII; nothing in it prints, exits, or reads the environment.  Lengths of functions need universal-ctags.
cd "$(dirname "$0")/.." || exit 1
file=${1:-diffdpo.h}
work=build/check_header
mkdir -p $work
passed=0 failed=0 skipped=0

# verdict NAME FILE: passes if FILE is empty; else its first lines are the reason.
verdict() {
    if [ -s "$2" ]; then
        failed=$((failed + 1))
        echo "FAIL  $1:"
        head -n 8 "$2" | sed 's/^/      /'
    else
        passed=$((passed + 1))
        echo "ok    $1"
    fi
}

# The contents: from the line CONTENTS to the next empty one.  ">>api   a, b" stands for the banners ">>api a", ">>api b";
# where the text is not a list of names, only the tag counts.
awk '/^ *CONTENTS/ { on = 1; next } on && /^ *$/ { exit } on' "$file" >$work/contents
awk '/>>/ { tag = $1; sub(/^ *>>[a-z]+ */, "") }
     tag == ">>api" || tag == ">>impl" { n = split($0, names, /, */); for (i = 1; i <= n; i++) {
         gsub(/^ +| +$/, "", names[i]); if (names[i] != "") print tag " " names[i] }; next }
     { print tag }' $work/contents | uniq >$work/named
grep -E '^   >>' "$file" | awk '{ if ($1 == ">>api" || $1 == ">>impl") print $1 " " $2; else print $1 }' >$work/banners
diff $work/named $work/banners >$work/out
[ -s $work/named ] || echo "no contents list in the first comment" >$work/out
verdict "contents list and sections agree (< listed, > there)" $work/out
sort $work/banners | uniq -d >$work/out
verdict "no section twice" $work/out

LC_ALL=C grep -n '[^ -~]' "$file" >$work/out
verdict "printable ASCII, no tabs" $work/out
awk 'length($0) > 160 { print FILENAME ":" NR ": " length($0) " characters" }' "$file" >$work/out
verdict "no line over 160 characters" $work/out
grep -n ' $' "$file" >$work/out
verdict "no blanks at ends of lines" $work/out

# Code without comments and strings, line by line.
awk '{ line = $0; out = ""
       gsub(/\\./, "", line); gsub(/"[^"]*"/, "\"\"", line); gsub(/'"'"'[^'"'"']*'"'"'/, "0", line)
       while (line != "") {
           if (inside) { i = index(line, "*/"); if (!i) break; line = substr(line, i + 2); inside = 0; continue }
           i = index(line, "/*"); j = index(line, "//")
           if (j && (!i || j < i)) { out = out substr(line, 1, j - 1); break }
           if (!i) { out = out line; break }
           out = out substr(line, 1, i - 1) " "; line = substr(line, i + 2); inside = 1
       }
       print NR ": " out }' "$file" >$work/code
awk '/dpo_log_stderr\(/ && !/;/ { skip = 1 } !skip; /^[0-9]+: }/ { skip = 0 }' $work/code |
    grep -E '[^a-z_.>](printf|puts|putchar|fprintf|vfprintf|perror|exit|_exit|abort|assert|getenv|setlocale|system|strtod|strtof|atof|rand|srand|strtok|signal) *\(' >$work/out
verdict "nothing prints, exits, asks the environment or the locale" $work/out

awk '{ s = $0; gsub(/\\./, "", s); gsub(/"[^"]*"/, "\"\"", s); gsub(/^ +| +$/, "", s)
       if (s != "") n++
       if (inside) { c++; inside = !index(s, "*/"); next }
       if (index(s, "//") || index(s, "/*")) { c++
           i = 0; while ((k = index(substr(s, i + 1), "/*")) > 0) i += k
           if (i) inside = !index(substr(s, i), "*/") } }
     END { share = 100*c/n; if (share < 18 || share > 33) printf "%.1f %% of the lines hold a comment, 18 to 33 are wanted\n", share
           else printf "%.1f %%\n", share >"/dev/stderr" }' "$file" >$work/out 2>$work/share
verdict "comments: $(cat $work/share)" $work/out

if ctags --version 2>/dev/null | grep -q Universal; then
    ctags --language-force=C++ --fields=+ne --kinds-C++=f -f - "$file" 2>/dev/null |
        awk -F '\t' '{ for (i = 4; i <= NF; i++) { if ($i ~ /^line:/) a = substr($i, 6); if ($i ~ /^end:/) { print substr($i, 5) - a + 1, $1, a } } }' |
        sort -n >$work/lengths
    awk '$1 > 100 { print $2 " (line " $3 ") has " $1 " lines" }' $work/lengths >$work/out
    [ -s $work/lengths ] || echo "ctags found no function" >$work/out
    verdict "no function over 100 lines ($(tail -n 1 $work/lengths))" $work/out
    awk '{ l[NR] = $1 } END { m = l[int((NR + 1)/2)]; p = l[int(NR*9/10) + 1]
           if (m > 15) print "the median is " m; if (p > 60) print "one in ten has " p " lines or more" }' $work/lengths >$work/out
    verdict "functions: median at most 15 lines, nine in ten at most 60 ($(wc -l <$work/lengths) functions)" $work/out
else
    echo "SKIPPED lengths of functions: universal-ctags is not installed"
    skipped=$((skipped + 1))
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
