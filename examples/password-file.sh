#!/bin/sh
# Asks for a password and writes it to a file that only this user can read, for
# "password": "+FILE" in a job file and for --password=+FILE.
set -eu
[ $# = 1 ] || { echo "usage: $0 FILE" >&2; exit 2; }
umask 077
mkdir -p "$(dirname "$1")"
if [ -t 0 ]; then
	printf 'Password: ' >&2
	trap 'stty echo' EXIT
	stty -echo
fi
IFS= read -r password
printf '%s\n' "$password" >"$1.new"
mv "$1.new" "$1"
