#!/bin/sh
# Prints the first Python on PATH that can run the lab; $PYTHON, where set, is the only candidate.
if [ -n "$PYTHON" ]; then
    set -- "$PYTHON"
else
    set -- python3 python3.13 python3.12 python3.11 python3.14 .venv/bin/python
fi
for python; do
    if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
    then
        command -v "$python"
        exit 0
    fi
    seen="$seen $("$python" --version 2>/dev/null)"
done
seen=$(printf '%s\n' "$seen" | grep -o 'Python [0-9.]*' | sort -u | tr '\n' ',' | sed 's/,$//; s/,/, /g')
{
    echo "Set-up stopped: no Python that can run the lab${PYTHON:+ at PYTHON=$PYTHON}."
    echo "Why:  vLLM needs Python 3.11, 3.12, 3.13 or 3.14; found here: ${seen:-none}."
    echo "Next: install one (Debian, Ubuntu: sudo apt-get install python3.11 python3.11-venv;" \
         "Fedora, RHEL: sudo dnf install python3.12; without root: conda create -n lab python=3.12)" \
         "and run make again, with PYTHON=/path/to/python3 if it is not on PATH."
} >&2
exit 1
