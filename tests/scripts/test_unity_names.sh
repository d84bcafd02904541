#!/bin/sh
# A folder of core/ is compiled as a few large files, so what two of its files hide in anonymous namespaces meets: equal names of
# other types are errors, but equal names of functions become overloads, and the compiler may silently take the wrong one.
cd "$(dirname "$0")/../.." || exit 1
failed=0
for folder in core/*/; do
    found=$(find "$folder" -name '*.cpp' | sort | xargs awk '
        /^namespace \{$/ { inside = 1; next }
        /^\}  \/\/ namespace$/ { inside = 0; next }
        FNR == 1 { inside = 0 }
        inside && /^[A-Za-z]/ && /^(template ?<[^>]*> ?)?((struct|class|enum class) [A-Za-z_]+|[A-Za-z_:<>*&, \[\]0-9]+ [*&]?[a-z_0-9]+\()/ && !/^return / {
            line = $0
            sub(/^template ?<[^>]*> ?/, "", line)
            if (line ~ /^(struct|class|enum class) /) { sub(/^(struct|class|enum class) /, "", line); sub(/[^A-Za-z_0-9].*/, "", line) }
            else { sub(/\(.*/, "", line); sub(/.*[ *&]/, "", line) }
            if (line != "" && !seen[FILENAME, line]++) print line, FILENAME
        }' 2>/dev/null | sort | awk '{ files[$1] = files[$1] " " $2; n[$1]++ } END { for (name in n) if (n[name] > 1) print name ":" files[name] }')
    if [ -n "$found" ]; then
        echo "$found"
        failed=1
    fi
done
if [ $failed = 0 ]; then
    echo "ok no two files of a folder that are compiled together define the same name"
else
    echo "not ok no two files of a folder that are compiled together define the same name"
    echo "rename them: one name, one file within a folder" >&2
fi
exit $failed
