#!/bin/sh
# Installs what requirements.txt names and is missing here. No package that is here already is replaced:
# all of them are constraints (those with a version that pip can't read are nobody's requirement).
set -e
cd "$(dirname "$0")/.."
present=$(mktemp)
pip list --format=freeze | grep -E '==[0-9][0-9A-Za-z.+!]*$' > "$present"
pip install --quiet --disable-pip-version-check -c "$present" -r requirements.txt
rm "$present"
